"""Checkpoints: plain types and tensors in one file, replaced as a whole, loadable without running any code."""

import pickle
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.files import write_with


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, lists, dicts) over `path` atomically; raises UserError on a full disk."""
    write_with(path, lambda stream: torch.save(state, stream))


def load(path: Path) -> dict[str, Any]:
    """The state on the CPU; raises UserError when the file is damaged or holds anything but plain types."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError) as error:
        raise UserError(f"{path} cannot be read as a checkpoint ({str(error).splitlines()[0]}): "
                        f"delete it and repeat the command") from error
