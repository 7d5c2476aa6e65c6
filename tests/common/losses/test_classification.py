"""Classification losses against torch, scikit-learn, segmentation_models_pytorch and slow loops."""

import math

import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from sklearn.metrics import fbeta_score
from torch import Tensor, nn

from common.losses import BCE, CosineProximity, CrossEntropy, Focal, PositivesVersusNegatives, SoftFBeta, batch_value
from tests.common.losses.cases import WEIGHTS, bits, ignored_labels, labels, multilabel, normal, soft_labels

CERTAIN = 1000.0  # a logit whose sigmoid is exactly 0 or 1


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def close(found: Tensor, expected, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=rtol, atol=1e-14)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("draw", [labels, soft_labels, ignored_labels])
def test_cross_entropy_is_torchs(generator, draw, weights, smoothing: float):
    outputs, targets = draw(9, generator)
    reference = nn.CrossEntropyLoss(
        None if weights is None else torch.tensor(weights).double(), label_smoothing=smoothing
    )
    close(batch_value(CrossEntropy(weights, smoothing), outputs, targets), reference(outputs, targets), 1e-7)
    torch.testing.assert_close(
        batch_value(CrossEntropy(weights, smoothing).double(), outputs, targets), reference(outputs, targets)
    )


@pytest.mark.parametrize("weights", [None, torch.linspace(1, 2, 200)])
def test_cross_entropy_of_small_integers_is_that_of_large_ones(generator, weights):
    """In uint8, -100 wraps to 156, which is a valid class; and torch reads a uint8 index as a mask."""
    outputs, targets = torch.randn(3, 200, generator=generator), torch.tensor([156, 0, 3], dtype=torch.uint8)
    for ignored in (-100, None):
        loss = CrossEntropy(weights, ignore_index=ignored)
        close(batch_value(loss, outputs, targets), F.cross_entropy(outputs, targets.long(), weights), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16])
@pytest.mark.parametrize("weights", [None, torch.linspace(1, 2, 200)])
@pytest.mark.parametrize("places", [(), (4, 5)], ids=["labels", "masks"])
def test_cross_entropy_takes_class_numbers_of_every_integer_type(generator, places, weights, dtype):
    outputs = torch.randn(3, 200, *places, generator=generator)
    targets = torch.tensor([1, 0, 1]).reshape(3, *[1] * len(places)).expand(3, *places)
    found = batch_value(CrossEntropy(weights), outputs, targets.to(dtype))
    assert torch.equal(found, batch_value(CrossEntropy(weights), outputs, targets))


def test_cross_entropy_of_nothing_but_ignored_targets_is_zero_where_torch_says_nan():
    outputs, targets = torch.randn(3, 4), torch.full((3,), -100)
    assert F.cross_entropy(outputs, targets).isnan()
    assert batch_value(CrossEntropy(), outputs, targets) == 0


def test_bce_is_torchs(generator):
    outputs, targets = multilabel(9, generator)
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 0.5]).double()
    close(batch_value(BCE(), outputs, targets), nn.BCEWithLogitsLoss()(outputs, targets))
    close(batch_value(BCE(weight), outputs, targets), nn.BCEWithLogitsLoss(pos_weight=weight)(outputs, targets))
    smooth = 0.8 * targets + 0.1
    close(batch_value(BCE(label_smoothing=0.2), outputs, targets), nn.BCEWithLogitsLoss()(outputs, smooth))


def test_bce_pos_weight_belongs_to_the_channels(generator):
    outputs, targets = normal(generator, 2, 3, 4, 5), bits(generator, 2, 3, 4, 5)
    weight = torch.tensor([1.0, 2.0, 3.0]).double()
    expected = nn.BCEWithLogitsLoss(pos_weight=weight[:, None, None])(outputs, targets)
    close(batch_value(BCE(weight), outputs, targets), expected)


def test_bce_leaves_out_missing_targets_and_absent_classes(generator):
    outputs, targets = normal(generator, 4, 3, 5, 5), bits(generator, 4, 3, 5, 5)
    targets[1, 2] = 0
    present = targets.flatten(2).sum(2) > 0  # [B, C]
    assert 0 < present.sum() < 12
    close(
        batch_value(BCE(present_only=True), outputs, targets),
        F.binary_cross_entropy_with_logits(outputs[present], targets[present]),
    )
    missing = targets.clone()
    missing[2:, 0, 1] = float("nan")
    known = ~missing.isnan()
    close(batch_value(BCE(), outputs, missing), F.binary_cross_entropy_with_logits(outputs[known], missing[known]))


@pytest.mark.parametrize("alpha", [None, 0.25])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_is_that_of_segmentation_models(generator, gamma: float, alpha):
    outputs, targets = multilabel(9, generator)
    expected = smp.losses.FocalLoss("binary", alpha=alpha, gamma=gamma)(outputs, targets)
    close(batch_value(Focal(gamma, alpha), outputs, targets), expected, 1e-10)


def test_focal_takes_no_broadcast(generator):
    with pytest.raises(ValueError, match=r"\[4, 1\] and targets \[4\]"):
        Focal()(torch.zeros(4, 1), torch.zeros(4))


def test_focal_with_gamma_zero_is_bce(generator):
    outputs, targets = multilabel(9, generator)
    close(Focal(0.0)(outputs, targets), BCE()(outputs, targets))


@pytest.mark.parametrize("average", ["samples", "macro", "micro"])
@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_f_beta_of_hard_predictions_is_scikit_learns(average: str, beta: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    predicted, targets = bits(generator, 12, 5, rate=0.6), bits(generator, 12, 5)
    predicted[3], predicted[:, 2], targets[:, 2] = 0, 0, 0  # empty in both: 0/0, which counts as 1
    targets[:, 4] = 0  # false positives only
    expected = 1 - fbeta_score(
        targets.int().numpy(), predicted.int().numpy(), beta=beta, average=average, zero_division=1
    )
    close(batch_value(SoftFBeta(beta, average, smooth=0), CERTAIN * (2 * predicted - 1), targets), expected)


def test_f_beta_averages_are_different_losses(generator):
    outputs, targets = multilabel(12, generator)
    values = [float(batch_value(SoftFBeta(2, average), outputs, targets)) for average in ("samples", "macro", "micro")]
    assert max(values) - min(values) > 0.02 and len(set(values)) == 3


def test_f_beta_over_present_classes_only(generator):
    predicted, targets = bits(generator, 12, 5), bits(generator, 12, 5)
    targets[:, [1, 3]] = 0
    there = [0, 2, 4]
    expected = 1 - fbeta_score(
        targets[:, there].int().numpy(), predicted[:, there].int().numpy(), beta=2, average="macro"
    )
    logits = CERTAIN * (2 * predicted - 1)
    close(batch_value(SoftFBeta(2, "macro", smooth=0, present_only=True), logits, targets), expected)
    assert batch_value(SoftFBeta(2, "macro", present_only=True), logits, 0 * targets) == 0


def test_f_beta_still_punishes_false_positives_where_there_is_nothing_to_find():
    outputs = torch.zeros(1, 5, requires_grad=True)
    batch_value(SoftFBeta(2), outputs, torch.zeros(1, 5)).backward()
    assert (outputs.grad > 0.01).all()


def test_cosine_proximity_is_torchs_and_forgets_images_without_labels(generator):
    outputs, targets = normal(generator, 6, 8), normal(generator, 6, 8)
    close(batch_value(CosineProximity(), outputs, targets), nn.CosineEmbeddingLoss()(outputs, targets, torch.ones(6)))
    expected = batch_value(CosineProximity(), outputs[:4], targets[:4])
    targets[4:] = 0
    close(batch_value(CosineProximity(), outputs, targets), expected)


def test_cosine_proximity_has_a_bounded_gradient_at_an_output_of_zero(generator):
    outputs, targets = torch.zeros(2, 8, requires_grad=True), torch.randn(2, 8, generator=generator)
    batch_value(CosineProximity(1e-4), outputs, targets).backward()
    assert 0 < outputs.grad.norm(dim=1).max() <= 1e4


def positives_versus_negatives_slowly(outputs: Tensor, targets: Tensor) -> float:
    """The definition, computed for one positive at a time; images without a positive do not count."""
    images = []
    for logits, marks in zip(outputs, targets, strict=True):
        rivals = [math.exp(z) for z, mark in zip(logits, marks, strict=True) if mark == 0]
        losses = [
            -math.log(math.exp(z) / (math.exp(z) + sum(rivals)))
            for z, mark in zip(logits, marks, strict=True)
            if mark == 1
        ]
        if losses:
            images.append(sum(losses) / len(losses))
    return sum(images) / len(images)


def test_positives_versus_negatives_is_the_slow_loop(generator):
    outputs, targets = multilabel(20, generator)
    targets[4] = 1  # all labels are positive: no negatives, so no loss
    targets[5, 2] = float("nan")  # neither positive nor negative
    assert (targets.nansum(1) == 0).any()
    slow = positives_versus_negatives_slowly(outputs, targets)
    close(batch_value(PositivesVersusNegatives(), outputs, targets), slow)


def test_positives_versus_negatives_with_one_positive_is_cross_entropy(generator):
    outputs, targets = labels(20, generator)
    hot = F.one_hot(targets, 5).double()
    found = batch_value(PositivesVersusNegatives(), outputs, hot)
    close(found, F.cross_entropy(outputs, targets))
    multi = hot.clone()
    multi[:, 0] = 1
    assert abs(batch_value(PositivesVersusNegatives(), outputs, multi) - found) > 0.01


def test_positives_versus_negatives_of_an_image_with_every_label_has_gradient_zero():
    outputs = torch.randn(1, 5, requires_grad=True)
    value = batch_value(PositivesVersusNegatives(), outputs, torch.ones(1, 5))
    value.backward()
    assert value == 0 and not outputs.grad.any()


def test_positives_versus_negatives_never_holds_positives_times_classes():
    """With 200 positives of 7,178 classes, the graph keeps a few arrays of the outputs' size, not hundreds."""
    outputs = torch.randn(4, 7178, requires_grad=True)
    targets = torch.zeros(4, 7178)
    targets[:, :200] = 1
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        batch_value(PositivesVersusNegatives(), outputs, targets)
    assert sum(kept) <= 12 * outputs.numel()


@pytest.mark.parametrize("average", ["samples", "macro", "micro"])
def test_smoothing_of_f_beta_is_the_formula(average):
    g = torch.Generator().manual_seed(0)
    outputs, targets = torch.randn(7, 4, generator=g).double(), (torch.rand(7, 4, generator=g) < 0.4).double()
    p, axes = outputs.sigmoid(), {"samples": 1, "macro": 0, "micro": (0, 1)}[average]
    hits, wanted, predicted = ((x).sum(axes) for x in (p * targets, targets, p))
    expected = (1 - (5 * hits + 0.3) / (4 * wanted + predicted + 0.3)).mean()
    torch.testing.assert_close(batch_value(SoftFBeta(2, average, smooth=0.3), outputs, targets), expected)


def test_a_single_present_class():
    g = torch.Generator().manual_seed(0)
    outputs, targets = torch.randn(7, 4, generator=g).double(), torch.zeros(7, 4).double()
    targets[::2, 1] = 1
    found = batch_value(SoftFBeta(2, "macro", present_only=True), outputs, targets)
    torch.testing.assert_close(found, batch_value(SoftFBeta(2, "macro"), outputs[:, 1:2], targets[:, 1:2]))
