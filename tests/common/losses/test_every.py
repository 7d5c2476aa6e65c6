"""Properties of every shipped loss: kind, weights, micro-batches, gradients, half precision, empty targets."""

import pytest
import torch
from torch import Tensor

from common.batch import map_tree, tensors_of
from common.losses import batch_value, kind
from common.losses.protocol import columns_of, mass_of, normaliser
from tests.common.losses.cases import SHIPPED, Case

every = pytest.mark.parametrize("case", SHIPPED, ids=lambda case: case.name.replace(" ", "_"))


def rows(tree, index):
    return map_tree(lambda tensor: tensor[index], tree)


def gradients(loss, outputs, targets, weights=None) -> tuple[Tensor, list[Tensor]]:
    """The batch value and its gradient with respect to every tensor of the outputs."""
    outputs = map_tree(lambda tensor: tensor.detach().clone().requires_grad_(), outputs)
    value = batch_value(loss, outputs, targets, weights)
    return value.detach(), list(torch.autograd.grad(value, tensors_of(outputs), allow_unused=True))


@every
def test_has_the_kind_it_should_and_gives_one_number(case: Case):
    loss = case.make()
    outputs, targets = case.sample(7)
    assert kind(loss) == case.kind
    value = batch_value(loss, outputs, targets)
    assert value.shape == () and torch.isfinite(value)


@every
def test_a_weight_counts_like_copies_of_the_sample(case: Case):
    outputs, targets = case.sample(8, seed=1)
    copies = torch.tensor([1, 2, 0, 3, 1, 0, 1, 2])
    repeated = torch.arange(8).repeat_interleave(copies)
    value, slopes = gradients(case.make(), outputs, targets, copies.double())
    expected, copied = gradients(case.make(), rows(outputs, repeated), rows(targets, repeated))
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    for slope, parts in zip(slopes, copied, strict=True):
        gathered = torch.zeros_like(slope).index_add_(0, repeated, parts)
        torch.testing.assert_close(slope, gathered, rtol=1e-10, atol=1e-13)


@every
def test_the_order_of_the_samples_does_not_matter(case: Case):
    outputs, targets = case.sample(7, seed=2)
    turned = torch.tensor([3, 1, 6, 0, 5, 2, 4])
    value = batch_value(case.make(), outputs, targets)
    torch.testing.assert_close(batch_value(case.make(), rows(outputs, turned), rows(targets, turned)), value)


@every
def test_what_is_added_up_is_of_one_sample_alone(case: Case):
    if case.kind == "whole_batch":
        pytest.skip("nothing is added up")
    loss, (outputs, targets) = case.make(), case.sample(6, seed=3)
    added = loss.stats if case.kind == "sums" else loss
    together, masses = added(outputs, targets), mass_of(loss, targets)
    assert len(together) == 6 and masses.shape == ((6,) if columns_of(loss) == 1 else (6, columns_of(loss)))
    assert (masses >= 0).all() and not masses.requires_grad
    for i in range(6):
        alone = slice(i, i + 1)
        one = added(rows(outputs, alone), rows(targets, alone))
        torch.testing.assert_close(one, together[alone], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(mass_of(loss, rows(targets, alone)), masses[alone])


@every
def test_gradcheck(case: Case):
    loss, (outputs, targets) = case.make(), case.sample(4, seed=4)
    leaves = [leaf.requires_grad_() for leaf in tensors_of(outputs)]
    weights = torch.tensor([1.0, 0.5, 2.0, 1.5], dtype=torch.float64)

    def value(*leaves: Tensor) -> Tensor:
        found = iter(leaves)
        return batch_value(loss, map_tree(lambda _: next(found), outputs), targets, weights)

    assert torch.autograd.gradcheck(value, leaves)


def nothing(targets: Tensor) -> Tensor:
    """Empty targets: no label, no mask, all background, all zero."""
    return torch.zeros_like(targets)


def unknown(targets: Tensor) -> Tensor:
    """Targets that are all missing or ignored."""
    return torch.full_like(targets, float("nan") if targets.is_floating_point() else -100)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("change", [None, nothing, unknown], ids=lambda change: getattr(change, "__name__", "some"))
def test_is_finite_at_extreme_outputs(case: Case, dtype: torch.dtype, change):
    if change is unknown and case.name in ("cross-entropy soft", "cosine"):
        pytest.skip("its targets are vectors, which are given or not")
    outputs, targets = case.sample(6, seed=5)
    targets = map_tree(lambda t: t.float() if t.is_floating_point() else t, targets)
    if change:
        targets = map_tree(change, targets)
    generator = torch.Generator().manual_seed(0)

    def extreme(tensor: Tensor) -> Tensor:
        signs = torch.randint(-1, 2, tensor.shape, generator=generator)  # -50, 0 and 50
        return (50 * signs).to(dtype)

    for some in (
        extreme,
        lambda t: torch.full_like(t, 50, dtype=dtype),
        lambda t: torch.full_like(t, -50, dtype=dtype),
    ):
        value, slopes = gradients(case.make(), map_tree(some, outputs), targets)
        assert torch.isfinite(value)
        assert all(torch.isfinite(slope).all() for slope in slopes)
        if change is unknown:
            assert value == 0 and not any(slope.any() for slope in slopes)


@every
def test_outputs_in_half_precision_only_lose_their_own_digits(case: Case):
    outputs, targets = case.sample(6, seed=6)
    rounded = map_tree(lambda tensor: tensor.bfloat16(), outputs)
    exact = batch_value(case.make(), map_tree(lambda tensor: tensor.double(), rounded), targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = batch_value(case.make(), rounded, targets)
    torch.testing.assert_close(found.double(), exact.double(), rtol=2e-6, atol=1e-6)


@every
def test_weights_that_are_all_zero_give_zero(case: Case):
    outputs, targets = case.sample(5, seed=7)
    value, slopes = gradients(case.make(), outputs, targets, torch.zeros(5))
    assert not any(slope.any() for slope in slopes)
    if case.kind == "per_sample":
        assert value == 0 and not normaliser(case.make(), targets, torch.zeros(5)).any()


def naive(loss, outputs: Tensor, targets: Tensor, size: int) -> Tensor:
    """The gradient of usual accumulation: of the mean over the losses of the micro-batches."""
    parts = range(0, len(targets), size)
    found = [gradients(loss, rows(outputs, slice(i, i + size)), rows(targets, slice(i, i + size)))[1][0] for i in parts]
    return torch.cat(found) / len(parts)


@pytest.mark.parametrize("name", ["f1 macro", "dice batch", "lovasz hinge", "rmse", "bce present", "mae"])
def test_the_usual_accumulation_is_wrong_for_it(name: str):
    (case,) = (case for case in SHIPPED if case.name == name)
    outputs, targets = case.sample(12, seed=8)
    exact = gradients(case.make(), outputs, targets)[1][0]
    assert (naive(case.make(), outputs, targets, 4) - exact).norm() > 0.02 * exact.norm()


def test_the_usual_accumulation_is_right_for_plain_means_of_equal_parts():
    (case,) = (case for case in SHIPPED if case.name == "bce")
    outputs, targets = case.sample(12, seed=8)
    torch.testing.assert_close(
        naive(case.make(), outputs, targets, 4), gradients(case.make(), outputs, targets)[1][0], rtol=1e-12, atol=0
    )
