"""The raw data of a competition: a folder or the archive as it was downloaded, or demo data."""

import csv
import hashlib
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from common.archive import DAMAGED, Damaged, refuse_bomb, unpack
from common.errors import UserError
from common.files import is_visible, not_written, sha256

DATA = Path("data")


@dataclass(frozen=True)
class RawData:
    """Files of a competition under one `path`, a folder or a zip archive, opened by their names on Kaggle."""

    path: Path
    competition: str
    is_demo: bool = False

    @cached_property
    def _archive(self) -> zipfile.ZipFile | None:
        if self.path.is_dir():
            return None
        try:
            return zipfile.ZipFile(self.path)
        except PermissionError as error:
            raise _forbidden(self.path, error) from error
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(
                f"{self.path} is not a whole zip archive ({error}): download it again with "
                f"make data COMP={self.competition}, or pass DATA=/path/to/folder-or-zip"
            ) from error

    def names(self) -> list[str]:
        """Names of all files, relative to the data, sorted; neither hidden ones nor what a Mac adds, nor the cache."""
        if self._archive is not None:
            return sorted(name for name in self._archive.namelist() if not name.endswith("/") and is_visible(name))
        found = []
        for folder, folders, files in os.walk(self.path, followlinks=True):
            here = Path(folder)
            folders[:] = [name for name in folders if is_visible(name) and not _leads_back(here / name)]
            if here == self.path and "cache" in folders:
                folders.remove("cache")
            found += [here / name for name in files if is_visible(name) and (here / name).is_file()]
        return sorted(str(file.relative_to(self.path)) for file in found)

    def exists(self, name: str) -> bool:
        return name in self._archive.namelist() if self._archive is not None else (self.path / name).is_file()

    def open(self, name: str) -> BinaryIO:
        """The file as a binary stream; raises UserError when it is missing or its archive is damaged."""
        if not self.exists(name):
            found = ", ".join(self.names()[:8]) or "nothing"
            raise UserError(
                f"{self.path} has no {name} (found: {found}): get the files with "
                f"make data COMP={self.competition}, or pass DATA=/path/to/folder-or-zip"
            )
        try:
            if self._archive is None:
                return open(self.path / name, "rb")
            member = self._archive.getinfo(name)
            refuse_bomb(name, member.file_size, member.compress_size, str(self.path))  # it may be read into memory
            return self._archive.open(name)
        except PermissionError as error:
            raise _forbidden(self.path / name, error) from error
        except (*DAMAGED, OSError) as error:
            raise UserError(
                f"{self.path}: {name} cannot be read ({error}): download it again with "
                f"make data COMP={self.competition}"
            ) from error

    def read(self, name: str) -> bytes:
        """The whole file; raises UserError when the archive is truncated or its checksum is wrong."""
        try:
            with self.open(name) as stream:
                return stream.read()
        except (*DAMAGED, OSError) as error:
            raise UserError(
                f"{self.path}: {name} is damaged ({error}): download it again with make data COMP={self.competition}"
            ) from error

    def text(self, name: str) -> str:
        """The whole file as text in UTF-8, without a byte order mark; raises UserError naming the first bad byte."""
        contents = self.read(name)
        try:
            return contents.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = contents.count(b"\n", 0, error.start) + 1
            raise UserError(
                f"{self.path}/{name} line {line}: byte {contents[error.start]:#04x} is no UTF-8 text: mend the "
                f"file, or get it again with make data COMP={self.competition}"
            ) from error

    def rows(self, name: str) -> Iterator[tuple[int, list[str]]]:
        """The rows of a CSV and the lines they end in; blank lines are left out."""
        reader = csv.reader(self.text(name).splitlines())
        return ((reader.line_num, row) for row in reader if row)

    def folder(self) -> Path:
        """A folder that holds the files; an archive is unpacked once into the cache."""
        if self._archive is None:
            return self.path
        target = self.cache / f"unpacked-{self.stamp()[:16]}"
        if not target.is_dir():
            try:
                unpack(self.path, target)
            except Damaged as error:
                raise UserError(
                    f"{self.path}: {error}: download it again with make data COMP={self.competition}, or pass "
                    "DATA=/path/to/folder-or-zip"
                ) from error
        return target

    def stamp(self, *names: str) -> str:
        """Cheap key of the files as they are on disk (path, size, time): what a cache beside the data is keyed by."""
        files = [self.path] if self._archive is not None else [self.path / name for name in names]
        facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return hashlib.sha256(repr((facts, names)).encode()).hexdigest()

    def fingerprint(self, *names: str) -> str:
        """sha256 over the names and contents of the files: the same data gives the same value on any machine."""
        digest = hashlib.sha256()
        for name in names:
            digest.update(name.encode() + b"\0")
            with self.open(name) as stream:
                digest.update(bytes.fromhex(sha256(stream)))
        return digest.hexdigest()

    @cached_property
    def cache(self) -> Path:
        """Folder for derived files: `cache/` beside the data, or under data/cache where that cannot be written."""
        beside = (self.path if self.path.is_dir() else self.path.parent) / "cache"
        for folder in (beside, DATA / "cache" / self.competition):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if os.access(folder, os.W_OK):
                    return folder
            except OSError:
                continue
        raise UserError(f"neither {beside} nor {DATA / 'cache'} can be written: free space or change their owner")


def find(competition: str, given: str | None, write_demo: Callable[[Path], None], announce=print) -> RawData:
    """The data to use: `given` (DATA=), else data/<competition>, else demo data; announces the last."""
    if given:
        path = Path(given).expanduser()
        try:
            if not path.exists():
                raise UserError(
                    f"DATA={given} does not exist: pass the folder or the zip archive of the competition's files"
                )
            is_demo = path.resolve().is_relative_to((DATA / "demo").resolve())
            return RawData(_only_archive(path), competition, is_demo)
        except PermissionError as error:
            raise _forbidden(path, error) from error
    home = DATA / competition
    if home.is_dir() and visible(home):
        return RawData(_only_archive(home), competition)
    announce(
        f"demo: no data in {home}, so small generated demo data take its place. Real data: "
        f"make data COMP={competition}, or DATA=/path/to/folder-or-zip"
    )
    return RawData(_demo(competition, write_demo), competition, is_demo=True)


def of_run(provenance: dict[str, Any], given: str | None, write_demo: Callable[[Path], None]) -> RawData:
    """The data for predicting with a run: `given` (DATA=), else those it was trained on, demo data included."""
    competition = provenance["competition"]
    if provenance["demo"] and not given:
        return RawData(_demo(competition, write_demo), competition, is_demo=True)
    return find(competition, given or provenance["data"], write_demo)


def _forbidden(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be read ({error.strerror}): make it readable for you, or pass another DATA=")


def _only_archive(path: Path) -> Path:
    """A folder with nothing but one zip stands for that zip: `kaggle competitions download -p DIR` leaves that."""
    if path.is_dir():
        files = visible(path)
        if len(files) == 1 and files[0].suffix == ".zip":
            return files[0]
    return path


def _leads_back(folder: Path) -> bool:
    """Whether a link points to a folder that it lies in."""
    return folder.is_symlink() and folder.resolve() in {parent.resolve() for parent in folder.parents}


def visible(folder: Path) -> list[Path]:
    """What somebody put there: neither hidden, nor added by a Mac, nor the cache."""
    return [file for file in folder.iterdir() if file.name != "cache" and is_visible(file.name)]


def _demo(competition: str, write_demo: Callable[[Path], None]) -> Path:
    """The demo data's folder, generated once; written beside and renamed, so that half of it is never read."""
    folder = DATA / "demo" / competition
    if not folder.is_dir():
        draft = folder.with_name(f"{competition}.{os.getpid()}.part")
        shutil.rmtree(draft, ignore_errors=True)
        try:
            draft.mkdir(parents=True)
            write_demo(draft)
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise not_written(folder, error) from error
        try:
            draft.rename(folder)
        except OSError:  # another process was faster: its files are the same
            shutil.rmtree(draft)
    return folder
