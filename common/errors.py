"""The one exception a user is meant to read, and its kind for an image file."""

from os import PathLike


class UserError(Exception):
    """Something the user can mend: the message holds the value, the expectation and the next command.

    The command line prints it as one line and exits with status 1; nothing else of the kit catches it.
    """


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
