"""A whole run: the folds, their out-of-fold predictions, what is learnt from them, the score and the submission."""

import os
import shlex
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from common import checkpoint, raw
from common import run as runs
from common.config import Config, folds_to_train
from common.device import device_of
from common.engine import memory
from common.engine.ranks import Ranks
from common.evaluate import write_npy_header
from common.files import write_text, write_with
from common.fit import fit
from common.loading import folds, orders
from common.loading.loader import Loader
from common.predict import score, unpack, write_submission
from common.run import Run
from common.task import Task


def train(
    competition: str, module: ModuleType, config: Config, recipe: str, data: str | None, run_name: str | None
) -> None:
    """`make train`: read the data, train the folds (or go on with them), score them and write the submission."""
    memory.keep_freed(config.keep_memory)
    if config.threads:
        torch.set_num_threads(config.threads)
    with Ranks.from_environment() as ranks:
        device_of(config, ranks.local_rank, ranks.world)  # a device that is not there is told before anything is read
        found = raw.find(competition, data, module.write_demo, announce=print if ranks.is_writer else _silent)
        task = module.build(config, found)
        if task.preflight:
            task.preflight()
        provenance = {
            "competition": competition,
            "recipe": recipe,
            "demo": found.is_demo,
            "data": str(found.path.resolve()),
            "data_fingerprint": task.fingerprint,
            "folds_fingerprint": folds.fingerprint(task.folds, task.ids),
            "outputs": task.outputs,
            "command": shlex.join([os.path.relpath(sys.executable), "-m", "common", *sys.argv[1:]]),
            "commit": runs.commit(),
            "machine": runs.machine(),
        }
        run = open_together(competition, run_name, config, provenance, ranks)
        shares = [orders.shard(config.batch_size, rank, ranks.world) for rank in range(ranks.world)]
        if idle := sum(start == stop for start, stop in shares):
            run.log(f"--batch-size {config.batch_size} leaves {idle} of {ranks.world} processes without work: raise it")
        result = ranks.broadcast(run.result)  # the others may have no such file, on disks of their own
        if result is None:
            if ranks.is_writer:
                folds.write_csv(run.path / "folds.csv", task.folds, task.ids)
            folders = [fit(task, config, run, fold, ranks) for fold in folds_to_train(config)]
            if ranks.is_writer:
                finish(run, task, config, folders)
        else:
            run.log(f"{run.path} is finished ({result['monitor']} {result['score']}): only predicting")
        writer = ranks.is_writer
    if writer:
        if task.report and not run.is_finished:
            task.report(run)
        path = write_submission(competition, [(run, task, config)], found.is_demo)
        run.finish()
        print(f"submission: {path}")


def _silent(message: str) -> None:
    """Only the first process speaks."""


def open_together(competition: str, name: str | None, config: Config, provenance: dict, ranks: Ranks) -> Run:
    """The first process opens or makes the run; the others get the same one."""
    if ranks.is_writer:
        try:
            run = runs.open_run(competition, name, config, provenance)
        except BaseException:
            ranks.broadcast(None)  # the others must not wait for a run that will not come
            raise
        ranks.broadcast(run.name)
        return run
    shared = ranks.broadcast(None)
    if shared is None:
        sys.exit(1)
    return Run(runs.RUNS / competition / shared, provenance, is_writer=False)


def finish(run: Run, task: Task, config: Config, folders: list[Path]) -> None:
    """Join the folds' predictions, learn from them, score them with the views, and mark the run as trained."""
    models = [checkpoint.load(folder / "model.pt") for folder in folders]
    result = {
        "monitor": task.metrics[0].name,
        "score": None,
        "metrics": {},
        "learnt": {},
        "rows": 0,
        "training_seconds": round(sum(model["seconds"] for model in models), 1),
        "micro_batch": min(model["micro_batch"] for model in models),
    }
    write_text(run.path / "metrics.csv", joined_metrics(folders))
    if (folders[0] / "oof.npy").is_file():
        rows = np.concatenate([np.load(folder / "oof_rows.npy") for folder in folders])
        parts = [np.load(folder / "oof.npy", mmap_mode="r") for folder in folders]
        write_with(run.path / "oof.npy", lambda stream: join(parts, stream))
        predictions = np.load(run.path / "oof.npy", mmap_mode="r")
        write_text(run.path / "oof_ids.txt", "".join(f"{task.ids[row]}\n" for row in rows))
        result |= {"learnt": task.learn(predictions, rows), "rows": len(rows)}
        result["metrics"] = score_kept(task, config, predictions, rows, result["learnt"])
        result["score"] = result["learnt"].get("score", result["metrics"][result["monitor"]])
    run.write_result(result)
    for folder in folders:
        (folder / "oof.npy").unlink(missing_ok=True)
    if result["metrics"]:
        facts = ", ".join(f"{name} {value:.5f}" for name, value in result["metrics"].items())
        run.log(
            f"held-out score of {run.path}: {result['score']:.5f} ({facts} on {result['rows']} rows), "
            f"trained {result['training_seconds']} s"
        )
    else:
        run.log(f"no score of {run.path}: --fold none holds no rows out, trained {result['training_seconds']} s")


def join(parts: list[np.ndarray], stream) -> None:
    """Write several arrays as one .npy without holding them in memory together."""
    shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
    write_npy_header(stream, parts[0].dtype, shape)
    for part in parts:
        for start in range(0, len(part), 64):
            stream.write(np.ascontiguousarray(part[start : start + 64]).tobytes())


def score_kept(task: Task, config: Config, predictions: np.ndarray, rows: np.ndarray, learnt: dict) -> dict[str, float]:
    """The metrics of predictions [m, ...] that were kept for `rows` [m], with what was learnt from them."""
    loader = Loader(task.plain, orders.sequential(rows), config.batch_size, seed=config.seed)

    def batches():
        position = 0
        for batch in loader.epoch(0):
            yield unpack(predictions[position : position + len(batch)]), batch.targets
            position += len(batch)

    with loader:
        return score(task, batches(), learnt)


def joined_metrics(folders: list[Path]) -> str:
    """The folds' metrics.csv as one table."""
    tables = [(folder / "metrics.csv").read_text().splitlines() for folder in folders]
    return "\n".join([tables[0][0], *(line for table in tables for line in table[1:])]) + "\n"


def check_images(competition: str, module: ModuleType, config: Config, data: str | None) -> None:
    """`make check`: read every image once and list those that cannot be decoded."""
    from common.vision.check import check_folder

    found = raw.find(competition, data, module.write_demo)
    task = module.build(config, found)
    if not task.paths:
        print(f"{competition} has no image files: {found.path} was read and is in order")
        return
    check_folder(task.paths)
    print(f"{len(task.paths)} images of {found.path} can be read")
