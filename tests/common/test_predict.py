"""Predictions: means over models and TTA, batches too large for memory, and which run's tuned values decide."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from common import inference, predict
from common.config import Config
from common.engine.ranks import SINGLE
from common.errors import BadImage, UserError
from common.files import replacing
from common.inference import Predictor
from common.predict import Member
from common.task import AS_IS, TTA, Submission
from common.train import train
from tests.common import toy
from tests.common.toy_runs import predict_again, toy_train


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch, no_page):
    monkeypatch.chdir(tmp_path)


class Small(nn.Module):
    """Returns its inputs; a batch of more than `limit` rows runs out of memory."""

    def __init__(self, limit=10**9):
        super().__init__()
        self.limit, self.sizes = limit, []

    def forward(self, inputs):
        if len(inputs) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.sizes.append(len(inputs))
        return inputs


def predictor(models, tta=AS_IS):
    task = SimpleNamespace(postprocess=SimpleNamespace(predict=lambda outputs: outputs))
    return Predictor(models, task, tta, Config(precision="fp32"), 8, torch.device("cpu"))


def test_a_batch_that_does_not_fit_is_predicted_in_parts(monkeypatch):
    monkeypatch.setattr(inference.memory, "release", lambda: None)  # collecting garbage takes seconds
    model, rows = Small(3), torch.arange(14.0).reshape(7, 2)
    tried = predictor([model])
    assert torch.equal(tried._average(rows)[0], rows) and model.sizes == [2, 2, 2, 1]
    model.sizes.clear()
    assert torch.equal(tried._average(rows[:4])[0], rows[:4]) and model.sizes == [2, 2], "what fits is known by now"
    with pytest.raises(UserError, match="out of memory while a single sample is predicted"):
        predictor([Small(0)])._average(rows)[0]


def test_the_graph_of_a_training_gives_way_to_its_validation(monkeypatch):
    monkeypatch.setattr(inference.memory, "release", lambda: None)
    model, rows = Small(3), torch.arange(14.0).reshape(7, 2)

    def make_room():
        there, model.limit = model.limit < 7, 7
        return there

    tried = predictor([model])
    tried.replay = SimpleNamespace(make_room=make_room)
    assert torch.equal(tried._average(rows)[0], rows) and model.sizes == [7] and tried.fitting == 8


def test_the_loss_of_validation_weighs_rows_as_the_training_does():
    task = toy.made()
    rows = np.arange(40)
    task.data.valid.weights = np.linspace(0, 3, len(task.data.ids), dtype=np.float32)
    model = task.network.model().eval()
    tried = Predictor([model], task, AS_IS, replace(toy.RECIPES["default"], batch_size=64), 64, torch.device("cpu"))
    with torch.inference_mode():
        outputs = model(task.data.valid.inputs[:40])
    losses = nn.functional.cross_entropy(outputs, task.data.valid.targets[:40], reduction="none").numpy()
    found = inference.validate(tried, rows, SINGLE, task.network.loss)["valid_loss"]
    assert found == pytest.approx(np.average(losses, weights=task.data.valid.weights[:40]), rel=1e-5)
    assert found != pytest.approx(losses.mean(), rel=1e-3)


def test_predictions_are_means_over_models_and_tta():
    tta = (TTA("as is"), TTA("tripled", lambda x: 3 * x))
    rows = torch.ones(4, 2)
    assert torch.equal(predictor([nn.Identity(), nn.Identity()], tta)._average(rows)[0], 2 * rows)


class Counted(nn.Module):
    """Returns an output with rows and one without; `passes` records the number of rows of every pass."""

    def __init__(self):
        super().__init__()
        self.passes = []

    def forward(self, inputs):
        self.passes.append(len(inputs["x"]))
        return {"y": 2 * inputs["x"], "temperature": torch.tensor(3.0)}


def test_a_card_predicts_all_tta_of_one_shape_in_one_pass():
    """`joins_tta`, forced here on a CPU: the same predictions from a single pass, unless shapes differ."""
    rows = {"x": torch.arange(24.0).reshape(4, 6)}
    flip = TTA("flip", lambda tree: {"x": tree["x"].flip(1)}, lambda p: p.flip(1))
    shorter = TTA("shorter", lambda tree: {"x": tree["x"][:, :3]}, lambda p: torch.cat((p, p), 1))
    for tta, passes in (((TTA("as is"), flip), [8]), ((TTA("as is"), shorter), [4, 4])):
        model = Counted()
        task = toy.changed(toy.made(), predict=lambda outputs: outputs["y"] * outputs["temperature"])
        one = Predictor([model], task, tta, Config(precision="fp32"), 8, torch.device("cpu"))
        alone = one._average(rows)[0]
        assert one.joins_tta is False and model.passes == [4, 4]
        one.joins_tta, model.passes = True, []
        assert torch.equal(one._average(rows)[0], alone) and model.passes == passes


def test_what_the_sample_taught_is_a_sample_whatever_it_predicts():
    toy_train("one")
    Path("real").mkdir()
    toy.write_demo(Path("real"))
    for old in Path("submissions/toy").iterdir():
        old.unlink()
    predict_again("--run", "one", "--data", "real")
    assert [file.name for file in sorted(Path("submissions/toy").iterdir())] == ["one-demo.csv", "one-demo.json"]
    assert '"demo": true' in Path("submissions/toy/one-demo.json").read_text()


def test_without_a_name_the_newest_finished_run_predicts(capsys):
    toy_train("one")
    toy_train("two", seed=1)
    (toy_train("three", seed=2) / "result.json").unlink()
    predict_again()
    assert capsys.readouterr().out.strip().splitlines()[-1] == "submission: submissions/toy/two-demo.csv"


def test_runs_of_other_test_rows_are_not_averaged():
    toy_train("one")
    Path("other").mkdir()
    toy.write_demo(Path("other"))
    sample = Path("other/sample_submission.csv")
    sample.write_text(sample.read_text().replace("t", "x"))
    train(toy.TOY, toy.RECIPES["default"], "default", "other", "two")
    with pytest.raises(UserError, match="one and two predict different test rows"):
        predict_again("--run", "one,two")


def test_kept_predictions_have_their_own_ids_whatever_ends_a_prediction(monkeypatch):
    run = toy_train("one")
    Path("turned").mkdir()
    toy.write_demo(Path("turned"))
    head, *rows = Path("turned/sample_submission.csv").read_text().splitlines()
    Path("turned/sample_submission.csv").write_text("\n".join([head, *reversed(rows)]) + "\n")
    for name in ("test.npy", "test_ids.txt"):
        before = {file: (run / file).read_bytes() for file in ("test.npy", "test_ids.txt")}

        def stopped(draft, file, name=name, original=os.replace):
            if Path(file).name == name:
                raise KeyboardInterrupt
            original(draft, file)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", stopped)
            predict_again("--run", "one", "--data", "turned")
        now = {file: (run / file).read_bytes() for file in before if (run / file).is_file()}
        assert now == before or "test.npy" not in now
        predict_again("--run", "one")
        assert {file: (run / file).read_bytes() for file in before} == before


def test_predictions_of_other_data_are_not_kept_for_blends():
    run = toy_train("one")
    before = (run / "test.npy").read_bytes(), Path("submissions/toy/one-demo.csv").read_bytes()
    Path("other").mkdir()
    toy.write_demo(Path("other"))
    Path("other/seed.txt").write_text("2")
    predict_again("--run", "one", "--data", "other")
    assert (run / "test.npy").read_bytes() == before[0]
    assert Path("submissions/toy/one-demo.csv").read_bytes() != before[1]


def test_a_run_that_went_on_with_other_data_keeps_predictions_of_these(monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("common.train.finish", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        toy_train("one")
    Path("data/demo/toy/seed.txt").write_text("2")
    train(toy.TOY, toy.RECIPES["default"], "default", None, "one", insist=True)
    assert len(np.load("runs/toy/one/test.npy")) == toy.TEST_ROWS


def test_the_rows_of_the_csv_stand_in_the_order_of_the_sample(monkeypatch):
    toy_train(fold="0")
    rows = Path("submissions/toy/one-demo.csv").read_text().split()
    Path("data/demo/toy/sample_submission.csv").write_text("\n".join([rows[0], *rows[:0:-1]]))
    whole = toy.build
    named = [f"t{row}" for row in range(toy.TEST_ROWS)]
    monkeypatch.setattr(toy, "build", lambda *given: toy.changed(whole(*given), test_ids=named))
    predict_again("--run", "one")
    assert Path("submissions/toy/one-demo.csv").read_text().split() == [rows[0], *rows[:0:-1]]


def test_what_was_fitted_without_a_network_predicts_no_other_data(monkeypatch):
    whole = toy.build
    fitted = lambda train, valid, fold, run: (np.full((len(valid), 3), 0.3), np.full((30, 3), 0.3))  # noqa: E731
    only = {"network": None, "fit_predict": fitted, "uses": ("ema", "epochs", "batch_size")}
    monkeypatch.setattr(toy, "build", lambda *given: replace(whole(*given), **only))
    toy_train("one")
    Path("other").mkdir()
    toy.write_demo(Path("other"))
    Path("other/seed.txt").write_text("2")
    with pytest.raises(UserError, match="one has no network .*, only predictions for .*data/demo/toy as it was then"):
        predict_again("--run", "one", "--data", "other")


def test_what_was_fitted_on_data_that_are_mended_since_is_fitted_again(monkeypatch, capsys):
    whole = toy.build
    fitted = lambda train, valid, fold, run: (np.full((len(valid), 3), 0.3), np.full((30, 3), 0.3))  # noqa: E731
    only = {"network": None, "fit_predict": fitted, "uses": ("ema", "epochs", "batch_size")}
    refuse = Submission(valid=lambda values: "is refused")
    again = lambda: train(toy.TOY, toy.RECIPES["default"], "default")  # noqa: E731
    monkeypatch.setattr(toy, "build", lambda *given: replace(whole(*given), **only, submission=refuse))
    with pytest.raises(UserError, match="is refused"):
        again()
    Path("data/demo/toy/seed.txt").write_text("2")
    monkeypatch.setattr(toy, "build", lambda *given: replace(whole(*given), **only))
    again()
    assert "001-default-demo is not resumed (data: " in capsys.readouterr().out
    assert [path.name for path in Path("submissions/toy").glob("*.csv")] == ["002-default-demo.csv"]


def test_runs_predict_only_the_outputs_of_their_training(monkeypatch):
    whole, meaning = toy.build, {0: "a, b, c", 1: "b, a, c"}
    monkeypatch.setattr(
        toy, "build", lambda config, *data: toy.changed(whole(config, *data), outputs=meaning[config.seed])
    )
    toy_train("one")
    toy_train("two", seed=1)
    written = sorted(Path("submissions/toy").iterdir())
    with pytest.raises(UserError, match="one and two predict different outputs .a, b, c and b, a, c.: average runs"):
        predict_again("--run", "one,two")
    meaning[0] = "c, b, a"
    with pytest.raises(UserError, match="run one was trained to predict a, b, c, but the data have c, b, a.* DATA="):
        predict_again("--run", "one")
    assert sorted(Path("submissions/toy").iterdir()) == written


def test_the_runs_of_an_average_name_its_file_as_long_as_a_file_system_takes_it(tmp_path):
    def name(*names):
        return predict._name_of([Member(SimpleNamespace(name=one), None, None) for one in names], is_demo=True)

    assert name("001-best", "002-best") == "001-best+002-best-demo"
    long = ["€" * 32 + str(number) for number in range(5)]  # 97 bytes each
    assert name(*long[:2]) == "+".join(long[:2]) + "-demo"
    told = name(*long)
    assert told.startswith(f"{long[0]}+4-more-") and told != name(*long[:4], long[0]) and told == name(*long)
    for path in (tmp_path / f"{told}.csv", tmp_path / f"{name(*long[:2])}.csv"):
        with replacing(path, "w") as stream:  # the draft has the longest name
            stream.write("")


@pytest.mark.parametrize(("higher", "decider"), [(True, "two"), (False, "one")])
def test_the_run_with_the_best_score_decides(higher, decider, capsys):
    """The order in RUN= does not matter, and a run that trained on all rows has no rules of its own."""
    task = SimpleNamespace(metrics=[SimpleNamespace(higher_is_better=higher)])
    members = [
        Member(SimpleNamespace(name=name, result={"score": score, "tuned": {"of": name}}), task, None)
        for name, score in (("one", 0.1), ("two", 0.7), ("three", 0.4))
    ]
    members.append(Member(SimpleNamespace(name="none", result={"score": None, "tuned": {}}), task, None))
    for order in (members, members[::-1]):
        assert predict._rules_of(order)[1] == {"of": decider}
        assert f"decisions by the rules tuned in {decider}" in capsys.readouterr().out


class Unreadable:
    """A dataset whose images `bad` cannot be read."""

    def __init__(self, rows: toy.ToyRows, bad: set[int]):
        self.rows, self.bad = rows, bad

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int):
        if row in self.bad:
            raise BadImage(f"{row}.jpg", "is empty", row)
        return self.rows.inputs[row], self.rows.targets[row]


def lines(name: str) -> list[str]:
    return Path(f"submissions/toy/{name}-demo.csv").read_text().splitlines()[1:]


def fill(monkeypatch, *bad: set[int]) -> None:
    """Fill the sample submission with 2, and make the given test rows of each run in turn unreadable."""
    sample, turns, build = Path("data/demo/toy/sample_submission.csv"), list(bad), toy.build
    sample.write_text(sample.read_text().replace(",0\n", ",2\n"))

    def built(config, raw, log):
        task = build(config, raw, log)
        return toy.changed(task, test=Unreadable(task.data.test, turns.pop(0))) if turns else task

    monkeypatch.setattr(toy, "build", built)


def test_rows_of_unreadable_images_fall_back_when_asked(monkeypatch, capsys):
    toy_train("one")
    whole = lines("one")
    fill(monkeypatch, {0, 17}, {0, 17})
    with pytest.raises(BadImage, match="image 0.jpg .row 0. is empty"):
        predict_again("--run", "one")
    assert lines("one") == whole, "the older file stays"
    predict_again("--run", "one", "--fallback")
    expected = ["t0,2" if row == 0 else "t17,2" if row == 17 else line for row, line in enumerate(whole)]
    assert lines("one") == expected
    assert json.loads(Path("submissions/toy/one-demo.json").read_text())["fallback"] == ["t0", "t17"]
    assert "2 of 30 rows have the sample submission's values (t0, t17" in capsys.readouterr().out


def test_an_id_has_as_many_rows_as_are_decided(monkeypatch):
    """As when an image has one row per kind of damage; an id that falls back has the sample's rows."""
    build = toy.build

    def rows(ids, decisions):
        return [(name, label) for name, last in zip(ids, decisions.tolist(), strict=True) for label in range(last + 1)]

    monkeypatch.setattr(toy, "build", lambda *given: toy.changed(build(*given), rows=rows, several=True))
    toy_train("one")
    whole = lines("one")
    per_id = {name: [line for line in whole if line.startswith(f"{name},")] for name in (f"t{n}" for n in range(30))}
    assert [line for name in per_id for line in per_id[name]] == whole and 30 < len(whole) <= 90
    assert all(found == [f"{name},{label}" for label in range(len(found))] for name, found in per_id.items())
    assert json.loads(Path("submissions/toy/one-demo.json").read_text())["several_rows"] is True
    fill(monkeypatch, {0, 17})
    sample = Path("data/demo/toy/sample_submission.csv")
    sample.write_text(sample.read_text().replace("t17,2\n", "t17,2\nt17,1\n"))
    predict_again("--run", "one", "--fallback")
    per_id |= {"t0": ["t0,2"], "t17": ["t17,2", "t17,1"]}
    assert lines("one") == [line for name in per_id for line in per_id[name]]


def test_runs_that_read_different_images_are_averaged_where_both_can(monkeypatch):
    toy_train("one")
    toy_train("two", seed=1)
    predict_again("--run", "one,two")
    whole = lines("one+two")
    fill(monkeypatch, {3}, {20, 29})
    predict_again("--run", "one,two", "--fallback")
    expected = [f"t{row},2" if row in (3, 20, 29) else line for row, line in enumerate(whole)]
    assert lines("one+two") == expected


def test_what_the_time_does_not_allow_falls_back(monkeypatch, capsys):
    toy_train("one")
    whole = lines("one")
    fill(monkeypatch)
    predict_again("--run", "one", "--budget", "0")
    assert lines("one") == whole[:16] + [f"t{row},2" for row in range(16, 30)], "one batch, then the time is over"
    assert "t16 and all rows after it: the time is up" in capsys.readouterr().out
    predict_again("--run", "one", "--budget", "3600")
    assert lines("one") == whole
    assert "fallback" not in json.loads(Path("submissions/toy/one-demo.json").read_text())


def test_decisions_may_be_made_in_place(monkeypatch):
    whole = toy.build
    apart = toy_train("one")
    again = lambda predictions, tuned: predictions.mul_(2).argmax(1)  # noqa: E731
    monkeypatch.setattr(toy, "build", lambda *given: toy.changed(whole(*given), apply=again))
    before = (apart / "test.npy").read_bytes(), Path("submissions/toy/one-demo.csv").read_bytes()
    predict_again("--run", "one")
    assert ((apart / "test.npy").read_bytes(), Path("submissions/toy/one-demo.csv").read_bytes()) == before
