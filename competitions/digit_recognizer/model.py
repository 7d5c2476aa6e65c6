"""A compact convolutional network for 28x28 digits."""

import torch
from torch import Tensor, nn

MEAN, DEVIATION = 33.3, 78.6  # of the pixels 0..255 of the training images


def _convolution(inputs: int, outputs: int, kernel: int = 3) -> list[nn.Module]:
    # The ReLU works in place, because at 28x28 memory bandwidth limits the speed more than arithmetic.
    return [
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]


class DigitNet(nn.Module):
    """Two convolutions at each of three scales, then one linear layer over all positions; [B, 1, 28, 28] to [B, 10].

    Takes uint8, or float pixels in 0..255, and normalises them on its device. The scales have 1, 2 and 4 times `width`
    channels. The second convolution of the first two scales has the odd kernel size `kernel`, all others have 3.
    """

    def __init__(self, width: int, kernel: int, dropout: float):
        super().__init__()
        self.features = nn.Sequential(
            *_convolution(1, width),  # [B, width, 28, 28]
            *_convolution(width, width, kernel),
            nn.MaxPool2d(2),
            *_convolution(width, 2 * width),  # [B, 2 width, 14, 14]
            *_convolution(2 * width, 2 * width, kernel),
            nn.MaxPool2d(2),
            *_convolution(2 * width, 4 * width),  # [B, 4 width, 7, 7]
            *_convolution(4 * width, 4 * width),
            nn.MaxPool2d(2),  # [B, 4 width, 3, 3]
        )
        self.classifier = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(9 * 4 * width, 10))

    def forward(self, images: Tensor) -> Tensor:
        pixels = (images.float() - MEAN) / DEVIATION
        # With one channel both memory formats look alike; without this the first convolution picks the slow one.
        return self.classifier(self.features(pixels.contiguous(memory_format=torch.channels_last)))
