"""The table of runs, and the choice of the best one: by scores on common rows only, with the reason."""

import csv
import fcntl
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common import run as runs
from common import runs_table
from common.errors import UserError
from common.kaggle import ledger
from tests.common import toy
from tests.common.toy_runs import toy_train


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch, no_page):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs_table, "_known_folds", {})


def made(name, score=None, by_fold=(), error=0.01, fold="0", folds="same", created="1", **config) -> Path:
    """Write the files of a run that the table reads; `by_fold` is {fold: score}, and each of 3 folds has ten rows."""
    folder = Path("runs/toy") / name
    folder.mkdir(parents=True)
    facts = {"format": runs.FORMAT, "run": name, "competition": "toy", "recipe": "default", "demo": False, "data": "d"}
    facts |= {"data_fingerprint": "f", "folds_fingerprint": folds, "created": created}
    (folder / "run.json").write_text(json.dumps(facts))
    values = {key: list(v) if isinstance(v, tuple) else v for key, v in vars(toy.RECIPES["default"]).items()}
    (folder / "config.json").write_text(json.dumps(values | {"fold": fold} | config))
    (folder / "folds.csv").write_text("id,fold\n" + "".join(f"r{row},{row % 3}\n" for row in range(30)) + "x,-1\n")
    if score is not None:
        by_fold = dict(by_fold)
        result = {"monitor": "accuracy", "score": score, "metrics": {"accuracy": score}, "rows": 10 * len(by_fold)}
        result |= {"errors": {"accuracy": error} if error else {}, "fold_scores": by_fold, "tuned": {}}
        result |= {"mean": float(np.mean(list(by_fold.values()))), "std": 0.1, "training_seconds": 3.0}
        result |= {"folds": [{"fold": 0, "memory_gib": 1.5}, {"fold": 1, "memory_gib": 2.5}]}
        (folder / "result.json").write_text(json.dumps(result))
    return folder


ALL = {"0": 0.80, "1": 0.81, "2": 0.88}


def test_a_lucky_fold_does_not_beat_the_average_over_all():
    made("all", 0.83, ALL, fold="all")
    made("lucky", 0.89, {"2": 0.89}, fold="2")  # on fold 2 just 0.01 above `all`, though far above 0.83
    name, why = runs_table.best_run("toy", ["lucky", "all"], True)
    assert name == "all" and "0.83000 ± 0.01000 on 30 rows" in why
    assert "common rows (fold 2) it has 0.89000 and all 0.88000, not better" in why
    made("great", 0.95, {"2": 0.95}, fold="2")
    name, why = runs_table.best_run("toy", ["lucky", "all", "great"], True)
    assert name == "great" and "0.95000 and all 0.88000, better by 2" in why


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"folds": "others"}, "in other folds than those of all"), ({"error": None}, "without a standard error")],
)
def test_what_cannot_be_compared_does_not_replace_a_whole_run(changes, word):
    made("all", 0.83, ALL, fold="all")
    made("one", 0.99, {"2": 0.99}, fold="2", **changes)
    name, why = runs_table.best_run("toy", ["one", "all"], True)
    assert name == "all" and word in why


def test_runs_of_other_rows_are_named():
    made("fold0", 0.8, {"0": 0.8}, fold="0")
    made("fold2", 0.7, {"2": 0.7}, fold="2")
    name, why = runs_table.best_run("toy", ["fold0", "fold2"], True)
    assert name == "fold0" and "fold2 has 0.70000 ± 0.01000, but on 10 rows only, and none in common with fold0" in why
    made("all", 0.83, ALL, fold="all")
    made("two", 0.82, {"0": 0.8, "1": 0.8}, fold="all")
    name, why = runs_table.best_run("toy", ["all", "two"], True)
    assert name == "all" and "two has 0.82000 ± 0.01000 on 20 rows, so the two scores are not on the same rows" in why


def test_every_fold_of_a_part_of_the_data_does_not_beat_more_rows():
    made("part", 0.4, {"0": 0.4}, fold="all", folds="part")
    made("whole", 0.9, {"0": 0.9, "1": 0.9}, fold="0", folds="whole")
    name, why = runs_table.best_run("toy", ["part", "whole"], True)
    assert name == "whole" and "part has 0.40000 ± 0.01000, but on 10 rows only, in other folds than" in why


def test_lower_is_better_where_the_competition_says_so_and_runs_without_scores_are_passed_over():
    made("a", 0.3, {"0": 0.3, "1": 0.3, "2": 0.3}, fold="all")
    made("b", 0.2, {"0": 0.2, "1": 0.2, "2": 0.2}, fold="all")
    made("c")
    assert runs_table.best_run("toy", ["a", "b", "c", "gone"], False)[0] == "b"
    assert runs_table.best_run("toy", ["a", "b", "c", "gone"], True)[0] == "a"
    assert runs_table.best_run("toy", ["c", "gone"], True) is None


def test_the_only_fold_there_is_counts_as_every_fold():
    """As in a time split: fold 0 is held out, and all other rows always train."""
    folder = made("split", 0.7, {"0": 0.7}, fold="0", folds="time")
    (folder / "folds.csv").write_text("id,fold\na,0\nb,-1\n")
    (line,) = runs_table.lines("toy", toy.RECIPES, True)
    assert line.folds == "all"


def test_the_table_has_scores_settings_boards_and_marks_what_is_not_finished():
    made("good", 0.9, ALL, fold="all", lr=0.5, created="1")
    made("bad", 0.1, {"0": 0.1}, workers=7, created="2")
    made("halted", created="3")
    busy = made("busy", created="4")
    pending = made("pending", 0.5, {"1": 0.5}, fold="1", created="5")
    (pending / "unfinished").touch()
    (pending / "metrics.csv").write_text("fold,epoch,samples_per_second\n1,1,10\n1,2,20\n")
    ledger.put("toy", ledger.Row("2026-01-01T00:00:00", "f.csv", run="good", public="0.77", ref="9"))
    with open(busy / "lock", "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        found = runs_table.lines("toy", toy.RECIPES, True)
    assert [line.run for line in found] == ["good", "pending", "bad", "busy", "halted"]
    assert [line.state for line in found] == ["finished", "not submitted", "finished", "training", "stopped"]
    good, pending, bad = found[:3]
    assert (good.public, good.folds, good.rows, good.memory_gib) == (0.77, "all", 30, 2.5)
    assert "lr 0.5" in good.settings and "fold all" in good.settings
    assert bad.settings == "default" and bad.folds == "1", "workers change nothing that is computed"
    assert pending.per_second == 15


def test_cells_that_are_no_number_are_one_line_or_no_score():
    folder = made("good", 0.9, ALL, fold="all", created="1")
    ledger.put("toy", ledger.Row("2026-01-01T00:00:00", "f.csv", run="good", public="n/a", private="0.7", ref="9"))
    (line,) = runs_table.lines("toy", toy.RECIPES, True)
    assert (line.public, line.private) == (None, 0.7)
    (folder / "metrics.csv").write_text("fold,epoch,samples_per_second\n1,1,1O\n")
    with pytest.raises(UserError, match="good/metrics.csv cannot be read .*'1O'.*: restore .* copy, or delete it,"):
        runs_table.lines("toy", toy.RECIPES, True)


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("result.json", {"monitor": ["x"]}, "monitor is .* expected a text"),
        ("result.json", {"errors": "0.01"}, "errors is '0.01', expected numbers"),
        ("result.json", {"fold_scores": {"0": "0.8"}}, "fold_scores is .*, expected numbers"),
        ("result.json", {"rows": None}, "rows is 'None', expected a whole number"),
        ("result.json", {"folds": [1]}, "folds is .*, expected a list of objects"),
        ("result.json", None, "Expecting value"),
        ("run.json", {"created": 7}, "created is '7', expected a text"),
        ("run.json", {"folds_fingerprint": []}, "folds_fingerprint is .*, expected a text"),
        ("run.json", None, "Expecting value"),
        ("config.json", None, "Expecting value"),
        ("metrics.csv", None, "'1O'"),
    ],
)
def test_a_damaged_run_is_named_and_hides_no_other(capsys, name, change, told):
    made("good", 0.8, ALL, fold="all", created="1")
    file = made("bad", 0.9, ALL, fold="all", created="2") / name
    if name == "metrics.csv":
        file.write_text("fold,epoch,samples_per_second\n1,1,1O\n")
    else:  # None: emptied by a full disk
        file.write_text("" if change is None else json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=f"runs/toy/bad/{name} cannot be read .*{told}.*: restore a complete copy, or"):
        runs_table.show(toy.TOY)
    shown = capsys.readouterr().out
    assert "good: CV 0.80000" in shown and "damaged" in shown and "runs: runs/toy/runs.html" in shown
    if name != "metrics.csv":  # which the choice does not need
        with pytest.raises(UserError, match=f"runs/toy/bad/{name} cannot be read"):
            runs_table.best_run("toy", ["good", "bad"], True)


def test_runs_of_the_kit_show_up_on_the_terminal_in_the_csv_and_on_the_page(capsys):
    toy_train("one", fold="all", epochs=1)
    toy_train("two", epochs=1, lr=0.01)
    capsys.readouterr()
    runs_table.show(toy.TOY)
    shown = capsys.readouterr().out
    assert "lr 0.01" in shown and "one: CV" in shown and shown.splitlines()[-1].startswith("runs: runs/toy/runs.html")
    table = {row["run"]: row for row in csv.DictReader(open("runs/toy/runs.csv"))}
    result = json.loads(Path("runs/toy/one/result.json").read_text())
    assert float(table["one"]["score"]) == result["score"] and table["one"]["folds"] == "all"
    assert float(table["two"]["std"] or 0) == 0 and table["two"]["rows"] == "40"
    page = Path("runs/toy/runs.html").read_text()
    assert "data:image/png" in page and "<td>two</td>" in page


def test_no_runs_is_said_with_the_next_command():
    with pytest.raises(UserError, match="make train COMP=toy"):
        runs_table.show(toy.TOY)


def test_the_table_imports_no_torch():
    code = "import sys; import common.runs_table, common.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
