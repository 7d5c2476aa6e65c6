"""Unpack untrusted archives: no file lands outside the folder, no archive fills the disk or stays half unpacked."""

import hashlib
import lzma
import os
import secrets
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from common.errors import UserError
from common.files import FULL, is_foreign, sha256

CHUNK_BYTES = 1 << 17  # larger chunks do not fit the processor's cache, and take half as long again
# deflate cannot pack tighter than 1 to 1032; real competition files stay below 1 to 50
LARGEST_RATIO = 200
HARMLESS_BYTES = 64 << 20  # archives that unpack to less than this may have any ratio
DEEPEST_NESTING = 4
LONGEST_PART, LONGEST_NAME, DEEPEST_FOLDER = 255, 1024, 64  # bytes, bytes, folders: limits of file systems
# What zipfile raises for a truncated archive or a wrong checksum. RuntimeError: encrypted, or a compression that it
# does not know. ValueError: a name that is not UTF-8.
DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, ValueError)
BY_HAND = "unpack it with another program, such as 7z, and pass DATA=/path/to/folder"
SHOWN = 100  # characters of a name in an error
SPARE_BYTES = 64 << 20  # what must stay free on the disk
THREADS = min(4, os.cpu_count() or 1)  # inflating, hashing and writing all release Python's GIL


class Damaged(UserError):
    """The archive is damaged: a new download may help."""


class Unsafe(UserError):
    """The archive is not safe or not possible to unpack, and a new download would be no better."""


@dataclass(frozen=True)
class Entry:
    """A file that was unpacked: `size` in bytes and the sha256 of its content."""

    size: int
    sha256: str


def unpack(archive: Path, target: Path) -> dict[str, Entry]:
    """Unpack `archive`, and the archives in it, into the new folder `target`; returns its files by relative name.

    Unpacks into a folder beside the target and renames that. Raises Damaged or Unsafe, and then leaves nothing behind.
    Several processes may unpack at once: the folder of the first one is kept.
    """
    draft = target.with_name(f".{target.name}.{os.getpid()}.part")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        entries = unpack_into(archive, draft)
        try:
            draft.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return entries


def unpack_into(archive: Path, folder: Path) -> dict[str, Entry]:
    """Unpack into `folder`, which may hold other files; archives inside are replaced by their contents."""
    budget = _Budget(archive)
    try:
        entries = _unpack_one(archive, folder, PurePosixPath(), budget, archive.name)
        for depth in range(DEEPEST_NESTING + 1):
            nested = [name for name in entries if name.lower().endswith(".zip") and zipfile.is_zipfile(folder / name)]
            if not nested:
                return entries
            if depth == DEEPEST_NESTING:
                raise Unsafe(f"{archive.name}: {nested[0]} is nested in {DEEPEST_NESTING} archives: unpack it by "
                             f"hand and pass DATA=/path/to/folder")  # fmt: skip
            for name in nested:
                holder = folder / f".{secrets.token_hex(8)}"  # its content may have the archive's own name
                (folder / name).rename(holder)
                del entries[name]
                entries |= _unpack_one(holder, folder, _place(holder, PurePosixPath(name)), budget, name)
                holder.unlink()
    except OSError as error:
        remedy = "free some disk space" if error.errno in FULL else "use a folder that can hold these files"
        raise UserError(
            f"{folder}: {archive.name} could not be unpacked ({error.strerror or error}): {remedy}, then repeat the "
            "same command"
        ) from error
    return entries


def unpack_links(folder: Path) -> None:
    """Replace every symbolic link to an archive below `folder` by the archive's contents, as `unpack_into` does."""
    for link in sorted(folder.rglob("*.zip")):
        if link.is_symlink() and zipfile.is_zipfile(link):
            archive, name = link.resolve(), PurePosixPath(link.name)
            link.unlink()  # the archive may hold a file of the same name
            unpack_into(archive, link.parent / _place(archive, name))


def copy_into(file: Path, folder: Path) -> dict[str, Entry]:
    """Hard-link or copy a file that is no archive into `folder`; returns its entry by name."""
    target = folder / file.name
    try:
        target.hardlink_to(file)
    except OSError:  # file systems without links
        shutil.copyfile(file, target)
    return {file.name: Entry(target.stat().st_size, sha256(target))}


def _place(holder: Path, name: PurePosixPath) -> PurePosixPath:
    """The folder for the contents of the nested archive `name`.

    Contents go beside the archive if they are a single file or folder with its name: train.csv in train.csv.zip, or
    images/... in images.zip. Otherwise they get a folder of that name, so as not to mix with neighbouring files.
    """
    stem = name.name[: -len(".zip")]
    with opened(holder, str(name)) as stream:
        names = _safe_files(stream, str(name))
    tops = {PurePosixPath(inside).parts[0] for inside in names if not inside.startswith(".")}
    return name.parent if tops == {stem} else name.parent / stem


def refuse_bomb(name: str, size: int, packed: int, shown: str) -> None:
    """Raises Unsafe when `packed` bytes unpack to so large a `size` that they may be meant to fill disk or memory."""
    if size > max(HARMLESS_BYTES, LARGEST_RATIO * packed):
        raise Unsafe(
            f"{shown}: {name} unpacks to more than {LARGEST_RATIO} times its size, like an archive made "
            "to fill a disk. If you trust it, unpack it by hand and pass DATA=/path/to/folder"
        )


class _Budget:
    """Limits what is unpacked: by its ratio to the size of the outermost archive, and by the free disk space."""

    def __init__(self, archive: Path):
        self.archive, self.packed, self.unpacked = archive, archive.stat().st_size, 0

    def spend(self, members: Sequence[zipfile.ZipInfo], folder: Path) -> None:
        size = sum(member.file_size for member in members)
        self.unpacked += size
        for member in members:
            refuse_bomb(member.filename, member.file_size, member.compress_size, self.archive.name)
        refuse_bomb("its content", self.unpacked, self.packed, self.archive.name)
        free = shutil.disk_usage(folder).free
        if size + SPARE_BYTES > free:
            raise UserError(
                f"{folder}: {self.archive.name} needs {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free: free some "
                "space, then repeat the same command; the download is kept"
            )


def _unpack_one(archive: Path, folder: Path, place: PurePosixPath, budget: _Budget, shown: str) -> dict[str, Entry]:
    """Unpack one archive, but none nested in it, with several threads; verifies every checksum."""
    folder.mkdir(parents=True, exist_ok=True)
    with opened(archive, shown) as stream:
        members = _safe_files(stream, shown)
    budget.spend(list(members.values()), folder)
    targets = {str(place / name): member for name, member in members.items()}
    for parent in {str((folder / name).parent) for name in targets}:
        _make_folder(Path(parent), folder, shown)

    # A free thread takes the largest file that is left: one large table takes as long as a thousand images.
    waiting = iter(sorted(targets.items(), key=lambda item: -item[1].file_size))  # one for all threads

    def work(_: int) -> dict[str, Entry]:
        with opened(archive, shown) as stream:  # one handle per thread: threads would wait for a shared one
            return {name: _extract(stream, member, folder / name, shown) for name, member in waiting}

    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(work, range(min(THREADS, len(targets)))))
    found = {name: entry for result in results for name, entry in result.items()}
    return {name: found[name] for name in targets}


def opened(archive: Path, shown: str) -> zipfile.ZipFile:
    """Open the archive; raises Damaged when it is not a complete zip file."""
    try:
        return zipfile.ZipFile(archive)
    except DAMAGED as error:
        raise Damaged(f"{shown} is not a complete zip archive ({error})") from error


def _safe_files(stream: zipfile.ZipFile, shown: str) -> dict[str, zipfile.ZipInfo]:
    """The files in the archive by relative name, without hidden files and those that macOS adds.

    Raises Unsafe for an entry that must not be unpacked.
    """
    found: dict[str, zipfile.ZipInfo] = {}
    for member in stream.infolist():
        name = member.filename.replace("\\", "/")  # some Windows programs write \, against the standard
        parts = PurePosixPath(name).parts
        is_folder = name.endswith("/")
        kind = stat.S_IFMT(member.external_attr >> 16)
        problem = ""
        if name.startswith("/") or ".." in parts or (parts and parts[0].endswith(":")) or not (parts or is_folder):
            problem = "points outside the folder"
        elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            problem = "is a link or a device, not a file"
        elif member.flag_bits & 1:
            problem = "is encrypted"
        elif str(PurePosixPath(name)) in found and not is_folder:
            problem = "appears twice"
        elif len(parts) > DEEPEST_FOLDER:
            problem = f"is {len(parts) - 1:,} folders deep, expected at most {DEEPEST_FOLDER - 1}"
        elif (
            max((len(os.fsencode(part)) for part in parts), default=0) > LONGEST_PART
            or len(os.fsencode(name)) > LONGEST_NAME
        ):
            problem = f"has a name of {len(os.fsencode(name)):,} bytes, too long for a file"
        if problem:
            entry = name if len(name) < SHOWN else f"{name[:SHOWN]}..."
            raise Unsafe(f"{shown}: the entry {entry!r} {problem}: nothing was kept. Get the files "
                         f"from the competition's page by hand and pass DATA=/path/to/folder")  # fmt: skip
        if not is_folder and not any(map(is_foreign, parts)):
            found[str(PurePosixPath(name))] = member
    return found


def _make_folder(path: Path, folder: Path, shown: str) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise Unsafe(f"{shown}: {path.relative_to(folder)} is both a file and a folder") from error


def _extract(stream: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path, shown: str) -> Entry:
    """Write one file; raises Damaged when its length or checksum differs from the archive's."""
    digest, size = hashlib.sha256(), 0
    try:
        with open(target, "xb") as out:
            for chunk in _chunks(stream, member, shown):
                size += len(chunk)
                digest.update(chunk)
                out.write(chunk)
    except FileExistsError as error:
        raise Unsafe(f"{shown}: {member.filename} exists already as a file, or appears twice") from error
    if size != member.file_size:
        raise Damaged(f"{shown}: {member.filename} has {size} bytes, expected {member.file_size}")
    return Entry(size, digest.hexdigest())


def _chunks(stream: zipfile.ZipFile, member: zipfile.ZipInfo, shown: str) -> Iterator[bytes]:
    try:
        with stream.open(member) as source:
            while chunk := source.read(CHUNK_BYTES):
                yield chunk
    except RuntimeError as error:
        raise Unsafe(f"{shown}: {member.filename} cannot be unpacked here ({error}): {BY_HAND}") from error
    except (*DAMAGED, OSError) as error:  # OSError: from bz2, or a seek to an impossible offset
        raise Damaged(f"{shown}: {member.filename} is damaged ({error})") from error
