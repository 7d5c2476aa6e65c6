"""The network: both heads, checkpointing that changes only memory use, and settings refused before a run."""

from dataclasses import replace

import pytest
import segmentation_models_pytorch as smp
import torch

from common.config import checked
from common.engine.prepare import prepare
from common.errors import UserError
from common.raw import RawData
from competitions.clouds import task
from competitions.clouds.config import RECIPES
from competitions.clouds.model import CloudNet


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


def test_topk_is_the_mean_of_the_ten_largest_logits():
    outputs = net(head="topk").eval()(images())
    slow = torch.stack(
        [torch.stack([mask.flatten().sort().values[-10:].mean() for mask in image]) for image in outputs["pixels"]]
    )
    assert torch.allclose(outputs["classes"], slow, atol=1e-6)


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


def test_what_does_not_fit_is_named_before_a_run_and_weights_of_another_network_too(folder, tmp_path):
    smoke = replace(RECIPES["smoke"], encoder_weights=str(tmp_path / "a.pth"))

    def built(**changes):
        return task.build(checked(replace(smoke, **changes)), RawData(folder, "clouds"), print)

    fits = built()
    fits.check()
    network = fits.network.model()
    state = {f"module.{key}": value + 1 for key, value in network.net.encoder.state_dict().items()}
    torch.save(state, tmp_path / "a.pth")
    fits.network.pretrain(network)
    assert torch.equal(network.net.encoder.conv1.weight, state["module.conv1.weight"])
    with pytest.raises(UserError, match="--encoder-weights .*a.pth fills .*--encoder-weights none --encoder-lr 1"):
        other = built(encoder="resnet34").network
        other.pretrain(other.model())
    with pytest.raises(UserError, match="--architecture pan --encoder resnet18 does not take .*--size 64,96"):
        built(architecture="pan").check()


HALVES = {
    "unet": {"decoder_channels": (128, 64, 32, 16, 8)},
    "fpn": {"decoder_pyramid_channels": 128, "decoder_segmentation_channels": 64},
    "manet": {"decoder_channels": (128, 64, 32, 16, 8), "decoder_pab_channels": 32},
    "pspnet": {"psp_out_channels": 256},
    "deeplabv3plus": {"decoder_channels": 128},
    "pan": {"decoder_channels": 16},
    "upernet": {"decoder_channels": 128},
    "segformer": {"decoder_segmentation_channels": 128},
}


@pytest.mark.parametrize("architecture", HALVES)
def test_a_decoder_of_half_the_width_is_the_librarys_own_and_the_encoder_stays(architecture):
    with torch.device("meta"):
        found = CloudNet(architecture, "resnet18", "pooled", 0.0, 0.5)
        library = smp.create_model(architecture, "resnet18", None, classes=4, **HALVES[architecture])
        whole = CloudNet(architecture, "resnet18", "pooled", 0.0)
    shapes = lambda part: {name: weights.shape for name, weights in part.named_parameters()}  # noqa: E731
    assert shapes(found.net.decoder) == shapes(library.decoder) != shapes(whole.net.decoder)
    assert shapes(found.net.encoder) == shapes(whole.net.encoder)


def test_a_decoder_of_one_width_is_refused_and_the_recipe_has_half_of_it():
    with pytest.raises(UserError, match="--decoder-width 0.5: the decoder of --architecture linknet has one width"):
        CloudNet("linknet", "resnet18", "pooled", 0.0, 0.5)
    found = RECIPES["small-pretrained"]
    with torch.device("meta"):
        network = CloudNet(found.architecture, found.encoder, found.class_head, found.dropout, found.decoder_width)
    assert network.net.decoder.seg_blocks[0].block[0].block[0].out_channels == 64
