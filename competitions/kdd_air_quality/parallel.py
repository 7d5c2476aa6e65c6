"""Many small fits in parallel through joblib, whose backend can be a cluster."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from common.progress import progress

# Settings of all trees. Each fit has one thread, as the fits run in parallel.
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
    """Fit a LightGBM model to `table` [n, F], with its `categorical` columns, and `target` [n]; returned as text."""
    import lightgbm

    data = lightgbm.Dataset(table, target, categorical_feature=list(categorical), params={"max_bin": TREES["max_bin"]})
    return lightgbm.train(TREES | settings, data, rounds).model_to_string()


def in_parallel(work: Sequence[tuple[Callable, tuple]], jobs: int, label: str) -> list[Any]:
    """Results of `function(*arguments)` for every item of `work`, in their order, with a progress bar.

    By default the fits run in threads, because LightGBM and Stan compute outside Python, and nothing is copied. Inside
    `joblib.parallel_config(backend="ray")` or "dask" they run on that backend. Every fit itself uses one thread;
    jobs=-1 uses every core. The results do not depend on jobs.
    """
    import joblib

    try:
        pool = joblib.Parallel(n_jobs=jobs, prefer="threads", return_as="generator")
    except ValueError:  # Ray's backend returns all results at once, so the progress bar jumps at the end
        pool = joblib.Parallel(n_jobs=jobs)
    results = pool(joblib.delayed(function)(*arguments) for function, arguments in work)
    return list(progress(results, label, len(work), "fits"))
