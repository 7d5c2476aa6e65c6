"""The score of a run whose rules are tuned: each part of the rows is decided by rules tuned on the others."""

import json
from functools import cache

import numpy as np
import pytest
import torch

from common import scoring
from tests.common import toy
from tests.common.toy_runs import toy_train


@cache
def labels() -> np.ndarray:
    """Of the toy's rows; call it in a temporary folder, where its demo data are written."""
    return toy.made().data.train.targets.numpy()


def weighted(predictions: np.ndarray, rows: np.ndarray) -> dict:
    """The factors of the classes, of a coarse grid, that give these rows the most right answers."""
    grid = [np.array([1.0, b, c]) for b in (0.25, 0.5, 1, 2, 4) for c in (0.25, 0.5, 1, 2, 4)]
    right = [np.mean((predictions * factors).argmax(1) == labels()[rows]) for factors in grid]
    return {"factors": grid[int(np.argmax(right))]}


def decided(predictions: torch.Tensor, tuned: dict) -> torch.Tensor:
    return (predictions * torch.as_tensor(tuned.get("factors", [1.0, 1.0, 1.0]))).argmax(1)


@pytest.fixture
def run(tmp_path, monkeypatch, no_page):
    """Trains the toy with this `tune`; returns result.json, the predictions [m, 3], their rows and the log."""
    monkeypatch.chdir(tmp_path)
    build = toy.build

    def trained(tune, **changes):
        made = {"tune": tune, "apply": decided}
        monkeypatch.setattr(toy, "build", lambda *given: toy.changed(build(*given), **made))
        folder = toy_train(**changes)
        rows = [int(name[1:]) for name in (folder / "oof_ids.txt").read_text().split()]
        result = json.loads((folder / "result.json").read_text())
        return result, np.load(folder / "oof.npy"), np.array(rows), (folder / "log.txt").read_text()

    return trained


def expected(predictions: np.ndarray, rows: np.ndarray, part: np.ndarray) -> float:
    """A slow loop: the accuracy of all rows, those of a part by rules tuned on the others."""
    right = []
    for number in np.unique(part):
        rest, own = part != number, part == number
        factors = weighted(predictions[rest], rows[rest])["factors"]
        right.extend((predictions[own] * factors).argmax(1) == labels()[rows[own]])
    return np.mean(right)


def test_a_fold_is_scored_by_rules_tuned_on_the_other_folds(run):
    result, predictions, rows, log = run(weighted, fold="all", epochs=1)
    wanted = expected(predictions, rows, rows % 3)
    same = np.mean((predictions * weighted(predictions, rows)["factors"]).argmax(1) == labels()[rows])
    assert result["score"] == result["tuned"]["score"] == pytest.approx(wanted) and wanted < same
    assert result["metrics"]["accuracy"] == pytest.approx(same)
    assert result["errors"]["accuracy"] == pytest.approx(np.sqrt(wanted * (1 - wanted) / len(rows)), rel=0.35)
    assert f"accuracy {wanted:.5f}" in log and "with rules tuned on other rows" in log


def test_of_a_single_fold_each_fifth_is_scored_by_rules_of_the_others(run):
    sizes = []
    result, predictions, rows, _ = run(lambda p, r: sizes.append(len(r)) or weighted(p, r), fold="0", epochs=1)
    assert sizes == [40, 32, 32, 32, 32, 32]
    part = np.random.default_rng(scoring.keyed_seed(0, scoring.PARTS)).permutation(40) % scoring.PARTS
    assert result["score"] == pytest.approx(expected(predictions, rows, part))


def test_a_score_of_its_own_stays(run):
    calls = []
    result, *_ = run(lambda p, r: calls.append(1) or {"score": 0.25}, fold="0", epochs=1)
    assert result["score"] == 0.25 and len(calls) == 1


def test_rules_that_need_all_rows_leave_the_score_on_the_same_rows(run, monkeypatch):
    def tune(predictions, rows):
        assert len(rows) == 120, "needs all rows"
        return weighted(predictions, rows)

    result, predictions, rows, log = run(tune, fold="all", epochs=1)
    assert "no score on other rows: tuning on 80 of 120 rows fails (needs all rows" in log
    assert result["score"] == result["metrics"]["accuracy"] and "with rules tuned on the same rows" in log
    assert "score" not in result["tuned"]
    sparse = run(lambda p, r: weighted(p, r) if len(r) == 120 else {"factors": []}, run="two", fold="all", epochs=1)
    assert "score" not in sparse[0]["tuned"] and "no score on other rows" in sparse[3], "rules that do not fit"
    monkeypatch.setattr(scoring, "LARGEST_COPY", 100)
    assert "score" not in run(weighted, run="large", fold="all", epochs=1)[0]["tuned"]
