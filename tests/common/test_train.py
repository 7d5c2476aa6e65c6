"""The training loop and its run on the toy competition: folds, NaN, early stopping, averages, errors."""

import csv
import errno
import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from common import run as runs
from common.engine.ranks import Ranks
from common.errors import BadImage, UserError
from common.files import not_written, read_json
from common.inference import load_models
from common.losses import protocol
from common.predictions import read_ids
from common.train import check, train
from tests.common import toy
from tests.common.toy_runs import predict_again, same, toy_train, weights


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch, no_page):
    monkeypatch.chdir(tmp_path)


def test_a_run_learns_and_leaves_everything_behind(page, capsys):
    folder = toy_train(epochs=12, fold="all", lr=0.02)
    assert capsys.readouterr().out.strip().splitlines()[-1] == "submission: submissions/toy/one-demo.csv"
    result = json.loads((folder / "result.json").read_text())
    assert result["score"] > 0.7 and result["rows"] == 120 and result["monitor"] == "accuracy"
    kept = np.load(folder / "oof.npy")
    ids = (folder / "oof_ids.txt").read_text().split()
    assert kept.shape == (120, 3) and sorted(ids) == sorted(f"r{row}" for row in range(120))
    truth = toy.made().data.valid.targets
    accuracy = float((torch.from_numpy(kept).argmax(1) == truth[[int(name[1:]) for name in ids]]).double().mean())
    assert result["score"] == pytest.approx(accuracy, abs=1e-12), "the score is that of the kept predictions"
    metrics = list(csv.DictReader(open(folder / "metrics.csv")))
    assert [(row["fold"], row["epoch"]) for row in metrics] == [
        (str(f), str(e)) for f in range(3) for e in range(1, 13)
    ]
    assert float(metrics[11]["loss"]) < float(metrics[0]["loss"])
    assert {"config.json", "run.json", "log.txt", "metrics.csv", "oof.npy", "oof_ids.txt", "report.html"} <= {
        f.name for f in folder.iterdir()
    }
    assert not list(folder.glob("fold-*/last.pt")) and not list(folder.glob("fold-*/best.pt"))


def test_equal_commands_give_equal_bits_and_another_seed_does_not():
    assert same(toy_train("one"), toy_train("two"))
    assert not same(Path("runs/toy/one"), toy_train("three", seed=1))


def test_early_stop_restores_the_best_weights():
    folder = toy_train(epochs=60, patience=3, lr=0.05, ema=0.0, tta=False)
    rows = list(csv.DictReader(open(folder / "metrics.csv")))
    scores = [float(row["accuracy"]) for row in rows]
    assert len(rows) < 60 and scores.index(max(scores)) == len(rows) - 4, "three validations without a better one"
    assert json.loads((folder / "result.json").read_text())["score"] == max(scores)


def test_training_on_everything_has_no_score():
    folder = toy_train(fold="none")
    assert json.loads((folder / "result.json").read_text())["score"] is None
    assert json.loads(Path("submissions/toy/one-demo.json").read_text())["score"] is None


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
    predict_again("--run", "one,two")
    config = toy.RECIPES["default"]
    task = toy.made(config)
    mean = torch.zeros(30, 3)
    for folder in folders:
        (model,) = load_models(runs.load("toy", folder.name), task, config, torch.device("cpu"))
        for scale in (1.0, 1.01):
            mean += model(scale * task.data.test.inputs).softmax(1).detach() / 4
    found = [int(label) for _, label in list(csv.reader(open("submissions/toy/one+two-demo.csv")))[1:]]
    assert found == mean.argmax(1).tolist()


def constant_of_the_rows(train, valid, fold, run):
    """A task without a network: class 1 for everything."""
    return np.tile([0.0, 1.0, 0.0], (len(valid), 1)), np.tile([0.0, 1.0, 0.0], (toy.TEST_ROWS, 1))


@pytest.fixture
def _no_network(monkeypatch):
    with_network = toy.build
    only = {"network": None, "fit_predict": constant_of_the_rows, "uses": ("ema", "epochs", "batch_size")}
    monkeypatch.setattr(toy, "build", lambda *given: replace(with_network(*given), **only))


@pytest.mark.usefixtures("_no_network")
def test_every_fold_of_a_task_without_a_network_tells_its_score(capsys):
    run = toy_train(fold="all")
    result, lines = read_json(run / "result.json"), capsys.readouterr().out.splitlines()
    targets = toy.made().data.valid.targets.numpy()
    for fold in range(3):
        score = float((targets[fold::3] == 1).mean())
        assert result["fold_scores"][str(fold)] == pytest.approx(score)
        assert any(line.startswith(f"fold {fold}: accuracy {score:.5g}, fitted on 80 rows, ") for line in lines)
    assert toy_train("all", fold="none").is_dir()
    assert "all rows: fitted on 120 rows" in capsys.readouterr().out, "which holds nothing out"


@pytest.mark.usefixtures("_no_network")
def test_of_several_processes_one_does_all_for_a_task_without_a_network(monkeypatch):
    """As on Kaggle, where the notebook starts a process per GPU; here any message between ranks would fail."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setattr(Ranks, "from_environment", staticmethod(lambda rank=rank: Ranks(rank, 2, rank)))
        folder = toy_train()
        assert (folder / "result.json").is_file() == Path("submissions/toy/one-demo.csv").is_file() == (rank == 0)
    assert "LOCAL_WORLD_SIZE" not in os.environ, "all cores are for this one"


def test_a_task_without_a_network_that_predicts_nothing_is_told(monkeypatch):
    with_network = toy.build
    only = {"network": None, "fit_predict": lambda *given: None}
    monkeypatch.setattr(toy, "build", lambda *given: replace(with_network(*given), **only))
    with pytest.raises(UserError, match="returned NoneType: .* the 40 validation rows and of the 30 test rows"):
        toy_train()


@pytest.mark.usefixtures("_no_network")
@pytest.mark.parametrize(
    ("changes", "flag"),
    [({"lr": 0.5}, "--lr 0.5"), ({"tta": False}, "--tta false"), ({"rows": 99, "keep": "last"}, "--keep last")],
)
def test_a_flag_that_only_networks_have_is_refused_without_one(changes, flag):
    with pytest.raises(UserError, match=f"^{flag}: this task has no network .*Leave it out"):
        toy_train(**changes)
    with pytest.raises(UserError, match=f"^{flag}: "):
        check(toy.TOY, replace(toy.RECIPES["default"], **changes), "default", None)
    assert not Path("runs").exists()


@pytest.mark.usefixtures("_no_network")
def test_a_recipe_with_settings_of_networks_is_refused_without_one(monkeypatch):
    other = replace(toy.RECIPES["default"], schedule="step", epochs=2)
    monkeypatch.setitem(toy.RECIPES, "other", other)
    with pytest.raises(UserError, match="^--schedule step: .*in the recipe in config.py"):
        train(toy.TOY, other, "other")
    train(toy.TOY, replace(other, rows=99, seed=1), "other", None, "one")  # with rows=99 it may have no network
    with pytest.raises(UserError, match="^--tta false: "):
        predict_again("--run", "one", "--tta", "0")


def test_a_second_train_command_makes_a_second_run(capsys):
    config = toy.RECIPES["smoke"]
    for expected in ("001-smoke-demo", "002-smoke-demo"):
        train(toy.TOY, config, "smoke")
        assert capsys.readouterr().out.strip().splitlines()[-1] == f"submission: submissions/toy/{expected}.csv"


def test_what_would_fail_after_the_training_fails_before_it(monkeypatch):
    whole = toy.build
    toy_train("one")

    def check() -> None:
        raise UserError("a test image is missing")

    monkeypatch.setattr(toy, "build", lambda *given: replace(whole(*given), check=check))
    for attempt in (lambda: toy_train("two"), lambda: predict_again("--run", "one")):
        with pytest.raises(UserError, match="a test image is missing"):
            attempt()
    assert not Path("runs/toy/two").exists()


def test_unreadable_images_are_listed_in_the_run_and_left_out(monkeypatch):
    whole = toy.build

    def build(*given):
        own = {"train": Broken(), "valid": Broken(), "ids": list("abcdefghijkl"), "folds": FOLDS}
        return toy.changed(whole(*given), **own)

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


@pytest.mark.parametrize(
    ("fold_is", "words"), [(1, "fold 0: not one of its 7 training images"), (0, "not one of the held-out images")]
)
def test_not_one_image_of_a_part_can_be_read(monkeypatch, fold_is, words):
    whole = toy.build

    def build(*given):
        files = Broken(np.flatnonzero((FOLDS > 0) == (fold_is > 0)))
        return toy.changed(whole(*given), train=files, valid=files, ids=list("abcdefghijkl"), folds=FOLDS)

    monkeypatch.setattr(toy, "build", build)
    with pytest.raises(UserError, match=f"{words}.* make check"):
        toy_train("lenient", batch_size=4, epochs=1, bad_images="skip")


FOLDS = np.array([0, 1, 1, 0, 0, 0, 1, 1, 1, 0, 1, 1])


class Broken:
    """Twelve images, of which those in rows `bad` cannot be read."""

    def __init__(self, bad=(2, 9)):
        self.bad = bad

    def __len__(self) -> int:
        return 12

    def __getitem__(self, row: int):
        if row in self.bad:
            raise BadImage(f"{'abcdefghijkl'[row]}.jpg", "cannot be read")
        return np.full(16, row, np.float32), row % 3


class Temperature(torch.nn.Module):
    """A loss with a weight of its own."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, outputs, targets):
        return torch.nn.functional.cross_entropy(outputs * self.scale, targets, reduction="none")


def test_folds_share_no_weights_of_the_loss(monkeypatch):
    """Fold 1 begins with a newly built loss, whether or not fold 0 was trained before it in the same process."""
    whole = toy.build
    monkeypatch.setattr(toy, "build", lambda *given: toy.changed(whole(*given), loss=Temperature()))
    together = weights(toy_train("all", fold="all", lr=0.05))
    alone = weights(toy_train("one", fold="1", lr=0.05))
    assert all(torch.equal(together[name], alone[name]) for name in alone)


@pytest.mark.parametrize("fold", [0, 1])
def test_a_missing_fold_is_named_and_trained_again(fold):
    """Without it no CSV is written; trained again, it gives the same bits, although the folds were joined before."""
    straight, folder = toy_train("straight", fold="all"), toy_train(fold="all")
    table = Path("submissions/toy/one-demo.csv")
    table.unlink()
    shutil.rmtree(folder / f"fold-{fold}")
    with pytest.raises(UserError, match=f"fold-{fold}/model.pt of 3 models.*result.json.*RUN=one"):
        toy_train(fold="all")
    assert not table.exists()
    (folder / "result.json").unlink()
    assert same(straight, toy_train(fold="all"))


def test_a_model_alone_that_is_gone_is_trained_again():
    whole, folder = toy_train("whole", fold="all"), toy_train("one", fold="all")
    (folder / "fold-1" / "model.pt").unlink()
    with pytest.raises(UserError, match="fold-1/model.pt of 3 models of the run is missing: delete .*result.json"):
        predict_again("--run", "one")
    (folder / "result.json").unlink()
    assert same(whole, toy_train("one", fold="all"))


def test_a_damaged_table_of_a_finished_fold_is_one_line():
    run = toy_train(epochs=1)
    (run / "result.json").unlink()
    (run / "fold-0/metrics.csv").write_bytes(b"\xff" * 9)
    with pytest.raises(UserError, match="metrics.csv cannot be read .*delete runs/toy/one/fold-0 and train again"):
        toy_train(epochs=1)
    shutil.rmtree(run / "fold-0")
    toy_train(epochs=1)
    assert (run / "result.json").is_file()


def test_flags_of_predict_do_not_hide_behind_the_score_of_the_training():
    toy_train("one")
    sidecar = Path("submissions/toy/one-demo.json")
    trained = json.loads(sidecar.read_text())["score"]
    predict_again("--run", "one", "--workers", "1")
    assert json.loads(sidecar.read_text())["score"] == trained is not None
    predict_again("--run", "one", "--tta", "false")
    assert json.loads(sidecar.read_text())["score"] is None


def test_the_mean_of_the_last_weights_has_batchnorm_of_its_own(monkeypatch):
    """--swa averages the weights of the last steps equally, and takes BatchNorm's statistics from the training rows."""
    from common.engine.average import Average

    taken = []
    original = Average.update

    def update(self, model):
        taken.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        original(self, model)

    monkeypatch.setattr(Average, "update", update)
    folder = toy_train(epochs=4, swa=0.5, ema=0.0, keep="last", lr=0.05)
    assert len(taken) == 10, "half of four epochs of five batches"
    kept = torch.load(folder / "fold-0" / "model.pt", weights_only=True)["model"]
    for name in ("0.weight", "1.weight", "4.bias"):
        torch.testing.assert_close(kept[name], torch.stack([step[name] for step in taken]).mean(0))
    task = toy.made()
    hidden = torch.nn.functional.linear(
        task.data.valid.inputs[torch.from_numpy(task.data.folds != 0)], kept["0.weight"], kept["0.bias"]
    )
    assert float((kept["1.running_mean"] - hidden.mean(0)).abs().max()) < 0.1, "augmented a little"
    former = torch.stack([step["1.running_mean"] for step in taken]).mean(0)
    assert float((former - hidden.mean(0)).abs().max()) > float((kept["1.running_mean"] - hidden.mean(0)).abs().max())


def test_batchnorm_is_estimated_again_in_parts_of_more_than_one_sample():
    """82 training rows in micro-batches of at most 9: batches of 41 are cut evenly, batches of 9 leave one row over."""
    folder = toy_train(rows=123, batch_size=41, micro_batch=9, swa=0.5, ema=0.0, keep="last")
    assert (folder / "result.json").is_file()


class SecondOfTwo(Ranks):
    """The second of two processes, on a disk of its own; it receives the broadcasts `said` from the first one."""

    def __init__(self, said: list):
        super().__init__(1, 2, 1)
        object.__setattr__(self, "said", said)

    def broadcast(self, value):
        return self.said.pop(0)


def test_a_second_computer_learns_that_the_run_is_trained(monkeypatch):
    from common import train as training

    ranks = SecondOfTwo(["one", {"monitor": "accuracy", "score": 0.5}])
    monkeypatch.setattr(Ranks, "from_environment", lambda: ranks)
    monkeypatch.setattr(training, "fit", None)
    toy_train()
    assert ranks.said == [] and not Path("runs/toy/one").exists()


def test_processes_without_work_are_told(monkeypatch, capsys):
    toy_train(batch_size=2, epochs=1, rows=12)
    monkeypatch.setattr(Ranks, "broadcast", lambda self, value: value)
    monkeypatch.setattr(Ranks, "from_environment", lambda: Ranks(0, 2))
    toy_train(batch_size=2, epochs=1, rows=12)
    assert "--batch-size 2 leaves 1 of 2 processes without work" in capsys.readouterr().out


def test_the_weights_of_a_loss_are_trained(monkeypatch):
    whole, made = toy.build, []
    monkeypatch.setattr(toy, "build", lambda *given: toy.changed(whole(*given), loss=Temperature()))
    monkeypatch.setattr(protocol, "deepcopy", lambda loss: made.append(Temperature()) or made[-1])
    toy_train("one", lr=0.05)
    assert [loss.scale.item() != 1 for loss in made] == [False, True], "the first one was tried out"


def test_a_page_that_fails_stands_in_nobodys_way(page, monkeypatch, capsys):
    whole = toy.build

    def fails(run, page):
        raise ValueError("ParseSyntaxException: $\\frac{$")

    monkeypatch.setattr(toy, "build", lambda *given: toy.changed(whole(*given), report=fails))
    folder = toy_train("one")
    said = capsys.readouterr().out
    assert (
        "no report of runs/toy/one: ValueError: ParseSyntaxException" in said and not (folder / "report.html").exists()
    )
    assert said.strip().splitlines()[-1] == "submission: submissions/toy/one-demo.csv"
    assert Path("submissions/toy/one-demo.csv").is_file() and not (folder / "unfinished").exists()


def test_a_page_that_the_disk_refuses_is_written_by_the_same_command(page, monkeypatch, capsys):
    def full(path, writer):
        error = OSError(errno.ENOSPC, "No space left on device")
        raise not_written(path, error) from error

    again = lambda: train(toy.TOY, toy.RECIPES["default"], "default")  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr("common.report.write_with", full)
        again()
    told = capsys.readouterr().out
    assert "repeat the same command" in told and "submission: submissions/toy/001-default-demo.csv" in told
    again()
    assert [file.parent.name for file in Path("runs/toy").glob("*/report.html")] == ["001-default-demo"]
    again()
    assert Path("runs/toy/002-default-demo").is_dir()


def test_a_network_whose_train_returns_nothing_trains_and_predicts(monkeypatch):
    class Frozen(torch.nn.Linear):
        def train(self, mode=True):
            super().train(mode)

    whole = toy.build
    monkeypatch.setattr(toy, "build", lambda *given: toy.changed(whole(*given), model=lambda: Frozen(16, 3)))
    toy_train(epochs=1, batch_size=79)
    assert Path("submissions/toy/one-demo.csv").is_file()


def test_no_tta_at_all_is_that_of_the_inputs_as_they_are(monkeypatch):
    plain, whole = toy_train("plain", tta=False), toy.build
    monkeypatch.setattr(toy, "build", lambda *given: toy.changed(whole(*given), tta=()))
    assert same(plain, toy_train("none"))


def test_what_is_tuned_is_scored_as_a_prediction_will_read_it(monkeypatch):
    """JSON turns keys into text and arrays into lists, so decisions are scored with values that went through JSON."""
    whole = toy.build
    changes = {
        "tune": lambda predictions, rows: {2: np.float32(1), "others": np.zeros(2)},
        "apply": lambda p, tuned: (p * torch.tensor([*tuned.get("others", (1, 1)), tuned.get(2, 0)])).argmax(1),
    }
    monkeypatch.setattr(toy, "build", lambda *given: toy.changed(whole(*given), **changes))
    result = read_json(toy_train() / "result.json")
    assert result["tuned"] == {"2": 1.0, "others": [0.0, 0.0], "score": result["score"]}
    targets = toy.made().data.valid.targets[toy.made().data.folds == 0]
    assert result["score"] == pytest.approx(float((targets == 0).double().mean())), "no class 2, as in the submission"
    with open("submissions/toy/one-demo.csv", newline="") as stream:
        assert {row["label"] for row in csv.DictReader(stream)} == {"0"}


def test_a_tuning_may_write_to_its_predictions(monkeypatch):
    """As torch does, which takes read-only arrays with a warning, and a write to them ended the process."""
    whole, before = toy.build, toy_train("plain")

    def tune(predictions, rows):
        torch.as_tensor(predictions).zero_()
        return {}

    monkeypatch.setattr(toy, "build", lambda *given: toy.changed(whole(*given), tune=tune))
    after = toy_train()
    assert (after / "oof.npy").read_bytes() == (before / "oof.npy").read_bytes()
    assert read_json(after / "result.json")["score"] == read_json(before / "result.json")["score"]


def test_columns_of_pandas_are_taken_by_place(monkeypatch):
    """Rows of a shuffled pandas table keep their old index labels, which must not be used as row numbers."""
    order = np.random.default_rng(0).permutation(120)
    ids, whole = [f"r{row}" for row in range(120)], toy.build
    columns = {"ids": pd.Series(ids, index=order), "folds": pd.Series(np.arange(120) % 3, index=order)}
    plain = toy_train("plain", fold="all")
    monkeypatch.setattr(toy, "build", lambda *given: toy.changed(whole(*given), **columns))
    assert same(plain, toy_train("columns", fold="all"))
    assert read_ids(plain, "oof") == read_ids(Path("runs/toy/columns"), "oof")
    folds = [read_json(run / "result.json")["fold_scores"] for run in (plain, Path("runs/toy/columns"))]
    assert folds[0] == folds[1]


def test_ids_are_kept_whatever_ends_a_line_elsewhere(page, monkeypatch):
    whole = toy.build

    def build(end, *given):
        task = whole(*given)
        return toy.changed(task, ids=[f"{name}{end}x" for name in task.data.ids])

    monkeypatch.setattr(toy, "build", partial(build, "\u2028\x0b\x85\r"))
    folder = toy_train("one")
    assert set(read_ids(folder, "oof")) <= {f"r{row}\u2028\x0b\x85\rx" for row in range(120)}
    assert "no report" not in (folder / "log.txt").read_text() and (folder / "report.html").is_file()
    monkeypatch.setattr(toy, "build", partial(build, "\n"))
    with pytest.raises(UserError, match=r"the id 'r0\\nx' contains a line break"):
        toy_train("two")
    assert not Path("runs/toy/two").exists()
