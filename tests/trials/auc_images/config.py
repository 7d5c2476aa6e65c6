from dataclasses import dataclass, replace

from common.config import Config, flag
from common.kaggle.source import Source

SOURCE = Source(slug="auc-images", expected=("train.csv", "train/*.jpg", "test/*.jpg"), higher_is_better=True)


@dataclass(frozen=True)
class ImageConfig(Config):
    size: tuple[int, int] = flag((224, 224), "height and width", "pixels")
    backbone: str = flag("resnet34", "model of timm")
    encoder_weights: str = flag("imagenet", "imagenet, none or a file")


DEFAULT = ImageConfig(epochs=10, lr=1e-3)
SMOKE = replace(DEFAULT, batch_size=8, size=(32, 32), backbone="test_resnet", encoder_weights="none")
RECIPES = {"default": DEFAULT, "smoke": SMOKE}
