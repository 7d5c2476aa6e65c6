"""Decodes image files to arrays, at a reduced size where that is enough; raises BadImage naming a broken file."""

from os import PathLike
from pathlib import Path

import cv2
import numpy as np

from common.errors import BadImage

REDUCED = {2: cv2.IMREAD_REDUCED_GRAYSCALE_2, 4: cv2.IMREAD_REDUCED_GRAYSCALE_4, 8: cv2.IMREAD_REDUCED_GRAYSCALE_8}
ORIENTATION, EXTRA_SAMPLES = 0x112, 0x152  # tags of a TIFF
FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # JPEG markers that hold the image's size
PIXELS = 2**30  # OpenCV decodes no larger images
TOO_LARGE = "cannot be decoded (its header says 2^30 pixels or more)"

Image = str | PathLike | tuple[str | PathLike, ...]  # a file, or one file for each channel


def decode(image: Image, size: tuple[int, int] | None = None, upright: bool = True) -> np.ndarray:
    """The image as uint8 [H, W, C], resized to `size` (height, width) where given.

    A single file becomes RGB, even if it is grey; a tuple of files is stacked, one channel each, which is the brightest
    of a coloured file: pure blue 255 stays 255. 16 bits become eight (65535 becomes 255), and transparency is dropped.
    `upright` turns the image by its EXIF orientation; it must be off if masks belong to the pixels as stored. A JPEG at
    least twice as large as `size` is decoded at 1/2, 1/4 or 1/8, which skips most of the inverse transform. Raises
    BadImage for any fault of a file.
    """
    if not isinstance(image, tuple):
        return _decode(image, size, upright, gray=False)
    planes = [_decode(path, size, upright, gray=True) for path in image]
    for path, plane in zip(image, planes, strict=True):
        if plane.shape != planes[0].shape:
            sizes = [f"{height}x{width}" for height, width in (plane.shape, planes[0].shape)]
            raise BadImage(path, f"has {sizes[0]} pixels, and {Path(image[0]).name} of the same image {sizes[1]}")
    return np.stack(planes, axis=-1)


def full_depth(path: str | PathLike) -> np.ndarray:
    """The image [H, W] with one channel as in `decode`, but in the depth of the file, such as uint16."""
    return _decode(path, None, False, gray=True, depth=cv2.IMREAD_ANYDEPTH)


def _decode(
    path: str | PathLike, size: tuple[int, int] | None, upright: bool, gray: bool, depth: int = 0
) -> np.ndarray:
    """uint8 [H, W, 3], or [H, W] for `gray`; `depth` is a flag of OpenCV."""
    try:
        with open(path, "rb") as stream:
            data = stream.read()
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise BadImage(path, f"cannot be opened ({getattr(error, 'strerror', None) or error})") from error
    if not data:
        raise BadImage(path, "is empty")
    flags = depth | (cv2.IMREAD_ANYCOLOR if gray else cv2.IMREAD_COLOR_RGB)
    data = _with_tiff_tag(data, EXTRA_SAMPLES, 0)  # OpenCV would darken a TIFF by its transparency
    if not upright:  # OpenCV ignores the flag for TIFFs
        flags, data = flags | cv2.IMREAD_IGNORE_ORIENTATION, _with_tiff_tag(data, ORIENTATION, 1)
    reduced = 0
    if size is not None and data[:2] == b"\xff\xd8":
        height, width = jpeg_size(data)
        if height * width >= PIXELS:  # two damaged bytes; at 1/8 OpenCV would decode it, to a grey area
            raise BadImage(path, TOO_LARGE)
        factor = min(height // size[0], width // size[1])
        if factor >= 2:
            reduced = REDUCED[8 if factor >= 8 else 4 if factor >= 4 else 2]
    buffer = np.frombuffer(data, np.uint8)
    try:
        pixels = cv2.imdecode(buffer, flags | reduced)
        if reduced and pixels is not None and (pixels.shape[0] < size[0] or pixels.shape[1] < size[1]):
            pixels = cv2.imdecode(buffer, flags)  # turned onto its side, it is too small
    except Exception as error:  # a decoder that gives up, over a size of more than 2^30 pixels for example
        reason = " ".join((getattr(error, "err", None) or str(error) or type(error).__name__).split())
        too_large = "MAX_IMAGE_PIXELS" in reason
        raise BadImage(path, TOO_LARGE if too_large else f"cannot be decoded ({reason[:120]})") from error
    if pixels is None:
        raise BadImage(path, "is truncated or not an image of 8 or 16 bits")
    if size is not None and pixels.shape[:2] != size:
        smaller = pixels.shape[0] > size[0] or pixels.shape[1] > size[1]
        pixels = cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)
    return pixels.max(2) if gray and pixels.ndim == 3 else pixels


def _with_tiff_tag(data: bytes, tag: int, value: int) -> bytes:
    """A TIFF with another first value of a tag of 16 bits, if it has the tag; other files stay as they are."""
    order = {b"II*\0": "little", b"MM\0*": "big"}.get(data[:4])
    if order is not None:
        place = int.from_bytes(data[4:8], order)
        entries = int.from_bytes(data[place : place + 2], order)
        for entry in range(place + 2, place + 2 + 12 * entries, 12):
            found, count = (int.from_bytes(data[entry + at : entry + end], order) for at, end in ((0, 2), (4, 8)))
            if found == tag and count <= 2:  # more values are elsewhere in the file
                return data[: entry + 8] + value.to_bytes(2, order) + data[entry + 10 :]
    return data


def jpeg_size(data: bytes) -> tuple[int, int]:
    """(height, width) of a JPEG, (0, 0) when the file ends before its size.

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
