"""Samples of images with labels or masks, augmented alike for any number of workers."""

import albumentations as A
import cv2
import numpy as np
import pytest
import torch

from common.errors import UserError
from common.loading import orders
from common.loading.loader import Loader
from common.vision.datasets import ImageDataset, binary, refuse_lost_masks
from common.vision.store import ImageStore


@pytest.fixture
def paths(tmp_path):
    found = [tmp_path / f"{row}.png" for row in range(8)]
    for row, path in enumerate(found):
        cv2.imwrite(str(path), np.random.default_rng(row).integers(0, 256, (20, 30, 3), np.uint8))
    return found


def test_labels_of_any_kind_or_none(paths):
    images = ImageStore(paths, (10, 15))
    pixels, target = ImageDataset(images, np.arange(8.0))[3]
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 10, 15) and target == 3
    assert np.array_equal(pixels.permute(1, 2, 0), images[3])
    assert ImageDataset(images)[0][1].numel() == 0 and ImageDataset(images, [{"a": row} for row in range(8)])[5][1] == {
        "a": 5
    }
    assert len(ImageDataset(images)) == 8 and ImageDataset(images).paths == paths
    assert ImageDataset(images, masks=ImageStore([(path,) for path in paths[:2]])).paths == [*paths, *paths[:2]]


def test_images_and_masks_move_together(paths, tmp_path):
    images = ImageStore([(path,) * 4 for path in paths], cache=tmp_path)
    masks = [np.stack([images[row][..., 0], images[row][..., 1] // 2], -1) for row in range(8)]
    plain = ImageDataset(images, masks=masks)
    flipped = ImageDataset(images, masks=masks, transform=A.Compose([A.HorizontalFlip(p=1)]))
    for row in range(8):
        assert plain[row][0].shape == (4, 20, 30) and plain[row][1].shape == (2, 20, 30)
        assert torch.equal(plain[row][1][0], plain[row][0][0])
        assert all(torch.equal(a.flip(-1), b) for a, b in zip(plain[row], flipped[row], strict=True))
    packed = ImageDataset(images, masks=masks, of_mask=lambda mask: torch.from_numpy(mask.max(2)))
    assert torch.equal(packed[0][1], plain[0][1].amax(0))


@pytest.mark.parametrize("high", [1, 255])
@pytest.mark.parametrize("size", [None, (10, 15), (40, 60)])
def test_masks_of_files_are_on_where_they_are_not_black(tmp_path, high, size):
    """For masks of 0 and 255 and of 0 and 1; a threshold of 128 would silently make the latter empty."""
    mask = np.zeros((20, 30), np.uint8)
    mask[4:12, 8:20] = 1
    for name, drawn in (("thing", mask), ("empty", mask * 0)):
        cv2.imwrite(str(tmp_path / f"{name}.png"), drawn * np.uint8(high))
    files = ImageStore([(tmp_path / "thing.png",), (tmp_path / "empty.png",)], size, upright=False)
    dataset = ImageDataset(files, masks=files, of_mask=binary)
    height, width = size or mask.shape
    expected = torch.zeros(1, height, width, dtype=torch.uint8)
    expected[0, height // 5 : height * 3 // 5, width * 4 // 15 : width * 2 // 3] = 1
    assert torch.equal(dataset[0][1], expected) and not dataset[1][1].any()


@pytest.mark.parametrize("high, bits", [(3, 8), (76, 8), (1, 16), (255, 16), (20_000, 16)])
def test_masks_that_would_all_be_empty_are_refused(tmp_path, high, bits):
    """Class numbers and 0 and 1 in 16 bits are no 0 and 255; the network learnt that there is nothing."""
    names = [(tmp_path / f"{row}.png",) for row in range(3)]
    for (path,), value in zip(names, (0, high, 1), strict=True):
        cv2.imwrite(str(path), np.full((200, 300), value, np.uint8 if bits == 8 else np.uint16))
    dataset = ImageDataset(ImageStore(names), masks=ImageStore(names, (10, 15)), of_mask=binary)
    with pytest.raises(UserError, match=f"1.png: the brightest pixel of this mask is {high} in {bits} bits"):
        refuse_lost_masks(dataset)


@pytest.mark.parametrize("high, kind", [(0, np.uint8), (1, np.uint8), (255, np.uint8), (65535, np.uint16)])
def test_masks_of_one_small_thing_are_not_refused(tmp_path, high, kind):
    """Resized, it is darker than half."""
    mask = np.zeros((200, 300), kind)
    mask[5, 5] = high
    names = [(tmp_path / "broken.png",), (tmp_path / "a.png",)]
    names[0][0].write_bytes(b"no image")
    cv2.imwrite(str(names[1][0]), mask)
    refuse_lost_masks(ImageDataset(ImageStore(names), masks=ImageStore(names, (10, 15)), of_mask=binary))


def test_a_row_of_a_store_is_never_written_to(paths, tmp_path):
    """All workers share the pages of the store."""
    images = ImageStore(paths, (10, 15), tmp_path)
    dataset = ImageDataset(images, transform=A.Compose([A.PixelDropout(dropout_prob=0.5, p=1)]))
    before = images[0].copy()
    pixels, _ = dataset[0]
    pixels.zero_()
    assert np.array_equal(images[0], before)


@pytest.mark.parametrize("channels", [3, 4])
def test_augmentation_is_keyed_by_the_loader(paths, channels):
    images = ImageStore(paths if channels == 3 else [(path,) * 4 for path in paths], (10, 15))
    dataset = ImageDataset(images, np.arange(8), transform=A.Compose([A.Affine(rotate=(-40, 40), p=1), A.GaussNoise()]))

    def epoch(workers: int, number: int) -> torch.Tensor:
        with Loader(dataset, orders.sequential(np.arange(8)), 4, seed=0, workers=workers) as loader:
            return torch.cat([batch.inputs for batch in loader.epoch(number)])

    first = epoch(0, 0)
    assert torch.equal(first, epoch(2, 0))
    assert all(not torch.equal(a, b) for a, b in zip(first, epoch(0, 1), strict=True))
