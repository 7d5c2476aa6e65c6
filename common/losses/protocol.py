"""What a loss must declare so that a batch can be cut into micro-batches with an exact gradient.

A loss is of one of three kinds. `kind(loss)` finds it from the loss's attributes; there is no registry and no base
class. Below, w_i is the weight of sample i (1 when the batch has none).

"per_sample"   Any callable `loss(outputs, targets) -> [B]`. One pass.
               batch value = sum_i w_i l_i / sum_i w_i m_i, where m = `loss.mass(targets)` [B] if the loss has that
               attribute, else 1. A mass is for class weights, ignored and missing targets; l_i is then a sum over the
               sample and not a mean. The mass depends on the targets only, so that the normaliser is known before any
               forward pass. A loss with several normalisers (several heads) sets `loss.columns = K` and returns [B, K]
               from both calls:
               batch value = sum_k (sum_i w_i l_ik / sum_i w_i m_ik).
"sums"         An object with `stats(outputs, targets) -> [B, ...]`, additive over samples, and
               `value(sums, count) -> scalar`: sums = sum_i w_i stats_i has the shape of stats without B, count is the
               normaliser of the kind above: sum_i w_i m_i, a scalar, or [K] when the loss has columns.
               One pass when sums has a single element, else two that keep the sums only.
               `stats` always runs before `value` in the same process: a combination learns its layout there.
"whole_batch"  A callable with the attribute `whole_batch = True`: `loss(outputs, targets, weights) -> scalar` with
               weights [B] or None. Two passes that keep the outputs.

A loss whose kind depends on its settings names it in the attribute `kind`.
Losses turn bfloat16 and float16 outputs into float32 themselves and keep float64. A loss that holds tensors or
parameters is an nn.Module, so that the engine can move it; the parameters get their gradient once per batch, like the
model's. The engine and the reference `batch_value` both compute sums over samples by `normaliser`, `linear_value` and
`weighted_sums`. They divide by 1 if the normaliser is 0, so a batch of ignored targets has value 0.
"""

import inspect
from collections.abc import Callable
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.batch import Tree, tensors_of
from common.errors import UserError

Kind = Literal["per_sample", "sums", "whole_batch"]
Loss = Any  # one of the three shapes above


def kind(loss: Loss) -> Kind:
    """The kind of a loss: its attribute `kind`, or else derived from its other attributes."""
    named = getattr(loss, "kind", None)
    if named is not None:
        return named
    if getattr(loss, "whole_batch", False):
        return "whole_batch"
    return "sums" if hasattr(loss, "stats") and hasattr(loss, "value") else "per_sample"


class WholeBatch(nn.Module):
    """A scalar loss that is called once with all the outputs of a batch."""

    whole_batch = True

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function
        called = function.forward if isinstance(function, nn.Module) else function
        self.takes_weights = "weights" in inspect.signature(called).parameters

    def forward(self, outputs: Tree, targets: Tree, weights: Tensor | None = None) -> Tensor:
        if self.takes_weights:
            return self.function(outputs, targets, weights=weights)
        if weights is not None:
            raise UserError(
                f"the batch has sample weights but the loss {_name(self.function)} takes none: "
                "declare it as loss(outputs, targets, weights), or train without weights"
            )
        return self.function(outputs, targets)


def whole_batch(function: Callable[..., Tensor]) -> WholeBatch:
    """Declare (or decorate) a scalar loss as one over the whole batch; `weights` [B] are passed if it has them."""
    return WholeBatch(function)


def own_copy(loss: Loss, device: torch.device) -> Loss:
    """The loss on the device; a module is copied, so that its weights and statistics are not shared."""
    return deepcopy(loss).to(device) if isinstance(loss, nn.Module) else loss


def full_precision(outputs: Tensor) -> Tensor:
    """bfloat16 and float16 as float32: 8 bits of mantissa are too few for a sum of a thousand exponentials."""
    return outputs.float() if outputs.itemsize < 4 and outputs.is_floating_point() else outputs


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def most_precise(values: Tensor) -> Tensor:
    return values.to(widest(values.device))


def columns_of(loss: Loss) -> int:
    """How many normalisers a loss has."""
    return getattr(loss, "columns", 1)


def has_mass(loss: Loss) -> bool:
    """Whether samples may weigh anything but 1: if not, the attribute `mass` is missing or None."""
    return getattr(loss, "mass", None) is not None


def mass_of(loss: Loss, targets: Tree) -> Tensor:
    """What every sample adds to the normaliser: [B], or [B, K] for a loss of K columns."""
    if has_mass(loss):
        return loss.mass(targets)
    first = tensors_of(targets)[0]
    shape = (len(first),) if columns_of(loss) == 1 else (len(first), columns_of(loss))
    return torch.ones(shape, device=first.device)


def normaliser(loss: Loss, targets: Tree, weights: Tensor | None = None) -> Tensor:
    """sum_i w_i m_i, a scalar or [K]: add it over the micro-batches and ranks before the first forward."""
    return weighted_sums(mass_of(loss, targets), weights)


def weighted_sums(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """sum_i w_i values_i over the first axis, in float64 where the device has it. [B, ...] -> [...]

    No matrix product: autocast would run it in half precision.
    """
    if weights is None:
        return values.sum(0, dtype=widest(values.device))
    values = most_precise(values)
    return (values * weights.to(values).reshape(-1, *[1] * (values.ndim - 1))).sum(0)


def linear_value(values: Tensor, weights: Tensor | None, total: Tensor) -> Tensor:
    """What these samples contribute to the batch value: values [B] or [B, K], total = the batch's normaliser."""
    return (weighted_sums(values, weights) / divisor(total)).sum()


def divisor(total: Tensor) -> Tensor:
    """The normaliser with 1 in place of 0, to divide by (the numerator is then 0 as well).

    A negative normaliser, from negative weights, stays.
    """
    return torch.where(total != 0, total, torch.ones_like(total))


def check_per_sample(values: Tensor, batch: int, loss: Loss) -> Tensor:
    """Return `values` if there is one per sample. Otherwise raise UserError, which shows how to declare the loss."""
    columns = columns_of(loss)
    if values.shape == ((batch,) if columns == 1 else (batch, columns)):
        return values
    if values.ndim:
        raise UserError(
            f"the loss {_name(loss)} returned shape {list(values.shape)} for {batch} samples, [{batch}] is expected: "
            "take the mean over all axes but the first, for example values.flatten(1).mean(1)"
        )
    raise UserError(
        f"the loss {_name(loss)} returned one number for {batch} samples, so a batch cannot be cut into micro-batches"
        f" exactly: return one value per sample, shape [{batch}] (reduction='none'), or declare it in two lines:\n"
        "    from common.losses import whole_batch\n"
        "    loss = whole_batch(loss)"
    )


def batch_value(loss: Loss, outputs: Tree, targets: Tree, weights: Tensor | None = None) -> Tensor:
    """The value of a loss over a whole batch in one graph: the reference, and the value in validation."""
    which = kind(loss)
    if which == "whole_batch":
        return loss(outputs, targets, weights)
    total = normaliser(loss, targets, weights)
    if which == "sums":
        return loss.value(weighted_sums(loss.stats(outputs, targets), weights), divisor(total))
    values = check_per_sample(loss(outputs, targets), len(tensors_of(targets)[0]), loss)
    return linear_value(values, weights, total)


def _name(loss: Loss) -> str:
    return getattr(loss, "__name__", type(loss).__name__)
