"""The gradient of a batch from its micro-batches, for each of the three kinds of loss (common.losses.protocol).

Each function fills .grad with the gradient of the batch value, summed over the ranks, and returns that value. They
multiply what they send backward by `engine.scale.factor`. In the formulas, i runs over the samples of the batch.
"""

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.batch import Batch, Tree, map_tree, tensors_of
from common.engine.optimizers import laid_out_like
from common.losses.protocol import (
    batch_value,
    check_per_sample,
    columns_of,
    has_mass,
    normaliser,
    positive,
    weighted_sums,
)

if TYPE_CHECKING:
    from common.engine.step import Engine


def per_sample(engine: "Engine", batch: Batch) -> Tensor:
    """value = sum_i w_i l_i / sum_i w_i m_i. One pass: the normaliser needs the targets only, so it is known before."""
    loss, count = engine.loss, len(batch)
    if count and engine.samples_alike and batch.weights is None and engine.ranks.world == 1:
        total = float(count)  # a tiny model's step would feel every operation on a tensor
    else:
        total = batch_normaliser(engine, batch)
    slope = engine.scale.factor / total

    def backward() -> Tensor:
        kept, sent = [], None
        engine.begin_pass()
        for inputs, targets, weights, size in engine.parts(batch):
            losses = loss(engine.forward(inputs), targets)
            if sent is None or weights is not None or sent.shape != losses.shape:  # else the last one serves again
                sent = sent_back(check_per_sample(losses, size, loss), slope, weights)
            losses.backward(sent)
            kept.append(losses.detach())
        return batch_sums(engine, batch, kept, total)

    sums = engine.together(backward)
    engine.sum_gradients()
    value = engine.ranks.sum_(sums) / total
    return value.sum() if value.ndim else value


def sums(engine: "Engine", batch: Batch) -> Tensor:
    """value = g(S), S = sum_i w_i s_i. The gradient is <g'(S), sum_i w_i grad s_i>, and g'(S) needs all samples.

    With a single sum g'(S) is one factor on the whole gradient and comes last; else a first pass finds S.
    Only S is kept between the passes, not the outputs.
    """
    if engine.fits_whole(batch):
        return whole(engine, batch)
    loss = engine.loss
    count = batch_normaliser(engine, batch)

    def add_up(sent: Tensor | None, keep_sums: bool) -> Tensor | None:
        """A pass that sends `sent` back into the statistics (None: nothing) and returns their sums on this rank."""
        total = None
        engine.begin_pass()
        with torch.set_grad_enabled(sent is not None):
            for inputs, targets, weights, _ in engine.parts(batch):
                stats = loss.stats(engine.forward(inputs), targets)
                if sent is not None:
                    stats.backward(sent_back(stats, sent, weights))
                if keep_sums:
                    part = weighted_sums(stats.detach(), weights)
                    total = part if total is None else total + part
        return total

    if engine.single_sum:
        unit = count.max()  # only against overflow: the sum of a large batch in fp16
        total = engine.together(lambda: add_up(engine.scale.factor / unit, True))
        value, slope = value_and_slope(engine, total, count)
        engine.sum_gradients()
        engine.multiply_gradients(slope.reshape(()) * unit)
        return value
    total = engine.together(lambda: add_up(None, True))
    value, slope = value_and_slope(engine, total, count)
    engine.single_sum = slope.numel() == 1  # known from now on; the first batch may take two passes all the same
    engine.together(lambda: add_up(slope * engine.scale.factor, False))
    engine.sum_gradients()
    return value


def whole_batch(engine: "Engine", batch: Batch) -> Tensor:
    """value = L(z_1 ... z_n) without any structure: keep the outputs z, take dL/dz, send it back in a second pass."""
    if engine.fits_whole(batch):
        return whole(engine, batch)
    ranks, count = engine.ranks, len(batch)

    def forward() -> dict[str, Tree] | None:
        engine.begin_pass()
        with torch.no_grad():
            found = [(engine.forward(inputs), targets, weights) for inputs, targets, weights, _ in engine.parts(batch)]
        if not found:
            return None
        outputs, targets, weights = zip(*found, strict=True)
        kept = {"outputs": joined(outputs), "targets": joined(targets)}
        return kept if weights[0] is None else kept | {"weights": torch.cat(weights)}

    everything, first = ranks.gather(engine.together(forward))
    value, slopes = engine.together(partial(loss_of_outputs, engine, everything))
    slopes = [None if slope is None else slope[first : first + count] for slope in slopes]
    del everything

    def backward() -> None:
        start = 0
        engine.begin_pass()
        for inputs, _, _, size in engine.parts(batch):
            outputs = [leaf for leaf in tensors_of(engine.forward(inputs)) if leaf.is_floating_point()]
            pairs = [(leaf, slope) for leaf, slope in zip(outputs, slopes, strict=True)]
            pairs = [(leaf, slope) for leaf, slope in pairs if slope is not None and leaf.requires_grad]
            torch.autograd.backward([leaf for leaf, _ in pairs], [slope[start : start + size] for _, slope in pairs])
            start += size

    engine.together(backward)
    engine.sum_gradients()
    return value


def loss_of_outputs(engine: "Engine", kept: dict[str, Tree]) -> tuple[Tensor, list[Tensor | None]]:
    """The loss of the outputs of all ranks and its slope along every tensor of them."""
    outputs = map_tree(lambda x: x.requires_grad_() if x.is_floating_point() else x, kept["outputs"])
    leaves = [leaf for leaf in tensors_of(outputs) if leaf.is_floating_point()]
    value = engine.loss(outputs, kept["targets"], kept.get("weights"))
    wanted = leaves + engine.loss_parameters
    slopes = torch.autograd.grad(value * engine.scale.factor, wanted, allow_unused=True)
    if engine.ranks.is_writer:  # every rank has done the same: the loss's own parameters get their gradient once
        for parameter, gradient in zip(engine.loss_parameters, slopes[len(leaves) :], strict=True):
            parameter.grad = None if gradient is None else laid_out_like(parameter, gradient)
    return value.detach(), list(slopes[: len(leaves)])


PASSES = {"per_sample": per_sample, "sums": sums, "whole_batch": whole_batch}


def whole(engine: "Engine", batch: Batch) -> Tensor:
    """One graph for a batch that is not cut: nothing has to be found out by a first pass."""

    def backward() -> Tensor:
        engine.begin_pass()
        ((inputs, targets, weights, _),) = engine.parts(batch)
        value = batch_value(engine.loss, engine.forward(inputs), targets, weights)
        (value * engine.scale.factor).backward()
        return value.detach()

    return engine.together(backward)


def batch_normaliser(engine: "Engine", batch: Batch) -> Tensor:
    """sum_i w_i m_i over all ranks, [] or [K], 1 where it is 0."""
    loss, device = engine.loss, engine.device
    shape = () if columns_of(loss) == 1 else (columns_of(loss),)
    dtype = torch.float32 if device.type == "mps" else torch.float64
    if batch.weights is None and not has_mass(loss):
        return positive(engine.ranks.sum_(torch.full(shape, len(batch), dtype=dtype, device=device)))

    def local() -> Tensor:
        if tensors_of(batch.targets)[0].device == device:  # nothing has to move, so nothing has to be cut
            weights = None if batch.weights is None else engine.to_device(batch.weights)
            return normaliser(loss, batch.targets, weights)
        total = torch.zeros(shape, dtype=dtype, device=device)
        for _, targets, weights, _ in engine.parts(batch, with_inputs=False):
            total += normaliser(loss, targets, weights)
        return total

    return positive(engine.ranks.sum_(engine.together(local)))


def batch_sums(engine: "Engine", batch: Batch, losses: list[Tensor], total: Tensor) -> Tensor:
    """sum_i w_i l_i of this rank's micro-batches, in the shape of the normaliser."""
    if not losses:  # a rank without samples
        return torch.zeros_like(total)
    weights = None if batch.weights is None else engine.to_device(batch.weights)
    return weighted_sums(torch.cat(losses), weights)


def value_and_slope(engine: "Engine", total: Tensor | None, count: Tensor) -> tuple[Tensor, Tensor]:
    """g(S) and dg/dS for the sums of all ranks. A rank without samples (None) never saw the statistics: it is told."""
    ranks = engine.ranks
    gathered, _ = ranks.gather(None if total is None else total[None])
    everything = gathered[0] if ranks.world == 1 else gathered.sum(0)
    found = None
    if total is not None:
        leaf = everything.requires_grad_()
        value = engine.loss.value(leaf, count)
        (slope,) = torch.autograd.grad(value, leaf)
        found = (value.detach()[None], slope[None])
    (values, slopes), _ = ranks.gather(found)
    return values[0], slopes[0]


def sent_back(values: Tensor, slope: Tensor | float, weights: Tensor | None) -> Tensor:
    """w_i times `slope` for values [B, ...]: the gradient from which the backward pass of a weighted sum starts."""
    if isinstance(slope, float):
        sent = values.new_full(values.shape, slope)
    else:
        sent = slope.to(values.dtype).expand_as(values)
    return sent if weights is None else sent * weights.to(values.dtype).reshape(-1, *[1] * (values.ndim - 1))


def joined(parts: tuple[Tree, ...]) -> Tree:
    """Trees of consecutive samples as one."""
    return rebuilt(parts[0], [torch.cat(column) for column in zip(*map(tensors_of, parts), strict=True)])


def rebuilt(tree: Tree, tensors: Iterable[Tensor]) -> Tree:
    """A tree of the same shape with these tensors in it."""
    remaining = iter(tensors)
    return map_tree(lambda _: next(remaining), tree)
