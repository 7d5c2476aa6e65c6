"""Parameter groups cover every parameter once, and optimizer states are allocated before the first step."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from common.engine.optimizers import allocate_state, build_optimizer, parameter_groups
from common.errors import UserError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
        self.encoder_head = nn.Linear(4, 5)
        self.head = nn.Linear(5, 5)
        self.tied = self.head  # the same parameters under another name
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(()))


def config(optimizer="adamw", lr=0.1, weight_decay=0.01, momentum=0.9):
    return SimpleNamespace(optimizer=optimizer, lr=lr, weight_decay=weight_decay, momentum=momentum)


@pytest.mark.parametrize(
    "scales", [{}, {"encoder": 0.1}, {"encoder": 0.1, "encoder.2": 0.5, "head": 2.0, "scale": 0.0}]
)
def test_every_trainable_parameter_exactly_once(scales):
    model = Net()
    groups = parameter_groups(model, 0.1, 0.01, scales)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def test_rates_by_the_longest_name_and_no_decay_on_vectors():
    model = Net()
    groups = parameter_groups(model, 0.1, 0.01, {"encoder": 0.1, "encoder.2": 0.5})
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    expected = {
        model.encoder[0].weight: (0.01, 0.01),
        model.encoder[0].bias: (0.01, 0.0),
        model.encoder[1].weight: (0.01, 0.0),
        model.encoder[2].weight: (0.05, 0.01),
        model.encoder_head.weight: (0.1, 0.01),  # "encoder" matches the module, not a prefix of a name
        model.scale: (0.1, 0.0),
    }
    for parameter, values in expected.items():
        assert found[id(parameter)] == pytest.approx(values)


def test_a_name_that_fits_nothing_is_an_error_with_the_nearest():
    with pytest.raises(UserError, match="'encodr'.*encoder"):
        parameter_groups(Net(), 0.1, 0.01, {"encodr": 0.1})


def test_unknown_optimizer():
    with pytest.raises(UserError, match="--optimizer lion: expected sgd"):
        build_optimizer(Net(), config("lion"))


PLAIN = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1, momentum=0.9, nesterov=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=1),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1),
    "radam": lambda groups: torch.optim.RAdam(groups, lr=1, decoupled_weight_decay=True),
}


def train(model, optimizer, steps=8):
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        rows = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        model(rows).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 2)).double()


@pytest.mark.parametrize("name", PLAIN)
def test_state_in_advance_changes_nothing(name):
    """Against torch's plain, lazily allocated optimizer."""
    model, twin = small(), small()
    optimizer = build_optimizer(model, config(name))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    allocate_state(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert len(optimizer.state) == len(list(model.parameters()))
    expected = train(twin, PLAIN[name](parameter_groups(twin, 0.1, 0.01)))
    torch.testing.assert_close(train(model, optimizer), expected, rtol=1e-12, atol=1e-14)
    groups = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert groups == [(0.1, 0.01), (0.1, 0.0)]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_momentum_reaches_the_optimizer(name):
    config = SimpleNamespace(optimizer=name, lr=0.1, weight_decay=0.0, momentum=0.7)
    (group, *_) = build_optimizer(nn.Linear(2, 2), config).param_groups
    assert (group["momentum"] if name == "sgd" else group["betas"][0]) == 0.7
