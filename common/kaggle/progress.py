"""One line that says how far a long wait is: rewritten on a terminal, printed now and then anywhere else."""

import sys
import time

HEARTBEAT_SECONDS = 20.0


class Progress:
    """Shows the newest `update`; use it as a context, so that a terminal's line is ended before anything else."""

    def __init__(self, label: str):
        self.label, self.start, self.last, self.shown = label, time.monotonic(), time.monotonic(), False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self.shown and sys.stdout.isatty():
            print(flush=True)

    def update(self, text: str) -> None:
        now = time.monotonic()
        if sys.stdout.isatty():
            print(f"\r{self.label}: {text}\033[K", end="", flush=True)
            self.shown = True
        elif now - self.last > HEARTBEAT_SECONDS:
            print(f"{self.label}: {text}", flush=True)
            self.last = now

    def bytes(self, done: int, total: int) -> None:
        """`done` of `total` bytes (0: unknown), with the speed and the time to go."""
        seconds = time.monotonic() - self.start
        speed = done / seconds if seconds > 0 else 0
        text = f"{done / 1e6:,.0f} MB" if not total else f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB"
        left = f", {(total - done) / speed:,.0f} s to go" if total > done and speed > 0 and seconds > 2 else ""
        self.update(f"{text}, {speed / 1e6:,.1f} MB/s{left}")
