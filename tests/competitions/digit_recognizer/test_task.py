"""The Task's slots: the rows that are written, what is valid, and the accuracy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score
from torch import nn

from common.config import checked
from common.loading.keys import Keys
from common.predict import score
from common.raw import RawData
from competitions.digit_recognizer import task as digit_recognizer
from competitions.digit_recognizer.demo import write_demo


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder)
    return digit_recognizer.build(digit_recognizer.RECIPES["default"], RawData(folder, "digit_recognizer"))


def test_recipes_are_sensible():
    assert {"default", "fast", "best", "smoke"} <= digit_recognizer.RECIPES.keys()
    for config in digit_recognizer.RECIPES.values():
        checked(config)


def test_folds_hold_every_digit_in_equal_number(task):
    labels = task.plain.labels.numpy()
    counts = np.array([np.bincount(labels[task.folds == fold], minlength=10) for fold in range(8)])
    assert np.ptp(counts, axis=0).max() <= 1 and counts.sum() == len(task.ids)


def test_accuracy_is_that_of_scikit_learn(task):
    probabilities = torch.rand(500, 10, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(500) % 10
    parts = [(probabilities[start : start + 96], targets[start : start + 96]) for start in range(0, 500, 96)]
    found = score(task, parts, {})["accuracy"]
    assert found == pytest.approx(accuracy_score(targets, probabilities.argmax(1)), abs=1e-12)
    assert 0 < found < 1


def test_training_images_are_changed_and_the_others_are_not(task):
    rows = np.arange(20)
    keys = Keys(0, 0, rows)
    changed, targets = task.labelled.batch(rows, keys)
    plain, same_targets = task.plain.batch(rows, keys)
    assert changed.dtype == plain.dtype == torch.uint8 and torch.equal(targets, same_targets)
    assert all(not torch.equal(one, other) for one, other in zip(changed, plain, strict=True))
    assert torch.equal(plain, task.plain.images[:20])


def test_every_flag_is_the_strength_or_the_size_that_it_names(tmp_path):
    write_demo(tmp_path)
    strengths = {"rotation": 1.0, "scale": 0.2, "shear": 0.3, "shift": 4.0, "elastic": 0.5}
    config = replace(digit_recognizer.RECIPES["default"], **strengths, width=3, kernel=7, dropout=0.25)
    built = digit_recognizer.build(config, RawData(tmp_path, "digit_recognizer"))
    assert vars(built.labelled.strength) == strengths and built.plain.strength is None
    network = built.model()
    kernels = [layer.kernel_size for layer in network.features if isinstance(layer, nn.Conv2d)]
    assert kernels == [(side, side) for side in (3, 7, 3, 7, 3, 3)] and network.features[0].out_channels == 3
    assert [layer.p for layer in network.modules() if isinstance(layer, nn.Dropout)] == [0.25]


def test_rows_and_their_check(task):
    decisions = task.decide(torch.eye(10)[[3, 0, 9]], {})
    assert [list(row) for row in task.rows(["1", "2", "3"], decisions)] == [["1", 3], ["2", 0], ["3", 9]]
    assert task.valid(["7"]) is None
    for label in ("10", "-1", "3.0", "", "x"):
        assert label in task.valid([label]) and "0 to 9" in task.valid([label])
    lines = list(task.sample_submission())
    assert lines[0].strip() == ",".join(task.columns) and len(lines) == len(task.test_ids) + 1


def test_views_keep_the_shape_and_undo_nothing(task):
    images = task.test.images[:4]
    for one in task.views:
        assert one.apply(images).shape == images.shape
        probabilities = torch.rand(4, 10)
        assert torch.equal(one.undo(probabilities), probabilities)
