"""All TTA transforms of an image differ, and each is undone exactly."""

import pytest
import torch

from common.vision.tta import FLIPS, MIRRORED, TURNS


@pytest.mark.parametrize("ways, count, size", [(MIRRORED, 2, (3, 5)), (FLIPS, 4, (3, 5)), (TURNS, 8, (4, 4))])
def test_ways_differ_and_are_undone(ways, count, size):
    images = torch.arange(2 * 3 * size[0] * size[1], dtype=torch.uint8).view(2, 3, *size)
    laid = {name: way.apply(images) for name, way in ways.items()}
    assert len({tuple(image.flatten().tolist()) for image in laid.values()}) == count
    for name, way in ways.items():
        assert torch.equal(way.undo(laid[name]), images), name
    assert list(ways)[0] == "as is" and laid["as is"] is images


def test_turns_are_turns():
    image = torch.arange(16).view(1, 1, 4, 4)
    assert torch.equal(TURNS["quarter turn left"].apply(image), torch.rot90(image, 1, (-2, -1)))
    assert torch.equal(TURNS["quarter turn right"].apply(image), torch.rot90(image, -1, (-2, -1)))
    assert torch.equal(TURNS["half turn"].apply(image), torch.rot90(image, 2, (-2, -1)))
