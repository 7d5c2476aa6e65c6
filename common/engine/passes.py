"""The exact gradient of a batch, however little of it fits into memory at once.

A loss is of one of three kinds (common.losses.protocol), and each kind has its own way to the gradient: `_per_sample`,
`_sums` or `_whole_batch`. In their formulas, i runs over the samples of the batch.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward

from common.batch import Batch, Tree, concatenated, map_tree, on_device, rebuilt, tensors_of
from common.engine import memory
from common.engine.generators import Generators
from common.engine.optimizers import laid_out_like
from common.engine.precision import LossScale, Precision, forward_in
from common.engine.ranks import Ranks
from common.errors import UserError
from common.losses.protocol import (
    batch_value,
    check_per_sample,
    columns_of,
    divisor,
    has_mass,
    kind,
    normaliser,
    weighted_sums,
    widest,
)

Result = TypeVar("Result")

SMALL_BYTES = 1 << 18  # outputs and targets up to this size are kept between the two passes of a loss over sums


class Kept(NamedTuple):
    """Outputs of a whole batch, statistics [B, ...] with their graph, sample weights, sizes of the micro-batches."""

    outputs: Tensor
    stats: Tensor
    weights: Tensor | None
    sizes: tuple[int, ...]


class DoesNotFit(MemoryError):
    """A pass ran out of memory on some rank; raised on every rank at the same place."""


class Passes:
    """Computes the gradient of a batch in micro-batches of `micro_batch` samples, in one or two passes over them.

    In every pass, dropout and the model's draws from `random` and `np.random` are seeded alike, and buffers such as
    BatchNorm's running statistics start from the same values. A pass that does not fit into memory raises; the next
    call of `gradients` for the same batch starts again from its first sample.
    """

    def __init__(
        self, model: nn.Module, loss: Any, parameters: list[Tensor], precision: Precision, seed: int, ranks: Ranks
    ):
        self.parameters, self.ranks = parameters, ranks
        self.device = next(model.parameters()).device
        self.forward = forward_in(precision, model, self.device.type)
        self.scale = LossScale(precision, self.device)
        self.generators = Generators(seed, ranks.rank, self.device)
        self.buffers = memory.Buffers(model)
        self.micro_batch = 1
        if self.device.type == "cuda":  # NCCL takes its memory at the first message: before a batch looks what fits
            ranks.sum_(torch.zeros(1, device=self.device))
        self._writes: bool | None = None  # whether model or loss change their inputs in place; None: not yet known
        self._capturing = False
        self.use(loss)

    def use(self, loss: Any) -> None:
        """Go on with another loss."""
        self.loss, self.kind = loss, kind(loss)
        self.loss_buffers = memory.Buffers(loss, apart_from=self.buffers)
        self.samples_alike = not has_mass(loss) and columns_of(loss) == 1
        self.single_sum: bool | None = None  # for a loss over sums: whether it has just one

    def new_batch(self, step_number: int, watch: bool) -> None:
        """Declare that the next passes are over another batch; `watch`: see common.engine.generators."""
        self._count, self.failed = 0, False  # passes so far; whether one has run out of memory
        self.generators.new_batch(step_number, watch)
        self.buffers.new_batch()
        self.loss_buffers.new_batch()

    def gradients(self, batch: Batch) -> Tensor:
        """Fill .grad with the exact gradient of the batch, summed over all ranks, and return the batch's value."""
        in_one_graph = self.kind != "per_sample" and self.fits_whole(batch)
        value = self._whole(batch) if in_one_graph else WAYS[self.kind](self, batch)
        self.ranks.sum_gradients(self.parameters, self.together)
        if self.scale.enabled:
            found = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
            self.together(partial(self.scale.unscale_, found))
        # All ranks go on, and resume, with the same statistics; a rank without samples has weight 0.
        self.ranks.average_(self.buffers.statistics(), len(batch), self.together)
        return value

    def learn(self, batch: Batch, versions: list[int], step_number: int) -> None:
        """After the passes: note whether the model or the loss changes its inputs in place.

        `versions` are the `versions_of` the batch before them. Raises UserError if inputs were first changed in a later
        batch whose second pass has seen other numbers.
        """
        if self._writes is None:
            self._writes = False
        elif versions_of(batch) != versions:
            self._writes = True  # from now on they get copies
            if self._count > 1:
                raise UserError(
                    f"the model or the loss changed its input in place in step {step_number + 1}, but not in "
                    "the first step: the second pass over the batch saw other numbers. Let it work on a copy, x.clone()"
                )

    def together(self, work: Callable[[], Result]) -> Result:
        """Run `work` (without collectives), then vote: raises DoesNotFit on every rank if any ran out of memory."""
        if self.ranks.world == 1:
            return work()
        result, fits = memory.attempt(work)
        if self.ranks.any(not fits):
            del result
            raise DoesNotFit
        return result

    def begin_pass(self) -> None:
        """Seed the generators and restore the buffers, so that all passes over a batch see the same."""
        if self._capturing:
            return
        self._count += 1
        self.generators.begin_pass()
        self.buffers.begin_pass()
        self.loss_buffers.begin_pass()

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Surround a step that is captured: it seeds and restores nothing, since seeds are set before each replay."""
        self._capturing = True
        try:
            yield
        finally:
            self._capturing = False

    def drop_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def parts(self, batch: Batch, with_inputs: bool = True) -> Iterator[tuple[Tree, Tree, Tensor | None, int]]:
        """(inputs, targets, weights, size) of each micro-batch, on the device.

        They are views of the batch, and copies only if they must move or the model or the loss changes its inputs.
        """
        sizes = memory.sizes(len(batch), self.micro_batch)
        inputs = self._cut(batch.inputs, sizes) if with_inputs else repeat(None)
        weights = repeat(None) if batch.weights is None else self._cut(batch.weights, sizes)
        watching = self._writes is None
        for part in zip(inputs, self._cut(batch.targets, sizes), weights, sizes, strict=False):
            yield part
            if watching and any(tensor._version for tensor in tensors_of(part[:3])):
                self._writes = True

    def _cut(self, tree: Tree, sizes: list[int]) -> Iterable[Tree]:
        if isinstance(tree, Tensor):
            views = tree.split_with_sizes(sizes) if len(sizes) != 1 else (tree,)
            if tree.device != self.device:
                return map(self.to_device, views)
            return views if self._writes is False else map(Tensor.clone, views)
        columns = zip(*(self._cut(tensor, sizes) for tensor in tensors_of(tree)), strict=True)
        return (rebuilt(tree, column) for column in columns)

    def to_device(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.device == self.device else on_device(tensor, self.device, non_blocking=True)

    def fits_whole(self, batch: Batch) -> bool:
        """Whether the batch is a single micro-batch of a single rank."""
        return self.ranks.world == 1 and len(batch) <= self.micro_batch

    def takes_one_pass(self, batch: Batch) -> bool:
        """Whether a single rank goes over the batch once: it fits whole, or the loss adds up over micro-batches."""
        adds_up = self.ranks.world == 1 and (self.kind == "per_sample" or bool(self.single_sum))
        return adds_up or self.fits_whole(batch)

    # The way to the gradient for each kind of loss.

    def _per_sample(self, batch: Batch) -> Tensor:
        """value = sum_i w_i l_i / sum_i w_i m_i. One pass: the normaliser needs only the targets, so it comes first."""
        loss, count = self.loss, len(batch)
        if count and self.samples_alike and batch.weights is None and self.ranks.world == 1:
            total = float(count)  # a float: tensor operations take long beside a tiny model
        else:
            total = self._normaliser(batch)

        def backward() -> Tensor:
            kept, slope, sent = [], self.scale.factor / total, None
            self.begin_pass()
            for inputs, targets, weights, size in self.parts(batch):
                losses = loss(self.forward(inputs), targets)
                if weights is not None or sent is None or sent.shape != losses.shape:
                    sent = sent_back(check_per_sample(losses, size, loss), slope, weights)
                if losses.requires_grad:
                    send([losses], [sent])
                kept.append(losses.detach())
            if not kept:  # a rank without samples
                return torch.zeros_like(total)
            weights = None if batch.weights is None else self.to_device(batch.weights)
            return weighted_sums(torch.cat(kept) if len(kept) > 1 else kept[0], weights)

        value = self.ranks.sum_(self.together(backward))
        value = self.together(lambda: value / total)
        return value.sum() if value.ndim else value

    def _sums(self, batch: Batch) -> Tensor:
        """value = g(S), S = sum_i w_i s_i. The gradient is <g'(S), sum_i w_i grad s_i>, and g'(S) needs all samples.

        With a single sum, g'(S) is one factor on the whole gradient and is applied last. Otherwise a first pass
        computes S. Between the passes only S is kept, and outputs of no more than SMALL_BYTES.
        """
        count = self._normaliser(batch)
        if self.single_sum:
            total = self.together(lambda: self._add_up(batch, self.scale.factor / count.max(), True))
            value, slope, direct = self._value_and_slope(total, count)
            self.together(lambda: self._multiply(slope.reshape(()) * count.max()))
        else:
            total, kept = self.together(partial(self._found_sums, batch))
            value, slope, direct = self._value_and_slope(total, count)
            self.single_sum = slope.numel() == 1  # for the next batches; this first one takes two passes
            self.together(lambda: self._second_pass(batch, kept, self.scale.factor * slope))
        self._add(direct)
        return value

    def _second_pass(self, batch: Batch, kept: Kept | None, slope: Tensor) -> None:
        with self.loss_buffers.left_as_they_are():
            if kept:
                self._send_through(batch, kept, slope)
            else:
                self._add_up(batch, slope, False)

    def _found_sums(self, batch: Batch) -> tuple[Tensor | None, Kept | None]:
        """The sums of this rank's samples and, if the outputs are small, the graph of all statistics.

        With the graph, the loss is computed once and not in both passes: it costs as much as a small network's layers.
        """
        found, total, small = [], None, None
        self.begin_pass()
        with torch.no_grad():
            for inputs, targets, weights, size in self.parts(batch):
                outputs = self.forward(inputs)
                if small is None:  # a loss with buffers may change what the graph needs before the second pass
                    small = not self.loss_buffers and is_small(outputs, targets, len(batch) / size)
                if small:
                    found.append((outputs, targets, weights, size))
                else:
                    part = weighted_sums(self.loss.stats(outputs, targets), weights)
                    total = part if total is None else total + part
        if not found:
            return total, None
        outputs, targets, weights, sizes = zip(*found, strict=True)
        outputs = torch.cat(outputs).requires_grad_()
        stats = self.loss.stats(outputs, concatenated(targets))
        weights = None if weights[0] is None else torch.cat(weights)
        return weighted_sums(stats.detach(), weights), Kept(outputs, stats, weights, sizes)

    def _send_through(self, batch: Batch, kept: Kept, slope: Tensor) -> None:
        """The second pass with kept outputs: `slope` of the statistics goes back to them, and then into the model."""
        if kept.stats.requires_grad:
            send([kept.stats], [sent_back(kept.stats, slope, kept.weights)])
        if kept.outputs.grad is None:
            return
        self.begin_pass()
        for (inputs, *_), sent in zip(self.parts(batch), kept.outputs.grad.split(kept.sizes), strict=True):
            outputs = self.forward(inputs)
            if outputs.requires_grad:
                send([outputs], [sent])

    def _add_up(self, batch: Batch, sent: Tensor, keep_sums: bool) -> Tensor | None:
        """A pass that backpropagates `sent` from the statistics; returns their sums on this rank if `keep_sums`."""
        total = None
        self.begin_pass()
        for inputs, targets, weights, _ in self.parts(batch):
            stats = self.loss.stats(self.forward(inputs), targets)
            if stats.requires_grad:
                send([stats], [sent_back(stats, sent, weights)])
            if keep_sums:
                part = weighted_sums(stats.detach(), weights)
                total = part if total is None else total + part
        return total

    def _value_and_slope(self, total: Tensor | None, count: Tensor) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """g(S) and dg/dS for the sums of all ranks and, on one rank only, the gradient along the engine's parameters.

        A rank without samples (total None) does not know the shape of the statistics and gets both from the others.
        """
        everything, first = self.ranks.gather(None if total is None else total[None], self.together)

        def local() -> tuple[tuple[Tensor, Tensor] | None, list[Tensor | None]]:
            if total is None:
                return None, []
            leaf = (everything[0] if self.ranks.world == 1 else everything.sum(0)).requires_grad_()
            value = self.loss.value(leaf, count)
            slope, *direct = self._slopes(value, [leaf])
            return (value.detach()[None], slope[None]), direct if first == 0 else []

        found, direct = self.together(local)
        (values, slopes), _ = self.ranks.gather(found, self.together)
        return values[0], slopes[0], direct

    def _whole_batch(self, batch: Batch) -> Tensor:
        """value = L(z_1 ... z_n), any function: keep the outputs z, compute dL/dz, send it back in a second pass."""
        rows: list[bool] = []  # which of the outputs have a row for every sample

        def forward() -> dict[str, Tree] | None:
            self.begin_pass()
            with torch.no_grad():
                found = [(self.forward(inputs), *rest) for inputs, *rest in self.parts(batch)]
            if not found:
                return None
            outputs, targets, weights, sizes = zip(*found, strict=True)
            rows[:], outputs = joined(outputs, sizes)
            if not all(rows) and self.ranks.world > 1:
                raise UserError("with several processes every output of the model needs a row for every sample")
            kept = {"outputs": outputs, "targets": joined(targets, sizes)[1]}
            return kept if weights[0] is None else kept | {"weights": torch.cat(weights)}

        everything, first = self.ranks.gather(self.together(forward), self.together)
        value, slopes = self.together(partial(self._loss_of_outputs, everything))
        del everything
        rows = rows or [True] * len(slopes)

        def backward() -> None:
            with self.loss_buffers.left_as_they_are():
                self._send_slopes(batch, slopes, rows, first)

        self.together(backward)
        return value

    def _send_slopes(self, batch: Batch, slopes: list[Tensor | None], rows: list[bool], first: int) -> None:
        """The second pass: send dL/dz, from row `first` on, back through the graph of every micro-batch."""
        start = first
        self.begin_pass()
        for inputs, _, _, size in self.parts(batch):
            leaves, sent = [], []
            for leaf, slope, by_row in zip(tensors_of(self.forward(inputs)), slopes, rows, strict=True):
                # An output that is the same in every micro-batch depends on the weights alone: it is sent once.
                if slope is not None and leaf.requires_grad and (by_row or start == first):
                    leaves.append(leaf)
                    sent.append(slope[start : start + size] if by_row else slope)
            if leaves:
                send(leaves, sent)
            start += size

    def _loss_of_outputs(self, kept: dict[str, Tree]) -> tuple[Tensor, list[Tensor | None]]:
        """The loss of the outputs of all ranks, and its gradient along every output tensor."""
        outputs = map_tree(lambda x: x.requires_grad_() if has_slope(x) else x, kept["outputs"])
        leaves = tensors_of(outputs)
        wanted = [leaf for leaf in leaves if has_slope(leaf)]
        value = self.loss(outputs, kept["targets"], kept.get("weights"))
        found = self._slopes(self.scale.scaled(value), wanted)
        if self.ranks.is_writer:  # all ranks compute the same: parameters inside the loss get their gradient once
            self._add(found[len(wanted) :], scaled=True)
        slopes = iter(found)
        return value.detach(), [next(slopes) if has_slope(leaf) else None for leaf in leaves]

    def _whole(self, batch: Batch) -> Tensor:
        """One graph for a batch that is not cut, without a first pass."""
        self.begin_pass()
        for inputs, targets, weights, _ in self.parts(batch):
            value = batch_value(self.loss, self.forward(inputs), targets, weights)
            if value.requires_grad:
                self.scale.scaled(value).backward()
        return value.detach()

    def _normaliser(self, batch: Batch) -> Tensor:
        """sum_i w_i m_i over all ranks, [] or [K], as a divisor."""

        def local() -> Tensor:
            loss, device = self.loss, self.device
            shape, dtype = () if columns_of(loss) == 1 else (columns_of(loss),), widest(device)
            if batch.weights is None and not has_mass(loss):
                return torch.full(shape, len(batch), dtype=dtype, device=device)
            if tensors_of(batch.targets)[0].device == device and not self.failed:
                targets = batch.targets if self._writes is False else map_tree(Tensor.clone, batch.targets)
                return normaliser(loss, targets, None if batch.weights is None else self.to_device(batch.weights))
            total = torch.zeros(shape, dtype=dtype, device=device)
            for _, targets, weights, _ in self.parts(batch, with_inputs=False):
                total += normaliser(loss, targets, weights)
            return total

        total = self.ranks.sum_(self.together(local))
        return self.together(lambda: divisor(total))

    def _slopes(self, value: Tensor, leaves: list[Tensor]) -> list[Tensor | None]:
        """The gradients of `value` along the leaves, then along all trainable parameters; None for unused ones."""
        wanted = leaves + [parameter for parameter in self.parameters if parameter.requires_grad]
        if not value.requires_grad:
            return [None] * len(wanted)
        return list(torch.autograd.grad(value, wanted, allow_unused=True))

    def _add(self, direct: list[Tensor | None], scaled: bool = False) -> None:
        """Add to .grad the gradients of parameters that a loss uses directly and not through the outputs."""
        wanted = [parameter for parameter in self.parameters if parameter.requires_grad] if direct else []
        for parameter, slope in zip(wanted, direct, strict=True):
            if slope is None:
                continue
            slope = slope if scaled else self.scale.scaled(slope)
            if parameter.grad is None:
                parameter.grad = laid_out_like(parameter, slope)
            else:
                parameter.grad += slope

    def _multiply(self, factor: Tensor) -> None:
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor)


WAYS = {"per_sample": Passes._per_sample, "sums": Passes._sums, "whole_batch": Passes._whole_batch}


def versions_of(batch: Batch) -> list[int]:
    """How often each tensor of a batch has been written to."""
    return [tensor._version for tensor in (*tensors_of(batch.inputs), *tensors_of(batch.targets))]


def has_slope(output: Tensor) -> bool:
    return output.is_floating_point() or output.is_complex()


def send(values: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """torch.autograd.backward(values, gradients) without its checks, a tenth of a tiny network's step."""
    _engine_run_backward(
        tuple(values), tuple(gradients), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def is_small(outputs: Tree, targets: Tree, micro_batches: float) -> bool:
    """Whether outputs and targets of a whole batch take at most SMALL_BYTES, estimated from those of a micro-batch.

    False for several outputs, because one of them, such as a temperature, may have no row for each sample.
    """
    if not isinstance(outputs, Tensor) or not has_slope(outputs):
        return False
    return sum(tensor.nbytes for tensor in (outputs, *tensors_of(targets))) * micro_batches <= SMALL_BYTES


def sent_back(values: Tensor, slope: Tensor | float, weights: Tensor | None) -> Tensor:
    """w_i times `slope` for values [B, ...]: the gradient from which the backward pass of a weighted sum starts."""
    if isinstance(slope, float):
        sent = values.new_full(values.shape, slope)
    else:
        sent = slope.to(values.dtype).expand_as(values)
    return sent if weights is None else sent * weights.to(values.dtype).reshape(-1, *[1] * (values.ndim - 1))


def joined(parts: tuple[Tree, ...], sizes: tuple[int, ...]) -> tuple[list[bool], Tree]:
    """Concatenate trees of consecutive samples; also returns which of their tensors have a row for every sample.

    A tensor without such rows (a temperature, say) must be the same in every micro-batch and is kept as it is. Raises
    UserError if it is not.
    """
    rows, tensors = [], []
    for column in zip(*map(tensors_of, parts), strict=True):
        rows.append(all(part.ndim and len(part) == size for part, size in zip(column, sizes, strict=True)))
        if not rows[-1] and not all(torch.equal(part, column[0]) for part in column[1:]):
            raise UserError(
                f"an output of the model has shape {list(column[0].shape)} for {sizes[0]} samples, and its values "
                "differ between micro-batches: a loss over the whole batch needs a row for every sample, shape "
                f"[{sizes[0]}, ...]. Or keep the batch whole: --micro-batch {sum(sizes)}"
            )
        tensors.append(torch.cat(column) if rows[-1] else column[0].detach())
    return rows, rebuilt(parts[0], tensors)
