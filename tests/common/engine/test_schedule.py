"""Schedules against torch's own and against traces written by hand."""

import math

import pytest
import torch

from common.engine.schedule import learning_rate_factor, set_learning_rate
from common.errors import UserError


def trace(schedule, steps, warmup=0.0):
    return [learning_rate_factor(step, steps, schedule, warmup) for step in range(steps)]


def optimizer_of(lr=0.1):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def torchs(scheduler_of, steps, lr=0.1):
    optimizer, rates = optimizer_of(lr), []
    scheduler = scheduler_of(optimizer)
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"] / lr)
        optimizer.step()
        scheduler.step()
    return rates


def test_exact_traces():
    assert trace("constant", 4) == [1, 1, 1, 1]
    assert trace("linear", 4) == [1, 0.75, 0.5, 0.25]
    assert trace("step", 8) == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert trace("cosine", 4) == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])
    assert trace("linear", 8, 0.5) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 0.75, 0.5, 0.25])
    assert trace("constant", 4, 0.5) == pytest.approx([1 / 3, 2 / 3, 1, 1])


@pytest.mark.parametrize("steps", [10, 37, 400])
def test_cosine_is_torchs(steps):
    expected = torchs(lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps), steps)
    assert trace("cosine", steps) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("steps, peak", [(10, 0.3), (37, 0.3), (400, 0.05), (400, 0.5)])
def test_onecycle_is_torchs(steps, peak):
    expected = torchs(
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.1, steps, pct_start=peak, cycle_momentum=False
        ),
        steps,
    )
    assert trace("onecycle", steps, peak) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "step", "onecycle"])
@pytest.mark.parametrize("steps", [1, 2, 3, 50])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 1.0])
def test_no_step_stands_still_and_none_exceeds_the_peak(schedule, steps, warmup):
    factors = trace(schedule, steps, warmup)
    assert all(0 < factor <= 1 for factor in factors)


def test_unknown_schedule():
    with pytest.raises(UserError, match="--schedule plateau: expected constant"):
        learning_rate_factor(0, 10, "plateau")


def test_the_rate_of_every_group_also_after_a_resume():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.02)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    set_learning_rate(optimizer, 0.5)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.005]
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.02)]
    resumed = torch.optim.SGD(groups, lr=1.0)
    resumed.load_state_dict(optimizer.state_dict())
    set_learning_rate(resumed, 1.0)
    assert [group["lr"] for group in resumed.param_groups] == [0.1, 0.02]
