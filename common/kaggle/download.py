"""Downloads that `make data` unpacks: a competition's archive, its label files, an archive at a plain address."""

import re
import shutil
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from common import archive
from common.archive import Damaged, Entry
from common.errors import UserError
from common.files import require_room
from common.kaggle import manifest
from common.kaggle.client import asked, explained, kaggle
from common.kaggle.credentials import Account, hide_addresses
from common.kaggle.source import Source
from common.progress import Progress

FULL_BYTES = 1 << 19  # the kaggle program writes a megabyte at a time


def whole_archive(
    source: Source, account: Account, work: Path, draft: Path, lock: IO, *, again: bool, as_it_is: bool
) -> dict[str, Entry]:
    """Download all files of a competition into `work` and unpack them into `draft`.

    The listing is read, and compared with the free disk space, beside that: image sets have hundreds of pages of it.
    `again` starts afresh, `as_it_is` does not compare the archive with the listing.
    """
    target, over = work / f"{source.slug}.zip", threading.Event()

    def stop() -> None:
        if over.is_set():
            raise UserError("not needed any more")

    with ThreadPoolExecutor(1) as pool:
        listing = pool.submit(asked, account, source, "files", stop=stop)
        try:
            _download(source, account, work, lock, target, ["-o"] if again else [], listing)
            files = archive.unpack_into(target, draft)
            sizes = listing.result()
        finally:
            over.set()
    if not as_it_is:
        with archive.opened(target, target.name) as stream:
            packed = {member.filename: member.file_size for member in stream.infolist()}
        problems = [f"{name} is missing" for name in sizes if name not in packed]
        problems += [
            f"{name} has {packed[name]:,} bytes, Kaggle lists {size:,}"
            for name, size in sizes.items()
            if name in packed and packed[name] != size
        ]
        if problems:
            raise Damaged(f"{target.name}: {manifest.listed(problems)} (FORCE=1 keeps it as it is)")
    return files


def _refuse_what_cannot_end_well(work: Path, source: Source, listing: Future | None) -> None:
    """Raise UserError where the disk is full, or will be, or the competition cannot be listed.

    The kaggle program takes a full disk for a broken line, and tries again for a minute.
    """
    if shutil.disk_usage(work).free < FULL_BYTES:
        raise UserError(
            f"downloading {source.slug}: the disk is full ({work.parent}): free some space, then repeat the same "
            "command; it goes on where it stopped"
        )
    if listing is not None and listing.done():  # what is needed is the archive and what comes of it
        need = 2 * sum(listing.result().values()) - size_of(work) + archive.SPARE_BYTES
        require_room(work, need, f"{source.slug} (archive and files; {work.parent} may be a link to a larger disk)")


def _download(
    source: Source,
    account: Account,
    work: Path,
    lock: IO,
    target: Path,
    more: list[str],
    listing: Future | None = None,
) -> None:
    """Run the kaggle program's download, quietly, until `target` or it packed is there; shows how `work` grows."""

    def measure() -> int:
        is_listed = listing is not None and listing.done() and not listing.exception()
        done = size_of(work)
        progress.update(done // 10**6, total=sum(listing.result().values()) // 10**6 if is_listed else 0)
        return done

    def stop() -> None:
        _refuse_what_cannot_end_well(work, source, listing)

    command = ("competitions", "download", source.slug, "-p", str(work), "-q", *more)
    what = f"downloading {target.name}"
    with Progress(what, unit="MB") as progress:
        answer = kaggle(account, *command, measure=measure, stop=stop, lock=lock)
    if answer.status != 0 or not (target.is_file() or packed(target).is_file()):
        stop()
        raise explained(answer, account, source, what)
    if list(work.glob("*.kaggle-partial")):  # it exits 0 when it is interrupted, half a file has its final name
        raise UserError(f"{what}: interrupted: repeat the same command, it goes on where it stopped")


def packed(file: Path) -> Path:
    """Where Kaggle's zip of a large single file arrives."""
    return file.with_name(f"{file.name}.zip")


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder that another program is writing to."""
    size = 0
    for file in folder.iterdir():
        with suppress(FileNotFoundError):  # gone since it was listed
            size += file.stat().st_size
    return size


def single_files(source: Source, account: Account, work: Path, draft: Path, lock: IO) -> dict[str, Entry]:
    """Download the label files one by one; Kaggle packs the large ones, which then arrive as NAME.zip."""
    draft.mkdir(parents=True)
    found: dict[str, Entry] = {}
    for name in source.labels:
        target = work / Path(name).name
        _download(source, account, work, lock, target, ["-f", name])
        if packed(target).is_file():
            found |= archive.unpack_into(packed(target), draft)
            continue
        with open(target, "rb") as stream:  # the listing would tell by the size, after hundreds of pages of images
            if stream.read(64).lstrip().lower().startswith((b"<!doctype html", b"<html")):
                raise Damaged(f"{target.name} is a web page, expected the competition's file")
        found |= archive.copy_into(target, draft)
    return found


def checked(checksum: str) -> str:
    """A checksum as hashlib spells it; raises UserError for anything but md5:... and sha256:... of their lengths."""
    found = checksum.strip().lower()
    if found and not re.fullmatch(r"md5:[0-9a-f]{32}|sha256:[0-9a-f]{64}", found):
        raise UserError(
            f"--checksum {checksum}: expected md5: and 32 hexadecimal digits, or sha256: and 64: "
            'ARGS="--url ... --checksum sha256:..."'
        )
    return found


def plain(source: Source, work: Path, draft: Path, url: str, checksum: str) -> tuple[str, dict[str, Entry]]:
    """The archive at a plain address, checked against the checksum given, known or published; (address, files).

    The address comes back as it may be shown and kept: without a signature in its query.
    """
    from common.kaggle import web  # what it needs for https takes longer to import than all the rest

    if "@" in urlsplit(url).netloc:
        raise UserError(
            "--url: the address has a user name or a password before its host, which is not sent: leave them out, or "
            "get the archive by hand and pass DATA=/path/to/zip"
        )
    address, record = url or source.url, source.checksum_url
    if url and urlsplit(url).path in ("", "/"):  # a mirror with the same paths
        address = url.rstrip("/") + urlsplit(source.url).path
        record = record and url.rstrip("/") + urlsplit(record).path
    name = Path(urlsplit(address).path).name
    if name == Path(urlsplit(source.url).path).name and not checksum:
        checksum = source.checksum or (web.published_checksum(record, name) if record else "")
    if not checksum:
        raise UserError(
            f"--url {hide_addresses(url)}: no checksum is known for {name}: add one, "
            'ARGS="--url ... --checksum md5:..."'
        )
    target = work / name
    if not target.is_file() or web.digest(target, checksum) != checksum:  # of a call that failed later
        web.download(address, target, checksum)
    if target.suffix.lower() == ".zip":
        return hide_addresses(address), archive.unpack_into(target, draft)
    draft.mkdir(parents=True)
    return hide_addresses(address), archive.copy_into(target, draft)
