"""Settings of the whole suite: no network, no outside environment variables, real data only if present."""

import gc
import os
import tempfile
from pathlib import Path

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else albumentations asks the package index for updates when imported
os.environ["HF_HUB_OFFLINE"] = "1"  # a weight download then fails at once instead of after retries
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["OMP_NUM_THREADS"] = "1"  # some tests fork a process that trains; a thread pool does not survive a fork
os.environ.setdefault("KIT_CARDS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))  # for tests/gpu
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the suite runs on the CPU, and its forks could not share a GPU
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(name, None)  # a suite started by torchrun would wait for other ranks

# `make test` exports its variables to all child processes, and some tests call make.
MAKE = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "PYTHON", "COMP", "DATA", "RECIPE", "RUN", "FOLD", "ARGS")
for name in (*MAKE, "GIVEN", "RESUME", "TRIALS", "FILE", "MSG", "FORCE", "NPROC", "NNODES", "MASTER", "BENCH"):
    os.environ.pop(name, None)

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

# Third-party modules that the trainings of the competitions import.
LIBRARIES = (
    "albumentations", "cv2", "iterstrat.ml_stratifiers", "lightgbm", "matplotlib.backends.backend_agg",
    "matplotlib.figure", "pandas", "scipy.cluster.hierarchy", "scipy.optimize", "scipy.signal", "scipy.stats",
    "segmentation_models_pytorch", "sklearn.cluster", "sklearn.linear_model", "sklearn.manifold", "timm", "torch",
    "torch._dynamo", "torch.utils.data", "torchvision",
)  # fmt: skip

# no deadline, so that a busy machine fails no test; derandomised, so that every run tests the same examples
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")

from tests.forks import forks  # noqa: E402

ROOT = Path(__file__).parents[1]


# The files with the slowest tests. They start first, so that no process has to finish them alone at the end.
LONGEST = ("test_competitions.py", "test_templates.py", "test_notebook.py")


def pytest_collection_modifyitems(items):
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish():
    gc.freeze()  # modules loaded so far stay in memory, so later collections can skip them


@pytest.fixture(autouse=True, scope="session")
def _temporary_files(tmp_path_factory):
    """Keep all temporary files in pytest's own folder: killed processes leave some behind."""
    os.environ["TMPDIR"] = tempfile.tempdir = str(tmp_path_factory.mktemp("t"))


@pytest.fixture(autouse=True)
def _one_thread():
    """Use one thread per test: faster with parallel tests on two cores, and sums keep their order."""
    torch.set_num_threads(1)


@pytest.fixture
def page():
    """Request this fixture to let runs write their report in spite of `no_page`."""


@pytest.fixture
def no_page(request, monkeypatch):
    """Keep the runs of this process from writing their report, which takes longer than a small training."""
    if "page" not in request.fixturenames:
        monkeypatch.setattr("common.train.write_report", lambda *given: None)


@pytest.fixture(scope="session")
def trainers():
    """Run `python -m common` as forks with libraries loaded, which saves seconds; the kit itself is imported anew."""
    with forks(*LIBRARIES) as found:
        yield found


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with real competition files (KIT_REAL_DATA, or shared/data beside the checkout); skips without it."""
    folder = Path(os.environ.get("KIT_REAL_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data: set KIT_REAL_DATA to a folder laid out like {folder}")
    return folder
