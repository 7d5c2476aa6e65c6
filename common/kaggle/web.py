"""Data that is not on Kaggle, by plain downloads over HTTPS: resumed, bounded, checked against a checksum."""

import errno
import hashlib
import heapq
import http.client
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit

from common.archive import SPARE_BYTES, Entry, copy_into, unpack_into
from common.errors import UserError
from common.files import WRITE_ERRORS, not_written, read_table, require_room
from common.kaggle.client import patience
from common.kaggle.credentials import hide_addresses
from common.kaggle.source import Images, Source
from common.progress import Progress

CHUNK_BYTES = 1 << 20
ATTEMPTS = 3  # without progress
AT_ONCE = 16  # small files
OTHER = ', or name another address with ARGS="--url ..."'
BROKEN_LINE = (urllib.error.URLError, http.client.HTTPException, OSError)


def open_url(address: str, headers: Mapping[str, str] = {}, other: str = OTHER):
    """The answer to a GET; raises UserError for anything that a repetition cannot mend. Proxies: HTTPS_PROXY.

    Waits for a part of the patience alone: there are several attempts, and servers with several addresses to try.
    """
    try:
        request = urllib.request.Request(address, headers={"User-Agent": "kaggle-starter-kit", **headers})
        return urllib.request.build_opener().open(request, timeout=patience() / ATTEMPTS)  # reads the proxies of now
    except urllib.error.HTTPError as error:
        if error.code in (416, 429) or error.code >= 500:
            raise
        said = f"{address} answers {error.code} {error.reason}: open it in a browser{other}"
    except ValueError as error:
        said = f"--url {address}: expected an address like https://host/path ({error})"
    raise UserError(hide_addresses(said))


def plain(source: Source, work: Path, draft: Path, url: str, checksum: str) -> tuple[str, dict[str, Entry]]:
    """The archive at a plain address, checked against the checksum given, known or published; (address, files).

    The address comes back as it may be shown and kept: without a signature in its query.
    """
    wanted = checksum.strip().lower()
    if wanted and not re.fullmatch(r"md5:[0-9a-f]{32}|sha256:[0-9a-f]{64}", wanted):
        raise UserError(f"--checksum {checksum}: expected md5: and 32 hexadecimal digits, or sha256: and 64")
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
    if name == Path(urlsplit(source.url).path).name and not wanted:
        wanted = source.checksum or (published_checksum(record, name) if record else "")
    if not wanted:
        said = f"--url {hide_addresses(url)}: no checksum is known for {name}: add one, "
        raise UserError(said + 'ARGS="--url ... --checksum md5:..."')
    target = work / name
    if not target.is_file() or digest(target, wanted) != wanted:  # of a call that failed later
        download(address, target, wanted)
    if target.suffix.lower() == ".zip":
        return hide_addresses(address), unpack_into(target, draft)
    draft.mkdir(parents=True)
    return hide_addresses(address), copy_into(target, draft)


def download(address: str, target: Path, checksum: str) -> None:
    """Fetch `address` into `target`, going on where an earlier call stopped; `checksum` as md5:... or sha256:...

    Raises UserError when the server cannot be reached, the disk is full or the checksum differs (nothing is kept).
    """
    draft, etag = (target.with_name(f"{target.name}.{end}") for end in ("part", "etag"))
    with Progress(f"downloading {target.name}", unit="MB") as progress:
        size = lambda: draft.stat().st_size if draft.is_file() else 0  # noqa: E731
        reached, attempts, since = size(), 0, time.monotonic()
        while True:
            try:
                _append(address, draft, etag, progress)
                break
            except BROKEN_LINE as error:
                if isinstance(error, OSError) and error.errno in WRITE_ERRORS:
                    raise not_written(target, error) from error
                if isinstance(error, urllib.error.HTTPError) and error.code == 416:
                    draft.unlink(missing_ok=True)  # what is here is longer than the file there
                attempts += 1
                if size() > reached:
                    reached, attempts, since = size(), 0, time.monotonic()
                elif attempts == ATTEMPTS or time.monotonic() - since >= patience():
                    raise unreachable(address, error) from error
    found = digest(draft, checksum)
    etag.unlink(missing_ok=True)
    if found != checksum:
        draft.unlink()
        raise UserError(
            f"{hide_addresses(address)}: the file's checksum is {found}, expected {checksum}: the file is damaged or "
            'another one and was not kept. Repeat the same command, or name a good copy with ARGS="--url ..."'
        )
    draft.rename(target)


def unreachable(address: str, failure: Exception) -> UserError:
    reason = hide_addresses(str(getattr(failure, "reason", "") or failure))
    return UserError(
        f"{hide_addresses(address)} cannot be read ({reason}): check the network, and HTTPS_PROXY where there is a "
        "proxy, then repeat the same command; it goes on where it stopped. On a slow line set KIT_PATIENCE=300"
    )


def _append(address: str, draft: Path, etag: Path, progress: Progress) -> None:
    """Bring the draft to its full length; raises OSError or HTTPException when the line breaks."""
    have = draft.stat().st_size if draft.is_file() else 0
    known = etag.read_text() if have and etag.is_file() else ""
    with open_url(address, {"Range": f"bytes={have}-", "If-Range": known} if known else {}) as answer:
        start = have if answer.status == 206 else 0
        length = int(answer.headers.get("Content-Length") or 0)
        require_room(draft, length + SPARE_BYTES, f"the download of {draft.stem}")
        etag.write_text(answer.headers.get("ETag") or answer.headers.get("Last-Modified") or "")
        with open(draft, "ab" if start else "wb") as out:
            while chunk := answer.read(CHUNK_BYTES):
                out.write(chunk)
                out.flush()
                progress.update(out.tell() // 10**6, total=(start + length) // 10**6)
            done = out.tell()
    if length and done < start + length:
        raise ConnectionError(f"cut after {done:,} of {start + length:,} bytes")


def digest(file: Path, checksum: str) -> str:
    """The file's checksum of the same kind as `checksum`, as md5:... or sha256:..."""
    algorithm = checksum.partition(":")[0]
    with open(file, "rb") as stream:
        return f"{algorithm}:{hashlib.file_digest(stream, algorithm).hexdigest()}"


def published_checksum(record: str, name: str) -> str:
    """The checksum of the file `name` in a record as zenodo.org publishes it: {"files": [{"key", "checksum"}]}."""
    try:
        with open_url(record) as answer:
            files = json.load(answer)["files"]
        return next(file["checksum"] for file in files if file["key"] == name)
    except BROKEN_LINE as error:
        raise unreachable(record, error) from error
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise UserError(f'{record} names no checksum for {name}: give it with ARGS="--checksum md5:..."') from error


def fetch_images(home: Path, images: Images, count: int) -> None:
    """Fetch `count` training images, several at a time: the same ones everywhere, and a larger count adds to them.

    Raises UserError for those that cannot be read, at once when many in a row all fail: then the network is down.
    """
    ids = {row[images.ids_column] for row in read_table(home / images.ids_file)}
    chosen = heapq.nsmallest(count, ids, key=lambda name: hashlib.sha256(name.encode()).digest())
    folder, label = home / images.folder, f"images of {urlsplit(images.url).netloc}"
    folder.mkdir(exist_ok=True)

    def one(name: str) -> str | None:
        """Why the image could not be fetched."""
        target, draft = folder / f"{name}.jpg", folder / f".{name}.jpg.part"
        try:
            if shutil.disk_usage(folder).free < SPARE_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with open_url(images.url.format(id=name), other="") as answer, open(draft, "wb") as out:
                shutil.copyfileobj(answer, out)
            if draft.stat().st_size < int(answer.headers.get("Content-Length", 0)):
                raise ConnectionError("cut")
            draft.rename(target)
        except (*BROKEN_LINE, UserError) as error:
            draft.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in WRITE_ERRORS:
                raise not_written(target, error) from error
            return f"{target.name}: {error}"

    wanted, failures, done = (name for name in chosen if not (folder / f"{name}.jpg").is_file()), [], 0
    with ThreadPoolExecutor(AT_ONCE) as pool, Progress(label, len(chosen), "files") as progress:
        # The first ones alone: behind a line that is dead, those after them would keep everybody waiting once more.
        while names := list(islice(wanted, 16 * AT_ONCE if done else AT_ONCE)):
            failed = [failure for failure in pool.map(one, names) if failure]
            failures += failed
            if len(failed) == len(names) >= AT_ONCE:
                raise UserError(
                    f"{label}: none of {'' if done else 'the first '}{len(names)} files could be read "
                    f"({hide_addresses(failed[-1])}): check the network, then repeat the same command"
                )
            done += len(names)
            progress.update(done)
    print(f"{folder}: {len(chosen) - len(failures):,} of the {images.total}")
    if failures:
        raise UserError(
            f"{len(failures):,} of {len(chosen):,} images could not be read (first: {failures[0]}): repeat the same "
            "command to try those again, or train without them"
        )
