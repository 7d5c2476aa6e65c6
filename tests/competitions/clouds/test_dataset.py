"""Samples: uint8 all the way, presence counted from the pixels, the same whatever loads them."""

import cv2
import numpy as np
import pytest
import torch

from common.errors import UserError
from common.loading import orders
from common.loading.loader import Loader
from common.raw import RawData
from competitions.clouds import reader
from competitions.clouds.augment import Blackout, pipeline
from competitions.clouds.dataset import CloudImages
from competitions.clouds.loss import pack, unpack

from .conftest import NAMES


@pytest.fixture
def files(folder):
    return reader.read(RawData(folder, "clouds"))


@pytest.mark.parametrize("strength", ["none", "light", "strong"])
@pytest.mark.parametrize("blackout", [0.0, 1.0])
def test_training_samples(files, strength, blackout):
    data = CloudImages(files.train_paths, (64, 96), files.runs, pipeline(strength, blackout))
    for row in range(len(data)):
        image, target = data[row]
        assert image.dtype == torch.uint8 and image.shape == (3, 64, 96)
        assert target["pixels"].dtype == torch.uint8 and target["pixels"].shape == (64, 96)
        masks = unpack(target["pixels"][None])[0]
        assert masks.dtype == torch.uint8 and set(masks.unique().tolist()) <= {0, 1}
        assert (target["classes"].bool() == masks.flatten(1).any(1)).all()
        if strength == "none" and not blackout:
            assert (masks.numpy() == files.runs.masks(row, (64, 96))).all()


def test_packing_masks_loses_nothing():
    masks = np.random.default_rng(0).integers(0, 2, (7, 9, 4), np.uint8)
    packed = pack(masks)
    assert packed.shape == (7, 9) and packed.max() < 16
    assert (unpack(torch.from_numpy(packed)[None])[0].permute(1, 2, 0).numpy() == masks).all()


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

    plain = CloudImages(files.train_paths, (64, 96), files.runs, A.Compose([]))
    flipped = CloudImages(files.train_paths, (64, 96), files.runs, A.Compose([A.HorizontalFlip(p=1)]))
    assert torch.equal(plain[1][0].flip(-1), flipped[1][0])
    assert torch.equal(plain[1][1]["pixels"].flip(-1), flipped[1][1]["pixels"])


def test_validation_and_test_samples(files):
    image, target = CloudImages(files.train_paths, (64, 96), files.runs)[2]
    assert (target["masks"].numpy() == files.runs.masks(2, (350, 525))).all()
    assert target["masks"].dtype == torch.uint8
    test = CloudImages(files.test_paths, (64, 96))
    assert len(test) == 2 and test[0][0].shape == (3, 64, 96)


def windows(files, **settings):
    data = CloudImages(files.train_paths, (64, 96), files.runs, pipeline("strong", 0.5))
    with Loader(data, orders.shuffled(np.arange(len(data))), 4, seed=5, **settings) as loader:
        return [(window.inputs, window.targets) for epoch in range(2) for window in loader.epoch(epoch)]


def test_the_same_bits_for_any_number_of_workers(files):
    alone, two = windows(files, workers=0), windows(files, workers=2)
    assert len(alone) == len(two) == 4
    for (inputs, targets), (other_inputs, other_targets) in zip(alone, two, strict=True):
        assert torch.equal(inputs, other_inputs)
        assert all(torch.equal(targets[name], other_targets[name]) for name in targets)
    assert not torch.equal(alone[0][0], alone[2][0])  # the second epoch differs


@pytest.mark.parametrize("kind", ["grey", "cmyk", "larger", "portrait", "png"])
def test_odd_images_become_three_channels_of_the_working_size(files, kind):
    path = files.train_paths[0]
    pixels = np.random.default_rng(0).integers(0, 255, (140, 210, 3), np.uint8)
    if kind == "grey":
        cv2.imwrite(str(path), pixels[:, :, 0])
    elif kind == "cmyk":
        image = pytest.importorskip("PIL.Image")
        image.fromarray(pixels).convert("CMYK").save(path, "JPEG")
    elif kind == "png":
        path.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    else:
        cv2.imwrite(str(path), cv2.resize(pixels, (1000, 500) if kind == "larger" else (90, 300)))
    image, _ = CloudImages(files.train_paths, (64, 96), files.runs, pipeline("none", 0))[0]
    assert image.shape == (3, 64, 96) and image.dtype == torch.uint8 and image.float().std() > 5


def test_an_unreadable_image_is_named(files):
    path = files.train_paths[0]
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(UserError, match=path.name):
        CloudImages(files.train_paths, (64, 96), files.runs)[0]
    assert path.name == sorted(NAMES)[0]
