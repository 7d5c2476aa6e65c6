"""make data of the toy competition, and what it leaves on the disk: what its tests share."""

import os
from pathlib import Path

from common.kaggle import data, manifest
from tests.common.kaggle.server import archive

HOME = Path("data/toy")


def fetch(source, **options):
    return data.fetch("toy", source, **options)


def contents(folder: Path = HOME) -> dict[str, bytes]:
    """The files without the manifest."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != manifest.NAME]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def leftovers() -> set[str]:
    return {path.name for path in Path("data").iterdir()} if Path("data").is_dir() else set()


def assert_nothing_kept():
    """No data, no manifest, no half of anything; a download to be resumed is the only thing that may stay."""
    assert leftovers() <= {".toy.download"}


def big(kaggle, size=3_000_000):
    """An archive that is worth resuming."""
    kaggle.files["train.csv"] = os.urandom(size)
    _offer(kaggle)


def with_images(kaggle, count=3):
    """Images beside the tables."""
    kaggle.files |= {f"train_images/{n}.jpg": b"%d" % n for n in range(count)}
    _offer(kaggle)


def _offer(kaggle) -> None:
    """The listing and the archive of the files that the server holds by now."""
    kaggle.listing = {name: len(content) for name, content in kaggle.files.items()}
    kaggle.archive = archive(kaggle.files)
