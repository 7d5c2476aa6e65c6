"""`python -m common VERB COMPETITION [--flags]`."""

import multiprocessing
import os
import sys
from io import TextIOWrapper

from common.cli import main


def leave(status: int) -> None:
    """Exit this process with `status`.

    A failed process of several exits at once. During Python's own cleanup gloo's threads may abort a process that has
    lost its peers, and torchrun would see the status of that abort.
    """
    if status and os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        for worker in multiprocessing.active_children():
            worker.terminate()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def settle() -> None:
    """Let this process print and draw in any environment, so that neither fails after a long training."""
    os.environ["MPLBACKEND"] = "agg"  # notebooks name their own, which need not be installed here
    os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")  # it warns of every TIFF with a channel that it does not know
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # not None, closed by >&-, nor a notebook's own, as in %run -m common
            stream.reconfigure(errors="backslashreplace")  # an encoding such as ASCII has no sign for ±


if __name__ == "__main__":
    settle()
    leave(main(sys.argv[1:]))
