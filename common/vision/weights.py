"""Weights that a backbone starts from: published ones from the hub, a file of any library, or none.

`--encoder-weights imagenet|none|PATH`, where PATH is a .safetensors, .pth or .bin file, a run's model.pt, or a folder
with one of them, such as a snapshot of the Hugging Face hub.
"""

import argparse
import logging
import threading
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path

import safetensors.torch
import segmentation_models_pytorch as smp
import timm
import torch
from torch import Tensor, nn

from common.errors import UserError, first_line, some
from common.files import expanded
from common.raw import files_under
from common.vision.backbones import Extra

FLAG = "--encoder-weights"
REACHABLE_SECONDS = 15.0  # to wait for the hub's first answer, and before a stalled download is retried
FILES = (".safetensors", ".pth", ".pt", ".bin")
WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "net", "weights")  # what trainers keep weights under
# Names of EfficientNet's and its relatives' layers in timm and efficientnet_pytorch, in the order of computation.
LAYERS = (
    *("conv_stem", "_conv_stem", "features", "conv_pw", "_expand_conv", "bn1", "_bn0", "conv_dw", "_depthwise_conv"),
    *("blocks", "_blocks", "conv_head", "_conv_head", "bn2", "_bn1", "se", "_se_reduce", "conv_reduce", "fc1"),
    *("_se_expand", "conv_expand", "fc2", "conv_pwl", "_project_conv", "bn3", "_bn2", "classifier", "_fc"),
)
SEPARABLE = ("conv", "conv_exp", "conv_dw", "bn1", "se", "conv_pw", "conv_pwl", "bn2")  # timm's blocks without bn3
UNTRAINED = "num_batches_tracked"  # a counter that older files do not have


def start_encoder(encoder: nn.Module, name: str, weights: str, **settings) -> str:
    """`start_from` for an encoder of segmentation-models-pytorch, built from `name`."""
    published = True if name.startswith("tu-") else "imagenet"
    fetch = lambda: smp.encoders.get_encoder(name, depth=encoder._depth, weights=published)  # noqa: E731
    return start_from(encoder, name, weights, fetch, **settings)


def start_backbone(backbone: nn.Module, name: str, weights: str, **settings) -> str:
    """`start_from` for a model of timm without its classifier."""
    fetch = lambda: timm.create_model(name, pretrained=True, num_classes=0)  # noqa: E731
    return start_from(backbone, name, weights, fetch, **settings)


def start_from(
    network: nn.Module,
    name: str,
    weights: str,
    fetch: Callable[[], nn.Module],
    *,
    scratch: str = f"{FLAG} none",
    extra: Extra = "mean",
) -> str:
    """Load `weights` ("imagenet", "none" or a path) into a new network; `fetch` makes one with the published weights.

    Weights of three channels fit any number: a further channel starts as the mean of the three or a copy of one
    (`extra`). Returns a line for the log, which lists unused tensors. Raises UserError if a tensor of the network
    would stay random, if the file is of a deeper network or cannot be read, and if published weights are neither in
    the cache nor can be fetched.
    """
    if weights == "none":
        return f"{name} starts from scratch"
    published = weights == "imagenet"
    found = _published(fetch, name, scratch).state_dict() if published else read(expanded(weights, f"{FLAG} {weights}"))
    own = network.state_dict()
    places = match(own, found, extra)
    missing = [key for key in own if key not in places and not key.endswith(UNTRAINED)]
    unused = [key for key in found if key not in set(places.values()) and not key.endswith(UNTRAINED)]
    if missing:
        raise UserError(
            f"{FLAG} {weights} fills {len(places)} of the {len(own)} tensors of {name}, and {some(missing)} would stay "
            f"random (not used: {some(unused) or 'none'}): give weights of that very network (and size, for a "
            f"transformer), or {scratch}"
        )
    if between := left_out(places, unused):
        raise UserError(
            f"{FLAG} {weights} is of a deeper network than {name}: {some(between)} would be left out between layers "
            f"that are used: give weights of that very network, or {scratch}"
        )
    if odd := [source for source in places.values() if not _is_sound(found[source].float())]:
        raise UserError(
            f"{FLAG} {weights} has NaN or infinite numbers in {some(odd)}: give weights of a training that did not "
            f"diverge, or {scratch}"
        )
    network.load_state_dict(own | {key: fitted(found[source], own[key], extra) for key, source in places.items()})
    return f"{name} starts from {weights}" + (f"; not used: {some(unused)}" if unused else "")


def _is_sound(values: Tensor) -> bool:
    """Whether all numbers are finite, or -inf as in the mask of an attention."""
    return bool((values.isfinite() | (values == -torch.inf)).all())


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, or of the only such file in a folder, by their names; raises UserError without any."""
    if path.is_dir():
        there = sorted(path / name for name in files_under(path))
        files = [file for ending in FILES for file in there if file.name.endswith(ending)]
        files = [file for file in files if file.suffix == files[0].suffix]  # the first kind: safetensors before others
        if not files or len(files) > 1 and not all("-of-" in file.name for file in files):  # one, or parts of one
            found = some([str(file.relative_to(path)) for file in files]) or "none"
            raise UserError(f"{FLAG} {path}: expected one file of {', '.join(FILES)} in this folder, found {found}")
        return {key: tensor for file in files for key, tensor in read(file).items()}
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's trainer saves its flags in one
            found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(
            f"{FLAG} {path} cannot be read ({error.strerror or error}): expected imagenet, none, or a file of weights"
        ) from error
    except Exception as error:  # what unpickling raises depends on the damage; torch advises to run the file's code
        raise UserError(
            f"{FLAG} {path} holds no weights that can be read without running code ({type(error).__name__}): expected "
            f"a whole {' or '.join(FILES)} file of tensors"
        ) from error
    while isinstance(found, dict):
        tensors = {key: value for key, value in found.items() if isinstance(key, str) and isinstance(value, Tensor)}
        inner = [found[key] for key in WRAPPERS if isinstance(found.get(key), dict)]
        if tensors and not inner:  # PyTorch's training example saves the accuracy as a tensor beside the weights
            return tensors
        found = (inner or [value for value in found.values() if isinstance(value, dict)] or [None])[0]
    raise UserError(f"{FLAG} {path} holds no tensors with names: expected a state_dict")


def match(own: dict[str, Tensor], found: dict[str, Tensor], extra: Extra = "mean") -> dict[str, str]:
    """Map the names of `own` to those of the same tensors in `found`, whichever library named them.

    Prefixes of wrappers (module., model., net.encoder.) are ignored. Names are compared as they are or, for
    EfficientNet and the MobileNets of timm, torchvision and efficientnet_pytorch, by the numbers of their layers.
    """
    best: dict[str, str] = {}
    for naming in (_plain, _numbered):
        for ours, theirs in product(_named(own, naming, 0.9), _named(found, naming, 0.1)):
            source = {key: name for name, key in theirs.items()}
            pairs = {name: source[key] for name, key in ours.items() if key in source}
            fits = {a: b for a, b in pairs.items() if fitted(found[b], own[a], extra) is not None}
            best = max(best, fits, key=len)
    return best


def left_out(places: dict[str, str], unused: Iterable[str]) -> list[str]:
    """The `unused` tensors of blocks that lie between used layers, which shows that the file is of a deeper network.

    For example, ResNet-34 fills every tensor of ResNet-18, but its block layer1.2 would be skipped before layer2.
    Layers after all used ones, such as stages that a decoder does not need, may be left out. `places` are in the order
    of computation.
    """
    blocks, last = defaultdict(set), {}
    for source in places.values():
        for row, number in _rows(source):
            blocks[row].add(number)
            last[row] = source
    end = next(reversed(places.values()))
    closed = {row for row in blocks if last[row] != end}
    return [key for key in unused if any(row in closed and number not in blocks[row] for row, number in _rows(key))]


def _rows(name: str) -> list[tuple[str, str]]:
    """(words before it, number) for every number in a name: layer1.0.downsample.1.weight has two."""
    words = name.split(".")
    return [(".".join(words[:depth]), word) for depth, word in enumerate(words) if word.isdecimal()]


def _named(names: Iterable[str], naming: Callable[[list[str], int], dict[str, str]], part: float) -> list[dict]:
    """The results of `naming` for the names, once without each of their common prefixes."""
    return [naming([name for name in names if name.startswith(cut)], len(cut)) for cut in _prefixes(names, part)]


def _prefixes(names: Iterable[str], part: float) -> list[str]:
    """The empty prefix, and each of up to three words that at least a `part` of the names have; shortest first."""
    words = [name.split(".") for name in names]
    count = Counter(".".join([*of[:n], ""]) for of in words for n in range(1, min(4, len(of))))
    return ["", *sorted((prefix for prefix, n in count.items() if n >= part * len(words)), key=len)]


def _plain(names: list[str], cut: int) -> dict[str, str]:
    """Names without their prefix; timm's feature extractors write stages_0 for stages.0."""
    return {name: name[cut:].replace(".", "_") for name in names}


def _numbered(names: list[str], cut: int) -> dict[str, str]:
    """Every name as its layer's number in the order of computation and its last word; empty for other families."""
    short = {name: name[cut:].split(".") for name in names}
    stems = {"conv_stem.weight", "_conv_stem.weight", "features.0.0.weight"}
    if stems.isdisjoint(name[cut:] for name in names):
        return {}
    layers = {tuple(words[:-1]) for words in short.values()}
    full = {layer[:-1] for layer in layers if layer[-1] == "bn3"}

    def place(layer: tuple[str, ...]) -> list[tuple[int, str]]:
        order = []
        for depth, word in enumerate(layer):
            inside = layer[:depth]
            known = SEPARABLE if inside[:1] == ("blocks",) and len(inside) == 3 and inside not in full else LAYERS
            order.append((int(word) if word.isdecimal() else known.index(word) if word in known else 99, word))
        return order

    number = {layer: position for position, layer in enumerate(sorted(layers, key=place))}
    return {name: f"{number[tuple(words[:-1])]} {words[-1]}" for name, words in short.items()}


def fitted(source: Tensor, own: Tensor, extra: Extra = "mean") -> Tensor | None:
    """`source` in the shape of `own`, or None; axes of length 1 and the number of input channels may differ.

    `source` has three input channels then. Further channels get their mean or a copy of one of them. Fewer channels
    get equal parts of their sum, so that a grey image in every channel gives the same output as in RGB.
    Integers do not fit fractions: quantised weights mean nothing without their scales.
    """
    if own.is_floating_point() and not source.is_floating_point():
        return None
    if source.shape == own.shape:
        return source
    if [n for n in source.shape if n > 1] == [n for n in own.shape if n > 1]:
        return source.reshape(own.shape)
    if source.ndim != 4 or own.ndim != 4 or source.shape[1] != 3 or source[:, 0].shape != own[:, 0].shape:
        return None
    channels = own.shape[1]
    if channels < 3:
        return (source.sum(1, keepdim=True) / channels).expand_as(own)
    more = source.mean(1) if extra == "mean" else source[:, ("red", "green", "blue").index(extra)]
    return torch.cat((source, more[:, None].expand(-1, channels - 3, -1, -1)), dim=1)


def _published(fetch: Callable[[], nn.Module], name: str, scratch: str) -> nn.Module:
    try:
        with _quiet(), _cache_only_unless_reachable():
            return fetch()
    except MemoryError:
        raise
    except Exception as error:  # each generation of the hub's library fails with errors of another network library
        raise UserError(
            f"{FLAG} imagenet: the weights of {name} are not cached and cannot be fetched "
            f"({first_line(error)[:120]}): connect to the network, set HF_HOME to a folder that has them, give a file "
            f"with {FLAG} PATH, or train from scratch with {scratch}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence timm's warnings about the classifier's weights, which are not used."""
    logger = logging.getLogger("timm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _cache_only_unless_reachable() -> Iterator[None]:
    """If the hub does not answer, restrict the hub's library to its cache instead of retrying for minutes."""
    from huggingface_hub import constants

    names = ("HF_HUB_OFFLINE", "HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT")  # what the imported library reads
    before = {name: getattr(constants, name) for name in names}
    constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE or not _answers(constants.ENDPOINT)
    constants.HF_HUB_DOWNLOAD_TIMEOUT = constants.HF_HUB_ETAG_TIMEOUT = REACHABLE_SECONDS
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(constants, name, value)


def _answers(url: str) -> bool:
    """Whether a server replies with anything; runs in a thread, because a DNS look-up has no timeout."""
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
