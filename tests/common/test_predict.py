"""Predictions: means over models and views, batches that do not fit, and which run decides what."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from common import inference, predict
from common.config import Config
from common.errors import UserError
from common.files import replacing
from common.inference import Predictor
from common.predict import Member
from common.task import AS_IS, TTA
from common.train import train
from tests.common import toy
from tests.common.toy_runs import predict_again, toy_train


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Small(nn.Module):
    """Gives back what it gets, and has memory for `limit` rows."""

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


def test_predictions_are_means_over_models_and_tta():
    tta = (TTA("as is"), TTA("tripled", lambda x: 3 * x))
    rows = torch.ones(4, 2)
    assert torch.equal(predictor([nn.Identity(), nn.Identity()], tta)._average(rows)[0], 2 * rows)


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


def test_runs_predict_only_the_outputs_of_their_training(monkeypatch):
    whole, meaning = toy.build, {0: "a, b, c", 1: "b, a, c"}
    monkeypatch.setattr(
        toy, "build", lambda config, *data: toy.changed(whole(config, *data), outputs=meaning[config.seed])
    )
    toy_train("one")
    toy_train("two", seed=1)
    written = sorted(Path("submissions/toy").iterdir())
    with pytest.raises(UserError, match="run one predicts a, b, c, run two b, a, c: average runs of the same data"):
        predict_again("--run", "one,two")
    meaning[0] = "c, b, a"
    with pytest.raises(UserError, match="run one was trained to predict a, b, c, and the data have c, b, a.* DATA="):
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
        with replacing(path.with_suffix(".csv.part"), "w") as stream:  # the longest name on the way there
            stream.write("")


@pytest.mark.parametrize(("higher", "decider"), [(True, "two"), (False, "one")])
def test_the_run_with_the_best_score_decides(higher, decider, capsys):
    task = SimpleNamespace(metrics=[SimpleNamespace(higher_is_better=higher)])
    members = [
        Member(SimpleNamespace(name=name, result={"score": score, "tuned": {"of": name}}), task, None)
        for name, score in (("one", 0.1), ("two", 0.7), ("three", 0.4))
    ]
    assert predict._rules_of(members)[1] == {"of": decider}
    assert f"decided by what {decider} tuned" in capsys.readouterr().out
