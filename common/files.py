"""Write, then replace: a file is either the old one or the whole new one, whatever happens in between."""

import csv
import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from common.errors import UserError, first_line

if TYPE_CHECKING:  # make's own checks run before anything is installed
    import numpy as np

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}
# Errors of the disk or its permissions; any other OSError during a write comes from the code that makes the content.
WRITE_ERRORS = FULL | FORBIDDEN | {errno.EIO}
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # errors of file systems without locks
NO_ROOM = 2**20  # bytes
NOT_NPY = ValueError, EOFError, SyntaxError, tokenize.TokenError  # what numpy raises for a damaged .npy file
NUMPY_CUT = re.compile(r"\d+ requested and \d+ written")  # ndarray.tofile's error on a full disk has no errno
FORMULA = re.compile(r"'*[=+\-@\t\r]")  # start of a cell that a spreadsheet would compute, quoted or not
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
csv.field_size_limit(2**31 - 1)  # the default of 131,072 characters is too few for the run lengths of a ragged mask

# Rules for values of a JSON object: whether a value is allowed, and what is expected in words.
Rules = Mapping[str, tuple[Callable[[Any], bool], str]]
NO_RULES: Rules = {}
TEXT = lambda value: isinstance(value, str), "a text"
TRUTH = lambda value: isinstance(value, bool), "true or false"
COUNT = lambda value: value is None or isinstance(value, int), "a whole number"
NUMBER_OR_NONE = lambda value: value is None or isinstance(value, (int, float)), "a number"
NUMBERS = lambda value: isinstance(value, dict) and all(isinstance(v, (int, float)) for v in value.values()), "numbers"
OBJECT = lambda value: isinstance(value, dict), "an object"
TEXTS = lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value), "a list of texts"
OBJECTS = lambda value: isinstance(value, list) and all(isinstance(v, dict) for v in value), "a list of objects"


def not_written(path: Path, error: OSError) -> UserError:
    remedy = "Make it writable for you" if error.errno in FORBIDDEN else f"Free disk space in {path.parent}"
    return UserError(
        f"{path} could not be written ({error.strerror or error}); the file that was there is untouched. "
        f"{remedy} and repeat the same command"
    )


def not_read(path: Path, error: Exception, again: str = "") -> UserError:
    """The error for a damaged file; `again` is the remedy, if that is not to delete its folder and train again."""
    again = again or f"delete {path.parent} and train again"
    return UserError(f"{path} cannot be read ({error}): restore a complete copy, or {again}")


def require_room(path: Path, size: float, what: str) -> None:
    """Raises UserError when the disk of `path`, which need not exist yet, has no room for `size` bytes of `what`."""
    place = path.absolute()
    while not place.is_dir():
        place = place.parent
    free = shutil.disk_usage(place).free
    if size + NO_ROOM > free:
        raise UserError(
            f"{what} will take {size / 1e9:.2f} GB of {place}, where {free / 1e9:.2f} GB are free: free some disk "
            f"space and repeat the same command"
        )


@contextmanager
def replacing(path: Path, mode: str = "wb", **options: Any) -> Iterator[IO]:
    """Open a draft that replaces `path` once it is complete and on disk; on any error `path` stays as it was.

    Also deletes the drafts of `path` that killed writers left. Raises UserError when the disk is full or cannot be
    written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        make_folder(path.parent)
        with _own_draft(draft, mode, options) as stream:
            _remove_dead_drafts(path)
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            os.replace(draft, path)
    except OSError as error:
        if NUMPY_CUT.search(str(error)):
            error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if error.errno not in WRITE_ERRORS:
            raise
        raise not_written(path, error) from error
    finally:
        with suppress(OSError):  # a read-only disk refuses this too, and must not hide what was raised above
            draft.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make the folder and those above it; raises UserError where one of them is something else."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(
            f"{folder} cannot be a folder: it, or one above it, is a file or a link that leads nowhere. Move it away "
            f"or mend the link, and repeat the same command"
        ) from error


def _own_draft(draft: Path, mode: str, options: dict[str, Any]) -> IO:
    """Open and lock a new draft; until it is locked, another writer may take it for abandoned and delete it."""
    while True:
        stream = open(draft, mode, **options)
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
            if _is_at(draft, stream):
                return stream
        except OSError:  # file systems without locks
            return stream
        stream.close()


def _remove_dead_drafts(path: Path) -> None:
    """Delete drafts of `path` that nobody has locked: a living writer, on any machine, holds a lock on its draft."""
    for draft in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with suppress(OSError), open(draft, "rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(draft, stream):  # else its writer has just put it in place, and may have begun another
                draft.unlink()


def _is_at(path: Path, stream: IO) -> bool:
    """Whether `path` still names the open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(stream.fileno()))
    except FileNotFoundError:
        return False


@contextmanager
def alone_in(folder: Path, drafts: str) -> Iterator[None]:
    """Only one process at a time is inside the block for a `folder`; it first deletes the drafts of killed ones.

    `drafts` is their pattern. Locks the folder itself, so no lock file is left behind. The lock ends with the process,
    however that ends. Where the file system has no locks, processes are not kept apart, and no drafts are deleted.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            for left in folder.glob(drafts):
                remove = shutil.rmtree if left.is_dir() else os.unlink
                remove(left)
        yield
    finally:
        os.close(descriptor)


def is_foreign(name: str) -> bool:
    """Whether a file is hidden, or one that macOS adds to archives and disks: ._train.csv is no train.csv."""
    return name.startswith(".") or name == "__MACOSX"


def sha256(file: Path | BinaryIO) -> str:
    """sha256 of a file's content, or of the rest of a stream, in hexadecimal."""
    with open(file, "rb") if isinstance(file, Path) else nullcontext(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def expanded(given: str | Path, told: str) -> Path:
    """The path with ~ expanded.

    Raises UserError, which calls the path `told`, for an unknown home, a loop of links, or a name that is too long.
    """
    try:
        path = Path(given).expanduser()
        path.resolve()
        with suppress(PermissionError):  # the code that opens it reports this
            path.exists()
        return path
    except (RuntimeError, OSError) as error:
        raise UserError(f"{told} leads nowhere ({error}): give a path that exists") from error


def locked(path: Path, busy: str = "") -> IO[str]:
    """Open and lock `path`; the lock ends when the file is closed, or with the process, however that ends.

    While another process holds the lock it waits or, if `busy` is given, raises UserError(busy) at once.
    """
    try:
        make_folder(path.parent)
        stream = open(path, "a+", encoding="utf-8")
    except OSError as error:
        raise not_written(path, error) from error
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
    except BlockingIOError as error:
        stream.close()
        raise UserError(busy) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            stream.close()
            raise UserError(f"{path} cannot be locked ({error.strerror or error}): repeat the same command") from error
        print(f"note: {path.parent} is on a file system without locks: do not run two commands on it at once")
    return stream


def remove_drafts(folder: Path) -> None:
    """Delete the drafts of killed writers in a folder that only this process writes to."""
    for draft in folder.glob(".*.part"):
        draft.unlink(missing_ok=True)


def read_json(path: Path, *keys: str, rules: Rules = NO_RULES, again: str = "") -> dict[str, Any]:
    """The JSON object in `path`; raises UserError when it is damaged, lacks one of `keys` or breaks one of the `rules`.

    `again` is passed to `not_read`.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"expected an object, found a {type(found).__name__}")
        if missing := [key for key in keys if key not in found]:
            raise ValueError(f"it has no {', '.join(missing)}")
        check_rules(found, rules)
    except (ValueError, RecursionError, OSError) as error:
        raise not_read(path, error, again) from error
    return found


def check_rules(found: Mapping[str, Any], rules: Rules) -> None:
    """Raises ValueError for the first value that breaks its rule; keys may be absent."""
    for key, (holds, expected) in rules.items():
        if key in found and not holds(found[key]):
            raise ValueError(f"{key} is {str(found[key])[:60]!r}, expected {expected}")


def write_text(path: Path, text: str) -> None:
    with replacing(path, "w", encoding="utf-8") as stream:
        stream.write(text)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def number_in(cell: str) -> float | None:
    """The number in a cell; None if it holds something else."""
    try:
        return float(cell)
    except ValueError:
        return None


def read_table(path: Path, *columns: str) -> Iterator[dict[str, str]]:
    """The rows of a CSV as dicts; raises UserError when it is damaged or lacks one of `columns`."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            table = csv.DictReader(stream)
            if missing := [name for name in columns if name not in (table.fieldnames or ())]:
                raise ValueError(f"it has no column {', '.join(missing)}")
            yield from table
    except (ValueError, csv.Error, OSError) as error:
        raise not_read(path, error) from error


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a table for people: a cell that a spreadsheet would compute gets a ' in front. Not for submissions."""
    with replacing(path, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([plain_cell(cell) for cell in row] for row in rows)


def plain_cell(cell: Any) -> Any:
    """`cell` in a form that no spreadsheet computes; numbers stay as they are. `read_cell` undoes it."""
    return f"'{cell}" if isinstance(cell, str) and FORMULA.match(cell) and not NUMBER.fullmatch(cell) else cell


def read_cell(text: str) -> str:
    """The text that `plain_cell` was given."""
    return text[1:] if text.startswith("'") and FORMULA.match(text) else text


def write_with(path: Path, writer: Callable[[IO], None]) -> None:
    """Let `writer(stream)` write the file; disk errors inside libraries are raised as UserError too."""
    with replacing(path) as stream:
        try:
            writer(stream)
        except RuntimeError as error:  # torch.save reports a full disk as a RuntimeError of its zip writer
            full = shutil.disk_usage(path.parent).free < NO_ROOM
            reason = os.strerror(errno.ENOSPC) if full else first_line(error)
            raise OSError(errno.ENOSPC if full else errno.EIO, reason) from error


def write_npy(path: Path, array: "np.ndarray") -> None:
    """numpy.save, replaced as a whole; raises UserError on a full disk."""
    import numpy as np

    write_with(path, lambda stream: np.save(stream, array, allow_pickle=False))


def read_npy(path: Path, again: str = "") -> "np.ndarray":
    """An array in the folder of a run, memory-mapped; raises UserError when it is damaged.

    `again` is passed to `not_read`.
    """
    import numpy as np

    try:
        return np.lib.format.open_memmap(path, "r")  # numpy.load would take a damaged file for a pickle
    except (*NOT_NPY, OSError) as error:
        raise not_read(path, error, again) from error
