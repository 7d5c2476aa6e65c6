"""The network: uint8 images in, logits of the four masks and of the four classes out."""

import difflib
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, pad

from common.errors import UserError
from competitions.clouds.reader import CLASSES

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DIVISOR = 32  # of the sides that every encoder can halve five times
TOP_PIXELS = 10
REACHABLE_SECONDS = 15.0  # to answer once; a download that then stalls is tried again after as many seconds


class CloudNet(nn.Module):
    """An encoder with a decoder for the masks and a head on its deepest features for the presence of the classes.

    `class_head` "topk" has no parameters: a class is as present as the mean of its ten largest pixel logits.
    """

    def __init__(self, architecture: str, encoder: str, class_head: str, dropout: float):
        super().__init__()
        names = smp.encoders.get_encoder_names()
        if encoder not in names and not encoder.startswith("tu-"):
            near = ", ".join(difflib.get_close_matches(encoder, names, n=3)) or "resnet34, efficientnet-b3"
            raise UserError(
                f"--encoder {encoder}: expected an encoder of segmentation-models-pytorch ({near} ...), or tu- and the "
                f"name of one of timm"
            )
        pooled = {"classes": len(CLASSES), "pooling": "avg", "dropout": dropout}
        try:
            self.net = smp.create_model(
                architecture,
                encoder,
                encoder_weights=None,
                classes=len(CLASSES),
                aux_params=pooled if class_head == "pooled" else None,
            )
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            raise UserError(
                f"--architecture {architecture} --encoder {encoder} cannot be built ({error}): try another pair, for "
                f"example --architecture unet --encoder resnet34"
            ) from error
        for module in self.net.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = SingleValueNorm  # in place: names and weights stay those of the library
        if architecture == "fpn":
            self.net.decoder.merge = Sum()
        self.register_buffer("mean", 255 * torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 [B, 3, H, W] -> {"pixels": logits [B, 4, H, W], "classes": logits [B, 4]}, for any H and W."""
        height, width = images.shape[-2:]
        inputs = (images.to(self.mean.dtype) - self.mean) / self.std
        inputs = pad(inputs, (0, -width % DIVISOR, 0, -height % DIVISOR), mode="replicate")
        outputs = self.net(inputs)
        pixels, classes = outputs if isinstance(outputs, tuple) else (outputs, None)
        pixels = pixels[..., :height, :width]
        if classes is None:
            classes = pixels.flatten(2).float().topk(min(TOP_PIXELS, height * width), dim=2).values.mean(2)
        return {"pixels": pixels, "classes": classes}


class SingleValueNorm(nn.BatchNorm2d):
    """BatchNorm that leaves a single value per channel to its running statistics, where the library's raises an error.

    Decoders that normalise globally pooled features (deeplabv3plus, pan, upernet) meet that in micro-batches of one
    image: the value minus its own mean would be 0.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training and inputs.numel() == inputs.shape[1]:
            return batch_norm(inputs, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(inputs)


class Sum(nn.Module):
    """The sum of maps of one shape, without the library's copy of all of them: a tenth of an FPN's step on a CPU."""

    def forward(self, maps: list[Tensor]) -> Tensor:
        return sum(maps[1:], maps[0])


def load_encoder_weights(model: CloudNet, encoder: str) -> None:
    """Put the encoder's published ImageNet weights into a fresh model.

    Raises UserError when they are neither in the cache nor can be fetched: at once when nothing answers, in minutes
    when a download stalls. Never goes on without.
    """
    import httpx2

    weights = True if encoder.startswith("tu-") else "imagenet"
    try:
        with _cache_only_unless_reachable():
            source = smp.encoders.get_encoder(encoder, depth=model.net.encoder._depth, weights=weights)
    except (OSError, KeyError, ValueError, RuntimeError, httpx2.HTTPError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"--encoder-weights imagenet: those of {encoder} are not in the cache and cannot be fetched "
            f"({reason[0][:120]}): connect to the network, or set HF_HOME to a folder that holds them, or train from "
            f"scratch with --encoder-weights none --encoder-lr 1"
        ) from error
    model.net.encoder.load_state_dict(source.state_dict())


@contextmanager
def _cache_only_unless_reachable():
    """Let the hub's library look into its cache only when the hub does not answer, instead of retrying for minutes."""
    from huggingface_hub import constants

    names = ("HF_HUB_OFFLINE", "HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT")  # read from these, once imported
    before = {name: getattr(constants, name) for name in names}
    constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE or not _answers(constants.ENDPOINT)
    constants.HF_HUB_DOWNLOAD_TIMEOUT = constants.HF_HUB_ETAG_TIMEOUT = REACHABLE_SECONDS
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(constants, name, value)


def _answers(url: str) -> bool:
    """Whether a server replies with anything; asked in a thread, because looking up a name knows no timeout."""
    answered = threading.Event()

    def ask() -> None:
        with suppress(OSError):
            with suppress(urllib.error.HTTPError):  # any answer will do
                urllib.request.urlopen(url, timeout=REACHABLE_SECONDS).close()
            answered.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(REACHABLE_SECONDS)
    return answered.is_set()
