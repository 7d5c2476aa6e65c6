"""The network: shapes, inputs of either type, and memory order that changes nothing."""

import torch

from competitions.digit_recognizer.model import DigitNet
from competitions.digit_recognizer.task import RECIPES


def test_uint8_and_float_pixels_give_the_same_logits():
    torch.manual_seed(0)
    model = DigitNet(width=8, kernel=5, dropout=0.5).eval()
    images = torch.randint(0, 256, (5, 1, 28, 28), dtype=torch.uint8)
    logits = model(images)
    assert logits.shape == (5, 10) and logits.dtype == torch.float32
    assert torch.equal(model(images.float()), logits)
    reordered = DigitNet(width=8, kernel=5, dropout=0.5).eval().to(memory_format=torch.channels_last)
    reordered.load_state_dict(model.state_dict())
    assert torch.allclose(reordered(images), logits, atol=1e-4)


def test_an_image_is_judged_on_its_own_in_evaluation():
    torch.manual_seed(0)
    model = DigitNet(width=8, kernel=5, dropout=0.5).double().eval()
    images = torch.randint(0, 256, (6, 1, 28, 28), dtype=torch.uint8)
    features = model.features((images.double() - 33.3) / 78.6)
    alone = torch.cat([model.features((image[None].double() - 33.3) / 78.6) for image in images])
    assert torch.allclose(features, alone, rtol=1e-10)


def test_the_network_is_compact():
    for name, parameters in (("default", 380_330), ("best", 380_330), ("fast", 98_266)):
        config = RECIPES[name]
        model = DigitNet(config.width, config.kernel, config.dropout)
        assert sum(weights.numel() for weights in model.parameters()) == parameters
