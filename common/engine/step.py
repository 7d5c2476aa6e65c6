"""The engine: one exact optimizer step over a batch, in micro-batches that fit into memory."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from common.batch import Batch, check_rows, tensors_of
from common.engine import memory
from common.engine.checks import check_model, check_optimizer
from common.engine.finite import Outcomes, Place, judge, total_norm
from common.engine.optimizers import allocate_state
from common.engine.passes import Passes, versions_of
from common.engine.precision import Precision
from common.engine.ranks import SINGLE, Ranks
from common.engine.replay import Replay
from common.errors import UserError

Result = TypeVar("Result")

NOBODY = nullcontext()  # for a step that no Watch records
WATCH_EVERY = 32  # steps, and in the first of an epoch: check the batch, and whether the model draws from `random`


class StepReport(NamedTuple):
    """What a step did: the batch value (0-d), the norm of its gradient before clipping, the micro-batch."""

    loss: Tensor
    gradient_norm: float | Tensor  # 0-d on a card
    micro_batch: int


class Engine:
    """Steps `optimizer` along the exact gradient of `loss` over a batch, in micro-batches of `micro_batch` samples.

    "auto" begins with the whole batch. Any size is halved when it does not fit into memory. A batch that failed starts
    again from its first sample, so that no sample is lost or counted twice, and the smaller size is kept. Every
    parameter of the model, the loss or the optimizer gets its gradient, wherever the loss uses it.

    In every pass, dropout and the model's draws from `random` and `np.random` are seeded by (seed, step, rank).
    BatchNorm normalises over micro-batches, which no accumulation can change; its running statistics are updated once
    per micro-batch. For networks without BatchNorm and dropout, several processes have the batches, orders and
    gradients of a single one. With them each process normalises over its own samples (the running statistics are
    averaged after every step) and draws its own masks, so results differ, as they do with another micro-batch.

    On a CUDA card with a fused optimizer the host never waits for a step. A step that is not finite does not change
    the weights, and a later `step`, or `settle`, raises. `graph` replays steps of one shape (common.engine.replay).
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Any,
        optimizer: torch.optim.Optimizer,
        *,
        micro_batch: int | Literal["auto"] = "auto",
        precision: Precision = "fp32",
        clip_norm: float = 0.0,
        seed: int = 0,
        ranks: Ranks = SINGLE,
        log: Callable[[str], Any] = print,
        graph: bool = False,
    ):
        check_model(model)
        check_optimizer(optimizer)
        if micro_batch != "auto" and not (isinstance(micro_batch, (int, np.integer)) and micro_batch > 0):
            raise UserError(f'micro_batch {micro_batch!r}: expected "auto", or a number of samples from 1 up')
        self.model, self.optimizer, self.ranks, self.clip_norm = model, optimizer, ranks, clip_norm
        self.device = next(model.parameters()).device
        of_loss = list(loss.to(self.device).parameters()) if isinstance(loss, nn.Module) else []
        stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.parameters = list(dict.fromkeys([*stepped, *model.parameters(), *(p for p in of_loss if p.requires_grad)]))
        self.passes = Passes(model, loss, self.parameters, precision, seed, ranks)
        self.scale = self.passes.scale
        self.asked, self.limited = micro_batch, micro_batch != "auto"  # "auto" grows until memory has run out once
        if self.limited:
            self.micro_batch = micro_batch
        self.outcomes: Outcomes | None = None  # None: the host checks every step before the update
        if self.device.type == "cuda" and getattr(optimizer, "_step_supports_amp_scaling", False):
            self.run_ahead()
        self.log = log if ranks.is_writer else lambda message: None
        self.replay = Replay(self) if graph and self.outcomes and ranks.world == 1 else None
        self._told, self._epoch = False, -1

    @property
    def micro_batch(self) -> int:
        """Samples on the device at once."""
        return self.passes.micro_batch

    @micro_batch.setter
    def micro_batch(self, samples: int) -> None:
        self.passes.micro_batch = samples

    def run_ahead(self) -> None:
        """Let the device itself skip updates that are not finite, from now on. The optimizer must be a fused one."""
        self.outcomes = Outcomes(self.device, with_factor=self.scale.enabled)
        if not self.optimizer.state:  # momentum first allocated in a skipped step would never be initialised
            allocate_state(self.optimizer)

    def use(self, loss: Any) -> None:
        """Go on with another loss; raises UserError if it has parameters, which the optimizer would not know."""
        if isinstance(loss, nn.Module):
            if any(True for _ in loss.parameters()):
                raise UserError(f"{loss} has parameters: a loss that replaces another must have none")
            loss.to(self.device)
        if self.replay and loss is not self.passes.loss:
            self.replay.forget()
        self.passes.use(loss)

    def step(self, batch: Batch, step_number: int) -> StepReport:
        """Take one optimizer step over the batch. If it is not finite, raises UserError and keeps the weights."""
        return (self.replay.step if self.replay else self.eager_step)(batch, step_number)

    def eager_step(self, batch: Batch, step_number: int, watch: AbstractContextManager = NOBODY) -> StepReport:
        def watched(batch: Batch) -> tuple[Tensor, float | Tensor, Any]:
            with watch:
                return self.prepared(batch)

        value, norm, outcome = self._until_it_fits(batch, step_number, watched, watch is not NOBODY)
        if self.outcomes:
            self.update_ahead(step_number)
        else:
            finite = judge(Place(step_number, batch.epoch, batch.number), *outcome)
            if finite:
                self._update_weights(step_number)
            self.scale.update(not finite)
        self.passes.drop_gradients()
        return self.noted(batch, step_number, value, norm, outcome)

    def noted(self, batch: Batch, step_number: int, value: Tensor, norm: float | Tensor, outcome: Any) -> StepReport:
        """The report of a step, which may still be running on the card."""
        if self.outcomes:
            nbytes = sum(tensor.nbytes for tensor in tensors_of((batch.inputs, batch.targets)))
            self.outcomes.note(Place(step_number, batch.epoch, batch.number), outcome, nbytes)
        return StepReport(value, norm, self.micro_batch)

    def settle(self) -> None:
        """Wait for all steps; raise UserError if one was not finite. Call it before weights are saved or used."""
        if self.outcomes:
            self.outcomes.settle()

    def gradients(self, batch: Batch, step_number: int) -> Tensor:
        """Fill .grad with the exact gradient of the batch, summed over all ranks, and return the batch's value.

        Raises UserError when not even one sample fits into the memory.
        """
        return self._until_it_fits(batch, step_number, self.passes.gradients, False)

    def update_ahead(self, step_number: int = 0) -> None:
        """Launch the update, which the device itself skips if the step is not finite."""
        self._update_weights(step_number, self.outcomes.overflow)
        self.scale.update(self.outcomes.overflow)

    def _until_it_fits(self, batch: Batch, step_number: int, work: Callable[[Batch], Result], watch: bool) -> Result:
        """The result of `work` on the batch, in micro-batches that are halved until they fit into memory."""
        if self.ranks.world == 1 and not len(batch):  # of several processes, one may have no samples
            raise UserError("a batch of no samples has no gradient: leave it out")
        watch = watch or batch.epoch != self._epoch or step_number % WATCH_EVERY == 0
        if watch:
            check_rows(batch)
        if not self.limited:
            self.micro_batch = max(self.micro_batch, len(batch))
        self._epoch, versions = batch.epoch, versions_of(batch)
        self.passes.new_batch(step_number, watch)
        try:
            while True:
                self.passes.drop_gradients()
                result, fits = memory.attempt(partial(work, batch))
                if fits:
                    break
                self.passes.drop_gradients()
                self.passes.failed = True
                if not (self.replay and self.replay.make_room()):
                    self._halve(len(batch))
            self.passes.learn(batch, versions, step_number)
        finally:
            self.passes.generators.end_batch()
        self._tell_once(len(batch))
        return result

    def prepared(self, batch: Batch) -> tuple[Tensor, float | Tensor, Any]:
        """Fill .grad for the optimizer. Returns batch value, norm, and the numbers to check for being finite."""
        value = self.passes.gradients(batch)
        return self.passes.together(partial(self._clipped, value))

    def _clipped(self, value: Tensor) -> tuple[Tensor, float | Tensor, Any]:
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if not gradients:
            raise UserError("the loss gives no parameter a gradient: is every layer frozen, or the output detached?")
        norm = total_norm(gradients, on_device=self.outcomes is not None or self.device.type != "cpu")
        if self.clip_norm:
            like = self.parameters[0]
            as_tensor = like.new_tensor(norm, dtype=like.dtype.to_real()) if isinstance(norm, float) else norm
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, as_tensor)
        numbers = [value, norm, self.scale.factor] if self.scale.enabled else [value, norm]
        return value, norm, self.outcomes.measured(numbers) if self.outcomes else [float(number) for number in numbers]

    def _update_weights(self, step_number: int, overflow: Tensor | None = None) -> None:
        """optimizer.step(), which the device skips if `overflow` is 1."""
        if overflow is not None:
            self.optimizer.grad_scale, self.optimizer.found_inf = None, overflow
        try:
            self.optimizer.step()
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out_of_memory(error):
                raise
            # Some weights have moved and some have not, so this batch cannot start again.
            raise UserError(
                f"out of memory inside the optimizer, in step {step_number + 1}: repeat the command with "
                f"--micro-batch {max(1, self.micro_batch // 2)}, it goes on from the last checkpoint"
            ) from error
        finally:
            if overflow is not None:
                del self.optimizer.grad_scale, self.optimizer.found_inf

    def _halve(self, count: int) -> None:
        """Set every rank's micro-batch to half of the largest one; raises UserError if that was one sample."""
        largest = max(memory.sizes(count, self.micro_batch), default=0)
        largest = int(self.ranks.max_(torch.tensor(largest)))
        if largest <= 1:
            raise UserError(
                "out of memory with a single sample on the device: try --checkpointing, a smaller input size, "
                "--precision bf16 on a card that has it, or a smaller model"
                + (f"; {self.passes.loss} needs the outputs of a whole batch, so a smaller --batch-size helps too")
                * (self.passes.kind == "whole_batch")
            )
        self.micro_batch, self.limited, self._told = (largest + 1) // 2, True, False
        self.log(f"out of memory at {largest} samples: repeating the batch in micro-batches of {self.micro_batch}")

    def _tell_once(self, count: int) -> None:
        if self._told:
            return
        self._told = True
        whole = count <= self.micro_batch
        self.log(
            f"micro-batch {self.micro_batch}: " + ("the whole batch fits" if whole else f"a batch has {count} samples")
        )
        if not whole and any(isinstance(m, _BatchNorm) and m.training for m in self.model.modules()):
            self.log(
                f"BatchNorm normalises over micro-batches of up to {self.micro_batch} samples, not over the batch "
                f"of {count}: results differ with another --micro-batch"
            )
        if not whole and any(isinstance(m, _DropoutNd) and m.training and m.p for m in self.model.modules()):
            self.log("dropout draws a mask for each micro-batch: results differ with another --micro-batch")

    def state_dict(self) -> dict[str, Any]:
        return {
            "asked": self.asked,
            "micro_batch": self.micro_batch,
            "limited": self.limited,
            "single_sum": self.passes.single_sum,
            **self.scale.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the micro-batch that was found to fit, unless the setting has changed since."""
        if state["asked"] == self.asked:
            self.micro_batch, self.limited = state["micro_batch"], state["limited"]
        self.passes.single_sum = state["single_sum"]
        self.scale.load_state_dict(state)
