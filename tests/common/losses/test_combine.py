"""A combined loss is the weighted sum of its parts' batch values, for parts of any kinds and masses."""

import pytest
import torch

from common.errors import UserError
from common.losses import (
    BCE,
    RMSE,
    BCEDice,
    CrossEntropy,
    Dice,
    Focal,
    Heads,
    LovaszHinge,
    SoftFBeta,
    Weighted,
    batch_value,
    kind,
)
from common.losses.protocol import linear_value, normaliser, weighted_sums
from tests.common.losses.cases import WEIGHTS, heads, masks

PARTS = [
    (BCE(), 0.5),
    (BCE(present_only=True), 2.0),
    (Dice(present_only=True), 1.5),
    (Weighted((Focal(), 0.3), (BCE(present_only=True), 0.2)), 3.0),
    (Dice("batch"), 0.7),
    (Weighted((BCE(present_only=True), 0.4), (RMSE(), 0.2), (Dice("batch"), 1.0)), 2.0),
    (LovaszHinge(), 0.9),
]


@pytest.fixture
def batch() -> tuple:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(7, generator=generator, dtype=torch.float64)
    return *masks(7, generator), weights


@pytest.mark.parametrize("count, expected", [(4, "per_sample"), (6, "sums"), (7, "whole_batch")])
@pytest.mark.parametrize("weighted", [False, True])
def test_weighted_is_the_sum_of_the_parts(batch, count: int, expected: str, weighted: bool):
    outputs, targets, weights = batch
    weights = weights if weighted else None
    loss = Weighted(*PARTS[:count])
    assert kind(loss) == expected
    outputs.requires_grad_()
    sum_of_parts = sum(c * batch_value(part, outputs, targets, weights) for part, c in PARTS[:count])
    value = batch_value(loss, outputs, targets, weights)
    torch.testing.assert_close(value, sum_of_parts, rtol=1e-12, atol=0)
    (found,) = torch.autograd.grad(value, outputs)
    (expected,) = torch.autograd.grad(sum_of_parts, outputs)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-15)


def test_parts_with_different_masses_stay_one_pass_and_exact_in_pieces(batch):
    outputs, targets, weights = batch
    loss = Weighted(*PARTS[:4])
    total = normaliser(loss, targets, weights)
    assert kind(loss) == "per_sample" and total.shape == (5,) and len(set(total.tolist())) == 3
    pieces = (slice(0, 3), slice(3, 4), slice(4, 7))
    value = sum(linear_value(loss(outputs[p], targets[p]), weights[p], total) for p in pieces)
    torch.testing.assert_close(value, batch_value(loss, outputs, targets, weights), rtol=1e-12, atol=0)


def test_sums_are_exact_in_pieces(batch):
    outputs, targets, weights = batch
    loss = Weighted(*PARTS[:6])
    pieces = (slice(0, 3), slice(3, 4), slice(4, 7))
    sums = sum(weighted_sums(loss.stats(outputs[p], targets[p]), weights[p]) for p in pieces)
    count = sum(normaliser(loss, targets[p], weights[p]) for p in pieces)
    torch.testing.assert_close(
        loss.value(sums, count), batch_value(loss, outputs, targets, weights), rtol=1e-12, atol=0
    )


def test_a_common_normaliser_would_be_wrong(batch):
    outputs, targets, _ = batch
    parts = [BCE(present_only=True), Dice(present_only=True)]
    together = sum(part(outputs, targets).sum() for part in parts) / sum(part.mass(targets).sum() for part in parts)
    assert abs(together - batch_value(Weighted(*((part, 0.5) for part in parts)), outputs, targets)) > 0.01


@pytest.mark.parametrize(
    "pixels, classes, expected",
    [
        (BCEDice(present_only=True), Focal(), "per_sample"),
        (BCEDice(present_only=True), SoftFBeta(2, "macro"), "sums"),
        (LovaszHinge(), SoftFBeta(2, "macro"), "whole_batch"),
    ],
)
def test_heads_read_their_own_outputs_and_targets(pixels, classes, expected: str):
    outputs, targets = heads(7, torch.Generator().manual_seed(1))
    weights = torch.rand(7, dtype=torch.float64)
    loss = Heads({"pixels": pixels, "classes": (classes, 0.1)})
    assert kind(loss) == expected
    value = batch_value(pixels, outputs["pixels"], targets["pixels"], weights)
    value = value + 0.1 * batch_value(classes, outputs["classes"], targets["classes"], weights)
    torch.testing.assert_close(batch_value(loss, outputs, targets, weights), value, rtol=1e-12, atol=0)


def test_tensors_and_parameters_of_the_parts_are_its_own():
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, outputs, targets):
            return self.scale * (outputs - targets).square().mean(1)

    loss = Weighted((CrossEntropy(WEIGHTS), 1.0), (Weighted((Scaled(), 1.0)), 0.5))
    assert [tuple(p.shape) for p in loss.parameters()] == [()]
    assert loss.double().parts[0][1].class_weights.dtype == torch.float64


def test_a_head_that_is_not_there_is_named():
    outputs, targets = heads(3, torch.Generator().manual_seed(1))
    with pytest.raises(UserError, match=r"head 'labels'.*\['classes', 'pixels'\]"):
        batch_value(Heads({"labels": BCE()}), outputs, targets)
    with pytest.raises(UserError, match="at least one"):
        Weighted()


def test_a_share_without_samples_has_rows_of_the_same_width(batch):
    """A rank may get no sample of a short batch, or only unreadable ones."""
    loss = Weighted((BCE(), 0.5), (BCE(present_only=True), 2.0), (Weighted((Focal(), 0.3), (BCE(True), 0.2)), 3.0))
    outputs, targets, weights = batch
    for values in (loss(outputs, targets), loss(outputs[:0], targets[:0])):
        assert values.shape[1:] == (loss.columns,) and loss.columns > 1
