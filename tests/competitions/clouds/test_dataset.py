"""Samples: uint8 images, class presence from the masks' pixels, and equal bits for any number of workers."""

import random

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from common.loading import orders
from common.loading.loader import Loader
from common.raw import RawData
from common.vision.datasets import ImageDataset
from common.vision.store import ImageStore
from competitions.clouds import reader
from competitions.clouds.augment import Blackout, pipeline
from competitions.clouds.dataset import Masks, cloud_images
from competitions.clouds.loss import pack, unpack

from .conftest import NAMES


@pytest.fixture
def files(folder):
    return reader.read(RawData(folder, "clouds"))


def at_64x96(paths):
    return ImageStore(paths, (64, 96), upright=False)


@pytest.mark.parametrize("strength", ["none", "light", "strong"])
@pytest.mark.parametrize("blackout", [0.0, 1.0])
def test_training_samples(files, strength, blackout):
    data = cloud_images(at_64x96(files.train_paths), files.runs, pipeline(strength, blackout))
    for row in range(len(data)):
        image, target = data[row]
        assert image.dtype == torch.uint8 and image.shape == (3, 64, 96)
        assert target.dtype == torch.uint8 and target.shape == (64, 96)
        masks = unpack(target[None])[0]
        assert masks.dtype == torch.uint8 and set(masks.unique().tolist()) <= {0, 1}
        if strength == "none" and not blackout:
            assert (masks.numpy() == files.runs.masks(row, (64, 96))).all()


HEIGHT, WIDTH = 240, 360
PLACES = np.stack(np.meshgrid(np.arange(HEIGHT), np.arange(WIDTH), indexing="ij"), axis=-1).astype(np.float32)
MIDDLE = np.s_[HEIGHT * 3 // 8 : HEIGHT * 5 // 8, WIDTH * 3 // 8 : WIDTH * 5 // 8]  # out of reach of mirrored borders


def seeded(strength: str, blackout: float = 0.0):
    """The augmentation with one random stream for all its steps: set_random_seed would give each step equal numbers."""
    transform = pipeline(strength, blackout)
    transform.set_random_state(np.random.default_rng(0), random.Random(0))
    return transform


def movements(strength: str) -> tuple[np.ndarray, np.ndarray]:
    """Where the middle's pixels came from in 60 samples: fitted affine maps [60, 3, 2] and their largest errors."""
    transform = seeded(strength)
    start = np.column_stack(
        [PLACES[MIDDLE].reshape(-1, 2) - [HEIGHT / 2, WIDTH / 2], np.ones(PLACES[MIDDLE].size // 2)]
    )
    maps, errors = [], []
    for _ in range(60):
        found = transform(image=np.zeros((HEIGHT, WIDTH, 3), np.uint8), mask=PLACES)["mask"][MIDDLE].reshape(-1, 2)
        maps.append(np.linalg.lstsq(start, found, rcond=None)[0])
        errors.append(np.abs(start @ maps[-1] - found).max())
    return np.array(maps), np.array(errors)


def test_each_strength_of_the_augmentation_moves_farther_than_the_one_before():
    nothing, _ = movements("none")
    assert np.allclose(nothing[:, :2], np.eye(2), atol=1e-4) and np.allclose(nothing[:, 2], [HEIGHT / 2, WIDTH / 2])
    sizes, turns, shifts = {}, {}, {}
    for strength in ("light", "strong"):
        maps, errors = movements(strength)
        flips = {tuple(signs) for signs in np.sign(np.diagonal(maps[:, :2], axis1=1, axis2=2)).tolist()}
        assert flips == {(1, 1), (1, -1), (-1, 1), (-1, -1)}
        sizes[strength] = np.sqrt(np.abs(np.linalg.det(maps[:, :2])))
        turns[strength] = np.abs(maps[:, 1, 0]).max()
        shifts[strength] = np.abs(maps[:, 2] - [HEIGHT / 2, WIDTH / 2]).max(0) / [HEIGHT, WIDTH]
        assert (errors.max() > 2) == (strength == "strong"), "light keeps lines straight, strong warps"
    assert 0.78 < sizes["light"].min() < 0.9 < 1.1 < sizes["light"].max() < 1.27
    assert sizes["strong"].min() < 0.77 and sizes["strong"].max() > 1.28
    assert 0.1 < turns["light"] < turns["strong"] and (shifts["light"] > 0.05).all()
    assert (shifts["light"] < shifts["strong"]).all()


def test_only_the_strong_augmentation_changes_light_colour_and_texture():
    image, mask = np.full((32, 32, 3), (150, 110, 70), np.uint8), np.zeros((32, 32, 4), np.uint8)

    def changed(strength: str) -> np.ndarray:
        transform = seeded(strength)
        return np.array([transform(image=image, mask=mask)["image"] for _ in range(150)], float)

    assert (changed("none") == image).all() and (changed("light") == image).all()
    strong = changed("strong")
    means = strong.mean((1, 2))
    assert (strong.std((1, 2)).max(1) > 0.5).any(), "noise"
    assert (np.ptp(means, axis=1) < 1).any() and (means[:, 0] < means[:, 1]).any(), (
        "grey, and channels in another order"
    )
    flat = (strong.std((1, 2)).max(1) < 0.5) & (means[:, 0] > means[:, 1] + 20) & (means[:, 1] > means[:, 2] + 20)
    assert (means[flat].sum(1) > 390).any() and (means[flat].sum(1) < 270).any(), "brighter and darker"


@pytest.mark.parametrize("part", [0.0, 0.3, 1.0])
def test_blackout_takes_a_class_from_its_part_of_the_samples(part):
    transform = seeded("none", part)
    image, mask = np.full((8, 8, 3), 200, np.uint8), np.ones((8, 8, 4), np.uint8)
    gone = [not transform(image=image, mask=mask)["mask"].any() for _ in range(200)]
    assert np.mean(gone) == pytest.approx(part, abs=0.1 if 0 < part < 1 else 0)


def test_packing_masks_loses_nothing():
    masks = np.random.default_rng(0).integers(0, 2, (7, 9, 4), np.uint8)
    packed = pack(masks)
    assert packed.shape == (7, 9) and packed.max() < 16
    assert (unpack(torch.from_numpy(packed)[None])[0].permute(1, 2, 0).numpy() == masks).all()


@pytest.mark.parametrize("size", [(64, 97), (1400, 2100)])
def test_masks_lie_row_by_row_as_albumentations_needs_them(files, size):
    """Otherwise it copies them, which at full size takes as long as a third of the augmentation."""
    masks = Masks(files.runs, size)[1]
    assert masks.flags.c_contiguous and masks.dtype == np.uint8
    assert (masks.transpose(2, 0, 1) == files.runs.masks(1, size)).all()


def test_blackout_takes_one_class_and_what_it_covers():
    masks = np.zeros((20, 30, 4), np.uint8)
    masks[2:18, 2:28, 0] = 1
    masks[5:9, 5:9, 1] = 1  # inside class 0
    masks[0:6, 24:30, 2] = 1  # partly inside
    image = np.full((20, 30, 3), 200, np.uint8)
    outcomes = set()
    for seed in range(40):
        blackout = Blackout(p=1.0)
        blackout.set_random_seed(seed)
        changed = blackout(image=image, mask=masks)
        present = tuple(changed["mask"].any((0, 1)).tolist())
        outcomes.add(present)
        black = (changed["image"] == 0).all(2)
        assert not changed["mask"][black].any() and (changed["image"][~black] == 200).all()
        gone = [label for label in range(3) if not present[label]]
        assert (black == (masks[:, :, gone[0]] > 0)).all()
    assert outcomes == {(False, False, True, False), (True, False, True, False), (True, True, False, False)}


def test_blackout_of_an_empty_image_changes_nothing():
    image = np.full((20, 30, 3), 200, np.uint8)
    changed = Blackout(p=1.0)(image=image, mask=np.zeros((20, 30, 4), np.uint8))
    assert (changed["image"] == image).all()


def test_a_flip_moves_image_and_masks_together(files):
    import albumentations as A

    plain = cloud_images(at_64x96(files.train_paths), files.runs, A.Compose([]))
    flipped = cloud_images(at_64x96(files.train_paths), files.runs, A.Compose([A.HorizontalFlip(p=1)]))
    assert torch.equal(plain[1][0].flip(-1), flipped[1][0])
    assert torch.equal(plain[1][1].flip(-1), flipped[1][1])


def test_validation_and_test_samples(files):
    image, target = cloud_images(at_64x96(files.train_paths), files.runs)[2]
    assert (target["masks"].numpy() == files.runs.masks(2, (350, 525))).all()
    assert target["masks"].dtype == torch.uint8
    test = ImageDataset(at_64x96(files.test_paths))
    assert len(test) == 2 and test[0][0].shape == (3, 64, 96)


def batches(files, **settings):
    data = cloud_images(at_64x96(files.train_paths), files.runs, pipeline("strong", 0.5))
    with Loader(data, orders.shuffled(np.arange(len(data))), 4, seed=5, **settings) as loader:
        return [(batch.inputs, batch.targets) for epoch in range(2) for batch in loader.epoch(epoch)]


def test_the_same_bits_for_any_number_of_workers(files):
    alone, two = batches(files, workers=0), batches(files, workers=2)
    assert len(alone) == len(two) == 4
    for (inputs, targets), (other_inputs, other_targets) in zip(alone, two, strict=True):
        assert torch.equal(inputs, other_inputs)
        assert torch.equal(targets, other_targets)
    assert not torch.equal(alone[0][0], alone[2][0])  # the second epoch differs


@pytest.mark.parametrize("kind", ["grey", "cmyk", "larger", "portrait", "png"])
def test_odd_images_become_three_channels_of_the_working_size(files, kind):
    path = files.train_paths[0]
    pixels = np.random.default_rng(0).integers(0, 255, (140, 210, 3), np.uint8)
    if kind == "grey":
        cv2.imwrite(str(path), pixels[:, :, 0])
    elif kind == "cmyk":
        Image.fromarray(pixels).convert("CMYK").save(path, "JPEG")
    elif kind == "png":
        path.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    else:
        cv2.imwrite(str(path), cv2.resize(pixels, (1000, 500) if kind == "larger" else (90, 300)))
    image, _ = cloud_images(at_64x96(files.train_paths), files.runs, pipeline("none", 0))[0]
    assert image.shape == (3, 64, 96) and image.dtype == torch.uint8 and image.float().std() > 5


def test_an_unreadable_image_is_named(files):
    path = files.train_paths[0]
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(UserError, match=path.name):
        cloud_images(at_64x96(files.train_paths), files.runs)[0]
    assert path.name == sorted(NAMES)[0]
