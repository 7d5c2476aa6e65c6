"""`python -m common VERB COMPETITION [--flags]`."""

import multiprocessing
import os
import sys

from common.cli import main


def leave(status: int) -> None:
    """End this process with `status`.

    One that fails among several ends at once: while Python tidies up, gloo's threads may abort a process that has lost
    the others, and the status that torchrun sees is the abort's.
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
