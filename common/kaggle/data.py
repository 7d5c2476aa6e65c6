"""`make data`: the competition's files in data/<competition>, whole and checked, or a message that says what to do."""

import csv
import hashlib
import heapq
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from common.archive import Damaged
from common.errors import UserError
from common.files import locked
from common.kaggle import download, manifest
from common.kaggle.client import end_orphan
from common.kaggle.credentials import find
from common.kaggle.manifest import Manifest
from common.kaggle.source import Source
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
    with _locked(home) as lock:
        place = home.resolve() if home.is_symlink() else home  # to a folder on another disk
        kept = source.images.folder if source.images else ""
        manifest.settle(place, kept)
        there = manifest.read(home)
        if force or not _is_complete(home, there, source, labels_only):
            now = _obtain(place, source, labels_only, lock, url, checksum, force)
            if labels_only and there and any((home / name).is_file() for name in there.files.keys() - now.files):
                now = replace(there, files=there.files | now.files)  # the others stay: deleted data are not asked for
            manifest.install(now, _draft(place), place, kept)
            there = now
        if there.part == "all":
            _clear(lock)
        if labels_only and (problems := there.damage(home)):
            print(f"{home}: the label files are whole, others are damaged ({manifest.listed(problems)}): fetch all "
                  f"again with make data COMP={competition}")  # fmt: skip
        else:
            size = sum(file.size for file in there.files.values())
            print(f"{home} is complete: {len(there.files):,} files, {size / 1e6:,.1f} MB ({there.source})")
        if images:
            _fetch_images(home, source, images)
    return home


def _draft(home: Path) -> Path:
    return home.with_name(f".{home.name}.part")


@contextmanager
def _locked(home: Path) -> Iterator[IO]:
    """The folder for downloads, for one process at a time; the lock outlives the kit while the kaggle program runs."""
    for path in (home.parent, home):
        if os.path.lexists(path) and not path.is_dir():
            raise UserError(
                f"{path} is a file or a link that leads nowhere, expected a folder: move it away or mend the link, "
                "then repeat the same command"
            )
    work = home.with_name(f".{home.name}.download")
    busy = f"{home} is being downloaded by another process: wait for it, then repeat the command"
    try:
        lock = locked(work / "lock", busy)
    except UserError:  # a kaggle program that outlived its kit is ended, and its download goes on in this one
        if not end_orphan(work / "lock"):
            raise
        lock = locked(work / "lock", busy)
    with lock:
        lock.truncate(0)
        try:
            yield lock
        finally:
            shutil.rmtree(_draft(home.resolve()), ignore_errors=True)
            if work.is_dir() and {file.name for file in work.iterdir()} <= {"lock"}:
                shutil.rmtree(work, ignore_errors=True)


def _clear(lock: IO) -> None:
    """Delete what was downloaded; the lock beside it is still held."""
    for file in Path(lock.name).parent.iterdir():
        if file.name != "lock":
            file.unlink()


def _is_complete(home: Path, there: Manifest | None, source: Source, labels_only: bool) -> bool:
    """Whether the data is what its manifest says. Raises UserError for files that somebody put there by hand."""
    if there is None and home.is_dir() and (found := sorted(path.name for path in visible(home))):
        raise UserError(
            f"{home} holds files that make data has not put there ({', '.join(found[:3])}): move them away, use them "
            f"as they are (make train COMP={home.name}), or have them moved to {home}.before with FORCE=1"
        )
    if there is None or (there.part != "all" and not labels_only):
        return False
    if problems := there.damage(home, source.labels if labels_only else None):
        print(f"{home} is damaged ({manifest.listed(problems)}): fetching it again")
    return not problems


def _obtain(home: Path, source: Source, labels_only: bool, lock: IO, url: str, checksum: str, force: bool) -> Manifest:
    """Download and unpack into the draft of `home`; a damaged download is fetched a second time."""
    if source.notes:
        print(source.notes)
    if source.images:
        print(
            f"the training images ({source.images.total}) are not on Kaggle but at "
            f'{urlsplit(source.images.url).netloc}: fetch some with ARGS="--images 5000"'
            + ("" if labels_only or not source.labels else ", the label files alone with ARGS=--labels-only")
        )
    account, draft, work = find() if source.slug else None, _draft(home), Path(lock.name).parent
    if account:
        print(f"Kaggle account: {account.where}")
    expected = source.labels if labels_only else source.archived
    for last in (False, True):
        shutil.rmtree(draft, ignore_errors=True)
        provenance = source.page
        try:
            if account is None:
                provenance, files = download.plain(source, work, draft, url, checksum)
            elif labels_only:
                files = download.single_files(source, account, work, draft, lock)
            else:
                files = download.whole_archive(source, account, work, draft, lock, again=last, as_it_is=force)
            if absent := [pattern for pattern in expected if not any(fnmatchcase(name, pattern) for name in files)]:
                found = ", ".join(sorted(files)[:5]) or "nothing"
                raise Damaged(f"{provenance}: the download has no {', '.join(absent)} (found: {found})")
            return manifest.made(draft, "labels" if labels_only else "all", files, provenance)
        except Damaged as error:
            _clear(lock)
            if last:
                raise UserError(
                    f"{error}; a second download was no better and nothing was kept. See "
                    f"{source.page if source.slug else source.url}, or get the files by hand and pass "
                    "DATA=/path/to/folder-or-zip"
                ) from error
            print(f"{error}: fetching it once more")
    raise AssertionError("unreachable")


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
