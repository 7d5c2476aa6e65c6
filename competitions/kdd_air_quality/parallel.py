"""Many small fits at once through joblib, so that choosing its backend is all it takes to put them on a cluster."""

from collections.abc import Callable, Sequence
from typing import Any

from common.run import progress


def in_parallel(work: Sequence[tuple[Callable, tuple]], jobs: int, label: str) -> list[Any]:
    """Results of `function(*arguments)` for every piece of work, in their order, with a progress bar.

    The backend is joblib's current one: inside `joblib.parallel_config(backend="ray")` or "dask" the fits go there.
    One thread per fit; jobs=-1 takes every core. The results do not depend on jobs.
    """
    import joblib

    pool = joblib.Parallel(n_jobs=jobs, return_as="generator", batch_size="auto")
    results = pool(joblib.delayed(_one_thread)(function, arguments) for function, arguments in work)
    return list(progress(results, label, len(work), "fit"))


def _one_thread(function: Callable, arguments: tuple) -> Any:
    """Two fits with two threads each are slower on two cores than two fits with one."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1):
        return function(*arguments)
