import numpy as np
import pytest
import torch
from scipy import stats

from common.errors import UserError
from common.loading.keys import Keys
from common.loading.mixing import CutMix, MixUp, OneOf

SIZE = 40
IMAGES = torch.randint(0, 256, (SIZE, 3, 10, 14), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(SIZE) % 5
MASKS = torch.randint(0, 2, (SIZE, 4, 10, 14), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
PARTNER = torch.arange(SIZE) ^ 1


def mixed(mix, targets, inputs=IMAGES, partner=PARTNER, number=0):
    return mix(inputs, targets, partner, Keys(0, 0, np.arange(SIZE) // 2, number), 0)


def test_mixup_blends_pairs_and_their_targets_alike():
    inputs, targets = mixed(MixUp(0.4, classes=5), CLASSES)
    assert inputs.dtype == torch.uint8 and targets.shape == (SIZE, 5)
    for row in range(SIZE):
        other = row ^ 1
        part = targets[row, CLASSES[row]] if CLASSES[row] != CLASSES[other] else torch.tensor(1.0)
        expected = part * IMAGES[row].double() + (1 - part) * IMAGES[other].double()
        assert (inputs[row] - expected).abs().max() <= 0.501
        assert targets[row].sum() == pytest.approx(1)
    assert torch.allclose(targets[0::2] + targets[1::2], torch.eye(5)[CLASSES[0::2]] + torch.eye(5)[CLASSES[1::2]])


def test_mixup_parts_follow_the_beta_distribution_and_the_batch():
    keys = [Keys(0, 0, np.arange(2000), number) for number in range(2)]
    rows = torch.zeros(2000, 1).index_fill_(0, torch.arange(0, 2000, 2), 1.0)
    parts = [MixUp(0.4)(rows, rows, torch.arange(2000) ^ 1, key, 0)[0][0::2, 0].numpy() for key in keys]
    assert stats.kstest(parts[0], stats.beta(0.4, 0.4).cdf).pvalue > 1e-3
    assert (parts[0] != parts[1]).mean() > 0.99


def test_probability_leaves_pairs_alone_to_the_bit():
    floats = IMAGES.float() / 255
    inputs, targets = mixed(MixUp(0.4, probability=0.5, classes=5), CLASSES, floats)
    untouched = (inputs == floats).flatten(1).all(1)
    assert 8 < untouched.sum() < 32 and torch.equal(untouched[0::2], untouched[1::2])
    alone, _ = mixed(CutMix(classes=5), CLASSES, floats, partner=torch.arange(SIZE))
    assert torch.equal(alone, floats)


def test_cutmix_pastes_boxes_into_images_and_masks_and_counts_their_area():
    inputs, targets = mixed(CutMix(), {"pixels": MASKS, "share": torch.eye(SIZE)})
    assert inputs.dtype == torch.uint8 and targets["pixels"].dtype == torch.uint8
    for row in range(SIZE):
        own, other = IMAGES[row], IMAGES[row ^ 1]
        pasted = (inputs[row] != own).any(0)  # pixels [H, W]; equal by chance in all channels is very rare
        assert torch.equal(torch.where(pasted, other, own), inputs[row])
        assert torch.equal(torch.where(pasted, MASKS[row ^ 1], MASKS[row]), targets["pixels"][row])
        assert targets["share"][row, row] == pytest.approx(1 - pasted.float().mean().item(), abs=1e-6)
        rows, columns = pasted.any(1).nonzero(), pasted.any(0).nonzero()
        if len(rows):
            box = pasted[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert box.all()
    assert (inputs != IMAGES).flatten(1).any(1).sum() > SIZE / 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int16])
def test_mixed_images_keep_their_type_and_targets_are_float32(dtype):
    for mix in (MixUp(0.4), CutMix(), OneOf(MixUp(0.4), CutMix())):
        inputs, targets = mixed(mix, torch.eye(SIZE).half(), IMAGES.to(dtype))
        assert inputs.dtype == dtype and targets.dtype == torch.float32


def test_masks_become_amounts_under_mixup():
    _, targets = mixed(MixUp(1.0), MASKS)
    assert targets.dtype == torch.float32 and ((targets > 0) & (targets < 1)).any()


def test_what_cannot_be_mixed_is_refused():
    with pytest.raises(UserError, match="MixUp\\(classes=10\\)"):
        mixed(MixUp(), CLASSES)
    for mix in (MixUp(0.0, classes=10), CutMix(-1, classes=10), MixUp(np.nan, classes=10)):
        with pytest.raises(UserError, match="expected an alpha above 0"):  # otherwise all would be NaN without an error
            mixed(mix, CLASSES)
    for inputs in (CLASSES, {"image": IMAGES, "camera": CLASSES.to(torch.uint8)}, torch.zeros(SIZE, 7).long()):
        with pytest.raises(UserError, match=r"MixUp cannot blend an input \[40"):  # camera numbers have no mean
            mixed(MixUp(classes=5), CLASSES, inputs)
    for mix in (MixUp(classes=4), CutMix(classes=4)):
        with pytest.raises(UserError, match="class 4 cannot be blended: the mix expects 0 to 3"):
            mixed(mix, CLASSES)
        with pytest.raises(UserError, match="class -100 cannot be blended"):
            mixed(mix, CLASSES - 100)
    with pytest.raises(UserError, match="CutMix needs images"):
        mixed(CutMix(classes=5), CLASSES, torch.zeros(SIZE, 7))


def test_the_area_of_cutmix_follows_the_beta_distribution():
    """A box far from the border covers 1 - l of the area, with l from Beta(1, 1)."""
    count, side = 4000, 60
    images = torch.zeros(count, 1, side, side)
    images[1::2] = 1
    keys = Keys(0, 0, np.arange(count) // 2)
    pasted = CutMix()(images, torch.zeros(count, 1), torch.arange(count) ^ 1, keys, 0)[0][0::2].mean((1, 2, 3)).numpy()
    centre = keys.uniform((2,), 2)[0::2]
    small = (np.abs(centre - 0.5) < 0.25).all(1) & (pasted < 0.2)
    assert stats.kstest(pasted[small] / 0.2, "uniform").pvalue > 1e-3
    part = 1 - pasted
    assert abs(np.corrcoef(part, centre.T)[0, 1:]).max() < 0.1, "the place has nothing to do with the size"


def test_which_pairs_are_left_alone_has_nothing_to_do_with_the_blend():
    rows = torch.zeros(4000, 1).index_fill_(0, torch.arange(0, 4000, 2), 1.0)
    keys = Keys(0, 0, np.arange(4000) // 2)
    part = MixUp(0.4, probability=0.5)(rows, rows, torch.arange(4000) ^ 1, keys, 0)[0][0::2, 0].numpy()
    blended = part[part < 1]
    assert stats.kstest(blended, stats.beta(0.4, 0.4).cdf).pvalue > 1e-3


def test_boxes_of_cutmix_lie_anywhere_whatever_their_size():
    count, side = 4000, 60
    images = torch.zeros(count, 1, side, side)
    images[1::2] = 1
    keys = Keys(0, 0, np.arange(count) // 2)
    pasted = CutMix()(images, torch.zeros(count, 1), torch.arange(count) ^ 1, keys, 0)[0][0::2, 0]
    share = pasted.mean((1, 2))
    small = (share > 0) & (share < 0.1)
    row = (pasted.mean(2) * torch.arange(side)).sum(1)[small] / pasted.mean(2).sum(1)[small]
    assert row.std() > 12, "uniform over 60 rows has 17"


def test_one_of_gives_every_pair_what_one_of_its_mixes_gives():
    parts = MixUp(0.4, probability=0.7), CutMix(probability=0.7)
    given = {"share": torch.eye(SIZE), "pixels": MASKS}
    found, *each = (mixed(mix, given) for mix in (OneOf(*parts), *parts))
    counts = []
    for row in range(SIZE):
        like = [
            torch.equal(found[0][row], one[0][row])
            and all(torch.equal(found[1][name][row].float(), one[1][name][row].float()) for name in given)
            for one in each
        ]
        assert any(like)
        counts.append(like)
    only_first, only_second = np.array(counts).T[::, :] & ~np.array(counts).T[::-1, :]
    assert np.array_equal(only_first[0::2], only_first[1::2]) and only_first.any() and only_second.any()
