"""Slots of the competitions that need a whole Task to be tested: TTA, tuning rows, folds and precision."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from common import competition
from common.batch import Batch
from common.defaults import completed
from common.loading import orders
from common.loading.loader import Loader
from common.raw import RawData
from common.task import Task

NETWORKS = ("clouds", "digit_recognizer", "inclusive_images")


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("competitions.clouds.demo.TRAIN_IMAGES", 8)  # few, because the images are large
        patch.setattr("competitions.clouds.demo.TEST_IMAGES", 1)
        for name in NETWORKS:
            folder = tmp_path_factory.mktemp(name)
            competition.load(name).write_demo(folder)
            found[name] = RawData(folder, name, is_demo=True)
    return found


def built(samples: dict[str, RawData], name: str, **changes) -> Task:
    loaded = competition.load(name)
    task = loaded.build(replace(loaded.recipes["smoke"], **changes), samples[name], print)
    return completed(task, samples[name])


@pytest.fixture(scope="module")
def tasks(samples):
    return {name: built(samples, name) for name in NETWORKS}


def first_images(task: Task, count: int = 4) -> Batch:
    with Loader(task.data.valid, orders.sequential(np.arange(count)), count, seed=0) as loader:
        return next(loader.epoch(0))


@pytest.mark.parametrize("name", NETWORKS)
def test_tta_changes_every_image_by_itself(tasks, name):
    images = first_images(tasks[name]).inputs
    seen = []
    for one in tasks[name].network.tta:
        whole = one.apply(images)
        alone = torch.cat([one.apply(images[row : row + 1]) for row in range(4)])
        torch.testing.assert_close(whole, alone)
        seen.append(whole.float())
    assert torch.equal(seen[0], images.float())
    assert all(not torch.equal(one, other) for n, one in enumerate(seen) for other in seen[:n]), "two are one"


def test_flips_of_clouds_are_undone(tasks):
    def network(images):  # treats all positions alike, so a flipped image has flipped masks
        values = images.float().mean(1, keepdim=True).expand(-1, 4, -1, -1) / 255
        return {"pixels": values, "classes": values.mean((2, 3))}

    task, images = tasks["clouds"], first_images(tasks["clouds"], 2).inputs
    expected = task.postprocess.predict(network(images))
    for one in task.network.tta:
        torch.testing.assert_close(
            one.undo(task.postprocess.predict(network(one.apply(images)))), expected, rtol=0, atol=1e-4
        )


def test_the_mirror_of_inclusive_images_swaps_left_and_right(tasks):
    images = first_images(tasks["inclusive_images"]).inputs
    assert torch.equal(tasks["inclusive_images"].network.tta[1].apply(images), images.flip(-1))


@pytest.mark.parametrize("name", ["clouds", "inclusive_images"])
def test_tuning_compares_a_prediction_with_its_own_row(tasks, name):
    """Predictions equal to the truth score 1, whatever the order of the rows."""
    task = tasks[name]
    rows = np.random.default_rng(0).permutation(len(task.data.ids))[:12]
    truth = [task.data.valid[int(row)][1] for row in rows]
    if name == "clouds":
        masks = torch.stack([target["masks"] for target in truth])
        there = masks.flatten(2).any(2)[:, :, None].to(torch.uint8).expand(-1, -1, 2)
        kept = {"presence": (255 * there).numpy(), "pixels": (255 * masks).numpy()}
    else:
        kept = torch.stack([target["labels"] for target in truth]).float().numpy()
    assert task.postprocess.tune(kept, rows)["score"] > 0.97


@pytest.mark.parametrize("name", NETWORKS)
def test_folds_depend_on_the_seed_alone(samples, tasks, name):
    assert np.array_equal(built(samples, name).data.folds, tasks[name].data.folds)
    others = [built(samples, name, seed=seed).data.folds for seed in (1, 2)]
    assert any(not np.array_equal(folds, tasks[name].data.folds) for folds in others)


def test_precision_at_five_by_hand(tasks):
    task = tasks["inclusive_images"]
    scores = torch.linspace(0.9, 0.1, 23).repeat(2, 1)
    labels = torch.zeros(2, 23)
    labels[0, [0, 2, 4, 9]] = 1
    (precision,) = (metric for metric in task.metrics if metric.name == "precision_at_5")
    assert precision.stats(task.postprocess.apply(scores, {}), {"labels": labels}).tolist() == [0.6, 0.0]
