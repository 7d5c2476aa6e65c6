"""The only training loop: batches in, a fold's best weights and its out-of-fold predictions out."""

import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import checkpoint, track
from common.batch import Batch
from common.config import Config
from common.device import device_of, peak_memory, precision_of, prepare_device, workers_of
from common.engine.average import Average, reestimate_batchnorm
from common.engine.optimizers import allocate_state, build_optimizer
from common.engine.prepare import prepare
from common.engine.ranks import Ranks
from common.engine.schedule import learning_rate_factor, set_learning_rate
from common.engine.step import Engine, StepReport
from common.errors import UserError
from common.files import remove_drafts
from common.fold import (
    FACTS,
    fold_label,
    order_of,
    remove_checkpoints,
    rows_of_fold,
    seed_all,
    write_facts,
    write_metrics,
)
from common.inference import Predictor, predict_oof_again, tta_of, validate, write_oof, write_skipped
from common.loading.loader import Loader
from common.losses.protocol import own_copy
from common.predictions import read_predictions
from common.progress import progress
from common.run import Run
from common.task import AS_IS, TTA, Task


@dataclass
class State:
    """The state of the loop: everything besides tensors that a resumed run needs, in plain types."""

    epoch: int = 0
    batch: int = 0  # batches of this epoch that are done
    step: int = 0  # optimizer steps that are done
    loss_sum: float = 0.0  # over this epoch's steps, each loss times its samples
    norm_sum: float = 0.0  # over this epoch's steps, of the gradient norms
    samples: int = 0  # of this epoch's steps so far
    best: float | None = None
    stale: int = 0  # validations since the best one
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)  # one row of metrics.csv per epoch


def fit(
    task: Task,
    config: Config,
    run: Run,
    fold: int | None,
    ranks: Ranks,
    join: Callable[[Run, int | None, Ranks], Task] | None = None,
) -> Path:
    """Train on every row outside `fold` (None: on all rows); returns the folder with its weights and predictions.

    `join`, if given, returns the task to train instead: `task` with more training rows (pseudo-labels).

    A finished fold is left as it is. An interrupted fold is resumed; on a CPU it ends with the same bits.
    Raises UserError when the loss is not finite, when not even one sample fits into memory, or when the disk is full.
    """
    folder = run.fold_folder(fold)
    if ranks.is_writer:
        remove_drafts(folder)
    if ranks.broadcast(all((folder / name).is_file() for name in (FACTS, "model.pt"))):
        remove_checkpoints(folder, ranks)
        if ranks.is_writer and fold is not None and read_predictions(folder, "oof") is None:
            predict_oof_again(task, config, folder, rows_of_fold(task, fold)[1])
        ranks.barrier()
        return folder
    return Training(join(run, fold, ranks) if join else task, config, run, fold, ranks).run_all()


class Training:
    """The training of one fold: `run_all` runs its epochs, then writes its weights and predictions."""

    def __init__(self, task: Task, config: Config, run: Run, fold: int | None, ranks: Ranks):
        self.task, self.config, self.run, self.fold, self.ranks = task, config, run, fold, ranks
        self.folder = run.fold_folder(fold)
        self.rows, self.valid_rows = rows_of_fold(task, fold)
        self.device = device_of(config, ranks.local_rank, ranks.world)
        found = checkpoint.load(self.last) if ranks.is_writer and self.last.is_file() else None
        resumed = ranks.broadcast(found)
        self._build(pretrained=not resumed)
        self._order = order_of(task, config, self.rows)
        self.loader = self._loader(rank=ranks.rank, world=ranks.world, epochs=config.epochs)
        self.total_steps = config.epochs * self.loader.batches_per_epoch
        self.averaged_from = round((1 - config.swa) * self.total_steps) if config.swa else 0
        self.state = self._restored(resumed) if resumed else State()
        if resumed:
            run.log(
                f"{fold_label(fold)}: resumed at epoch {self.state.epoch + 1}, batch {self.state.batch} of "
                f"{self.loader.batches_per_epoch}"
            )
        self.reports: list[tuple[StepReport, int]] = []  # of steps that are not yet added up, and their samples
        self.saved = self.counted = time.monotonic()

    @property
    def last(self) -> Path:
        return self.folder / "last.pt"

    def _build(self, pretrained: bool) -> None:
        """The model with its first weights, the loss, the optimizer, the engine and the average."""
        task, config = self.task.network, self.config
        seed_all(config, self.fold)
        memory_format = prepare_device(self.device, config.channels_last)
        self.model = task.model().to(self.device, memory_format=memory_format)
        if task.pretrain and pretrained and (line := task.pretrain(self.model)):
            self.run.log(line)
        precision = precision_of(config, self.device, self.ranks)
        prepare(self.model, config.checkpointing, config.compile, self.run.log, precision)
        self.loss = own_copy(task.loss, self.device)  # folds share no weights
        self.optimizer = build_optimizer(self.model, config, task.lr_scales)
        if isinstance(self.loss, nn.Module) and any(True for _ in self.loss.parameters()):
            self.optimizer.add_param_group({"params": list(self.loss.parameters()), "weight_decay": 0.0})
        allocate_state(self.optimizer)
        self.engine = Engine(
            self.model,
            self.loss,
            self.optimizer,
            micro_batch=config.micro_batch,
            precision=precision,
            clip_norm=config.clip_norm,
            seed=config.seed,
            ranks=self.ranks,
            log=self.run.log,
            graph=config.graph and not config.checkpointing,  # it reads the generator, which a capture forbids
        )
        self.average = Average(self.model, config.ema or None) if config.ema or config.swa else None

    def _loader(self, **shard: int) -> Loader:
        config = self.config
        return Loader(
            self.task.data.train,
            self._order,
            config.batch_size,
            seed=config.seed,
            workers=workers_of(config, self.device),
            device=self.device,
            bad_images=config.bad_images,
            mix=self.task.data.mix,
            log=self.run.log,
            **shard,
        )

    def run_all(self) -> Path:
        """Run the epochs that are left, write weights and out-of-fold predictions; returns the fold's folder."""
        config, state = self.config, self.state
        while state.epoch < config.epochs and not (config.patience and state.stale >= config.patience):
            self._epoch()
        self.loader.close()
        if self.engine.replay:
            self.engine.replay.forget()  # no step is left: its memory goes to BatchNorm's statistics and predictions
        with self._averaged():
            self._keep()
        self.ranks.barrier()  # all processes wait for fold.json, which marks the fold as finished
        remove_checkpoints(self.folder, self.ranks)
        return self.folder

    def _epoch(self) -> None:
        state = self.state
        if not state.batch:
            self._choose_loss(state.epoch)
        self._train(True)
        started = self.counted = time.monotonic()
        before = state.samples
        for batch in self._shown(self.loader.epoch(state.epoch, start=state.batch)):
            self._step(batch)
            self._save_when_due()
        self._collect()
        seconds = time.monotonic() - started
        state.seconds += time.monotonic() - self.counted
        if not state.samples:
            raise UserError(
                f"{fold_label(self.fold)}: not one of its {len(self.rows)} training images can be read: make check, "
                f"with the same COMP= and DATA=, lists them"
            )
        row = self._row() | {"samples_per_second": round((state.samples - before) / max(seconds, 1e-9), 1)}
        if len(self.valid_rows) and self._validates():
            with self._averaged():
                row |= validate(self._predictor(), self.valid_rows, self.ranks, self.loss)
                self._remember_best(row[self.task.metrics[0].name])
        self._close_epoch(row | {"memory_gib": peak_memory(self.device)}, seconds)

    def _train(self, mode: bool) -> None:
        """Set training or evaluation mode of the model and of a loss module: neither may learn from held-out rows."""
        for part in (self.model, self.loss):
            if isinstance(part, nn.Module):
                part.train(mode)

    def _choose_loss(self, epoch: int) -> None:
        """Use the loss of an epoch; it depends on the epoch's number alone, so a resumed run uses the same one."""
        if self.task.network.loss_of:
            self.loss = self.task.network.loss_of(epoch)
            self.engine.use(self.loss)

    def _step(self, batch: Batch) -> None:
        state = self.state
        state.batch = batch.number + 1
        if not self.ranks.any(len(batch) > 0):  # all its images are unreadable: no step, as in a single process
            return
        set_learning_rate(self.optimizer, self._rate(state.step))
        self.reports.append((self.engine.step(batch, state.step), batch.total))
        if self.average and state.step >= self.averaged_from:
            self.average.update(self.model)
        state.step += 1
        if self.device.type == "cpu":
            self._collect()

    def _collect(self) -> None:
        """Add up the reports of the steps; on a card this waits for the steps, so it runs only when sums are needed."""
        self.engine.settle()
        for report, samples in self.reports:
            self.state.loss_sum += float(report.loss) * samples
            norm = float(report.gradient_norm)
            self.state.norm_sum += norm if math.isfinite(norm) else 0.0  # fp16 has skipped this step
            self.state.samples += samples
        self.reports.clear()

    def _rate(self, step: int) -> float:
        """The learning rate of a step, relative to --lr."""
        return learning_rate_factor(
            step, total_steps=self.total_steps, schedule=self.config.schedule, warmup_fraction=self.config.warmup
        )

    def _row(self) -> dict[str, Any]:
        """The training columns of the epoch's row in metrics.csv."""
        state = self.state
        steps = state.step - (state.history[-1]["step"] if state.history else 0)
        return {
            "fold": self.fold,
            "epoch": state.epoch + 1,
            "step": state.step,
            "lr": self.config.lr * self._rate(state.step - 1),
            "loss": state.loss_sum / state.samples,
            "gradient_norm": state.norm_sum / steps,
        }

    def _validates(self) -> bool:
        epoch = self.state.epoch + 1
        return epoch % self.config.evaluate_every == 0 or epoch == self.config.epochs

    def _predictor(self, tta: tuple[TTA, ...] = AS_IS) -> Predictor:
        self._train(False)
        batch_size = min(self.config.batch_size, self.engine.micro_batch)
        return Predictor([self.model], self.task, tta, self.config, batch_size, self.device, self.engine.replay)

    def _remember_best(self, value: float) -> None:
        """Count the validations since the best one; write the best one's weights, except with --keep last."""
        state, sign = self.state, self.task.metrics[0].sign
        better = not math.isnan(value) and (state.best is None or sign * value > sign * state.best)
        state.best, state.stale = (value, 0) if better else (state.best, state.stale + 1)
        if better and self.config.keep == "best" and self.ranks.is_writer:
            checkpoint.save(self.folder / "best.pt", {"model": self.model.state_dict()})

    def _close_epoch(self, row: dict[str, Any], seconds: float) -> None:
        """Write and log the epoch's row, and set the state to the start of the next epoch."""
        state, label = self.state, self._label()
        state.history.append(row)
        state.epoch, state.batch, state.samples, state.loss_sum, state.norm_sum = state.epoch + 1, 0, 0, 0.0, 0.0
        skipped = self.ranks.union(self.loader.skipped)
        if self.ranks.is_writer:  # before the checkpoint: an epoch that it has as done is never written again
            write_metrics(self.folder, state.history)
            write_skipped(self.run, self.folder, self.task, skipped)
        track.epoch(self.run, self.config, self.fold, row)
        self.counted = time.monotonic()
        self._save_when_due()
        shown = {name: value for name, value in row.items() if name not in ("fold", "epoch", "step")}
        self.run.log(f"{label}: {', '.join(f'{name} {value:.5g}' for name, value in shown.items())}, {seconds:.1f} s")

    def _shown(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        """The batches of an epoch, with a progress line of the loss, samples per second and time left."""
        state = self.state
        begun, step, samples = time.monotonic(), state.step, state.samples

        def facts() -> str:
            self._collect()
            seconds = time.monotonic() - begun
            left = seconds / max(state.step - step, 1) * (self.total_steps - state.step)
            return (
                f"loss {state.loss_sum / max(state.samples, 1):.4g}, {(state.samples - samples) / seconds:.0f} "
                f"samples/s, {left / 60:.0f} min of training left"
            )

        count = self.loader.batches_per_epoch - state.batch
        return progress(batches, self._label(), count, show=self.ranks.is_writer, facts=facts)

    def _label(self) -> str:
        return f"{fold_label(self.fold)} epoch {self.state.epoch + 1}/{self.config.epochs}"

    def _named(self) -> dict[str, Any]:
        """The parts whose tensors are saved and restored together."""
        parts = {
            "model": self.model,
            "loss": self.loss if isinstance(self.loss, nn.Module) and not self.task.network.loss_of else None,
            "optimizer": self.optimizer,
            "engine": self.engine,
            "average": self.average,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def _save_when_due(self) -> None:
        now = time.monotonic()
        if self.ranks.is_writer and now - self.saved > self.config.save_every:
            self._collect()
            self.state.seconds, self.counted = self.state.seconds + now - self.counted, now
            tensors = {name: part.state_dict() for name, part in self._named().items()}
            checkpoint.save(self.last, {"state": vars(self.state)} | tensors)
            self.saved = time.monotonic()

    def _restored(self, found: dict[str, Any]) -> State:
        with checkpoint.restoring(self.last):
            state = State(**found["state"])
            if state.epoch < self.config.epochs:  # else no epoch is left that needs a loss
                self._choose_loss(state.epoch)  # before the engine's state is loaded, which is for this loss
            for name, part in self._named().items():
                part.load_state_dict(found[name])
            return state

    def _averaged(self) -> AbstractContextManager:
        """Inside the block the model has its averaged weights, if there are any."""
        return self.average.swapped(self.model) if self.average and self.average.updates else nullcontext()

    def _keep(self) -> None:
        """Write the fold's weights and its out-of-fold predictions; fold.json comes last, it marks the fold as done."""
        if (self.folder / "best.pt").is_file():
            best = checkpoint.load(self.folder / "best.pt", "model")
            with checkpoint.restoring(self.folder / "best.pt"):
                self.model.load_state_dict(best["model"])
        if not self.ranks.is_writer:
            return
        if self.config.swa:
            self._reestimate_batchnorm()
        if len(self.valid_rows):
            predictor = self._predictor(tta_of(self.task, self.config))
            write_oof(self.folder, predictor, self.valid_rows)
            write_skipped(self.run, self.folder, self.task, predictor.skipped)
        checkpoint.save(self.folder / "model.pt", {"model": self.model.state_dict()})
        facts = {"best": self.state.best, "micro_batch": self.engine.micro_batch, "steps": self.state.step}
        write_facts(self.folder, self.fold, self.state.seconds, facts | {"memory_gib": peak_memory(self.device)})

    def _reestimate_batchnorm(self) -> None:
        """Compute BatchNorm's statistics for the averaged weights, from the training rows."""
        eager = torch.compiler.set_stance("force_eager") if self.config.compile else nullcontext()
        # Eager: torch would compile the model again for every batch.
        with eager, self._loader(epochs=1) as again:
            batches = again.epoch(self.config.epochs)
            parts = (inputs for batch in batches for inputs, *_ in self.engine.passes.parts(batch))
            reestimate_batchnorm(self.model, parts)
