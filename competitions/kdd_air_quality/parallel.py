"""Many small fits at once through joblib, so that choosing its backend is all it takes to put them on a cluster."""

from collections.abc import Callable, Sequence
from typing import Any

from common.progress import progress


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
