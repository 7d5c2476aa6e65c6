"""The real kaggle program against the loopback server: an environment of its own, an empty folder to work in."""

import os
import signal

import pytest

from common.kaggle.source import Source
from tests.common.kaggle.server import KEY, SLUG, TOKEN, USER, Kaggle

SOURCE = Source(SLUG, ("train.csv", "sample_submission.csv"), higher_is_better=True, labels=("train.csv",))


@pytest.fixture(autouse=True)
def ctrl_c():
    """Ctrl-C works, also in programs started here: shells have it ignored by what they start in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def source() -> Source:
    return SOURCE


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    """A server, and an environment in which the kaggle program finds it: no test reaches the network or a real home."""
    server = Kaggle()
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in os.environ:
        if name.startswith(("KAGGLE_", "KIT_")) or name.lower().endswith("_proxy") or name == "XDG_CONFIG_HOME":
            monkeypatch.delenv(name)
    for name, value in {
        "HOME": str(home),
        "KAGGLE_USERNAME": USER,
        "KAGGLE_KEY": KEY,
        "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
        "http_proxy": server.address,
        "KIT_PATIENCE": "20",
    }.items():
        monkeypatch.setenv(name, value)
    yield server
    server.close()


@pytest.fixture
def no_secrets(kaggle, tmp_path, capfd):
    """Fails the test when a planted secret was printed or written to a file of the kit."""
    yield
    shown = capfd.readouterr()
    for secret in (KEY, TOKEN, "signed-secret"):
        assert secret not in shown.out + shown.err
        for file in (tmp_path / "here").rglob("*"):
            if file.is_file():
                assert secret.encode() not in file.read_bytes(), file
