"""Errors that would come after hours are raised before the training, and leave no run behind."""

import shutil
from collections import namedtuple
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from common.config import Config
from common.errors import UserError
from common.inference import Predictor, decisions_of, heads_of, in_float32
from common.loading import orders
from common.loading.mixing import CutMix
from common.metrics import Metric
from common.preflight import try_out
from common.task import TTA
from common.vision.weights import read
from tests.common import toy
from tests.common.toy_runs import toy_train


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch, no_page):
    monkeypatch.chdir(tmp_path)


class Heavy(toy.ToyRows):
    weights = np.ones(80)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"test_ids": [f"t{row + 1}" for row in range(30)]},
            "the rows to predict are not those of .*t30 is not.*t0 is",
        ),
        ({"test": toy.ToyRows(torch.zeros(3, 16), torch.zeros(3)), "test_ids": ["t0", "t1", "t2"]}, "id t3 is missing"),
        ({"test_ids": ["t0"]}, "30 test rows have 1 ids"),
        ({"mix": CutMix(classes=3)}, "CutMix needs images"),
        ({"test": None}, "0 test rows have 30 ids"),
        ({"lr_scales": {"head": 0.1}}, "lr_scales names 'head', which has no trainable parameter"),
        ({"train": Heavy(torch.zeros(120, 16), torch.zeros(120))}, "weights have 80 rows and train has 120"),
        ({"ids": [f"r{row // 2}" for row in range(120)]}, "the data's ids have 'r0' twice"),
        ({"order": lambda rows: orders.weighted(np.ones(len(rows)))}, "trains on .* not among the 80 .* row 0"),
        ({"test_ids": ["t0"] * 30}, "the data's test_ids have 't0' twice"),
        ({"model": lambda: nn.Linear(16, 3).requires_grad_(False)}, "no parameter of the model is trainable"),
        ({"metrics": ()}, "a Task needs a metric"),
        (
            {"apply": lambda p, tuned: p > tuned["cut"]},
            r"`apply` looks up 'cut' .* tuned.get\('cut', ...\)",
        ),
        ({"metrics": (Metric("loss", lambda d, t: d.double()),)}, "metric 'loss': expected names .* differ from"),
        (
            {"metrics": (Metric("f1,macro", lambda d, t: d.double()),)},
            "'f1,macro': expected names without commas",
        ),
        ({"valid": toy.ToyRows(torch.zeros(3, 16), torch.zeros(3))}, "valid have 3 rows and train has 120"),
        (
            {"metrics": (Metric("x", lambda d, t: d.double(), higher_is_better=False),)},
            "SOURCE.higher_is_better is True",
        ),
        (
            {"model": lambda: nn.Linear(16, 3, bias=False), "predict": lambda o: o.sum(0)},
            "have the shapes .*expected .B",
        ),
        (
            {"predict": lambda o: {0: o}, "apply": lambda p, tuned: p[0].argmax(1)},
            "predictions are named 0: expected a",
        ),
        ({"pretrain": lambda model: read(Path("gone.pth"))}, "--encoder-weights gone.pth cannot be read"),
        ({"tta": (TTA("as is"), TTA("halved", lambda x: x[:1]))}, "the TTA 'halved' gives predictions of"),
        ({"model": lambda: nn.LSTM(16, 3)}, "the loss does not take the outputs .*float32.*make them fit each other"),
        ({"apply": lambda p, tuned: p[:, 0]}, "metric accuracy needs decisions, found scores"),
        ({"apply": lambda p, tuned: p.argmax(1) + 7}, "would begin with t0,.*: id t0: label .* is not 0 to 2"),
        ({"rows": lambda ids, d: [(name, 1, 2) for name in ids]}, "3 values, expected 2"),
        ({"predict": lambda o: o - 9, "kept": "uint8"}, "predictions from -.* cannot be kept as uint8: expected prob"),
        ({"predict": lambda o: o + 1e5, "kept": "float16"}, "predictions from [19].* cannot be kept as float16"),
        ({"rows": lambda ids, d: [(f"{name}.jpg", 1) for name in ids]}, "with t0.jpg,1 t1.jpg,1: .*expected t0 "),
        ({"rows": lambda ids, d: [(name, torch.tensor(0.5)) for name in ids]}, "tensor.0.5.*finite number"),
        (
            {"rows": lambda ids, d: [(name, "0 2") for name in ids]},
            "id t0 has the value 0 2, expected a finite number in label .*Submission.text=",
        ),
        (
            {"rows": lambda ids, d: [(name, "nan") for name in ids]},
            "id t0 has the value nan, expected a finite number in label as in the sample",
        ),
        ({"apply": lambda p, tuned: np.array(["cat", "dog", "owl"])[p.argmax(1)]}, "array of <U3, .*names.*`rows`"),
        ({"apply": lambda p, tuned: ["cat"] * len(p)}, "array of <U3, the first is 'cat': expected numbers"),
        ({"rows": lambda ids, d: [(name, 1) for name in ids * 2]}, "t0 appears twice.*Submission.several=True."),
        ({"rows": lambda ids, d: [(name, 1) for name in ids[1:]]}, "id t1, expected t0 .* id,label for every id"),
    ],
)
def test_it_is_told_before_the_training(changes, words, monkeypatch):
    whole = toy.build
    monkeypatch.setattr(toy, "build", lambda *given: toy.changed(whole(*given), **changes))
    with pytest.raises(UserError, match=words):
        toy_train()
    assert not Path("runs").exists()


@pytest.mark.parametrize("first", [29, 1])
def test_the_rows_of_an_id_are_sorted_together_as_in_the_whole_csv(first):
    order = [f"t{(first + row) % toy.TEST_ROWS}" for row in range(toy.TEST_ROWS)]
    task = toy.made(test_ids=order, several=True, rows=lambda ids, d: [(name, 1) for name in ids * 2])
    assert [row[0] for row in task.sample.in_order((name, 1) for name in order * 2)][:3] == ["t0", "t0", "t1"]
    try_out(task, toy.RECIPES["default"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"batch_size": 79}, "--batch-size 79"), ({"micro_batch": 1}, "--micro-batch 1"), ({"micro_batch": 2}, "single")],
)
def test_batchnorm_is_not_left_with_a_single_sample(changes, words):
    """80 rows in batches of 79 leave one row over; this is refused before the first epoch, in every fold."""
    with pytest.raises(UserError, match=f"fold 2: .*{words}.*Expected more than 1 value"):
        toy_train(fold="2", **({"batch_size": 13} | changes))
    assert not Path("runs").exists()
    try_out(toy.made(), replace(toy.RECIPES["default"], batch_size=77))
    with pytest.raises(UserError, match="single"):  # two ranks share the last three of 80 rows: two and one
        try_out(toy.made(), replace(toy.RECIPES["default"], batch_size=77), world=2)


def test_only_missing_rules_are_named_as_not_tuned():
    for lookup in (lambda p, tuned: {}["cut"], lambda p, tuned: {"other": 1, **tuned}["cut"]):
        with pytest.raises(KeyError, match="^'cut'$"):
            decisions_of(toy.made(apply=lookup), None, {})
    with pytest.raises(KeyError, match="^'cut'$"):
        decisions_of(toy.made(apply=lambda p, tuned: tuned["cut"]), None, {"cuts": 1})
    assert decisions_of(toy.made(apply=lambda p, tuned: tuned.get("cut", 0.5)), None, {}) == 0.5


def test_a_task_has_a_network_or_a_function(monkeypatch):
    task = toy.made()
    for changes in ({"network": None}, {"fit_predict": lambda *given: None}):
        monkeypatch.setattr(toy, "build", lambda *given, changes=changes: replace(task, **changes))
        with pytest.raises(UserError, match="either a `network` or a `fit_predict`"):
            toy_train()


def test_the_disk_has_room_for_what_the_run_keeps(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 2**20 + 1000))
    with pytest.raises(UserError, match="what this run keeps .* GB of .* are free"):
        toy_train()
    assert not Path("runs").exists()


def test_predictions_in_bfloat16_do_not_tie():
    """The last layer computes in float32, so that predictions differ; bfloat16 has only a few hundred values."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1), nn.Identity()).eval()
    rows = torch.randn(2000, 8)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        tied = model(rows).sigmoid().unique()
        (head,) = heads_of(model, rows[:1])
        assert head is model[2]
        with in_float32([head], "cpu"):
            outputs = model(rows)
    assert outputs.dtype == torch.float32 and len(outputs.sigmoid().unique()) > 1990 > 1000 > len(tied)
    assert "forward" not in vars(head)
    head.forward = own = partial(nn.Linear.forward, head)
    with in_float32([head], "cpu"):
        assert head.forward is not own
    assert head.forward is own, "what somebody else put there stays"
    assert np.allclose(outputs.numpy(), model(rows).detach().numpy(), atol=0.05)
    model.compile()
    predictor = Predictor([model], toy.made(), (), Config(compile=True, precision="bf16"), 64, torch.device("cpu"))
    with torch.inference_mode():
        assert torch.equal(predictor._outputs(model, rows), outputs), "a compiled model predicts as any other"
