"""Image files by their ids: which are there, which are missing, and whether they are still the same."""

import hashlib
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError, some
from common.raw import ARCHIVES, CACHE, RawData, files_under
from common.vision.decode import Image

ENDINGS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif")
ENDINGS += (".jpe", ".jfif", ".jp2", ".avif", ".ppm", ".pgm")


def find_images(folder: Path) -> list[Path]:
    """Every image file under `folder`, sorted, also in linked subfolders; no hidden files (`._` of a Mac's archive).

    A broken link is included: decoding it raises BadImage.
    """
    names = files_under(folder, dangling=True) if folder.is_dir() else ()
    return sorted(folder / name for name in names if name.lower().endswith(ENDINGS))


def match_images(folder: Path, ids: Iterable[Any]) -> list[Path | None]:
    """The file under `folder` of every id, None where there is none.

    An id is a file name with or without its ending, alone or with subfolders in front ("cats/001"). Raises UserError
    when two files fit, such as x.png beside x.jpg. Macs write é as two characters; both ways of writing are one name.
    """
    by_stem = defaultdict(list)
    for path in find_images(folder):
        by_stem[_composed(path.stem)].append(path)
    return [_match(folder, _composed(str(name)), by_stem) for name in ids]


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _match(folder: Path, name: str, by_stem: dict[str, list[Path]]) -> Path | None:
    last = name.rpartition("/")[2]
    with_ending = last.lower().endswith(ENDINGS)
    found = {  # by path and as it is compared
        path: _composed(str(path if with_ending else path.with_suffix("")))
        for path in by_stem.get(Path(last).stem if with_ending else last, [])
    }
    candidates = [path for path, own in found.items() if f"/{own}".endswith(f"/{name}")]
    if len(candidates) > 1:
        candidates = [path for path in candidates if found[path] == _composed(str(folder / name))] or candidates
    if len(candidates) > 1:
        two = " and ".join(str(path.relative_to(folder)) for path in candidates[:2])
        raise UserError(f"{folder} has {two} for the id {name}: remove one of them, or give the ids their endings")
    return candidates[0] if candidates else None


def images_of(
    raw: RawData, folder: str, ids: Sequence[Any], table: str, lines: Sequence[int] | None = None
) -> list[Path]:
    """`match_images` in a folder of the data, where every id needs its file; raises UserError naming missing ids.

    `table` is the file of the ids, and `lines` are theirs in it, to name the first missing one. If `raw` is lenient, a
    missing file gets the path where it should be, so that its row is left out later, like that of a damaged file.
    """
    folder = raw.folder() / folder
    again = f"get the files with make data COMP={raw.competition}, or pass DATA=/path/to/folder-or-zip"
    if not folder.is_dir():
        raise _no_folder(folder, again)
    paths = match_images(folder, ids)
    if raw.lenient:
        return [path or folder / str(name) for name, path in zip(ids, paths, strict=True)]
    if missing := [str(name) for name, path in zip(ids, paths, strict=True) if path is None]:
        line = "" if lines is None else f" line {lines[paths.index(None)]}"
        spare = sorted(set(files_under(folder)) - {str(path.relative_to(folder)) for path in paths if path})
        other = f", which holds {some(spare)} that no id names" if spare else ""  # spelt otherwise, or no image
        raise UserError(
            f"{table}{line} names {some(missing)}, not in {folder} ({len(missing):,} of {len(paths):,} images){other}: "
            f"unpack the images again, or {again}"
        )
    return paths


def _no_folder(folder: Path, again: str) -> UserError:
    there = sorted(folder.parent.glob("*"))
    for file in there:
        if file.is_file() and file.name.startswith(f"{folder.name}.") and file.name.lower().endswith(ARCHIVES):
            return UserError(f"{folder} is missing, but {file.name} is beside it: unpack it into {folder}, or {again}")
    folders = [one.name for one in there if one.is_dir() and one.name != CACHE]
    beside = f" (beside it: {some(folders)})" if folders else ""
    return UserError(f"{folder} is missing{beside}: name the folder in build(), or {again}")


def channels_of(
    raw: RawData, folder: str, ids: Sequence[Any], channels: Sequence[str], table: str, lines: Sequence[int]
) -> list[tuple[Path, ...]]:
    """The files <id>_<channel> of every id, in the order of `channels`; otherwise like `images_of`."""
    names = [f"{name}_{channel}" for name in ids for channel in channels]
    paths = iter(images_of(raw, folder, names, table, [line for line in lines for _ in channels]))
    return list(zip(*[paths] * len(channels), strict=True))


def files_of(images: Iterable[Image]) -> Iterator[Path]:
    """Every file of the images, in their order."""
    for image in images:
        yield from map(Path, image if isinstance(image, tuple) else (image,))


def fingerprint(images: Iterable[Image], *, of_place: bool = False) -> str:
    """sha256 over folders, names and sizes of the files, because reading gigabytes would take minutes.

    `of_place` uses the whole path, mtime and ctime too, as the key of a cache on this machine. ctime reveals a
    replaced file with the old size and mtime, which archives restore.
    """
    digest = hashlib.sha256()
    for path in files_of(images):
        try:
            found = path.stat()
            size, times = found.st_size, f"{found.st_mtime_ns} {found.st_ctime_ns}"
        except OSError:  # a link that leads nowhere
            size, times = -1, 0
        line = f"{os.path.realpath(path)} {size} {times}" if of_place else f"{path.parent.name}/{path.name} {size}"
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()
