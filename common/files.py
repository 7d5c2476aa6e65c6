"""Write, then replace: a file is either the old one or the whole new one, whatever happens in between."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from common.errors import UserError


@contextmanager
def replacing(path: Path, mode: str = "wb", **options: Any) -> Iterator[IO]:
    """A file to write that takes the place of `path` once it is complete and on disk; on any error `path` stays.

    Raises UserError when the disk is full or cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(draft, mode, **options) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, path)
    except OSError as error:
        raise UserError(
            f"{path} could not be written ({error.strerror or error}); the file that was there is untouched. "
            f"Free disk space in {path.parent} and repeat the same command"
        ) from error
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path, "w", encoding="utf-8") as stream:
        stream.write(text)


def write_with(path: Path, writer: Callable[[IO], None]) -> None:
    """Let `writer(stream)` produce the file; failures of the disk inside libraries surface as UserError too."""
    with replacing(path) as stream:
        try:
            writer(stream)
        except RuntimeError as error:  # torch.save reports a full disk as a RuntimeError of its zip writer
            raise OSError(str(error).splitlines()[0]) from error
