"""Write, then replace: a file is either the old one or the whole new one, whatever happens in between."""

import csv
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO

from common.errors import UserError

# What the disk or its permissions can say to a write; any other OSError comes from whoever makes the content.
WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}
FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}
NO_ROOM = 2**20  # bytes
FORMULA = r"'*[=+\-@\t\r\n]"  # with quotes of its own in front, which must come back
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


def is_visible(name: str) -> bool:
    """Whether a relative name is that of data: neither hidden nor added by a Mac (`__MACOSX`, `._x`, `.DS_Store`)."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def as_cell(text: str) -> str:
    """`text` for a CSV that people open: a quote before whatever a spreadsheet would run as a formula."""
    try:
        float(text)
        return text
    except ValueError:
        return f"'{text}" if re.match(FORMULA, text) else text


def from_cell(cell: str) -> str:
    """What `as_cell` was given."""
    return cell[1:] if cell.startswith("'") and re.match(FORMULA, cell) else cell


def sha256(file: Path | BinaryIO) -> str:
    """sha256 of a file's content, or of the rest of a stream, in hexadecimal."""
    with open(file, "rb") if isinstance(file, Path) else nullcontext(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def locked(path: Path, busy: str = "") -> IO[str]:
    """`path`, opened and locked; the lock goes when it is closed, or with the process, however that ends.

    Waits for another process that holds it, or raises UserError(busy) at once where that is given.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = open(path, "a+", encoding="utf-8")
    except OSError as error:
        raise not_written(path, error) from error
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
    except BlockingIOError as error:
        stream.close()
        raise UserError(busy) from error
    return stream


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
