"""Checkpoints: plain types and tensors in one file, replaced as a whole, loadable without running any code."""

import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from common.archive import DAMAGED
from common.errors import UserError, first_line
from common.files import write_with


def save(path: Path, state: dict[str, Any]) -> None:
    """Replace `path` by `state` (tensors, numbers, strings, lists, dicts); raises UserError when the disk is full."""
    write_with(path, lambda stream: torch.save(state, stream))


def load(path: Path, *keys: str) -> dict[str, Any]:
    """Load a state, with its tensors on the CPU.

    Raises UserError when the file is damaged, holds anything but plain types, or lacks one of `keys`.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch would take other files for its oldest format, a pickle
            if damaged := archive.testzip():  # torch writes checksums, but does not verify them
                raise EOFError(f"the checksum of {damaged} is wrong")
        found = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(found, dict):
            raise EOFError(f"it holds a {type(found).__name__}, expected a dict of named parts")
        if missing := [key for key in keys if key not in found]:
            raise EOFError(f"it has no {', '.join(missing)}")
    except (pickle.UnpicklingError, *DAMAGED, OSError, LookupError) as error:
        reason = first_line(error)
        if isinstance(error, pickle.UnpicklingError):  # its message advises a mode that runs code from the file
            reason = "it holds more than plain types and tensors, or is damaged"
        raise UserError(
            f"{path} cannot be read as a checkpoint ({reason}): delete it and repeat the command"
        ) from error
    return found


@contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Inside the block, errors of loading the checkpoint `path` into its parts (names, shapes) become UserError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        reason = first_line(error)
        if reason.startswith("Error(s) in loading"):  # the heading of torch's list of mismatches
            reason = str(error).splitlines()[1].strip()[:200]
        raise UserError(
            f"{path} does not fit this network and these settings ({reason}): other code or another run "
            f"wrote it. Restore the run's own file, or delete it and repeat the command"
        ) from error
