"""The front door: what make prints and which command it runs, without installing or training anything."""

import os
import re
import shlex
import subprocess
from pathlib import Path

from common.competition import names as competitions

ROOT = Path(__file__).parents[1]


def make(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["make", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)


def command(*words: str) -> str:
    """The last command that make would run."""
    return make("--dry-run", *words).stdout.strip().splitlines()[-1]


def test_help_names_every_target_and_competition():
    shown = make("help").stdout
    targets = re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {"train", "predict", "test", "data", "submit", "board", "kernel", "check", "bench", "help"} <= set(targets)
    for target in targets:
        assert len(re.findall(rf"^  {target} +\S", shown, flags=re.MULTILINE)) == 1, target
    assert all(name in shown for name in competitions())


def test_the_variables_become_flags():
    line = command("train", "COMP=clouds", "RECIPE=best", "DATA=/a b", "FOLD=all", "RUN=x", "ARGS=--epochs 3 --lr 1e-3")
    assert re.sub(" +", " ", line) == (
        ".venv/bin/python -m common train clouds --data='/a b' --recipe='best' --run='x' --fold='all' "
        "--epochs 3 --lr 1e-3"
    )


def test_a_message_reaches_the_program_as_it_was_written():
    message = 'the "best" of 5\', `as is` $HOME; (really)'
    line = command("submit", "COMP=clouds", "MSG=" + message.replace("$", "$$"))
    assert shlex.split(line)[-1] == "--msg=" + message


def test_several_processes_start_under_torchrun():
    line = command("train", "COMP=clouds", "NPROC=2")
    assert "-m torch.distributed.run --standalone --nproc-per-node 2 -m -- common train clouds" in line
    line = command("train", "COMP=clouds", "NPROC=4", "NNODES=2", "MASTER=host:29500")
    assert "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint host:29500 --nproc-per-node 4" in line


def test_a_missing_or_unknown_competition_is_named_before_anything_is_installed():
    missing, unknown = make("train"), make("train", "COMP=digit_recogniser")
    assert missing.returncode and unknown.returncode
    assert "COMP= is missing" in missing.stderr and all(name in missing.stderr for name in competitions())
    assert "Did you mean digit_recognizer?" in unknown.stderr
    assert "install" not in missing.stdout + unknown.stdout


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
        line = ["make", "test", "PYTHON=echo"]  # what would install prints its arguments
        return subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)

    refused, accepted = run(2_100_000), run(9_000_000)
    assert refused.returncode and "2 GB are free" in refused.stdout and "takes 7 GB" in refused.stdout
    assert "-m venv" not in refused.stdout and "installing" not in refused.stdout
    assert "-m venv .venv" in accepted.stdout
