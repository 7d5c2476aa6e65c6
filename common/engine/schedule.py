"""Learning rates as pure functions of the step, so that there is no scheduler state to save and restore."""

import math

import torch

from common.errors import UserError


def learning_rate_factor(
    step: int,
    total_steps: int,
    schedule: str,
    warmup_fraction: float = 0.0,
) -> float:
    """The factor on the peak learning rate in optimizer step `step` of 0..total_steps-1.

    Over the first `warmup_fraction` of the steps it rises linearly to 1, starting above 0. Then it follows `schedule`:

        constant   1
        cosine     half a cosine from 1 towards 0 (Loshchilov and Hutter, 2017)
        linear     straight from 1 towards 0
        step       a tenth from the middle on, a hundredth in the last quarter
        onecycle   up from 1/25 and down to 1/250000 in half cosines (Smith and Topin, 2018), the peak at the end
                   of `warmup_fraction`: the numbers of torch.optim.lr_scheduler.OneCycleLR
    """
    if schedule == "onecycle":
        peak, last = warmup_fraction * total_steps - 1, total_steps - 1
        if step <= peak:
            return _between(1 / 25, 1.0, step / peak if peak else 1.0)
        return _between(1.0, 1 / 250_000, (step - peak) / (last - peak))
    warmup_steps = round(warmup_fraction * total_steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    part_done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    match schedule:
        case "constant":
            return 1.0
        case "cosine":
            return _between(1.0, 0.0, part_done)
        case "linear":
            return 1.0 - part_done
        case "step":
            return 0.1 ** sum(step >= part * total_steps for part in (0.5, 0.75))
    raise UserError(f"--schedule {schedule}: expected constant, cosine, linear, step or onecycle")


def _between(start: float, end: float, part_done: float) -> float:
    """Half a cosine from `start` (part_done 0) to `end` (1)."""
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, part_done))) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group to `factor` times the rate that it was built with."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
