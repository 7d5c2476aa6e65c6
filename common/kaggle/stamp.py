"""The stamp of downloaded data: what was unpacked, so that complete data is left alone and damage is noticed."""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from common.archive import Entry
from common.errors import UserError
from common.files import write_text

SHOWN = 3  # so many damaged files are named


@dataclass(frozen=True)
class Stamp:
    """Sizes and sha256 of the files below `home`, kept beside it in <home>.stamp.json."""

    home: Path
    part: str  # "all", or "labels" for the label files alone
    files: dict[str, Entry]
    times: dict[str, int]  # modification times in ns: a file whose size and time are unchanged is not hashed again
    source: str

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files.values())

    def write(self) -> None:
        facts = {
            "source": self.source,
            "created": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            "part": self.part,
            "files": {name: {**asdict(entry), "mtime_ns": self.times[name]} for name, entry in self.files.items()},
        }
        write_text(path_of(self.home), json.dumps(facts, indent=1) + "\n")

    def damage(self) -> list[str]:
        """What is wrong with the files now: missing, another size, or changed since and another content."""
        problems, touched = [], False
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
            self.write()
        return problems


def path_of(home: Path) -> Path:
    return home.with_name(f"{home.name}.stamp.json")


def make(home: Path, folder: Path, part: str, files: dict[str, Entry], source: str) -> Stamp:
    """The stamp for files that lie in `folder` now and will be moved to `home`."""
    return Stamp(home, part, files, {name: (folder / name).stat().st_mtime_ns for name in files}, source)


def read(home: Path) -> Stamp | None:
    """The stamp of `home`, or None where `make data` has made nothing yet or the stamp cannot be read."""
    try:
        facts = json.loads(path_of(home).read_text())
        entries = {name: Entry(entry["size"], entry["sha256"]) for name, entry in facts["files"].items()}
        times = {name: entry["mtime_ns"] for name, entry in facts["files"].items()}
        return Stamp(home, facts["part"], entries, times, facts["source"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def listed(problems: list[str]) -> str:
    more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return "; ".join(problems[:SHOWN]) + more


def install(draft: Path, stamp: Stamp, previous: Stamp | None) -> None:
    """Put the complete folder `draft` in the place of the stamp's home, together with its stamp.

    Files that a previous `make data` did not bring (images fetched since) move over; those it brought are replaced.
    The stamp goes first: at any moment the folder is either what a stamp says, or found damaged and made again.
    """
    home = stamp.home
    brought = {name.split("/")[0] for name in (previous.files if previous else {})} | {"cache"}
    old = home.with_name(f".{home.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    stamp.write()
    try:
        if home.is_dir():
            home.rename(old)
            for path in old.iterdir():
                if path.name not in brought and not (draft / path.name).exists():
                    path.rename(draft / path.name)
        draft.rename(home)
    except OSError as error:
        raise UserError(f"{home} could not be put in place ({error.strerror}): check who owns {home.parent}") from error
    shutil.rmtree(old, ignore_errors=True)


def recover(home: Path) -> None:
    """Undo the first half of an `install` that was killed between its two renames."""
    old = home.with_name(f".{home.name}.old")
    if old.is_dir() and not home.exists():
        old.rename(home)


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
