"""The network: any size, both heads, checkpointing that changes memory only, weights never silently left out."""

import threading
from typing import get_args

import httpx2
import pytest
import segmentation_models_pytorch as smp
import torch
from segmentation_models_pytorch.decoders.fpn.decoder import MergeBlock
from torch import nn

from common.engine.prepare import prepare
from common.errors import UserError
from competitions.clouds import model as models
from competitions.clouds.config import Architecture
from competitions.clouds.model import CloudNet, load_encoder_weights


def net(architecture="unet", encoder="resnet18", head="pooled", checkpointing=False):
    torch.manual_seed(0)
    network = CloudNet(architecture, encoder, head, 0.0)
    prepare(network, checkpointing)
    return network


def images(height=64, width=96, batch=2):
    return torch.randint(
        0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


@pytest.mark.parametrize("architecture", ["unet", "fpn"])
@pytest.mark.parametrize("head", ["pooled", "topk"])
def test_any_size_in_and_the_same_size_out(architecture, head):
    network = net(architecture, head=head).eval()
    for height, width in ((64, 96), (70, 105)):
        with torch.inference_mode():
            outputs = network(images(height, width))
        assert outputs["pixels"].shape == (2, 4, height, width)
        assert outputs["classes"].shape == (2, 4)


def test_padding_is_to_the_right_and_below_and_cut_off_again():
    network = net().eval()
    seen = []
    network.net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    small = images(70, 105)
    with torch.inference_mode():
        outputs = network(small)
        assert seen[0].shape == (2, 3, 96, 128)
        expected = (small.float() / 255 - torch.tensor(models.IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(
            models.IMAGENET_STD
        ).view(3, 1, 1)
        assert torch.allclose(seen[0][..., :70, :105], expected, atol=1e-5)
        assert torch.equal(network.net(seen[0])[0][..., :70, :105], outputs["pixels"])


def test_the_sum_of_an_fpn_is_that_of_the_library():
    network = net("fpn").eval()
    inputs = images()
    with torch.inference_mode():
        ours = network(inputs)["pixels"]
        network.net.decoder.merge = MergeBlock("add")
        assert torch.allclose(network(inputs)["pixels"], ours, atol=1e-5)


def test_topk_is_the_mean_of_the_ten_largest_logits():
    outputs = net(head="topk").eval()(images())
    slow = torch.stack(
        [torch.stack([mask.flatten().sort().values[-10:].mean() for mask in image]) for image in outputs["pixels"]]
    )
    assert torch.allclose(outputs["classes"], slow, atol=1e-6)


@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_every_architecture_trains_on_a_single_image(architecture):
    """Some normalise globally pooled features: one value per channel, of which there is no variance."""
    network = net(architecture, "mit_b0" if architecture == "segformer" else "resnet18").train()
    outputs = network(images(128, 192, batch=1))
    (outputs["pixels"].square().mean() + outputs["classes"].sum()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())
    assert (
        network.net.encoder.state_dict().keys()
        == smp.encoders.get_encoder(
            "mit_b0" if architecture == "segformer" else "resnet18", depth=network.net.encoder._depth, weights=None
        )
        .state_dict()
        .keys()
    ), "published weights fit"


def test_one_value_per_channel_is_left_to_the_running_statistics():
    norm, inputs = models.SingleValueNorm(3), torch.randn(1, 3, 1, 1)
    norm.running_mean.fill_(0.5)
    assert torch.allclose(norm.train()(inputs), norm.eval()(inputs)) and int(norm.num_batches_tracked) == 0
    plain, several = nn.BatchNorm2d(3), torch.randn(2, 3, 1, 1)
    norm = models.SingleValueNorm(3)
    assert torch.equal(norm(several), plain(several)) and torch.equal(norm.running_mean, plain.running_mean)


@pytest.mark.parametrize("head", ["pooled", "topk"])
def test_both_heads_send_gradients_to_the_encoder(head):
    for name in ("pixels", "classes"):
        network = net(head=head)
        network(images())[name].square().sum().backward()
        assert network.net.encoder.conv1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("architecture", "encoder"), [("unet", "resnet18"), ("fpn", "resnet18"), ("unet", "efficientnet-b0")]
)
def test_checkpointing_gives_the_same_gradients_and_running_statistics(architecture, encoder):
    plain, cheap = net(architecture, encoder).double(), net(architecture, encoder, checkpointing=True).double()
    cheap.load_state_dict(plain.state_dict())
    results = []
    for network in (plain, cheap):
        torch.manual_seed(3)  # drop-connect of efficientnet, dropout of fpn
        network.train()
        outputs = network(images(32, 64))
        (outputs["pixels"].square().mean() + outputs["classes"].sum()).backward()
        results.append({name: value.grad for name, value in network.named_parameters()})
    assert plain.state_dict().keys() == cheap.state_dict().keys()
    for name, gradient in results[0].items():
        assert (gradient is None) == (results[1][name] is None)
        assert gradient is None or torch.allclose(gradient, results[1][name], rtol=1e-9, atol=1e-12), name
    for name, value in plain.state_dict().items():
        assert torch.equal(value, cheap.state_dict()[name]), name
    assert any("running_mean" in name and value.abs().sum() > 0 for name, value in plain.state_dict().items())


def test_checkpointing_keeps_fewer_activations():
    def kept(network):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            network.train()(images())
        return sum(sizes)

    assert kept(net(checkpointing=True)) < 0.5 * kept(net())


def test_unknown_encoder_is_one_clear_error():
    with pytest.raises(UserError, match="--encoder resnet19"):
        net(encoder="resnet19")


def test_weights_that_cannot_be_fetched_stop_the_run_soon(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        load_encoder_weights(net(), "resnet18")
    assert "--encoder-weights none" in str(caught.value) and "HF_HOME" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hub_that_never_answers_is_given_up(monkeypatch):
    asked, end = [], threading.Event()

    def never(url, timeout):
        asked.append(url)
        end.wait()
        raise OSError

    monkeypatch.setattr(models, "REACHABLE_SECONDS", 0.2)
    monkeypatch.setattr(models.urllib.request, "urlopen", never)
    assert not models._answers("https://hub.example")
    assert asked
    end.set()


def test_a_download_that_stalls_is_one_line(monkeypatch):
    def stalls(name, depth, weights):
        raise httpx2.ReadTimeout("The read operation timed out")

    monkeypatch.setattr(models, "_answers", lambda url: True)
    monkeypatch.setattr(models.smp.encoders, "get_encoder", stalls)
    with pytest.raises(UserError, match="timed out.*--encoder-weights none --encoder-lr 1"):
        load_encoder_weights(net(), "resnet18")


def test_weights_that_are_there_go_into_the_encoder(monkeypatch):
    network, source = net(), net().net.encoder
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1)
    monkeypatch.setattr(models, "_answers", lambda url: True)
    monkeypatch.setattr(models.smp.encoders, "get_encoder", lambda name, depth, weights: source)
    load_encoder_weights(network, "resnet18")
    for name, value in source.state_dict().items():
        assert torch.equal(network.net.encoder.state_dict()[name], value)
    assert isinstance(network.net.classification_head, nn.Module)


def test_an_encoder_that_does_not_exist_is_named_with_its_nearest():
    with pytest.raises(UserError, match="--encoder resnet19: .*resnet18"):
        net(encoder="resnet19")
    with pytest.raises(UserError) as caught:
        net(encoder="nope")
    assert "--encoder nope: " in str(caught.value) and len(str(caught.value)) < 200
