"""The exception whose message is meant for the user, and its subclass for image files."""

import difflib
from collections.abc import Iterable, Sequence
from os import PathLike


class UserError(Exception):
    """An error that the user can fix: the message holds the value, the expectation and the next command.

    The command line prints it as one line and exits with status 1.
    """


def some(names: Sequence[str], shown: int = 3, by: str = ", ") -> str:
    """The first few names joined, and how many more there are."""
    return by.join(map(quoted, names[:shown])) + (f" and {len(names) - shown:,} more" if len(names) > shown else "")


def quoted(name: str) -> str:
    """The name, in quotes if it is empty or has spaces at its ends, which would not be seen."""
    return name if name and name == name.strip() else repr(name)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters; the name of its type if it has no message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def of_killed_worker(error: RuntimeError) -> UserError:
    """The UserError for torch's error about a killed worker process; raises any other error again.

    torch raises it in the main thread as soon as the process has ended, whatever that thread is doing.
    """
    if not str(error).startswith("DataLoader worker"):
        raise error
    return UserError(
        "a worker process was killed, usually because memory ran out: use fewer --workers or a smaller --batch-size "
        f"({first_line(error)})"
    )


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """A suggestion that ends an error about an unknown `word`: the nearest known word, "" if none is near."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    return f" Did you mean {near[0]}?" if near else ""


class BadImage(UserError):
    """An image that cannot be read; `row` is its row in the dataset, which the loader fills in."""

    def __init__(self, path: str | PathLike, reason: str, row: int | None = None):
        super().__init__(str(path), reason, row)
        self.path, self.reason, self.row = str(path), reason, row

    def __str__(self) -> str:
        row = "" if self.row is None else f" (row {self.row})"
        return (
            f"image {self.path}{row} {self.reason}: replace the file, or leave such images out with "
            "--bad-images skip; make check, with the same COMP= and DATA=, lists them all"
        )
