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


class Place(NamedTuple):
    """The folders of one download, and the lock on them, which the kaggle program holds too."""

    home: Path  # the data's final folder
    draft: Path  # what is unpacked, until it replaces `home`
    work: Path  # what is downloaded; the next command goes on with it
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
    with _locked(home) as place:
        kept = source.images.folder if source.images else ""
        manifest.settle(place.home, kept)
        there = manifest.read(home)
        if force or not _is_complete(home, there, source, labels_only):
            before, there = there, _obtain(place, source, labels_only, url, checksum, force)
            if labels_only and before and any((home / name).is_file() for name in before.files.keys() - there.files):
                there = replace(before, files=before.files | there.files)  # keep the others, unless all were deleted
            manifest.install(there, place.draft, place.home, kept)
        if there.part == "all":
            _clear(place.work)
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


@contextmanager
def _locked(home: Path) -> Iterator[Place]:
    """Lock the folders of the download for one process; the kaggle program keeps the lock even when the kit is killed.

    Where `home` is a link, they are beside the folder that it leads to, which may be on another disk.
    """
    for path in (home.parent, home):
        if os.path.lexists(path) and not path.is_dir():
            said = f"{path} is a file or a link that leads nowhere, expected a folder: move it away or mend the link"
            raise UserError(f"{said}, then repeat the same command")
    real = home.resolve() if home.is_symlink() else home
    draft, work = real.with_name(f".{real.name}.part"), real.with_name(f".{real.name}.download")
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
            yield Place(real, draft, work, lock)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
            if work.is_dir() and {file.name for file in work.iterdir()} <= {"lock"}:
                shutil.rmtree(work, ignore_errors=True)


def _clear(work: Path) -> None:
    """Delete the downloaded files, but not the lock file, which is still held."""
    for file in work.iterdir():
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


def _obtain(place: Place, source: Source, labels_only: bool, url: str, checksum: str, force: bool) -> Manifest:
    """Download and unpack into the draft; a damaged download is fetched a second time."""
    if source.notes:
        print(source.notes)
    if source.images:
        print(
            f"the training images ({source.images.total}) are not on Kaggle but at "
            f'{urlsplit(source.images.url).netloc}: fetch some with ARGS="--images 5000"'
            + ("" if labels_only or not source.labels else ", the label files alone with ARGS=--labels-only")
        )
    site, provenance = Site.announced(place.home.name, source) if source.slug else None, source.page
    elsewhere = f"{source.images.folder}/" if source.images else "\0"
    expected = source.labels if labels_only else [name for name in source.expected if not name.startswith(elsewhere)]
    for last in (False, True):
        shutil.rmtree(place.draft, ignore_errors=True)
        try:
            if site is None:
                from common.kaggle import web  # its HTTPS modules take longer to import than everything else

                provenance, files = web.plain(source, place.work, place.draft, url, checksum)
            elif labels_only:
                files = _label_files(site, place)
            else:
                files = _whole_archive(site, place, again=last, as_it_is=force)
            if absent := [pattern for pattern in expected if not any(fnmatchcase(name, pattern) for name in files)]:
                found = some(sorted(files), 5) or "nothing"
                raise UserError(  # the archive is intact, so a second download would be no better
                    f"{provenance}: the download has no {', '.join(absent)} (found: {found}): correct `expected` in "
                    "SOURCE of its config.py, then repeat the same command; the archive is kept"
                )
            return manifest.made(place.draft, "labels" if labels_only else "all", files, provenance)
        except Damaged as error:
            _clear(place.work)
            if last:
                raise UserError(
                    f"{error}; a second download was no better and nothing was kept. See "
                    f"{source.page if source.slug else source.url}, or get the files by hand and pass "
                    "DATA=/path/to/folder-or-zip"
                ) from error
            print(f"{error}: fetching it once more")


def _whole_archive(site: Site, place: Place, *, again: bool, as_it_is: bool) -> dict[str, Entry]:
    """Download all files of a competition (from the start if `again`) and unpack them into the draft.

    Kaggle's file listing, hundreds of pages for an image set, is read at the same time. Files that differ from it raise
    Damaged, or are only reported if `as_it_is`.
    """
    target, over = place.work / f"{site.source.slug}.zip", threading.Event()

    def measure() -> int:  # the listing arrives at once, when it is complete
        if over.is_set():
            raise UserError("not needed any more")
        return 0

    with ThreadPoolExecutor(1) as pool:
        listing = pool.submit(site.asked, "files", measure=measure)
        try:
            _download(site, place, target, ["-o"] if again else [], listing)
            files = archive.unpack_into(target, place.draft)
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


def _download(site: Site, place: Place, target: Path, more: list[str], listing: Future | None = None) -> Path:
    """Run the kaggle program's download, show how the folder grows, and return the file: `target`, or a zip of it.

    Raises UserError if the disk is full or will be, or if the competition cannot be listed. The kaggle program itself
    mistakes a full disk for a broken connection and retries for a minute.
    """
    slug, disk, what = site.source.slug, place.work.parent, f"downloading {target.name}"

    def measure() -> int:
        done, total = size_of(place.work), 0
        if shutil.disk_usage(disk).free < FULL_BYTES:
            raise UserError(f"downloading {slug}: the disk is full ({disk}): free some space, then {GO_ON}")
        if listing is not None and listing.done():  # room for the archive and for the unpacked files
            total = sum(listing.result().values())
            need = 2 * total - done + archive.SPARE_BYTES
            require_room(place.work, need, f"{slug} (archive and files; {disk} may be a link to a larger disk)")
        progress.update(done // 10**6, total=total // 10**6)
        return done

    command = ("competitions", "download", slug, "-p", str(place.work), "-q", *more)
    with Progress(what, unit="MB") as progress:
        answer = kaggle(site.account, *command, measure=measure, lock=place.lock)
        packed = target.with_name(f"{target.name}.zip")  # Kaggle zips a large single file
        arrived = next((file for file in (packed, target) if file.is_file()), None)
        if answer.status != 0 or arrived is None:
            measure()  # raises the reason if it is the disk or the listing
            raise site.explained(answer, what)
    if list(place.work.glob("*.kaggle-partial")):  # it exits 0 when interrupted, and half a file has its final name
        raise UserError(f"{what}: interrupted: {GO_ON}")
    return arrived


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder that another program is writing to."""
    size = 0
    for file in folder.iterdir():
        with suppress(FileNotFoundError):  # gone since it was listed
            size += file.stat().st_size
    return size


def _label_files(site: Site, place: Place) -> dict[str, Entry]:
    """Download the label files one by one, each to its place."""
    found: dict[str, Entry] = {}
    for name in site.source.labels:
        target, folder = place.work / Path(name).name, Path(name).parent
        file = _download(site, place, target, ["-f", name])
        (place.draft / folder).mkdir(parents=True, exist_ok=True)
        if file != target:
            files = archive.unpack_into(file, place.draft / folder)
        else:
            with open(file, "rb") as stream:  # comparing sizes would need the listing, hundreds of pages for images
                if stream.read(64).lstrip().lower().startswith((b"<!doctype html", b"<html")):
                    raise Damaged(f"{file.name} is a web page, expected the competition's file")
            files = archive.copy_into(file, place.draft / folder)
        file.unlink()  # linked to the user's file, and another label file may have its name
        found |= {str(folder / own): entry for own, entry in files.items()}
    return found
