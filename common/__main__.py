"""`python -m common VERB COMPETITION [--flags]`."""

import multiprocessing
import os
import sys

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


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
