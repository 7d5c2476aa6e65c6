"""The training loop against the same training written out by hand: every setting of the config reaches the weights."""

import csv
import gc
import json
import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from common import checkpoint
from common.engine.ranks import SINGLE
from common.engine.step import Engine
from common.fit import fit
from common.loading import orders
from common.loading.keys import MIX_STREAM, Keys, keyed_seed
from common.loading.mixing import MixUp
from common.metrics import Metric
from common.run import Run
from tests.common import toy

CONFIG = replace(
    toy.RECIPES["default"], rows=50, epochs=3, batch_size=16, lr=0.03, weight_decay=0.1, momentum=0.8, warmup=0.2,
    schedule="cosine", clip_norm=0.05, ema=0.8, keep="last", micro_batch=5, seed=4, evaluate_every=2,
)  # fmt: skip


class Net(nn.Module):
    """Has neither dropout nor BatchNorm, so that cutting a batch into micro-batches changes nothing."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, inputs):
        return self.head(self.encoder(inputs).tanh())


def task_of(config, **changes):
    return toy.made(config, model=Net, **changes)


def by_hand(task, config, fold: int) -> tuple[dict, list[float], list[float]]:
    """Train with one graph per batch; returns averaged weights, and each epoch's mean loss and last learning rate."""
    rows = np.flatnonzero(task.data.folds != fold)
    torch.manual_seed(keyed_seed(config.seed, fold))
    model = task.network.model()
    parts = [
        (model.encoder.weight, 0.5, 0.1), (model.encoder.bias, 0.5, 0.0),
        (model.head.weight, 1.0, 0.1), (model.head.bias, 1.0, 0.0),
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(
        [{"params": [p], "lr": config.lr * s, "weight_decay": d} for p, s, d in parts], betas=(config.momentum, 0.999)
    )
    order = task.data.order(rows) if task.data.order else orders.shuffled(rows)
    steps = config.epochs * math.ceil(len(rows) / config.batch_size)
    warm = round(config.warmup * steps)
    average, decayed, step, losses, rates = None, 0.0, 0, [], []
    for epoch in range(config.epochs):
        plan, total = order(config.seed, epoch), 0.0
        index = plan.index
        for number, start in enumerate(range(0, len(index), config.batch_size)):
            part = index[start : start + config.batch_size]
            inputs, targets = task.data.train.batch(
                part, Keys(config.seed, epoch, part, plan.draw[start : start + len(part)])
            )
            if task.data.mix:
                place = np.arange(len(part))
                partner = torch.from_numpy(np.where((place ^ 1) < len(part), place ^ 1, place))
                keys = Keys(config.seed, epoch, place // 2, number)
                inputs, targets = task.data.mix(inputs, targets, partner, keys, MIX_STREAM)
            factor = (
                (step + 1) / (warm + 1) if step < warm else (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2
            )
            for group, (_, scale, _) in zip(optimizer.param_groups, parts, strict=True):
                group["lr"] = config.lr * scale * factor
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            assert norm > config.clip_norm, "a test in which nothing is clipped"
            optimizer.step()
            now = {name: tensor.detach().double().clone() for name, tensor in model.state_dict().items()}
            decayed = config.ema * decayed + 1
            average = now if average is None else {n: average[n] + (now[n] - average[n]) / decayed for n in now}
            total, step = total + loss.item() * len(part), step + 1
        losses.append(total / len(index))
        rates.append(config.lr * factor)
    return average, losses, rates


def test_dropout_draws_from_the_seed_of_the_run(tmp_path, monkeypatch):
    """Only dropout can differ between seeds: the order and the initial weights are fixed, and nothing is augmented."""
    monkeypatch.chdir(tmp_path)

    def first() -> nn.Module:
        net = nn.Sequential(nn.Dropout(0.5), nn.Linear(16, 3))
        nn.init.constant_(net[1].weight, 0.1)
        nn.init.zeros_(net[1].bias)
        return net

    def weights(seed: int, name: str) -> torch.Tensor:
        config = replace(CONFIG, seed=seed)
        plain = task_of(config)
        task = toy.changed(plain, train=plain.data.valid, model=first, order=orders.sequential)
        (tmp_path / name).mkdir()
        folder = fit(task, config, Run(tmp_path / name, {}), 1, SINGLE)
        return torch.load(folder / "model.pt", weights_only=True)["model"]["1.weight"]

    one, again, other = weights(1, "a"), weights(1, "b"), weights(2, "c")
    assert torch.equal(one, again) and not torch.allclose(one, other)


def test_a_fold_begins_without_the_engine_of_the_fold_before(tmp_path, monkeypatch):
    """With a CUDA graph it holds the activations of a batch, and is freed by the garbage collector only."""
    monkeypatch.chdir(tmp_path)
    engines = []

    class Cyclic(Engine):
        def __init__(self, *given, **named):
            assert not [made for made in engines if made() is not None]
            super().__init__(*given, **named)
            self.replays = self
            engines.append(weakref.ref(self))

    monkeypatch.setattr("common.fit.Engine", Cyclic)
    gc.disable()
    try:
        for fold in (0, 1):
            fit(task_of(CONFIG), CONFIG, Run(tmp_path, {}), fold, SINGLE)
    finally:
        gc.enable()
    assert len(engines) == 2


@pytest.mark.parametrize("higher", [True, False])
def test_a_score_that_is_not_a_number_is_never_the_best(tmp_path, monkeypatch, higher):
    """The correlation of constant predictions is NaN, and an untrained network may predict constants."""
    monkeypatch.chdir(tmp_path)
    scores = iter([math.nan, 0.7, math.nan, 0.8, 0.6])
    kept = []
    save = checkpoint.save

    def saved(path, state):
        kept.append(path.name)
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", saved)
    config = replace(CONFIG, epochs=5, evaluate_every=1, keep="best", save_every=1e9)
    metric = Metric("score", lambda decisions, targets: decisions.double(), lambda *_: next(scores), higher)
    folder = fit(task_of(config, metrics=(metric,)), config, Run(tmp_path, {}), 1, SINGLE)
    assert json.loads((folder / "fold.json").read_text())["best"] == (0.8 if higher else 0.6)
    assert kept == ["best.pt", "best.pt", "model.pt"], "of the second epoch, then of the fourth or of the fifth"


@pytest.mark.parametrize("more", [{}, {"mix": MixUp(0.4, classes=3)}, {"order": True}], ids=["plain", "mix", "order"])
def test_the_loop_is_the_loop_written_by_hand(tmp_path, monkeypatch, more):
    monkeypatch.chdir(tmp_path)
    if "order" in more:
        more = {"order": lambda rows: orders.weighted(np.arange(1.0, len(rows) + 1), rows=rows)}
    task = task_of(CONFIG, lr_scales={"encoder": 0.5}, **more)
    folder = fit(task, CONFIG, Run(tmp_path, {}), 1, SINGLE)
    found = torch.load(folder / "model.pt", weights_only=True)["model"]
    expected, losses, rates = by_hand(task, CONFIG, 1)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor, rtol=1e-3, atol=2e-5)
    rows = list(csv.DictReader(open(folder / "metrics.csv")))
    assert [float(row["loss"]) for row in rows] == pytest.approx(losses, rel=1e-4)
    assert [float(row["lr"]) for row in rows] == pytest.approx(rates, rel=1e-6)
    assert [bool(row["accuracy"]) for row in rows] == [False, True, True], "--evaluate-every 2, and the last epoch"
