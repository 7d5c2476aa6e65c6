"""Progress of long work: a bar on a terminal, a plain line now and then anywhere else."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

HEARTBEAT_SECONDS = 20.0
Item = TypeVar("Item")


def on_terminal() -> bool:
    """Whether stderr is a terminal; a program whose stderr was closed (2>&-) has none."""
    return sys.stderr is not None and sys.stderr.isatty()


class Progress:
    """Shows the newest `update`: as a bar if stderr is a terminal, else on stdout. Its context closes the bar."""

    def __init__(self, label: str, total: int = 0, unit: str = "batches"):
        self.label, self.total, self.unit = label, total, unit
        self.start = self.last = time.monotonic()
        self.bar = None

    def __enter__(self) -> "Progress":
        if on_terminal():
            from tqdm import tqdm

            self.bar = tqdm(desc=self.label, total=self.total or None, unit=f" {self.unit}", leave=False)
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, done: int, note: str | Callable[[], str] = "", total: int = 0) -> None:
        """Report `done` units; a `total` above 0 replaces the earlier one. A function as `note` is called when due."""
        self.total, now = total or self.total, time.monotonic()
        if self.bar is not None:
            self.bar.total = self.total or None
            self.bar.update(done - self.bar.n)
        if now - self.last <= (1 if self.bar is not None else HEARTBEAT_SECONDS) or 0 < self.total <= done:
            return
        self.last, told = now, note() if callable(note) else note
        if self.bar is not None:
            self.bar.set_postfix_str(told)
            return
        of = f"/{self.total}" if self.total else ""
        left = f", {(now - self.start) / done * (self.total - done):.0f} s to go" if self.total and done else ""
        print(f"{self.label}: {done}{of} {self.unit}{left}{told and ', '}{told}", flush=True)


def progress(
    items: Iterable[Item],
    label: str,
    total: int,
    unit: str = "batches",
    show: bool = True,
    facts: Callable[[], str] = str,
) -> Iterator[Item]:
    """Yield the items and show how many are done, with `facts()`, which is called only when a line is due."""
    if not show:
        yield from items
        return
    with Progress(label, total, unit) as shown:
        for done, item in enumerate(items, start=1):
            yield item
            shown.update(done, facts)


def say(message: str) -> None:
    """Print a line, above the bar if there is one."""
    if on_terminal():
        from tqdm import tqdm

        tqdm.write(message)
    else:
        print(message, flush=True)
