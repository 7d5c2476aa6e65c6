"""The Makefile: what make prints and which commands it runs, without installing or training anything."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common import competition as competitions
from common import front

ROOT = Path(__file__).parents[1]


def make(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["make", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_help_names_every_target_and_competition():
    shown = make("help").stdout
    targets = re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {"train", "predict", "test", "data", "submit", "board", "kernel", "check", "bench", "help"} <= set(targets)
    for target in targets:
        assert len(re.findall(rf"^  {target} +\S", shown, flags=re.MULTILINE)) == 1, target
    for name in competitions.names():
        (line,) = re.findall(rf"^  {name} +(.*)", shown, flags=re.MULTILINE)
        assert line.split() == list(competitions.load(name).recipes)


@pytest.fixture
def run(tmp_path):
    """Run make in a copy whose `python -m common` only records its arguments; returns these, or make's error line."""
    common = tmp_path / "common"
    common.mkdir()
    for file in (ROOT / "common").iterdir():
        if file.name not in ("__main__.py", "__pycache__"):
            (common / file.name).symlink_to(file)
    (common / "__main__.py").write_text("import json, sys\njson.dump(sys.argv[1:], open('words.json', 'w'))\n")
    for name in ("Makefile", "requirements.txt", "competitions", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / ".venv" / ".installed").touch()

    def run(*words: str) -> list[str] | str:
        line = ["make", *words, f"PYTHON={sys.executable}"]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        if done.returncode:
            (told,) = [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]
            return told
        return json.loads((tmp_path / "words.json").read_text())

    return run


def test_the_variables_become_flags(run):
    found = run("train", "COMP=clouds", "RECIPE=best", "DATA=/a b", "FOLD=all", "RUN=x", "ARGS=--epochs 3 --lr '1e-3'")
    assert found == ["train", "clouds", "--data=/a b", "--recipe=best", "--run=x", "--fold=all",
                     "--epochs", "3", "--lr", "1e-3"]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        'the "best" of 5\', `touch owned` $HOME $$ $(touch owned) $(shell touch owned) ${x}; touch owned # no',
        "two\nlines, a\ttab\\",
        "price$100",
        "';touch owned;'",
        "größe 🎉",
    ],
)
def test_values_reach_the_program_as_they_were_typed(run, tmp_path, text):
    assert run("submit", "COMP=clouds", f"MSG={text}") == ["submit", "clouds", f"--msg={text}"]
    assert run("train", "COMP=clouds", f"DATA={text}")[2:] == [f"--data={text}"]
    for words in ((f"COMP={text}",), ("COMP=clouds", f"NPROC={text}"), ("COMP=clouds", f"EPOCHS={text}")):
        assert isinstance(told := run("train", *words), str) and told.startswith("error: "), told
    assert not (tmp_path / "owned").exists()


def test_arguments_run_nothing(run, tmp_path):
    assert run("train", "COMP=clouds", "ARGS=--run 'a b'; touch owned $(touch owned) *")[2:] == [
        "--run", "a b;", "touch", "owned", "$(touch", "owned)", "*"]  # fmt: skip
    assert "No closing quotation" in run("train", "COMP=clouds", "ARGS=--run it's")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("train COMP=clouds EPOCHS=1", 'make train COMP=clouds ARGS="--epochs 1"'),
        ("train COMP=clouds MICRO_BATCH=4", 'ARGS="--micro-batch 4"'),
        ("train COMP=clouds RECIPES=best", "Did you mean RECIPE?"),
        ("train COMP=clouds PY=x", "PY=x: make has no such variable"),
        ("backtest COMP=clouds", "make backtest COMP=kdd_air_quality"),
        ("predict COMP=clouds NPROC=2", "NPROC=2: make predict takes only COMP DATA"),
        ("test COMP=clouds", "COMP=clouds: make test takes only ARGS"),
        ("train COMP=clouds NPROC=two", "NPROC=two: expected a number"),
        ("train COMP=clouds NPROC=0", "NPROC=0: expected a number"),
        ("train COMP=clouds NNODES=2", "NNODES=2 MASTER=host:29500"),
        ("bench BENCH=nothing", "BENCH=nothing: expected one of "),
    ],
)
def test_what_a_target_does_not_take_is_refused(run, words, told):
    assert told in run(*words.split())


def test_several_processes_start_under_torchrun():
    given = {"COMP": "clouds", "FOLD": "all", "ARGS": "--lr 1"}
    torchrun = ["-m", "torch.distributed.run"]
    program = ["-m", "--", "common", "train", "clouds", "--fold=all", "--lr", "1"]
    for nproc in ("2", "auto", "gpu"):
        expected = [*torchrun, "--standalone", "--nproc-per-node", nproc, *program]
        assert front.command("train", given | {"NPROC": nproc}) == expected
    assert front.command("train", given | {"NPROC": "4", "NNODES": "2", "MASTER": "host:29500"}) == [
        *torchrun, "--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "host:29500",
        "--nproc-per-node", "4", *program]  # fmt: skip


def test_the_tools_have_commands_of_their_own():
    assert front.command("test", {"ARGS": "-k 'a and b'"}) == ["-m", "pytest", "-k", "a and b"]
    assert front.command("test", {"ARGS": "-n 3 -x"}) == ["-m", "pytest", "-n", "3", "-x"]
    assert front.command("bench", {"BENCH": "engine"}) == ["-m", "benchmarks.engine"]
    assert front.command("lint", {}) == ["-m", "ruff", "check", "."]


@pytest.mark.parametrize(("cores", "processes"), [(1, 0), (2, 2), (64, 4)])
def test_the_whole_suite_runs_on_the_cores(monkeypatch, cores, processes):
    monkeypatch.setattr(front, "cores", lambda: cores)
    several = ["-n", str(processes), "--dist", "worksteal"] if processes else []
    assert front.command("test", {}) == front.command("test", {"ARGS": " "}) == ["-m", "pytest", *several]


def test_a_target_is_one_line(run, tmp_path):
    text = (ROOT / "Makefile").read_text()
    (tmp_path / "Makefile").unlink()
    (tmp_path / "Makefile").write_text(text.replace("board: ##", "digits: ## of nothing\nboard: ##"))
    assert "'digits' is not a verb" in run("digits", "COMP=clouds")


def test_a_missing_or_unknown_competition_is_named_before_anything_is_installed(run, tmp_path):
    (tmp_path / ".venv" / ".installed").unlink()
    missing, unknown = run("train"), run("train", "COMP=digit_recogniser")
    assert "COMP= is missing" in missing and all(name in missing for name in competitions.names())
    assert "Did you mean digit_recognizer?" in unknown and not (tmp_path / ".venv" / ".installed").exists()


def test_an_old_python_gets_one_clear_line(tmp_path):
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.10" && exit 0\nexit 1\n')
    old.chmod(0o755)
    refused = make("train", "COMP=digit_recognizer", f"PYTHON={old}")
    assert refused.returncode
    assert "Python 3.11 or newer is needed" in refused.stdout + refused.stderr
    assert "Python 3.8.10" in refused.stdout + refused.stderr


def test_a_full_disk_is_named_before_anything_is_installed(tmp_path):
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    (tmp_path / "requirements.txt").write_text("")
    tools = tmp_path / "tools"
    tools.mkdir()
    df = tools / "df"
    df.write_text("#!/bin/sh\necho Filesystem 1024-blocks Used Available Capacity Mounted\necho disk 9 2 $FREE 99% /\n")
    df.chmod(0o755)

    def run(free: int) -> subprocess.CompletedProcess:
        environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "FREE": str(free)}
        line = ["make", "test", "PYTHON=echo"]  # echo prints the commands that would install
        return subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)

    refused, accepted = run(2_100_000), run(9_000_000)
    assert refused.returncode and "2 GB are free" in refused.stdout and "takes 7 GB" in refused.stdout
    assert "-m venv" not in refused.stdout and "installing" not in refused.stdout
    assert "-m venv .venv" in accepted.stdout
