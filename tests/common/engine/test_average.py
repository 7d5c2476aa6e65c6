"""Averaged weights against explicit sums, and re-estimated BatchNorm statistics against those of the whole data."""

import pytest
import torch
from torch import nn

from common.engine.average import Average, reestimate_batchnorm


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).double()


def walk(model, steps):
    """Set random weights at every step and yield after each step."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
                else:
                    tensor.add_(1)
        yield {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("decay", [None, 0.5, 0.9, 0.999])
def test_the_average_is_the_weighted_mean_of_the_steps(decay):
    model = make()
    average, seen = Average(model, decay), []
    for weights in walk(model, 7):
        average.update(model)
        seen.append(weights)
    share = torch.tensor([(1.0 if decay is None else decay) ** (6 - step) for step in range(7)], dtype=torch.float64)
    share /= share.sum()
    for name, tensor in average.tensors.items():
        if tensor.is_floating_point():
            expected = sum(w * weights[name] for w, weights in zip(share, seen, strict=True))
            torch.testing.assert_close(tensor, expected, rtol=1e-9, atol=1e-12)
        else:
            assert torch.equal(tensor, seen[-1][name])


def test_swapped_is_for_the_block_only_and_trains_on():
    model = make()
    optimizer = torch.optim.AdamW(model.parameters())
    average = Average(model, None)
    for _ in walk(model, 3):
        average.update(model)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(KeyError), average.swapped(model):
        inside = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        raise KeyError
    assert all(torch.equal(own[name], tensor) for name, tensor in model.state_dict().items())
    assert all(torch.equal(inside[name], tensor) for name, tensor in average.tensors.items())
    model(torch.randn(8, 5).double()).sum().backward()
    optimizer.step()
    assert not torch.equal(own["0.weight"], model.state_dict()["0.weight"])


def test_state_goes_on():
    model, twin = make(), make()
    average = Average(model, 0.9)
    for step, _ in enumerate(walk(model, 6)):
        average.update(model)
        if step == 2:
            kept = {"updates": average.state_dict()["updates"]}
            kept["tensors"] = {name: tensor.clone() for name, tensor in average.state_dict()["tensors"].items()}
    resumed = Average(twin, 0.9)
    resumed.load_state_dict(kept)
    for step, _ in enumerate(walk(twin, 6)):
        if step > 2:
            resumed.update(twin)
    assert all(torch.equal(average.tensors[name], resumed.tensors[name]) for name in average.tensors)


def test_tied_weights_are_one():
    model = make()
    model.tied = model[0]
    average = Average(model, None)
    for _ in walk(model, 2):
        average.update(model)
    own = model[0].weight.detach().clone()
    with average.swapped(model):
        assert not torch.equal(own, model[0].weight)
    assert torch.equal(own, model[0].weight)


def test_batchnorm_of_the_present_weights():
    """From batches of unequal sizes: mean and variance of the first layer's outputs, without dropout or gradients."""
    model = make()
    rows = torch.randn(40, 5, generator=torch.Generator().manual_seed(2)).double()
    model(rows * 3 + 1)
    model[1].momentum = 0.05
    modes = [module.training for module in model.modules()]
    reestimate_batchnorm(model, [rows[:30], rows[30:]])
    hidden = model[0](rows).detach()
    torch.testing.assert_close(model[1].running_mean, hidden.mean(0))
    expected = (hidden[:30].var(0) * 30 + hidden[30:].var(0) * 10) / 40
    torch.testing.assert_close(model[1].running_var, expected)
    assert model[1].momentum == 0.05 and modes == [module.training for module in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_dropout_before_batchnorm_while_estimating():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(5))
    rows = torch.randn(40, 5, generator=torch.Generator().manual_seed(2))
    reestimate_batchnorm(model, [rows])
    torch.testing.assert_close(model[1].running_var, rows.var(0))


class OnDemand(nn.Module):
    """Saves a tensor that no module holds, and replaces its buffer at every call."""

    def __init__(self, saves: bool):
        super().__init__()
        self.saves = saves
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, inputs):
        self.seen = self.seen + inputs
        return self.seen

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.saves:
            destination[prefix + "twice"] = self.seen * 2


@pytest.mark.parametrize("saves", [False, True])
def test_replaced_tensors_and_those_made_on_demand_are_averaged(saves):
    model = OnDemand(saves)
    average = Average(model, None)
    for _ in range(3):
        model(torch.ones(2))
        average.update(model)
    assert torch.equal(average.tensors["seen"], torch.full((2,), 2.0))
    assert not saves or torch.equal(average.tensors["twice"], torch.full((2,), 4.0))
