"""Checkpoints: plain types and tensors in one file, replaced as a whole, loadable without running any code."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.files import write_with


def save(path: Path, state: dict[str, Any]) -> None:
    """Replace `path` by `state` (tensors, numbers, strings, lists, dicts); raises UserError when the disk is full."""
    write_with(path, lambda stream: torch.save(state, stream))


def load(path: Path) -> dict[str, Any]:
    """The state on the CPU; raises UserError when the file is damaged or holds anything but plain types."""
    try:
        if not zipfile.is_zipfile(path):  # torch would take anything else for a pickle of its oldest format
            raise EOFError("not a whole file")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} cannot be read as a checkpoint ({reason}): delete it and repeat the command"
        ) from error
