"""What a fold's model is worth on the rows that it has not seen, and its predictions of them."""

import csv
from pathlib import Path
from typing import IO

import numpy as np

from common.engine.ranks import SINGLE, Ranks
from common.files import read_cell, replacing, write_csv, write_npy
from common.predict import Predictor, pack, score
from common.run import Run
from common.task import Task


def validate(predictor: Predictor, rows: np.ndarray, ranks: Ranks) -> dict[str, float]:
    """The task's metrics on `rows`, before anything is learnt: every rank scores its share, the sums are added."""
    if len(rows) < ranks.world:  # too few to share: everybody scores all of them
        ranks = SINGLE
    share = np.array_split(rows, ranks.world)[ranks.rank]
    batches = predictor.batches(predictor.task.plain, share)
    return score(predictor.task, ((predictions, targets) for _, predictions, targets in batches), {}, ranks)


def write_out_of_fold(folder: Path, predictor: Predictor, rows: np.ndarray) -> None:
    """oof.npy [m, ...], the predictions of the held-out rows; oof_rows.npy [m], the numbers of those rows.

    The predictions go to the disk batch by batch: those of a segmentation do not fit into the memory.
    """
    task, found = predictor.task, []
    with replacing(folder / "oof.npy") as stream:
        for index, predictions, _ in predictor.batches(task.plain, rows, f"predicting {folder.name}"):
            packed = pack(predictions, task.prediction_type)
            if not found:
                write_npy_header(stream, packed.dtype, (len(rows), *packed.shape[1:]))
            stream.write(np.ascontiguousarray(packed).data)
            found.extend(index.tolist())
        if len(found) < len(rows):  # unreadable images were left out
            stream.seek(0)
            write_npy_header(stream, packed.dtype, (len(found), *packed.shape[1:]))  # of the same length, numpy pads it
    write_npy(folder / "oof_rows.npy", np.array(found))


def write_npy_header(stream: IO, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """The head of a .npy file; the numbers of the array follow it."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)


def write_skipped(run: Run, folder: Path, task: Task, skipped: dict[int, str]) -> None:
    """Add the rows that were left out as unreadable to the fold's skipped.csv, and say so once for each."""
    file = folder / "skipped.csv"
    known = {}
    if file.is_file():
        with open(file, newline="", encoding="utf-8") as stream:
            known = {read_cell(row["id"]): row["reason"] for row in csv.DictReader(stream)}
    new = {str(task.ids[row]): reason for row, reason in skipped.items() if str(task.ids[row]) not in known}
    if new:
        write_csv(file, ("id", "reason"), sorted((known | new).items()))
        run.log(f"left out {len(new)} unreadable images, listed in {file}")
