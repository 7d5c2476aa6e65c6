"""Run-length masks against a slow loop, pycocotools and cv2.INTER_AREA, and encoded and decoded again."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco

from common.errors import UserError
from common.vision import rle

masks = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=13))


def slow_decode(text: str, height: int, width: int) -> np.ndarray:
    """Decode pixel by pixel, as the competition defines the format."""
    mask = np.zeros((height, width), bool)
    numbers = [int(word) for word in text.split()]
    for start, length in zip(numbers[::2], numbers[1::2], strict=True):
        for pixel in range(start - 1, start - 1 + length):
            mask[pixel % height, pixel // height] = True
    return mask


def slow_resize(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Refine both grids to a common one; a target pixel is on if at least half of its cells are."""
    fine = np.kron(mask, np.ones((height, width), int))
    cells = fine.reshape(height, mask.shape[0], width, mask.shape[1]).sum((1, 3))
    return 2 * cells >= mask.shape[0] * mask.shape[1]


def blobs(height: int, width: int, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal((height, width)).astype(np.float32)
    return cv2.GaussianBlur(noise, (0, 0), height / 20) > 0


@given(masks)
def test_encode_then_decode_is_the_mask(mask):
    text = rle.encode(mask)
    assert (rle.decode(rle.parse(text), *mask.shape) == mask).all()
    assert (slow_decode(text, *mask.shape) == mask).all()
    assert rle.problem_of_text(text, mask.size) is None
    assert rle.encode(np.asfortranarray(mask)) == text
    for kind in (np.uint8, np.int64, np.float32):
        assert rle.encode(mask.astype(kind)) == text


@pytest.mark.parametrize("corner", [(0, 0), (0, -1), (-1, 0), (-1, -1)])
def test_corners_are_pixels_1_height_and_the_last(corner):
    mask = np.zeros((350, 525), bool)
    mask[corner] = True
    expected = {(0, 0): "1 1", (-1, 0): "350 1", (0, -1): f"{524 * 350 + 1} 1", (-1, -1): f"{350 * 525} 1"}[corner]
    assert rle.encode(mask) == expected
    assert (rle.decode(rle.parse(expected), 350, 525) == mask).all()


def test_pixels_beyond_seven_digits():
    mask = np.zeros((3000, 4000), bool)
    mask[1:3, -1] = True
    assert rle.encode(mask) == f"{3000 * 3999 + 2} 2"


def test_empty_and_full():
    assert rle.encode(np.zeros((350, 525), bool)) == ""
    assert rle.parse("").shape == rle.parse("  ").shape == (0, 2)
    assert not rle.decode(rle.parse(""), 7, 5).any()
    assert not rle.decode_to_size(rle.parse(""), 7, 5, 3, 2).any()
    assert rle.encode(np.ones((1400, 2100), bool)) == "1 2940000"
    assert rle.decode_to_size(rle.parse("1 2940000"), 1400, 2100, 384, 576).all()


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools, with NumPy 2
def test_agrees_with_pycocotools():
    for seed in range(5):
        mask = blobs(140, 210, seed)
        ours = rle.parse(rle.encode(mask))
        theirs = coco.decode(coco.encode(np.asfortranarray(mask, dtype=np.uint8))).astype(bool)
        assert (rle.decode(ours, 140, 210) == theirs).all()
        counts, at = [], 0
        for start, length in ours:
            counts += [int(start) - at, int(length)]
            at = int(start + length)
        packed = coco.frPyObjects({"size": [140, 210], "counts": [*counts, 140 * 210 - at]}, 140, 210)
        assert (coco.decode(packed) == mask).all()


@settings(max_examples=300)
@given(masks, st.integers(1, 17), st.integers(1, 17))
def test_decode_to_size_is_the_exact_half_area_rule(mask, height, width):
    small = rle.decode_to_size(rle.parse(rle.encode(mask)), *mask.shape, height, width)
    assert small.shape == (height, width) and small.dtype == bool
    assert (small == slow_resize(mask, height, width)).all()


@pytest.fixture(scope="module")
def large() -> tuple[np.ndarray, np.ndarray]:
    """A full-size mask and its runs; made once, because it takes a second."""
    mask = blobs(1400, 2100, 3)
    return mask, rle.parse(rle.encode(mask))


@pytest.mark.parametrize("size", [(384, 576), (350, 525), (160, 240), (700, 1050), (1400, 2100), (1408, 2112)])
def test_decode_to_size_is_inter_area_of_the_full_mask(large, size):
    mask, runs = large
    small = rle.decode_to_size(runs, 1400, 2100, *size)
    if size > (1400, 2100):  # cv2.INTER_AREA does not average when it enlarges
        assert (cv2.resize(mask.astype(np.uint8), size[::-1], interpolation=cv2.INTER_NEAREST) != small).mean() < 1e-2
        return
    share = cv2.resize(mask.astype(np.float32), size[::-1], interpolation=cv2.INTER_AREA)
    differ = (share >= 0.5) != small
    assert np.abs(share[differ] - 0.5).max(initial=0) < 1e-4  # float32 rounding of exact halves
    assert size == (1400, 2100) or (small != (share > 0)).any()  # so that the comparison can fail


def test_runs_that_touch_or_cross_columns():
    assert (rle.decode(rle.parse("1 2 3 2"), 3, 2) == slow_decode("1 4", 3, 2)).all()
    assert rle.problem_of_text("1 2 3 2", 6) is None
    for height, width in ((2, 2), (5, 3), (1, 1)):
        got = rle.decode_to_size(rle.parse("2 1 3 6"), 3, 4, height, width)
        assert (got == slow_resize(slow_decode("2 7", 3, 4), height, width)).all()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1 2 3", "3 numbers, expected pairs"),
        ("1 2 x 4", "'x' is not a whole number"),
        ("1 2.5", "'2.5' is not a whole number"),
        ("1 nan", "'nan' is not a whole number"),
        ("-4 2", "'-4' is not a whole number|out of range"),
        ("0 2", "run 0 2 is out of range, pixels are 1 to 100"),
        ("99 3", "run 99 3 is out of range, pixels are 1 to 100"),
        ("99999999999999999999 1", "not a whole number|out of range"),
        ("5 9223372036854775807", "not a whole number|out of range"),
        ("99999999999999999999 5", "not a whole number|out of range"),
        ("3 0", "run 3 0 has no pixels"),
        ("5 4 8 2", "run 8 2 overlaps the run 5 4"),
        ("20 2 3 2", "run 3 2 is not sorted, it starts before the run 20 2"),
    ],
)
def test_faults_are_named(text, words):
    found = rle.problem_of_text(text, 100)
    assert found is not None and any(part in found for part in words.split("|")), found


def test_valid_cells_have_no_fault():
    for text in ("", "1 100", "100 1", "1 1 3 1", " 1 2 "):
        assert rle.problem_of_text(text, 100) is None


def test_run_masks_are_decoded_at_the_working_size():
    first, second = (np.random.default_rng(seed).random((2, 30, 40)) < 0.3 for seed in (0, 1))
    cells = [[rle.encode(mask) for mask in first], [rle.encode(second[0]), ""]]
    masks = rle.RunMasks(cells, (30, 40), (15, 10), ["a", "b"], "train.csv")
    assert masks[0].dtype == np.uint8 and masks[0].shape == (15, 10, 2)
    assert (masks[0][:, :, 1] == slow_resize(first[1], 15, 10)).all() and not masks[1][:, :, 1].any()
    full = rle.RunMasks(cells, (30, 40), (30, 40), ["a", "b"], "train.csv")
    assert (full[0] == np.stack(first, -1)).all()


def test_run_masks_take_the_runs_of_several_things_in_any_order():
    first, second = (np.zeros((30, 40), bool) for _ in range(2))
    first[2:9, 20:30], second[4:20, 3:9] = True, True
    cell = f"{rle.encode(first)} {rle.encode(second)}"
    masks = rle.RunMasks([[cell]], (30, 40), (30, 40), ["a"], "train.csv")
    assert (masks[0][:, :, 0] == (first | second)).all()
    with pytest.raises(UserError, match="the mask of a: run 3 2 overlaps the run 2 2"):
        rle.RunMasks([["3 2 2 2"]], (30, 40), (30, 40), ["a"], "train.csv")


@pytest.mark.parametrize("cell", ["1199 5", "1 2 3", "1 x", "0 3"])
def test_run_masks_name_the_row_whose_cell_is_no_mask(cell):
    with pytest.raises(UserError, match="train.csv: the mask of b: .*in an image of 30x40"):
        rle.RunMasks([["1 1"], [cell]], (30, 40), (15, 20), ["a", "b"], "train.csv")
