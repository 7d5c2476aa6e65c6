"""The engine: exactly one optimizer step over one batch, whatever part of it fits into the memory at once."""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from common.batch import Batch, Tree, tensors_of
from common.engine import memory
from common.engine.passes import PASSES, rebuilt
from common.engine.precision import LossScale, forward_in
from common.engine.ranks import SINGLE, Ranks
from common.errors import UserError
from common.loading.keys import keyed_seed
from common.losses.protocol import columns_of, has_mass, kind

Result = TypeVar("Result")


class StepReport(NamedTuple):
    """What a step did: the batch value (0-d), the norm of its gradient before clipping, the micro-batch."""

    loss: Tensor
    gradient_norm: float | Tensor  # 0-d on a card
    micro_batch: int


class DoesNotFit(Exception):
    """A pass ran out of memory on some rank; raised on every rank at the same place."""


class Engine:
    """Steps `optimizer` along the exact gradient of `loss` over a batch, in micro-batches of `micro_batch` samples.

    "auto" begins with the whole batch and halves when the memory does not hold it; so does a given size. A batch
    that failed starts again from its first sample, so nothing is lost or counted twice, and the smaller size is kept.
    Dropout starts from a function of (seed, step, rank) in every pass. BatchNorm normalises over micro-batches, which
    no accumulation can undo; its running statistics move once a micro-batch.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Any,
        optimizer: torch.optim.Optimizer,
        *,
        micro_batch: int | Literal["auto"] = "auto",
        precision: Literal["fp32", "bf16", "fp16"] = "fp32",
        clip_norm: float = 0.0,
        seed: int = 0,
        ranks: Ranks = SINGLE,
        log: Callable[[str], Any] = print,
    ):
        refuse_collectives(model)
        self.model, self.loss, self.optimizer, self.ranks = model, loss, optimizer, ranks
        self.device = next(model.parameters()).device
        self.loss_parameters: list[Tensor] = []
        if isinstance(loss, nn.Module):
            self.loss_parameters = [p for p in loss.to(self.device).parameters() if p.requires_grad]
        stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.parameters = list(dict.fromkeys([*stepped, *model.parameters(), *self.loss_parameters]))
        self.kind, self.precision, self.clip_norm = kind(loss), precision, clip_norm
        self.samples_alike = not has_mass(loss) and columns_of(loss) == 1
        self.forward = forward_in(precision, model, self.device.type)
        self.scale = LossScale(precision)
        self.asked, self.micro_batch = micro_batch, 1 if micro_batch == "auto" else micro_batch
        self.limited = micro_batch != "auto"  # until the memory has shown a limit, "auto" grows with the batch
        self.single_sum: bool | None = None  # of a loss over sums: whether it has just one
        self.buffers = memory.Buffers(model)
        self._first_seed = keyed_seed(seed, ranks.rank)
        self._log = log if ranks.is_writer else lambda message: None
        self._told = False

    def use(self, loss: Any) -> None:
        """Go on with another loss; raises UserError for one with parameters, which the optimizer would not know."""
        if isinstance(loss, nn.Module):
            if any(True for _ in loss.parameters()):
                raise UserError(f"{loss} has parameters: a loss that takes the place of another must have none")
            loss.to(self.device)
        self.loss, self.kind, self.single_sum = loss, kind(loss), None
        self.samples_alike = not has_mass(loss) and columns_of(loss) == 1

    def step(self, batch: Batch, step_number: int) -> StepReport:
        """One optimizer step over the batch. Raises UserError, before the update, when it is not a finite one."""
        value = self.gradients(batch, step_number)
        norm = total_norm([parameter.grad for parameter in self.parameters if parameter.grad is not None])
        known = math.isfinite(value)  # the one place where a step waits for a GPU
        finite = known and math.isfinite(norm)
        if not finite and not (known and self.scale.can_shrink):
            what = "the gradient of the loss" if known else "the loss"
            raise UserError(
                f"{what} is not finite in step {step_number + 1} (epoch {batch.epoch + 1}, batch {batch.number + 1})"
                ": train with a lower --lr, with --clip-norm 1, or with --precision fp32, and look at the data"
            )
        if finite:
            if self.clip_norm:
                as_tensor = self.parameters[0].new_tensor(norm) if isinstance(norm, float) else norm
                torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, as_tensor)
            self._update_weights(step_number)
        self.scale.update(overflow=not finite)
        self._drop_gradients()
        return StepReport(value, norm, self.micro_batch)

    def gradients(self, batch: Batch, step_number: int) -> Tensor:
        """Fill .grad with the exact gradient of the batch, summed over all ranks, and return the batch's value.

        Raises UserError when not even one sample fits into the memory.
        """
        self._seed = (self._first_seed + step_number) % 2**32  # all that torch's CPU generator takes
        self.buffers.keep()
        if not self.limited:
            self.micro_batch = max(self.micro_batch, len(batch))
        fits = False
        while not fits:
            self._drop_gradients()
            try:
                value = PASSES[self.kind](self, batch)
                fits = True
            except DoesNotFit:
                self._drop_gradients()
            if not fits:  # outside `except`, where the failed pass can be given back
                self._halve(len(batch))
        if self.scale.enabled:
            self.multiply_gradients(1 / self.scale.factor)
        # Every rank continues, and is restored, with the same statistics; one without samples has seen nothing new.
        self.ranks.average_(self.buffers.statistics(), len(batch))
        self._tell_once(len(batch))
        return value

    # What the passes of common.engine.passes use.

    def begin_pass(self) -> None:
        """Every pass over a batch sees the same dropout and the same buffers."""
        torch.default_generator.manual_seed(self._seed)  # torch.manual_seed takes a hundred times longer
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index or 0].manual_seed(self._seed)
        elif self.device.type == "mps":
            torch.mps.manual_seed(self._seed)
        self.buffers.begin_pass()

    def parts(self, batch: Batch, with_inputs: bool = True) -> Iterator[tuple[Tree, Tree, Tensor | None, int]]:
        """(inputs, targets, weights, size) of each micro-batch, on the device: views of the batch until they move."""
        sizes = memory.sizes(len(batch), self.micro_batch)
        inputs = self._cut(batch.inputs, sizes) if with_inputs else repeat(None)
        weights = repeat(None) if batch.weights is None else self._cut(batch.weights, sizes)
        return zip(inputs, self._cut(batch.targets, sizes), weights, sizes, strict=False)

    def _cut(self, tree: Tree, sizes: list[int]) -> Iterable[Tree]:
        if isinstance(tree, Tensor):
            views = tree.split_with_sizes(sizes)
            return views if tree.device == self.device else map(self.to_device, views)
        columns = zip(*(self._cut(tensor, sizes) for tensor in tensors_of(tree)), strict=True)
        return (rebuilt(tree, column) for column in columns)

    def to_device(self, tensor: Tensor) -> Tensor:
        if tensor.device == self.device:
            return tensor
        if self.device.type == "mps" and tensor.dtype == torch.float64:  # which Apple's GPUs do not have
            tensor = tensor.float()
        return tensor.to(self.device, non_blocking=True)

    def fits_whole(self, batch: Batch) -> bool:
        """Whether the batch is a single micro-batch of a single rank."""
        return self.ranks.world == 1 and len(batch) <= self.micro_batch

    def together(self, work: Callable[[], Result]) -> Result:
        """Run `work`, then vote: DoesNotFit is raised on every rank if any ran out of memory. No collectives inside."""
        result, fits = None, False
        try:
            result, fits = work(), True
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out_of_memory(error):
                raise
        if self.ranks.any(not fits):
            del result
            raise DoesNotFit
        return result

    def sum_gradients(self) -> None:
        self.ranks.sum_gradients(self.parameters)

    def multiply_gradients(self, factor: Tensor | float) -> None:
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    # What is kept, and what is told.

    def state_dict(self) -> dict[str, Any]:
        return {
            "asked": self.asked,
            "micro_batch": self.micro_batch,
            "limited": self.limited,
            "single_sum": self.single_sum,
            "loss_scale": self.scale.factor,
            "good_steps": self.scale.good_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the micro-batch that was found to fit, unless another one is asked for by now."""
        if state["asked"] == self.asked:
            self.micro_batch, self.limited = state["micro_batch"], state["limited"]
        self.single_sum = state["single_sum"]
        self.scale.factor, self.scale.good_steps = state["loss_scale"], state["good_steps"]

    def _drop_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def _update_weights(self, step_number: int) -> None:
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

    def _halve(self, count: int) -> None:
        """Half of the largest micro-batch of any rank, for all ranks; raises UserError when that was one sample."""
        memory.release()
        largest = max(memory.sizes(count, self.micro_batch), default=0)
        sizes, _ = self.ranks.gather(torch.tensor([largest]))
        largest = int(sizes.max())
        if largest <= 1:
            raise UserError(
                "out of memory with a single sample on the device: try --checkpointing, a smaller input size, "
                "--precision bf16 on a card that has it, or a smaller model"
                + (f"; {self.loss} needs the outputs of a whole batch, so a smaller --batch-size helps too")
                * (self.kind == "whole_batch")
            )
        self.micro_batch, self.limited, self._told = (largest + 1) // 2, True, False
        self._log(f"out of memory at {largest} samples: the same batch again in micro-batches of {self.micro_batch}")

    def _tell_once(self, count: int) -> None:
        if self._told:
            return
        self._told = True
        whole = count <= self.micro_batch
        self._log(f"micro-batch {self.micro_batch}: " + ("the whole batch fits" if whole else f"a batch of {count}"))
        if not whole and any(isinstance(m, _BatchNorm) and m.training for m in self.model.modules()):
            self._log(
                f"BatchNorm normalises over micro-batches of up to {self.micro_batch} samples, not over the batch "
                f"of {count}: another --micro-batch is another function for it"
            )
        if not whole and any(isinstance(m, _DropoutNd) and m.training and m.p for m in self.model.modules()):
            self._log("dropout draws a mask for every micro-batch: another --micro-batch draws others")


def total_norm(gradients: list[Tensor]) -> float | Tensor:
    """The norm of all gradients together: torch.nn.utils.get_total_norm in a fraction of its time.

    0-d, for nothing has to wait for a card; from a CPU a number, which is cheaper there than two more operations.
    """
    norms = torch._foreach_norm(gradients)
    if norms[0].device.type == "cpu":
        return math.hypot(*map(float, norms))
    return torch.linalg.vector_norm(torch.stack(norms))


def refuse_collectives(model: nn.Module) -> None:
    """Raise UserError for modules that talk to other processes: one that is out of memory would leave them waiting."""
    parallel = (nn.SyncBatchNorm, nn.parallel.DistributedDataParallel, nn.DataParallel)
    for name, module in model.named_modules():
        if isinstance(module, parallel):
            raise UserError(
                f"the model's {name or 'outermost module'} is a {type(module).__name__}: give the engine the plain "
                "module, it sums the gradients of all processes itself"
            )
