"""The training notebook, and what it shares with the prediction notebook: the archive of code and the wheels."""

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from importlib import metadata
from pathlib import Path

from common.competition import Competition
from common.config import Config
from common.errors import UserError
from common.files import sha256

ROOT = Path(__file__).parents[3]
PACKED = ("common", "competitions", "requirements.txt")  # nothing else of the checkout leaves this machine
OUTPUT = "kit-output.zip"  # the notebook's output, for the kit and for the next notebook that resumes the run
STATE = "kit-state.json"  # {"checkpoint": sha256 of an unfinished run's files, or "" for a finished run}
ACCELERATOR = "NvidiaTeslaT4"  # where Kaggle distinguishes them, NvidiaTeslaT4Highmem is two of them
SESSION_HOURS = 9.0  # the longest that Kaggle lets a notebook run on a GPU
MARGIN_SECONDS = 900  # at the end of the session, for stopping the training and packing the run
VERSION = "code-version.txt"
ARCHIVE = "kit.zip"
# The platform of Kaggle's image: wheels for another Python or system could not be installed there.
IMAGE = ["--python-version", "3.12", "--implementation", "cp", "--only-binary=:all:"]
IMAGE += [f"--platform=manylinux{name}_x86_64" for name in ("_2_28", "_2_17", "2014", "2010")]
# Packages of requirements.txt that every image of Kaggle has: their wheels, the largest of all, are not uploaded.
AT_HAND = {"torch", "torchvision", "opencv-python", "opencv-python-headless", "numpy", "scipy", "pandas"}
AT_HAND |= {"scikit-learn", "matplotlib", "joblib", "tqdm", "kaggle"}

START = """# %% [markdown]
# `{command}`

# %%
import hashlib, importlib.util, json, os, shutil, signal, subprocess, sys, time, zipfile
from pathlib import Path

END = time.monotonic() + {seconds}  # the work stops then, so that its files are kept
KAGGLE = Path(os.environ.get("KIT_KAGGLE", "/kaggle"))
INPUT, WORKING, KIT = KAGGLE / "input", KAGGLE / "working", KAGGLE.parent / "tmp" / "kit"

# %% Unpack or copy the code: Kaggle may have unpacked its archive already.
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

# %% Unpack the competition's own archives, as `make data` does at home, into a folder that can be written.
if any(data.rglob("*.zip")):
    packed, data = data, KIT / "data" / "unpacked"
    shutil.copytree(packed, data, copy_function=os.symlink)
    unpack = "import sys, pathlib, common.archive as a; a.unpack_links(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", unpack, str(data)], cwd=KIT, env=environment, check=True)

# %% Install the packages that this image lacks, in the versions of requirements.txt.
missing = [pin for module, pin in {needed}.items() if importlib.util.find_spec(module) is None]
install = [sys.executable, "-m", "pip", "install", "--quiet", "--only-binary=:all:", *{options}, *missing]
if missing:
    done = subprocess.run(install, cwd=KIT, capture_output=True, text=True)
    assert done.returncode == 0, f"{{missing}} cannot be installed: {{done.stderr[-500:]}}"
"""

TRAINING = (
    START
    + """
# %% Unpack the unfinished run of the previous session, if there is one.
for archive in INPUT.rglob("{output}"):
    zipfile.ZipFile(archive).extractall(KIT)

# %% Train, with the same command as at home and a process for every GPU.
import torch

cards = torch.cuda.device_count()
launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(cards), "-m", "--"] if cards > 1 else []
command = [sys.executable, "-m", *launch, "common", {words}, "--data", str(data)]
training = subprocess.Popen(command, cwd=KIT, env=environment, start_new_session=True)
try:
    status = training.wait(max(1, END - time.monotonic()))
except subprocess.TimeoutExpired:
    print("the session ends: stopping the training, which the next notebook resumes", flush=True)
    for number, patience in ((signal.SIGINT, {margin} / 3), (signal.SIGKILL, 60)):
        try:
            os.killpg(training.pid, number)
            training.wait(patience)
            break
        except (subprocess.TimeoutExpired, ProcessLookupError):
            continue
    status = 0 if training.returncode == 0 else None  # it may have ended just then
assert status in (0, None), f"the training ended with status {{status}}"

# %% Pack the run and its submission for `make kernel` to fetch.
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


def code(competition: str, root: Path = ROOT) -> dict[str, Path]:
    """The files that a notebook of the competition needs: code and other files, by their paths in the checkout.

    Raises UserError for an import of a module of the checkout that is not among them: Kaggle would not find it.
    """
    others = re.compile(rf"competitions/(?!{competition}/)[^/]+/")
    files = {}
    for name in PACKED:
        path = root / name
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            own = str(file.relative_to(root))
            hidden = any(part.startswith(".") or part == "__pycache__" for part in Path(own).parts)
            foreign = hidden or others.match(own) or (file.is_symlink() and file != path)  # links may lead anywhere
            if file.is_file() and not foreign:
                files[own] = file
    home = f"competitions/{competition}/"
    for own in [own for own in files if own.startswith(home) and own.endswith(".py")]:
        for module in _imported(files[own]):
            path = "/".join(module.split(".")[: 2 if module.startswith("competitions.") else 1])
            is_here = any((root / path).glob("**/*.py")) or (root / f"{path}.py").is_file()
            if is_here and not any(f"{name}/".startswith((f"{path}.py/", f"{path}/")) for name in files):
                raise UserError(
                    f"{own} imports {module}, but only common/ and {home} are uploaded to Kaggle: copy what it needs "
                    f"into {home} and import it from there"
                )
    return files


def _imported(file: Path) -> set[str]:
    """The modules that a Python file imports by their full names; none for notes that are no Python."""
    found, tree = set(), ast.Module([], [])
    with suppress(SyntaxError, ValueError):
        tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {one.name for one in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {f"{node.module}.{one.name}" for one in node.names}
    return found


def refuse_what_stays(competition: Competition, config: Config, internet: bool) -> None:
    """Raise UserError for training images, runs or weights that the notebook would not find on Kaggle."""
    name, images = competition.name, competition.source.images
    if images:
        raise UserError(f"the training images of {name} are not on Kaggle ({images.total}): make train COMP={name}")
    for item in fields(config):
        value, names = getattr(config, item.name), item.metadata.get("names")
        given = f"--{item.name.replace('_', '-')} {value}"
        if names == "runs" and value:
            raise UserError(f"{given}: this machine's runs are not uploaded to Kaggle: make train COMP={name}")
        if names != "weights" or value == "none" or value.startswith("/kaggle/"):
            continue
        home, path = f"competitions/{name}/", os.path.normpath(value)
        if value == "imagenet" and not internet:
            raise UserError(
                f"{given} --internet off: these weights come from the internet: leave out --internet off, or put "
                f"them into a file in {home} and give its path"
            )
        if value != "imagenet" and not any(f"{one}/".startswith(f"{path}/") for one in code(name)):
            raise UserError(
                f"{given}: only files in {home} are uploaded to Kaggle: copy it there, and give its path "
                f"from here, --{item.name.replace('_', '-')} {home}{Path(value).name}"
            )


def needed(files: Mapping[str, Path]) -> dict[str, str]:
    """Pins of the packages of requirements.txt that the code imports, without those AT_HAND; keys are import names."""
    source = b"\n".join(file.read_bytes() for name, file in files.items() if name.endswith(".py"))
    imported = {name.decode() for name in re.findall(rb"^\s*(?:import|from) (\w+)", source, re.MULTILINE)}
    found = {}
    for pin, name in re.findall(r"^(([\w.-]+)==\S+)", files["requirements.txt"].read_text(), re.MULTILINE):
        with suppress(metadata.PackageNotFoundError):  # not installed here, so predicting does not need it
            if name not in AT_HAND:
                own = (file.parts[0] for file in metadata.files(name) or () if file.suffix in (".py", ".so"))
                found |= dict.fromkeys(imported & {module.partition(".")[0] for module in own}, pin)
    return found


def wheels(pins: Iterable[str], folder: Path) -> dict[str, Path]:
    """Download wheels for Kaggle's image into the new `folder`; returns them by their names in the archive.

    Their dependencies are left out, as the image has them. Raises UserError if a wheel cannot be downloaded.
    """
    folder.mkdir()
    words = ["download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest", str(folder), *IMAGE, *pins]
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["it gives no reason"]
        raise UserError(
            f"the wheels of {', '.join(pins)} cannot be downloaded ({lines[-1][:300]}): check the network, or set "
            f"PIP_FIND_LINKS to a folder that has them, then repeat the same command"
        )
    return {f"wheels/{file.name}": file for file in sorted(folder.glob("*.whl"))}


def pack(files: Mapping[str, Path], archive: Path) -> str:
    """Write `files`, paths by their names there, as a zip archive; returns its version. Same files give the same bytes.

    The version is the start of the sha256 of all names and contents; the archive holds it as the file VERSION.
    """
    digest = hashlib.sha256()
    with zipfile.ZipFile(archive, "w") as out:  # not compressed: weights and wheels cannot be, and the code is small
        for name, file in files.items():
            digest.update(name.encode() + b"\0" + bytes.fromhex(sha256(file)))
            with open(file, "rb") as stream, out.open(zipfile.ZipInfo(name), "w", force_zip64=True) as into:
                shutil.copyfileobj(stream, into)
        version = digest.hexdigest()[:12]
        out.writestr(zipfile.ZipInfo(VERSION), version)
    return version


def written(
    template: str,
    slug: str,
    words: Sequence[str],
    version: str,
    needed: Mapping[str, str],
    limit: float,
    margin: float,
    internet: bool = False,
) -> str:
    """A template as .ipynb text: `python -m common WORDS` on the files of the competition `slug`.

    The work stops `margin` seconds before the session's `limit` (seconds), so that its files are kept. It uses the code
    of `version`. `needed` are pins by import name, installed from the uploaded wheels if there is no `internet`.
    """
    import jupytext

    text = template.format(
        command=" ".join(("python -m common", *words)),
        words=", ".join(map(repr, words)),
        slug=slug,
        version=version,
        needed=dict(needed),
        options=[] if internet else ["--no-index", "--no-deps", "--find-links", "wheels"],
        seconds=limit - margin,
        margin=margin,
        archive=ARCHIVE,
        version_file=VERSION,
        output=OUTPUT,
        state=STATE,
    )
    document = jupytext.reads(text, fmt="py:percent")
    document.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return jupytext.writes(document, fmt="ipynb")
