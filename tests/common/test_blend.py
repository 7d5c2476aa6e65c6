"""`make blend` on toy runs: it never predicts, scores are nested, bad input is refused, other programs' files join."""

import argparse
import csv
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from common import blend as blending
from common import ensemble, predict, runs_table
from common import run as runs
from common.blend import Kept, as_tree, blend, write_combined
from common.errors import UserError
from common.metrics import accuracy, f_beta, rmse
from tests.common import toy
from tests.common.toy_runs import predict_again, toy_train


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Three runs over all folds, made once; tests write blends beside them."""
    folder = tmp_path_factory.mktemp("blends")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("common.train.write_report", lambda *given: None)
        toy_train("one", fold="all", epochs=2, lr=0.02)
        toy_train("two", fold="all", epochs=3, lr=0.01, seed=4)
        toy_train("weak", fold="all", epochs=1)
        toy_train("single", fold="0", epochs=1)
        toy_train("other", fold="1", epochs=1)
        yield folder


@pytest.fixture(autouse=True)
def _here(home, monkeypatch):
    monkeypatch.chdir(home)

    def forbidden(*given, **options):
        raise AssertionError("a blend predicts nothing")

    monkeypatch.setattr(predict, "predictor_of", forbidden)


def blended(name: str, run: str | None = "one,two,weak", **given) -> tuple[Path, dict]:
    defaults = {"by": "hill", "space": "plain", "per_class": False, "oof": None, "test": None, "data": None}
    blend(toy.TOY, argparse.Namespace(run=run, name=name, **defaults | given))
    folder = Path("runs/toy") / name
    return folder, json.loads((folder / "result.json").read_text())


def kept(name: str, kind: str = "oof") -> tuple[list[str], np.ndarray]:
    folder = Path("runs/toy") / name
    return (folder / f"{kind}_ids.txt").read_text().split(), np.load(folder / f"{kind}.npy")


def truth(ids: list[str]) -> np.ndarray:
    return toy.made().data.valid.targets.numpy()[[int(name[1:]) for name in ids]]


def by_id(name: str, ids: list[str]) -> np.ndarray:
    there, values = kept(name)
    return values[[there.index(one) for one in ids]]


@pytest.mark.parametrize(
    "given",
    [{"by": "hill"}, {"by": "nnls"}, {"by": "optimum", "space": "power:0"}, {"by": "mean", "space": "rank"}],
)
def test_oof_and_test_predictions_are_those_of_a_slow_nested_loop(given):
    folder, result = blended(f"blend-{'-'.join(given.values())}".replace(":", ""), **given)
    ids, oof = kept(folder.name)
    folds, target = np.array([int(name[1:]) % 3 for name in ids]), truth(ids)
    members = np.stack([by_id(name, ids) for name in ("one", "two", "weak")])
    objective = ensemble.maximise(accuracy(), target)
    space = {"power:0": ensemble.power(0), "rank": ensemble.RANKS}.get(given.get("space"), ensemble.PLAIN)
    way = {
        "hill": ensemble.hill_climbing(objective),
        "nnls": ensemble.least_squares(target),
        "optimum": ensemble.optimum(objective, space),
        "mean": ensemble.equal(space),
    }[given["by"]]
    for fold in range(3):
        chosen = way(members[:, folds != fold], np.flatnonzero(folds != fold))
        np.testing.assert_allclose(oof[folds == fold], chosen(members[:, folds == fold]), rtol=1e-5)
    chosen = way(members, np.arange(len(ids)))
    test = np.stack([kept(name, "test")[1] for name in ("one", "two", "weak")])
    np.testing.assert_allclose(kept(folder.name, "test")[1], chosen(test), rtol=1e-5)
    assert list(result["blend"]["weights"].values()) == pytest.approx(chosen.weights.tolist(), abs=1e-6)
    right = oof.argmax(1) == target
    assert result["score"] == pytest.approx(right.mean()) and result["rows"] == 120
    assert result["fold_scores"] == pytest.approx({str(fold): right[folds == fold].mean() for fold in range(3)})
    assert result["tuned"]["rows"] == 120, "postprocessing is tuned again on the blended rows"
    assert result["blend"]["scores"] == pytest.approx(
        {name: (by_id(name, ids).argmax(1) == target).mean() for name in ("one", "two", "weak")}, abs=1e-6
    )


def test_the_submission_the_table_and_predict_know_the_blend(capsys):
    folder, result = blended("known")
    shown = capsys.readouterr().out
    assert "equal weights" in shown and shown.strip().splitlines()[-1] == "submission: submissions/toy/known-demo.csv"
    rows = list(csv.DictReader(open("submissions/toy/known-demo.csv")))
    assert [int(row["label"]) for row in rows] == kept("known", "test")[1].argmax(1).tolist()
    sidecar = json.loads(Path("submissions/toy/known-demo.json").read_text())
    assert sidecar["run"] == "known" and sidecar["score"] == result["score"] and sidecar["recipe"] == "blend"
    before = Path("submissions/toy/known-demo.csv").read_bytes()
    predict_again("--run", "known")
    assert Path("submissions/toy/known-demo.csv").read_bytes() == before
    (line,) = [line for line in runs_table.lines("toy", toy.RECIPES, True) if line.run == "known"]
    assert (line.state, line.folds, line.score) == ("finished", "all", result["score"])
    assert line.settings == "blend: hill, plain, one, two, weak"
    page = (folder / "report.html").read_text()
    assert all(word in page for word in ("Correlation of the predictions", "the blend without it", "Provenance"))


def test_without_names_it_takes_every_comparable_run_and_no_blend():
    _, result = blended("all-of-them", run=None)
    assert set(result["blend"]["scores"]) == {"one", "two", "weak"}


def test_every_class_on_its_own():
    folder, result = blended("classes", by="nnls", per_class=True)
    assert json.loads((folder / "blend.json").read_text())["by"] == "nnls, per class"
    weights = np.array(list(result["blend"]["weights"].values()))
    assert weights.shape == (3, 3) and np.allclose(weights.sum(0), 1) and (weights >= 0).all()
    assert "Weights of every class" in Path("runs/toy/classes/report.html").read_text()


def test_names_that_do_not_fit_are_numbers_as_in_the_report_of_a_run(monkeypatch):
    whole = toy.build
    monkeypatch.setattr(toy, "build", lambda *given: toy.changed(whole(*given), names=("only one",)))
    blended("few-names", by="nnls", per_class=True)
    page = Path("runs/toy/few-names/report.html").read_text()
    assert "Weights of every class" in page and "only one" not in page


def labelled(metric):
    """The toy's build with its classes as labels of 0 and 1."""
    whole = toy.build

    def build(*given):
        task = whole(*given)
        for rows in (task.data.train, task.data.valid):
            rows.targets = torch.nn.functional.one_hot(rows.targets, 3)
        decided = {"apply": lambda predictions, tuned: (predictions > 0.5).long(), "metrics": (metric,)}
        return toy.changed(task, rows=lambda ids, found: zip(ids, found.argmax(1).tolist(), strict=True), **decided)

    return build


def test_every_label_on_its_own_needs_a_metric_of_one(monkeypatch):
    monkeypatch.setattr(toy, "build", labelled(f_beta(1, "macro").on(lambda found, true: (found[:, :2], true[:, :2]))))
    with pytest.raises(UserError, match="--by hill: f1_macro cannot be computed for a single label .* use --by nnls"):
        blended("refused", per_class=True)
    assert not Path("runs/toy/refused").exists()
    assert np.shape(list(blended("labels", by="nnls", per_class=True)[1]["blend"]["weights"].values())) == (3, 3)


def test_ranks_are_kept_as_exactly_as_they_are(monkeypatch):
    whole = toy.build
    for kind in ("float16", "uint8"):
        monkeypatch.setattr(toy, "build", lambda *given: toy.changed(whole(*given), kept=kind))  # noqa: B023
        assert kept(blended(f"ranks-{kind}", by="mean", space="rank")[0].name)[1].dtype == np.float32
        assert kept(blended(f"means-{kind}", by="mean")[0].name)[1].dtype == kind


def test_a_blend_predicts_no_other_data_and_takes_no_flag_of_networks(tmp_path):
    blended("mine")
    before = Path("submissions/toy/mine-demo.csv").read_bytes()
    toy.write_demo(tmp_path)
    (tmp_path / "seed.txt").write_text("2")
    with pytest.raises(UserError, match="mine has no network to predict other data with, only predictions for"):
        predict_again("--run", "mine", "--data", str(tmp_path))
    with pytest.raises(UserError, match="--tta false: this task has no network"):
        predict_again("--run", "mine", "--tta", "false")
    assert Path("submissions/toy/mine-demo.csv").read_bytes() == before


def test_a_stack_is_a_blend_too():
    _, result = blended("stack", by="stack")
    assert "weights" not in result["blend"] and result["score"] > 0.4


def foreign(path: str, ids: list[str], values: np.ndarray) -> str:
    lines = [",".join([name, *map(str, row)]) for name, row in zip(ids, values.tolist(), strict=True)]
    Path(path).write_text("\n".join(["id,a,b,c", *reversed(lines)]) + "\n")
    return path


def test_files_of_other_programs_join_by_their_ids():
    ids, _ = kept("one")
    sure = np.eye(3)[truth(ids)] * 0.9 + 0.05
    test_ids, test = kept("one", "test")
    oof, other = foreign("oracle.csv", ids, sure), foreign("oracle-test.csv", test_ids, test[:, ::-1])
    _, result = blended("foreign", oof=oof, test=other, by="hill")
    assert result["blend"]["weights"]["oracle"] == 1 and result["score"] == 1
    np.testing.assert_allclose(kept("foreign", "test")[1], test[:, ::-1], rtol=1e-6)
    cases = [
        ({"oof": oof}, "--oof and --test"),
        ({"oof": foreign("few.csv", ids[:-1], sure[:-1]), "test": other}, "few.csv has no predictions for 1 of 120"),
        ({"oof": foreign("thin.csv", ids, sure[:, :2]), "test": other}, "3 finite numbers per row"),
        ({"oof": foreign("nan.csv", ids, sure * np.nan), "test": other}, "line 2: .*nan,nan,nan.*finite numbers"),
        ({"oof": "ragged.csv", "test": other}, r"ragged.csv .*line 3: 'r7,1,0,0,1'.* 3 finite numbers per row"),
        ({"oof": "words.csv", "test": other}, "words.csv .*line 2: 'r7,yes,0,0'"),
        ({"oof": "twice.csv", "test": other}, "twice.csv .*line 3: 'r7,0,1,0'.*every id once"),
        ({"oof": "quote.csv", "test": other}, "quote.csv cannot be read"),
    ]
    Path("ragged.csv").write_text("id,a,b,c\nr6,1,0,0\nr7,1,0,0,1\n")
    Path("words.csv").write_text("id,a,b,c\nr7,yes,0,0\n")
    Path("twice.csv").write_text("id,a,b,c\nr7,1,0,0\nr7,0,1,0\n")
    Path("quote.csv").write_text('id,a,b,c\n"r7,1,0,0\n' + "r8,1,0,0\n" * 20_000)  # longer than a cell may be
    for given, words in cases:
        with pytest.raises(UserError, match=words):
            blended("refused", **given)
    assert not Path("runs/toy/refused").exists()


def test_files_of_one_name_are_told_apart_by_their_folders(monkeypatch):
    ids, oof = kept("one")
    test_ids, test = kept("one", "test")
    for name in ("lgbm", "xgb"):
        Path(name).mkdir()
        foreign(f"{name}/one.csv", ids, oof)
        foreign(f"{name}/test.csv", test_ids, test)
    monkeypatch.setenv("HOME", str(Path.cwd()))
    _, result = blended("same", "one", oof="~/lgbm/one.csv,xgb/one.csv", test="~/lgbm/test.csv,xgb/test.csv", by="mean")
    assert set(result["blend"]["weights"]) == {"one", f"{Path.cwd()}/lgbm/one.csv", "xgb/one.csv"}
    with pytest.raises(UserError, match="xgb/one.csv appears twice"):
        blended("refused", "one", oof="xgb/one.csv,xgb/one.csv", test="xgb/test.csv,lgbm/test.csv")
    foreign("negative.csv", ids, oof - 0.5)
    with pytest.raises(UserError, match="power:0 needs predictions of 0 or more, found -0.[345].*: use --space plain"):
        blended("refused", "one", oof="negative.csv", test="xgb/test.csv", space="power:0")
    assert not Path("runs/toy/refused").exists()


def test_ids_that_the_code_names_otherwise_now_are_refused(monkeypatch):
    whole = toy.build
    renamed = lambda *given: toy.changed(whole(*given), ids=[f"r{row}/0" for row in range(120)])  # noqa: E731
    monkeypatch.setattr(toy, "build", renamed)
    with pytest.raises(UserError, match="competitions/toy now makes other folds or ids than one was trained with"):
        blended("refused")
    assert not Path("runs/toy/refused").exists()


def test_runs_that_are_left_out_are_named(request, capsys):
    folder = Path(shutil.copytree("runs/toy/weak", "runs/toy/folds"))
    (folder / "run.json").write_text(
        json.dumps(json.loads((folder / "run.json").read_text()) | {"folds_fingerprint": "x"})
    )
    request.addfinalizer(partial(shutil.rmtree, folder.absolute()))
    blended("without-folds", run=None, by="mean")
    told = capsys.readouterr().out
    assert "; not comparable with " in told and ": folds (other folds)" in told


def test_what_does_not_go_together_is_refused(request):
    for name, change in (("folds", "folds_fingerprint"), ("rows", "data_fingerprint"), ("unpredicted", "")):
        folder = Path(shutil.copytree("runs/toy/weak", f"runs/toy/{name}"))
        (folder / "run.json").write_text(json.dumps(json.loads((folder / "run.json").read_text()) | {change: "x"}))
        request.addfinalizer(partial(shutil.rmtree, folder.absolute()))
    for file in Path("runs/toy/unpredicted").glob("test*"):
        file.unlink()
    cases = [
        ({"run": "one,folds"}, "different folds: .* by --folds and --seed, or make predict COMP=toy"),
        ({"run": "one,rows"}, "different data"),
        ({"run": "one,unpredicted"}, "make predict COMP=toy RUN=unpredicted"),
        ({"run": "single,other"}, "single, other hold out no common rows: blend runs trained with --fold all"),
        ({"run": "one"}, "two runs or more"),
        ({"run": "one,one"}, "twice"),
        ({"by": "nnls", "space": "rank"}, "leave --space out"),
        ({"space": "power:x"}, "power:P"),
        ({"space": "power:nan"}, "power:P"),
        ({"name": "one"}, "one already exists"),
        ({"name": "one,two"}, "bytes without / and ,"),
    ]
    for given, words in cases:
        with pytest.raises(UserError, match=words):
            blended(**{"name": "refused"} | given)
    assert not Path("runs/toy/refused").exists()


def test_damaged_predictions_cost_no_training(request):
    folder = Path(shutil.copytree("runs/toy/weak", "runs/toy/cut"))
    request.addfinalizer(partial(shutil.rmtree, folder.absolute()))
    whole = {name: (folder / name).read_bytes() for name in ("test.npy", "test_ids.txt", "oof.npy", "oof_ids.txt")}
    for name, content in whole.items():
        (folder / name).write_bytes(content[: len(content) // 2])
        remedy = "make predict COMP=toy RUN=" if name.startswith("test") else "delete runs/toy/cut/result.json and"
        with pytest.raises(UserError, match=f"cut/{name} cannot be read .* or {remedy}"):
            blended("refused", "one,cut")
        if name.endswith("npy"):
            (folder / name).unlink()
            with pytest.raises(UserError, match=f"cut has no .*: {remedy}"):
                blended("refused", "one,cut")
        (folder / name).write_bytes(content)


def test_a_blend_that_has_lost_a_file_is_blended_again():
    blended("lost")
    for damage in (Path("runs/toy/lost/test.npy").unlink, partial(Path("runs/toy/lost/result.json").write_text, "{")):
        damage()
        with pytest.raises(UserError, match="delete runs/toy/lost and blend its runs again"):
            predict_again("--run", "lost")
    shutil.rmtree("runs/toy/lost")
    blended("lost")


def test_a_stopped_blend_is_begun_anew_by_its_command_and_never_trained(monkeypatch):
    def stop(*given):
        raise KeyboardInterrupt

    for part in (runs, blending):  # while run.json is written, and while the blend is scored
        with monkeypatch.context() as patch:
            if part is runs:
                patch.setattr(runs.Run, "log", stop)
            patch.setattr(blending, "score_oof", stop)
            with pytest.raises(KeyboardInterrupt):
                blended("stopped")
        assert runs.load("toy", "stopped").is_unfinished_blend
    with pytest.raises(UserError, match="stopped is not finished"):
        runs.finished("toy", "stopped")
    _, result = blended("stopped")
    assert result["score"] == blended("unstopped")[1]["score"]
    with pytest.raises(UserError, match="already exists"):
        blended("stopped", by="mean")


@pytest.mark.parametrize("part", ["_report", "write_submission"])
def test_a_blend_without_its_page_or_submission_is_begun_anew_by_its_command(part, monkeypatch):
    """As after a full disk, whose message says: repeat the same command."""

    def full(*given):
        raise UserError("report.html could not be written: free disk space and repeat the same command")

    name = f"without{part.replace('_', '-')}"
    with monkeypatch.context() as patch:
        patch.setattr(blending, part, full)
        with pytest.raises(UserError, match="repeat the same command"):
            blended(name)
    with monkeypatch.context() as patch:  # a second attempt with other members keeps nothing of the first one's score
        patch.setattr(blending, "write_combined", full)
        with pytest.raises(UserError, match="repeat the same command"):
            blended(name, "one,two")
    assert runs.load("toy", name).result is None
    folder, result = blended(name)
    assert result["blend"]["scores"].keys() == {"one", "two", "weak"}
    assert (folder / "report.html").is_file() and Path(f"submissions/toy/{name}-demo.csv").is_file()


def test_large_predictions_are_combined_block_by_block(monkeypatch):
    whole, first = blended("whole", by="mean")
    monkeypatch.setattr(blending, "BLOCK", 50)
    blocks, second = blended("blocks", by="mean")
    np.testing.assert_array_equal(np.load(whole / "oof.npy"), np.load(blocks / "oof.npy"))
    monkeypatch.setattr(blending, "LARGEST", 3 * 3 * 30)
    _, third = blended("sampled", by="mean")
    assert (first["blend"]["rows"], third["blend"]["rows"]) == (120, 30)
    assert third["score"] == second["score"] == first["score"], "the score is that of all rows"


def test_a_tree_is_combined_leaf_by_leaf(tmp_path):
    random = np.random.default_rng(0)
    trees = [{"b": random.random((6, 2, 2)), "a": random.random((6, 3))} for _ in range(2)]
    members = [Kept(f"m{n}", "", tree, list("uvwxyz"), np.arange(6)) for n, tree in enumerate(trees)]
    fitted = ensemble.Weighted(np.array([0.25, 0.75]))
    parts = [(np.array([4, 1]), fitted), (np.array([0]), fitted)]
    write_combined(tmp_path, "oof", members, parts, ensemble.PLAIN, {"a": "float32", "b": "float64"})
    for leaf in "ab":
        expected = 0.25 * trees[0][leaf] + 0.75 * trees[1][leaf]
        np.testing.assert_allclose(np.load(tmp_path / f"oof.{leaf}.npy"), expected[[4, 1, 0]], rtol=1e-6)
    back = as_tree(members[0].rows(slice(None)), members[0].shapes)
    assert all(torch.allclose(back[leaf].double(), torch.from_numpy(trees[0][leaf])) for leaf in "ab")


@pytest.mark.parametrize(("shape", "wanted"), [((90, 1), (90,)), ((90,), (90, 1))])
@pytest.mark.parametrize("by", ["nnls", "stack"])
def test_a_column_and_its_numbers_are_the_same_targets(shape, wanted, by):
    """As in metrics, predictions [m, 1] match targets [m], which are then not read as class numbers."""
    random = np.random.default_rng(0)
    truth = random.normal(size=90).astype(np.float32)
    members = np.stack([truth + random.normal(0, off, 90).astype(np.float32) for off in (0.1, 1)])
    given = argparse.Namespace(by=by, per_class=False)

    def predicted(members, targets):
        way = blending._way(given, None, torch.from_numpy(targets), members, rmse(), ensemble.PLAIN)
        return way(members, np.arange(90))(members)

    found = predicted(members.reshape(2, *shape), truth.reshape(wanted))
    assert found.shape == shape
    np.testing.assert_array_equal(found.ravel(), predicted(members, truth))
    assert rmse().score(found, truth) < 0.11


@pytest.mark.parametrize("kind", ["oof", "test"])
def test_predictions_that_are_not_finite_are_told_with_their_run_and_row(home, kind):
    """The messages were about shapes, and about float16."""
    shutil.copytree(home / "runs/toy/two", home / f"runs/toy/nan-{kind}", dirs_exist_ok=True)
    file = home / f"runs/toy/nan-{kind}/{kind}.npy"
    values = np.load(file)
    values[5, 0] = np.nan
    np.save(file, values)
    name = kept("two", kind)[0][5]
    with pytest.raises(UserError, match=f"nan-{kind}: the predictions of {name} are NaN or infinite.*leave it out"):
        blended(f"of-nan-{kind}", f"one,nan-{kind}")
    shutil.rmtree(file.parent)  # other tests blend every run
