"""make notebook: pushed by the real kaggle program, and run as on Kaggle, offline and with other test sets."""

import json
import os
import re
import shutil
import subprocess
import sysconfig
import venv
import zipfile
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest

from common import cli, competition, train
from common import run as runs
from common.errors import UserError
from common.kaggle.kernel import inference
from common.kaggle.kernel.notebook import code, needed, pack, written
from competitions.digit_recognizer.demo import write_demo

COMP, HIDDEN = "digit_recognizer", "segmentation_models_pytorch"  # a module that Kaggle's image lacks


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A working folder with two finished runs; their files are the demo's, but do not count as demo data."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "real").mkdir()
    write_demo(folder / "real")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train, "write_report", lambda *_: None)
        for run, seed in (("one", "1"), ("two", "2")):
            words = ["--recipe", "smoke", "--data", "real", "--run", run, "--epochs", "1", "--seed", seed]
            assert cli.main(["train", COMP, *words, "--threads", "1"]) == 0
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    """The interpreter of a new environment with the same packages as this one except the HIDDEN module."""
    folder = tmp_path_factory.mktemp("image")
    venv.create(folder, symlinks=True)
    (there,) = folder.glob("lib/python*/site-packages")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith((HIDDEN, "__pycache__")):
            (there / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


class Machine:
    """Kaggle's folders below `root`, an interpreter without the HIDDEN module, and no network."""

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
def lacking(image):
    """Remove the HIDDEN module again if an earlier test's notebook installed it in `image`."""
    for left in image.parents[1].glob(f"lib/python*/site-packages/{HIDDEN}*"):
        shutil.rmtree(left)


@pytest.fixture
def machine(tmp_path, image):
    return Machine(tmp_path / "there", image)


@pytest.mark.usefixtures("lacking")
def test_the_pushed_notebook_predicts_as_home_does_and_is_submitted(kaggle, machine, home, offline, monkeypatch, capfd):
    monkeypatch.chdir(home)
    monkeypatch.setenv("KIT_PATIENCE", "300")  # the push takes as long as the notebook, which `saved` runs
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


LIMITED = b"""
whole = DigitNet.forward


def forward(self, images):
    if len(images) > %d:
        print("no memory for", len(images))
        raise torch.OutOfMemoryError("CUDA out of memory")
    return whole(self, images)


DigitNet.forward = forward
"""


@pytest.fixture
def pushed(home, machine, offline, monkeypatch, tmp_path):
    """Put the kit with a run on the machine, without the files whose names contain `leave_out`; return its notebook.

    With `memory`, its network raises an out-of-memory error for batches of more samples than that.
    """
    monkeypatch.chdir(home)

    def put(leave_out: str = "\0", run: str = "one", memory: int = 0) -> str:
        files, needed = inference.kit(COMP, [runs.load(COMP, run)], tmp_path / f"wheels of {run}")
        kept = {name: file for name, file in files.items() if leave_out not in name}
        if memory:
            limited, name = tmp_path / "limited.py", f"competitions/{COMP}/model.py"
            limited.write_bytes(kept[name].read_bytes() + LIMITED % memory)
            kept[name] = limited
        version = pack(kept, machine.code / "kit.zip")
        words = ["predict", COMP, "--run", run, "--threads", "1"]
        return written(inference.PREDICTION, "digit-recognizer", words, version, needed, 3600.0, 360.0)

    return put


def test_another_test_set_decides_the_rows_in_whatever_memory(machine, pushed, home):
    rows = 310
    shutil.copy(home / "real/train.csv", machine.data)
    header, *lines = (home / "real/test.csv").read_text().splitlines()
    (machine.data / "test.csv").write_text("\n".join([header, *(lines[::-1] + lines)[:rows]]) + "\n")
    order = [*range(2, rows + 1), 1]  # not the order of test.csv
    sample = "ImageId,Label\n" + "".join(f"{row},0\n" for row in order)
    (machine.data / "sample_submission.csv").write_text(sample)
    done = machine.run(pushed(memory=50))
    assert done.returncode == 0, done.stderr
    assert re.findall(r"no memory for (\d+)", done.stdout) == ["128", "64"]
    assert cli.main(["predict", COMP, "--run", "one", "--data", str(machine.data), "--threads", "1"]) == 0
    found = (machine.working / "submission.csv").read_text()
    assert found == Path(f"submissions/{COMP}/one.csv").read_text()
    assert [line.split(",")[0] for line in found.splitlines()[1:]] == [str(row) for row in order]


@pytest.mark.usefixtures("lacking")
@pytest.mark.parametrize(
    ("leave_out", "reason"),
    [(f"wheels/{HIDDEN}", "cannot be installed"), ("common/__main__.py", "the prediction ended with status 1")],
)
def test_what_is_missing_fails_the_notebook(machine, pushed, home, leave_out, reason):
    shutil.copytree(home / "real", machine.data, dirs_exist_ok=True)
    done = machine.run(pushed(leave_out))
    assert done.returncode != 0 and reason in done.stderr
    assert not (machine.working / "submission.csv").exists()


def test_weights_of_another_push_are_refused(machine, pushed, home, tmp_path):
    text = pushed()
    pushed(run="two")
    done = machine.run(text)
    assert done.returncode != 0 and "push the notebook again" in done.stderr


def test_wheels_that_cannot_be_had(home, monkeypatch, tmp_path):
    monkeypatch.chdir(home)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError, match="the wheels of .* cannot be downloaded"):
        inference.kit(COMP, [runs.load(COMP, "one")], tmp_path / "wheels")


def test_runs_that_no_notebook_can_predict_with(kaggle, home, monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(home)
    bare = replace(runs.load(COMP, "one"), path=tmp_path / "bare")
    bare.path.mkdir()
    with pytest.raises(UserError, match="bare has no saved weights, so it cannot predict the test set"):
        inference.kit(COMP, [bare], tmp_path / "wheels")
    facts = Path(f"runs/{COMP}/two/run.json")
    before = facts.read_text()
    facts.write_text(json.dumps(json.loads(before) | {"demo": True}))
    assert cli.main(["notebook", COMP, "--run", "two"]) == 1 and "means nothing on Kaggle" in capfd.readouterr().err
    facts.write_text(before)
    Path(f"runs/{COMP}/notebook.json").unlink(missing_ok=True)  # left by another test
    assert cli.main(["notebook", COMP, "--fetch"]) == 1
    assert f"no notebook of {COMP} was pushed from here: make notebook" in capfd.readouterr().err
    assert kaggle.asked == []


# Constants of the demo modules, set to make the demo data of the image competitions smaller.
FEW = {
    "clouds": {"TRAIN_IMAGES": 9, "TEST_IMAGES": 4},
    "inclusive_images": {"IMAGES": {"train_images": 42, "tuning": 4, "test": 6}},
    "protein_atlas": {"TRAIN_IMAGES": 60, "TEST_IMAGES": 6},
}


@pytest.mark.parametrize("name", FEW)
def test_damaged_and_missing_images_do_not_keep_the_notebook_from_a_file(
    name, image, offline, no_page, monkeypatch, tmp_path
):
    """Fewer test images in another order, one damaged and one missing; of a four-colour image only one file is."""
    monkeypatch.chdir(tmp_path)
    loaded, demo = competition.load(name), import_module(f"competitions.{name}.demo")
    for number, value in FEW[name].items():
        monkeypatch.setattr(demo, number, value)
    machine = Machine(tmp_path / "there", image, loaded.source.slug)
    loaded.write_demo(machine.data)
    words = ["--run", "one", "--threads", "1", "--workers", "0"]
    given = ["--recipe", "smoke", "--epochs", "1", "--data", str(machine.data), "--no-submission"]
    assert cli.main(["train", name, *given, *words]) == 0
    shutil.rmtree(machine.data / "cache", ignore_errors=True)
    if loaded.source.images:  # these images are not on Kaggle
        shutil.rmtree(machine.data / loaded.source.images.folder)

    (sample,) = machine.data.glob("*sample_submission.csv")
    header, *rows = sample.read_text().splitlines()
    images = list(dict.fromkeys(re.split(r"_[A-Z]|,", row)[0] for row in reversed(rows)))[:-1]
    rows = [row for row in reversed(rows) if row.startswith(tuple(images))]
    sample.write_text("\n".join([header, *rows]) + "\n")
    damaged, missing = (next(machine.data.rglob(f"{name}*")) for name in (images[0], images[-1]))
    damaged.write_bytes(damaged.read_bytes()[:60])
    missing.unlink()

    files, needed = inference.kit(name, [runs.load(name, "one")], tmp_path / "wheels")
    version = pack(files, machine.code / "kit.zip")
    words = ["predict", name, *words]
    done = machine.run(written(inference.PREDICTION, loaded.source.slug, words, version, needed, 3600.0, 360.0))
    assert done.returncode == 0, done.stderr
    found = (machine.working / "submission.csv").read_text()
    lost = [row for row in rows if row.startswith((images[0], images[-1]))]
    assert [row for row in found.splitlines() if row.startswith((images[0], images[-1]))] == lost
    ids = [row.split(",")[0] for row in lost]
    assert json.loads((machine.working / "submission.json").read_text())["fallback"] == ids
    told = next(line for line in done.stdout.splitlines() if "the sample submission's values" in line)
    assert told.startswith(f"{len(ids)} of {len(rows)} rows") and f"{damaged} " in told
    assert missing.stem in told and "cannot be opened (No such file" in told
    assert cli.main(["predict", name, "--data", str(machine.data), "--fallback", *words[2:]]) == 0
    assert found == Path(f"submissions/{name}/one.csv").read_text()


@pytest.mark.parametrize("has_card", [False, True])
def test_only_a_card_tells_that_kaggles_takes_too_long(monkeypatch, tmp_path, capsys, has_card):
    table = tmp_path / "submission.csv"
    table.write_text("id,label\n1,0\n2,0\n")
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_card)
    monkeypatch.setattr(runs, "machine", lambda: "a machine")
    with pytest.raises(UserError, match="alone takes 100 s here") if has_card else nullcontext():
        inference._print_budget(table, 100.0, 60.0)
    said = capsys.readouterr().out
    assert "time for 1 rows at this speed" in said and ("faster than this CPU" in said) is not has_card


@pytest.mark.parametrize(("there", "same"), [("1,0\n2,0\n", 1), ("1,5\n2,5\n", 0)])
def test_the_notebooks_file_is_compared_by_its_rows(tmp_path, capsys, there, same):
    for name, rows in (("here", "1,0\n2,1\n"), ("there", there)):
        (tmp_path / name).write_text(f"id,label\n{rows}")
    inference._print_difference(tmp_path / "there", tmp_path / "here")
    assert f"has 2 rows, {same} of them as in" in capsys.readouterr().out


def test_a_competition_that_is_not_on_kaggle_has_no_notebook(kaggle, capfd):
    assert cli.main(["notebook", "kdd_air_quality", "--submit"]) == 1
    assert "is not on Kaggle, so no notebook there can predict for it: make predict" in capfd.readouterr().err
    assert kaggle.asked == []


def test_what_the_image_may_lack_is_found_in_the_code():
    found = needed(code("kdd_air_quality"))
    assert found["bottleneck"].startswith("Bottleneck==") and found["iterstrat"].startswith(
        "iterative-stratification=="
    )
    assert "albumentations" in needed(code("clouds")) and "bottleneck" not in needed(code("clouds"))
    assert not found.keys() & {"torch", "numpy", "pytest", "cv2"}
