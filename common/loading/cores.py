"""How the cores of a machine are divided: loading workers and the threads of the training never exceed them."""

import math
import os
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # what `docker run --cpus` and Kaggle's machines allow


def cores() -> int:
    """The cores that this process may use: by affinity, and by a container's quota."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        allowed, period = QUOTA.read_text().split()
    except (OSError, ValueError):
        return there
    return there if allowed == "max" else max(1, min(there, math.ceil(int(allowed) / int(period))))


def ranks_here() -> int:
    """The processes of this training on this machine, as torchrun says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def workers_of(value: int | str, on_card: bool, ranks_on_this_machine: int = 1) -> int:
    """Loading workers of one process: a number as it is.

    "auto" is its part of the cores, less one for itself; a fourth of them where the cores compute the network too.
    """
    own = cores() // ranks_on_this_machine
    return (max(0, own - 1) if on_card else own // 4) if value == "auto" else int(value)


def threads_of(value: int, workers: int, ranks_on_this_machine: int = 1) -> int:
    """CPU threads of one training process beside `workers` that it uses (0 for data held as tensors).

    A number is taken as it is; 0 leaves the workers a core each, and heeds OMP_NUM_THREADS.
    """
    free = cores() // ranks_on_this_machine - workers
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return value or max(1, min(free, int(wanted)) if wanted.isdecimal() and int(wanted) else free)
