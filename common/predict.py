"""Predictions: averaged over views, folds and runs, and streamed into the submission."""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common import checkpoint, raw, submission
from common import run as runs
from common.batch import Tree, map_tree
from common.config import Config, differences, folds_to_train, with_flags
from common.device import device_of, precision_of
from common.engine import memory
from common.engine.ranks import SINGLE, Ranks
from common.errors import UserError
from common.loading import orders
from common.loading.loader import Loader
from common.progress import progress
from common.run import Run
from common.task import Learnt, Task, View

AS_IS = (View("as is"),)


class Predictor:
    """Averages models and views over the batches of a dataset; shrinks a batch that the memory does not hold."""

    def __init__(
        self,
        models: Sequence[nn.Module],
        task: Task,
        views: Sequence[View],
        config: Config,
        batch_size: int,
        device: torch.device,
    ):
        self.models, self.task, self.views, self.config = models, task, views, config
        self.device, self.batch_size = device, max(1, batch_size)
        self.fitting = self.batch_size  # samples at once that the memory is known or hoped to hold
        self.skipped: dict[int, str] = {}  # rows left out as unreadable, and why
        precision = precision_of(config, device)
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]

    def batches(
        self,
        dataset: Any,
        rows: np.ndarray,
        label: str | None = None,
    ) -> Iterator[tuple[np.ndarray, Tensor, Tree]]:
        """Yields (rows [B], predictions [B, ...], targets [B, ...]) over `rows` of `dataset`, in their order."""
        workers = min(self.config.workers, len(rows) // self.batch_size)  # a small set is read before workers start
        loader = Loader(
            dataset,
            orders.sequential(rows),
            self.batch_size,
            seed=self.config.seed,
            workers=workers,
            device=self.device,
            bad_images=self.config.bad_images,
        )
        try:
            batches = progress(loader.epoch(0), label or "", loader.batches_per_epoch, show=label is not None)
            for batch in batches:
                yield batch.index.cpu().numpy(), self._average(batch.inputs), batch.targets
        finally:
            self.skipped |= dict(loader.skipped)
            loader.close()

    @torch.inference_mode()
    def _average(self, inputs: Tree) -> Tensor:
        size = len(_first(inputs))
        parts, start = [], 0
        while start < size:
            part, failed, step = None, False, min(self.fitting, size - start)
            try:
                part = self._forward(map_tree(lambda x: x[start : start + step].to(self.device), inputs))  # noqa: B023
            except (RuntimeError, MemoryError) as error:
                if not memory.is_out_of_memory(error):
                    raise
                if step == 1:
                    raise UserError(
                        "out of memory while a single sample is predicted: try --precision bf16 on a card that has "
                        "it, --device cpu, or a smaller input size"
                    ) from error
                failed = True
            if failed:  # outside `except`: the traceback keeps every activation alive
                memory.release()
                self.fitting = (step + 1) // 2
                continue
            parts.append(part)
            start += step
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _forward(self, inputs: Tree) -> Tensor:
        """Mean over models and views of one batch's predictions; raises UserError on a value that is not finite."""
        total = None
        for model in self.models:
            for view in self.views:
                with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
                    outputs = model(view.apply(inputs))
                outputs = map_tree(lambda x: x.float() if x.is_floating_point() and x.itemsize < 4 else x, outputs)
                predictions = view.undo(self.task.predict(outputs))
                total = predictions if total is None else total + predictions
        mean = total / (len(self.models) * len(self.views)) if total.is_floating_point() else total
        if mean.is_floating_point() and not bool(torch.isfinite(mean).all()):
            raise UserError(
                "a prediction is NaN or infinite, so no submission is written: train with a lower --lr, "
                "with --clip-norm 1, or with --precision fp32"
            )
        return mean


def _first(tree: Tree) -> Tensor:
    while not isinstance(tree, Tensor):
        tree = next(iter(tree.values() if isinstance(tree, dict) else tree))
    return tree


def pack(predictions: Tensor, kind: str) -> np.ndarray:
    """Predictions [B, ...] as they are kept on disk; uint8 holds probabilities in 255 steps."""
    array = predictions.detach().cpu().numpy()
    return np.rint(array * 255).astype(np.uint8) if kind == "uint8" else array.astype(kind)


def unpack(kept: np.ndarray) -> Tensor:
    """What `pack` kept, as float32 predictions [B, ...]."""
    return torch.from_numpy(kept.astype(np.float32) / (255 if kept.dtype == np.uint8 else 1))


def score(
    task: Task, batches: Iterable[tuple[Tensor, Tree]], learnt: Learnt, ranks: Ranks = SINGLE
) -> dict[str, float]:
    """Every metric of the task over (predictions, targets) batches: sums per metric over all ranks, divided once."""
    sums: dict[str, Tensor] = {}
    count = torch.zeros((), dtype=torch.float64)
    for predictions, targets in batches:
        targets = map_tree(lambda x: x.to(predictions.device), targets)  # noqa: B023
        decisions = task.decide(predictions, learnt)
        for metric in task.metrics:
            stats = metric.stats(decisions, targets).detach().cpu().double().sum(0)
            sums[metric.name] = sums[metric.name] + stats if metric.name in sums else stats
        count += len(predictions)
    shapes = ranks.union({name: tuple(total.shape) for name, total in sums.items()})
    if not shapes:
        raise UserError(
            "not one of the held-out images can be read: make check, with the same COMP= and DATA=, lists them"
        )
    totals = {  # a rank that could read none adds zeros
        name: sums.get(name, torch.zeros(shape, dtype=torch.float64)) for name, shape in sorted(shapes.items())
    }
    for total in (count, *totals.values()):
        ranks.sum_(total)
    return {metric.name: float(metric.value(totals[metric.name], float(count))) for metric in task.metrics}


def load_models(run: Run, task: Task, config: Config, device: torch.device) -> list[nn.Module]:
    """The fold models of a run, in evaluation mode on `device`; raises UserError when one of them is missing."""
    files = [run.fold_folder(fold) / "model.pt" for fold in folds_to_train(config)]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"{', '.join(missing)} of {len(files)} models of the run {'is' if len(missing) == 1 else 'are'} missing: "
            f"delete {run.path / 'result.json'} and train what is missing with the run's command and RUN={run.name}"
        )
    return [load_model(checkpoint.load(file), task, config, device) for file in files]


def load_model(found: dict[str, Any], task: Task, config: Config, device: torch.device) -> nn.Module:
    """The network of a model.pt, in evaluation mode on `device`."""
    model = task.model()
    model.load_state_dict(found["model"])
    memory_format = torch.channels_last if config.channels_last else torch.preserve_format
    return model.to(device, memory_format=memory_format).eval()


def write_submission(competition: str, members: Sequence[tuple[Run, Task, Config]], is_demo: bool) -> Path:
    """Average the members' predictions of the test rows and write the checked CSV; returns its path."""
    first_run, task, config = members[0]
    device = device_of(config)
    rows = np.arange(len(task.test))
    streams, predictors = [], []
    for run, member_task, member_config in members:
        if list(member_task.test_ids) != list(task.test_ids):
            raise UserError(
                f"runs {first_run.name} and {run.name} predict different test rows: average runs of the same data"
            )
        run.check_outputs(member_task.outputs)
        if member_task.outputs != task.outputs:
            raise UserError(
                f"run {first_run.name} predicts {task.outputs}, run {run.name} {member_task.outputs}: average runs of "
                f"the same data"
            )
        if member_task.fingerprint != task.fingerprint:
            print(f"{first_run.name} and {run.name} are averaged, with the same ids but from files of other contents")
        models = load_models(run, member_task, member_config, device)
        views = member_task.views if member_config.views else AS_IS
        batch_size = min(member_config.batch_size, (run.result or {}).get("micro_batch", member_config.batch_size))
        predictor = Predictor(models, member_task, views, member_config, batch_size, device)
        predictors.append(predictor)
        label = f"predicting {run.name}" if run is first_run else None
        streams.append(_sample_by_sample(predictor.batches(member_task.test, rows, label)))
    deciding, learnt = _rules_of(members)

    def csv_rows() -> Iterator[Sequence[Any]]:
        together = zip(*streams, strict=True)
        while chunk := list(islice(together, config.batch_size)):
            index = [member[0][0] for member in chunk]
            mean = torch.stack(
                [sum(p for _, p in member) / len(member) if len(member) > 1 else member[0][1] for member in chunk]
            )
            yield from task.rows([task.test_ids[row] for row in index], deciding.decide(mean, learnt))
        if unreadable := predictors[0].skipped:
            named = [f"{task.test_ids[row]}: {why.split(': replace')[0]}" for row, why in unreadable.items()][:5]
            raise UserError(
                f"{len(unreadable)} test images cannot be read ({'; '.join(named)}), and a submission needs every one: "
                f"replace the files, then predict again with make predict COMP={competition} RUN={first_run.name}"
            )

    name = "+".join(run.name for run, _, _ in members) + ("-demo" if is_demo and "demo" not in first_run.name else "")
    scores = [  # no flag of `predict` may hide behind the score of the training
        None if differences(run.config(type(own)), own) else (run.result or {}).get("score") for run, _, own in members
    ]
    for run, _, own in members:
        if changes := differences(run.config(type(own)), own):
            print(f"{run.name} was trained and scored otherwise ({'; '.join(changes)}): its score is not this file's")
    provenance = {
        "competition": competition,
        "run": ",".join(run.name for run, _, _ in members),
        "recipe": first_run.provenance["recipe"],
        "score": scores[0] if len(scores) == 1 else None,
        "monitor": task.metrics[0].name,
        "commit": runs.commit(),
        "data_fingerprint": task.fingerprint,
        "demo": is_demo,
        "created": runs.now(),
    }
    path = submission.SUBMISSIONS / competition / f"{name}.csv"
    return submission.write(path, task.columns, csv_rows(), task.sample_submission(), task.valid, provenance)


def _rules_of(members: Sequence[tuple[Run, Task, Config]]) -> tuple[Task, Learnt]:
    """Who decides, and with what it learnt: the run that scored best with its rules, whatever the order of the runs."""
    found = [(run, task, run.result) for run, task, _ in members if (run.result or {}).get("learnt")]
    if not found:
        return members[0][1], {}
    better = max if members[0][1].metrics[0].higher_is_better else min
    run, task, result = better(found, key=lambda entry: entry[2]["score"])
    if len(members) > 1:
        print(f"decided by the rules of {run.name}, the best of these runs")
    return task, result["learnt"]


def _sample_by_sample(batches: Iterator[tuple[np.ndarray, Tensor, Tree]]) -> Iterator[tuple[int, Tensor]]:
    for rows, predictions, _ in batches:
        yield from zip(rows.tolist(), predictions, strict=True)


def predict(competition: str, module: ModuleType, given: argparse.Namespace) -> None:
    """`make predict`: the submission of finished runs again, from their own configs and the data of their training."""
    if given.run is not None:
        chosen = [runs.load(competition, name) for name in given.run.split(",")]
    else:
        chosen = [run for run in runs.all_runs(competition) if run.result is not None][-1:]
    if not chosen:
        raise UserError(f"no finished run of {competition}: make train COMP={competition}")
    members, samples = [], set()
    for run in chosen:
        if run.result is None:
            raise UserError(f"{run.path} is not finished: repeat its command, {run.provenance.get('command', '')}")
        config = with_flags(run.config(type(module.RECIPES["default"])), given)
        memory.keep_freed(config.keep_memory)
        if config.threads:
            torch.set_num_threads(config.threads)
        found = raw.of_run(run.provenance, given.data, module.write_demo)
        samples.add(found.is_demo or run.provenance["demo"])
        task = module.build(config, found)
        if task.preflight:
            task.preflight()
        members.append((run, task, config))
    path = write_submission(competition, members, is_demo=any(samples))
    if len(members) == 1 and not given.data:
        members[0][0].finish()
    print(f"submission: {path}")
