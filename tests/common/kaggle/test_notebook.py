"""make notebook: pushed through the real kaggle program, and run as Kaggle would, offline and on other test sets."""

import json
import os
import shutil
import subprocess
import sysconfig
import venv
import zipfile
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest

from common import cli, competition
from common import run as runs
from common.errors import UserError
from common.kaggle.kernel import inference
from common.kaggle.kernel.notebook import OFTEN_MISSING, pack
from competitions.digit_recognizer.demo import write_demo

COMP, HIDDEN = "digit_recognizer", "segmentation_models_pytorch"  # a module that Kaggle's image lacks


def wheel(name: str, folder: Path) -> None:
    """The installed package as the wheel that it was installed from."""
    found = metadata.distribution(name)
    tag = next(line for line in found.read_text("WHEEL").splitlines() if line.startswith("Tag: ")).removeprefix("Tag: ")
    with zipfile.ZipFile(folder / f"{name.replace('-', '_')}-{found.version}-{tag}.whl", "w") as out:
        for file in found.files:
            if ".." not in file.parts and "__pycache__" not in file.parts:
                out.write(file.locate(), file)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    for name in OFTEN_MISSING.values():
        wheel(name, folder)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A working folder with two finished runs on files that are no demo data."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "real").mkdir()
    write_demo(folder / "real")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for run, epochs in (("one", "1"), ("two", "2")):
            words = ["--recipe", "smoke", "--data", "real", "--run", run, "--epochs", epochs, "--threads", "1"]
            assert cli.main(["train", COMP, *words]) == 0
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    """The Python of a fresh environment that has what this one has, except the hidden module."""
    folder = tmp_path_factory.mktemp("image")
    venv.create(folder, symlinks=True)
    (there,) = folder.glob("lib/python*/site-packages")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith((HIDDEN, "__pycache__")):
            (there / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


class Machine:
    """Kaggle's folders below `root`, a Python without the hidden module, and a network that refuses."""

    def __init__(self, root: Path, python: Path, slug: str = "digit-recognizer"):
        self.root, self.python, self.working = root, python, root / "kaggle/working"
        self.data, self.code = root / "kaggle/input/competitions" / slug, root / "kaggle/input/code"
        for folder in (self.working, self.data, self.code):
            folder.mkdir(parents=True)

    def run(self, text: str) -> subprocess.CompletedProcess:
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
        refusing = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
        return subprocess.run(
            [self.python, "-c", "\n".join("".join(cell["source"]) for cell in cells)],
            capture_output=True,
            text=True,
            cwd=self.working,
            env=kept | refusing | {"KIT_KAGGLE": str(self.root / "kaggle"), "OMP_NUM_THREADS": "1"},
        )


@pytest.fixture
def python(image):
    """The same, without what a notebook has installed when the test is over."""
    yield image
    (installed,) = image.parents[1].glob("lib/python*/site-packages")
    for left in installed.glob(f"{HIDDEN}*"):
        shutil.rmtree(left)


@pytest.fixture
def machine(tmp_path, python):
    return Machine(tmp_path / "there", python)


@pytest.fixture
def offline(monkeypatch, wheels):
    """pip here has the folder of wheels and no index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))


def test_the_pushed_notebook_predicts_as_home_does_and_is_submitted(kaggle, machine, home, offline, monkeypatch, capfd):
    monkeypatch.chdir(home)
    monkeypatch.setenv("KIT_PATIENCE", "300")  # the push waits for the notebook to have run
    monkeypatch.setattr(inference, "publish", partial(inference.publish, poll=0.05))
    shutil.copytree(home / "real", machine.data, dirs_exist_ok=True, ignore=shutil.ignore_patterns("cache"))

    def saved(body):
        (machine.code / "kit.zip").write_bytes(kaggle.uploads[-1])
        done = machine.run(body["text"])
        assert done.returncode == 0, done.stderr
        kaggle.kernel_files = {"submission.csv": (machine.working / "submission.csv").read_bytes()}
        return kaggle.SaveKernel(body)

    kaggle.on = {"SaveKernel": saved}
    status = cli.main(["notebook", COMP, "--run", "one,two", "--data", "real", "--threads", "1", "--submit"])
    said = capfd.readouterr()
    assert status == 0, said.err
    assert "byte for byte" in said.out and "within 9 h there is time for" in said.out
    (pushed,) = kaggle.calls("SaveKernel")
    assert pushed.get("enableInternet") in (False, None) and pushed["competitionDataSources"] == ["digit-recognizer"]
    (submitted,) = kaggle.calls("CreateCodeSubmission")
    assert (submitted["kernelSlug"], submitted["kernelVersion"]) == ("kit-digit-recognizer-predict", 3)
    assert "one,two" in Path(f"submissions/{COMP}/ledger.csv").read_text()
    kaggle.allowed_now = 0
    assert cli.main(["notebook", COMP, "--fetch", "--submit"]) == 0 and len(kaggle.calls("CreateCodeSubmission")) == 1
    assert "kit-digit-recognizer-predict/3 was submitted before" in capfd.readouterr().out
    assert list(machine.python.parents[1].glob(f"lib/python*/site-packages/{HIDDEN}/__init__.py")), "not installed"
    with zipfile.ZipFile(machine.code / "kit.zip") as packed:
        names = packed.namelist()
    assert f"runs/{COMP}/two/fold-0/model.pt" in names and "competitions/clouds/task.py" not in names
    assert not [name for name in names if name.endswith(("last.pt", "best.pt", "oof.npy"))]


@pytest.fixture
def pushed(home, wheels, machine, offline, monkeypatch, tmp_path):
    """Put the kit of run `one` on the machine, without the files that are left out; returns its notebook."""
    monkeypatch.chdir(home)

    def put(leave_out: str = "\0", run: str = "one") -> str:
        (tmp_path / "wheels").mkdir()
        files, needed = inference.kit(COMP, [runs.load(COMP, run)], tmp_path / "wheels")
        kept = {name: file for name, file in files.items() if leave_out not in name}
        version = pack(kept, machine.code / "kit.zip")
        words = ["--run", run, "--threads", "1"]
        return inference.notebook("kit", "digit-recognizer", COMP, words, version, needed, 3600.0)

    return put


@pytest.mark.parametrize("rows", [7, 310])
def test_another_test_set_decides_the_rows(machine, pushed, home, rows):
    shutil.copy(home / "real/train.csv", machine.data)
    header, *lines = (home / "real/test.csv").read_text().splitlines()
    (machine.data / "test.csv").write_text("\n".join([header, *(lines[::-1] + lines)[:rows]]) + "\n")
    order = [*range(2, rows + 1), 1]  # not that of test.csv
    sample = "ImageId,Label\n" + "".join(f"{row},0\n" for row in order)
    (machine.data / "sample_submission.csv").write_text(sample)
    done = machine.run(pushed())
    assert done.returncode == 0, done.stderr
    assert cli.main(["predict", COMP, "--run", "one", "--data", str(machine.data), "--threads", "1"]) == 0
    found = (machine.working / "submission.csv").read_text()
    assert found == Path(f"submissions/{COMP}/one.csv").read_text()
    assert [line.split(",")[0] for line in found.splitlines()[1:]] == [str(row) for row in order]


@pytest.mark.parametrize(
    ("leave_out", "reason"),
    [(f"wheels/{HIDDEN}", "cannot be installed from the data set"), ("model.pt", "the prediction ended with status 1")],
)
def test_what_is_missing_fails_the_notebook(machine, pushed, home, leave_out, reason):
    shutil.copytree(home / "real", machine.data, dirs_exist_ok=True)
    done = machine.run(pushed(leave_out))
    assert done.returncode != 0 and reason in done.stderr
    assert not (machine.working / "submission.csv").exists()


def test_weights_of_another_push_are_refused(machine, pushed, home, tmp_path):
    text = pushed()
    (tmp_path / "wheels").rename(tmp_path / "old")
    pushed(run="two")
    done = machine.run(text)
    assert done.returncode != 0 and "push the notebook again" in done.stderr


def test_wheels_that_cannot_be_had(home, monkeypatch, tmp_path):
    monkeypatch.chdir(home)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError, match="the wheels of .* cannot be downloaded"):
        inference.kit(COMP, [runs.load(COMP, "one")], tmp_path)


def test_runs_that_no_notebook_can_predict_with(kaggle, home, monkeypatch, capfd):
    monkeypatch.chdir(home)
    facts = Path(f"runs/{COMP}/two/run.json")
    before = facts.read_text()
    facts.write_text(json.dumps(json.loads(before) | {"demo": True}))
    assert cli.main(["notebook", COMP, "--run", "two"]) == 1 and "means nothing on Kaggle" in capfd.readouterr().err
    facts.write_text(before)
    Path(f"runs/{COMP}/notebook.json").unlink(missing_ok=True)  # of another test
    assert cli.main(["notebook", COMP, "--fetch"]) == 1 and "no such notebook" in capfd.readouterr().err
    assert kaggle.asked == []


def test_images_that_cannot_be_read_do_not_keep_the_notebook_from_a_file(python, offline, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    slug = competition.load("clouds").source.slug
    machine = Machine(tmp_path / "there", python, slug)
    competition.load("clouds").write_demo(machine.data)
    words = ["--data", str(machine.data), "--threads", "1", "--workers", "0"]
    assert cli.main(["train", "clouds", "--recipe", "smoke", "--run", "one", *words]) == 0
    whole = Path("submissions/clouds/one.csv").read_text().splitlines()
    bad = sorted((machine.data / "test_images").glob("*.jpg"))[1]
    bad.write_bytes(bad.read_bytes()[:300])
    sample = machine.data / "sample_submission.csv"
    header, *rows = sample.read_text().splitlines()
    sample.write_text("\n".join([header, *(f"{row.split(',')[0]},1 1" for row in rows)]) + "\n")
    (tmp_path / "wheels").mkdir()
    files, needed = inference.kit("clouds", [runs.load("clouds", "one")], tmp_path / "wheels")
    version = pack(files, machine.code / "kit.zip")
    words = ["--run", "one", "--threads", "1", "--workers", "0"]
    done = machine.run(inference.notebook("kit", slug, "clouds", words, version, needed, 3600.0))
    assert done.returncode == 0, done.stderr
    expected = [f"{line.split(',')[0]},1 1" if line.startswith(bad.name) else line for line in whole]
    assert (machine.working / "submission.csv").read_text().splitlines() == expected
    assert "4 of " in done.stdout and f"{bad.name}: " in done.stdout
    fell_back = json.loads((machine.working / "submission.json").read_text())["fallback"]
    assert fell_back == [line.split(",")[0] for line in whole if line.startswith(bad.name)]
