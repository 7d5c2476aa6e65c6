"""The network: shapes, uint8 and float inputs, and a memory format that does not change the outputs."""

import pytest
import torch

from competitions.digit_recognizer.config import RECIPES
from competitions.digit_recognizer.model import DigitNet


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


def test_pixels_are_normalised_before_the_first_convolution():
    torch.manual_seed(0)
    model = DigitNet(width=8, kernel=5, dropout=0.0).eval()
    images = torch.randint(0, 256, (5, 1, 28, 28), dtype=torch.uint8)
    expected = model.classifier(model.features((images.float() - 33.3) / 78.6))
    assert torch.allclose(model(images), expected, atol=1e-4)


def test_training_drops_the_set_part_of_the_last_features_and_evaluation_none():
    torch.manual_seed(0)
    model, seen = DigitNet(width=8, kernel=5, dropout=0.75), []
    model.features.register_forward_hook(lambda module, inputs, output: seen.append(output.flatten(1)))
    model.classifier[-1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = torch.randint(0, 256, (32, 1, 28, 28), dtype=torch.uint8)
    model.train()(images)
    features, kept = seen
    assert float((kept == 0)[features != 0].float().mean()) == pytest.approx(0.75, abs=0.03)
    assert torch.allclose(kept[kept != 0], 4 * features[kept != 0])
    seen.clear()
    model.eval()(images)
    assert torch.equal(*seen)


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
