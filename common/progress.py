"""One line that says how far a long piece of work is: a bar on a terminal, a plain line now and then anywhere else."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

HEARTBEAT_SECONDS = 20.0
Item = TypeVar("Item")


class Progress:
    """Shows the newest `update` on stderr of a terminal or on stdout; a context, so that the bar goes at its end."""

    def __init__(self, label: str, total: int = 0, unit: str = "batches"):
        self.label, self.total, self.unit = label, total, unit
        self.start = self.last = time.monotonic()
        self.bar = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(desc=self.label, total=self.total or None, unit=self.unit, leave=False)
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, done: int, note: str = "", total: int = 0) -> None:
        """`done` units of the total (0: unknown; a later `total` replaces it), with a note on the state of things."""
        self.total = total or self.total
        if self.bar is not None:
            self.bar.total = self.total or None
            if note:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(done - self.bar.n)
            return
        now = time.monotonic()
        if now - self.last > HEARTBEAT_SECONDS and (done < self.total or not self.total):
            self.last = now
            of = f"/{self.total:,}" if self.total else ""
            left = f", {(now - self.start) / done * (self.total - done):,.0f} s to go" if self.total and done else ""
            print(f"{self.label}: {done:,}{of} {self.unit}{left}{note and ', ' + note}", flush=True)


def progress(items: Iterable[Item], label: str, total: int, unit: str = "batches", show: bool = True) -> Iterator[Item]:
    """Pass the items on and show how many were taken."""
    if not show:
        yield from items
        return
    with Progress(label, total, unit) as shown:
        for done, item in enumerate(items, start=1):
            yield item
            shown.update(done)


def say(message: str) -> None:
    """A line above the bar, where there is one."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        tqdm.write(message)
    else:
        print(message, flush=True)
