"""Plain downloads over HTTPS: resumed, bounded, checked against a published checksum."""

import errno
import hashlib
import http.client
import json
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from common.archive import SPARE_BYTES
from common.errors import UserError
from common.files import WRITE_ERRORS, not_written, require_room
from common.kaggle.client import patience
from common.kaggle.credentials import hide_addresses
from common.progress import Progress

CHUNK_BYTES = 1 << 20
ATTEMPTS = 3  # without progress
AT_ONCE = 16  # small files
BROKEN_LINE = (urllib.error.URLError, http.client.HTTPException, OSError)


def open_url(address: str, headers: dict[str, str] | None = None):
    """The answer to a GET; raises UserError for anything that a repetition cannot mend. Proxies: HTTPS_PROXY.

    Waits for a part of the patience alone: there are several attempts, and servers with several addresses to try.
    """
    try:
        request = urllib.request.Request(address, headers={"User-Agent": "kaggle-starter-kit", **(headers or {})})
        return urllib.request.build_opener().open(request, timeout=patience() / ATTEMPTS)  # reads the proxies of now
    except urllib.error.HTTPError as error:
        if error.code in (416, 429) or error.code >= 500:
            raise
        said = f"{address} answers {error.code} {error.reason}: open it in a browser, or name another address with "
        raise UserError(hide_addresses(said) + 'ARGS="--url ..."') from error
    except ValueError as error:
        said = f"--url {address}: expected an address like https://host/path ({error})"
        raise UserError(hide_addresses(said)) from error


def download(address: str, target: Path, checksum: str) -> None:
    """Fetch `address` into `target`, going on where an earlier call stopped; `checksum` as md5:... or sha256:...

    Raises UserError when the server cannot be reached, the disk is full or the checksum differs (nothing is kept).
    """
    draft, etag = (target.with_name(f"{target.name}.{end}") for end in ("part", "etag"))
    with Progress(f"downloading {target.name}", unit="MB") as progress:
        reached, attempts, since = _size(draft), 0, time.monotonic()
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
                if _size(draft) > reached:
                    reached, attempts, since = _size(draft), 0, time.monotonic()
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


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _append(address: str, draft: Path, etag: Path, progress: Progress) -> None:
    """Bring the draft to its full length; raises OSError or HTTPException when the line breaks."""
    have = _size(draft)
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


def download_many(addresses: Iterable[tuple[str, Path]], total: int, label: str) -> list[str]:
    """Fetch many small files, several at a time; those that are there already are left. Returns what failed, with why.

    Raises UserError when many in a row all fail, for the network is down then, not a file missing, and when the disk is
    full or cannot be written.
    """

    def one(job: tuple[str, Path]) -> str | None:
        address, target = job
        draft = target.with_name(f".{target.name}.part")
        try:
            if shutil.disk_usage(target.parent).free < SPARE_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with open_url(address) as answer, open(draft, "wb") as out:
                expected = answer.headers.get("Content-Length")
                shutil.copyfileobj(answer, out)
            if expected is not None and draft.stat().st_size != int(expected):
                raise ConnectionError("cut")
            draft.rename(target)
            return None
        except (*BROKEN_LINE, UserError) as error:
            draft.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in WRITE_ERRORS:
                raise not_written(target, error) from error
            return f"{target.name}: {error}"

    wanted, failures, done = (job for job in addresses if not job[1].is_file()), [], 0
    with ThreadPoolExecutor(AT_ONCE) as pool, Progress(label, total, "files") as progress:
        # The first ones alone: behind a line that is dead, those after them would keep everybody waiting once more.
        while jobs := list(islice(wanted, 16 * AT_ONCE if done else AT_ONCE)):
            failed = [failure for failure in pool.map(one, jobs) if failure]
            failures += failed
            if len(failed) == len(jobs) >= AT_ONCE:
                raise UserError(
                    f"{label}: none of {'' if done else 'the first '}{len(jobs)} files could be read "
                    f"({hide_addresses(failed[-1])}): check the network, then repeat the same command"
                )
            done += len(jobs)
            progress.update(done)
    return failures
