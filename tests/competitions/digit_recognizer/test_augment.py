"""Augmentation and TTA views, compared with slow loops and checked for what must stay the same."""

import math

import numpy as np
import pytest
import torch

from common.loading import orders
from common.loading.keys import Keys
from common.loading.loader import Loader
from competitions.digit_recognizer.augment import Strength, augment, transformed
from competitions.digit_recognizer.dataset import Digits
from competitions.digit_recognizer.demo import digits

FULL = Strength(rotation=12, scale=0.12, shear=0.12, shift=2, elastic=0.8)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.from_numpy(digits()[0][:300]).reshape(-1, 1, 28, 28)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 299])
@pytest.mark.parametrize("threads", [1, 2])
def test_bits_do_not_depend_on_the_batching(images, batch_size, threads):
    rows = np.arange(300)
    whole = augment(images, Keys(3, 5, rows), FULL)
    torch.set_num_threads(threads)
    parts = np.split(rows, range(batch_size, 300, batch_size))
    assert torch.equal(torch.cat([augment(images[part], Keys(3, 5, part), FULL) for part in parts]), whole)


@pytest.mark.parametrize("strength", [None, FULL])
@pytest.mark.parametrize("at_once", [1, 3, 50])
def test_batches_made_on_a_card_are_those_of_one_sample_at_a_time(images, strength, at_once):
    """The path for a GPU, run on the CPU: tensors moved to the device and several batches made in one call."""
    labels = torch.arange(300) % 10
    alone = Digits(images, labels, strength)
    order = orders.weighted(np.ones(300), 150)  # some rows are drawn twice, with different random numbers
    loader = Loader(Digits(images, labels, strength).to("cpu"), order, 16, seed=3)
    loader._samples_at_once = 16 * at_once
    batches, plan = list(loader.epoch(5)), order(3, 5)
    assert [(batch.number, len(batch)) for batch in batches] == [(n, 16) for n in range(9)] + [(9, 6)]
    assert torch.cat([batch.index for batch in batches]).tolist() == plan.index.tolist()
    rows = zip(plan.index, plan.draw, strict=True)
    single = [alone.batch(np.array([row]), Keys(3, 5, np.array([row]), np.array([draw]))) for row, draw in rows]
    assert torch.equal(torch.cat([batch.inputs for batch in batches]), torch.cat([image for image, _ in single]))
    assert torch.equal(torch.cat([batch.targets for batch in batches]), torch.cat([label for _, label in single]))
    assert [len(batch) for batch in loader.epoch(5, 9)] == [6] and not list(loader.epoch(5, 10))


def test_the_loader_moves_the_data_to_its_device(images):
    """The meta device, which has shapes but no values, stands in for a GPU."""
    data = Digits(images, strength=FULL)
    loader = Loader(data, orders.sequential(300), 64, seed=0, device="meta")
    assert data.images.device.type == data.labels.device.type == "meta" and loader._samples_at_once == 4096
    changed, targets = data.batch(np.arange(5), Keys(0, 0, np.arange(5)))
    assert changed.device.type == targets.device.type == "meta" and changed.shape == (5, 1, 28, 28)


def test_epoch_seed_and_row_each_change_the_image(images):
    same = images[:1].expand(2, -1, -1, -1)
    first, second = augment(same, Keys(0, 0, np.array([0, 1])), FULL)
    assert not torch.equal(first, second)
    for other in [Keys(0, 1, np.array([0])), Keys(1, 0, np.array([0])), Keys(0, 0, np.array([0]), np.array([1]))]:
        assert not torch.equal(augment(images[:1], other, FULL)[0], first)


def test_no_strength_changes_nothing(images):
    assert torch.equal(augment(images, Keys(0, 0, np.arange(300)), Strength()), images)


def bilinear(image: np.ndarray, x: float, y: float) -> float:
    """The value between the four pixels around column x and row y, black outside the image."""
    left, top = math.floor(x), math.floor(y)
    total = 0.0
    for row, down in ((top, top + 1 - y), (top + 1, y - top)):
        for column, across in ((left, left + 1 - x), (left + 1, x - left)):
            if 0 <= row < 28 and 0 <= column < 28:
                total += down * across * float(image[row, column])
    return total


def test_affine_part_equals_a_slow_loop(images):
    strength = Strength(rotation=25, scale=0.3, shear=0.4, shift=3)
    keys = Keys(1, 2, np.arange(4))
    draws = keys.uniform((6,), stream=0) * 2 - 1
    found = augment(images[:4], keys, strength)
    for number in range(4):
        turn, wide, high, slant, right, down = draws[number]
        angle = math.radians(turn * 25)
        rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        rotation[0, 1] += slant * 0.4
        matrix = np.diag([math.exp(wide * 0.3), math.exp(high * 0.3)]) @ rotation
        for row in range(28):
            for column in range(28):
                x, y = matrix @ [column - 13.5, row - 13.5] + np.array([right, down]) * 3 + 13.5
                expected = bilinear(images[number, 0].numpy(), x, y)
                assert abs(float(found[number, 0, row, column]) - expected) <= 0.51  # rounded to uint8


def test_elastic_moves_pixels_by_about_its_strength():
    # A ramp of one grey level per pixel: the value of a pixel shows how far it was moved.
    ramp = (100 + torch.arange(28)).to(torch.uint8).expand(400, 1, 28, 28)
    moved = augment(ramp, Keys(0, 0, np.arange(400)), Strength(elastic=2.0)).float() - ramp.float()
    inner = moved[:, 0, 7:21, 7:21]
    assert 0.8 < inner.std().item() < 2.2
    neighbours = (inner[:, :, 1:] - inner[:, :, :-1]).std().item()
    assert neighbours < 0.6 * inner.std().item(), "the field is smooth"


def test_elastic_bending_has_nothing_to_do_with_the_affine_draws():
    """Elastic shifts come from their own random stream: none correlates with the six affine numbers."""
    keys = Keys(0, 0, np.arange(2000))
    ramp = (100 + torch.arange(28)).to(torch.uint8).expand(2000, 1, 28, 28)
    places = torch.tensor([1, 6, 13, 20, 26])  # near the control points
    moved = augment(ramp, keys, Strength(elastic=2.0)).float() - ramp.float()
    moved = moved[:, 0, places][:, :, places].flatten(1).numpy()  # [2000, 25]
    draws = keys.uniform((6,), stream=0)
    assert np.abs(np.corrcoef(moved, draws, rowvar=False)[:25, 25:]).max() < 0.2


def test_transformed_turns_against_the_clock_and_enlarges(images):
    assert torch.allclose(transformed(images), images.float(), atol=1e-3)
    dot = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    dot[0, 0, 13:15, 22:24] = 255  # right of the centre
    quarter = transformed(dot, rotation=90)[0, 0]
    row, column = divmod(int(quarter.argmax()), 28)
    assert column in (13, 14) and row in (4, 5), "a turn to the left brings it to the top"
    larger = transformed(images, scale=1.2).sum((1, 2, 3)) / images.float().sum((1, 2, 3))
    assert 1.3 < larger.mean().item() < 1.5  # 1.2 squared is 1.44, less the pixels that leave the image
