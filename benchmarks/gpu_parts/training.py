"""One training and prediction as users have them, beside the same work on data that is ready on the device.

    python -m benchmarks.gpu_parts.training clouds default 2        competition, recipe, epochs (0: the recipe's)

benchmarks.gpu starts it in an empty folder and a process of its own. The data are the demo's, several times. The last
line of the output holds the figures as JSON; the lines before are the training's log.
"""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.gpu_parts.timing import seconds_of
from common import competition as competitions
from common.batch import map_tree
from common.defaults import completed
from common.device import peak_memory, use_threads
from common.engine.ranks import SINGLE
from common.fit import Training
from common.inference import tta_of
from common.raw import RawData
from common.run import Run
from common.task import needs_workers

IMAGES, ROWS = 384, 42_000  # of the training data, at least: files of images, or rows of one file


def multiplied(folder: Path) -> None:
    """Repeat the rows of train.csv; if their images are files, then these and the sample submission too."""
    parts = [part for part in sorted(folder.iterdir()) if part.is_dir()]
    rows = len((folder / "train.csv").read_text().splitlines()) - 1
    files = [file.stem for part in parts if "train" in part.name for file in part.iterdir()]
    images = len({stem.rpartition("_")[0] or stem for stem in files})  # of four files each where colours are files
    copies = range(1, -(-(IMAGES if parts else ROWS) // (images or rows)))
    copies = [str(number) if parts else "" for number in copies]
    for file in (file for part in parts for file in sorted(part.iterdir())):
        for prefix in copies:
            os.link(file, file.with_name(prefix + file.name))
    for name in ("train.csv", "sample_submission.csv") if parts else ("train.csv",):
        header, *lines = (folder / name).read_text().splitlines()
        again = [prefix + line for prefix in copies for line in lines]
        (folder / name).write_text("\n".join([header, *lines, *again]) + "\n")


def measured(name: str, recipe: str, epochs: int) -> dict[str, Any]:
    competition = competitions.load(name)
    data, folder = Path("data").resolve(), Path("run")
    data.mkdir()
    folder.mkdir()
    competition.write_demo(data)
    multiplied(data)
    config = competition.recipes[recipe]
    config = replace(config, fold="0", epochs=epochs or config.epochs)
    if hasattr(config, "encoder_weights"):
        config = replace(config, encoder_weights="none")
    found = RawData(data, name, is_demo=True)
    task = completed(competition.build(config, found, print), found)
    use_threads(config, needs_workers(task))
    training = Training(task, config, Run(folder, {}), 0, SINGLE)
    for _ in range(config.epochs):
        training._epoch()
    state, device = training.state, training.device
    row = {"images/s": round(state.history[-1]["samples_per_second"]), "peak GiB": peak_memory(device)}
    row["seconds"] = round(state.seconds, 1)
    batch = next(training.loader.epoch(config.epochs))
    training._train(True)
    row["ready images/s"] = round(len(batch) / seconds_of(lambda: training._step(batch)))
    training._collect()
    row["of ready"] = row["images/s"] / row["ready images/s"]
    training.loader.close()
    return row | predicted(training)


def predicted(training: Training) -> dict[str, Any]:
    """Test images per second, with loading, TTA and copying to the host, and those of the model and TTA alone."""
    task = training.task
    predictor = training._predictor(tta_of(task, training.config))
    batch = next(training._loader(epochs=1).epoch(0))
    size = min(predictor.batch_size, len(batch))
    inputs = predictor._cut(batch.inputs, 0, size)
    alone = size / seconds_of(lambda: predictor._average(inputs))
    count = len(task.data.test)
    rows = np.resize(np.arange(count), count if needs_workers(task) else ROWS)
    started = time.perf_counter()
    for _, predictions, *_ in predictor.batches(task.data.test, rows):
        map_tree(Tensor.cpu, predictions)
    whole = len(rows) / (time.perf_counter() - started)
    return {"predicted/s": round(whole), "ready predicted/s": round(alone), "of ready predicted": whole / alone}


if __name__ == "__main__":
    print(json.dumps(measured(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
