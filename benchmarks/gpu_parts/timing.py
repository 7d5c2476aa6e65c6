"""How long work takes on a card, where a call returns before its kernels have run."""

import time
from collections.abc import Callable
from typing import Any

import torch


def seconds_of(work: Callable[[], Any], least: float = 0.3) -> float:
    """Seconds of one call: the median of three runs of about `least` seconds, after six calls that are not counted."""

    def taken(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / count

    taken(6)
    count = max(2, min(200, int(least / taken(1))))
    return sorted(taken(count) for _ in range(3))[1]
