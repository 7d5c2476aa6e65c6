"""Regression losses against torch, scikit-learn and their definitions."""

import numpy as np
import pytest
import torch
from sklearn.metrics import root_mean_squared_error
from torch import Tensor, nn

from common.losses import MAE, MSE, RMSE, SMAPE, ClippedMAE, LogSMAPE, batch_value
from tests.common.losses.cases import normal


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return normal(generator, 9, 6), normal(generator, 9, 6)


def close(found: Tensor, expected, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=rtol, atol=1e-14)


def test_means_are_torchs(pair):
    close(batch_value(MAE(), *pair), nn.L1Loss()(*pair))
    close(batch_value(MSE(), *pair), nn.MSELoss()(*pair))
    close(batch_value(RMSE(), *pair), nn.MSELoss()(*pair).sqrt())
    close(batch_value(RMSE(), *pair), root_mean_squared_error(pair[1].flatten(), pair[0].flatten()))
    assert not callable(RMSE()), "it would be a mean, without the root"
    close(batch_value(ClippedMAE(0.7), *pair), np.clip(np.abs(pair[0].numpy() - pair[1].numpy()), 0, 0.7).mean())


@pytest.mark.parametrize("loss", [MAE(), MSE(), RMSE(), ClippedMAE(), SMAPE(), LogSMAPE()], ids=str)
def test_missing_targets_are_left_out_of_the_pooled_mean(pair, loss):
    outputs, targets = pair
    targets[2], targets[4:, 3], targets[7, :5] = float("nan"), float("nan"), float("nan")
    known = ~targets.isnan()
    expected = batch_value(loss, outputs[known], targets[known])
    close(batch_value(loss, outputs, targets), expected)
    per_row = torch.stack([batch_value(loss, o[k], t[k]) for o, t, k in zip(outputs, targets, known, strict=True)])
    assert abs(per_row.mean() - expected) > 1e-3  # not a mean of means


def test_one_number_per_sample_needs_no_second_axis(pair):
    outputs, targets = pair[0][:, 0], pair[1][:, 0]
    close(MAE()(outputs, targets), (outputs - targets).abs())
    with pytest.raises(ValueError, match=r"\[9, 6\].*\[9\]"):
        MAE()(pair[0], targets)


def test_rmse_of_perfect_outputs_has_gradient_zero():
    outputs = torch.ones(3, 2, requires_grad=True)
    value = batch_value(RMSE(), outputs, torch.ones(3, 2))
    value.backward()
    assert value == 0 and not outputs.grad.any()


def test_log_smape_is_the_smape_of_the_exponentials(pair):
    outputs, targets = pair
    close(batch_value(LogSMAPE(), outputs, targets), batch_value(SMAPE(), outputs.exp(), targets.exp()))
    p, t = outputs.exp().numpy(), targets.exp().numpy()
    close(batch_value(LogSMAPE(), outputs, targets), np.mean(np.abs(p - t) / ((p + t) / 2)))


def test_smape_of_zero_and_zero_is_zero_with_gradient_zero():
    outputs = torch.tensor([[0.0, 3.0]], requires_grad=True)
    value = batch_value(SMAPE(), outputs, torch.tensor([[0.0, 1.0]]))
    value.backward()
    assert value == 0.5 and outputs.grad[0, 0] == 0 and outputs.grad[0, 1] > 0


def test_smape_is_flat_for_the_wrong_sign_unless_it_has_a_floor():
    for loss, slope in ((SMAPE(), 0.0), (SMAPE(floor=4.0), -0.5)):
        outputs = torch.tensor([[-1.0]], requires_grad=True)
        batch_value(loss, outputs, torch.tensor([[2.0]])).backward()
        assert outputs.grad.item() == slope
    outputs = torch.tensor([[-1.0]], requires_grad=True)
    batch_value(LogSMAPE(), outputs, torch.tensor([[2.0]])).backward()
    assert outputs.grad.item() < -0.1


def test_smape_of_denormal_numbers_is_finite():
    outputs = torch.tensor([[1e-42, 1e-38]], requires_grad=True)
    batch_value(SMAPE(), outputs, torch.zeros(1, 2)).backward()
    assert torch.isfinite(outputs.grad).all()
