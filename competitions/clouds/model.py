"""The network: uint8 images in, logits of the four masks and of the four classes out."""

from torch import Tensor

from common.vision.backbones import MaskNet
from competitions.clouds.reader import CLASSES

TOP_PIXELS = 10


class CloudNet(MaskNet):
    """An encoder with a decoder for the masks and a head on its deepest features for the presence of the classes.

    `class_head` "topk" has no parameters: the logit of a class is the mean of its ten largest pixel logits.
    """

    def __init__(self, architecture: str, encoder: str, class_head: str, dropout: float, decoder_width: float = 1.0):
        pooled = len(CLASSES) if class_head == "pooled" else 0
        super().__init__(
            architecture, encoder, len(CLASSES), pooled=pooled, dropout=dropout, decoder_width=decoder_width
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 [B, 3, H, W] -> {"pixels": logits [B, 4, H, W], "classes": logits [B, 4]}, for any H and W."""
        pixels, classes = self.maps(images)
        if classes is None:
            flat = pixels.flatten(2).float()
            classes = flat.topk(min(TOP_PIXELS, flat.shape[2]), dim=2).values.mean(2)
        return {"pixels": pixels, "classes": classes}
