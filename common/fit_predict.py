"""The training of a fold without a network: the task's own function fits it, with any library."""

import time
from pathlib import Path

from common.config import Config
from common.errors import UserError
from common.files import remove_drafts, write_npy
from common.fold import FACTS, fold_label, rows_of_fold, seed_all, write_facts
from common.predictions import read_predictions, write_predictions
from common.run import Run
from common.scoring import score_kept
from common.task import Task


def fit_predict(task: Task, config: Config, run: Run, fold: int | None) -> Path:
    """`fit` for a task without a network: its own function fits the fold and predicts the rows it has not seen."""
    folder = run.fold_folder(fold)
    if (folder / FACTS).is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    remove_drafts(folder)
    train_rows, valid_rows = rows_of_fold(task, fold)
    started = time.monotonic()
    seed_all(config, fold)
    found = task.fit_predict(train_rows, valid_rows, fold, run.inside(folder))
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        raise UserError(
            f"fit_predict returned {type(found).__name__}: expected two, predictions of the {len(valid_rows)} "
            f"validation rows and of the {len(task.data.test)} test rows"
        )
    oof, test = found
    seconds = time.monotonic() - started
    for name, predictions, count in (("oof", oof, len(valid_rows)), ("test", test, len(task.data.test))):
        if count:
            write_predictions(folder, name, predictions, count, task.postprocess.kept)
    write_npy(folder / "oof_rows.npy", valid_rows)
    scores = {}
    if len(valid_rows):
        whole, *_ = score_kept(task, config, read_predictions(folder, "oof"), valid_rows, {})
        scores = {name: score for name, (score, _) in whole.found().items()}
    write_facts(folder, fold, seconds, {})
    shown = "".join(f"{name} {score:.5g}, " for name, score in scores.items())
    run.log(f"{fold_label(fold)}: {shown}fitted on {len(train_rows)} rows, {seconds:.1f} s")
    return folder
