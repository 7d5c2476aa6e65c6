"""`make tune`: search spaces, trials as processes, pruning, resumed searches, and the command of the best trial."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest

from common import competition, tune
from common.config import with_flags
from common.errors import UserError
from common.files import locked
from common.flags import Parser, add_flags
from tests.common import toy

# A trial without torch: its score grows by epoch to 1 - |lr - 0.03|. It records how often it was started.
TRAINER = """
import json, pathlib, sys, time
words = dict(word.removeprefix("--").split("=") for word in sys.argv[1:])
folder = pathlib.Path("runs/toy") / words["run"]
(folder / "fold-0").mkdir(parents=True, exist_ok=True)
(folder / "begun").open("a").write("x")
lr = float(words["lr"])
if lr > 0.5:
    sys.exit("error: the loss is no longer finite")
lines = ["fold,epoch,valid_loss,accuracy,memory_gib"]
for epoch in range(int(words["epochs"])):
    lines.append(f"0,{epoch + 1},1.0,{(1 - abs(lr - 0.03)) * (epoch + 1) / 10},0.5")
    (folder / "fold-0" / "metrics.csv").write_text("\\n".join(lines) + "\\n")
    time.sleep(float(words["tick"]))
(folder / "result.json").write_text(json.dumps({"score": 1 - abs(lr - 0.03)}))
"""
# The kit's own command line, with the toy as its only competition.
KIT = """
import sys
from common import cli, competition
from tests.common import toy
competition.load, competition.names, toy.Toy.verbs = lambda name: toy.TOY, lambda: ["toy"], {}
sys.exit(cli.main(sys.argv[1:]))
"""
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tune, "SECONDS", 0.02)


@pytest.fixture
def trainer(monkeypatch):
    Path("trainer.py").write_text(TRAINER)

    def command(competition, flags, run):
        return [sys.executable, "trainer.py", *flags, f"--run={run}"]

    monkeypatch.setattr(tune, "command", command)


def search(space: str, trials: int, *given: str) -> None:
    tune.tune(toy.TOY, toy.RECIPES["default"], "default", space, trials, ["--epochs=2", "--tick=0", *given])


def study() -> optuna.Study:
    (name,) = optuna.get_all_study_names("sqlite:///runs/toy/tune.db")
    return optuna.load_study(study_name=name, storage="sqlite:///runs/toy/tune.db")


def test_spaces_have_the_types_of_the_settings():
    found = tune.space_of("lr=1e-4:1e-2:log,rows=30:90,optimizer=adamw|sgd,tta=true|false,--clip-norm=0:1",
                          toy.RECIPES["default"])  # fmt: skip
    assert found == {
        "lr": optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True),
        "rows": optuna.distributions.IntDistribution(30, 90),
        "optimizer": optuna.distributions.CategoricalDistribution(["adamw", "sgd"]),
        "tta": optuna.distributions.CategoricalDistribution(["true", "false"]),
        "clip_norm": optuna.distributions.FloatDistribution(0, 1),
    }
    sizes = tune.space_of("size=64,64|96,64, lr=0.1:1", competition.load("clouds").recipes["default"])
    assert sizes["size"].choices == ("64,64", "96,64") and "lr" in sizes, "a comma may be in a value"
    flags = tune.flags_of({"lr": 0.00123456789, "rows": 31, "clip_norm": 0.5, "tta": "false"})
    assert flags == ["--lr=0.00123457", "--rows=31", "--clip-norm=0.5", "--tta=false"]
    parser = Parser()
    add_flags(parser, toy.RECIPES["default"])
    config = with_flags(toy.RECIPES["default"], parser.parse_args(flags))
    assert (config.lr, config.rows, config.clip_norm, config.tta) == (0.00123457, 31, 0.5, False)


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ("lrr=0:1", "Did you mean lr"),
        ("lr=0:1", "above 0"),
        ("lr=0.1:1,--lr=0.01:1", "lr appears twice"),
        ("lr=0.1:0.01", "low below high"),
        ("fold=0|1", "another fold are scored on other rows"),
        ("lr=0.1:1,folds=3:5", "leave folds out"),
        ("seed=1|2", "leave seed out"),
        ("lr=0.1", "low:high of a number"),
        ("clip_norm=0:1:log", "above 0 for :log"),
        ("optimizer=adamw|adamm", "did you mean adam"),
        ("optimizer=adam:adamw", "choices"),
        ("epochs=1:x", "--epochs x"),
        ("epochs=1,2", "--epochs 1,2"),
        ("lr=0.1:1,epochs", "--lr 1,epochs"),
    ],
)
def test_a_space_that_no_flag_takes_is_refused_before_anything_starts(space, words):
    with pytest.raises(UserError, match=words):
        search(space, 3)
    assert not Path("runs/toy/tune.db").exists()


def test_a_search_counts_goes_on_and_ends_with_the_best_command(trainer, capsys):
    search("lr=0.01:0.1:log", 3)
    first = study().trials
    search("lr=0.01:0.1:log", 6)
    trials = study().trials
    assert len(trials) == 6 and [one.params for one in trials[:3]] == [one.params for one in first]
    assert len({one.params["lr"] for one in trials}) == 6, "what goes on does not draw the same again"
    assert sorted(one.name for one in Path("runs/toy").glob("tune-*-0*")) == [
        f"tune-{study().study_name}-{n:03d}" for n in range(6)
    ]
    best = max(trials, key=lambda one: one.value)
    assert best.value == pytest.approx(1 - abs(float(f"{best.params['lr']:.6g}") - 0.03))
    shown = capsys.readouterr().out
    words = shlex.split(shown.strip().splitlines()[-1].partition("make train ")[2])
    assert words[0] == "COMP=toy" and f"--lr={best.params['lr']:.6g}" in words[1] and "--epochs=2" in words[1]
    page = Path(f"runs/toy/tune-{study().study_name}/report.html").read_text()
    assert "importance: lr 1.00" in shown and "data:image/png" in page and "tune-" in page


def test_a_search_is_known_by_its_settings_and_its_data(monkeypatch):
    names = []
    monkeypatch.setattr(tune, "_search", lambda study, *_: names.append(study.study_name))
    monkeypatch.setattr(tune, "_tell", lambda *_: None)
    usual = toy.RECIPES["default"]
    for recipe, given in (
        (usual, ["--folds", "3", "--epochs", "7"]),
        (usual, ["--folds", "7", "--epochs", "3"]),
        (replace(usual, ema=0.5), ["--folds", "3", "--epochs", "7"]),  # the recipe was edited
        (usual, ["--epochs", "7", "--folds", "3"]),
    ):
        parser = Parser()
        add_flags(parser, recipe)
        config = with_flags(recipe, parser.parse_args(given))
        tune.tune(toy.TOY, config, "default", "lr=0.01:0.1", 2, given)
    Path("data/toy").mkdir(parents=True)
    toy.write_demo(Path("data/toy"))
    for seed in ("2", "3"):
        Path("data/toy/seed.txt").write_text(seed)
        tune.tune(toy.TOY, config, "default", "lr=0.01:0.1", 2, given)
    assert names[0] == names[3] and len(set(names)) == 5, "demo data and other contents have trials of their own"


def test_pruning_ends_the_process_and_keeps_its_run(trainer, monkeypatch):
    monkeypatch.setattr(tune, "UNPRUNED", 1)
    space = "lr=0.03|0.4"
    given = ("--epochs=8", "--tick=0.2")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    first = [{"lr": "0.03"}, {"lr": "0.4"}]
    original = optuna.create_study

    def create(**options):
        found = original(**options)
        if not found.trials:
            for params in first:
                found.enqueue_trial(params)
        return found

    monkeypatch.setattr(optuna, "create_study", create)
    search(space, 2, *given)
    good, bad = study().trials
    assert (good.state.name, bad.state.name) == ("COMPLETE", "PRUNED")
    folder = Path("runs/toy") / bad.user_attrs["run"]
    assert 2 <= len(bad.intermediate_values) < 8 and not (folder / "result.json").exists()


def test_a_stopped_search_goes_on_with_the_run_of_the_stopped_trial(trainer):
    code = (
        "import signal, sys; from common import tune; from tests.common import toy; tune.SECONDS = 0.02\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell may have set it to be ignored
        "tune.command = lambda competition, flags, run: [sys.executable, 'trainer.py', *flags, f'--run={run}']\n"
        "tune.tune(toy.TOY, toy.RECIPES['default'], 'default', 'lr=0.01:0.1', 2, ['--epochs=2', '--tick=TICK'])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, "-c", code.replace("TICK", "60")], env=environment)
    deadline = time.monotonic() + 120
    while not (begun := list(Path("runs/toy").glob("tune-*/begun"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    child.wait(60)
    assert [one.state.name for one in study().trials] == ["RUNNING"]
    text = Path("trainer.py").read_text()
    Path("trainer.py").write_text(text.replace('float(words["tick"])', "0"))
    again = subprocess.run([sys.executable, "-c", code.replace("TICK", "60")], env=environment, timeout=120)
    assert again.returncode == 0 and begun[0].read_text() == "xx", "the same run, begun twice"
    ended = {one.user_attrs["run"]: one.state.name for one in study().trials}
    assert len(ended) == 2 and set(ended.values()) == {"COMPLETE"}


def test_failures_are_told_and_three_in_a_row_end_the_search(trainer, capsys):
    with pytest.raises(UserError, match="3 trials in a row failed.*no longer finite"):
        search("lr=0.6:0.9", 10)
    assert [one.state.name for one in study().trials] == ["FAIL"] * 3


def test_trials_are_runs_of_the_kit_without_submissions(monkeypatch, tmp_path, capsys):
    Path("kit.py").write_text(KIT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def command(competition, flags, run):
        return [sys.executable, "kit.py", "train", competition, *flags, f"--run={run}", "--no-submission"]

    monkeypatch.setattr(tune, "command", command)
    tune.tune(toy.TOY, toy.RECIPES["default"], "default", "lr=0.01:0.1,optimizer=adamw|sgd", 1, ["--epochs=1"])
    (trial,) = study().trials
    folder = Path("runs/toy") / trial.user_attrs["run"]
    result = json.loads((folder / "result.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    assert trial.value == result["score"] and list(trial.intermediate_values) in ([], [0])
    assert config["optimizer"] == trial.params["optimizer"] and config["lr"] == float(f"{trial.params['lr']:.6g}")
    assert not Path("submissions").exists() and not (folder / "unfinished").exists()


def test_a_search_that_is_terminated_ends_its_trial(trainer, monkeypatch):
    """A trial left behind would hold the lock of the run that the next search resumes."""
    children, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *of, **how: children.append(popen(*of, **how)) or children[-1])
    monkeypatch.setattr(tune, "time", SimpleNamespace(sleep=lambda seconds: os.kill(os.getpid(), signal.SIGTERM)))
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *of: heard.append(of) or pytest.fail("the search goes on"))
    try:
        with pytest.raises(KeyboardInterrupt):
            search("lr=0.01:0.1", 1, "--tick=60")
        assert children[0].returncode == -signal.SIGTERM and not heard
        with pytest.raises(pytest.fail.Exception):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_trial_that_a_killed_search_has_left_is_waited_for(trainer, monkeypatch):
    def killed(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tune, "_one", killed)
        with pytest.raises(KeyboardInterrupt):
            search("lr=0.01:0.1", 1)
    (trial,) = study().trials
    with locked(Path("runs/toy") / trial.user_attrs["run"] / "lock"):
        with pytest.raises(UserError, match="-000 is still being trained by a process of a killed search"):
            search("lr=0.01:0.1", 1)
        assert [one.state.name for one in study().trials] == ["RUNNING"]
    search("lr=0.01:0.1", 1)
    assert [one.state.name for one in study().trials] == ["FAIL", "COMPLETE"]


def test_a_damaged_database_is_a_line(trainer):
    Path("runs/toy").mkdir(parents=True)
    Path("runs/toy/tune.db").write_text("no database" * 99)
    with pytest.raises(UserError, match=r"runs/toy/tune.db cannot be read .*not a database.*or delete it"):
        search("lr=0.01:0.1", 1)


def test_curves_are_in_the_order_of_the_folds(tmp_path):
    for fold in range(12):
        (tmp_path / f"fold-{fold}").mkdir()
        (tmp_path / f"fold-{fold}" / "metrics.csv").write_text(f"valid_loss,accuracy\n0.5,{fold}\n")
    assert list(tune._curve(tmp_path)) == list(range(12))
