"""The defaults of a task: what a competition leaves out is filled in from its data, and the parts are checked."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

import numpy as np
from torch import Tensor

from common.errors import UserError
from common.raw import RawData
from common.submission import Sample
from common.task import Task
from common.vision.check import image_paths
from common.vision.find import fingerprint


def completed(task: Task, raw: RawData) -> Task:
    """`task` with its defaults filled in from the data; raises UserError when its parts do not fit together."""
    if (task.network is None) == (task.fit_predict is None):
        raise UserError("a Task has either a `network` or a `fit_predict`: give one of them in build()")
    if not task.metrics:
        raise UserError("a Task needs a metric, the first one is its score: give `metrics` one in build()")
    sample = task.sample or Sample.read(raw, task.submission.sample, task.submission.text, task.submission.several)
    data = replace(
        task.data,  # lists and arrays from here on: a pandas column would look up its own index, not positions
        ids=list(task.data.ids),
        folds=np.asarray(task.data.folds),
        test_ids=list(sample.ids if task.data.test_ids is None else task.data.test_ids),
        valid=task.data.train if task.data.valid is None else task.data.valid,
    )
    weights = getattr(data.train, "weights", None)
    by_row = {"ids": data.ids, "folds": data.folds, "valid": data.valid, "weights": weights}
    for name, rows in by_row.items():
        if rows is not None and len(rows) != len(data.train):
            raise UserError(
                f"the data's {name} have {len(rows)} rows and train has {len(data.train)}: expected as many"
            )
    if (count := len(data.test or ())) != len(data.test_ids):
        raise UserError(
            f"{count} test rows have {len(data.test_ids)} ids (of {task.submission.sample}, where `test_ids` "
            f"are not given): expected one for each"
        )
    _check_ids("ids", data.ids)
    _check_ids("test_ids", data.test_ids)
    submission = task.submission if task.submission.rows else replace(task.submission, rows=a_row_each)
    digest = sha256(f"{raw.opened_fingerprint()} {fingerprint(image_paths(data.train))}".encode()).hexdigest()
    return replace(task, data=data, submission=submission, sample=sample, fingerprint=digest)


def _check_ids(name: str, ids: Sequence[str]) -> None:
    """Raises UserError for ids with line breaks, and for ids that occur twice."""
    seen = set()
    for one in map(str, ids):
        if "\n" in one:
            raise UserError(
                f"the id {one!r} contains a line break, and a run saves its ids one per line: mend the data"
            )
        if one in seen:
            raise UserError(
                f"the data's {name} have {one!r} twice, and a run finds its rows by their ids: number them in build(), "
                f"{one}/0, {one}/1 ..."
            )
        seen.add(one)


def a_row_each(ids: Sequence[str], decisions: Tensor | np.ndarray) -> Iterable[Sequence[Any]]:
    """id and decision [B], or id and the decisions [B, columns], as rows of the CSV.

    A whole number has no point: rounded ratings are floats to torch, and Kaggle may refuse 2.0 for a class.
    """
    for name, values in zip(ids, decisions.tolist(), strict=True):
        cells = values if isinstance(values, list) else [values]
        yield (name, *(int(cell) if isinstance(cell, float) and cell.is_integer() else cell for cell in cells))
