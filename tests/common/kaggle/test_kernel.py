"""make kernel uploads the code, runs the notebook, fetches its results, and reports failures that exit with 0."""

import _thread
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from slugify import slugify

from common import archive as archiving
from common import cli, competition, errors, files
from common.errors import UserError
from common.kaggle.client import Site
from common.kaggle.credentials import find
from common.kaggle.kernel import push as kernels
from common.kaggle.kernel.notebook import (
    MARGIN_SECONDS,
    OUTPUT,
    STATE,
    TRAINING,
    VERSION,
    code,
    pack,
    refuse_what_stays,
    written,
)
from tests.common.kaggle.server import DROP, HANG, SLUG, Reply, archive

pytestmark = pytest.mark.usefixtures("no_secrets")
GOOD = "id,label\n1,0\n2,1\n"


def output(run: str = "001-best") -> bytes:
    """The archive that the notebook leaves: a finished run and its submission."""
    provenance = {"competition": "toy", "run": run, "score": 0.9, "monitor": "accuracy", "demo": False,
              "sha256": hashlib.sha256(GOOD.encode()).hexdigest(), "created": "2026-01-02T00:00:00Z"}  # fmt: skip
    return archive(
        {
            f"runs/toy/{run}/run.json": "{}",
            f"runs/toy/{run}/result.json": '{"finished": "2026-01-01T00:00:00Z"}',
            f"submissions/toy/{run}.csv": GOOD,
            f"submissions/toy/{run}.json": json.dumps(provenance),
        }
    )


@pytest.fixture(autouse=True)
def _output(kaggle):
    kaggle.kernel_files = {OUTPUT: output(), "submission.csv": GOOD.encode(), "../../evil.txt": b"x"}


def kernel(source, arguments=("--recipe", "best"), **options):
    kernels.kernel("toy", source, arguments, **{"poll": 0.05, "wait": 60, **options})


def test_the_way_there_and_back(kaggle, source, real_start, tmp_path, capfd):
    kernel(source)
    (created,) = kaggle.calls("CreateDataset")
    assert created["slug"] == "kit-toy-code" and created.get("isPrivate") is True
    with zipfile.ZipFile(io.BytesIO(kaggle.uploads[0])) as packed:
        names = packed.namelist()
        assert {"common/cli.py", "requirements.txt", VERSION} <= set(names)
        assert not [name for name in names if not name.startswith(("common/", "competitions/", "req", "code-"))]
    (saved,) = kaggle.calls("SaveKernel")
    assert saved["slug"] == "someone/kit-toy" and saved["enableGpu"] is True and saved["isPrivate"] is True
    assert saved["machineShape"] == "NvidiaTeslaT4" and saved["sessionTimeoutSeconds"] == 9 * 3600
    assert not saved.get("kernelDataSources")
    assert saved["competitionDataSources"] == [SLUG] and saved["datasetDataSources"] == ["someone/kit-toy-code"]
    cells = json.loads(saved["text"])["cells"]
    assert "'train', 'toy', '--recipe', 'best'" in "".join(cell["source"] for cell in cells)
    assert len(kaggle.calls("GetKernelSessionStatus")) == 2
    assert Path("submissions/toy/001-best.csv").read_text() == GOOD
    assert Path("runs/toy/001-best/result.json").is_file()
    assert not list(tmp_path.rglob("evil.txt"))
    assert "version 3: python -m common train toy --recipe best" in capfd.readouterr().out


def test_a_second_time_is_a_new_version_and_replaces_nothing(kaggle, source):
    kaggle.counts["CreateDataset"] = 1
    for name in ("runs/toy/001-best", "submissions/toy"):
        Path(name).mkdir(parents=True)
    Path("submissions/toy/001-best.csv").write_text("made here")
    kernel(source)
    assert len(kaggle.calls("CreateDatasetVersion")) == 1 and not kaggle.calls("CreateDataset")
    assert Path("submissions/toy/001-best.csv").read_text() == "made here"
    assert Path("submissions/toy/001-best-kaggle.csv").read_text() == GOOD
    provenance = json.loads(Path("submissions/toy/001-best-kaggle.json").read_text())
    assert provenance["run"] == "001-best-kaggle" and Path("runs/toy/001-best-kaggle/run.json").is_file()


def test_a_damaged_record_costs_no_runs(kaggle, source):
    Path("runs/toy").mkdir(parents=True)
    Path("runs/toy/kernel.json").write_text('{"kernel": "some')
    with pytest.raises(UserError, match="kernel.json cannot be read .*delete runs/toy/kernel.json and push the noteb"):
        kernel(source, fetch=True)


def test_fetching_later(kaggle, source, capfd):
    with pytest.raises(UserError, match="--fetch: no notebook of toy was pushed from here: make kernel COMP=toy"):
        kernel(source, fetch=True)
    kaggle.kernel_states = ["RUNNING"]
    with pytest.raises(UserError, match="is not ready: fetch it later with make kernel COMP=toy ARGS=--fetch"):
        kernel(source, wait=0.01)
    kaggle.kernel_states = ["COMPLETE"]
    kernel(source, fetch=True)
    assert len(kaggle.calls("SaveKernel")) == 1 and Path("submissions/toy/001-best.csv").is_file()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"error": "Maximum weekly GPU quota of 30.00 hours reached."}, "Maximum weekly GPU quota"),
        (
            {"ref": "x", "url": "u", "versionNumber": 1, "invalidCompetitionSources": [SLUG]},
            f"not valid competition sources.*Accept the rules at https://www.kaggle.com/c/{SLUG}/rules",
        ),
        (Reply(403, "Phone verification is required"), "Phone verification is required"),
        (DROP, "cannot be reached"),
    ],
)
def test_notebooks_that_are_not_taken(kaggle, source, tmp_path, fault, message):
    kaggle.on = {"SaveKernel": fault}
    notebook = kernels.Notebook(Site("toy", source, find()), "kernel", "someone/kit-toy", poll=0.05)
    with pytest.raises(UserError, match=message) as raised:
        notebook.push('{"cells": []}', {}, 60, tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"GetDatasetStatus": Reply(503)}, "uploading the code as someone/kit-toy-code: Kaggle itself fails"),
        ({"CreateDataset": {"status": "error", "error": "quota of private data sets"}}, "quota of private data sets"),
    ],
)
def test_code_that_is_not_taken(kaggle, source, fault, message):
    kaggle.on = fault
    with pytest.raises(UserError, match=message):
        kernel(source)
    assert not Path("runs").exists() and not Path("submissions").exists()


def test_a_blip_while_the_notebook_runs_is_waited_out(kaggle, source):
    kaggle.on = {"GetKernelSessionStatus": [{"status": "RUNNING"}, Reply(503), DROP, {"status": "COMPLETE"}]}
    kernel(source)
    assert len(kaggle.calls("SaveKernel")) == 1 and Path("submissions/toy/001-best.csv").read_text() == GOOD


@pytest.mark.parametrize(
    ("fault", "message", "wait"),
    [
        ({"GetKernelSessionStatus": Reply(503)}, "asking for the notebook someone/kit-toy: Kaggle itself fails", 1),
        ({"GetKernelSessionStatus": Reply(401)}, "Kaggle refuses it", 60),
        ({"ListKernelSessionOutput": Reply(503)}, "fetching the output of someone/kit-toy: Kaggle itself fails", 60),
        ({"GET": Reply(503, "odd")}, "kit-state.json of someone/kit-toy cannot be read", 60),
        ({"GET": [Reply(body=b'{"checkpoint": ""}'), Reply(503)]}, "kit-output.zip is not a complete zip archive", 60),
    ],
)
def test_failures_after_the_push_name_the_command_that_pushes_nothing(kaggle, source, fault, message, wait):
    kaggle.on = fault
    kaggle.kernel_files[STATE] = b'{"checkpoint": ""}'
    with pytest.raises(UserError, match=f"{message}.*go on with make kernel COMP=toy ARGS=--fetch") as raised:
        kernel(source, wait=wait)
    assert "same command" not in str(raised.value)
    kaggle.on = {}
    kernel(source, fetch=True)
    assert len(kaggle.calls("SaveKernel")) == 1 and Path("submissions/toy/001-best.csv").read_text() == GOOD


def test_a_push_whose_answer_is_lost_is_not_said_to_have_failed(kaggle, source):
    def lost(body):
        kaggle.SaveKernel(body)
        return Reply(503)

    kaggle.on = {"SaveKernel": lost}
    with pytest.raises(
        UserError, match="Kaggle may have accepted it.*look at https://www.kaggle.com/code/someone/kit-toy"
    ):
        kernel(source)


def test_fetching_does_not_wait_for_a_kaggle_that_fails(kaggle, source):
    kernel(source)
    kaggle.on = {"GetKernelSessionStatus": Reply(503)}
    with pytest.raises(UserError, match="Kaggle itself fails"):
        kernel(source, fetch=True, wait=3600)


def test_ctrl_c_after_the_push_names_the_command_that_pushes_nothing(kaggle, source, capfd):
    def interrupted(body):
        _thread.interrupt_main()
        return HANG

    kaggle.on = {"GetKernelSessionStatus": interrupted}
    with pytest.raises((SystemExit, KeyboardInterrupt)) as raised:
        kernel(source)
    assert raised.type is SystemExit and raised.value.code == 130
    assert "stopped: go on with make kernel COMP=toy ARGS=--fetch" in capfd.readouterr().err


@pytest.fixture
def pushed():
    """A notebook that was pushed by an earlier command."""
    Path("runs/toy").mkdir(parents=True)
    facts = {"kernel": "someone/kit-toy", "version": 3, "code": "abc", "arguments": []}
    Path("runs/toy/kernel.json").write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"GetKernelSessionStatus": Reply(404, "Not Found")}, "asking for the notebook someone/kit-toy"),
        ({"ListKernelSessionOutput": Reply(500)}, "fetching the output of someone/kit-toy: Kaggle itself fails"),
        ({"ListKernelSessionOutput": {"files": [], "log": "x"}}, "has no kit-output.zip among its outputs"),
    ],
)
def test_results_that_do_not_come(kaggle, source, pushed, fault, message):
    kaggle.on, kaggle.kernel_states = fault, ["COMPLETE"]
    with pytest.raises(UserError, match=message):
        kernel(source, fetch=True)
    assert not Path("submissions").exists()


def test_a_notebook_that_fails_is_told_with_the_end_of_its_log(kaggle, source, pushed):
    kaggle.kernel_states, kaggle.kernel_failure = ["ERROR"], "Your notebook tried to use more memory"
    with pytest.raises(UserError, match="ended with ERROR .Your notebook tried.*the notebook's log.: see https"):
        kernel(source, fetch=True)
    assert not Path("submissions").exists()


# Errors of torchrun and of the notebook that follow the training's own error message.
NOTEBOOK = """torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
\x1b[0;31mAssertionError\x1b[0m                     Traceback (most recent call last)
\x1b[0;31mAssertionError\x1b[0m: the training ended with status 1
"""


@pytest.mark.parametrize(
    ("answer", "end"),
    [
        (
            {"log": json.dumps([{"stream_name": "stderr", "time": 5.6, "data": "Traceback:\n"}])[:-1]
             + '\n,{"stream_name":"stderr","time":5.7,"data":"CUDA error: no kernel image\\n"}\n]\n'},
            r"Traceback: \| CUDA error: no kernel image",
        ),
        ({"log": f"fold 0\nerror: train.csv line 3: no number\n{NOTEBOOK}"}, "error: train.csv line 3: no number"),
        ({"log": f"fold 0\n  raise\nKeyError: 'id'\n{NOTEBOOK}"}, "KeyError: 'id'"),
        ({"log": NOTEBOOK}, r".* \| AssertionError: the training ended with status 1"),
        ({"log": ""}, "no log"),
        (Reply(503), "no log"),
        (HANG, "no log"),
    ],
)  # fmt: skip
def test_a_failed_notebook_is_told_with_or_without_its_log(kaggle, source, pushed, monkeypatch, answer, end):
    kaggle.kernel_states, kaggle.kernel_failure = ["ERROR"], "out of memory"
    kaggle.on = {"ListKernelSessionOutput": answer | {"files": []} if isinstance(answer, dict) else answer}
    if answer == HANG:
        monkeypatch.setenv("KIT_PATIENCE", "3")
    with pytest.raises(UserError, match=f"ended with ERROR .out of memory; {end}.: see https"):
        kernel(source, fetch=True)


def test_a_malicious_output_leaves_nothing(kaggle, source, pushed, tmp_path):
    kaggle.kernel_files[OUTPUT], kaggle.kernel_states = archive({"../../evil.txt": b"x"}), ["COMPLETE"]
    with pytest.raises(UserError, match="points outside the folder"):
        kernel(source, fetch=True)
    assert not list(tmp_path.rglob("evil.txt")) and not Path("submissions").exists()


def test_fetching_again_copies_nothing_again(kaggle, source, offline, capfd):
    kernel(source, internet=False)
    assert kaggle.calls("SaveKernel")[0].get("enableInternet") in (False, None)
    with zipfile.ZipFile(io.BytesIO(kaggle.uploads[0])) as packed:
        assert {"timm", "optuna"} <= {name[7:].partition("-")[0] for name in packed.namelist() if "wheels/" in name}
    kernel(source, fetch=True)
    assert {path.name for path in Path("runs/toy").iterdir()} == {"001-best", "kernel.json"}
    assert "fetched before: submissions/toy/001-best.csv; delete it to fetch it again" in capfd.readouterr().out
    assert not kaggle.calls("CreateCodeSubmission")
    kernel(source)
    assert Path("runs/toy/001-best-kaggle").is_dir()


@pytest.fixture
def sessions(kaggle):
    """Set the checkpoint that each pushed notebook leaves: that of its unfinished run, or "" for a finished one."""

    def scripted(*checkpoints):
        left = list(checkpoints)

        def saved(body):
            kaggle.kernel_files[STATE] = json.dumps({"checkpoint": left.pop(0)}).encode()
            return kaggle.SaveKernel(body)

        kaggle.kernel_states, kaggle.on = ["COMPLETE"], {"SaveKernel": saved}

    return scripted


def test_a_run_goes_on_in_further_notebooks_until_it_is_finished(kaggle, source, sessions, capfd):
    sessions("abc", "def", "")
    kernel(source, ("--run", "mine"), hours=2)
    pushes = kaggle.calls("SaveKernel")
    assert [push.get("kernelDataSources", []) for push in pushes] == [[], *[["someone/kit-toy"]] * 2]
    assert {push["sessionTimeoutSeconds"] for push in pushes} == {7200}
    assert len(kaggle.calls("CreateDataset")) == 1 and not kaggle.calls("CreateDatasetVersion"), "the same code"
    assert Path("submissions/toy/001-best.csv").read_text() == GOOD
    assert "the next one resumes the run" in capfd.readouterr().out
    sessions("")
    kernel(source, ("--run", "mine"))
    assert not kaggle.calls("SaveKernel")[-1].get("kernelDataSources"), "a finished run is not gone on with"


def test_a_later_command_goes_on_with_the_run_and_another_one_does_not(kaggle, source, sessions, capfd):
    sessions("abc", "")
    kaggle.kernel_states = ["RUNNING"]
    with pytest.raises(UserError, match="fetch it later with make kernel COMP=toy ARGS=--fetch"):
        kernel(source, ("--run", "mine"), wait=0.01)
    kaggle.kernel_states = ["COMPLETE"]
    kernel(source, fetch=True)
    assert "the run is not finished: make kernel COMP=toy with the same flags resumes it" in capfd.readouterr().out
    assert not Path("submissions").exists() and len(kaggle.calls("SaveKernel")) == 1
    kernel(source, ("--run", "mine"))
    assert kaggle.calls("SaveKernel")[-1]["kernelDataSources"] == ["someone/kit-toy"]
    sessions("abc", "")
    with pytest.raises(UserError, match="ended with ERROR"):
        kaggle.kernel_states = ["ERROR"]
        kernel(source, ("--run", "other"))
    assert not kaggle.calls("SaveKernel")[-1].get("kernelDataSources")


def test_sessions_without_a_checkpoint_end(kaggle, source, sessions):
    sessions("abc", "abc", "abc")
    with pytest.raises(UserError, match="version 3: a whole session brought no new checkpoint"):
        kernel(source)
    assert len(kaggle.calls("SaveKernel")) == 2


@pytest.mark.parametrize(
    ("words", "trained"),
    [
        ([], ["--precision", "fp16"]),
        (["--precision", "fp32"], ["--precision", "fp32"]),
        (["--accelerator", "NvidiaL4", "--epochs", "3"], ["--epochs", "3"]),
    ],
)
def test_cards_without_bf16_train_in_fp16(monkeypatch, words, trained):
    pushed = []
    monkeypatch.setattr(kernels, "kernel", lambda *given, **more: pushed.append((given[2], more["accelerator"])))
    cli.kernel("digit_recognizer", words)
    assert pushed == [(trained, "NvidiaL4" if "NvidiaL4" in words else "NvidiaTeslaT4")]


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        (
            "digit_recognizer",
            "--pseudo 003-best",
            "--pseudo 003-best: this machine's runs are not uploaded to Kaggle: make tra",
        ),
        ("clouds", "--encoder-weights /home/me/b3.pth", "in competitions/clouds/ are .* competitions/clouds/b3.pth$"),
        ("clouds", "--encoder-weights competitions/clouds/none.pth", "only files in competitions/clouds/ are uploaded"),
        ("clouds", "--internet off", "--encoder-weights imagenet --internet off: these weights come from the internet"),
        ("inclusive_images", "--epochs 1", "training images of inclusive_images are not on Kaggle .1,743,042 images"),
    ],
)
def test_what_stays_here_is_refused_before_a_push(kaggle, name, words, message):
    with pytest.raises(UserError, match=message):
        cli.kernel(name, words.split())
    assert not kaggle.asked


def test_runs_to_start_from_are_refused_before_a_push():
    elsewhere = replace(competition.load("inclusive_images").source, images=None)
    one = competition.Competition("inclusive_images", SimpleNamespace(SOURCE=elsewhere))
    config = replace(competition.load("inclusive_images").recipes["default"], start_from="002-a")
    with pytest.raises(UserError, match="--start-from 002-a: this machine's runs are not uploaded"):
        refuse_what_stays(one, config, True)


@pytest.mark.parametrize(
    "words",
    ["", "--encoder-weights none --internet off", "--encoder-weights ./competitions/clouds/README.md --internet off"],
)
def test_what_is_on_kaggle_is_pushed(monkeypatch, words):
    pushed = []
    monkeypatch.setattr(kernels, "kernel", lambda *given, **more: pushed.append(given[0]))
    cli.kernel("clouds", words.split())
    assert pushed == ["clouds"]


def test_a_run_that_was_begun_with_the_internet_goes_on_with_it(kaggle, source, sessions, offline):
    """The data set with its code has no wheels and is not replaced."""
    sessions("abc", "")
    kaggle.on["GetKernelSessionStatus"] = [{"status": "COMPLETE"}, {"status": "ERROR"}]
    with pytest.raises(UserError, match="ended with ERROR"):
        kernel(source)
    record = Path("runs/toy/kernel.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"checkpoint": "abc"}))
    with pytest.raises(
        UserError, match="--internet off: the run was begun with --internet on, so its code on Kaggle has no"
    ):
        kernel(source, internet=False)
    record.unlink()
    del kaggle.on["GetKernelSessionStatus"]
    sessions("def", "")
    kernel(source, internet=False)
    assert len(kaggle.calls("SaveKernel")) == 4, "begun without it, it goes on without it"


def test_data_from_elsewhere_has_no_notebook(kaggle, source):
    with pytest.raises(UserError, match="toy is not on Kaggle"):
        kernel(replace(source, slug=""))
    assert kaggle.asked == []


@pytest.mark.parametrize("name", ["toy", "human_protein_atlas_image_classification", "Lynx__2_", f"a{'_' * 40}b"])
def test_the_notebooks_of_a_competition_have_names_of_their_own(name):
    """The slugs that Kaggle makes of their titles, and of the title of the data set with their code, match too."""
    names = [kernels.name_of(name), kernels.name_of(name, "predict")]
    assert len(set(names)) == 2 and max(map(len, names)) <= 40
    assert [slugify(f"{one} code") for one in names] == [f"{one}-code" for one in names]


def test_the_code_is_packed_to_the_same_bytes(tmp_path):
    one, other = tmp_path / "one.zip", tmp_path / "other.zip"
    version = pack(code("clouds"), one)
    assert pack(code("clouds"), other) == version and len(version) == 12 and one.read_bytes() == other.read_bytes()
    with zipfile.ZipFile(one) as packed:
        assert packed.read(VERSION).decode() == version
        assert not [name for name in packed.namelist() if "__pycache__" in name or "/." in name]


@pytest.mark.parametrize(
    "line",
    ["from competitions.other.task import x", "from competitions import other", "import shared.nets", "import mine"],
)
def test_what_the_code_imports_and_is_not_packed_is_refused(tmp_path, line):
    for name in ("competitions/toy/task.py", "competitions/toy/tools.py", "competitions/other/task.py", "mine.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("import numpy, competitions.toy.tools\nfrom . import tools\n")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "nets.py").touch()
    (tmp_path / "competitions/toy/tools.py").write_text("!ls")  # imported by nothing here
    assert set(code("toy", tmp_path)) == {"competitions/toy/task.py", "competitions/toy/tools.py"}
    (tmp_path / "competitions/toy/task.py").write_text(f"def build():\n    {line}\n")
    with pytest.raises(UserError, match="competitions/toy/task.py imports .*copy what it needs into competitions/toy/"):
        code("toy", tmp_path)


def test_what_lies_beside_the_code_of_a_competition_is_packed_too(tmp_path):
    home = tmp_path / "competitions/toy/lib"
    (home / ".hidden").mkdir(parents=True)
    for name in ("helper.py", "classes.json", "../prices.csv", "start.pth", ".hidden/key.json"):
        (home / name).write_text(name)
    (tmp_path / "requirements.txt").touch()
    version = pack(code("toy", tmp_path), tmp_path / "kit.zip")
    with zipfile.ZipFile(tmp_path / "kit.zip") as packed:
        found = {name.removeprefix("competitions/toy/"): packed.read(name).decode() for name in packed.namelist()}
    files = {f"lib/{name}": name for name in ("classes.json", "helper.py", "start.pth")}
    assert found == files | {"prices.csv": "../prices.csv", "requirements.txt": "", VERSION: version}


STUB = """
import json, pathlib, sys, time
words = sys.argv[1:]
assert words[:2] == ["train", "toy"] and pathlib.Path(words[words.index("--data") + 1], "train.csv").is_file(), words
run = pathlib.Path("runs/toy/1")
run.mkdir(parents=True, exist_ok=True)
(run / "run.json").write_text("{}")
epoch = len(list(run.glob("*.pt")))
(run / f"{epoch}.pt").write_text(str(epoch))
if "--slow" in words and epoch == 0:
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        (run / "stopped.txt").write_text("by the notebook")
        if "--late" not in words:
            sys.exit(130)
pathlib.Path("submissions/toy").mkdir(parents=True)
pathlib.Path("submissions/toy/1.csv").write_text("id\\n1\\n")
"""


@pytest.fixture
def machine(tmp_path, trainers):
    """Run a notebook's cells with Kaggle's folders below `tmp_path`, on a kit whose training is a stub.

    They run as a fork of a process that has loaded torch, which they import to count the GPUs.
    """
    kit = tmp_path / "kit-source"
    (kit / "common").mkdir(parents=True)
    (kit / "common" / "__main__.py").write_text(STUB)
    for module in (archiving, errors, files):
        shutil.copy(module.__file__, kit / "common")
    (kit / "requirements.txt").write_text("timm==1\n")
    inputs, working = tmp_path / "kaggle/input", tmp_path / "kaggle/working"
    (inputs / "competitions" / SLUG).mkdir(parents=True)
    (inputs / "competitions" / SLUG / "train.csv").touch()
    (inputs / "kit-toy-code").mkdir()
    version = pack(code("toy", kit), inputs / "kit-toy-code/kit.zip")
    working.mkdir()

    def run(expected: str = version, words=("--epochs", "3"), seconds: float = 3600.0) -> subprocess.CompletedProcess:
        document = json.loads(written(TRAINING, SLUG, ("train", "toy", *words), expected, {}, seconds, MARGIN_SECONDS))
        script = "\n".join("".join(cell["source"]) for cell in document["cells"] if cell["cell_type"] == "code")
        cells = tmp_path / "cells.py"
        cells.write_text(script)
        moved = os.environ | {"KIT_KAGGLE": str(tmp_path / "kaggle")}
        return trainers.run([sys.executable, str(cells)], cwd=tmp_path, env=moved, timeout=120)

    return run, inputs, working


def packed(working: Path) -> list[str]:
    with zipfile.ZipFile(working / OUTPUT) as out:
        return sorted(out.namelist())


@pytest.mark.parametrize("unpacked", [True, False])
def test_the_notebook_runs_as_it_is_pushed(machine, unpacked):
    run, inputs, working = machine
    archived = inputs / "kit-toy-code/kit.zip"
    if unpacked:
        zipfile.ZipFile(archived).extractall(archived.with_suffix(""))
        archived.unlink()
    done = run()
    assert done.returncode == 0, done.stderr
    assert (working / "submission.csv").read_text() == "id\n1\n"
    assert json.loads((working / STATE).read_text()) == {"checkpoint": ""}
    assert packed(working) == ["runs/toy/1/0.pt", "runs/toy/1/run.json", "submissions/toy/1.csv"]
    old = run("other")
    assert old.returncode != 0 and "expected other: push the notebook again" in old.stderr


def test_a_session_ends_in_time_and_the_next_one_goes_on(machine):
    run, inputs, working = machine
    done = run(words=("--slow",), seconds=MARGIN_SECONDS + 5.0)
    assert done.returncode == 0, done.stderr
    assert "the session ends: stopping the training" in done.stdout
    assert packed(working) == ["runs/toy/1/0.pt", "runs/toy/1/run.json", "runs/toy/1/stopped.txt"]
    assert len(json.loads((working / STATE).read_text())["checkpoint"]) == 64
    assert not (working / "submission.csv").exists()
    (inputs / "kit-toy").mkdir()
    (working / OUTPUT).rename(inputs / "kit-toy" / OUTPUT)
    done = run(words=("--slow",))
    assert done.returncode == 0, done.stderr
    assert {"runs/toy/1/0.pt", "runs/toy/1/1.pt", "submissions/toy/1.csv"} <= set(packed(working))
    assert json.loads((working / STATE).read_text()) == {"checkpoint": ""}


def test_a_training_that_ends_as_it_is_stopped_is_finished(machine):
    """Otherwise the next session would start the training again."""
    run, _, working = machine
    done = run(words=("--slow", "--late"), seconds=MARGIN_SECONDS + 5.0)
    assert done.returncode == 0, done.stderr
    assert json.loads((working / STATE).read_text()) == {"checkpoint": ""}
    assert {"runs/toy/1/stopped.txt", "submissions/toy/1.csv"} <= set(packed(working))
    assert (working / "submission.csv").read_text() == "id\n1\n"


def test_archives_among_the_competitions_files_are_unpacked(machine):
    """Kaggle mounts the archives still packed, in a read-only folder."""
    run, inputs, _ = machine
    home = inputs / "competitions" / SLUG
    (home / "train.csv").unlink()
    (home / "train.csv.zip").write_bytes(archive({"train.csv": b"id\n"}))
    done = run()
    assert done.returncode == 0, done.stderr
    assert [file.name for file in home.iterdir()] == ["train.csv.zip"]


def test_a_training_that_fails_fails_the_notebook(machine):
    run, inputs, _ = machine
    (inputs / "competitions" / SLUG / "train.csv").unlink()
    done = run()
    assert done.returncode != 0 and "the training ended with status 1" in done.stderr
