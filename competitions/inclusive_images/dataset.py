"""Images with their labels as samples: resized once, kept as uint8, augmented, and given the targets of every head."""

import fcntl
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import albumentations as A
import cv2
import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from common.errors import UserError
from common.loading import images
from common.loading.images import BadImage
from common.progress import progress

MIRROR = cv2.BORDER_REFLECT_101
GIGABYTE = 1 << 30


class ImageStore:
    """n images of one size: rows of a file made once when they fit into `limit_gb`, else decoded at every use."""

    def __init__(self, paths: Sequence[Path], size: tuple[int, int], cache: Path, key: str, limit_gb: float):
        self.paths, self.size = list(paths), size
        self.gigabytes = len(self.paths) * size[0] * size[1] * 3 / GIGABYTE
        self._store: np.ndarray | None = None
        if self.gigabytes <= limit_gb:
            self._store = _stored(self.paths, size, cache / f"images-{key[:16]}-{size[0]}x{size[1]}.npy")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> np.ndarray:
        """uint8 [H, W, 3]; raises BadImage when the file cannot be read."""
        if self._store is None or not self._store[row, 0, 0].any() and not self._store[row].any():
            return images.decode(self.paths[row], self.size)  # an all-black row is an image that could not be read
        return self._store[row]

    def unreadable(self) -> list[BadImage]:
        """The images that cannot be read, as far as the file knows: none where every use decodes them."""
        bad = []
        for row in () if self._store is None else np.flatnonzero(~self._store[:, 0, 0].any(axis=1)).tolist():
            try:
                self[row]
            except BadImage as error:
                bad.append(error)
        return bad


def _stored(paths: list[Path], size: tuple[int, int], file: Path) -> np.ndarray:
    """The images as one uint8 file [n, H, W, 3] in the page cache; rows of unreadable images stay black."""
    if not file.is_file():
        try:
            with open(file.with_name("images.lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # one process resizes, and the others find its file
                if not file.is_file():
                    _resize(paths, size, file)
        except OSError as error:
            raise UserError(
                f"{file} cannot be written ({error.strerror or error}): free disk space, or train with --cache-gb 0"
            ) from error
    return np.load(file, mmap_mode="r")


def _resize(paths: list[Path], size: tuple[int, int], file: Path) -> None:
    """Write the file of `_stored`; its lock is held, so any draft that is there was left by a killed process."""
    for left in file.parent.glob("images-*.part"):
        left.unlink()
    draft = file.with_suffix(".part")
    try:
        store = np.lib.format.open_memmap(draft, "w+", np.uint8, (len(paths), *size, 3))
        if hasattr(os, "posix_fallocate"):  # not on macOS
            with open(draft, "r+b") as stream:  # a disk that fills up under a mapped file kills the process by SIGBUS
                os.posix_fallocate(stream.fileno(), 0, draft.stat().st_size)

        def put(row: int) -> None:
            try:
                store[row] = images.decode(paths[row], size)
            except BadImage:
                store[row] = 0

        with ThreadPoolExecutor() as pool:
            for _ in progress(pool.map(put, range(len(paths))), f"resizing into {file}", len(paths), "images"):
                pass
        store.flush()
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)


class TaggedImages:
    """Samples (uint8 [3, H, W], targets) of `images`, whose labels are the rows of `labels` uint8 csr [n, m].

    Targets: {"labels": uint8 [m]}, with `vectors` [m, D] also {"embedding": float32 [D]}, their sum, and with `counts`
    {"count": float32 [1]}. Without labels (test images) an empty tensor.
    """

    def __init__(
        self,
        images: ImageStore,
        labels: csr_matrix | None = None,
        vectors: np.ndarray | None = None,
        counts: bool = False,
        transform: Callable[..., dict[str, Any]] | None = None,
    ):
        self.images, self.vectors, self.counts, self.transform = images, vectors, counts, transform
        self.starts = None if labels is None else labels.indptr
        self.columns = None if labels is None else labels.indices
        self.label_count = 0 if labels is None else labels.shape[1]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, Any]:
        image = self.images[row]
        if self.transform is not None:
            image = self.transform(image=np.ascontiguousarray(image))["image"]
        pixels = torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))  # a copy: the file is read-only
        if self.columns is None:
            return pixels, torch.empty(0)
        columns = self.columns[self.starts[row] : self.starts[row + 1]]
        labels = torch.zeros(self.label_count, dtype=torch.uint8)
        labels[torch.from_numpy(columns.astype(np.int64))] = 1
        targets = {"labels": labels}
        if self.vectors is not None:
            targets["embedding"] = torch.from_numpy(self.vectors[columns].sum(0))
        if self.counts:
            targets["count"] = torch.tensor([float(len(columns))])
        return pixels, targets


def augmentation(strength: str, size: tuple[int, int]) -> A.Compose | None:
    """none; light (mirror, crop); or heavy, which also turns, tints, blurs, compresses and spoils.

    The test images of the competition are of lower quality than those to train on: heavy narrows that gap.
    """
    if strength == "none":
        return None
    crop = A.RandomResizedCrop(size=size, scale=(0.5 if strength == "heavy" else 0.7, 1.0), ratio=(1.0, 1.8), p=1.0)
    light = [crop, A.HorizontalFlip(p=0.5)]
    if strength == "light":
        return A.Compose(light)
    return A.Compose(
        [
            *light,
            A.Affine(rotate=(-10, 10), shear=(-6, 6), border_mode=MIRROR, p=0.3),
            A.RandomBrightnessContrast(0.25, 0.25, p=0.5),
            A.HueSaturationValue(8, 25, 12, p=0.4),
            A.ToGray(p=0.05),
            A.OneOf(
                [
                    A.GaussianBlur(blur_limit=(3, 5)),
                    A.Downscale(scale_range=(0.4, 0.8)),
                    A.ImageCompression(quality_range=(25, 70)),
                    A.GaussNoise((0.02, 0.08)),
                ],
                p=0.3,
            ),
        ]
    )


def sampling_weights(labels: csr_matrix) -> np.ndarray:
    """Weight of every image, float64 [n]: that of its rarest label, clip(ln(total / (2 count)), 1, 10).

    Rare labels come more often, but never more than ten times so (Human Protein Atlas).
    """
    counts = np.asarray(labels.sum(axis=0, dtype=np.int64)).ravel()
    of_label = np.clip(np.log(0.5 * counts.sum() / np.maximum(counts, 1)), 1, 10)
    return np.maximum.reduceat(of_label[labels.indices], labels.indptr[:-1])
