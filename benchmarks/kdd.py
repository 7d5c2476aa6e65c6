"""KDD air quality: medians compared with pandas, all imputers and, with --train, whole train and predict runs.

make bench BENCH=kdd ARGS="--data path/to/kdd_cup_2018"    the real files
make bench BENCH=kdd                                       generated values of the same size
make bench BENCH=kdd ARGS="--data ... --train"             the whole `train` as well (up to 20 minutes)
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.tools.arguments import existing, positive
from benchmarks.tools.turns import in_turns
from common.raw import RawData
from competitions.kdd_air_quality import impute, medians
from competitions.kdd_air_quality.origins import first_hour
from competitions.kdd_air_quality.reader import Observations, read
from competitions.kdd_air_quality.stations import Network

ORIGINS = 60
LAST_ORIGIN = "2018-04-30"


def generated(days: int = 485) -> Observations:
    """Random values in the shape of the real data, a tenth of them missing."""
    random = np.random.default_rng(0)
    network = Network()
    course = np.cumsum(random.normal(0, 0.05, (days * 24, 1, 6)), axis=0)
    values = np.exp(3 + course - course.mean(0) + random.normal(0, 0.3, (days * 24, 48, 6))).astype(np.float32)
    values[random.random(values.shape) < 0.1] = np.nan
    return Observations(np.datetime64("2017-01-01T00", "h"), values, network)


def by_long_table(series: np.ndarray, end: int) -> list[np.ndarray]:
    """Medians of one origin's nine windows from a long table (series, hour, value), as in the competition's files."""
    known = series[: end * 24]
    hours, number = np.indices(known.shape)
    frame = pd.DataFrame(
        {"age": end - hours.ravel() // 24, "hour": hours.ravel() % 24, "series": number.ravel(), "value": known.ravel()}
    )
    return [
        frame[frame["age"] <= length].groupby(["hour", "series"])["value"].median().to_numpy().reshape(24, -1)
        for length in medians.FIB_DAYS
    ]


def by_wide_table(series: np.ndarray, end: int) -> list[np.ndarray]:
    """The same medians from a table with a column per series, which is the least work for pandas."""
    frame = pd.DataFrame(series[: end * 24])
    hours = np.arange(len(frame)) % 24
    return [frame.iloc[-24 * n :].groupby(hours[-24 * n :]).median().to_numpy() for n in medians.FIB_DAYS]


class Timed:
    """Seconds of a `with` block: `clock`, and `work` of the processor, which other processes hardly affect."""

    def __enter__(self) -> "Timed":
        self.clock, self.work = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_) -> None:
        self.clock, self.work = time.perf_counter() - self.clock, time.process_time() - self.work


def compare_medians(series: np.ndarray, repeats: int = 3) -> None:
    days = medians.by_day(series)
    ends = np.arange(len(days) - ORIGINS + 1, len(days) + 1)
    flat = days.reshape(-1, days.shape[2])
    last = int(ends[-1])  # pandas is timed on this origin only, scaled to all origins

    def ours() -> tuple[float, float]:
        with Timed() as timed:
            medians.sliding_medians(days, medians.FIB_DAYS, ends)
        return timed.clock, timed.work

    def theirs(way: Callable[[np.ndarray, int], list[np.ndarray]]) -> tuple[float, float]:
        with Timed() as timed:
            way(flat, last)
        return timed.clock * ORIGINS, timed.work * ORIGINS

    tables = {"group-by, long table": by_long_table, "group-by, wide table": by_wide_table}
    found = medians.sliding_medians(days, medians.FIB_DAYS, ends)
    for way in tables.values():
        for window, expected in enumerate(way(flat, last)):
            np.testing.assert_allclose(found[window, -1], expected, rtol=1e-5)

    ways = {"sliding medians": ours} | {name: partial(theirs, way) for name, way in tables.items()}
    least = {name: np.min(taken, axis=0) for name, taken in in_turns(ways, repeats).items()}
    clock, work = least["sliding medians"]
    print(f"medians, 9 windows x {series.shape[1]} series x {ORIGINS} origins (least of {repeats}, results equal)")
    print(f"  sliding medians       {clock:8.2f} s, processor {work:8.2f} s")
    for name in tables:
        their_clock, their_work = least[name]
        print(
            f"  {name}  {their_clock:8.2f} s, processor {their_work:8.2f} s (timed on one origin, scaled)"
            f"   ratio {their_clock / clock:.1f}, processor {their_work / work:.1f}"
        )


def time_imputers(observations: Observations, jobs: int) -> None:
    with Timed() as fitting:
        imputers = impute.fit(observations, jobs)
    series = observations.series()
    with Timed() as filling:
        filled = impute.fill(imputers, observations)
    print(f"imputers, {sum(map(bool, imputers))} fits on {len(series)} hours, {jobs} at a time")
    print(f"  fit             {fitting.clock:8.2f} s, processor {fitting.work:8.2f} s")
    before, after = np.isnan(series).mean(), np.isnan(filled).mean()
    print(f"  fill            {filling.clock:8.2f} s, processor {filling.work:8.2f} s")
    print(f"  missing         {before:.3f} -> {after:.3f}")


def time_train(data: Path) -> None:
    """Time train and predict in a new folder, because train does nothing where a finished run has the same name."""
    command = [sys.executable, "-m", "common"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with tempfile.TemporaryDirectory(prefix="kit-bench-") as folder:
        for verb in ("train", "predict"):
            words = [*command, verb, "kdd_air_quality", "--data", str(data.resolve()), "--run", "bench"]
            started = time.perf_counter()
            subprocess.run(words, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
            print(f"  {verb:15} {time.perf_counter() - started:8.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=existing, help="folder with the competition's files [generated values]")
    parser.add_argument("--jobs", type=positive, default=2, help="fits at the same time [2]")
    parser.add_argument("--train", action="store_true", help="time train and predict as well (needs --data)")
    given = parser.parse_args()
    if given.train and not given.data:
        parser.error("--train needs --data: train reads the competition's files, not the generated values")
    observations = read(RawData(given.data, "kdd_air_quality")) if given.data else generated()
    known = observations.before(first_hour(LAST_ORIGIN))
    compare_medians(known.series())
    time_imputers(known, given.jobs)
    if given.train:
        print("the whole verbs, in processes of their own")
        time_train(given.data)


if __name__ == "__main__":
    main()
