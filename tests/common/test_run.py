"""Runs are numbered, resumed by the same command only, and never trained by two processes at once."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from common import run as runs
from common.config import Config
from common.errors import UserError

PROVENANCE = {"competition": "toy", "recipe": "fast", "demo": True, "data": "/data", "data_fingerprint": "f"}
PROVENANCE["folds_fingerprint"] = "f"


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def open_run(name=None, config=Config(), **provenance):  # noqa: B008
    run = runs.open_run("toy", name, config, PROVENANCE | provenance)
    run._lock[0].close()  # as if the process had ended
    return run


def test_an_unfinished_run_goes_on_and_a_finished_one_is_followed_by_the_next():
    first = open_run()
    assert first.name == "001-fast-demo" and open_run().name == first.name
    first.write_result({"score": 1.0, "monitor": "accuracy"})
    assert open_run().name == first.name, "not predicted yet"
    first.finish()
    second = open_run()
    assert second.name == "002-fast-demo" and open_run(config=Config(workers=0)).name == second.name
    assert open_run(config=Config(lr=0.1)).name == "003-fast-demo"
    assert open_run(data_fingerprint="g", demo=False).name == "004-fast"
    assert [run.name[:3] for run in runs.all_runs("toy")] == ["001", "002", "003", "004"]


def test_a_named_run_resumes_with_its_own_config_only():
    assert open_run("mine").name == "mine" == open_run("mine").name
    with pytest.raises(UserError, match="lr: 0.001 -> 0.1; seed: 0 -> 3|seed: 0 -> 3; lr: 0.001 -> 0.1"):
        open_run("mine", replace(Config(), lr=0.1, seed=3))
    with pytest.raises(UserError, match="data: /data -> /data, with other contents.*RESUME=1"):
        open_run("mine", data_fingerprint="g")
    with pytest.raises(UserError, match="folds: their rows have changed since the run began"):
        open_run("mine", folds_fingerprint="h")


def test_a_run_goes_on_with_the_same_code_and_data_only(capsys):
    first = open_run(code={"common": "1", "competitions/toy": "1"})
    capsys.readouterr()
    second = open_run(code={"common": "1", "competitions/toy": "2"})
    assert second.name == "002-fast-demo"
    assert f"{first.path} is not resumed (code of competitions/toy/ changed since)" in capsys.readouterr().out
    changed = {"code": {"common": "3", "competitions/toy": "3"}, "data_fingerprint": "g"}
    insisting = runs.open_run("toy", None, Config(), PROVENANCE | changed, insist=True)
    insisting._lock[0].close()
    assert insisting.name == second.name
    with pytest.raises(UserError, match="code of common/ changed since.*RESUME=1"):
        open_run(first.name, **changed)
    first.write_result({"score": 1.0, "monitor": "accuracy"})
    with pytest.raises(UserError, match="started differently .data: .*: repeat its own command"):
        runs.open_run("toy", first.name, Config(), PROVENANCE | changed, insist=True)
    first.fold_folder(0).mkdir()
    (first.fold_folder(0) / "model.pt").write_bytes(b"")
    assert open_run(first.name, **changed).name == first.name, "what is trained is only predicted"


def test_what_a_run_goes_on_with_is_in_its_file_and_needs_no_second_insisting():
    then, new = {"commit": "a", "folds_fingerprint": "x", "outputs": "cat"}, {"data_fingerprint": "g", "commit": "b"}
    run = open_run("mine", **then)
    runs.open_run("toy", "mine", Config(), PROVENANCE | then | new, insist=True)._lock[0].close()
    kept = json.loads((run.path / "run.json").read_text())
    assert kept == run.provenance | new | {"before": [kept["before"][0] | {"data_fingerprint": "f", "commit": "a"}]}
    assert open_run("mine", **then | new).name == "mine"
    for other, told in (
        ({"folds_fingerprint": "y"}, "folds: their rows have changed"),
        ({"outputs": "dog"}, "outputs: cat -> dog"),
    ):
        with pytest.raises(UserError, match=told):
            runs.open_run("toy", "mine", Config(), PROVENANCE | then | {"data_fingerprint": "h"} | other, insist=True)


def test_what_was_trained_on_demo_data_predicts_no_real_data():
    run = open_run()
    run.write_result({"score": 1.0, "monitor": "accuracy"})
    run.fold_folder(0).mkdir()
    (run.fold_folder(0) / "model.pt").write_bytes(b"")
    assert open_run().name == run.name
    assert open_run(data_fingerprint="g", demo=False).name == "002-fast"
    with pytest.raises(UserError, match="demo data: True -> False"):
        open_run(run.name, data_fingerprint="g", demo=False)


def test_the_code_of_a_run_is_that_of_the_core_and_of_its_competition(tmp_path, monkeypatch):
    for place in ("common/a.py", "competitions/toy/b.py", "competitions/other/c.py"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text("1")
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "common" / "run.py"))
    before = runs.code_fingerprint("toy")
    (tmp_path / "competitions/other/c.py").write_text("2")
    assert runs.code_fingerprint("toy") == before
    (tmp_path / "competitions/toy/b.py").write_text("2")
    assert runs.code_fingerprint("toy") == before | {
        "competitions/toy": runs.code_fingerprint("toy")["competitions/toy"]
    }
    assert runs.code_fingerprint("toy") != before


def test_the_newest_run_is_the_one_made_last_whatever_became_of_its_files():
    old, new = open_run("b"), open_run("a")
    os.utime(old.path / "run.json")
    assert [run.name for run in runs.all_runs("toy")] == ["b", "a"] and new.name == "a"


def test_runs_of_other_versions_are_left_alone():
    run = open_run("mine")
    facts = {name: value for name, value in run.provenance.items() if name != "format"}
    (run.path / "run.json").write_text(json.dumps(facts))
    assert runs.all_runs("toy") == []
    with pytest.raises(UserError, match="another version of the kit .format 1, this one reads 2."):
        runs.load("toy", "mine")


@pytest.mark.parametrize("name", ["a/b", "a,b", "", "..", "x" * 101, "\N{CLOUD}" * 34, "a\nb", "caf\udce9"])
def test_names_that_no_other_command_could_use(name):
    with pytest.raises(UserError, match="bytes without"):
        open_run(name)
    assert not Path("runs").exists()


def test_a_damaged_file_of_a_run_is_named():
    run = open_run("mine")
    for name in ("config.json", "run.json", "result.json"):
        (run.path / name).write_text('{"half')
    for use in (lambda: run.config(Config), lambda: run.result, lambda: runs.load("toy", "mine")):
        with pytest.raises(UserError, match=r"runs/toy/mine/\w+.json cannot be read"):
            use()


def test_models_of_unknown_settings_are_not_taken_for_those_of_a_new_run():
    run = open_run("mine")
    run.fold_folder(0).mkdir()
    (run.fold_folder(0) / "model.pt").write_bytes(b"weights")
    (run.path / "run.json").unlink()
    with pytest.raises(UserError, match=r"runs/toy/mine has models but no run.json: restore it"):
        open_run("mine", lr=0.5)


def test_a_damaged_result_costs_no_training():
    run = open_run("mine")
    (run.path / "result.json").write_text('{"half')
    with pytest.raises(UserError, match=r"or delete runs/toy/mine/result.json and repeat its command"):
        runs.finished("toy", "mine")
    (run.path / "blend.json").write_text("{}")
    with pytest.raises(UserError, match=r"or delete runs/toy/mine and blend its runs again"):
        runs.finished("toy", "mine")


def test_folders_that_cannot_be_made_are_named(monkeypatch):
    def forbidden(*given, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", forbidden)
        with pytest.raises(UserError, match="runs/toy could not be written .Permission denied.*writable"):
            open_run()
    run = open_run("mine")
    monkeypatch.setattr("builtins.open", forbidden)
    with pytest.raises(UserError, match="lock could not be written"):
        run.lock()


def test_a_name_that_is_no_folder_is_refused_at_once(tmp_path):
    """A link to a missing disk, or a file: otherwise the search for a free number would never end."""
    Path("runs/toy").mkdir(parents=True)
    Path("runs/toy/moved").symlink_to(tmp_path / "gone")
    Path("runs/toy/runs.csv").write_text("")
    for name in ("moved", "runs.csv"):
        with pytest.raises(UserError, match=f"runs/toy/{name} cannot be a folder"):
            open_run(name)
    Path("runs/other").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="runs/other cannot be a folder"):
        runs.new_run("other", None, Config(), PROVENANCE)


def test_what_another_process_has_made_meanwhile_is_not_made_again():
    def other():
        open_run("mine", Config(lr=0.25)).write_result({"score": 1.0, "monitor": "accuracy"})

    with pytest.raises(UserError, match="another process has just made runs/toy/mine"):
        runs.open_run("toy", "mine", Config(), PROVENANCE, before_new=other)
    assert runs.load("toy", "mine").config(Config).lr == 0.25


def test_the_config_and_origin_are_read_back():
    run = open_run("mine", Config(lr=0.25))
    again = runs.load("toy", "mine")
    assert again.config(Config) == Config(lr=0.25) and again.provenance == run.provenance and again.result is None
    with pytest.raises(UserError, match="RUN=other.*runs: mine"):
        runs.load("toy", "other")


def test_a_second_process_is_kept_out():
    code = (
        "from common import run; from common.config import Config; import sys; "
        f"held = run.open_run('toy', 'mine', Config(), {PROVENANCE!r}); print('locked', flush=True); sys.stdin.read()"
    )
    root = Path(runs.__file__).parents[1]
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(root), "PATH": ""},
    )
    assert "run runs/toy/mine" in child.stdout.readline() and child.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match="trained by another process"):
        runs.open_run("toy", "mine", Config(), PROVENANCE)
    child.kill()
    child.wait()
    assert open_run("mine").name == "mine"


def test_the_commit_says_when_the_code_differs_from_it(tmp_path):
    assert runs.commit() == "unknown"
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "code.py").write_text("1")
    for words in (["init", "--quiet"], ["add", "code.py"], ["commit", "--quiet", "--message", "one"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert runs.commit() == head[:12]
    (tmp_path / "code.py").write_text("2")
    assert runs.commit() == head[:12] + "+changes"


def test_a_run_belongs_to_the_competition_whose_folder_it_is_in():
    open_run("mine")
    Path("runs/toy").rename("runs/renamed")
    assert runs.load("renamed", "mine").provenance["competition"] == "renamed"
