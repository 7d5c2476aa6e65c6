"""From models to predictions: average over models and TTA, score validation rows, write out-of-fold predictions."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common import checkpoint, metrics
from common.batch import Tree, concatenated, map_tree, on_device, tensors_of
from common.config import Config, folds_to_train
from common.device import device_of, precision_of, prepare_device, workers_of
from common.engine import memory
from common.engine.precision import autocast, to_float32
from common.engine.ranks import SINGLE, Ranks
from common.engine.replay import Replay
from common.errors import UserError
from common.files import read_cell, read_json, read_table, write_csv, write_npy
from common.fold import FACTS
from common.loading import orders
from common.loading.loader import Loader
from common.losses.protocol import batch_value
from common.predictions import Predictions, PredictionWriter, mean_of
from common.progress import progress
from common.run import Run
from common.task import AS_IS, TTA, Task, Tuned


class Predictor:
    """Predicts the batches of a dataset, averaged over models and TTA; splits a batch that does not fit into memory."""

    def __init__(
        self,
        models: Sequence[nn.Module],
        task: Task,
        tta: Sequence[TTA],
        config: Config,
        batch_size: int,
        device: torch.device,
        replay: Replay | None = None,
    ):
        self.models, self.task, self.tta, self.config = models, task, tta, config
        self.replay = replay  # of a training, whose graph gives way where memory is short
        self.device, self.batch_size = device, batch_size
        self.fitting = self.batch_size  # samples at once that should fit into memory
        self.heads: dict[nn.Module, list[nn.Module]] = {}  # the last layers of every model
        self.skipped: dict[int, str] = {}  # rows left out as unreadable, and why
        self.precision = precision_of(config, device)
        self.joins_tta = device.type != "cpu"  # all TTA in one forward pass: small batches leave a card idle

    def batches(
        self, dataset: Any, rows: np.ndarray, label: str | None = None, loss: Any = None
    ) -> Iterator[tuple[np.ndarray, Predictions, Tree, Tensor | None]]:
        """Yields (rows [B], predictions [B, ...], targets [B, ...], value of `loss`) over `rows`, in their order."""
        workers = min(workers_of(self.config, self.device), len(rows) // self.batch_size)  # few rows: faster without
        loader = Loader(
            dataset,
            orders.sequential(rows),
            self.batch_size,
            seed=self.config.seed,
            workers=workers,
            epochs=1,
            device=self.device,
            bad_images=self.config.bad_images,
        )
        try:
            shown = progress(loader.epoch(0), label or "", loader.batches_per_epoch, show=label is not None)
            for batch in shown:
                truth = None if loss is None else (batch.targets, batch.weights)
                predictions, value = self._average(batch.inputs, truth, loss)
                yield batch.index.cpu().numpy(), predictions, batch.targets, value
        finally:
            self.skipped |= loader.skipped
            loader.close()

    @torch.inference_mode()
    def _average(self, inputs: Tree, truth: Tree = None, loss: Any = None) -> tuple[Predictions, Tensor | None]:
        size = len(tensors_of(inputs)[0])
        parts, values, start = [], [], 0
        while start < size:
            step = min(self.fitting, size - start)
            part, fits = memory.attempt(lambda: self._forward(*self._cut((inputs, truth), start, step), loss))  # noqa: B023
            if not fits:
                if self.replay and self.replay.make_room():
                    continue
                if step == 1:
                    raise UserError(
                        "out of memory while a single sample is predicted: try --precision bf16 on a card that has "
                        "it, --device cpu, or a smaller input size"
                    )
                self.fitting = (step + 1) // 2
                continue
            parts.append(part[0])
            values.append(part[1])
            start += step
        value = None if loss is None else sum(values) / size
        return (parts[0] if len(parts) == 1 else concatenated(parts)), value

    def _outputs(self, model: nn.Module, inputs: Tree) -> Tree:
        """In --precision, but the last layers in float32: bfloat16 has 128 values in 0.5..1, predictions would tie."""
        if self.precision == "fp32":
            return model(inputs)
        # Eager: torch would compile the model again when its layers change.
        eager = torch.compiler.set_stance("force_eager") if self.config.compile else nullcontext()
        with eager, autocast(self.precision, self.device.type):
            if model not in self.heads:
                self.heads[model] = heads_of(model, map_tree(lambda x: x[:1], inputs))
            with in_float32(self.heads[model], self.device.type):
                return model(inputs)

    def _cut(self, tree: Tree, start: int, step: int) -> Tree:
        return map_tree(lambda x: on_device(x[start : start + step], self.device), tree)

    def _forward(self, inputs: Tree, truth: Tree, loss: Any) -> tuple[Predictions, Tensor | None]:
        """Mean over models and TTA of one batch's predictions, and its loss on (targets, weights) times its samples.

        Raises UserError on a prediction that is not finite.
        """
        found, value = [], None
        for model in self.models:
            for one, outputs in zip(self.tta, self._of_tta(model, inputs), strict=True):
                if loss is not None:
                    value = batch_value(loss, outputs, *truth) * len(tensors_of(outputs)[0])
                found.append(one.undo(self.task.postprocess.predict(outputs)))
        mean = mean_of(found)
        if not all(bool(torch.isfinite(x).all()) for x in tensors_of(mean) if x.is_floating_point()):
            raise UserError(
                "a prediction is NaN or infinite, so no submission is written: train with a lower --lr, "
                "with --clip-norm 1, or with --precision fp32"
            )
        return mean, value

    def _of_tta(self, model: nn.Module, inputs: Tree) -> Iterator[Tree]:
        """The outputs for every TTA; on a card in one forward pass, if all inputs have the same shape."""
        given = [one.apply(inputs) for one in self.tta] if self.joins_tta and len(self.tta) > 1 else []
        if len({tuple(x.shape for x in tensors_of(one)) for one in given}) == 1:
            outputs, size = to_float32(self._outputs(model, concatenated(given))), len(tensors_of(inputs)[0])
            if all(len(x) == size * len(given) for x in tensors_of(outputs) if x.ndim):
                for n in range(len(given)):
                    yield map_tree(lambda x: x[n * size :][:size] if x.ndim else x, outputs)  # noqa: B023
                return
        for one in self.tta:
            yield to_float32(self._outputs(model, one.apply(inputs)))


@contextmanager
def in_float32(heads: Sequence[nn.Module], device: str) -> Iterator[None]:
    """Inside the block these layers compute in float32, whatever precision is set around them."""

    def exactly(forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        with torch.autocast(device, enabled=False):
            return forward(inputs.float())

    own = [vars(head).get("forward") for head in heads]  # None: that of the class
    for head in heads:
        head.forward = partial(exactly, head.forward)
    try:
        yield
    finally:
        for head, forward in zip(heads, own, strict=True):
            del head.forward
            if forward is not None:
                head.forward = forward


def heads_of(model: nn.Module, inputs: Tree) -> list[nn.Module]:
    """The linear and convolutional layers whose results are the outputs of the model."""
    made: dict[Tensor, nn.Module] = {}  # which layer has made a tensor
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d))]
    hooks = [layer.register_forward_hook(lambda layer, _, output: made.update({output: layer})) for layer in layers]
    try:
        outputs = tensors_of(model(inputs))
    finally:
        for hook in hooks:
            hook.remove()
    return list(dict.fromkeys(made[output] for output in outputs if output in made))


def tta_of(task: Task, config: Config) -> tuple[TTA, ...]:
    return (config.tta and task.network.tta) or AS_IS


def predictor_of(run: Run, task: Task, config: Config) -> Predictor:
    """A Predictor with a run's fold models and TTA; its batches are no larger than the training's micro-batches."""
    device = device_of(config)
    batch_size = min(config.batch_size, (run.result or {}).get("micro_batch") or config.batch_size)
    return Predictor(load_models(run, task, config, device), task, tta_of(task, config), config, batch_size, device)


def validate(predictor: Predictor, rows: np.ndarray, ranks: Ranks, loss: Any) -> dict[str, float]:
    """The loss and the metrics on `rows`, before tuning; every rank scores its share of the rows."""
    if len(rows) < ranks.world:  # too few to divide: every rank scores all of them
        ranks = SINGLE
    own = np.array_split(rows, ranks.world)[ranks.rank]
    task, total = predictor.task, torch.zeros(2, dtype=torch.float64)

    def scored() -> Iterator[tuple[Tree, Tree]]:
        for index, predictions, targets, value in predictor.batches(task.data.valid, own, loss=loss):
            total.add_(torch.tensor([float(value) * len(index), len(index)]))
            yield decided(task, predictions, targets, {})

    found = metrics.evaluate(task.metrics, scored(), ranks)
    ranks.sum_(total)
    return {"valid_loss": float(total[0] / total[1])} | found


class _NotTuned(KeyError):
    pass


class _Untuned(dict):
    """An empty Tuned that tells its own missing keys from those of other dicts."""

    def __missing__(self, key: str) -> Any:
        raise _NotTuned(key)


def decisions_of(task: Task, predictions: Predictions, tuned: Tuned) -> Tree:
    """The task's decisions; raises UserError when its `apply` has no defaults for what is not tuned yet."""
    try:
        return task.postprocess.apply(predictions, tuned or _Untuned())
    except _NotTuned as error:
        raise UserError(
            f"Postprocess's `apply` looks up {error} in `tuned`, which is {{}} before anything is tuned and with "
            f"--fold none: give a default in build(), tuned.get({error}, ...)"
        ) from error


def decided(task: Task, predictions: Predictions, targets: Tree, tuned: Tuned) -> tuple[Tree, Tree]:
    """Decisions from predictions, and their targets on the same device."""
    device = tensors_of(predictions)[0].device
    return decisions_of(task, predictions, tuned), map_tree(lambda x: on_device(x, device), targets)


def write_oof(folder: Path, predictor: Predictor, rows: np.ndarray) -> None:
    """Write oof.npy [m, ...], the predictions of the validation rows, and oof_rows.npy [m], their row numbers."""
    task, found = predictor.task, []
    with PredictionWriter(folder, "oof", len(rows), task.postprocess.kept) as writer:
        for index, predictions, *_ in predictor.batches(task.data.valid, rows, f"predicting {folder.name}"):
            writer.add(predictions)
            found.extend(index.tolist())
    write_npy(folder / "oof_rows.npy", np.array(found))


def predict_oof_again(task: Task, config: Config, folder: Path, rows: np.ndarray) -> None:
    """Write a finished fold's oof.npy again: joining the folds has deleted it, and another fold is trained anew."""
    device = device_of(config)
    batch_size = min(config.batch_size, read_json(folder / FACTS)["micro_batch"])
    model = load_model(folder / "model.pt", task, config, device)
    write_oof(folder, Predictor([model], task, tta_of(task, config), config, batch_size, device), rows)


def write_skipped(run: Run, folder: Path, task: Task, skipped: dict[int, str]) -> None:
    """Add the rows that were left out as unreadable to the fold's skipped.csv; log how many are new."""
    file, ids = folder / "skipped.csv", task.data.ids
    known = {read_cell(row["id"]): row["reason"] for row in read_table(file, "id", "reason")} if file.is_file() else {}
    new = {str(ids[row]): reason for row, reason in skipped.items() if str(ids[row]) not in known}
    if new:
        write_csv(file, ("id", "reason"), sorted((known | new).items()))
        run.log(f"left out {len(new)} unreadable images, listed in {file}")


def load_models(run: Run, task: Task, config: Config, device: torch.device) -> list[nn.Module]:
    """The fold models of a run, in evaluation mode on `device`; raises UserError when one of them is missing."""
    files = [run.fold_folder(fold) / "model.pt" for fold in folds_to_train(config)]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"{', '.join(missing)} of {len(files)} models of the run {'is' if len(missing) == 1 else 'are'} missing: "
            f"delete {run.path / 'result.json'} and train what is missing with the run's command and RUN={run.name}"
        )
    return [load_model(file, task, config, device) for file in files]


def load_model(file: Path, task: Task, config: Config, device: torch.device) -> nn.Module:
    """The network of a model.pt, in evaluation mode on `device`."""
    model = task.network.model()
    with checkpoint.restoring(file):
        model.load_state_dict(checkpoint.load(file, "model")["model"])
    model.eval()  # not chained: a network's own train() may return nothing
    return model.to(device, memory_format=prepare_device(device, config.channels_last))
