"""The notebook that trains on Kaggle, and the archive of the code that it runs."""

import hashlib
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[3]
PACKED = ("common", "competitions", "requirements.txt")  # nothing else of the checkout leaves this machine
OUTPUT = "kit-output.zip"  # what the notebook leaves for the kit
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

TEMPLATE = """# %% [markdown]
# {title}: `{command}`

# %%
import importlib.util, os, shutil, subprocess, sys, zipfile
from pathlib import Path

INPUT, WORKING, KIT = Path("/kaggle/input"), Path("/kaggle/working"), Path("/tmp/kit")

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

# %% What Kaggle's image lacks, in the versions of requirements.txt.
pins = dict(line.split("==") for line in (KIT / "requirements.txt").read_text().splitlines() if "==" in line)
often_missing = {often_missing}
missing = [f"{{name}}=={{pins[name]}}" for module, name in often_missing.items()
           if name in pins and importlib.util.find_spec(module) is None]
if missing and {internet}:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *missing], check=True)
elif missing:
    print("not installed, as the internet is off:", ", ".join(missing))

# %% The training: the same command as at home.
data = next(path for path in (INPUT / "competitions" / "{slug}", INPUT / "{slug}") if path.is_dir())
command = [sys.executable, "-m", "common", {words}, "--data", str(data)]
environment = os.environ | {{"PYTHONPATH": str(KIT), "NO_ALBUMENTATIONS_UPDATE": "1"}}
subprocess.run(command, cwd=KIT, env=environment, check=True)

# %% The run and its submission, for `make kernel` to fetch.
tables = sorted((KIT / "submissions").glob("*/*.csv"), key=lambda file: file.stat().st_mtime)
assert tables, "the training wrote no submission"
shutil.copyfile(tables[-1], WORKING / "submission.csv")
with zipfile.ZipFile(WORKING / "{output}", "w", zipfile.ZIP_DEFLATED) as out:
    for folder in ("runs", "submissions"):
        for file in sorted((KIT / folder).rglob("*")):
            if file.is_file():
                out.write(file, file.relative_to(KIT))
"""


def pack(root: Path = ROOT) -> tuple[bytes, str]:
    """The code as a zip archive, the same bytes for the same code, and its version (the start of its sha256)."""
    files = {}
    for name in PACKED:
        path = root / name
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            hidden = any(part.startswith(".") or part == "__pycache__" for part in file.relative_to(root).parts)
            if file.is_file() and not hidden and not file.is_symlink() and file.suffix in (".py", ".txt", ".md"):
                files[str(file.relative_to(root))] = file.read_bytes()
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    version = digest.hexdigest()[:12]
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as out:
        for name, content in {**files, VERSION: version.encode()}.items():
            out.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), content, zipfile.ZIP_DEFLATED)
    return stream.getvalue(), version


def notebook(
    title: str, slug: str, competition: str, arguments: Sequence[str], archive: str, version: str, internet: bool
) -> str:
    """The notebook as .ipynb text: `python -m common train COMPETITION ARGUMENTS` on the competition's files."""
    import jupytext

    words = ("train", competition, *arguments)
    text = TEMPLATE.format(
        title=title,
        command=" ".join(("python -m common", *words)),
        archive=archive,
        version_file=VERSION,
        version=version,
        often_missing=OFTEN_MISSING,
        internet=internet,
        slug=slug,
        words=", ".join(repr(word) for word in words),
        output=OUTPUT,
    )
    document = jupytext.reads(text, fmt="py:percent")
    document.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return jupytext.writes(document, fmt="ipynb")
