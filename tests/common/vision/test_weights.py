"""Weights from a file of any library, from the hub, or none; never silently left out."""

import argparse
import logging
import sys
import threading

import pytest
import safetensors.torch
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from torch import nn

from common import checkpoint
from common.errors import UserError
from common.vision import weights
from common.vision.backbones import Classifier, MaskNet, Normalize
from common.vision.weights import fitted, left_out, match, read, start_backbone, start_encoder


def filled(network: nn.Module, seed: int = 3) -> nn.Module:
    """The network in evaluation mode, with random running statistics."""
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in network.named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5, generator=generator) if "var" in name else buffer.normal_(generator=generator)
    return network.eval()


def encoder(name: str, **settings) -> nn.Module:
    return smp.encoders.get_encoder(name, weights=None, **settings).eval()


def torchvisions(name: str) -> nn.Module:
    torch.manual_seed(1)
    return filled(getattr(torchvision.models, name)())


def timms(name: str, **settings) -> nn.Module:
    torch.manual_seed(2)
    return filled(timm.create_model(name, **settings))


@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenet_v2", "resnet18", "mobilenet_v3_small"])
def test_torchvision_into_timm_gives_the_same_outputs(tmp_path, name):
    source = torchvisions(name)
    names = {"mobilenet_v2": "mobilenetv2_100", "mobilenet_v3_small": "mobilenetv3_small_100"}
    own = timm.create_model(names.get(name, name), num_classes=0).eval()
    for module in own.modules():
        if name == "mobilenet_v3_small" and isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3  # torchvision's value, a hundred times timm's
    state = {f"module.{key}": value for key, value in source.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    said = start_backbone(own, name, str(tmp_path / "a.pth"))
    inputs, seen = torch.randn(2, 3, 64, 64), []
    source.eval()
    head = source.fc if name == "resnet18" else source.classifier[-1]
    head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        source(inputs)
        assert torch.allclose(own(inputs), seen[0], rtol=1e-4, atol=1e-4 * float(seen[0].abs().max()))
    assert "not used: module." in said and str(tmp_path) in said


@pytest.mark.parametrize("ending", [".pth", ".safetensors", ".bin"])
@pytest.mark.parametrize("target", ["efficientnet-b0", "tu-tf_efficientnet_b0"])
def test_timm_into_encoders_of_smp_gives_the_same_features(tmp_path, target, ending):
    """smp's own EfficientNets pad as TensorFlow does, so they match timm's tf_ networks, with names to be mapped."""
    source, own = timms("tf_efficientnet_b0"), encoder(target)
    save = safetensors.torch.save_file if ending == ".safetensors" else torch.save
    save(source.state_dict(), tmp_path / f"a{ending}")
    start_encoder(own, target, str(tmp_path / f"a{ending}"))
    features = timm.create_model("tf_efficientnet_b0", features_only=True).eval()
    features.load_state_dict({key: source.state_dict()[key] for key in features.state_dict()})
    inputs = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        wanted, found = features(inputs)[-1], own(inputs)[-1]
    assert torch.allclose(wanted, found, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("own", "found"),
    [
        (lambda: encoder("tu-mobilenetv3_small_100"), lambda: torchvisions("mobilenet_v3_small")),
        (lambda: encoder("efficientnet-b1"), lambda: torchvisions("efficientnet_b1")),
        (lambda: timm.create_model("efficientnet_b0", num_classes=0), lambda: filled(encoder("efficientnet-b0"))),
        (lambda: encoder("mobilenet_v2"), lambda: timms("mobilenetv2_100")),
        (lambda: encoder("tu-convnext_atto"), lambda: timms("convnext_atto")),
        (lambda: encoder("densenet121"), lambda: torchvisions("densenet121")),
        (lambda: timm.create_model("tf_efficientnetv2_s", num_classes=0), lambda: torchvisions("efficientnet_v2_s")),
    ],
)
def test_names_of_other_libraries_are_mapped_whatever_their_order(own, found):
    own, found = own().state_dict(), found().state_dict()
    places = match(own, found)
    assert {key for key in own if key not in places} <= {key for key in own if key.endswith("num_batches_tracked")}
    assert len(set(places.values())) == len(places)
    for key, source in places.items():
        assert key.split(".")[-1] == source.split(".")[-1] and own[key].numel() == found[source].numel()
    shuffled = {key: found[key] for key in sorted(found)}
    assert match(own, shuffled) == places


def test_a_run_starts_from_the_encoder_of_another(tmp_path):
    before = MaskNet("unetplusplus", "resnet18", 4, pooled=4)
    filled(before.net)
    checkpoint.save(tmp_path / "model.pt", {"model": before.state_dict(), "epoch": 3, "history": [{"loss": 0.1}]})
    after = MaskNet("fpn", "resnet18", 2)
    said = start_encoder(after.net.encoder, "resnet18", str(tmp_path / "model.pt"))
    for name, value in before.net.encoder.state_dict().items():
        assert torch.equal(after.net.encoder.state_dict()[name], value)
    assert "not used: net.decoder" in said and "more" in said and "\n" not in said
    classifier = Classifier("resnet18", (64, 64), 3)
    start_backbone(classifier.backbone, "resnet18", str(tmp_path / "model.pt"))
    assert torch.equal(classifier.backbone.conv1.weight, before.net.encoder.conv1.weight)


def test_folders_hold_one_file_or_the_parts_of_one(tmp_path):
    state = timms("resnet10t").state_dict()
    folder = tmp_path / "models--timm--resnet10t/snapshots/0a1b"
    folder.mkdir(parents=True)
    safetensors.torch.save_file(state, folder / "model.safetensors")
    torch.save(state, folder / "pytorch_model.bin")  # the same weights in another format, as on the hub
    (folder / "config.json").write_text("{}")
    found = read(tmp_path / "models--timm--resnet10t")
    assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)
    (tmp_path / "parts").mkdir()
    for number, half in enumerate((list(state)[:50], list(state)[50:])):
        file = tmp_path / "parts" / f"model-0000{number + 1}-of-00002.safetensors"
        safetensors.torch.save_file({key: state[key] for key in half}, file)
    assert read(tmp_path / "parts").keys() == state.keys()
    (tmp_path / "link").mkdir()
    (tmp_path / "link/snapshots").symlink_to(folder.parent)
    (tmp_path / "link/._model.safetensors").write_bytes(b"of a Mac")
    assert read(tmp_path / "link").keys() == state.keys()
    safetensors.torch.save_file(state, folder / "other.safetensors")
    with pytest.raises(UserError, match="expected one file .* found .*model.safetensors, .*other.safetensors"):
        read(tmp_path / "models--timm--resnet10t")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="expected one file of .safetensors, .* in this folder, found none"):
        read(tmp_path / "empty")


def test_checkpoints_of_trainers_are_opened(tmp_path):
    state = {"a.weight": torch.ones(2)}
    for found in (
        {"state_dict": state, "args": argparse.Namespace(lr=0.1), "epoch": 1},
        {"best_acc1": torch.tensor(76.3), "state_dict": state},
        {"optimizer": {"state": {0: torch.zeros(1)}}, "model": state},
        {"teacher": {"backbone": state}},
        {"module.a.weight": torch.ones(2)},
    ):
        torch.save(found, tmp_path / "a.pth")
        assert [key.removeprefix("module.") for key in read(tmp_path / "a.pth")] == ["a.weight"]


class Odd:
    """An object whose unpickling runs code."""

    def __reduce__(self):
        return print, ("code was run",)


@pytest.mark.parametrize("ending", [".pth", ".safetensors", ".bin"])
def test_files_that_hold_no_weights_are_one_line(tmp_path, capsys, ending):
    file, own = tmp_path / f"a{ending}", encoder("resnet18")

    def refused(words: str) -> None:
        with pytest.raises(UserError, match=words) as caught:
            start_encoder(own, "resnet18", str(file))
        assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)

    refused("a.* cannot be read .No such file.*expected imagenet, none, or a file|holds no weights")
    for contents in (b"", b"no weights", b"PK\3\4" + bytes(100)):
        file.write_bytes(contents)
        refused("holds no weights")
    torch.save({"model": Odd()}, file)
    refused("holds no weights")
    if ending != ".safetensors":
        for found in ([1, 2], {0: torch.zeros(1)}):
            torch.save(found, file)
            refused("holds no tensors with names")
    assert "code was run" not in capsys.readouterr().out


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize(
    "change, told",
    [(lambda x: torch.full_like(x, torch.nan), "NaN or infinite numbers in conv1"), (torch.Tensor.char, "stay random")],
)
def test_weights_of_a_diverged_training_and_quantised_ones_are_refused(tmp_path, channels, change, told):
    found = {
        name: x if name.endswith(weights.UNTRAINED) else change(x)
        for name, x in timms("resnet10t").state_dict().items()
    }
    torch.save(found, tmp_path / "w.pth")
    backbone = timm.create_model("resnet10t", num_classes=0, in_chans=channels)
    before = {name: x.clone() for name, x in backbone.state_dict().items()}
    with pytest.raises(UserError, match=told):
        start_backbone(backbone, "resnet10t", str(tmp_path / "w.pth"))
    assert all(torch.equal(x, before[name]) for name, x in backbone.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_are_read(tmp_path, dtype):
    found = {name: x.to(dtype) if x.ndim else x for name, x in timms("resnet10t").state_dict().items()}
    torch.save(found, tmp_path / "w.pth")
    backbone = timm.create_model("resnet10t", num_classes=0)
    start_backbone(backbone, "resnet10t", str(tmp_path / "w.pth"))
    assert torch.equal(backbone.conv1[0].weight, found["conv1.0.weight"].float())


def test_weights_of_another_network_are_refused(tmp_path):
    for found, own, words in (
        (
            {"x.weight": torch.ones(3)},
            "resnet18",
            r"fills 0 of the 120 tensors of resnet18, and conv1.weight.* would stay random .not used: x.weight",
        ),
        (torchvisions("resnet18").state_dict(), "resnet34", "fills 120 of the 216 tensors of resnet34, and layer1.2"),
        (torchvisions("efficientnet_b0").state_dict(), "efficientnet-b2", "would stay random"),
    ):
        torch.save(found, tmp_path / "a.pth")
        network = encoder(own)
        before = {key: value.clone() for key, value in network.state_dict().items()}
        with pytest.raises(UserError, match=words):
            start_encoder(network, own, str(tmp_path / "a.pth"))
        assert all(torch.equal(value, network.state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize(
    ("own", "deeper", "block"),
    [
        ("resnet18", "resnet34", "layer1.2"),
        ("convnext_tiny", "convnext_small", "stages.2.blocks.9"),
        ("efficientnet_b0", "efficientnet_b1", "blocks.0.1"),
    ],
)
def test_weights_of_a_deeper_network_are_refused_though_they_fill_it(tmp_path, own, deeper, block):
    with torch.device("meta"):
        network, source = (timm.create_model(name, num_classes=0) for name in (own, deeper))
    places = match(network.state_dict(), source.state_dict())
    assert len(places) == len(network.state_dict())
    found = left_out(places, [key for key in source.state_dict() if key not in places.values()])
    assert found and found[0].startswith(block)
    if own == "resnet18":
        torch.save({f"module.{key}": value for key, value in timms(deeper).state_dict().items()}, tmp_path / "a.pth")
        with pytest.raises(
            UserError, match="of a deeper network than resnet18: module.layer1.2.conv1.weight, .*that v"
        ):
            start_backbone(timm.create_model(own, num_classes=0), own, str(tmp_path / "a.pth"))


@pytest.mark.parametrize("name", ["tu-convnext_atto", "tu-resnet18", "efficientnet-b0", "vgg11"])
def test_a_decoder_that_does_without_the_last_stages_takes_weights_of_all(tmp_path, name):
    source = encoder(name) if not name.startswith("tu-") else timms(name.removeprefix("tu-"))
    torch.save(source.state_dict(), tmp_path / "a.pth")
    assert name in start_encoder(encoder(name, depth=3), name, str(tmp_path / "a.pth"))


@pytest.mark.parametrize("extra, like", [("mean", None), ("red", 0), ("blue", 2)])
def test_a_widened_network_equals_the_original_on_an_empty_fourth_channel(tmp_path, extra, like):
    source = timms("resnet10t", num_classes=0)
    torch.save(source.state_dict(), tmp_path / "a.pth")
    wide = timm.create_model("resnet10t", num_classes=0, in_chans=4).eval()
    start_backbone(wide, "resnet10t", str(tmp_path / "a.pth"), extra=extra)
    inputs = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        empty = torch.cat((inputs, torch.zeros(2, 1, 64, 64)), 1)
        assert torch.allclose(wide(empty), source(inputs), rtol=1e-5, atol=1e-6)
        # Input in the fourth channel alone gives the same as that input in the channel whose weights were copied.
        plane = inputs[:, :1]
        alone = torch.cat((torch.zeros(2, 3, 64, 64), plane), 1)
        blank = torch.zeros(2, 3, 64, 64)
        if like is None:
            same = plane.expand(-1, 3, -1, -1) / 3
        else:
            same = torch.cat((blank[:, :like], plane, blank[:, like + 1 :]), 1)
        assert torch.allclose(wide(alone), source(same), rtol=1e-4, atol=1e-5)


def test_fewer_channels_give_for_grey_what_rgb_gave():
    source, grey = timms("resnet10t", num_classes=0), torch.randn(2, 1, 64, 64)
    for channels in (1, 2):
        own = timm.create_model("resnet10t", num_classes=0, in_chans=channels).eval()
        places = match(own.state_dict(), source.state_dict())
        state = {key: fitted(source.state_dict()[place], own.state_dict()[key]) for key, place in places.items()}
        own.load_state_dict(state)
        with torch.inference_mode():
            found = own(grey.expand(-1, channels, -1, -1))
            assert torch.allclose(found, source(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


def test_real_weights_are_those_that_timm_loads_from_the_file(real_data, capsys):
    file = real_data / "weights" / "tf_efficientnet_lite0.safetensors"
    if not file.is_file():
        pytest.skip(f"no {file}")
    library = timm.create_model("tf_efficientnet_lite0", checkpoint_path=str(file)).eval()
    own, features = (
        timm.create_model("tf_efficientnet_lite0", num_classes=0).eval(),
        encoder("tu-tf_efficientnet_lite0"),
    )
    said = start_backbone(own, "tf_efficientnet_lite0", str(file))
    start_encoder(features, "tu-tf_efficientnet_lite0", str(file))
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    inputs = Normalize("tf_efficientnet_lite0")(pixels)
    with torch.inference_mode():
        assert torch.allclose(own(inputs), library.forward_head(library.forward_features(inputs), pre_logits=True))
        deep = library.bn2(library.conv_head(features(inputs)[-1]))
        assert torch.allclose(deep, library.forward_features(inputs), atol=1e-5)
    assert said.endswith("not used: classifier.bias, classifier.weight") and not capsys.readouterr().out


def test_none_changes_nothing_and_asks_nobody(monkeypatch):
    monkeypatch.setattr(weights, "_answers", lambda url: pytest.fail("asked"))
    network = encoder("resnet18")
    before = network.conv1.weight.clone()
    start_encoder(network, "resnet18", "none")
    assert torch.equal(network.conv1.weight, before)


@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize("name", ["resnet18", "tu-resnet18"])
def test_weights_that_cannot_be_fetched_stop_the_run_soon(tmp_path, monkeypatch, hidden, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if hidden:  # as with a version of huggingface_hub that does not use this module
        monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(UserError) as caught:
        start_encoder(encoder(name), name, "imagenet", scratch="--encoder-weights none --encoder-lr 1")
    for words in (
        "--encoder-weights none --encoder-lr 1",
        "HF_HOME",
        "--encoder-weights PATH",
        f"the weights of {name} are",
    ):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hub_that_never_answers_is_given_up(monkeypatch):
    asked, end = [], threading.Event()

    def never(url, timeout):
        asked.append(url)
        end.wait()
        raise OSError

    monkeypatch.setattr(weights, "REACHABLE_SECONDS", 0.2)
    monkeypatch.setattr(weights.urllib.request, "urlopen", never)
    assert not weights._answers("https://hub.example")
    assert asked
    end.set()


def test_a_download_that_stalls_is_one_line(monkeypatch):
    class ReadTimeout(Exception):  # stands in for that of the HTTP library
        pass

    def stalls(name, depth, weights):
        raise ReadTimeout("The read operation timed out\nsomewhere")

    monkeypatch.setattr(weights, "_answers", lambda url: True)
    network = encoder("resnet18")
    monkeypatch.setattr(weights.smp.encoders, "get_encoder", stalls)
    with pytest.raises(UserError, match="timed out.*--encoder-weights none"):
        start_encoder(network, "resnet18", "imagenet")


@pytest.mark.parametrize("channels", [3, 4])
def test_published_weights_go_into_the_backbone_without_chatter(monkeypatch, capsys, caplog, channels):
    published = timms("resnet18", num_classes=0)

    def fetched(name, pretrained, num_classes):
        assert pretrained and num_classes == 0
        logging.getLogger("timm.models._builder").warning("Unexpected keys (fc.weight, fc.bias) found")
        return published

    monkeypatch.setattr(weights, "_answers", lambda url: True)
    own = Classifier("resnet18", (64, 64), 2, channels).backbone
    monkeypatch.setattr(weights.timm, "create_model", fetched)
    assert start_backbone(own, "resnet18", "imagenet") == "resnet18 starts from imagenet"
    assert not capsys.readouterr().out and not caplog.records
    for name, value in published.state_dict().items():
        assert torch.equal(own.state_dict()[name][:, :3] if name == "conv1.weight" else own.state_dict()[name], value)
