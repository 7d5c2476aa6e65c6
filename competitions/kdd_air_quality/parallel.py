"""Many small fits at once, through joblib: choosing its backend is all it takes to put them on a cluster."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from common.progress import progress

# Of all trees. One thread each: they are fitted side by side.
TREES = {
    "num_leaves": 31,
    "bagging_fraction": 0.5,
    "bagging_freq": 1,  # without it LightGBM ignores the fraction
    "max_bin": 63,
    "num_threads": 1,
    "deterministic": True,
    "force_row_wise": True,
    "verbose": -1,
}


def fit_trees(
    table: np.ndarray, target: np.ndarray, settings: dict[str, Any], rounds: int, categorical: Sequence[int] = ()
) -> str:
    """A LightGBM model as text, of `table` [n, F], some of whose columns are `categorical`, and `target` [n]."""
    import lightgbm

    data = lightgbm.Dataset(table, target, categorical_feature=list(categorical), params={"max_bin": TREES["max_bin"]})
    return lightgbm.train(TREES | settings, data, rounds).model_to_string()


def in_parallel(work: Sequence[tuple[Callable, tuple]], jobs: int, label: str) -> list[Any]:
    """Results of `function(*arguments)` for every piece of work, in their order, with a progress bar.

    Threads by default: LightGBM and Stan compute outside Python, and nothing has to be copied. Inside
    `joblib.parallel_config(backend="ray")` or "dask" the fits go there. Every fit keeps to one thread itself;
    jobs=-1 takes every core. The results do not depend on jobs.
    """
    import joblib

    try:
        pool = joblib.Parallel(n_jobs=jobs, prefer="threads", return_as="generator")
    except ValueError:  # Ray's backend hands its results back all at once: the bar stands still until then
        pool = joblib.Parallel(n_jobs=jobs)
    results = pool(joblib.delayed(function)(*arguments) for function, arguments in work)
    return list(progress(results, label, len(work), "fits"))
