"""Is the step a finite one? Told at once on a CPU; on a card a few steps later, so that no step waits for it."""

import math
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from common.engine.precision import SMALLEST_FACTOR
from common.errors import UserError

STEPS_BEHIND = 8  # how many steps the host may be ahead of the card


class Place(NamedTuple):
    """A step by its numbers, counted from 0."""

    step: int
    epoch: int
    batch: int


def total_norm(gradients: list[Tensor], on_device: bool) -> float | Tensor:
    """The norm of all gradients together: torch.nn.utils.get_total_norm in a fraction of its time.

    `on_device` it stays there, 0-d; else it is a number, which is cheaper on a CPU than two more operations.
    """
    norms = torch._foreach_norm(gradients)
    return torch.linalg.vector_norm(torch.stack(norms)) if on_device else math.hypot(*map(float, norms))


def judge(place: Place, value: float, norm: float, factor: float | None = None) -> bool:
    """Whether the step is finite. Raises UserError where it is not, and no smaller fp16 `factor` could mend that."""
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
    """What became of the last steps on a card: numbers that travel to the host behind them.

    The card itself leaves the update out when they are not finite; the host learns of it up to STEPS_BEHIND later.
    """

    def __init__(self, device: torch.device, with_factor: bool):
        self.overflow = torch.zeros((), device=device)  # 1 when the last step was not finite
        self._unit = torch.ones((), device=device)
        rows = torch.zeros(STEPS_BEHIND, 3 if with_factor else 2, dtype=torch.float64)
        self._rows = list(rows.pin_memory() if device.type == "cuda" else rows)
        self._events = [torch.get_device_module(device).Event() for _ in self._rows]
        self._waiting: deque[tuple[Place, int]] = deque()
        self._count = 0

    def measured(self, numbers: list[Tensor]) -> Tensor:
        """The batch value, the norm and the fp16 factor as one tensor; sets `overflow`."""
        outcome = torch.stack(numbers)
        self.overflow.zero_()
        torch._amp_foreach_non_finite_check_and_unscale_([outcome], self.overflow, self._unit)
        return outcome

    def note(self, place: Place, outcome: Tensor) -> None:
        """Send the outcome of a step to the host, and judge the steps whose outcome is there by now."""
        if len(self._waiting) == STEPS_BEHIND:
            self._judge_oldest()
        at = self._count % STEPS_BEHIND
        self._rows[at].copy_(outcome, non_blocking=True)
        self._events[at].record()
        self._waiting.append((place, at))
        self._count += 1
        while self._waiting and self._events[self._waiting[0][1]].query():
            self._judge_oldest()

    def settle(self) -> None:
        """Wait for every step and judge it: before weights are kept or used."""
        while self._waiting:
            self._judge_oldest()

    def _judge_oldest(self) -> None:
        place, at = self._waiting.popleft()
        self._events[at].synchronize()
        judge(place, *self._rows[at].tolist())
