"""Whole runs on a simulated card: every tensor on the right device, the results of the CPU, no step that waits."""

import gc
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common import competition
from common.defaults import completed
from common.engine.ranks import SINGLE
from common.engine.replay import Replay
from common.fit import Training, fit
from common.inference import Predictor, decisions_of, predictor_of
from common.loading.transfer import to_device
from common.raw import RawData
from common.report import Report
from common.run import Run
from common.train import train
from competitions.digit_recognizer import demo
from competitions.digit_recognizer.demo import digits
from tests.common import toy
from tests.common.simulated_card import CARD, reads, simulated_card
from tests.common.toy_runs import predict_again, toy_train, weights


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch, no_page):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("common.engine.memory.release", lambda: None)  # it takes longer than these trainings


class Moved(toy.ToyRows):
    """The toy's rows as tensors that move to the card, as those of digit_recognizer do."""

    def to(self, device):
        self.inputs, self.targets = self.inputs.to(device), self.targets.to(device)
        return self

    def batch(self, indices, keys):
        rows = to_device(indices, self.inputs.device)
        noise = 0.1 * keys.normal((16,)).astype(np.float32) * self.augment
        return self.inputs[rows] + to_device(noise, self.inputs.device), self.targets[rows]


@pytest.fixture(params=["stays", "moves"])
def _dataset(request, monkeypatch):
    if request.param == "moves":
        monkeypatch.setattr(toy, "ToyRows", Moved)


def same_results(one: Path, other: Path) -> None:
    """Assert that two runs of the same competition agree in weights, scores, predictions and submission."""
    same_weights(one, other)
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    assert results[0]["score"] == pytest.approx(results[1]["score"], abs=1e-6)
    for name in ("oof", "test"):
        kept = [np.load(folder / f"{name}.npy") for folder in (one, other)]
        np.testing.assert_allclose(kept[1].astype(np.float32), kept[0].astype(np.float32), rtol=1e-3, atol=1e-4)
    assert csv_of(one).read_bytes() == csv_of(other).read_bytes()


def same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first and first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-4, atol=1e-5)


def csv_of(run: Path) -> Path:
    return Path("submissions", run.parent.name, f"{run.name}-demo.csv")


def test_the_stand_in_refuses_what_a_card_refuses_and_counts_what_waits():
    with simulated_card():
        here, there = torch.ones(3), torch.ones(3, device=CARD)
        assert there.device == (there + 1).device == torch.tensor(1.0, device="cuda:0").device == CARD
        assert torch.equal((there[1:] + torch.tensor(1.0)).cpu(), torch.full((2,), 2.0))
        reads.clear()
        there[:1].copy_(here[:1]), here.copy_(there, non_blocking=True), here.to(CARD), there.to(torch.int64)
        assert not reads
        assert float(there.sum()) == 3.0 and there.cpu().tolist() == [1.0] * 3 and len(there[there > 2]) == 0
        assert reads == ["_local_scalar_dense", "_to_copy", "index"]
        for mistake in (
            lambda: here + there,
            lambda: here[there.long()],
            lambda: torch.cat([here, there]),
            lambda: torch.nn.functional.cross_entropy(there[None], torch.zeros(1, dtype=torch.int64)),
        ):
            with pytest.raises(RuntimeError, match="on the same device"):
                mistake()
        for mistake in (there.numpy, lambda: np.asarray(there), there.pin_memory):
            with pytest.raises(TypeError, match="cuda:0"):
                mistake()


@pytest.mark.parametrize(
    "limit, changes, replayed",
    [(0.1, {"clip_norm": 1.0}, []), (0.0, {"batch_size": 10}, [4, 5, 6, 7, 8, 9, 10, 11])],
    ids=["three batches and a rest", "replayed batches that stay on the host"],
)
def test_a_whole_run_is_that_of_the_cpu(limit, changes, replayed, monkeypatch, capsys):
    monkeypatch.setattr("common.loading.transfer.PREFETCH_LIMIT", limit)
    settings = {"fold": "all", "folds": 2, "epochs": 2, **changes}
    launched, launch = [], Replay._launched
    monkeypatch.setattr(Replay, "_launched", lambda replay, *of: launched.append(of[-1]) or launch(replay, *of))
    alone = toy_train("cpu", **settings)
    with simulated_card():
        run = toy_train("card", **settings)
        csv_of(run).unlink()
        predict_again("--run", "card")
        predict_again("--run", "card,cpu")
    same_results(alone, run)
    assert "not replayed" not in capsys.readouterr().out and launched == 2 * replayed


class Killed(Exception):
    pass


def test_micro_batches_that_were_asked_for_are_those_of_the_cpu(monkeypatch, capsys):
    """Replayed; the first validation has no room beside the graph, and the run is stopped inside the second epoch."""
    settings = {"epochs": 2, "batch_size": 12, "micro_batch": 5, "save_every": 0}
    alone = toy_train("cpu", **settings)
    launched, beside = [], []
    launch, forward, step = Replay._launched, Predictor._forward, Training._step

    def counted(replay, batch, step_number):
        launched.append(step_number)
        return launch(replay, batch, step_number)

    def short_of_memory(predictor, *given):
        beside.extend([predictor.replay._graph is not None] if predictor.replay else [])
        if beside == [True]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(predictor, *given)

    def stopping(training, batch):
        if training.state.step == 8 and not Path("stopped").exists():
            Path("stopped").touch()
            raise Killed
        step(training, batch)

    monkeypatch.setattr(Replay, "_launched", counted)
    monkeypatch.setattr(Predictor, "_forward", short_of_memory)
    monkeypatch.setattr(Training, "_step", stopping)
    with simulated_card():
        with pytest.raises(Killed):
            toy_train("card", **settings)
        gc.collect()  # the stopped run, with its lock: engine and graph refer to each other
        run = toy_train("card", **settings)
    same_results(alone, run)
    assert launched == [3, 4, 5, 11, 12]
    assert capsys.readouterr().out.count("not replayed as a CUDA graph: it leaves too little memory") == 1
    assert beside[:2] == [True, False] and beside.count(True) > 1 and not beside[-1], "the last predictions have room"


def test_swa_and_pseudo_labels_are_those_of_the_cpu(monkeypatch):
    monkeypatch.setattr(toy, "ToyRows", Moved)
    settings = {"folds": 2, "epochs": 1, "ema": 0.0}
    runs = []
    for name in ("cpu", "card"):
        with simulated_card() if name == "card" else nullcontext():
            toy_train(f"{name}-first", fold="all", swa=0.5, **settings)
            runs.append(toy_train(f"{name}-second", pseudo=f"{name}-first", **settings))
    same_results(Path("runs/toy/cpu-first"), Path("runs/toy/card-first"))
    same_results(*runs)


@pytest.mark.usefixtures("_dataset")
def test_no_step_waits_for_the_card(monkeypatch):
    waits, step = {}, Training._step

    def watched(training, batch):
        step(training, batch)
        waits[training.state.step] = list(reads)  # since the step before: those of the loader too
        reads.clear()

    monkeypatch.setattr(Training, "_step", watched)
    monkeypatch.setattr("common.progress.HEARTBEAT_SECONDS", 3600.0)  # the progress line waits for the loss
    with simulated_card():
        toy_train(epochs=1, batch_size=4)
    assert len(waits) == 20 and not [found for number, found in waits.items() if number > 6 and found]


def few_digits(count: int = 150):
    pixels, labels = digits()
    return pixels[:count], labels[:count]


def test_digit_recognizer_is_that_of_the_cpu(monkeypatch, page, capsys):
    monkeypatch.setattr(demo, "digits", few_digits)
    monkeypatch.setattr(demo, "TRAIN_ROWS", 120)
    drawn = []
    monkeypatch.setattr(Report, "figure", lambda page, figure, name, *_: drawn.append(name))  # PNGs take seconds
    loaded = competition.load("digit_recognizer")
    config = replace(loaded.recipes["smoke"], epochs=1, folds=3, batch_size=32)
    train(loaded, config, "smoke", None, "cpu")
    with simulated_card():
        train(loaded, config, "smoke", None, "card")
    runs = [Path("runs/digit_recognizer", name) for name in ("cpu", "card")]
    same_results(*runs)
    assert "no report" not in capsys.readouterr().out
    assert drawn.count("worst") == 2, "the images of the worst mistakes"


FEW = {  # demo images of the competitions that are tried
    "inclusive_images": {"IMAGES": {"train_images": 24, "tuning": 6, "test": 2}},
}


@pytest.mark.parametrize("name", FEW)
def test_a_fold_of_images_is_that_of_the_cpu(name, monkeypatch, tmp_path):
    for constant, value in FEW[name].items():
        monkeypatch.setattr(f"competitions.{name}.demo.{constant}", value)
    loaded, data = competition.load(name), tmp_path / "data"
    data.mkdir()
    loaded.write_demo(data)
    settings = {"epochs": 1, "batch_size": 8, "precision": "fp32", "workers": 0, "channels_last": True}
    config = replace(loaded.recipes["smoke"], **settings)
    found, rows = RawData(data, name, is_demo=True), []
    for place in ("cpu", "card"):
        task, run = completed(loaded.build(config, found, str), found), Run(tmp_path / place, {})
        run.path.mkdir()
        with simulated_card() if place == "card" else nullcontext():
            fit(task, config, run, 0, SINGLE)
            predictor = predictor_of(run, task, config)
            for index, predictions, *_ in predictor.batches(task.data.test, np.arange(len(task.data.test))):
                decisions = decisions_of(task, predictions, {})
                rows.append(list(task.submission.rows([task.data.test_ids[row] for row in index], decisions)))
    same_weights(tmp_path / "cpu", tmp_path / "card")
    assert rows[0] == rows[1]
