"""Library networks take any channels, any size and a single image, or an error names the misfit before a run."""

import copy

import pytest
import segmentation_models_pytorch as smp
import torch
from segmentation_models_pytorch.decoders.fpn.decoder import MergeBlock
from timm.layers import BatchNormAct2d
from torch import nn

from common.errors import UserError
from common.vision import backbones
from common.vision.backbones import Classifier, MaskNet, Normalize, OneValue, probe, spare_single_values, timm_backbone

ARCHITECTURES = [
    "unet",
    "unetplusplus",
    "fpn",
    "linknet",
    "manet",
    "pan",
    "pspnet",
    "deeplabv3plus",
    "upernet",
    "segformer",
]


def images(height=64, width=96, batch=2, channels=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, channels, height, width), dtype=torch.uint8, generator=generator)


def net(architecture="unet", encoder="resnet18", **settings):
    torch.manual_seed(0)
    return MaskNet(architecture, encoder, 4, **settings)


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("resnet18", *backbones.IMAGENET),
        ("tu-resnet18", *backbones.IMAGENET),
        ("vit_tiny_patch16_224", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("mit_b0", *backbones.IMAGENET),
    ],
)
def test_inputs_are_normalised_as_the_backbone_was_trained(name, mean, std):
    found = Normalize(name)(images())
    wanted = (images().double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(found.double(), wanted, atol=1e-5)
    assert not Normalize(name).state_dict(), "the weights' file is the library's"


def test_lite_networks_take_x_minus_127_over_128():
    for name in ("tf_efficientnet_lite0", "tu-tf_efficientnet_lite2"):
        assert torch.allclose(Normalize(name)(images()), (images().float() - 127) / 128, atol=1e-6)


@pytest.mark.parametrize("extra, like", [("mean", None), ("green", 1), ("red", 0)])
def test_further_channels_are_normalised_like_those_they_start_from(extra, like):
    four = Normalize("resnet18", 4, extra)
    three = Normalize("resnet18")
    assert torch.equal(four(images(channels=4))[:, :3], three(images(channels=4)[:, :3]))
    assert torch.allclose(four.mean[3], three.mean.mean() if like is None else three.mean[like])
    assert torch.allclose(Normalize("resnet18", 1).mean, three.mean.mean())


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_networks_of_any_number_of_channels(channels):
    network = Classifier("resnet10t", (64, 64), 5, channels, 0.1).train()
    assert network(images(64, 64, channels=channels)).shape == (2, 5)
    assert net(channels=channels)(images(channels=channels)).shape == (2, 4, 64, 96)


@pytest.mark.parametrize("architecture", ["unet", "fpn"])
@pytest.mark.parametrize("pooled", [0, 3])
def test_any_size_in_and_the_same_size_out(architecture, pooled):
    network = net(architecture, pooled=pooled).eval()
    for height, width in ((64, 96), (70, 105)):
        with torch.inference_mode():
            pixels, classes = network.maps(images(height, width))
        assert pixels.shape == (2, 4, height, width)
        assert classes is None if not pooled else classes.shape == (2, 3)


def test_padding_is_to_the_right_and_below_and_cut_off_again():
    network, seen = net().eval(), []
    network.net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    small = images(70, 105)
    with torch.inference_mode():
        pixels = network(small)
        assert seen[0].shape == (2, 3, 96, 128)
        assert torch.equal(seen[0][..., :70, :105], network.normalize(small))
        assert torch.equal(network.net(seen[0])[..., :70, :105], pixels)


def test_the_sum_of_an_fpn_is_that_of_the_library():
    network = net("fpn").eval()
    with torch.inference_mode():
        ours = network(images())
        network.net.decoder.merge = MergeBlock("add")
        assert torch.allclose(network(images()), ours, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_trains_on_a_single_image(architecture):
    """Some normalise globally pooled features, where a single image has one value per channel and no variance."""
    encoder = "mit_b0" if architecture == "segformer" else "resnet18"
    network = net(architecture, encoder, pooled=2).train()
    pixels, classes = network.maps(images(128, 192, batch=1))
    (pixels.square().mean() + classes.sum()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())
    library = smp.encoders.get_encoder(encoder, depth=network.net.encoder._depth, weights=None)
    assert network.net.encoder.state_dict().keys() == library.state_dict().keys(), "published weights fit"


@pytest.mark.parametrize("backbone", ["resnest14d", "skresnet18", "rexnet_100", "resnet10t", "levit_128s"])
def test_every_backbone_trains_on_a_single_image(backbone):
    size = (224, 224) if backbone == "levit_128s" else (32, 32)
    network = Classifier(backbone, size, 3).train()
    network(images(*size, batch=1)).square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, BatchNormAct2d])
def test_one_value_per_channel_is_left_to_the_running_statistics(kind):
    plain = kind(3)
    plain.running_mean.fill_(0.5)
    plain.weight.data.fill_(2.0)
    norm = nn.Sequential(copy.deepcopy(plain))
    spare_single_values(norm)
    spare_single_values(norm)
    norm, shape = copy.deepcopy(norm)[0], () if kind is nn.BatchNorm1d else (1, 1)
    assert isinstance(norm, OneValue) and isinstance(norm, kind)
    single, several = torch.randn(1, 3, *shape), torch.randn(2, 3, *shape)
    assert torch.allclose(norm.train()(single), plain.eval()(single)) and int(norm.num_batches_tracked) == 0
    assert torch.equal(norm.running_mean, plain.running_mean)
    assert torch.equal(norm(several), plain.train()(several)) and torch.equal(norm.running_mean, plain.running_mean)
    assert norm.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("backbone", ["mobilenetv3_small_050", "ghostnet_050", "resnet18"])
def test_the_width_is_what_the_backbone_hands_over(backbone):
    """Some backbones, such as MobileNets, have another layer between `num_features` and the head."""
    network, width = timm_backbone(backbone, (64, 64))
    assert network.training and network(torch.zeros(2, 3, 64, 64)).shape == (2, width)


def test_what_does_not_exist_is_named_with_its_nearest():
    with pytest.raises(UserError, match="--backbone resnet81: .*resnet18"):
        timm_backbone("resnet81", (64, 64))
    for encoder in ("resnet19", "tu-resnet19"):
        with pytest.raises(UserError, match=f"--encoder {encoder}: .*resnet18"):
            net(encoder=encoder)
    with pytest.raises(UserError, match=r"\(tu-tf_efficientnet_lite0, "):  # smp has no model of timm without tu-
        net(encoder="tf_efficientnet_lite0")
    with pytest.raises(UserError) as caught:
        net(encoder="nope")
    assert "--encoder nope: " in str(caught.value) and len(str(caught.value)) < 220


@pytest.mark.parametrize(
    ("architecture", "encoder", "size", "words"),
    [
        ("pan", "resnet18", (64, 96), "does not take images of --size 64,96"),
        ("unet", "tu-swin_tiny_patch4_window7_224", (64, 96), "does not take images of --size 64,96"),
        ("unet", "tu-maxvit_pico_rw_256", (64, 96), "does not take images of --size 64,96"),
        ("unet", "tu-coat_tiny", (64, 96), "does not take images of --size 64,96"),
        ("deeplabv3plus", "tu-hrnet_w18_small", (64, 96), "cannot be built"),
        ("pan", "tu-ghostnet_050", (384, 576), "cannot be built"),
        ("unet", "tu-vit_tiny_patch16_224", (64, 96), "cannot be built"),
    ],
)
def test_what_does_not_fit_is_one_line_before_a_run(architecture, encoder, size, words):
    flags = f"--architecture {architecture} --encoder {encoder}"
    with pytest.raises(UserError, match=f"{flags} {words}") as caught:
        probe(lambda: MaskNet(architecture, encoder, 4), size, 3, flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "encoder", "size"),
    [("unet", "efficientnet-b3", (1400, 2100)), ("segformer", "mit_b0", (64, 96)), ("fpn", "resnet18", (70, 105))],
)
def test_what_fits_passes_without_a_trace(architecture, encoder, size):
    before = torch.get_rng_state()
    probe(lambda: MaskNet(architecture, encoder, 4), size, 3, "flags")
    assert torch.equal(torch.get_rng_state(), before)


def test_maps_of_another_size_than_the_images_are_refused():
    with pytest.raises(UserError, match=r"--x does not take .*its maps have the shape \(1, 2, 31, 31\)"):
        probe(lambda: nn.Sequential(Normalize("resnet18"), nn.Conv2d(3, 2, 3, stride=2)), (64, 64), 3, "--x")


def test_transformers_are_made_for_the_size_of_the_images():
    for name in ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"):
        network, width = timm_backbone(name, (64, 96))
        assert network(torch.zeros(1, 3, 64, 96)).shape == (1, width)
