"""`make data`: bring the competition's files into data/<competition>, complete and checked."""

import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, NamedTuple
from urllib.parse import urlsplit

from common import archive
from common.archive import Damaged, Entry
from common.errors import UserError, some
from common.files import locked, require_room
from common.kaggle import manifest
from common.kaggle.client import Site, end_orphan, kaggle
from common.kaggle.manifest import Manifest
from common.kaggle.source import Source
from common.progress import Progress
from common.raw import DATA, visible

GO_ON = "repeat the same command, it goes on where it stopped"
FULL_BYTES = 1 << 19  # the kaggle program writes a megabyte at a time


class Job(NamedTuple):
    """A download from Kaggle: the account, the folders, and the lock that the kaggle program holds too."""

    site: Site
    work: Path
    draft: Path
    lock: IO


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
    """Fetch the files of `source` into data/<competition> and return the folder; a UserError leaves the data as is.

    `labels_only` fetches only the label files. `images` is the number of training images to fetch from outside Kaggle.
    `url` and `checksum` name another copy of data that is not on Kaggle.
    """
    if not (source.slug or source.url):
        said = f"{competition} is not on Kaggle, and its SOURCE has no url: put the files into {DATA / competition}, or"
        raise UserError(f"{said} make train COMP={competition} DATA=/path/to/folder-or-zip")
    home = DATA / competition
    place = home.resolve() if home.is_symlink() else home  # the link's folder, maybe on another disk, is written to
    with _locked(home, place) as lock:
        kept = source.images.folder if source.images else ""
        manifest.settle(place, kept)
        there = manifest.read(home)
        if force or not _is_complete(home, there, source, labels_only):
            now = _obtain(place, source, labels_only, lock, url, checksum, force)
            if labels_only and there and any((home / name).is_file() for name in there.files.keys() - now.files):
                now = replace(there, files=there.files | now.files)  # keep the other files, unless all were deleted
            manifest.install(now, _draft(place), place, kept)
            there = now
        if there.part == "all":
            _clear(lock)
        if labels_only and (problems := there.damage(home)):
            print(f"{home}: the label files are whole, others are damaged ({some(problems, by='; ')}): fetch all "
                  f"again with make data COMP={competition}")  # fmt: skip
        else:
            size = sum(file.size for file in there.files.values())
            print(f"{home} is complete: {len(there.files):,} files, {size / 1e6:,.1f} MB ({there.source})")
        if images:
            from common.kaggle import web

            web.fetch_images(home, source.images, images)
    return home


def _draft(home: Path) -> Path:
    return home.with_name(f".{home.name}.part")


@contextmanager
def _locked(home: Path, place: Path) -> Iterator[IO]:
    """Lock the download folder for one process; the kaggle program holds the lock too, even when the kit is killed."""
    for path in (home.parent, home):
        if os.path.lexists(path) and not path.is_dir():
            said = f"{path} is a file or a link that leads nowhere, expected a folder: move it away or mend the link"
            raise UserError(f"{said}, then repeat the same command")
    work = place.with_name(f".{place.name}.download")
    busy = f"{home} is being downloaded by another process: wait for it, then repeat the command"
    try:
        lock = locked(work / "lock", busy)
    except UserError:  # end a kaggle program whose kit was killed, and go on with its download here
        if not end_orphan(work / "lock"):
            raise
        lock = locked(work / "lock", busy)
    with lock:
        lock.truncate(0)
        try:
            yield lock
        finally:
            shutil.rmtree(_draft(place), ignore_errors=True)
            if work.is_dir() and {file.name for file in work.iterdir()} <= {"lock"}:
                shutil.rmtree(work, ignore_errors=True)


def _clear(lock: IO) -> None:
    """Delete the downloaded files, but not the lock file, which is still held."""
    for file in Path(lock.name).parent.iterdir():
        if file.name != "lock":
            file.unlink()


def _is_complete(home: Path, there: Manifest | None, source: Source, labels_only: bool) -> bool:
    """Whether the data match their manifest. Raises UserError for files that were put there by hand."""
    if there is None and (found := sorted(path.name for path in visible(home))):
        raise UserError(
            f"{home} holds files that make data did not put there ({', '.join(found[:3])}): move them away, use them "
            f"as they are (make train COMP={home.name}), or let FORCE=1 move them to {home}.before"
        )
    names = source.labels if labels_only else None
    if there is None or (there.part != "all" and not labels_only) or set(names or ()) - there.files.keys():
        return False
    if problems := there.damage(home, names):
        print(f"{home} is damaged ({some(problems, by='; ')}): fetching it again")
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
    draft, work, provenance = _draft(home), Path(lock.name).parent, source.page
    job = Job(Site.announced(home.name, source), work, draft, lock) if source.slug else None
    elsewhere = f"{source.images.folder}/" if source.images else "\0"
    expected = source.labels if labels_only else [name for name in source.expected if not name.startswith(elsewhere)]
    for last in (False, True):
        shutil.rmtree(draft, ignore_errors=True)
        try:
            if job is None:
                from common.kaggle import web  # its HTTPS modules take longer to import than everything else

                provenance, files = web.plain(source, work, draft, url, checksum)
            elif labels_only:
                files = _label_files(job)
            else:
                files = _whole_archive(job, again=last, as_it_is=force)
            if absent := [pattern for pattern in expected if not any(fnmatchcase(name, pattern) for name in files)]:
                found = some(sorted(files), 5) or "nothing"
                raise UserError(  # the archive is intact, so a second download would be no better
                    f"{provenance}: the download has no {', '.join(absent)} (found: {found}): correct `expected` in "
                    "SOURCE of its config.py, then repeat the same command; the archive is kept"
                )
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


def _whole_archive(job: Job, *, again: bool, as_it_is: bool) -> dict[str, Entry]:
    """Download all files of a competition (from the start if `again`) and unpack them into the draft.

    Kaggle's file listing, hundreds of pages for an image set, is read at the same time. Files that differ from it raise
    Damaged, or are only reported if `as_it_is`.
    """
    target, over = job.work / f"{job.site.source.slug}.zip", threading.Event()

    def stop() -> None:
        if over.is_set():
            raise UserError("not needed any more")

    with ThreadPoolExecutor(1) as pool:
        listing = pool.submit(job.site.asked, "files", stop=stop)
        try:
            _download(job, target, ["-o"] if again else [], listing)
            files = archive.unpack_into(target, job.draft)
            sizes = listing.result()
        finally:
            over.set()
    with archive.opened(target, target.name) as stream:
        packed = {member.filename: member.file_size for member in stream.infolist()}
    problems = [
        f"{name} has {packed[name]:,} bytes, Kaggle lists {size:,}" if name in packed else f"{name} is missing"
        for name, size in sizes.items()
        if packed.get(name) != size
    ]
    if problems and not as_it_is:
        raise Damaged(f"{target.name}: {some(problems, by='; ')} (FORCE=1 keeps it as it is)")
    if problems:
        print(f"note: {target.name} is kept as it is: {some(problems, by='; ')}")
    return files


def _download(job: Job, target: Path, more: list[str], listing: Future | None = None) -> None:
    """Run the kaggle program's download until `target` or its zip is there, and show how the folder grows.

    Raises UserError if the disk is full or will be, or if the competition cannot be listed. The kaggle program itself
    mistakes a full disk for a broken connection and retries for a minute.
    """
    slug, home, what = job.site.source.slug, job.work.parent, f"downloading {target.name}"

    def measure() -> int:
        done, is_listed = size_of(job.work), listing is not None and listing.done() and not listing.exception()
        progress.update(done // 10**6, total=sum(listing.result().values()) // 10**6 if is_listed else 0)
        return done

    def stop() -> None:
        if shutil.disk_usage(home).free < FULL_BYTES:
            raise UserError(f"downloading {slug}: the disk is full ({home}): free some space, then {GO_ON}")
        if listing is not None and listing.done():  # room for the archive and for the unpacked files
            need = 2 * sum(listing.result().values()) - size_of(job.work) + archive.SPARE_BYTES
            require_room(job.work, need, f"{slug} (archive and files; {home} may be a link to a larger disk)")

    command = ("competitions", "download", slug, "-p", str(job.work), "-q", *more)
    with Progress(what, unit="MB") as progress:
        answer = kaggle(job.site.account, *command, measure=measure, stop=stop, lock=job.lock)
    if answer.status != 0 or not (target.is_file() or _zip_of(target).is_file()):
        stop()
        raise job.site.explained(answer, what)
    if list(job.work.glob("*.kaggle-partial")):  # it exits 0 when interrupted, and half a file has its final name
        raise UserError(f"{what}: interrupted: {GO_ON}")


def _zip_of(file: Path) -> Path:
    """The name under which a large single file arrives, because Kaggle zips it."""
    return file.with_name(f"{file.name}.zip")


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder that another program is writing to."""
    size = 0
    for file in folder.iterdir():
        with suppress(FileNotFoundError):  # gone since it was listed
            size += file.stat().st_size
    return size


def _label_files(job: Job) -> dict[str, Entry]:
    """Download the label files one by one, each to its place."""
    found: dict[str, Entry] = {}
    for name in job.site.source.labels:
        target, place = job.work / Path(name).name, Path(name).parent
        _download(job, target, ["-f", name])
        (job.draft / place).mkdir(parents=True, exist_ok=True)
        if _zip_of(target).is_file():
            files = archive.unpack_into(_zip_of(target), job.draft / place)
        else:
            with open(target, "rb") as stream:  # comparing sizes would need the listing, hundreds of pages for images
                if stream.read(64).lstrip().lower().startswith((b"<!doctype html", b"<html")):
                    raise Damaged(f"{target.name} is a web page, expected the competition's file")
            files = archive.copy_into(target, job.draft / place)
        for file in (target, _zip_of(target)):  # linked to the user's file, and another label file may have its name
            file.unlink(missing_ok=True)
        found |= {str(place / own): entry for own, entry in files.items()}
    return found
