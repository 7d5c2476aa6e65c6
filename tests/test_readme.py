"""The code of the README runs as it stands there, and its commands are targets that exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_code_of_the_readme_runs(number, tmp_path):
    if BLOCKS[number].startswith("# competitions/"):
        compile(BLOCKS[number], "README.md", "exec")  # a page of a competition, which tests/test_templates.py runs
        return
    ran = subprocess.run(
        [sys.executable, "-c", BLOCKS[number]],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr


def test_the_readme_has_code_of_the_core():
    assert sum("from common.engine" in block for block in BLOCKS) >= 2


def test_every_make_target_of_the_readme_exists():
    targets = set(re.findall(r"^([a-z]+): ## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)) | {"help"}
    named = set(re.findall(r"^make ([a-z]+)", README, flags=re.MULTILINE)) | set(re.findall(r"`make ([a-z]+)", README))
    assert named <= targets, named - targets
    assert {"train", "test"} <= named
