"""Downloads that `make data` unpacks: a competition's archive, its label files, an archive at a plain address."""

import json
import re
import shutil
import threading
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from common import archive
from common.archive import Damaged, Entry
from common.errors import UserError
from common.kaggle import manifest
from common.kaggle.cli import Answer, explained, kaggle
from common.kaggle.credentials import Account, hide_addresses
from common.kaggle.progress import Progress
from common.kaggle.source import Source

PAGE = 200  # the largest page of the listing
FULL_BYTES = 1 << 19  # the kaggle program writes a megabyte at a time


def whole_archive(
    source: Source, account: Account, work: Path, draft: Path, lock: IO, *, again: bool, as_it_is: bool
) -> dict[str, Entry]:
    """Download all files of a competition into `work` and unpack them into `draft`.

    The listing is read, and compared with the free disk space, beside that: image sets have hundreds of pages of it.
    `again` starts afresh, `as_it_is` does not compare the archive with the listing.
    """
    target = work / f"{source.slug}.zip"
    listing = Listing(source, account, work, draft)
    try:
        with Progress(f"downloading {target.name}") as progress:
            answer = _download(
                source, account, work, lock, ["-o"] if again else [], lambda done: progress.bytes(done, listing.total),
                listing.failure,
            )  # fmt: skip
        if answer.status != 0 or not target.is_file():
            raise listing.failure() or explained(answer, account, source, f"downloading {source.slug}")
        _refuse_partial(work, target.name)
        files = archive.unpack_into(target, draft)
        listing.join()
    finally:
        listing.cancel()
    if error := listing.failure():
        raise error
    if not as_it_is:
        listing.compare(target)
    return files


def _download(source, account, work, lock, more, show, stop=None) -> Answer:
    """Run the kaggle program's download, quietly: the growth of `work` is its progress.

    It takes a full disk for a broken line and tries again for a minute: stopped here at once.
    """

    def measure() -> int:
        done = size_of(work)
        show(done)
        return done

    def failure() -> UserError | None:
        if shutil.disk_usage(work).free < FULL_BYTES:
            return UserError(
                f"downloading {source.slug}: the disk is full ({work.parent}): free some space, then repeat the same "
                "command; it goes on where it stopped"
            )
        return stop() if stop is not None else None

    command = ("competitions", "download", source.slug, "-p", str(work), "-q", *more)
    return kaggle(account, *command, measure=measure, stop=failure, lock=lock)


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder that another program is writing to."""
    size = 0
    for file in folder.iterdir():
        try:
            size += file.stat().st_size
        except FileNotFoundError:  # gone since it was listed
            continue
    return size


def _refuse_partial(work: Path, name: str) -> None:
    """The kaggle program exits 0 when it is interrupted, and leaves half a file under its final name."""
    if list(work.glob("*.kaggle-partial")):
        raise UserError(f"downloading {name}: interrupted: repeat the same command, it goes on where it stopped")


class Listing(threading.Thread):
    """Names and sizes of the competition's files, read page by page."""

    def __init__(self, source: Source, account: Account, work: Path, draft: Path):
        super().__init__(daemon=True)
        self.source, self.account, self.work, self.draft = source, account, work, draft
        self.sizes: dict[str, int] = {}
        self.total, self.error, self.cancelled = 0, None, False
        self.start()

    def run(self) -> None:
        try:
            token = self._page("")
            while token and not self.cancelled:
                token = self._page(token)
        except UserError as error:
            self.error = error

    def _page(self, token: str) -> str:
        """Read one page and return the token of the next; raises UserError when the disk cannot hold the files."""
        answer = kaggle(
            self.account,
            *("competitions", "files", self.source.slug, "--format", "json", "--page-size", str(PAGE)),
            *(["--page-token", token] if token else []),
            stop=lambda: UserError("not needed any more") if self.cancelled else None,
        )
        what = f"listing the files of {self.source.slug}"
        if answer.status != 0:
            raise explained(answer, self.account, self.source, what)
        head, bracket, body = answer.out.partition("[")
        try:
            for file in json.loads(bracket + body) if bracket else []:
                self.sizes[file["name"]] = int(file["size"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{what}: the answer cannot be read ({answer.last_line}): repeat the command") from error
        self.total = sum(self.sizes.values())
        free = shutil.disk_usage(self.work).free
        need = 2 * self.total - size_of(self.work) + archive.SPARE_BYTES  # the archive and what comes out of it
        if need > free and not self.draft.exists():  # from then on, unpacking looks at the space for what is left
            folder = self.work.parent
            raise UserError(
                f"{folder}: {self.source.slug} needs {need / 1e9:.2f} GB (archive and files), {free / 1e9:.2f} GB are "
                f"free: free some space, or make {folder} a link to a larger disk, then repeat the same command"
            )
        return head.partition("Next Page Token = ")[2].strip()

    def failure(self) -> UserError | None:
        return self.error

    def cancel(self) -> None:
        """End it, if it has not ended; returns when it has."""
        self.cancelled = True
        self.join(timeout=10)

    def compare(self, target: Path) -> None:
        """Raises Damaged when a listed file is not in the archive, or has another size there."""
        with archive.opened(target, target.name) as stream:
            packed = {member.filename: member.file_size for member in stream.infolist()}
        problems = [f"{name} is missing" for name in self.sizes if name not in packed]
        problems += [
            f"{name} has {packed[name]:,} bytes, Kaggle lists {size:,}"
            for name, size in self.sizes.items()
            if name in packed and packed[name] != size
        ]
        if problems:
            raise Damaged(f"{target.name}: {manifest.listed(problems)} (FORCE=1 keeps it as it is)")


def single_files(source: Source, account: Account, work: Path, draft: Path, lock: IO) -> dict[str, Entry]:
    """Download the label files one by one; Kaggle packs the large ones, which then arrive as NAME.zip."""
    draft.mkdir(parents=True)
    found: dict[str, Entry] = {}
    for name in source.labels:
        with Progress(f"downloading {name}") as progress:
            answer = _download(source, account, work, lock, ["-f", name], lambda done: progress.bytes(done, 0))
        plain, packed = work / Path(name).name, work / f"{Path(name).name}.zip"
        if answer.status != 0 or not (plain.is_file() or packed.is_file()):
            raise explained(answer, account, source, f"downloading {name}")
        _refuse_partial(work, name)
        if packed.is_file():
            found |= archive.unpack_into(packed, draft)
        else:
            _refuse_page(plain)
            found |= archive.copy_into(plain, draft)
    return found


def _refuse_page(file: Path) -> None:
    """Raises Damaged for a web page in the place of a file, as the login of a network or of a proxy gives it.

    The listing would tell by the size, but names label files after hundreds of pages of images.
    """
    with open(file, "rb") as stream:
        start = stream.read(64).lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        raise Damaged(f"{file.name} is a web page, expected the competition's file")


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
    if url and urlsplit(url).path in ("", "/"):
        address, record = web.mirrored(source.url, url), web.mirrored(record, url)
    name = Path(urlsplit(address).path).name
    same_file = name == Path(urlsplit(source.url).path).name
    checksum = checksum or (source.checksum if same_file else "")
    if not checksum and same_file and record:
        checksum = web.published_checksum(record, name)
    if not checksum:
        raise UserError(
            f"--url {hide_addresses(url)}: no checksum is known for {name}: add one, "
            'ARGS="--url ... --checksum md5:..."'
        )
    target = work / name
    if not target.is_file() or web.digest(target, checksum.split(":")[0]) != checksum:  # of a call that failed later
        web.download(address, target, checksum)
    if target.suffix.lower() == ".zip":
        return hide_addresses(address), archive.unpack_into(target, draft)
    draft.mkdir(parents=True)
    return hide_addresses(address), archive.copy_into(target, draft)
