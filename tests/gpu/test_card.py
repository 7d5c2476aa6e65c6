"""If there is a CUDA card, run the tests of on_card.py in a new process, because this one hides its cards."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not Path("/dev/nvidiactl").exists(), reason="no CUDA card: the checks of tests/gpu need one")
def test_on_a_card():
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    if os.environ["KIT_CARDS"] != "all":
        environment["CUDA_VISIBLE_DEVICES"] = os.environ["KIT_CARDS"]
    # --confcutdir keeps the suite's conftest.py, which hides the cards, from being loaded.
    words = ["-m", "pytest", "tests/gpu/on_card.py", "--confcutdir=tests/gpu", "-p", "no:cacheprovider", "-x"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode == 5 or "no card is visible" in done.stdout:
        pytest.skip("a card is there, but torch does not see it")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
