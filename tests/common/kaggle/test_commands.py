"""Run each make target once from an empty folder: the variables of its command line reach the right option."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common.kaggle.kernel.notebook import OUTPUT
from tests.common.kaggle.server import archive

ROOT = Path(__file__).parents[3]
COMPETITION, CREATED = "digit_recognizer", "2026-01-02T00:00:00Z"
FILES = {
    "train.csv": b"label,pixel0\n1,0\n",
    "test.csv": b"pixel0\n0\n",
    "sample_submission.csv": b"ImageId,Label\n1,0\n2,0\n",
}
GOOD = "ImageId,Label\n1,7\n2,3\n"


@pytest.fixture
def make(kaggle, tmp_path):
    """Run a target in a folder of links to the kit's files, with its own data/ and submissions/."""
    if shutil.which("make") is None:
        pytest.skip("no make here")
    here = tmp_path / "checkout"
    here.mkdir()
    for name in ("Makefile", "common", "competitions", "requirements.txt"):
        (here / name).symlink_to(ROOT / name)
    (here / ".venv").symlink_to(sys.prefix)
    kaggle.files = dict(FILES)
    kaggle.listing = {name: len(content) for name, content in FILES.items()}
    kaggle.archive = archive(FILES)

    def run(target: str, *variables: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["make", "-o", ".venv/.installed", target, f"COMP={COMPETITION}", f"PYTHON={sys.executable}", *variables],
            cwd=here,
            env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run, here


def test_data_submit_and_board_by_make(kaggle, make):
    run, here = make
    done = run("data")
    assert done.returncode == 0, done.stderr
    assert {file.name for file in (here / "data" / COMPETITION).iterdir()} == {*FILES, ".manifest.json"}
    asked = len(kaggle.asked)
    again = run("data")
    assert again.returncode == 0 and "is complete" in again.stdout and len(kaggle.asked) == asked

    home = here / "submissions" / COMPETITION
    home.mkdir(parents=True)
    (home / "001-best.csv").write_text(GOOD)
    provenance = {"run": "001-best", "recipe": "best", "score": 0.99, "monitor": "accuracy", "demo": False,
              "sha256": hashlib.sha256(GOOD.encode()).hexdigest(), "created": CREATED}  # fmt: skip
    (home / "001-best.json").write_text(json.dumps(provenance))
    done = run("submit", "RUN=001-best", "MSG=two words, $$ and 'quotes'")
    assert done.returncode == 0, done.stderr
    assert kaggle.uploads == [GOOD.encode()] and "public 0.9, private 0.8" in done.stdout
    refused = run("submit")
    assert refused.returncode == 2 and "was sent before" in refused.stderr and "Traceback" not in refused.stderr
    assert run("submit", "FORCE=1", "FILE=submissions/digit_recognizer/001-best.csv").returncode == 0
    assert len(kaggle.uploads) == 2

    done = run("board")
    assert done.returncode == 0, done.stderr
    assert "001-best" in done.stdout and (home / "board.png").is_file()


def test_kernel_by_make(kaggle, make):
    run, here = make
    kaggle.kernel_files = {OUTPUT: archive({f"submissions/{COMPETITION}/7.csv": GOOD})}
    kaggle.kernel_states = ["COMPLETE"]
    wrong = run("kernel", "ARGS=--epoch 3")
    assert wrong.returncode == 2 and "--epochs" in wrong.stderr and kaggle.asked == []
    done = run("kernel", "ARGS=--epochs 3")
    assert done.returncode == 0, done.stderr
    assert "train digit_recognizer --epochs 3" in done.stdout
    assert (here / "submissions" / COMPETITION / "7.csv").read_text() == GOOD


def test_offline_by_make(make, monkeypatch):
    run, here = make
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    done = run("data")
    assert done.returncode == 2 and "cannot be reached" in done.stderr and "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert not (here / "data" / COMPETITION).exists()
