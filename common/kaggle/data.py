"""`make data`: the competition's files in data/<competition>, whole and checked, or a message that says what to do."""

import csv
import fcntl
import hashlib
import heapq
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from common.archive import Damaged
from common.errors import UserError
from common.files import not_written
from common.kaggle import download, manifest
from common.kaggle.cli import end_orphan
from common.kaggle.credentials import find
from common.kaggle.source import Source, missing
from common.raw import DATA, visible


def fetch(
    competition: str,
    source: Source,
    *,
    force: bool = False,
    labels_only: bool = False,
    images: int = 0,
    url: str = "",
    checksum: str = "",
) -> Path:
    """Bring data/<competition> to what `source` says and return it; does nothing when it is complete already.

    `labels_only` fetches the label files alone, `images` so many training images from outside Kaggle, `url` and
    `checksum` name another copy of data that is not on Kaggle. Raises UserError and leaves the data as it was.
    """
    if (labels_only and not source.labels) or (images and not source.images):
        flag = "--labels-only" if labels_only else "--images"
        raise UserError(f"{flag}: {competition} has no such choice: make data COMP={competition}")
    if (url or checksum) and source.slug:
        raise UserError(f"--url, --checksum: {competition} comes from {source.page}: make data COMP={competition}")
    checksum = download.checked(checksum)
    home = DATA / competition
    with _locked(DATA / f".{competition}.download", competition) as lock:
        part, expected = ("labels", source.labels) if labels_only else ("all", source.archived)
        before = manifest.read(home)
        if not force and _is_complete(home, before, part):
            print(f"{home} is complete: {len(before.files):,} files, {before.size / 1e6:,.1f} MB ({before.source})")
        else:
            if source.notes:
                print(source.notes)
            if source.images:
                print(
                    f"the training images ({source.images.total}) are not on Kaggle but at "
                    f'{urlsplit(source.images.url).netloc}: fetch some with ARGS="--images 5000"'
                    + ("" if labels_only or not source.labels else ", the label files alone with ARGS=--labels-only")
                )
            _refuse_unknown(home, before, force)
            now = _obtain(home, source, part, expected, Path(lock.name).parent, lock, url, checksum, force)
            rest = before if part == "labels" and _has_others(home, before, now) else None
            if rest is not None:
                now = now.added_to(rest)
            manifest.install(_draft(home), now, before)
            _clear(Path(lock.name).parent)
            if rest is not None and (problems := now.damage()):
                print(
                    f"{home}: the label files are new, others are damaged ({manifest.listed(problems)}): fetch all "
                    f"again with make data COMP={competition}"
                )
            else:
                print(f"{home} is complete: {len(now.files):,} files, {now.size / 1e6:,.1f} MB ({now.source})")
        if images:
            _fetch_images(home, source, images)
    return home


def _draft(home: Path) -> Path:
    return home.with_name(f".{home.name}.part")


@contextmanager
def _locked(work: Path, competition: str) -> Iterator[IO]:
    """The folder for downloads, for one process at a time; the lock outlives the kit while the kaggle program runs."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = open(work / "lock", "a+")
    except (FileExistsError, NotADirectoryError) as error:
        raise _no_folder(work.parent) from error
    except OSError as error:
        raise not_written(work / "lock", error) from error
    with lock:
        try:
            _take(lock)
        except OSError as error:
            raise UserError(
                f"data/{competition} is being downloaded by another process: wait for it, then repeat the command"
            ) from error
        lock.truncate(0)
        try:
            yield lock
        finally:
            shutil.rmtree(_draft(work.with_name(competition)), ignore_errors=True)
            if work.is_dir() and {file.name for file in work.iterdir()} <= {"lock"}:
                shutil.rmtree(work, ignore_errors=True)


def _clear(work: Path) -> None:
    """Delete what was downloaded; the lock is still held."""
    for file in work.iterdir():
        if file.name != "lock":
            file.unlink()


def _no_folder(path: Path) -> UserError:
    return UserError(
        f"{path} is a file or a link that leads nowhere, expected a folder: move it away or mend the link, then repeat "
        "the same command"
    )


def _take(lock: IO) -> None:
    """Lock the file; a kaggle program that outlived its kit is ended first, its download goes on in this one."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if not end_orphan(Path(lock.name)):
            raise
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_complete(home: Path, before: manifest.Manifest | None, part: str) -> bool:
    """Whether the data is what its manifest says; says so when it is damaged."""
    if before is None or (part == "all" and before.part != "all"):
        return False
    problems = before.damage()
    if problems:
        print(f"{home} is damaged ({manifest.listed(problems)}): fetching it again")
    return not problems


def _has_others(home: Path, before: manifest.Manifest | None, labels: manifest.Manifest) -> bool:
    """Whether more than the label files was fetched before and any of it is there; deleted data are not asked for."""
    if before is None or before.part != "all":
        return False
    return any((home / name).is_file() for name in before.files.keys() - labels.files.keys())


def _refuse_unknown(home: Path, before: manifest.Manifest | None, force: bool) -> None:
    """Files that somebody put there by hand are not replaced unasked."""
    if os.path.lexists(home) and not home.is_dir():
        raise _no_folder(home)
    found = [path.name for path in visible(home)] if home.is_dir() else []
    if found and before is None and not force:
        raise UserError(
            f"{home} holds files that make data has not put there ({', '.join(sorted(found)[:3])}): move them away, "
            f"use them as they are (make train COMP={home.name}), or add to them with FORCE=1"
        )


def _obtain(
    home: Path,
    source: Source,
    part: str,
    expected: tuple[str, ...],
    work: Path,
    lock: IO,
    url: str,
    checksum: str,
    force: bool,
) -> manifest.Manifest:
    """Download and unpack into the draft of `home`; a damaged download is fetched a second time."""
    account = find() if source.slug else None
    if account:
        print(f"Kaggle account: {account.where}")
    for attempt in (1, 2):
        draft = _draft(home)
        shutil.rmtree(draft, ignore_errors=True)
        try:
            if account is None:
                provenance, files = download.plain(source, work, draft, url, checksum)
            elif part == "labels":
                provenance, files = source.page, download.single_files(source, account, work, draft, lock)
            else:
                provenance, files = (
                    source.page,
                    download.whole_archive(source, account, work, draft, lock, again=attempt > 1, as_it_is=force),
                )
            if absent := missing(expected, list(files)):
                found = ", ".join(sorted(files)[:5]) or "nothing"
                raise Damaged(f"{provenance}: the download has no {', '.join(absent)} (found: {found})")
            return manifest.make(home, draft, part, files, provenance)
        except Damaged as error:
            _clear(work)
            if attempt == 2:
                raise UserError(
                    f"{error}; a second download was no better and nothing was kept. See {origin_page(source)}, or "
                    "get the files by hand and pass DATA=/path/to/folder-or-zip"
                ) from error
            print(f"{error}: fetching it once more")
    raise AssertionError("unreachable")


def origin_page(source: Source) -> str:
    return source.page if source.slug else source.url


def _fetch_images(home: Path, source: Source, count: int) -> None:
    """`count` training images that are not on Kaggle: the same ones everywhere, and a larger count adds to them."""
    from common.kaggle import web

    images = source.images
    with open(home / images.ids_file, newline="", encoding="utf-8") as stream:
        ids = {row[images.ids_column] for row in csv.DictReader(stream)}
    chosen = heapq.nsmallest(count, ids, key=lambda name: hashlib.sha256(name.encode()).digest())
    folder = home / images.folder
    folder.mkdir(exist_ok=True)
    jobs = ((images.url.format(id=name), folder / f"{name}.jpg") for name in chosen)
    failures = web.download_many(jobs, len(chosen), f"images of {urlsplit(images.url).netloc}")
    print(f"{folder}: {len(chosen) - len(failures):,} of the {images.total}")
    if failures:
        raise UserError(
            f"{len(failures):,} of {len(chosen):,} images could not be read (first: {failures[0]}): repeat the same "
            "command to try those again, or train without them"
        )
