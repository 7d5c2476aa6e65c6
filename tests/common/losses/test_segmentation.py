"""Segmentation losses against segmentation_models_pytorch, scikit-learn and sets of pixels."""

import pytest
import segmentation_models_pytorch as smp
import torch
from sklearn.metrics import f1_score, jaccard_score
from torch import Tensor

from common.losses import BCE, BCEDice, Dice, Jaccard, LovaszHinge, LovaszSoftmax, Tversky, batch_value
from tests.common.losses.cases import bits, normal

CERTAIN = 1000.0  # a logit whose sigmoid is exactly 0 or 1
PEERS = {
    "dice": (Dice, lambda mode, smooth, **rest: smp.losses.DiceLoss(mode, smooth=smooth / 2, **rest)),
    "jaccard": (Jaccard, lambda mode, **rest: smp.losses.JaccardLoss(mode, **rest)),
    "tversky": (
        lambda average, **rest: Tversky(0.3, 0.7, average, **rest),
        lambda mode, **rest: smp.losses.TverskyLoss(mode, alpha=0.3, beta=0.7, **rest),
    ),
}


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def close(found: Tensor, expected, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=rtol, atol=1e-14)


def some_masks(generator: torch.Generator, n: int = 6) -> tuple[Tensor, Tensor]:
    """Logits and masks [n, 3, 6, 7]; every class is in every image."""
    targets = (torch.rand(n, 3, 6, 7, generator=generator) < 0.4).double()
    targets[:, :, 0, 0] = 1
    return normal(generator, n, 3, 6, 7), targets


@pytest.mark.parametrize("smooth", [0.0, 1.0])
@pytest.mark.parametrize("name", PEERS)
def test_overlap_over_the_batch_is_that_of_segmentation_models(generator, name: str, smooth: float):
    ours, theirs = PEERS[name]
    outputs, targets = some_masks(generator)
    expected = theirs("multilabel", smooth=smooth)(outputs, targets)
    close(batch_value(ours("batch", smooth=smooth), outputs, targets), expected)


@pytest.mark.parametrize("smooth", [0.0, 1.0])
@pytest.mark.parametrize("name", PEERS)
def test_overlap_per_image_is_the_mean_of_theirs_over_single_images(generator, name: str, smooth: float):
    ours, theirs = PEERS[name]
    outputs, targets = some_masks(generator)
    each = [theirs("multilabel", smooth=smooth)(outputs[i : i + 1], targets[i : i + 1]) for i in range(len(targets))]
    close(batch_value(ours("image", smooth=smooth), outputs, targets), torch.stack(each).mean())


@pytest.mark.parametrize("name", PEERS)
def test_overlap_of_exclusive_classes_is_that_of_segmentation_models(generator, name: str):
    ours, theirs = PEERS[name]
    outputs, targets = normal(generator, 5, 4, 6, 7), torch.randint(0, 4, (5, 6, 7), generator=generator)
    close(
        batch_value(ours("batch", smooth=1.0, activation="softmax"), outputs, targets),
        theirs("multiclass", smooth=1.0)(outputs, targets),
    )
    gaps = targets.masked_fill(torch.rand(targets.shape, generator=generator) < 0.3, -100)
    close(
        batch_value(ours("batch", smooth=1.0, activation="softmax"), outputs, gaps),
        theirs("multiclass", smooth=1.0, ignore_index=-100)(outputs, gaps),
    )


def test_dice_per_image_and_over_the_batch_are_different_losses(generator):
    outputs, targets = normal(generator, 6, 3, 6, 7), bits(generator, 6, 3, 6, 7)
    assert abs(batch_value(Dice("image"), outputs, targets) - batch_value(Dice("batch"), outputs, targets)) > 0.01


@pytest.mark.parametrize("seed", range(3))
def test_hard_masks_agree_with_scikit_learn(seed: int):
    generator = torch.Generator().manual_seed(seed)
    predicted, targets = bits(generator, 4, 3, 6, 7, rate=0.6), bits(generator, 4, 3, 6, 7)
    predicted[1, 0], targets[1, 0] = 0, 0
    logits = CERTAIN * (2 * predicted - 1)
    sides = [x.transpose(0, 1).flatten(1).int().numpy() for x in (targets, predicted)]  # [C, pixels]
    for loss, score in ((Dice, f1_score), (Jaccard, jaccard_score)):
        expected = sum(1 - score(t, p, zero_division=1) for t, p in zip(*sides, strict=True)) / 3
        close(batch_value(loss("batch", smooth=0), logits, targets), expected)
        pairs = zip(*(x.flatten(0, 1).flatten(1).int().numpy() for x in (targets, predicted)), strict=True)
        each = [1 - score(t, p, zero_division=1) for t, p in pairs]
        close(batch_value(loss("image", smooth=0), logits, targets), sum(each) / len(each))


@pytest.mark.parametrize("loss", [Dice, Jaccard])
def test_present_only_is_the_mean_over_the_masks_that_are_there(generator, loss):
    outputs, targets = normal(generator, 5, 3, 6, 7), bits(generator, 5, 3, 6, 7)
    targets[1, 2] = 0
    present = targets.flatten(2).sum(2) > 0
    assert 0 < present.sum() < 15
    expected = batch_value(loss(), outputs[present][:, None], targets[present][:, None])
    close(batch_value(loss(present_only=True), outputs, targets), expected)
    assert abs(batch_value(loss(), outputs, targets) - expected) > 0.01
    targets[:, 1] = 0
    there = [0, 2]
    expected = batch_value(loss("batch"), outputs[:, there], targets[:, there])
    close(batch_value(loss("batch", present_only=True), outputs, targets), expected)


def test_present_only_of_exclusive_classes_counts_the_classes_of_each_image(generator):
    targets = torch.randint(0, 4, (5, 6, 7), generator=generator)
    targets[0], targets[1] = 2, -100
    targets[2] = targets[2].clamp(max=1)
    hot = torch.stack([(targets == c) for c in range(4)], 1)
    found = Dice(present_only=True, activation="softmax").mass(targets)
    assert found.tolist() == hot.flatten(2).any(2).sum(1).tolist() == [1, 0, 2, 4, 4]


def test_bce_dice_is_the_weighted_sum_and_present_only_leaves_absent_masks_out(generator):
    outputs, targets = normal(generator, 5, 3, 6, 7), bits(generator, 5, 3, 6, 7)
    targets[1, 2] = 0
    expected = 0.75 * batch_value(BCE(), outputs, targets) + 0.25 * batch_value(Dice(), outputs, targets)
    close(batch_value(BCEDice(0.75, 0.25), outputs, targets), expected)
    there = targets.flatten(2).sum(2) > 0
    some = (outputs[there][:, None], targets[there][:, None])
    close(
        batch_value(BCEDice(0.75, 0.25, present_only=True), outputs, targets), batch_value(BCEDice(0.75, 0.25), *some)
    )


@pytest.mark.parametrize("per_image", [False, True])
def test_lovasz_hinge_is_that_of_segmentation_models(generator, per_image: bool):
    outputs, targets = normal(generator, 5, 3, 6, 7), bits(generator, 5, 3, 6, 7)
    theirs = smp.losses.LovaszLoss("binary", per_image=per_image)
    expected = torch.stack([theirs(outputs[:, c].float(), targets[:, c].float()) for c in range(3)]).mean()
    close(batch_value(LovaszHinge(per_image), outputs, targets), expected, 2e-6)  # theirs computes in float32


@pytest.mark.parametrize("per_image", [False, True])
def test_lovasz_softmax_is_that_of_segmentation_models(generator, per_image: bool):
    outputs, targets = normal(generator, 5, 4, 6, 7), torch.randint(0, 3, (5, 6, 7), generator=generator)
    targets[0] = 1
    theirs = smp.losses.LovaszLoss("multiclass", per_image=per_image)
    close(batch_value(LovaszSoftmax(per_image), outputs, targets), theirs(outputs.float(), targets), 2e-6)
    targets[1:, 2:5] = -100
    theirs = smp.losses.LovaszLoss("multiclass", per_image=per_image, ignore_index=-100)
    close(batch_value(LovaszSoftmax(per_image), outputs, targets), theirs(outputs.float(), targets), 2e-6)


def test_lovasz_hinge_of_hard_errors_is_the_jaccard_loss(generator):
    """At hinge errors of only 0 and 2, the Lovász extension is twice the Jaccard loss."""
    predicted, targets = bits(generator, 4, 1, 6, 7, rate=0.6), bits(generator, 4, 1, 6, 7)
    expected = 2 * (1 - jaccard_score(targets.flatten().int().numpy(), predicted.flatten().int().numpy()))
    close(batch_value(LovaszHinge(), 2 * predicted - 1, targets), expected)


def test_lovasz_hinge_leaves_out_pixels_nobody_knows(generator):
    outputs, targets = normal(generator, 1, 1, 6, 7), bits(generator, 3, 1, 6, 7)[1:2]
    missing = targets.clone()
    missing[..., 2:4] = float("nan")
    rest = [0, 1, 4, 5, 6]
    expected = batch_value(LovaszHinge(), outputs[..., rest], targets[..., rest])
    close(batch_value(LovaszHinge(), outputs, missing), expected)


def test_lovasz_without_a_target_is_the_largest_error():
    outputs, targets = torch.tensor([[[0.5, -3.0, 1.5]]]), torch.zeros(1, 1, 3)
    assert batch_value(LovaszHinge(), outputs, targets) == 2.5


def test_present_only_of_labels_without_pixels(generator):
    outputs, targets = normal(generator, 9, 3), torch.randint(0, 2, (9, 3), generator=generator)
    for loss in (BCE(present_only=True), Dice(present_only=True)):
        pixels = outputs[..., None, None], targets[..., None, None]
        assert torch.equal(batch_value(loss, outputs, targets), batch_value(loss, *pixels))
    loss, classes = Dice(activation="softmax", present_only=True), targets[:, 0]
    expected = batch_value(loss, outputs[..., None, None], classes[:, None, None])
    assert torch.equal(batch_value(loss, outputs, classes), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.int32, torch.uint16])
@pytest.mark.parametrize(
    "loss",
    [
        Dice("batch", activation="softmax"),
        Dice(activation="softmax", present_only=True),
        LovaszSoftmax(),
        LovaszSoftmax(per_image=True, present_only=False),
    ],
)
def test_masks_of_classes_may_be_of_every_integer_type(generator, loss, dtype):
    """In uint8, -100 wraps to 156, which is a valid class."""
    outputs, targets = normal(generator, 3, 160, 4, 5), torch.randint(0, 2, (3, 4, 5), generator=generator)
    if dtype in (torch.uint8, torch.int16):
        targets[0, 0, 0] = 156
    assert torch.equal(batch_value(loss, outputs, targets.to(dtype)), batch_value(loss, outputs, targets))


def test_integer_masks_give_the_same_as_floating_ones(generator):
    outputs, targets = some_masks(generator)
    for loss in (BCE(present_only=True), Dice(), Jaccard("batch"), LovaszHinge(), BCEDice(present_only=True)):
        close(batch_value(loss, outputs, targets.byte()), batch_value(loss, outputs, targets))


def test_bce_dice_hands_the_smoothing_on():
    g = torch.Generator().manual_seed(0)
    pair = torch.randn(3, 2, 4, 4, generator=g).double(), (torch.rand(3, 2, 4, 4, generator=g) < 0.4).double()
    expected = 0.5 * batch_value(BCE(), *pair) + 0.5 * batch_value(Dice(smooth=9.0), *pair)
    torch.testing.assert_close(batch_value(BCEDice(smooth=9.0), *pair), expected)
