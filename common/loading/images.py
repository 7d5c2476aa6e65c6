"""Image files: decoded fast, at a reduced size where that is enough, and refused by name when they are broken."""

import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from os import PathLike

import cv2
import numpy as np
from tqdm import tqdm

from common.errors import UserError

REDUCED = {2: cv2.IMREAD_REDUCED_GRAYSCALE_2, 4: cv2.IMREAD_REDUCED_GRAYSCALE_4, 8: cv2.IMREAD_REDUCED_GRAYSCALE_8}
FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # JPEG markers that hold the image's size


class BadImage(UserError):
    """An image that cannot be read; `row` is its row in the dataset, which the loader fills in."""

    def __init__(self, path: str | PathLike, reason: str, row: int | None = None):
        super().__init__(str(path), reason, row)
        self.path, self.reason, self.row = str(path), reason, row

    def __str__(self) -> str:
        row = "" if self.row is None else f" (row {self.row})"
        return (
            f"image {self.path}{row} {self.reason}: replace the file, or leave such images out with "
            "--bad-images skip; make check, with the same COMP= and DATA=, lists them all"
        )


def decode(
    path: str | PathLike, size: tuple[int, int] | None = None, gray: bool = False, upright: bool = True
) -> np.ndarray:
    """The image in RGB, uint8 [H, W, 3], or uint8 [H, W] for `gray`; resized to `size` (height, width) where given.

    `upright` turns it as its EXIF orientation says; where masks belong to the pixels as they are stored it must not.
    A JPEG at least twice as large as `size` is decoded at 1/2, 1/4 or 1/8: that skips most of its inverse transform.
    Raises BadImage when the file is missing, empty, truncated or not an image.
    """
    try:
        with open(path, "rb") as stream:
            data = stream.read()
    except OSError as error:
        raise BadImage(path, f"cannot be opened ({error.strerror or error})") from error
    if not data:
        raise BadImage(path, "is empty")
    flags = cv2.IMREAD_GRAYSCALE if gray else cv2.IMREAD_COLOR_RGB
    flags |= 0 if upright else cv2.IMREAD_IGNORE_ORIENTATION
    if size is not None and data[:2] == b"\xff\xd8":
        height, width = jpeg_size(data)
        factor = min(height // size[0], width // size[1])
        if factor >= 2:
            flags |= REDUCED[8 if factor >= 8 else 4 if factor >= 4 else 2]
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if image is None:
        raise BadImage(path, "is truncated or not an image")
    if size is not None and image.shape[:2] != size:
        smaller = image.shape[0] > size[0] or image.shape[1] > size[1]
        image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)
    return image


def jpeg_size(data: bytes) -> tuple[int, int]:
    """(height, width) of a JPEG, (0, 0) when the file ends before they come.

    Walks from marker to marker: a thumbnail inside the header has markers of its own, which must not count.
    """
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # padding
            place += 1
            continue
        if marker in FRAME_HEADERS:
            return int.from_bytes(data[place + 5 : place + 7]), int.from_bytes(data[place + 7 : place + 9])
        place += 2 + int.from_bytes(data[place + 2 : place + 4])
    return 0, 0


def find_bad(paths: Sequence[str | PathLike], show: bool = True) -> list[BadImage]:
    """Every image of `paths` that cannot be read or is damaged, in their order; reads all, behind a progress bar."""
    with ProcessPoolExecutor(initializer=_keep_warnings) as pool:
        problems = tqdm(
            pool.map(_problem, paths, chunksize=8),
            "checking",
            len(paths),
            unit="image",
            file=sys.stderr,
            disable=not show,
            mininterval=0.5,
        )
        bad = []
        for row, error in enumerate(problems):
            if error:
                error.row = row
                bad.append(error)
        return bad


def _keep_warnings() -> None:
    """Send the terminal output of this process to a file: libjpeg names damaged data there and nowhere else."""
    cv2.setNumThreads(0)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)


def _problem(path: str | PathLike) -> BadImage | None:
    start = os.lseek(2, 0, os.SEEK_END)
    try:
        decode(path, size=(1, 1), gray=True)  # the compressed data is read in full, the pixels are made at 1/8
    except BadImage as error:
        return error
    os.lseek(2, start, os.SEEK_SET)
    said = os.read(2, 4096).decode(errors="replace").strip().splitlines()
    serious = [line for line in said if "premature end" in line or "Huffman" in line]
    return BadImage(path, f"is damaged, part of it is grey ({serious[0]})") if serious else None


def check_folder(paths: Sequence[str | PathLike], show: bool = True) -> None:
    """`make check`: raises UserError naming every image of `paths` that cannot be read, and its row."""
    bad = find_bad(paths, show)
    if bad:
        named = "; ".join(f"{error.path} (row {error.row}) {error.reason}" for error in bad)
        raise UserError(
            f"{len(bad)} of {len(paths)} images cannot be read: {named}. Replace them (make data COMP= "
            "downloads the data again), or train without them: --bad-images skip"
        )
