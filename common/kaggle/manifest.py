"""The manifest of downloaded data: what was unpacked, so that complete data is left alone and damage is noticed."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from common.archive import Entry
from common.errors import UserError
from common.files import write_text

SHOWN = 3  # so many damaged files are named


@dataclass(frozen=True)
class Manifest:
    """Sizes and sha256 of the files below `home`, kept beside it in <home>.manifest.json."""

    home: Path
    part: str  # "all", or "labels" for the label files alone
    files: dict[str, Entry]
    times: dict[str, int]  # modification times in ns: a file whose size and time are unchanged is not hashed again
    source: str
    outdated: tuple[str, ...] = ()  # files of older data that `install` has still to delete

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files.values())

    def added_to(self, whole: "Manifest") -> "Manifest":
        """The manifest of a whole folder in which only the files of this one were replaced."""
        return replace(whole, files=whole.files | self.files, times=whole.times | self.times)

    def write(self) -> None:
        facts = {
            "source": self.source,
            "created": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            "part": self.part,
            "outdated": self.outdated,
            "files": {name: {**asdict(entry), "mtime_ns": self.times[name]} for name, entry in self.files.items()},
        }
        write_text(path_of(self.home), json.dumps(facts, indent=1) + "\n")

    def damage(self) -> list[str]:
        """What is wrong with the files: missing, another size, changed since and another content, or of older data."""
        problems = [
            f"{name} is left over from older data" for name in self.outdated if os.path.isfile(self.home / name)
        ]
        touched = bool(self.outdated)
        for name, entry in self.files.items():
            file = self.home / name
            try:
                found = file.stat()
                if found.st_size != entry.size:
                    problems.append(f"{name} has {found.st_size:,} bytes, expected {entry.size:,}")
                elif found.st_mtime_ns != self.times[name]:
                    if _sha256(file) == entry.sha256:
                        self.times[name], touched = found.st_mtime_ns, True
                    else:
                        problems.append(f"{name} was changed")
            except OSError:
                problems.append(f"{name} is missing")
        if touched and not problems:  # moved or copied, not damaged: hashed once and not again
            replace(self, outdated=()).write()
        return problems


def path_of(home: Path) -> Path:
    return home.with_name(f"{home.name}.manifest.json")


def make(home: Path, folder: Path, part: str, files: dict[str, Entry], source: str) -> Manifest:
    """The manifest for files that lie in `folder` now and will be moved to `home`."""
    return Manifest(home, part, files, {name: (folder / name).stat().st_mtime_ns for name in files}, source)


def read(home: Path) -> Manifest | None:
    """The manifest of `home`, or None where `make data` has made nothing yet or the manifest cannot be read."""
    try:
        facts = json.loads(path_of(home).read_text())
        entries = {name: Entry(entry["size"], entry["sha256"]) for name, entry in facts["files"].items()}
        times = {name: entry["mtime_ns"] for name, entry in facts["files"].items()}
        return Manifest(home, facts["part"], entries, times, facts["source"], tuple(facts.get("outdated", ())))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def listed(problems: list[str]) -> str:
    more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return "; ".join(problems[:SHOWN]) + more


def install(draft: Path, manifest: Manifest, previous: Manifest | None) -> None:
    """Move the files in `draft` to the manifest's home, in the place of those that a previous `make data` brought.

    Files that it did not bring (images fetched since, the user's own) stay where they are, so that nothing can be lost
    on the way; one that is in the way of a new file moves to <home>.before. The manifest goes before the files and
    names those that have to go: killed in between, the folder is found damaged and made again, and nothing old stays.
    """
    home, brought = manifest.home, {*previous.files, *previous.outdated} if previous else set()
    manifest = replace(manifest, outdated=tuple(sorted(brought - manifest.files.keys())))
    try:
        _set_aside(home, list(_in_the_way(manifest, brought)))
        manifest.write()
        for name in manifest.outdated:
            _remove(home, name)
        shutil.rmtree(home / "cache", ignore_errors=True)  # was made from the old files
        _merge(draft, home)
        if manifest.outdated:
            replace(manifest, outdated=()).write()
    except OSError as error:
        raise UserError(
            f"{home} could not be put in place ({error}): check who owns it, then repeat the same command; it goes on "
            "where it stopped"
        ) from error


def _in_the_way(manifest: Manifest, brought: set[str]) -> Iterator[Path]:
    """What lies where a new file or its folder has to, was not brought by `make data` and is not that very file."""
    for name, entry in manifest.files.items():
        parts = Path(name).parts
        for depth in range(1, len(parts) + 1):
            path, is_file = manifest.home.joinpath(*parts[:depth]), depth == len(parts)
            if path.is_dir() and not is_file:
                continue
            if path.is_dir() or (
                os.path.lexists(path)
                and "/".join(parts[:depth]) not in brought
                and not (is_file and path.is_file() and _is(path, entry))
            ):
                yield path
            break


def _set_aside(home: Path, paths: list[Path]) -> None:
    if not paths:
        return
    aside, number = home.with_name(f"{home.name}.before"), 1
    while aside.exists():
        number += 1
        aside = home.with_name(f"{home.name}.before{number}")
    paths = list(dict.fromkeys(paths))
    print(f"{aside} takes what is in the way of new files: {listed([str(path.relative_to(home)) for path in paths])}")
    for path in paths:
        target = aside / path.relative_to(home)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target)


def _remove(home: Path, name: str) -> None:
    """Delete a file that the new data have no more, and folders that are empty then; links to folders stay."""
    path = home / name
    if path.is_file():
        path.unlink()
        while (path := path.parent) != home and not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()


def _merge(source: Path, target: Path) -> None:
    if target.is_dir():
        for entry in source.iterdir():
            _merge(entry, target / entry.name)
        return
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        if source.is_dir():
            target.mkdir()
            _merge(source, target)
        else:
            _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    """To another disk; as with a rename, what `target` links to and who has it open keep the old content."""
    part = target.with_name(f".{target.name}.part")
    part.unlink(missing_ok=True)  # of a copy that was killed
    try:
        shutil.copy2(source, part)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _is(file: Path, entry: Entry) -> bool:
    return file.stat().st_size == entry.size and _sha256(file) == entry.sha256


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
