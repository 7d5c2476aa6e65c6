"""Median of medians: for every hour of the day the median over windows of several lengths, then the median of those.

The windows slide by one day, so the medians of all origins come from one counting tree per series and hour: a step adds
a day and removes one, 20 times and more cheaper than sorting every window anew.
"""

import numpy as np

from common.errors import UserError

GOLDEN_DAYS = (11, 18, 30, 48, 78, 126, 203, 329)  # each 1.618 times the one before
FIB_DAYS = (7, 14, 21, 35, 56, 91, 147, 238, 385)  # seven times the Fibonacci numbers


def windows_of(name: str) -> tuple[int, ...]:
    """Lengths in days of 'golden_5' (the first five golden windows) or 'fib_9'; raises UserError on another name."""
    family, _, count = name.partition("_")
    lengths = {"golden": GOLDEN_DAYS, "fib": FIB_DAYS}.get(family, ())
    if not count.isdecimal() or not 1 <= int(count) <= len(lengths):
        raise UserError(f"windows {name!r}: expected golden_1 to golden_8 or fib_1 to fib_9")
    return lengths[: int(count)]


def by_day(series: np.ndarray) -> np.ndarray:
    """[hours, S] that end at a midnight -> [days, 24, S]; an incomplete first day is left out."""
    days = len(series) // 24
    return series[len(series) - days * 24 :].reshape(days, 24, *series.shape[1:])


def sliding_medians(days: np.ndarray, lengths: tuple[int, ...], ends: np.ndarray) -> np.ndarray:
    """Medians [windows, ends, 24, S] of `days` [N, 24, S] over days [end - length, end) for each end (ascending).

    Missing values are left out; a window reaches back to the first day at most; NaN where it holds no value.
    """
    shape, lanes = days.shape[1:], days[0].size
    flat = np.ascontiguousarray(days.reshape(len(days), lanes), dtype=np.float32)
    order = np.argsort(flat, axis=0, kind="stable")  # NaN last
    ordered = np.take_along_axis(flat, order, axis=0)
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(len(flat))[:, None], axis=0)
    leaves = 1 << max(len(flat) - 1, 1).bit_length()
    known = np.isfinite(flat)
    result = np.full((len(lengths), len(ends), lanes), np.nan, np.float32)
    for number, length in enumerate(lengths):
        counter = _Counter(leaves, lanes)
        first = last = max(int(ends[0]) - length, 0) if len(ends) else 0
        for position, end in enumerate(ends):
            if last == first and end - last > 1:  # the first window at once, level by level
                counter.fill(ranks[last:end], known[last:end])
                last = int(end)
            while last < end:
                counter.add(ranks[last], known[last], 1)
                last += 1
            while first < end - length:
                counter.add(ranks[first], known[first], -1)
                first += 1
            result[number, position] = counter.median(ordered)
    return result.reshape(len(lengths), len(ends), *shape)


class _Counter:
    """How many values of the window lie under each node of a binary tree over the ranks, per lane."""

    def __init__(self, leaves: int, lanes: int):
        self.leaves, self.lanes = leaves, lanes
        self.counts = np.zeros(2 * leaves * lanes, np.int16)  # [nodes, lanes], flat: one index is faster than two
        self.lane = np.arange(lanes)

    def add(self, rank: np.ndarray, known: np.ndarray, change: int) -> None:
        """Count the values of one day [lanes] in (1) or out (-1)."""
        node = rank + self.leaves
        step = known * np.int16(change)
        while node[0] >= 1:  # all lanes are on the same level
            self.counts[node * self.lanes + self.lane] += step
            node >>= 1

    def fill(self, ranks: np.ndarray, known: np.ndarray) -> None:
        """Count the values of many days [days, lanes] in."""
        table = self.counts.reshape(2 * self.leaves, self.lanes)
        day, lane = np.nonzero(known)
        table[ranks[day, lane] + self.leaves, lane] = 1  # a rank belongs to one day only
        level = self.leaves
        while level > 1:
            table[level // 2 : level] = table[level : 2 * level].reshape(level // 2, 2, self.lanes).sum(1)
            level //= 2

    def _value(self, position: np.ndarray, ordered: np.ndarray) -> np.ndarray:
        """The value at `position` [lanes] (0 is the smallest) of each lane's window."""
        node, rest = np.ones(self.lanes, np.int64), position.copy()
        level = 1
        while level < self.leaves:
            node <<= 1
            left = self.counts[node * self.lanes + self.lane]
            right = rest >= left
            rest -= left * right
            node += right
            level *= 2
        return ordered.ravel()[np.minimum(node - self.leaves, len(ordered) - 1) * self.lanes + self.lane]

    def median(self, ordered: np.ndarray) -> np.ndarray:
        """[lanes], NaN where the window is empty; an even number of values takes the mean of the middle two."""
        count = self.counts[self.lanes : 2 * self.lanes].astype(np.int64)
        low = self._value(np.maximum(count - 1, 0) // 2, ordered)
        high = self._value(np.maximum(count, 1) // 2, ordered)
        return np.where(count > 0, (low + high) / 2, np.nan)


def forecast(series: np.ndarray, lengths: tuple[int, ...], ends: np.ndarray | None = None) -> np.ndarray:
    """Median of medians [origins, 48, S] of hourly values [hours, S] that end at an origin.

    `ends` are origins as numbers of days since the first whole day; by default the end of the data alone. Both forecast
    days use everything before the origin. NaN for a series that has no value in any window.
    """
    days = by_day(series)
    ends = np.array([len(days)]) if ends is None else ends
    medians = sliding_medians(days, lengths, ends)
    return np.tile(median_of(medians), (1, 2, 1))


def median_of(values: np.ndarray) -> np.ndarray:
    """Median over the first axis, missing values left out, without numpy's warning about nothing but missing ones."""
    ordered = np.sort(values, axis=0)
    count = np.isfinite(values).sum(axis=0)
    low = np.take_along_axis(ordered, (np.maximum(count - 1, 0) // 2)[None], axis=0)[0]
    high = np.take_along_axis(ordered, (np.maximum(count, 1) // 2).clip(max=len(values) - 1)[None], axis=0)[0]
    return np.where(count > 0, np.maximum((low + high) / 2, 0), np.nan)
