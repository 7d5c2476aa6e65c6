"""Finds image files that cannot be read, before a training and in `make check`."""

import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import compress
from os import PathLike
from pathlib import Path
from typing import Any

import cv2

from common.errors import BadImage, UserError
from common.loading.worker import end_with_parent
from common.progress import progress
from common.vision.decode import PIXELS, decode, jpeg_size
from common.vision.find import ENDINGS

FEW = 2000  # images of 1400x2100 take half a minute on two cores
ENDS = 2**16  # bytes at a file's beginning and end that show whether it is whole
NAMED = 5


def image_paths(dataset: Any) -> list[Path]:
    """The image files of any dataset: its `paths`, or else its first attribute that is a list of image files."""
    for held in (getattr(dataset, "paths", None), *getattr(dataset, "__dict__", {}).values()):
        if isinstance(held, (list, tuple)) and held and all(map(_is_image, held)):
            return [Path(item) for item in held]
    return []


def _is_image(item: Any) -> bool:
    return isinstance(item, (str, PathLike)) and str(item).lower().endswith(ENDINGS)


def refuse_unreadable(bad: Sequence[BadImage], total: int) -> None:
    """Raises UserError if some of the `total` test images are `bad`."""
    if bad:
        named = "; ".join(f"{error.path} {error.reason}" for error in bad[:NAMED])
        raise UserError(
            f"{len(bad)} of {total} test images cannot be read ({named}), and a submission needs every one: replace "
            f"the files and repeat the same command; make check, with the same COMP= and DATA=, lists them all"
        )


def unreadable(paths: Sequence[str | PathLike], few: int = FEW) -> list[BadImage]:
    """The images of `paths` that cannot be read, in their order; fast enough to run before every training.

    Up to `few` images are all decoded in full. Of more, only those are whose beginning or end is not that of a whole
    JPEG or PNG. This takes 50 microseconds a file and finds truncated files, empty ones and other formats, but no
    damage in the middle.
    """
    rows = range(len(paths))
    if len(paths) > few:
        with ThreadPoolExecutor() as pool:
            rows = list(compress(rows, pool.map(_looks_odd, paths)))
    bad = find_bad([paths[row] for row in rows], show=len(rows) > 200)
    for error in bad:
        error.row = rows[error.row]
    return bad


def _looks_odd(path: str | PathLike) -> bool:
    try:
        with open(path, "rb") as stream:
            head = stream.read(ENDS)
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - ENDS))
            tail = stream.read(ENDS)
    except (OSError, ValueError):
        return True
    if head[:4] == b"\x89PNG":
        height, width, end = int.from_bytes(head[20:24]), int.from_bytes(head[16:20]), b"IEND"
    else:
        (height, width), end = jpeg_size(head), b"\xff\xd9"  # other formats get no size, so they are decoded
    return end not in tail or not 0 < height * width < PIXELS


def find_bad(paths: Sequence[str | PathLike], show: bool = True) -> list[BadImage]:
    """Every image of `paths` that cannot be read or is damaged, in their order; reads all, behind a progress bar."""
    with ProcessPoolExecutor(initializer=_start) as pool:
        found = pool.map(_problem, range(len(paths)), paths, chunksize=8)
        return [error for error in progress(found, "checking", len(paths), "images", show) if error]


def _start() -> None:
    """Redirect this process's stderr to a file: libjpeg reports damaged data there and nowhere else.

    A file in memory where the system has these: on a full disk the reports would be lost, and damage not found.
    """
    end_with_parent()
    cv2.setNumThreads(0)
    with open(os.memfd_create("stderr"), "wb") if hasattr(os, "memfd_create") else tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)


def _problem(row: int, path: str | PathLike) -> BadImage | None:
    start = os.lseek(2, 0, os.SEEK_END)
    try:
        decode((path,), size=(1, 1))  # the compressed data is read in full, the pixels are made at 1/8
    except BadImage as error:
        error.row = row
        return error
    os.lseek(2, start, os.SEEK_SET)
    said = os.read(2, 4096).decode(errors="replace").strip().splitlines()
    serious = [line for line in said if "premature end" in line or "Huffman" in line]
    return BadImage(path, f"is damaged, part of it is grey ({serious[0]})", row) if serious else None


def check_folder(train: Sequence[str | PathLike], test: Sequence[str | PathLike], competition: str) -> None:
    """`make check`: raises UserError naming every image that cannot be read."""
    paths = [*train, *test]
    if bad := find_bad(paths):
        named = "; ".join(f"{error.path} {error.reason}" for error in bad)
        left_out = ", or train without them: --bad-images skip" if bad[-1].row < len(train) else ""
        raise UserError(
            f"{len(bad)} of {len(paths)} images cannot be read: {named}. Replace them (make data COMP={competition} "
            f"downloads the data again){left_out}"
        )
