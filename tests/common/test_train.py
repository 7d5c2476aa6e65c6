"""The loop and the run around it, on the toy competition: resume to the same bits, folds, NaN, early stop, errors."""

import csv
import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common import predict, raw
from common import run as runs
from common.config import Parser, add_flags
from common.errors import UserError
from common.loading.images import BadImage
from common.train import train
from tests.common import toy


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def toy_train(run: str = "one", **changes) -> Path:
    train("toy", toy, replace(toy.RECIPES["default"], **changes), "default", None, run)
    return Path("runs/toy") / run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.parent.name}/{name}": value
        for file in sorted(folder.glob("fold-*/model.pt"))
        for name, value in torch.load(file, weights_only=True)["model"].items()
    }


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    return (
        first.keys() == second.keys()
        and all(torch.equal(first[name], second[name]) for name in first)
        and (one / "metrics.csv").read_text() == (other / "metrics.csv").read_text()
        and all(results[0][name] == results[1][name] for name in ("score", "metrics", "learnt", "rows"))
        and Path(f"submissions/toy/{one.name}-sample.csv").read_bytes()
        == Path(f"submissions/toy/{other.name}-sample.csv").read_bytes()
    )


def test_a_run_learns_and_leaves_everything_behind(capsys):
    folder = toy_train(epochs=12, fold="all", lr=0.02)
    assert capsys.readouterr().out.strip().splitlines()[-1] == "submission: submissions/toy/one-sample.csv"
    result = json.loads((folder / "result.json").read_text())
    assert result["score"] > 0.7 and result["rows"] == 120 and result["monitor"] == "accuracy"
    kept = np.load(folder / "oof.npy")
    ids = (folder / "oof_ids.txt").read_text().split()
    assert kept.shape == (120, 3) and sorted(ids) == sorted(f"r{row}" for row in range(120))
    truth = toy.build(toy.RECIPES["default"], raw.find("toy", None, toy.write_sample, str)).plain.targets
    accuracy = float((torch.from_numpy(kept).argmax(1) == truth[[int(name[1:]) for name in ids]]).double().mean())
    assert result["score"] == pytest.approx(accuracy, abs=1e-12), "the score is that of the kept predictions"
    metrics = list(csv.DictReader(open(folder / "metrics.csv")))
    assert [(row["fold"], row["epoch"]) for row in metrics] == [
        (str(f), str(e)) for f in range(3) for e in range(1, 13)
    ]
    assert float(metrics[11]["loss"]) < float(metrics[0]["loss"])
    assert {"config.json", "run.json", "log.txt", "metrics.csv", "oof.npy", "oof_ids.txt"} <= {
        f.name for f in folder.iterdir()
    }
    assert not list(folder.glob("fold-*/last.pt")) and not list(folder.glob("fold-*/best.pt"))


def test_equal_commands_give_equal_bits_and_another_seed_does_not():
    assert same(toy_train("one"), toy_train("two"))
    assert not same(Path("runs/toy/one"), toy_train("three", seed=1))


class Killed(BaseException):
    """As abrupt as a signal: nothing in the kit catches it."""


@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize("step", [1, 4, 5, 14])
def test_stopped_at_any_step_it_ends_with_the_same_bits(step, keep, monkeypatch):
    """Five windows an epoch: inside an epoch, at its end, after a validation, in the last epoch."""
    straight = toy_train("straight", keep=keep, save_every=0)
    from common.engine.step import Engine

    original = Engine.step

    def stopping(self, window, step_number):
        if step_number == step:
            raise Killed
        return original(self, window, step_number)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", stopping)
        with pytest.raises(Killed):
            toy_train("broken", keep=keep, save_every=0)
    assert same(straight, toy_train("broken", keep=keep, save_every=0))
    assert "resumed" in Path("runs/toy/broken/log.txt").read_text()


def test_sigkill_at_random_moments_ends_with_the_same_bits():
    """Real kills of the real process, wherever it is: reading, stepping, saving, validating, writing the CSV."""
    straight = toy_train("straight", fold="all", epochs=16, save_every=0)
    moments = np.random.default_rng(5).uniform(0.02, 0.3, size=8)
    kills = 0
    for seconds in [*moments, 60.0]:
        child = multiprocessing.get_context("fork").Process(
            target=toy_train, args=("broken",), kwargs={"fold": "all", "epochs": 16, "save_every": 0}
        )
        child.start()
        child.join(timeout=seconds)
        if child.is_alive():
            child.kill()
            child.join()
            kills += 1
    assert kills >= 2 and child.exitcode == 0
    assert same(straight, Path("runs/toy/broken"))


def test_early_stop_restores_the_best_weights():
    folder = toy_train(epochs=60, patience=3, lr=0.05, ema=0.0, views=False)
    rows = list(csv.DictReader(open(folder / "metrics.csv")))
    scores = [float(row["accuracy"]) for row in rows]
    assert len(rows) < 60 and scores.index(max(scores)) == len(rows) - 4, "three validations without a better one"
    assert json.loads((folder / "result.json").read_text())["score"] == max(scores)


def test_training_on_everything_has_no_score():
    folder = toy_train(fold="none")
    assert json.loads((folder / "result.json").read_text())["score"] is None
    assert json.loads(Path("submissions/toy/one-sample.json").read_text())["score"] is None


def test_nan_predictions_never_become_a_submission():
    with pytest.raises(UserError, match="NaN or infinite, so no submission"):
        toy_train(nan_at_test=True)
    assert not list(Path("submissions").rglob("*"))[1:]


def test_a_diverging_loss_stops_before_the_update_and_names_the_step():
    with pytest.raises(UserError, match="step"):
        toy_train(lr=1e30, optimizer="sgd", ema=0.0)
    assert not Path("submissions").exists()


def test_two_runs_are_averaged_in_probability_space():
    folders = [toy_train("one"), toy_train("two", seed=1)]
    parser = Parser()
    parser.add_argument("--run")
    parser.add_argument("--data")
    add_flags(parser, toy.RECIPES["default"])
    predict.predict("toy", toy, parser.parse_args(["--run", "one,two"]))
    config = toy.RECIPES["default"]
    task = toy.build(config, raw.find("toy", None, toy.write_sample, str))
    mean = torch.zeros(30, 3)
    for folder in folders:
        (model,) = predict.load_models(runs.load("toy", folder.name), task, config, torch.device("cpu"))
        for scale in (1.0, 1.01):
            mean += model(scale * task.test.inputs).softmax(1).detach() / 4
    found = [int(label) for _, label in list(csv.reader(open("submissions/toy/one+two-sample.csv")))[1:]]
    assert found == mean.argmax(1).tolist()


def test_a_second_train_command_makes_a_second_run(capsys):
    config = toy.RECIPES["smoke"]
    for expected in ("001-smoke-sample", "002-smoke-sample"):
        train("toy", toy, config, "smoke", None, None)
        assert capsys.readouterr().out.strip().splitlines()[-1] == f"submission: submissions/toy/{expected}.csv"


def test_unreadable_images_are_listed_in_the_run_and_left_out(monkeypatch):
    whole = toy.build

    def build(config, data):
        return replace(whole(config, data), labelled=Broken(), plain=Broken(), ids=list("abcdefghijkl"), folds=FOLDS)

    monkeypatch.setattr(toy, "build", build)
    with pytest.raises(UserError, match="c.jpg.*row 2"):
        toy_train("strict", batch_size=4, epochs=1)
    folder = toy_train("lenient", batch_size=4, epochs=2, bad_images="skip")
    for fold, (unseen, listed) in {"0": ({"c"}, {"c", "j"})}.items():
        rows = list(csv.DictReader(open(folder / f"fold-{fold}" / "skipped.csv")))
        assert {row["id"] for row in rows} == listed and all("cannot be read" in row["reason"] for row in rows)
        kept = set((folder / "oof_ids.txt").read_text().split())
        assert kept == {name for name, number in zip("abcdefghijkl", FOLDS, strict=True) if number == 0} - listed
        assert unseen <= listed
    assert json.loads((folder / "result.json").read_text())["rows"] == len(kept)


FOLDS = np.array([0, 1, 1, 0, 0, 0, 1, 1, 1, 0, 1, 1])


class Broken:
    """Twelve images, of which the third and the tenth cannot be read."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, row: int):
        if row in (2, 9):
            raise BadImage(f"{'abcdefghijkl'[row]}.jpg", "cannot be read")
        return np.full(16, row, np.float32), row % 3
