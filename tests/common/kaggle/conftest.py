"""Fixtures that run the real kaggle program against the loopback server, in an empty folder and a clean environment."""

import os
import signal
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from common.kaggle import client
from common.kaggle.kernel.notebook import code, needed
from common.kaggle.source import Source
from tests.common.kaggle.server import KEY, SLUG, TOKEN, USER, Kaggle
from tests.forks import forks

SOURCE = Source(SLUG, ("train.csv", "sample_submission.csv"), higher_is_better=True, labels=("train.csv",))


@pytest.fixture(autouse=True)
def ctrl_c():
    """Make Ctrl-C work here and in child processes: a shell lets its background jobs ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def wheel(name: str, folder: Path) -> None:
    """Pack an installed package into a wheel in `folder`, like the one that it was installed from."""
    found = metadata.distribution(name)
    tag = next(line for line in found.read_text("WHEEL").splitlines() if line.startswith("Tag: ")).removeprefix("Tag: ")
    with zipfile.ZipFile(folder / f"{name.replace('-', '_')}-{found.version}-{tag}.whl", "w") as out:
        for file in found.files:
            if ".." not in file.parts and "__pycache__" not in file.parts:
                out.write(file.locate(), file)


@pytest.fixture(scope="session")
def wheels(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    for pin in needed(code("clouds")).values():
        wheel(pin.partition("==")[0], folder)
    return folder


@pytest.fixture
def offline(monkeypatch, wheels):
    """Let pip install from the folder of wheels only, without a package index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))


@pytest.fixture
def source() -> Source:
    return SOURCE


@pytest.fixture(scope="session")
def programs():
    """Run the kaggle program and asked.py as forks with their libraries loaded: quicker, and no state is shared."""
    with forks("kagglesdk", "bleach", "dateutil.parser", "dotenv", "packaging.version", "slugify", "tqdm.cli") as found:
        yield found


@pytest.fixture
def real_start():
    """Request this fixture to start the kaggle program as a new process, as the kit does, instead of as a fork."""


@pytest.fixture
def kaggle(request, tmp_path, monkeypatch):
    """A fake Kaggle server and an environment that points to it: no test reaches the network or a real home folder."""
    server = Kaggle()
    home = tmp_path / "home"
    for folder in (home, tmp_path / "here", tmp_path / "temporary"):
        folder.mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in os.environ:
        if name.startswith(("KAGGLE_", "KIT_")) or name.lower().endswith("_proxy") or name == "XDG_CONFIG_HOME":
            monkeypatch.delenv(name)
    for name, value in {
        "HOME": str(home),
        "TMPDIR": str(tmp_path / "temporary"),  # where the program records its uploads
        "KAGGLE_USERNAME": USER,
        "KAGGLE_KEY": KEY,
        "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
        "http_proxy": server.address,
        "KIT_PATIENCE": "20",
        "LANGUAGE": "C",  # skips the program's search for translations, a quarter of its run time
    }.items():
        monkeypatch.setenv(name, value)
    if "real_start" not in request.fixturenames:
        monkeypatch.setattr(client, "subprocess", request.getfixturevalue("programs"))
    yield server
    server.close()


@pytest.fixture
def no_secrets(kaggle, tmp_path, capfd):
    """Fail the test if a planted secret was printed or written to a file of the kit."""
    yield
    shown = capfd.readouterr()
    for secret in (KEY, TOKEN, "signed-secret"):
        assert secret not in shown.out + shown.err
        for file in (tmp_path / "here").rglob("*"):
            if file.is_file():
                assert secret.encode() not in file.read_bytes(), file
