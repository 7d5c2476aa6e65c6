"""Checks that every step is finite: at once on a CPU, a few steps later on a card, so that no step waits for it."""

import math
from collections import deque
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.engine.precision import SMALLEST_FACTOR
from common.errors import UserError

# How far the host may be ahead of the card: in steps, and in bytes of their batches, which the card holds until then.
STEPS_AHEAD, BYTES_AHEAD = 64, 2**28


class Place(NamedTuple):
    """The position of a step in the training; all numbers count from 0."""

    step: int
    epoch: int
    batch: int


def total_norm(gradients: list[Tensor], on_device: bool) -> float | Tensor:
    """The norm of all gradients together, as torch.nn.utils.get_total_norm computes it, in a fraction of its time.

    With `on_device` it is a 0-d tensor on the device. Otherwise it is a float, which is cheaper on a CPU.
    """
    norms = torch._foreach_norm(gradients)
    return torch.linalg.vector_norm(torch.stack(norms)) if on_device else math.hypot(*map(float, norms))


def judge(place: Place, value: float, norm: float, factor: float | None = None) -> bool:
    """Whether the loss `value` and the gradient `norm` of a step are finite.

    Raises UserError if they are not, unless a smaller fp16 loss scale than `factor` may help.
    """
    known = math.isfinite(value)
    if known and math.isfinite(norm):
        return True
    if known and factor is not None and factor > SMALLEST_FACTOR:
        return False
    what = "the gradient of the loss" if known else "the loss"
    raise UserError(
        f"{what} is not finite in step {place.step + 1} (epoch {place.epoch + 1}, batch {place.batch + 1}): train with "
        "a lower --lr, with --clip-norm 1, or with --precision fp32, and look at the data"
    )


class Outcomes:
    """Losses and gradient norms of the last steps on a card, which are copied to the host without waiting for them.

    The card itself skips an update that is not finite; the host learns of it up to STEPS_AHEAD steps later.
    """

    def __init__(self, device: torch.device, with_factor: bool):
        self.overflow = torch.zeros((), device=device)  # 1 when the last step was not finite
        self._unit = torch.ones((), device=device)
        rows = torch.zeros(STEPS_AHEAD, 3 if with_factor else 2, dtype=torch.float64)
        rows = rows.pin_memory() if device.type == "cuda" else rows
        module = torch.get_device_module(device)
        self._stream = partial(module.current_stream, device)  # it need not be the current device
        # On the host: the numbers of a step, and the event after which they have arrived.
        self._free = deque((row, module.Event()) for row in rows)
        self._waiting: deque[tuple[Place, Tensor, Any]] = deque()

    def measured(self, numbers: list[Tensor]) -> Tensor:
        """The batch value, the norm and the fp16 factor as one tensor; sets `overflow` if one of them is not finite."""
        outcome = torch.stack(numbers)
        self.overflow.zero_()
        torch._amp_foreach_non_finite_check_and_unscale_([outcome], self.overflow, self._unit)
        return outcome

    def note(self, place: Place, outcome: Tensor, nbytes: int = 0) -> None:
        """Send the outcome of a step over `nbytes` to the host, and judge all steps whose outcome has arrived."""
        while len(self._waiting) >= max(2, min(STEPS_AHEAD, BYTES_AHEAD // max(1, nbytes))):
            self._judge_oldest()
        row, arrived = self._free.popleft()
        row.copy_(outcome, non_blocking=True)
        arrived.record(self._stream())
        self._waiting.append((place, row, arrived))
        while self._waiting and self._waiting[0][2].query():
            self._judge_oldest()

    def settle(self) -> None:
        """Wait for all steps and judge them; call it before weights are saved or used."""
        while self._waiting:
            self._judge_oldest()

    def _judge_oldest(self) -> None:
        place, row, arrived = self._waiting.popleft()
        arrived.synchronize()
        self._free.append((row, arrived))
        judge(place, *row.tolist())
