"""Measure several ways in turn, so that a busy moment of the machine affects all of them and not just one."""

import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

Result = TypeVar("Result")


def in_turns(ways: dict[str, Callable[[], Result]], rounds: int) -> dict[str, list[Result]]:
    """The results of each way, one per round; every round runs all ways once."""
    results: dict[str, list[Result]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            results[name].append(way())
    return results


def least_seconds(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each way in its fastest round, the one least disturbed by other processes."""
    clocked = {name: partial(seconds, way) for name, way in ways.items()}
    return {name: min(taken) for name, taken in in_turns(clocked, rounds).items()}


def seconds(way: Callable[[], object]) -> float:
    started = time.perf_counter()
    way()
    return time.perf_counter() - started
