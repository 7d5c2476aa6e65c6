"""Pseudo-labelled test rows: the competitions' losses take them in one batch with training rows."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from common import competition, raw
from common.defaults import completed
from common.device import device_of
from common.inference import Predictor
from common.loading import orders
from common.loading.loader import Loader
from common.losses.protocol import batch_value
from common.pseudo import with_rows
from common.task import AS_IS


@pytest.mark.parametrize("name", ["digit_recognizer", "inclusive_images", "protein_atlas"])
def test_the_loss_takes_training_rows_and_test_rows_in_one_batch(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    comp = competition.load(name)
    config = replace(comp.recipes["smoke"], workers=0, pseudo_weight=0.5)
    found = raw.find(name, None, comp.write_demo, str)
    task = completed(comp.build(config, found, str), found)
    model = task.network.model().eval()
    predictor = Predictor([model], task, AS_IS, config, 32, device_of(replace(config, device="cpu")))
    rows = np.arange(len(task.data.test))
    labels = torch.cat([predictions for _, predictions, *_ in predictor.batches(task.data.test, rows)])
    data = with_rows(task.data, task.data.pseudo(labels), rows[1::2], config)
    n = len(task.data.train)
    for train in (task.data.train, data.train):
        chosen = [0, 1] if train is task.data.train else [0, n, 1, n + 1]
        with Loader(train, orders.sequential(chosen), 4, seed=config.seed, mix=task.data.mix) as loader:
            batch = next(iter(loader.epoch(0)))
        with torch.inference_mode():
            value = batch_value(task.network.loss, model(batch.inputs), batch.targets, batch.weights)
        assert torch.isfinite(value) and value > 0
    with Loader(data.train, orders.sequential([n, n + 1]), 2, seed=config.seed) as loader:
        batch = next(iter(loader.epoch(0)))
    scores = batch.targets["labels"] if isinstance(batch.targets, dict) else batch.targets
    torch.testing.assert_close(scores, labels[[1, 3]].float())
    with Loader(task.data.test, orders.sequential([1, 3]), 2, seed=config.seed) as loader:
        plain = next(iter(loader.epoch(0))).inputs
    assert batch.inputs.shape == plain.shape and not torch.equal(batch.inputs, plain), "test rows are augmented too"
