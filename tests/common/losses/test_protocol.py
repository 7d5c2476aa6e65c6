"""How the kind of a loss is recognised, which losses are refused, and that the messages show the remedy."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.errors import UserError
from common.losses import CrossEntropy, batch_value, kind, whole_batch
from common.losses.protocol import full_precision, own_copy, weighted_sums


def per_sample(outputs, targets):
    return (outputs - targets).square().mean(1)


class Total:
    """A loss over sums that uses nothing of the kit."""

    def stats(self, outputs, targets):
        return outputs * targets

    def value(self, sums, count):
        return sums.square().sum() / count


def test_kinds_are_told_apart_by_what_a_loss_has():
    assert kind(per_sample) == "per_sample"
    assert kind(nn.MSELoss(reduction="none")) == "per_sample"
    assert kind(Total()) == "sums"
    assert kind(whole_batch(F.mse_loss)) == "whole_batch"


def test_a_plain_callable_is_averaged_with_its_weights_and_mass():
    outputs, targets, weights = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([1.0, 0.0, 2.0, 3.0])
    values = per_sample(outputs, targets)
    torch.testing.assert_close(batch_value(per_sample, outputs, targets).float(), values.mean())
    expected = (weights * values).sum() / weights.sum()
    torch.testing.assert_close(batch_value(per_sample, outputs, targets, weights).float(), expected)

    def with_mass(outputs, targets):
        return per_sample(outputs, targets)

    with_mass.mass = lambda targets: torch.tensor([1.0, 5.0, 0.5, 0.0])
    expected = (weights * values).sum() / 2.0
    torch.testing.assert_close(batch_value(with_mass, outputs, targets, weights).float(), expected)


def test_sums_are_weighted_before_the_value():
    outputs, targets, weights = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([1.0, 0.0, 2.0, 3.0])
    expected = (weights[:, None] * outputs * targets).sum(0).square().sum() / 6
    torch.testing.assert_close(batch_value(Total(), outputs, targets, weights).float(), expected)


def test_a_scalar_is_refused_with_the_two_lines_that_declare_it():
    with pytest.raises(UserError) as refused:
        batch_value(nn.MSELoss(), torch.randn(4, 3), torch.randn(4, 3))
    message = str(refused.value)
    assert "MSELoss returned one number for 4 samples" in message
    lines = [line.strip() for line in message.splitlines()[1:]]
    assert len(lines) == 2
    scope = {"loss": nn.MSELoss()}
    exec("\n".join(lines), scope)  # the message's own code must work
    assert kind(scope["loss"]) == "whole_batch"
    outputs, targets = torch.randn(4, 3), torch.randn(4, 3)
    assert batch_value(scope["loss"], outputs, targets) == F.mse_loss(outputs, targets)


def test_values_that_are_not_one_per_sample_are_refused():
    with pytest.raises(UserError, match=r"returned shape \[4, 3\] for 4 samples"):
        batch_value(nn.MSELoss(reduction="none"), torch.randn(4, 3), torch.randn(4, 3))
    with pytest.raises(UserError, match="one number for 1 samples"):
        batch_value(nn.MSELoss(), torch.randn(1, 3), torch.randn(1, 3))


def test_whole_batch_passes_weights_only_to_those_that_take_them():
    @whole_batch
    def with_weights(outputs, targets, weights):
        return outputs.sum() if weights is None else (weights * outputs).sum()

    outputs, weights = torch.ones(3), torch.tensor([1.0, 2.0, 3.0])
    assert batch_value(with_weights, outputs, outputs) == 3
    assert batch_value(with_weights, outputs, outputs, weights) == 6
    with pytest.raises(UserError, match="takes none"):  # its third argument, `weight`, is not the sample weights
        batch_value(whole_batch(F.cross_entropy), torch.randn(3, 2), torch.tensor([0, 1, 1]), weights)


def test_whole_batch_keeps_the_parameters_of_a_module():
    assert len(list(whole_batch(nn.Linear(2, 1)).parameters())) == 2


def test_sums_are_exact_under_autocast_and_in_half_precision():
    values, weights = torch.full((4096, 2), 0.1), torch.full((4096,), 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = weighted_sums(values, weights)
    torch.testing.assert_close(
        found, torch.full((2,), 4096 * float(values[0, 0]), dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_full_precision_raises_halves_and_leaves_the_rest():
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    raised = [full_precision(torch.zeros(1, dtype=dtype)).dtype for dtype in kinds]
    assert raised == [torch.float32, torch.float32, torch.float32, torch.float64]


def test_a_module_is_copied_to_the_device_and_anything_else_is_itself():
    loss, meta = CrossEntropy([1.0, 2.0]), torch.device("meta")
    copy = own_copy(loss, meta)
    assert copy.class_weights.device == meta and loss.class_weights.tolist() == [1, 2]
    assert own_copy(per_sample, meta) is per_sample
