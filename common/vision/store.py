"""Images at one size: decoded and resized once into a memory-mapped file if it is not too large, else at every use."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import BadImage, UserError
from common.files import FORBIDDEN, NOT_NPY, alone_in
from common.progress import progress
from common.raw import RawData
from common.vision.decode import Image, decode
from common.vision.find import files_of, fingerprint, images_of

GIGABYTE = 1 << 30


class ImageStore:
    """n images; `store[row]` is uint8 [H, W, C], read from a file in `cache` that is made once or decoded at every use.

    The file is made when `size` (height, width) is given and all images take at most `limit_gb` at that size; if they
    take more, `announce` gets a message. It is made at the first use, so a prediction resizes no training images. Its
    name depends on the images' paths, sizes and times, so it is found again. Worker processes get its name only.
    """

    def __init__(
        self,
        images: Sequence[Image],
        size: tuple[int, int] | None = None,
        cache: Path | None = None,
        limit_gb: float = 20.0,
        upright: bool = True,
        announce: Callable[[str], None] = print,
    ):
        self.images, self.size, self.upright = list(images), size, upright
        self._file: Path | None = None
        self._rows: np.ndarray | None = None
        if size is None or cache is None or not self.images:
            return
        channels = len(self.images[0]) if isinstance(self.images[0], tuple) else 3
        self._shape = (*size, channels)
        gigabytes = len(self.images) * int(np.prod(self._shape)) / GIGABYTE
        if gigabytes > limit_gb:
            announce(
                f"{len(self.images):,} images are decoded at every use: resized they would take {gigabytes:.2g} GB, "
                f"more than --cache-gb {limit_gb:g}"
            )
            return
        key = fingerprint(self.images, of_place=True)[:16] + ("" if upright else "-as-stored")
        self._file = cache / f"images-{key}-{len(self.images)}x{size[0]}x{size[1]}x{channels}.npy"

    @classmethod
    def of(
        cls, raw: RawData, folder: str, ids: Sequence[Any], table: str, gray: bool = False, **settings: Any
    ) -> "ImageStore":
        """The images of `ids` in `folder` of the data, RGB or one channel for `gray`.

        Raises UserError naming the ids that have no file, or two; `table` is the file of the ids in this message.
        """
        paths = images_of(raw, folder, ids, table)
        return cls.beside(raw, [(path,) for path in paths] if gray else paths, **settings)

    @classmethod
    def beside(cls, raw: RawData, images: Sequence[Image], limit_gb: float = 20.0, **settings: Any) -> "ImageStore":
        """The images, resized into the cache of the data. With a limit of 0 no folder must be writable."""
        return cls(images, cache=raw.cache if limit_gb else None, limit_gb=limit_gb, **settings)

    @property
    def paths(self) -> list[Path]:
        """Every file of the images."""
        return list(files_of(self.images))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> np.ndarray:
        """uint8 [H, W, C], which may be read-only; raises BadImage when the file cannot be read."""
        if self._rows is None and self._file is not None:
            self._rows = self._made()
        if self._rows is None or not self._rows[row, -1]:
            return decode(self.images[row], self.size, self.upright)
        return self._rows[row, :-1].reshape(self._shape)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rows": None}

    def _made(self) -> np.ndarray:
        """The rows of the file, which is made if it is missing: one process resizes, the others wait for its file."""
        if (rows := self._found()) is not None:
            return rows
        try:
            with alone_in(self._file.parent, "images-*.part"):
                if self._found() is None:
                    self._resize()
        except OSError as error:
            kept = sum(file.stat().st_size for file in self._file.parent.glob("images-*.npy"))
            older = f" (images kept there at other sizes take {kept / GIGABYTE:.1f} GB: delete them)" * (kept > 0)
            remedy = "make it writable for you" if error.errno in FORBIDDEN else f"free disk space{older}"
            raise UserError(
                f"{self._file} cannot be written ({error.strerror or error}): {remedy}, or add --cache-gb 0"
            ) from error
        return np.load(self._file, mmap_mode="r")

    def _found(self) -> np.ndarray | None:
        """The rows of the file; None if it is missing, cut short by a broken copy, or only others' to read."""
        with suppress(FileNotFoundError, PermissionError, *NOT_NPY):
            return np.load(self._file, mmap_mode="r")
        return None

    def _resize(self) -> None:
        """Write the file, uint8 [n, H * W * C + 1]: the pixels, and 1 where the image could be read."""
        draft = self._file.with_suffix(f".{os.getpid()}.part")
        try:
            shape = (len(self.images), int(np.prod(self._shape)) + 1)
            rows = np.lib.format.open_memmap(draft, "w+", np.uint8, shape)
            if hasattr(os, "posix_fallocate"):  # not on macOS
                with open(draft, "r+b") as stream:  # a full disk under a mapped file would kill by SIGBUS
                    os.posix_fallocate(stream.fileno(), 0, draft.stat().st_size)

            def put(row: int) -> None:
                try:
                    pixels = decode(self.images[row], self.size, self.upright)
                except BadImage:
                    return
                rows[row, :-1], rows[row, -1] = pixels.reshape(-1), 1

            with ThreadPoolExecutor() as pool:
                done = pool.map(put, range(len(self.images)))
                for _ in progress(done, f"resizing into {self._file}", len(self.images), "images"):
                    pass
            rows.flush()
            os.replace(draft, self._file)
        finally:
            draft.unlink(missing_ok=True)
