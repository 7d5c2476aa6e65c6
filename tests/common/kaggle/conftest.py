"""The real kaggle program against the loopback server: an environment of its own, an empty folder to work in."""

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
    """Ctrl-C works, also in programs started here: shells have it ignored by what they start in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def wheel(name: str, folder: Path) -> None:
    """The installed package as the wheel that it was installed from."""
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
    """pip here has the folder of wheels and no index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))


@pytest.fixture
def source() -> Source:
    return SOURCE


@pytest.fixture(scope="session")
def programs():
    """The kaggle program and asked.py without the time that their libraries take to load; nothing of theirs is kept."""
    with forks("kagglesdk", "bleach", "dateutil.parser", "dotenv", "packaging.version", "slugify", "tqdm.cli") as found:
        yield found


@pytest.fixture
def real_start():
    """A test that asks for this starts the kaggle program from nothing, as the kit does."""


@pytest.fixture
def kaggle(request, tmp_path, monkeypatch):
    """A server, and an environment in which the kaggle program finds it: no test reaches the network or a real home."""
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
        "TMPDIR": str(tmp_path / "temporary"),  # where the program notes its uploads
        "KAGGLE_USERNAME": USER,
        "KAGGLE_KEY": KEY,
        "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
        "http_proxy": server.address,
        "KIT_PATIENCE": "20",
        "LANGUAGE": "C",  # the program looks for no translation, a fourth of its time
    }.items():
        monkeypatch.setenv(name, value)
    if "real_start" not in request.fixturenames:
        monkeypatch.setattr(client, "subprocess", request.getfixturevalue("programs"))
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
