"""The notebook that trains on Kaggle, and the archive of the code that it runs."""

import hashlib
import io
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.files import sha256

ROOT = Path(__file__).parents[3]
PACKED = ("common", "competitions", "requirements.txt")  # nothing else of the checkout leaves this machine
OUTPUT = "kit-output.zip"  # what the notebook leaves for the kit, and for the notebook that goes on with its run
STATE = "kit-state.json"  # {"checkpoint": sha256 of the unfinished run's files, "" when it is finished}
ACCELERATOR = "NvidiaTeslaT4"  # NvidiaTeslaT4Highmem is two of them, where Kaggle tells them apart
SESSION_HOURS = 9.0  # the longest that Kaggle lets a notebook run on a GPU
MARGIN_SECONDS = 900  # of the session: for stopping the training and packing the run
VERSION = "code-version.txt"
# Import names of what Kaggle's image may lack -> their lines in requirements.txt; torch and its friends are there.
OFTEN_MISSING = {
    "timm": "timm",
    "segmentation_models_pytorch": "segmentation-models-pytorch",
    "albumentations": "albumentations",
    "lightgbm": "lightgbm",
    "prophet": "prophet",
    "iterstrat": "iterative-stratification",
}

START = """# %% [markdown]
# {title}: `{command}`

# %%
import hashlib, importlib.util, json, os, shutil, signal, subprocess, sys, time, zipfile
from pathlib import Path

END = time.monotonic() + {seconds}  # when the {what} is stopped, so that what it has made is kept
KAGGLE = Path(os.environ.get("KIT_KAGGLE", "/kaggle"))
INPUT, WORKING, KIT = KAGGLE / "input", KAGGLE / "working", KAGGLE.parent / "tmp" / "kit"

# %% The code: Kaggle may have unpacked the archive of the data set or not.
shutil.rmtree(KIT, ignore_errors=True)
KIT.mkdir(parents=True)
for archive in INPUT.rglob("{archive}"):
    if archive.is_file():
        zipfile.ZipFile(archive).extractall(KIT)
for version in INPUT.rglob("{version_file}"):
    shutil.copytree(version.parent, KIT, dirs_exist_ok=True)
found = (KIT / "{version_file}").read_text() if (KIT / "{version_file}").is_file() else "none"
assert found == "{version}", f"the code here is version {{found}}, expected {version}: push the notebook again"
data = next(path for path in (INPUT / "competitions" / "{slug}", INPUT / "{slug}") if path.is_dir())
environment = os.environ | {{"PYTHONPATH": str(KIT), "NO_ALBUMENTATIONS_UPDATE": "1"}}
"""

TRAINING = (
    START
    + """
# %% The run of the session before, where it was not finished.
for archive in INPUT.rglob("{output}"):
    zipfile.ZipFile(archive).extractall(KIT)

# %% What Kaggle's image lacks, in the versions of requirements.txt.
pins = dict(line.split("==") for line in (KIT / "requirements.txt").read_text().splitlines() if "==" in line)
often_missing = {often_missing}
missing = [f"{{name}}=={{pins[name]}}" for module, name in often_missing.items()
           if name in pins and importlib.util.find_spec(module) is None]
if missing and {internet}:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--only-binary=:all:", *missing], check=True)
elif missing:
    print("not installed, as the internet is off:", ", ".join(missing))

# %% The training: the same command as at home, with a process for every card.
import torch

cards = torch.cuda.device_count()
launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(cards), "-m", "--"] if cards > 1 else []
command = [sys.executable, "-m", *launch, "common", {words}, "--data", str(data)]
training = subprocess.Popen(command, cwd=KIT, env=environment, start_new_session=True)
try:
    status = training.wait(max(1, END - time.monotonic()))
except subprocess.TimeoutExpired:
    print("the session ends: the training is stopped, and the next notebook goes on with it", flush=True)
    for number, patience in ((signal.SIGINT, {patience}), (signal.SIGKILL, 60)):
        try:
            os.killpg(training.pid, number)
            training.wait(patience)
            break
        except (subprocess.TimeoutExpired, ProcessLookupError):
            continue
    status = None
assert status in (0, None), f"the training ended with status {{status}}"

# %% The run and its submission, for `make kernel` to fetch.
files = sorted(file for folder in ("runs", "submissions") for file in (KIT / folder).rglob("*") if file.is_file())
with zipfile.ZipFile(WORKING / "{output}", "w") as out:
    for file in files:
        out.write(file, file.relative_to(KIT))
checkpoint = hashlib.sha256()
for file in files:
    if status is None and file.suffix in (".pt", ".npy"):
        checkpoint.update(file.read_bytes())
(WORKING / "{state}").write_text(json.dumps({{"checkpoint": checkpoint.hexdigest() if status is None else ""}}))
tables = sorted((file for file in files if file.suffix == ".csv" and KIT / "submissions" in file.parents),
                key=lambda file: file.stat().st_mtime)
assert tables or status is None, "the training wrote no submission"
if status == 0:
    shutil.copyfile(tables[-1], WORKING / "submission.csv")
"""
)


def code(root: Path = ROOT) -> dict[str, bytes]:
    """The files of the code that a notebook needs, by their names in the checkout."""
    files = {}
    for name in PACKED:
        path = root / name
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            hidden = any(part.startswith(".") or part == "__pycache__" for part in file.relative_to(root).parts)
            if file.is_file() and not hidden and not file.is_symlink() and file.suffix in (".py", ".txt", ".md"):
                files[str(file.relative_to(root))] = file.read_bytes()
    return files


def pack(files: Mapping[str, bytes | Path], archive: Path) -> str:
    """Write the zip archive of contents and of files, the same bytes for the same ones; returns its version.

    The version is the start of the sha256 of all names and contents, and is in the archive.
    """
    digest = hashlib.sha256()
    for name, content in files.items():
        own = sha256(content if isinstance(content, Path) else io.BytesIO(content))
        digest.update(name.encode() + b"\0" + bytes.fromhex(own))
    version = digest.hexdigest()[:12]
    with zipfile.ZipFile(archive, "w") as out:
        for name, content in {**files, VERSION: version.encode()}.items():
            entry = zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0))
            if isinstance(content, Path):  # weights and wheels: they become no smaller
                with open(content, "rb") as stream, out.open(entry, "w", force_zip64=True) as into:
                    shutil.copyfileobj(stream, into)
            else:
                out.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return version


def notebook(
    title: str,
    slug: str,
    competition: str,
    arguments: Sequence[str],
    archive: str,
    version: str,
    internet: bool,
    seconds: float,
) -> str:
    """The notebook as .ipynb text: `python -m common train COMPETITION ARGUMENTS` on the competition's files.

    The training is stopped in time before the end of a session of so many `seconds`.
    """
    words = ("train", competition, *arguments)
    return written(
        TRAINING,
        what="training",
        title=title,
        command=" ".join(("python -m common", *words)),
        archive=archive,
        version=version,
        often_missing=OFTEN_MISSING,
        internet=internet,
        slug=slug,
        words=", ".join(repr(word) for word in words),
        output=OUTPUT,
        state=STATE,
        seconds=seconds - MARGIN_SECONDS,
        patience=MARGIN_SECONDS // 3,
    )


def written(template: str, **values: Any) -> str:
    """A template with its values as .ipynb text."""
    import jupytext

    document = jupytext.reads(template.format(version_file=VERSION, **values), fmt="py:percent")
    document.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return jupytext.writes(document, fmt="ipynb")
