"""A compact convolutional network for 28x28 digits."""

import torch
from torch import Tensor, nn

MEAN, DEVIATION = 33.3, 78.6  # of the pixels 0..255 of the training images


def _convolution(inputs: int, outputs: int, padding: int = 1) -> list[nn.Module]:
    # The ReLU works in place: at 28x28 the network waits for memory more than for arithmetic.
    return [
        nn.Conv2d(inputs, outputs, 3, padding=padding, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]


class DigitNet(nn.Module):
    """Seven 3x3 convolutions at three scales, then one linear layer over all places; [B, 1, 28, 28] to logits [B, 10].

    Takes uint8, or float pixels in 0..255, and normalises them where the network is. The middle and the last scale
    have 3 and 6 times `width` channels. The first scale is the narrow one, because it has the most pixels.
    """

    def __init__(self, width: int, dropout: float):
        super().__init__()
        middle, last = 3 * width, 6 * width
        self.features = nn.Sequential(
            *_convolution(1, width, padding=0),  # [B, width, 26, 26]
            *_convolution(width, width, padding=0),  # [B, width, 24, 24]
            nn.MaxPool2d(2),
            *_convolution(width, middle),  # [B, 3 width, 12, 12]
            *_convolution(middle, middle),
            *_convolution(middle, middle),
            nn.MaxPool2d(2),
            *_convolution(middle, last),  # [B, 6 width, 6, 6]
            *_convolution(last, last, padding=0),  # [B, 6 width, 4, 4]
        )
        self.classifier = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(16 * last, 10))

    def forward(self, images: Tensor) -> Tensor:
        pixels = (images.float() - MEAN) / DEVIATION
        # One channel has no order of its own; without this the first convolution answers in the slow order.
        return self.classifier(self.features(pixels.contiguous(memory_format=torch.channels_last)))
