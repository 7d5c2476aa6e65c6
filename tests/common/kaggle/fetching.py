"""Helpers that run `make data` for the toy competition and inspect the files that it leaves on disk."""

import os
from pathlib import Path

from common.kaggle import data, manifest
from tests.common.kaggle.server import archive

HOME = Path("data/toy")


def fetch(source, **options):
    return data.fetch("toy", source, **options)


def contents(folder: Path = HOME) -> dict[str, bytes]:
    """Relative path -> content of every file in `folder` except the manifest."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != manifest.NAME]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def leftovers() -> set[str]:
    return {path.name for path in Path("data").iterdir()} if Path("data").is_dir() else set()


def assert_nothing_kept():
    """Check that no data, manifest or partial files remain; only a resumable download may stay."""
    assert leftovers() <= {".toy.download"}


def big(kaggle, size=3_000_000):
    """Let the server offer an archive that is large enough to be resumed."""
    kaggle.files["train.csv"] = os.urandom(size)
    _offer(kaggle)


def with_images(kaggle, count=3):
    """Let the server offer images beside the tables."""
    kaggle.files |= {f"train_images/{n}.jpg": b"%d" % n for n in range(count)}
    _offer(kaggle)


def _offer(kaggle) -> None:
    """Rebuild the server's listing and archive from its current files."""
    kaggle.listing = {name: len(content) for name, content in kaggle.files.items()}
    kaggle.archive = archive(kaggle.files)
