"""How many cores a process may use. It needs no package, because make runs it before anything is installed."""

import math
import os
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # what `docker run --cpus` and Kaggle's machines allow


def cores() -> int:
    """This process's cores, by affinity and container quota, divided among torchrun's processes on this computer."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        allowed, period = QUOTA.read_text().split()
    except (OSError, ValueError):
        allowed = "max"
    if allowed != "max":
        there = max(1, min(there, math.ceil(int(allowed) / int(period))))
    processes = os.environ.get("LOCAL_WORLD_SIZE", "")
    return there // (int(processes) if processes.isdecimal() and int(processes) else 1)
