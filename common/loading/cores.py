"""How many cores a process may use. It needs no package, because make runs it before anything is installed."""

import math
import os
from contextlib import suppress
from pathlib import Path

# What `docker run --cpus` and Kaggle's machines allow, in microseconds; the second folder is that of older systems.
QUOTA = Path("/sys/fs/cgroup/cpu.max")
OLDER = Path("/sys/fs/cgroup/cpu")


def cores() -> int:
    """This process's cores, by affinity and container quota, divided among torchrun's processes on this computer."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    allowed, period = _quota()
    if allowed.isdecimal():  # else max, or -1
        there = max(1, min(there, math.ceil(int(allowed) / int(period))))
    processes = os.environ.get("LOCAL_WORLD_SIZE", "")
    return there // (int(processes) if processes.isdecimal() and int(processes) else 1)


def _quota() -> tuple[str, str]:
    """The time on cores that all processes together may take in a period; "max" or "-1" where there is no quota."""
    with suppress(OSError, ValueError):
        allowed, period = QUOTA.read_text().split()
        return allowed, period
    with suppress(OSError):
        return (OLDER / "cpu.cfs_quota_us").read_text().strip(), (OLDER / "cpu.cfs_period_us").read_text()
    return "max", ""
