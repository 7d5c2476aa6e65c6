"""The only training loop: batches in, a fold's best weights and its out-of-fold predictions out."""

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from common import checkpoint
from common.config import Config
from common.device import device_of, precision_of
from common.engine.average import Average, reestimate_batchnorm
from common.engine.optimizers import allocate_state, build_optimizer
from common.engine.prepare import prepare
from common.engine.ranks import Ranks
from common.engine.schedule import learning_rate_factor, set_learning_rate
from common.engine.step import Engine
from common.errors import UserError
from common.evaluate import validate, write_out_of_fold, write_skipped
from common.files import remove_drafts, write_text
from common.loading import orders
from common.loading.keys import keyed_seed
from common.loading.loader import Loader
from common.predict import AS_IS, Predictor, load_model
from common.progress import progress
from common.run import Run
from common.task import Task, View


@dataclass
class State:
    """Where the loop stands: everything besides tensors that a resumed run needs, in plain types."""

    epoch: int = 0
    batch: int = 0  # batches of this epoch that are done
    step: int = 0  # optimizer steps that are done
    loss_sum: float = 0.0  # of this epoch, times samples
    samples: int = 0  # of this epoch
    best: float | None = None
    stale: int = 0  # validations since the best one
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)  # one row of metrics.csv per epoch


@dataclass(frozen=True)
class Parts:
    """The tensors of a training, saved and restored together."""

    model: nn.Module
    loss: nn.Module | None
    optimizer: torch.optim.Optimizer
    engine: Engine
    average: Average | None

    def _named(self) -> dict[str, Any]:
        return {name: part for name, part in vars(self).items() if part is not None}

    def save(self, path: Path, state: State) -> None:
        tensors = {name: part.state_dict() for name, part in self._named().items()}
        checkpoint.save(path, {"state": vars(state)} | tensors)

    def restore(self, found: dict[str, Any]) -> State:
        for name, part in self._named().items():
            part.load_state_dict(found[name])
        return State(**found["state"])

    def averaged(self) -> AbstractContextManager:
        """The model with its averaged weights, when there are any, inside the block."""
        return self.average.swapped(self.model) if self.average and self.average.updates else nullcontext()


def fit(task: Task, config: Config, run: Run, fold: int | None, ranks: Ranks) -> Path:
    """Train on every row outside `fold` (None: on all rows) and return the folder with model.pt and oof.npy.

    A fold that is finished is left as it is; one that was interrupted goes on, to the same bits on a CPU.
    Raises UserError when the loss is no longer finite, when the memory holds not even one sample, or on a full disk.
    """
    folder, called = run.fold_folder(fold), "all rows" if fold is None else f"fold {fold}"
    if ranks.is_writer:
        remove_drafts(folder)
    if ranks.broadcast((folder / "model.pt").is_file()):
        _remove_checkpoints(folder, ranks)
        if ranks.is_writer and fold is not None and not (folder / "oof.npy").is_file():
            _predict_held_out_again(task, config, folder, np.flatnonzero(task.folds == fold))
        ranks.barrier()
        return folder
    train_rows = np.flatnonzero(task.folds != fold) if fold is not None else np.arange(len(task.ids))
    held_rows = np.flatnonzero(task.folds == fold) if fold is not None else np.empty(0, int)
    if not len(train_rows) or (fold is not None and not len(held_rows)):
        raise UserError(
            f"{called} has {len(train_rows)} rows to train on and {len(held_rows)} to validate: "
            f"choose --fold and --folds so that both have some"
        )

    device = device_of(config, ranks.local_rank, ranks.world)
    torch.default_generator.manual_seed(keyed_seed(config.seed, -1 if fold is None else fold))
    model = task.model().to(
        device, memory_format=torch.channels_last if config.channels_last else torch.preserve_format
    )
    last = folder / "last.pt"
    resumed = ranks.broadcast(checkpoint.load(last) if ranks.is_writer and last.is_file() else None)
    if task.pretrain and not resumed:
        task.pretrain(model)
    prepare(model, config.checkpointing, config.compile, run.log)
    loss = deepcopy(task.loss).to(device) if isinstance(task.loss, nn.Module) else task.loss  # folds share no weights
    optimizer = build_optimizer(model, config, task.lr_scales)
    if isinstance(loss, nn.Module) and any(True for _ in loss.parameters()):
        optimizer.add_param_group({"params": list(loss.parameters()), "weight_decay": 0.0})
    allocate_state(optimizer)
    engine = Engine(
        model,
        loss,
        optimizer,
        micro_batch=config.micro_batch,
        precision=precision_of(config, device),
        clip_norm=config.clip_norm,
        seed=config.seed,
        ranks=ranks,
        log=run.log,
    )
    average = Average(model, config.ema or None) if config.ema or config.swa else None
    order = task.order(train_rows) if task.order else orders.shuffled(train_rows)
    training_loader = partial(
        Loader,
        task.labelled,
        order,
        seed=config.seed,
        workers=config.workers,
        device=device,
        bad_images=config.bad_images,
        mix=task.mix,
    )
    loader = training_loader(config.batch_size, rank=ranks.rank, world=ranks.world)
    total_steps = config.epochs * loader.batches_per_epoch
    averaged_from = round((1 - config.swa) * total_steps) if config.swa else 0
    rate = partial(  # of a step, relative to --lr
        learning_rate_factor, total_steps=total_steps, schedule=config.schedule, warmup_fraction=config.warmup
    )
    parts = Parts(model, loss if isinstance(loss, nn.Module) else None, optimizer, engine, average)
    state = parts.restore(resumed) if resumed else State()
    if resumed:
        run.log(f"{called}: resumed at epoch {state.epoch + 1}, batch {state.batch} of {loader.batches_per_epoch}")
    saved = time.monotonic()

    def evaluator(views: Sequence[View] = AS_IS) -> Predictor:
        batch_size = min(config.batch_size, engine.micro_batch)
        return Predictor([model.eval()], task, views, config, batch_size, device)

    while state.epoch < config.epochs and not (config.patience and state.stale >= config.patience):
        model.train()
        started = counted = time.monotonic()
        label = f"{called} epoch {state.epoch + 1}/{config.epochs}"
        batches = progress(
            loader.epoch(state.epoch, start=state.batch),
            label,
            loader.batches_per_epoch - state.batch,
            show=ranks.is_writer,
        )
        for batch in batches:
            state.batch = batch.number + 1
            if not ranks.any(len(batch) > 0):  # all its images are unreadable: no step, as in a single process
                continue
            set_learning_rate(optimizer, rate(state.step))
            report = engine.step(batch, state.step)
            if average and state.step >= averaged_from:
                average.update(model)
            state.step += 1
            state.loss_sum += float(report.loss) * batch.total
            state.samples += batch.total
            if ranks.is_writer and time.monotonic() - saved > config.save_every:
                state.seconds, counted = state.seconds + time.monotonic() - counted, time.monotonic()
                parts.save(last, state)
                saved = time.monotonic()
        state.seconds, seconds = state.seconds + time.monotonic() - counted, time.monotonic() - started

        if not state.samples:
            raise UserError(
                f"{called}: not one of its {len(train_rows)} training images can be read: make check, with the same "
                f"COMP= and DATA=, lists them"
            )
        row = {
            "fold": fold,
            "epoch": state.epoch + 1,
            "step": state.step,
            "lr": config.lr * rate(state.step - 1),
            "loss": state.loss_sum / state.samples,
        }
        if len(held_rows) and ((state.epoch + 1) % config.evaluate_every == 0 or state.epoch + 1 == config.epochs):
            with parts.averaged():
                row |= validate(evaluator(), held_rows, ranks)
                _remember_best(state, row[task.metrics[0].name], task, config, model, folder, ranks)
        state.history.append(row)
        state.epoch, state.batch, state.loss_sum, state.samples = state.epoch + 1, 0, 0.0, 0
        skipped = ranks.union(dict(loader.skipped))
        if ranks.is_writer:  # before the checkpoint: an epoch that is saved as done is never written again
            write_metrics(folder, state.history)
            write_skipped(run, folder, task, skipped)
        if ranks.is_writer and time.monotonic() - saved > config.save_every:
            parts.save(last, state)
            saved = time.monotonic()
        facts = [f"{name} {value:.5g}" for name, value in row.items() if name not in ("fold", "epoch", "step")]
        run.log(f"{label}: {', '.join(facts)}, {seconds:.1f} s")
    loader.close()

    with parts.averaged():
        if (folder / "best.pt").is_file():
            model.load_state_dict(checkpoint.load(folder / "best.pt")["model"])
        if config.swa and ranks.is_writer:
            eager = torch.compiler.set_stance("force_eager") if config.compile else nullcontext()
            with eager, training_loader(config.batch_size) as again:  # else compiled anew for every batch's momentum
                cut = (inputs for batch in again.epoch(config.epochs) for inputs, *_ in engine.parts(batch))
                reestimate_batchnorm(model, cut)
        if len(held_rows) and ranks.is_writer:
            predictor = evaluator(task.views if config.views else AS_IS)
            write_out_of_fold(folder, predictor, held_rows)
            write_skipped(run, folder, task, predictor.skipped)
        if ranks.is_writer:
            checkpoint.save(
                folder / "model.pt",
                {
                    "model": model.state_dict(),
                    "seconds": state.seconds,
                    "best": state.best,
                    "micro_batch": engine.micro_batch,
                    "steps": state.step,
                },
            )
    ranks.barrier()  # nobody goes on before model.pt, which marks the fold as finished, is there
    _remove_checkpoints(folder, ranks)
    return folder


def _predict_held_out_again(task: Task, config: Config, folder: Path, rows: np.ndarray) -> None:
    """The fold was part of a run whose predictions are joined already, and another fold of it is trained again."""
    found, device = checkpoint.load(folder / "model.pt"), device_of(config)
    model, views = load_model(found, task, config, device), task.views if config.views else AS_IS
    batch_size = min(config.batch_size, found["micro_batch"])
    write_out_of_fold(folder, Predictor([model], task, views, config, batch_size, device), rows)


def _remove_checkpoints(folder: Path, ranks: Ranks) -> None:
    """The fold is finished: model.pt is all that is left to need."""
    if ranks.is_writer:
        for name in ("last.pt", "best.pt"):
            (folder / name).unlink(missing_ok=True)


def _remember_best(
    state: State, value: float, task: Task, config: Config, model: nn.Module, folder: Path, ranks: Ranks
) -> None:
    """Count validations since the best one and keep the weights of the best in best.pt (--keep last keeps none)."""
    sign = 1 if task.metrics[0].higher_is_better else -1
    better = not math.isnan(value) and (state.best is None or sign * value > sign * state.best)
    state.best, state.stale = (value, 0) if better else (state.best, state.stale + 1)
    if better and config.keep == "best" and ranks.is_writer:
        checkpoint.save(folder / "best.pt", {"model": model.state_dict()})


def write_metrics(folder: Path, history: list[dict[str, Any]]) -> None:
    """metrics.csv of the fold: a line per epoch, nothing in it that differs between two equal runs."""
    columns = list(dict.fromkeys(name for row in history for name in row))
    lines = [",".join(str(row.get(name, "")) for name in columns) for row in history]
    write_text(folder / "metrics.csv", "\n".join([",".join(columns), *lines]) + "\n")
