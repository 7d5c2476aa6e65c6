"""Download data that is not on Kaggle over HTTPS: resumed, with a time limit, checked against a checksum."""

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
ATTEMPTS = 3  # in a row without progress
AT_ONCE = 16  # small files downloaded in parallel
OTHER = ', or name another address with ARGS="--url ..."'
BROKEN_LINE = (urllib.error.URLError, http.client.HTTPException, OSError)


def open_url(address: str, headers: Mapping[str, str] = {}, other: str = OTHER):
    """The answer to a GET; raises UserError for errors that a retry cannot mend. The proxy is that of HTTPS_PROXY.

    The timeout is only a part of `patience()`, because there are several attempts, and servers with several addresses.
    """
    try:
        request = urllib.request.Request(address, headers={"User-Agent": "kaggle-starter-kit", **headers})
        return urllib.request.build_opener().open(request, timeout=patience() / ATTEMPTS)  # reads the current proxies
    except urllib.error.HTTPError as error:
        if error.code in (416, 429) or error.code >= 500:
            raise
        said = f"{address} answers {error.code} {error.reason}: open it in a browser{other}"
    except ValueError as error:
        said = f"--url {address}: expected an address like https://host/path ({error})"
    raise UserError(hide_addresses(said))


def plain(source: Source, work: Path, draft: Path, url: str, checksum: str) -> tuple[str, dict[str, Entry]]:
    """Download the archive at `url`, check it against the given, known or published checksum, unpack it into `draft`.

    Returns the address, without its query, which may hold a signature, and the files.
    """
    wanted = checksum.strip().lower()
    if wanted and not re.fullmatch(r"md5:[0-9a-f]{32}|sha256:[0-9a-f]{64}", wanted):
        raise UserError(f"--checksum {checksum}: expected md5: and 32 hexadecimal digits, or sha256: and 64")
    if "@" in urlsplit(url).netloc:
        raise UserError(
            "--url: a user name or password in the address is never sent: leave it out, or "
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
    if not target.is_file() or digest(target, wanted) != wanted:  # an earlier call may have left a good file
        download(address, target, wanted)
    if target.suffix.lower() == ".zip":
        return hide_addresses(address), unpack_into(target, draft)
    draft.mkdir(parents=True)
    return hide_addresses(address), copy_into(target, draft)


def download(address: str, target: Path, checksum: str) -> None:
    """Fetch `address` into `target`, resuming an earlier call; `checksum` is md5:... or sha256:...

    Raises UserError if the server cannot be reached, the disk is full or the checksum differs (then nothing is kept).
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
                    draft.unlink(missing_ok=True)  # the draft is longer than the server's file
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
    """Append to the draft until it is complete; raises OSError or HTTPException if the connection breaks."""
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
    """The file's checksum as md5:... or sha256:..., of the same kind as `checksum`."""
    algorithm = checksum.partition(":")[0]
    with open(file, "rb") as stream:
        return f"{algorithm}:{hashlib.file_digest(stream, algorithm).hexdigest()}"


def published_checksum(record: str, name: str) -> str:
    """The checksum of the file `name` in a JSON record like zenodo.org's: {"files": [{"key", "checksum"}]}."""
    try:
        with open_url(record) as answer:
            files = json.load(answer)["files"]
        return next(file["checksum"] for file in files if file["key"] == name)
    except BROKEN_LINE as error:
        raise unreachable(record, error) from error
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise UserError(f'{record} names no checksum for {name}: give it with ARGS="--checksum md5:..."') from error


def fetch_images(home: Path, images: Images, count: int) -> None:
    """Fetch `count` training images in parallel: the same on every machine, and a larger count adds to them.

    Raises UserError at the end if some cannot be read, and at once if a whole group fails: then the network is down.
    """
    ids = {row[images.ids_column] for row in read_table(home / images.ids_file)}
    chosen = heapq.nsmallest(count, ids, key=lambda name: hashlib.sha256(name.encode()).digest())
    folder, label = home / images.folder, f"images of {urlsplit(images.url).netloc}"
    folder.mkdir(exist_ok=True)

    def one(name: str) -> str | None:
        """Fetch one image; returns the reason if that fails."""
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
        # A small first group: without a network, a larger one would run into one timeout after the other.
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
