"""The raw data of a competition: a folder or the archive as it was downloaded, or demo data."""

import csv
import hashlib
import io
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from common.archive import BY_HAND, DAMAGED, Damaged, refuse_bomb, unpack
from common.competition import COMPETITIONS
from common.errors import UserError
from common.files import alone_in, expanded, is_foreign, not_written, sha256

DATA = Path("data")
CACHE = "cache"  # the kit's own folder beside the data
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar")
END = "\0end"  # added as the last line: in a CSV with an unclosed quote it becomes part of a cell
MADE_BY = ".made-by"  # in demo data: the sha256 of the demo.py that made them


@dataclass(frozen=True)
class RawData:
    """Files of a competition under one `path`, a folder or a zip archive, opened by their names on Kaggle."""

    path: Path
    competition: str
    is_demo: bool = False
    lenient: bool = False  # for predictions with --fallback: a missing image counts as unreadable
    # The files that a task has read: name -> sha256, "" until it is computed.
    _opened: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def _archive(self) -> zipfile.ZipFile | None:
        if self.path.is_dir():
            return None
        try:
            return zipfile.ZipFile(self.path)
        except PermissionError as error:
            raise _forbidden(self.path, error) from error
        except (*DAMAGED, OSError) as error:
            raise UserError(
                f"{self.path} is not a complete zip archive ({error}): {self._again}, or pass "
                f"DATA=/path/to/folder-or-zip; if it is an archive of another kind (tar.gz, 7z), {BY_HAND}"
            ) from error

    @cached_property
    def _members(self) -> dict[str, str]:
        """Every file's name with plain forward slashes -> its name in the archive."""
        found: dict[str, str] = {}
        for own in self._archive.namelist():
            name = PurePosixPath(own.replace("\\", "/"))  # ./a.csv is a.csv
            if own.endswith(("/", "\\")) or any(map(is_foreign, name.parts)):
                continue
            if str(name) in found:
                raise UserError(f"{self.path} holds {name} twice, expected one file of a name: {self._again}")
            found[str(name)] = own
        return found

    @property
    def _again(self) -> str:
        return f"download it again with make data COMP={self.competition}"

    @property
    def mend(self) -> str:
        """What to do about a fault in a table, to end an error with."""
        if self.is_demo:
            return f"mend competitions/{self.competition}/demo.py"
        return f"mend the file, or get it again with make data COMP={self.competition}"

    def uncounted(self) -> "RawData":
        """The same files, but reading them does not change `opened_fingerprint`.

        For files without influence on the training, such as the sample submission: a run can be resumed after one of
        them was corrected.
        """
        return replace(self, _opened={})

    def names(self) -> list[str]:
        """Sorted names of all files, relative to the data, also in linked folders.

        Without hidden files, files that macOS adds, and the cache. Raises UserError for a name that is not UTF-8.
        """
        return sorted(self._members if self._archive is not None else files_under(self.path, but=self.path / CACHE))

    def matching(self, pattern: str) -> list[str]:
        """Names of files whose last part matches `pattern`, such as sample_submission*.csv, ignoring case."""
        return [name for name in self.names() if fnmatchcase(PurePosixPath(name).name.lower(), pattern.lower())]

    def exists(self, name: str) -> bool:
        try:
            return self._own_name(name) is not None
        except PermissionError as error:
            raise _forbidden(self.path / name, error) from error

    def _own_name(self, name: str) -> str | None:
        """The file's real name: `name`, or the one that differs from it only in case; None where there is neither."""
        if self._archive is not None:
            if name in self._members:
                return name
            alike = [own for own in self._members if own.lower() == name.lower()]
        else:
            if (self.path / name).is_file():
                return name
            folder, last = (self.path / name).parent, Path(name).name.lower()
            there = folder.iterdir() if folder.is_dir() else ()
            alike = [str(own.relative_to(self.path)) for own in there if own.name.lower() == last and own.is_file()]
        if len(alike) > 1:
            raise UserError(f"{self.path} has no {name}, but {' and '.join(sorted(alike))}: remove or rename one")
        return alike[0] if alike else None

    def open(self, name: str) -> BinaryIO:
        """The file as a binary stream; raises UserError when it is missing or its archive is damaged."""
        stream = self._open(name)
        self._opened.setdefault(name, "")
        return stream

    def _open(self, name: str) -> BinaryIO:
        try:
            own = self._own_name(name)
            if own is None:
                raise self._missing(name)
            if self._archive is None:
                return open(self.path / own, "rb")
            member = self._archive.getinfo(self._members[own])
            refuse_bomb(name, member.file_size, member.compress_size, str(self.path))  # it may be read into memory
            return self._archive.open(member)
        except PermissionError as error:
            raise _forbidden(self.path / name, error) from error
        except (*DAMAGED, OSError) as error:
            remedy = BY_HAND if isinstance(error, RuntimeError) else self._again  # encrypted, or Windows' Deflate64
            raise UserError(f"{self.path}: {name} cannot be read ({error}): {remedy}") from error

    def _missing(self, name: str) -> UserError:
        names = self.names()
        pass_it = "or pass DATA=/path/to/folder-or-zip"
        if deeper := [own for own in names if own.lower().endswith(f"/{name.lower()}")]:
            top = deeper[0][: -len(name) - 1]  # the whole folder was packed or unpacked, not its content
            pass_it = f"or pass DATA={self.path / top}" if self._archive is None else f"or unpack it and pass its {top}"
        elif packed := [own for own in names if own.lower().endswith(ARCHIVES)]:
            own = min(packed, key=lambda own: not own.lower().startswith(f"{name.lower()}."))  # first train.csv.zip
            pass_it = f"or unpack {own} and pass DATA=/path/to/folder"
        return UserError(
            f"{self.path} has no {name} (found: {', '.join(names[:8]) or 'nothing'}): get the files with "
            f"make data COMP={self.competition}, {pass_it}"
        )

    def read(self, name: str) -> bytes:
        """The whole file; raises UserError when the archive is truncated or its checksum is wrong."""
        with self._whole(name) as stream:
            contents = stream.read()
        self._opened[name] = hashlib.sha256(contents).hexdigest()
        return contents

    @contextmanager
    def _whole(self, name: str) -> Iterator[BinaryIO]:
        """A file that the block reads to its end; raises UserError when that finds damage."""
        try:
            with self._open(name) as stream:
                yield stream
        except (*DAMAGED, OSError) as error:
            raise UserError(f"{self.path}: {name} is damaged ({error}): {self._again}") from error

    def text(self, name: str) -> str:
        """The whole file as text in UTF-8, without a byte order mark; raises UserError naming the first bad byte."""
        contents = self.read(name)
        try:
            return contents.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = contents.count(b"\n", 0, error.start) + 1
            raise UserError(
                f"{self.path}/{name} line {line}: byte {contents[error.start]:#04x} is not UTF-8 text: {self.mend}"
            ) from error

    def rows(self, name: str) -> Iterator[tuple[int, list[str]]]:
        """The rows of a CSV, each with the number of the line that it ends in; blank lines are left out.

        Raises UserError when it reaches a quote that is not closed: its cell would take in all rows after it.
        """
        lines = io.StringIO(self.text(name), newline="")  # a quoted cell may hold line breaks
        reader, line = csv.reader(chain(lines, [END])), 1
        for row in reader:
            if row == [END]:
                return
            if row and row[-1].endswith(END):
                raise UserError(f"{self.path}/{name} line {line}: a quote opens here and is not closed: {self.mend}")
            if row:
                yield reader.line_num, row
            line = reader.line_num + 1

    def folder(self) -> Path:
        """A folder that holds the files; an archive is unpacked once into the cache."""
        if self._archive is None:
            return self.path
        found = self.path.stat()
        key = f"{self.path.resolve()} {found.st_size} {found.st_mtime_ns}"
        target = self.cache / f"unpacked-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        if not target.is_dir():
            try:
                with alone_in(self.cache, ".unpacked-*.part"):
                    if not target.is_dir():
                        unpack(self.path, target)
            except Damaged as error:
                raise UserError(f"{self.path}: {error}: {self._again}, or pass DATA=/path/to/folder-or-zip") from error
        return target

    def opened_fingerprint(self) -> str:
        """sha256 over names and contents of the files opened so far, in whatever order they were opened.

        The same data gives the same value on any machine, from a folder and from an archive.
        """
        facts = []
        for name, found in sorted(self._opened.items()):
            if found == "":
                with self._whole(name) as stream:
                    found = self._opened[name] = sha256(stream)
            facts.append(f"{name}\0{found}\n")
        return hashlib.sha256("".join(facts).encode()).hexdigest()

    @cached_property
    def cache(self) -> Path:
        """Folder for derived files: `cache/` beside the data, or under data/cache where that cannot be written."""
        beside = (self.path if self.path.is_dir() else self.path.parent) / CACHE
        for folder in (beside, DATA / CACHE / self.competition):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if os.access(folder, os.W_OK):
                    return folder
            except OSError:
                continue
        raise UserError(
            f"neither {beside} nor {DATA / CACHE} can be written: free disk space, or make them writable; for a folder "
            f"of images, --cache-gb 0 needs neither"
        )


def find(competition: str, given: str | None, write_demo: Callable[[Path], None], announce=print) -> RawData:
    """The data to use: `given` (DATA=), else data/<competition>, else demo data, which it announces.

    Raises UserError for a path that is missing, unreadable, or not UTF-8: a run could not record it.
    """
    path = expanded(given or DATA, f"DATA={given}")
    for name in (path.absolute(), path.resolve()):
        _refuse_bytes(str(name))
    if given:
        try:
            if not path.exists():
                raise UserError(
                    f"DATA={given} does not exist: pass the folder or the zip archive of the competition's files"
                )
            return RawData(_only_archive(path), competition, would_be_demo(competition, given))
        except PermissionError as error:
            raise _forbidden(path, error) from error
    home = DATA / competition
    if visible(home):
        return RawData(_only_archive(home), competition)
    announce(
        f"demo: no data in {home}, so small generated demo data take its place. Real data: "
        f"make data COMP={competition}, or DATA=/path/to/folder-or-zip"
    )
    return RawData(_demo(competition, write_demo), competition, is_demo=True)


def would_be_demo(competition: str, given: str | None) -> bool:
    """Whether `find` would take demo data."""
    if given:
        return expanded(given, f"DATA={given}").resolve().is_relative_to((DATA / "demo").resolve())
    return not visible(DATA / competition)


def of_run(provenance: dict[str, Any], given: str | None, write_demo: Callable[[Path], None]) -> RawData:
    """The data for predicting with a run: `given` (DATA=), else those it was trained on, demo data included.

    A run that was trained on another machine uses data/<competition>.
    """
    competition, known = provenance["competition"], provenance["data"]
    if provenance["demo"] and not given:
        return RawData(_demo(competition, write_demo), competition, is_demo=True)
    if not given and not os.path.exists(known):
        if not visible(DATA / competition):
            raise UserError(
                f"the run was trained on {known}, which is gone, and there is nothing in {DATA / competition}: "
                f"make data COMP={competition}, or pass DATA=/path/to/folder-or-zip"
            )
        known = str(DATA / competition)
    return find(competition, given or known, write_demo)


def _forbidden(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be read ({error.strerror}): make it readable for you, or pass another DATA=")


def _refuse_bytes(path: str) -> None:
    """Raises UserError for a name that is not UTF-8; unzip makes such names from archives of other systems."""
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{os.fsencode(path).decode('utf-8', 'backslashreplace')} has a name that is not UTF-8, which tables, logs "
            f"and reports are written in: rename it, or unpack its archive again with unzip -O"
        ) from error


def _only_archive(path: Path) -> Path:
    """The single zip in a folder, else the path: `kaggle competitions download -p DIR` leaves a folder with one zip."""
    files = visible(path)
    return files[0] if len(files) == 1 and files[0].suffix.lower() == ".zip" else path


def visible(folder: Path) -> list[Path]:
    """The user's files: without hidden ones, those that macOS adds, and the cache. Empty where there is no folder."""
    try:
        there = folder.iterdir() if folder.is_dir() else ()
        return [file for file in there if file.name != CACHE and not is_foreign(file.name)]
    except PermissionError as error:
        raise _forbidden(folder, error) from error


def files_under(root: Path, but: Path | None = None, dangling: bool = False) -> Iterator[str]:
    """Relative names of all files under `root`, also in linked folders; a link to a folder above it is not followed.

    Without hidden files, files that macOS adds, and the folder `but`; links that lead nowhere only if `dangling`.
    Raises UserError for names that are not UTF-8 and folders that may not be read.
    Does not use pathlib's rglob, which silently follows no links before Python 3.13.
    """
    waiting: list[tuple[Path, str, frozenset]] = [(root, "", frozenset())]
    while waiting:
        folder, place, above = waiting.pop()
        try:
            found = folder.stat()
            if (found.st_dev, found.st_ino) in above:
                continue
            above |= {(found.st_dev, found.st_ino)}
            with os.scandir(folder) as entries:
                for entry in entries:
                    if is_foreign(entry.name) or folder / entry.name == but:
                        continue
                    _refuse_bytes(entry.path)
                    if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                        waiting.append((folder / entry.name, f"{place}{entry.name}/", above))
                    elif (dangling or os.path.isfile(entry.path)) if entry.is_symlink() else entry.is_file():
                        yield place + entry.name
        except PermissionError as error:
            raise _forbidden(folder, error) from error


def _demo(competition: str, write_demo: Callable[[Path], None]) -> Path:
    """The demo data's folder; its files are generated once, and again after demo.py has changed.

    They are written to another folder, which is renamed once it is complete.
    Raises UserError when the disk is full or when `write_demo` writes nothing; on any error no files are left.
    """
    folder, source = DATA / "demo" / competition, COMPETITIONS / competition / "demo.py"
    made_by, stamp = sha256(source) if source.is_file() else "", folder / MADE_BY
    draft = folder.with_name(f"{competition}.{os.getpid()}.part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with alone_in(folder.parent, f"{competition}.*.part"):
            if visible(folder) and made_by in ("", stamp.read_text() if stamp.is_file() else None):
                return folder
            draft.mkdir()
            write_demo(draft)
            if not visible(draft):
                raise UserError(f"competitions/{competition}: write_demo wrote no file, expected demo data")
            (draft / MADE_BY).write_text(made_by)
            shutil.rmtree(folder, ignore_errors=True)  # an empty one, or of another demo.py
            draft.rename(folder)
    except OSError as error:
        if not visible(folder):  # without locks another process may have been faster
            raise not_written(folder, error) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder
