"""The Task's slots: submission rows, valid values and the accuracy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score
from torch import nn

from common.config import checked
from common.defaults import completed
from common.loading.keys import Keys
from common.metrics import evaluate
from common.raw import RawData
from competitions.digit_recognizer.config import RECIPES
from competitions.digit_recognizer.demo import write_demo
from competitions.digit_recognizer.task import build


def built_on(folder, config):
    raw = RawData(folder, "digit_recognizer")
    return completed(build(config, raw, print), raw)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder)
    return built_on(folder, RECIPES["default"])


def test_recipes_are_sensible():
    assert {"default", "fast", "best", "smoke"} <= RECIPES.keys()
    for config in RECIPES.values():
        checked(config)


def test_folds_hold_every_digit_in_equal_number(task):
    labels = task.data.valid.labels.numpy()
    counts = np.array([np.bincount(labels[task.data.folds == fold], minlength=10) for fold in range(8)])
    assert np.ptp(counts, axis=0).max() <= 1 and counts.sum() == len(task.data.ids)


def test_accuracy_is_that_of_scikit_learn(task):
    probabilities = torch.rand(500, 10, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(500) % 10
    decided = task.postprocess.apply(probabilities, {})
    parts = [(decided[start : start + 96], targets[start : start + 96]) for start in range(0, 500, 96)]
    found = evaluate(task.metrics, parts)["accuracy"]
    assert found == pytest.approx(accuracy_score(targets, probabilities.argmax(1)), abs=1e-12)
    assert 0 < found < 1


def test_training_images_are_changed_and_the_others_are_not(task):
    rows = np.arange(20)
    keys = Keys(0, 0, rows)
    changed, targets = task.data.train.batch(rows, keys)
    plain, same_targets = task.data.valid.batch(rows, keys)
    assert changed.dtype == plain.dtype == torch.uint8 and torch.equal(targets, same_targets)
    assert all(not torch.equal(one, other) for one, other in zip(changed, plain, strict=True))
    assert torch.equal(plain, task.data.valid.images[:20])


def test_every_flag_is_the_strength_or_the_size_that_it_names(tmp_path):
    write_demo(tmp_path)
    strengths = {"rotation": 1.0, "scale": 0.2, "shear": 0.3, "shift": 4.0, "elastic": 0.5}
    config = replace(RECIPES["default"], **strengths, width=3, kernel=7, dropout=0.25)
    built = built_on(tmp_path, config)
    assert vars(built.data.train.strength) == strengths and built.data.valid.strength is None
    network = built.network.model()
    kernels = [layer.kernel_size for layer in network.features if isinstance(layer, nn.Conv2d)]
    assert kernels == [(side, side) for side in (3, 7, 3, 7, 3, 3)] and network.features[0].out_channels == 3
    assert [layer.p for layer in network.modules() if isinstance(layer, nn.Dropout)] == [0.25]


def test_rows_and_their_check(task):
    decisions = task.postprocess.apply(torch.eye(10)[[3, 0, 9]], {})
    assert [list(row) for row in task.submission.rows(["1", "2", "3"], decisions)] == [["1", 3], ["2", 0], ["3", 9]]
    assert task.submission.valid(["7"]) is None
    for label in ("10", "-1", "3.0", "", "x"):
        assert label in task.submission.valid([label]) and "0 to 9" in task.submission.valid([label])
    assert task.sample.columns == ("ImageId", "Label") and len(task.sample.ids) == len(task.data.test_ids)


def test_tta_keeps_the_shape_and_undo_nothing(task):
    images = task.data.test.images[:4]
    for one in task.network.tta:
        assert one.apply(images).shape == images.shape
        probabilities = torch.rand(4, 10)
        assert torch.equal(one.undo(probabilities), probabilities)
