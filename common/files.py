"""Write, then replace: a file is either the old one or the whole new one, whatever happens in between."""

import csv
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from common.errors import UserError

# What the disk or its permissions can say to a write; any other OSError comes from whoever makes the content.
WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}
FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}
NO_ROOM = 2**20  # bytes
csv.field_size_limit(2**31 - 1)  # the module's 131,072 characters are fewer than the run lengths of a ragged mask take


def not_written(path: Path, error: OSError) -> UserError:
    remedy = "Make it writable for you" if error.errno in FORBIDDEN else f"Free disk space in {path.parent}"
    return UserError(
        f"{path} could not be written ({error.strerror or error}); the file that was there is untouched. "
        f"{remedy} and repeat the same command"
    )


@contextmanager
def replacing(path: Path, mode: str = "wb", **options: Any) -> Iterator[IO]:
    """A file to write that takes the place of `path` once it is complete and on disk; on any error `path` stays.

    Raises UserError when the disk is full or cannot be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(draft, mode, **options) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, path)
    except OSError as error:
        if error.errno not in WRITE_ERRORS:
            raise
        raise not_written(path, error) from error
    finally:
        with suppress(OSError):  # a read-only disk refuses this too, and must not hide what was raised above
            draft.unlink(missing_ok=True)


def remove_drafts(folder: Path) -> None:
    """Delete what writers that were killed have left in a folder that only this process writes."""
    for draft in folder.glob(".*.part"):
        draft.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """What `path` holds; raises UserError when it is damaged: the kit's own files are never half written."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): put a whole copy back, or delete {path.parent} and train again"
        ) from error


def write_text(path: Path, text: str) -> None:
    with replacing(path, "w", encoding="utf-8") as stream:
        stream.write(text)


def write_with(path: Path, writer: Callable[[IO], None]) -> None:
    """Let `writer(stream)` produce the file; failures of the disk inside libraries surface as UserError too."""
    with replacing(path) as stream:
        try:
            writer(stream)
        except RuntimeError as error:  # torch.save reports a full disk as a RuntimeError of its zip writer
            full = shutil.disk_usage(path.parent).free < NO_ROOM
            reason = os.strerror(errno.ENOSPC) if full else str(error).splitlines()[0]
            raise OSError(errno.ENOSPC if full else errno.EIO, reason) from error
