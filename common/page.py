"""The page of a run, report.html: what every run has, its mistakes, and the competition's own plots."""

import numpy as np
from torch import Tensor

from common.config import Config
from common.loading.loader import in_order
from common.mistakes import mistakes, samples
from common.predict import Member
from common.predictions import read_predictions, row_numbers, unpack
from common.report import Report, default_report
from common.task import Task


def write_report(member: Member, recipe: Config) -> None:
    """Write report.html: curves, folds, settings, mistakes, and the competition's own plots."""
    finish_page(default_report(member.run, vars(member.config), member.task.metrics, vars(recipe)), member)


def finish_page(page: Report, member: Member) -> None:
    """Add the mistakes of the out-of-fold predictions and the competition's own plots, and write the page."""
    run, task, config = member
    kept = read_predictions(run.path, "oof")
    if isinstance(kept, np.ndarray):
        rows = row_numbers(run.path, "oof", task.data.ids)
        if (targets := _targets(task, config, rows)) is not None:
            ids = [task.data.ids[row] for row in rows]
            images = lambda places: samples(task.data.valid, rows[places])  # noqa: E731
            mistakes(page, np.asarray(unpack(kept)), targets, ids, task.names, images)
    if task.report:
        task.report(run, page)
    page.write()


def _targets(task: Task, config: Config, rows: np.ndarray) -> np.ndarray | None:
    """The targets of `rows` [m] or [m, columns]; None where they are trees, or maps of pixels."""
    found = []
    for batch in in_order(task.data.valid, rows, config.batch_size, config.seed):
        if not isinstance(batch.targets, Tensor) or batch.targets.ndim > 2:
            return None
        found.append(batch.targets.cpu().numpy())
    return np.concatenate(found)
