"""Networks of timm and segmentation-models-pytorch for uint8 images [B, C, H, W] of any number of channels."""

import difflib
import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal

import segmentation_models_pytorch as smp
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, pad
from torch.nn.modules.batchnorm import _BatchNorm

from common.batch import tensors_of
from common.errors import UserError

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of RGB, for pixels of 0 to 1
LITE = (127 / 255,) * 3, (128 / 255,) * 3  # (x - 127) / 128: what EfficientNet-Lite was trained on
DIVISOR = 32  # of the sides that every encoder can halve five times

Extra = Literal["mean", "red", "green", "blue"]  # what a channel beyond the third starts as: a mean, or a copy


class Normalize(nn.Module):
    """Normalises uint8 [B, C, H, W] to floats of mean 0 and deviation 1, on the device; not part of checkpoints.

    Every backbone `name` was trained with its own mean and deviation of three channels. A channel beyond the third
    uses those of one of the three, or their mean (`extra`). Fewer than three channels use the mean.
    """

    def __init__(self, name: str, channels: int = 3, extra: Extra = "mean"):
        super().__init__()
        for buffer, values in zip(("mean", "std"), input_statistics(name), strict=True):
            three = 255 * torch.tensor(values)
            more = three.mean() if extra == "mean" or channels < 3 else three[("red", "green", "blue").index(extra)]
            kept = three if channels >= 3 else three[:0]
            values = torch.cat((kept, more.expand(channels - len(kept))))
            self.register_buffer(buffer, values.view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images.to(self.mean.dtype) - self.mean) / self.std


def input_statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation that a timm backbone (also with tu- before its name) expects; ImageNet's if unknown."""
    name = name.removeprefix("tu-")
    if "efficientnet_lite" in name:
        return LITE
    published = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    return (tuple(published.mean), tuple(published.std)) if published and len(published.mean) == 3 else IMAGENET


def timm_backbone(name: str, size: tuple[int, int], channels: int = 3) -> tuple[nn.Module, int]:
    """A timm model for images of `size`, from scratch, and the number of pooled features that it outputs.

    timm's `num_features` is wrong where a hidden layer follows, so the number is taken from the output for an image of
    zeros. Raises UserError when there is no such model, or when it does not take images of this size.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise UserError(f"--backbone {name}: expected a model of timm, such as {', '.join(near) or 'resnet18'}")
    create = partial(timm.create_model, name, pretrained=False, num_classes=0, in_chans=channels)
    try:
        try:
            backbone = create(img_size=size)  # transformers need the size
        except TypeError:  # convolutional networks take any size and not this argument
            backbone = create()
        with torch.no_grad():
            width = backbone.eval()(torch.zeros(1, channels, *size)).shape[1]
    except MemoryError:
        raise
    except Exception as error:  # whatever a library raises on sizes that its layers do not fit
        usual = ",".join(map(str, timm.get_pretrained_cfg(name).input_size[1:]))
        raise UserError(
            f"--backbone {name} does not take images of --size {size[0]},{size[1]} ({_reason(error)}): it was made for "
            f"--size {usual}; give that, or another --backbone"
        ) from error
    spare_single_values(backbone)
    return backbone.train(), width


class Classifier(nn.Module):
    """uint8 [B, C, H, W] -> logits [B, outputs]: a backbone of timm, dropout, a linear head on its pooled features."""

    def __init__(
        self,
        backbone: str,
        size: tuple[int, int],
        outputs: int,
        channels: int = 3,
        dropout: float = 0.0,
        extra: Extra = "mean",
    ):
        super().__init__()
        self.normalize = Normalize(backbone, channels, extra)
        self.backbone, width = timm_backbone(backbone, size, channels)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(width, outputs)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.dropout(self.backbone(self.normalize(images))))


class MaskNet(nn.Module):
    """uint8 [B, C, H, W] -> logits of masks [B, K, H, W], for any H and W: an encoder and a decoder of smp.

    With `pooled` above 0, `maps` also returns logits [B, pooled] of a head on the deepest features. The decoder has
    `decoder_width` times the library's channels: on a CPU, half of the time of a small network goes into the decoder.
    """

    def __init__(
        self,
        architecture: str,
        encoder: str,
        masks: int,
        channels: int = 3,
        pooled: int = 0,
        dropout: float = 0.0,
        extra: Extra = "mean",
        decoder_width: float = 1.0,
    ):
        super().__init__()
        names = smp.encoders.get_encoder_names()
        if encoder not in names and not (encoder.startswith("tu-") and timm.is_model(encoder[3:])):
            known = [*names, *(f"tu-{name}" for name in timm.list_models())]
            near = difflib.get_close_matches(encoder, known, n=3)
            raise UserError(
                f"--encoder {encoder}: expected an encoder of segmentation-models-pytorch "
                f"({', '.join(near) or 'resnet34, efficientnet-b3'} ...), or tu- and the name of one of timm"
            )
        head = {"classes": pooled, "pooling": "avg", "dropout": dropout} if pooled else None
        try:
            widths = _widths(architecture, decoder_width) if decoder_width != 1 else {}
            self.net = smp.create_model(
                architecture, encoder, None, in_channels=channels, classes=masks, aux_params=head, **widths
            )
        except (MemoryError, UserError):
            raise
        except Exception as error:  # each library refuses in its own way what does not fit together
            raise UserError(
                f"--architecture {architecture} --encoder {encoder} cannot be built ({_reason(error)}): try another "
                f"pair, for example --architecture unet --encoder resnet34"
            ) from error
        spare_single_values(self.net)
        if architecture == "fpn":
            self.net.decoder.merge = Sum()
        self.normalize = Normalize(encoder, channels, extra)

    def maps(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The masks' logits, and those of the pooled head or None."""
        height, width = images.shape[-2:]
        inputs = pad(self.normalize(images), (0, -width % DIVISOR, 0, -height % DIVISOR), mode="replicate")
        outputs = self.net(inputs)
        pixels, pooled = outputs if isinstance(outputs, tuple) else (outputs, None)
        return pixels[..., :height, :width], pooled

    def forward(self, images: Tensor) -> Any:
        return self.maps(images)[0]


def _widths(architecture: str, factor: float) -> dict[str, Any]:
    """The library's numbers of decoder channels times `factor`, rounded to multiples of 8."""
    known = inspect.signature(smp.MODEL_ARCHITECTURES_MAPPING[architecture]).parameters
    channels = {name: of.default for name, of in known.items() if name.endswith("channels") and name != "in_channels"}
    if not channels:
        raise UserError(f"--decoder-width {factor:g}: the decoder of --architecture {architecture} has one width only")

    def scaled(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(map(scaled, value))
        return max(8, round(value * factor / 8) * 8)

    return {name: scaled(value) for name, value in channels.items()}


class Sum(nn.Module):
    """Sums maps of one shape without stacking them first, which takes the library a tenth of an FPN's step on a CPU."""

    def forward(self, maps: list[Tensor]) -> Tensor:
        return sum(maps[1:], maps[0])


class OneValue:
    """A BatchNorm that uses its running statistics if there is a single value per channel.

    torch raises an error then, since the value minus its own mean would be 0. Layers that normalise pooled features
    (squeeze and excite, pyramids, the last stage of small images) get such inputs in micro-batches of one image.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training or inputs.numel() != inputs.shape[1] or self.running_mean is None:
            return super().forward(inputs)
        found = batch_norm(inputs, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return self.act(self.drop(found)) if hasattr(self, "act") else found  # BatchNormAct2d of timm


@cache
def _one_value(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"OneValue{kind.__name__}", (OneValue, kind), {})


def spare_single_values(network: nn.Module) -> None:
    """Make every BatchNorm of `network` a OneValue, in place: names and weights stay those of the library."""
    for module in network.modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, (OneValue, nn.SyncBatchNorm)):
            module.__class__ = _one_value(type(module))


def probe(build: Callable[[], nn.Module], size: tuple[int, int], channels: int, flags: str) -> None:
    """Raises UserError naming `flags` when the network that `build` makes cannot train on one image of `size`.

    Only shapes are computed (torch's meta device), which takes a second and no memory at any size. A network that fails
    there is run on the CPU. Called before a run is opened.
    """
    for device in ("meta", "cpu"):
        try:
            with torch.random.fork_rng(devices=[]), torch.device(device), torch.no_grad():
                outputs = build().train()(torch.zeros(1, channels, *size, dtype=torch.uint8))
            wrong = [tuple(maps.shape) for maps in tensors_of(outputs) if maps.ndim == 4 and maps.shape[2:] != size]
            if wrong:
                raise ValueError(f"its maps have the shape {wrong[0]}")
            return
        except Exception as error:
            if device == "meta":
                continue
            if isinstance(error, (UserError, MemoryError)):
                raise
            raise UserError(
                f"{flags} does not take images of --size {size[0]},{size[1]} ({_reason(error)}): try a larger "
                f"--size, one whose sides are multiples of 64, or another network"
            ) from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
