"""The manifest of downloaded data, .manifest.json in their folder, and the replacement of one folder by another."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

from common.archive import Entry
from common.errors import UserError, some
from common.files import sha256, write_text

NAME = ".manifest.json"


@dataclass(frozen=True)
class File(Entry):
    """A file that `make data` fetched; it is hashed again only when its modification time has changed."""

    mtime_ns: int


@dataclass(frozen=True)
class Manifest:
    """The files that `make data` fetched and their source; `part` is "all", or "labels" for only the label files."""

    part: str
    files: dict[str, File]
    source: str

    def write(self, home: Path) -> None:
        write_text(home / NAME, json.dumps({"created": f"{datetime.now(UTC):%FT%TZ}", **asdict(self)}, indent=1) + "\n")

    def damage(self, home: Path, names: Iterable[str] | None = None) -> list[str]:
        """One message for each of the files (all, or `names`) that is missing, has another size or was changed."""
        problems, moved = [], {}
        for name in self.files if names is None else names:
            file, path = self.files[name], home / name
            try:
                found = path.stat()
                if found.st_size != file.size:
                    problems.append(f"{name} has {found.st_size:,} bytes, expected {file.size:,}")
                elif found.st_mtime_ns != file.mtime_ns:
                    moved[name] = replace(file, mtime_ns=found.st_mtime_ns)
                    if sha256(path) != file.sha256:
                        problems.append(f"{name} was changed")
            except OSError:
                problems.append(f"{name} is missing")
        if moved and not problems:  # copied, not damaged: keep the new times, so that they are hashed only once
            replace(self, files=self.files | moved).write(home)
        return problems


def made(folder: Path, part: str, entries: dict[str, Entry], source: str) -> Manifest:
    """The manifest of the files `entries` in `folder`."""
    files = {name: File(**asdict(one), mtime_ns=(folder / name).stat().st_mtime_ns) for name, one in entries.items()}
    return Manifest(part, files, source)


def read(home: Path) -> Manifest | None:
    """The manifest of `home`, or None if there is none yet or it cannot be read."""
    try:
        facts = json.loads((home / NAME).read_text())
        return Manifest(facts["part"], {name: File(**file) for name, file in facts["files"].items()}, facts["source"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


@contextmanager
def _placing(home: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{home} could not be put in place ({error.strerror or error}): check who owns it (if it is a mount "
            "point, mount the folder above it), then repeat the same command, it goes on where it stopped"
        ) from error


def install(made: Manifest, draft: Path, home: Path, kept: str) -> None:
    """Replace `home` by the folder `draft` with its manifest: two renames, then `settle`."""
    made.write(draft)
    with _placing(home):
        try:
            if home.is_dir():
                home.rename(home.with_name(f".{home.name}.old"))
            draft.rename(home)
        finally:
            settle(home, kept)


def settle(home: Path, kept: str) -> None:
    """Clear away the old folder of an `install`, also of an interrupted one; no file of the user is deleted.

    Without a new folder the old one is put back. Else files that the new manifest names, and all below `kept`, move to
    the new folder, and other files that `make data` did not fetch move to <home>.before.
    """
    aside = home.with_name(f".{home.name}.old")
    if not aside.is_dir():
        return
    with _placing(home):
        if not home.is_dir():
            aside.rename(home)
            return
        names = (home.with_name(f"{home.name}.before{n if n > 1 else ''}") for n in count(1))
        before = next(path for path in names if not os.path.lexists(path) or not any(path.glob("*")))
        wanted, brought = (one.files if one else {} for one in (read(home), read(aside)))
        own = []
        for path in [path for path in aside.rglob("*") if path.is_symlink() or not path.is_dir()]:
            name = str(path.relative_to(aside))
            is_kept = name in wanted or (kept and name.startswith(f"{kept}/"))
            if is_kept and not os.path.lexists(home / name):
                target = home / name
            elif name in brought or name.startswith("cache/") or path.name in (NAME, ".DS_Store"):
                continue
            else:
                target = before / name
                own.append(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
        if own:
            print(f"moved to {before}, as make data did not fetch them: {some(sorted(own), by='; ')}")
        shutil.rmtree(aside)
