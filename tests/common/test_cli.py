"""The command line before any training: unknown verbs, competitions, recipes and flags, and bad values."""

import builtins
import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common import cli
from common import competition as competitions
from common.__main__ import settle

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian", "clouds"], ["'trian' is not a verb", "Did you mean train?"]),
        (["trian"], ["'trian' is not a verb", "predict", "submit"]),
        (
            ["backtest", "clouds"],
            ["COMP=clouds has no backtest: only kdd_air_quality has", "make backtest COMP=kdd_air_quality"],
        ),
        (["predict"], ["COMP= is missing", "make predict COMP=clouds"]),
        (
            ["submit", "digit_recogniser"],
            ["COMP=digit_recogniser is not", "Did you mean digit_recognizer?", "COMP=digit_recognizer"],
        ),
        (["train", "clouds", "--recipe", "smal"], ["RECIPE=smal", "small", "Did you mean small?"]),
        (["train", "clouds", "--recipe"], ["python -m common train clouds --help"]),
        (["train", "digit_recognizer", "--epoch", "1"], ["unknown flag --epoch", "Did you mean --epochs?"]),
        (["predict", "digit_recognizer", "--lr", "1"], ["unknown flag --lr"]),  # it would change nothing
        (["train", "digit_recognizer", "--kernel", "4"], ["--kernel 4", "odd"]),
        (["train", "digit_recognizer", "--width", "0"], ["--width 0", "at least 1"]),
        (["train", "digit_recognizer", "--dropout", "2"], ["--dropout 2", "0 to 1"]),
        (["train", "digit_recognizer", "--rotation", "nan"], ["--rotation nan"]),
        (["train", "digit_recognizer", "--lr", "inf"], ["--lr inf", "above 0"]),
        (["train", "digit_recognizer", "--save-every", "nan"], ["--save-every nan"]),
        (["train", "digit_recognizer", "--threads", "100000"], ["--threads 100000"]),
        (["train", "digit_recognizer", "--patience", "2"], ["--patience 2", "--keep best"]),
        (["train", "digit_recognizer", "--optimizer", "adamm"], ["adamm", "adamw", "did you mean adam?"]),
        (["train", "digit_recognizer", "--device", "gpu"], ["--device gpu", "auto"]),
        (["train", "digit_recognizer", "--run", "x" * 300], ["RUN='xxx", "at most 100"]),
        (["predict", "digit_recognizer", "--run", "x" * 300], ["RUN='xxx", "at most 100"]),
        (["train", "clouds", "--encoder-lr", "-1"], ["--encoder-lr -1", "at least 0"]),
        (["train", "clouds", "--size", "32,64"], ["--size 32,64", "at least 64"]),
        (["train", "clouds", "--bce", "nan"], ["--bce nan"]),
        (["train", "kdd_air_quality", "--jobs", "0"], ["--jobs 0", "-1 for one per core"]),
        (["train", "kdd_air_quality", "--lr", "0"], ["--lr 0", "above 0"]),
        (["board", "digit_recognizer", "--data", "x"], ["unknown flag --data"]),
        (["runs", "digit_recognizer", "--data", "x"], ["unknown flag --data"]),
        (["submit", "digit_recognizer", "--wait", "inf"], ["--wait", "'inf'"]),
        (
            ["kernel", "digit_recognizer", "--hours", "inf"],
            ["--hours", "'inf'", "python -m common kernel digit_recognizer --help"],
        ),
        (["train", "digit_recognizer", "--data"], ["--data", "python -m common train digit_recognizer --help"]),
        (["kernel", "digit_recognizer", "--hours", "0.4"], ["--hours 0.4", "15 minutes", "--hours 0.5 or more"]),
        (["notebook", "digit_recognizer", "--limit", "infh"], ["--limit", "'infh'"]),
    ],
)
def test_a_mistake_is_one_line_with_the_value_and_leaves_no_run(argv, words, capsys, tmp_path):
    assert cli.main(argv) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1 and all(word in told for word in words), told
    assert not list(tmp_path.rglob("run.json"))


def test_a_broken_competition_stops_no_other(tmp_path, monkeypatch):
    """The broken competition has half a config.py, as while somebody edits it."""
    for name in ("digit_recognizer", "lynx"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.py").write_text("SOURCE = (")
    monkeypatch.setattr(competitions, "COMPETITIONS", tmp_path)
    assert cli.verb_of("runs", "digit_recognizer") is cli.runs


def test_without_the_packages_the_next_command_is_named(monkeypatch, capsys):
    real = builtins.__import__

    def absent(name, *given, **options):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return real(name, *given, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    monkeypatch.delitem(cli.sys.modules, "common.train", raising=False)
    assert cli.main(["train", "digit_recognizer"]) == 1
    assert "has no torch: use make" in capsys.readouterr().err


def test_predict_shows_only_what_a_prediction_can_change(capsys):
    with pytest.raises(SystemExit):
        cli.main(["predict", "digit_recognizer", "--help"])
    shown = capsys.readouterr().out
    assert "--tta" in shown and "as the run was trained" in shown and "--lr" not in shown and "--width" not in shown


def test_an_ascii_terminal_and_a_notebooks_backend_do_not_end_a_run():
    """Neither may fail where the score is printed, or where its page is drawn: after the training."""
    code = "from common.__main__ import settle; settle(); print('1 ± 2'); import matplotlib; print(matplotlib.__name__)"
    env = os.environ | {"PYTHONIOENCODING": "ascii", "MPLBACKEND": "module://not_installed.backend"}
    kit = Path(cli.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=kit, env=env, capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["1 \\xb1 2", "matplotlib"], done.stderr


def test_streams_that_cannot_be_set_are_left_alone(monkeypatch):
    """Those of a notebook, as in `%run -m common train clouds`."""
    for name in ("MPLBACKEND", "OPENCV_LOG_LEVEL"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", None)
    settle()


def test_ctrl_c_is_130_and_one_line(monkeypatch, capsys):
    def stopped(competition, argv):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, "train", stopped)
    assert cli.main(["train", "clouds"]) == 130
    assert capsys.readouterr().err.count("\n") == 1


def helped(stdout, both):
    command = [sys.executable, "-m", "common", "--help"]
    return subprocess.run(command, cwd=ROOT, stdout=stdout, stderr=stdout if both else subprocess.PIPE, text=True)


@pytest.mark.parametrize("both", [False, True])
def test_a_reader_that_has_read_enough_is_no_error(both):
    """As with `| head`; stderr may go to the same place."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        ended = helped(pipe, both)
    assert ended.returncode == 141 and not ended.stderr


@pytest.mark.parametrize("both", [False, True])
def test_an_output_that_takes_no_more_is_one_line(both):
    """As with a log on a full disk; stderr may go to the same place."""
    with open("/dev/full", "w") as full:
        ended = helped(full, both)
    assert ended.returncode == 1
    assert both or (ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1), ended.stderr


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp', '/var/tmp']"),
        OSError(errno.ENOSPC, "No space left on device", "runs/clouds/001/fold-0"),
    ],
)
def test_a_disk_that_is_full_for_a_library_is_one_line(error, monkeypatch, capsys):
    def full(competition, argv):
        raise error

    monkeypatch.setitem(cli.VERBS, "train", full)
    assert cli.main(["train", "clouds"]) == 1
    told = capsys.readouterr().err
    assert told == f"error: {error}: free disk space, or set TMPDIR to a folder on another disk, and repeat the same " \
        "command\n"  # fmt: skip


def test_demo_data_take_the_recipe_that_is_made_for_them(tmp_path):
    """A new user's first command should not run a recipe that takes hours on real data."""
    for name in competitions.names():
        recipes = competitions.load(name).recipes
        expected = "demo" if "demo" in recipes else "default"
        assert cli.default_recipe(name, recipes, ["--epochs", "1"]) == expected
        assert cli.default_recipe(name, recipes, [f"--data=data/demo/{name}"]) == expected
        assert cli.default_recipe(name, recipes, ["--data", "elsewhere"]) == "default"
        (tmp_path / "data" / name).mkdir(parents=True)
        assert cli.default_recipe(name, recipes, []) == expected, "an empty folder holds no data"
        (tmp_path / "data" / name / "train.csv").write_text("")
        assert cli.default_recipe(name, recipes, []) == "default"
    with_demo = [name for name in competitions.names() if "demo" in competitions.load(name).recipes]
    assert {"clouds", "inclusive_images", "kdd_air_quality"} <= set(with_demo)


def test_lists_of_a_flag_that_is_given_twice_are_joined(monkeypatch):
    """argparse would take the last one and drop the others in silence."""
    seen = {}
    monkeypatch.setattr("common.tune.tune", lambda *given: seen.update(search=given[3]))
    monkeypatch.setattr("common.blend.blend", lambda competition, given: seen.update(oof=given.oof, test=given.test))
    assert cli.main(["tune", "clouds", "--search", "lr=1e-4:1e-2", "--search=epochs=1:3,swa=0:0.5"]) == 0
    assert cli.main(["blend", "clouds", "--oof", "a.csv", "--oof", "b.csv", "--test=c.csv"]) == 0
    assert seen == {"search": "lr=1e-4:1e-2,epochs=1:3,swa=0:0.5", "oof": "a.csv,b.csv", "test": "c.csv"}
