"""The accumulating wrapper against the wrapped optimizer on the averaged gradient."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from common.engine.accumulating import AccumulatingOptimizer
from common.errors import UserError

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam amsgrad": lambda parameters: torch.optim.Adam(parameters, lr=0.05, amsgrad=True, weight_decay=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1),
    "radam": lambda parameters: torch.optim.RAdam(parameters, lr=0.05, weight_decay=0.1),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 2)).double()


def batches(count, sizes=(5,)):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(sizes[i % len(sizes)], 6, generator=generator, dtype=torch.float64) for i in range(count)]


def loss_of(model, rows):
    return (model(rows) - rows[:, :2]).square().mean()


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def expected(name, rows, groups, share_by_size=False):
    """Weights after one step of the wrapped optimizer per group of batches, each on the group's averaged gradient."""
    model = make()
    optimizer = OPTIMIZERS[name](model.parameters())
    start = 0
    for count in groups:
        part = rows[start : start + count]
        total = sum(len(batch) for batch in part)
        optimizer.zero_grad()
        for batch in part:
            (loss_of(model, batch) * (len(batch) / total if share_by_size else 1 / count)).backward()
        optimizer.step()
        start += count
    return weights(model)


def close(found, wanted):
    assert float((found - wanted).norm() / wanted.norm()) <= 1e-12


@every_optimizer
@pytest.mark.parametrize("set_to_none", [True, False])
def test_every_fourth_step_is_an_update_and_the_rest_is_flushed(name, set_to_none):
    model, rows = make(), batches(15)
    optimizer = AccumulatingOptimizer(OPTIMIZERS[name](model.parameters()), 4)
    for batch in rows:
        optimizer.zero_grad(set_to_none)
        loss_of(model, batch).backward()
        optimizer.step()
    assert optimizer.updates == 3
    assert optimizer.flush() and not optimizer.flush()
    assert optimizer.updates == 4
    close(weights(model), expected(name, rows, [4, 4, 4, 3]))


@every_optimizer
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_loop_that_zeroes_after_its_step_starts_every_epoch_clean(name, set_to_none):
    """`flush` at the end of an epoch must not leave its averaged gradient in .grad for the next epoch."""
    model, rows = make(), batches(15)
    optimizer = AccumulatingOptimizer(OPTIMIZERS[name](model.parameters()), 4)
    for _ in range(2):
        for batch in rows:
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none)
        optimizer.flush()
    close(weights(model), expected(name, rows + rows, 2 * [4, 4, 4, 3]))


@every_optimizer
def test_batches_of_different_sizes(name):
    model, rows = make(), batches(6, sizes=(8, 3, 1))
    optimizer = AccumulatingOptimizer(OPTIMIZERS[name](model.parameters()), 3)
    for batch in rows:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step(weight=len(batch))
    close(weights(model), expected(name, rows, [3, 3], share_by_size=True))


@every_optimizer
@pytest.mark.parametrize("stop", [1, 4, 6])
def test_saved_in_the_middle_of_a_batch(name, stop):
    rows = batches(12)
    model = make()
    optimizer = AccumulatingOptimizer(OPTIMIZERS[name](model.parameters()), 4)

    def run(model, optimizer, part):
        for batch in part:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()

    run(model, optimizer, rows[:stop])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    kept = torch.load(file, weights_only=True)
    model = make()
    optimizer = AccumulatingOptimizer(OPTIMIZERS[name](model.parameters()), 4)
    model.load_state_dict(kept["model"])
    optimizer.load_state_dict(kept["optimizer"])
    run(model, optimizer, rows[stop:])
    close(weights(model), expected(name, rows, [4, 4, 4]))


def test_naive_steps_are_visibly_different():
    """Control: four separate updates give other weights than one accumulated update."""
    model, rows = make(), batches(8)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    for batch in rows:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    wanted = expected("adamw", rows, [4, 4])
    assert float((weights(model) - wanted).norm() / wanted.norm()) > 1e-3


def test_schedulers_closures_and_parameters_without_gradient():
    model = make()
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    inner = torch.optim.AdamW([*model.parameters(), unused], lr=0.1)
    optimizer = AccumulatingOptimizer(inner, 2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, batches(1)[0])
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    optimizer.step(closure)
    scheduler.step()
    assert inner.param_groups[0]["lr"] == 0.05 and optimizer.updates == 1
    assert torch.equal(unused, torch.ones(3, dtype=torch.float64)), "no gradient, no decay"


def test_at_least_one():
    with pytest.raises(ValueError, match="accum_iters 0"):
        AccumulatingOptimizer(OPTIMIZERS["sgd"](make().parameters()), 0)


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_would_spoil_the_mean_is_refused(weight):
    model = nn.Linear(2, 1)
    optimizer = AccumulatingOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), 1)
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(ValueError, match="expected a number above 0"):
        optimizer.step(weight=weight)
    assert model.weight.isfinite().all() and not optimizer.updates


def test_an_optimizer_that_needs_a_closure_is_refused():
    with pytest.raises(UserError, match="LBFGS.step needs a closure"):
        AccumulatingOptimizer(torch.optim.LBFGS(nn.Linear(2, 1).parameters()), 2)


def test_weights_of_an_open_batch_are_kept():
    def make():
        model = nn.Linear(2, 1, bias=False)
        nn.init.ones_(model.weight)
        return model, AccumulatingOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), 2)

    model, optimizer = make()
    model.weight.grad = torch.ones(1, 2)
    optimizer.step(weight=3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    model, optimizer = make()
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    model.weight.grad = torch.zeros(1, 2)
    optimizer.step(weight=1)
    assert model.weight.tolist() == [[0.25, 0.25]]  # 1 - (3 * 1 + 1 * 0) / 4


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("seen", [0, 3, 5])
def test_a_copy_goes_on_where_the_optimizer_stood(copied, seen):
    """A copy, even in the middle of an update, has its own sums, moments and counts."""

    def trained(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(step)
            model(torch.randn(4, 3, generator=generator)).square().mean().backward()
            optimizer.step(weight=1.0 + step)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = AccumulatingOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1), 2)
    trained(model, optimizer, range(seen))
    other_model, other = copied((model, optimizer))
    expected = trained(model, optimizer, range(seen, 8))
    assert torch.equal(trained(other_model, other, range(seen, 8)), expected)
    assert other.updates == optimizer.updates == 4 and other.param_groups is other.optimizer.param_groups
