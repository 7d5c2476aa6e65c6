"""Every competition folder, end to end on its demo data and by the real command: killed, resumed and compared.

The uninterrupted command runs in a new interpreter. Commands that are killed, resumed or predict again are forks of a
process that has loaded the libraries (tests/forks.py), which start in a tenth of the time. The folders are discovered,
not listed, so a new competition is tested from its first commit.
"""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from common.competition import names
from common.fold import MACHINE_COLUMNS
from tests.forks import Forks

ROOT = Path(__file__).parents[1]
LIMIT_SECONDS = 240


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "common", *words]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(folder: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*words), cwd=folder, env=environment(), capture_output=True, text=True, timeout=LIMIT_SECONDS
    )


def run_fork(forks: Forks, folder: Path, *words: str) -> subprocess.CompletedProcess:
    return forks.run(command(*words), cwd=folder, env=environment(), timeout=LIMIT_SECONDS)


def train(competition: str, *flags: str) -> list[str]:
    return ["train", competition, "--recipe", "smoke", "--workers", "0", "--run", "smoke", *flags]


def killed(forks: Forks, folder: Path, words: list[str], when) -> bool:
    """Start the command and SIGKILL it as soon as `when()` is true; returns False if it ended before."""
    with open(os.devnull, "w") as nothing:
        child = forks.Popen(command(*words), cwd=folder, env=environment(), stdout=nothing, stderr=nothing)
    deadline = time.monotonic() + LIMIT_SECONDS
    while child.poll() is None and time.monotonic() < deadline:
        if when():
            break
        time.sleep(0.005)
    child.kill()
    return child.wait() == -signal.SIGKILL


def metrics(home: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without MACHINE_COLUMNS, as times; [] for a competition without a network."""
    if not (home / "metrics.csv").is_file():
        return []
    with open(home / "metrics.csv", newline="") as stream:
        return [{k: v for k, v in row.items() if k not in MACHINE_COLUMNS} for row in csv.DictReader(stream)]


def outputs(folder: Path, competition: str) -> tuple:
    """Everything that must not depend on an interruption: weights, metrics, tuned values and the CSV."""
    home = folder / "runs" / competition / "smoke"
    models = {
        str(file.relative_to(home)): torch.load(file, weights_only=True)["model"]
        for file in sorted(home.rglob("model.pt"))
    }
    predictions = {str(file.relative_to(home)): file.read_bytes() for file in home.rglob("oof*.npy")}
    assert models or predictions
    result = json.loads((home / "result.json").read_text())
    kept = {name: result[name] for name in ("score", "metrics", "tuned", "rows")} | predictions
    (table,) = (folder / "submissions" / competition).glob("*.csv")
    return models, kept, metrics(home), table.read_bytes()


@pytest.mark.parametrize("competition", names())
def test_sample_to_submission_killed_and_resumed(competition, tmp_path, trainers):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    straight.mkdir()
    broken.mkdir()
    whole = run(straight, *train(competition))
    assert whole.returncode == 0, whole.stderr + whole.stdout
    lines = whole.stdout.strip().splitlines()
    assert sum("demo" in line and "make data" in line for line in lines) == 1, "the banner is one line"
    assert lines[-1].startswith(f"submission: submissions/{competition}/") and "demo" in lines[-1]
    table = straight / lines[-1].removeprefix("submission: ")
    assert "no report" not in whole.stdout and (straight / "runs" / competition / "smoke" / "report.html").is_file()
    provenance = json.loads(table.with_suffix(".json").read_text())
    assert provenance["demo"] is True and provenance["competition"] == competition and provenance["run"] == "smoke"
    assert len(list(csv.reader(open(table)))) > 2

    (broken / "data").mkdir()
    (broken / "data" / "demo").symlink_to(straight / "data" / "demo")
    checkpoint = broken / "runs" / competition / "smoke"

    def begun() -> bool:
        return any(checkpoint.glob("fold-*/fold.json")) or any(checkpoint.rglob("last.pt"))

    words = train(competition, "--save-every", "0")  # a checkpoint after every step, for this run only
    assert killed(trainers, broken, words, begun), "ended before a checkpoint"
    resumed = run_fork(trainers, broken, *train(competition))
    assert resumed.returncode == 0, resumed.stderr + resumed.stdout
    expected, found = outputs(straight, competition), outputs(broken, competition)
    assert found[1:] == expected[1:]
    for fold, weights in expected[0].items():
        assert all(torch.equal(weights[name], found[0][fold][name]) for name in weights), fold

    table.unlink()
    again = run_fork(trainers, straight, "predict", competition, "--run", "smoke")
    assert again.returncode == 0 and again.stdout.strip().splitlines()[-1] == lines[-1], again.stderr
    assert table.read_bytes() == expected[3]


@pytest.mark.parametrize("competition", names())
def test_help_is_generated_and_needs_no_torch(competition):
    code = (
        "import sys; from common.cli import main\n"
        f"try: main(['train', '{competition}', '--help'])\n"
        "except SystemExit: pass\n"
        "print('HEAVY', sorted({'torch', 'cv2', 'pandas', 'sklearn', 'numpy'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert "--lr" in shown.stdout and "samples" in shown.stdout
    assert shown.stdout.strip().endswith("HEAVY []"), shown.stdout[-200:] + shown.stderr
