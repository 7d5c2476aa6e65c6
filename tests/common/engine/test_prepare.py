"""Checkpointing and compiling change the cost of a model, not its gradient."""

import importlib.util
import pickle
import random
import re
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import timm
import torch
from torch import nn

from common.engine.prepare import check_compile, enable_checkpointing, prepare, try_compile
from common.errors import UserError
from tests.common.engine.toys import cross_entropy, gradient_of, make_batch, make_engine, relative_error


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2))

    def forward(self, inputs, *, scale=1.0):
        return inputs + scale * self.layers(inputs)


def deep(blocks=6, width=20):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(width) for _ in range(blocks)), nn.Linear(width, 6)).double()


def flat():
    """A plain nn.Sequential without repeated blocks; its only larger member stays a single member."""
    torch.manual_seed(0)
    rows = []
    for _ in range(8):
        rows += [nn.BatchNorm1d(20), nn.Linear(20, 20), nn.ReLU(inplace=True), nn.Tanh()]
    return nn.Sequential(*rows[:16], Block(20), *rows[16:], nn.Linear(20, 6)).double()


class Unusual(nn.Module):
    """Changes its input in place, which its own output and the layer before see, and draws from Python's generators."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second, self.third = nn.Dropout(0.3, inplace=True), nn.Linear(width, width), nn.Tanh()

    def forward(self, inputs):
        inputs += 0.5
        outputs = self.second(self.first(inputs)) * random.random()
        return self.third(outputs * np.random.random()) + inputs


def unusual(blocks=6, width=20):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, width), *(Unusual(width) for _ in range(blocks)), nn.Linear(width, 6)).double()


class Joined(nn.Module):
    """Takes a list, which its owner makes longer afterwards."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Linear(width, 4), nn.Linear(4, 4)

    def forward(self, parts):
        return self.second(self.first(torch.cat(parts, 1)).tanh())


class Dense(nn.Module):
    """DenseNet's way: every block sees the outputs of all blocks before it."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Joined(20 + 4 * number) for number in range(4))

    def forward(self, inputs):
        parts = [inputs]
        for block in self.blocks:
            parts.append(block(parts))
        return torch.cat(parts, 1)


def dense():
    torch.manual_seed(0)
    return nn.Sequential(Dense(), nn.Linear(36, 6)).double()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (dense, ["0.blocks.0", "0.blocks.1", "0.blocks.2", "0.blocks.3"]),
        (unusual, list("123456")),
        (deep, list("012345")),
        (flat, ["16", "[0:6]", "[6:12]", "[12:16]", "[17:23]", "[23:29]"]),
    ],
)
def test_gradient_dropout_and_statistics_stay_the_same(make, expected):
    plain, saving, batch = make(), make(), make_batch(24)
    assert set(enable_checkpointing(saving)) >= set(expected)
    for model in (plain, saving):
        make_engine(model, cross_entropy, micro_batch=8).gradients(batch, 0)
    assert relative_error(gradient_of(saving, None), gradient_of(plain, None)) <= 1e-12
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(saving.state_dict()[name], tensor)
    assert list(saving.state_dict()) == list(plain.state_dict())
    modules = saving.forward.__self__.modules()  # with those that hold the runs of `flat`
    known = {module.forward.writes for module in modules if "forward" in vars(module)}
    assert known == {unusual: {True}, flat: {False, True}}.get(make, {False}), "others need no copies"


class Centred(nn.Module):
    """Changes buffers that it uses, in place and by assignment, and whatever it is given by name."""

    def __init__(self, scale):
        super().__init__()
        self.first, self.second, self.scale = nn.Linear(6, 6), nn.Linear(6, 6), scale
        self.register_buffer("centre", torch.zeros(6))
        self.register_buffer("count", torch.ones(6))

    def forward(self, inputs, seen):
        outputs = self.scale(self.first(inputs.mul_(1.5)))
        self.centre.mul_(0.9).add_(outputs.detach().mean(0))
        self.count = self.count + 1
        seen["calls"] += 1
        return self.second((outputs - self.centre) * self.count * seen["calls"]).tanh()


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("factors", torch.arange(1.0, 7.0))

    def forward(self, inputs):
        return inputs * self.factors


class Stateful(nn.Module):
    """Its blocks share a module with buffers with what comes before them."""

    def __init__(self):
        super().__init__()
        self.scale = Scale()
        self.blocks = nn.ModuleList(Centred(self.scale) for _ in range(5))
        self.embed = nn.Linear(20, 6)

    def forward(self, inputs):
        outputs, seen = self.scale(self.embed(inputs)), {"calls": 0}
        for block in self.blocks:
            outputs = block(inputs=outputs * 1, seen=seen)
        return outputs


def test_blocks_that_change_buffers_and_arguments_by_name():
    torch.manual_seed(0)
    plain = Stateful().double()
    saving, inputs = deepcopy(plain), torch.randn(8, 20).double()
    assert len(enable_checkpointing(saving)) == 5
    for model in (plain, saving):
        model(inputs).square().sum().backward()
    assert relative_error(gradient_of(saving, None), gradient_of(plain, None)) <= 1e-12
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(saving.get_buffer(name), buffer)


@pytest.mark.parametrize("make", [deep, flat])
def test_a_copy_or_pickle_of_the_model_runs_its_own_weights(make):
    model, batch = make(), make_batch(8)
    enable_checkpointing(model)
    copies = [deepcopy(model), pickle.loads(pickle.dumps(model))]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for copy in copies:
        for parameter in copy.parameters():
            nn.init.constant_(parameter, 0.5)
        copy(batch.inputs).sum().backward()
        assert all(parameter.grad is not None for parameter in copy.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("device_type, variable, word", [("cpu", "CXX", "C++"), ("cuda", "CC", "C")])
def test_compile_without_a_compiler_is_told_in_one_line(device_type, variable, word, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UserError, match=re.escape(f"--compile needs a {word} compiler")):
        check_compile(device_type)
    compiler = tmp_path / "own"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv(variable, "own")
    check_compile(device_type)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    if device_type == "cuda":
        with pytest.raises(UserError, match="triton"):
            check_compile(device_type)


def test_a_compiler_that_fails_is_told_in_one_line(monkeypatch):
    def failing(function):
        raise RuntimeError("backend='inductor' raised:\nCppCompileError: fatal error: Python.h: No such file")

    monkeypatch.setattr(torch, "compile", failing)
    with pytest.raises(UserError, match="--compile does not work .*raised: CppCompileError.* Python.h.*without"):
        try_compile(torch.device("cpu"))


def test_fewer_activations_are_kept():
    def kept_bytes(model):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            model(torch.randn(64, 20).double())
        return sum(sizes)

    plain, saving = deep(blocks=24), deep(blocks=24)
    enable_checkpointing(saving)
    assert kept_bytes(saving) < 0.4 * kept_bytes(plain)


def test_nothing_to_recompute_is_said():
    with pytest.raises(UserError, match="finds no block"):
        enable_checkpointing(nn.Linear(3, 3))
    said = []
    prepare(deep(), checkpointing=True, log=said.append)
    assert said == ["checkpointing: 6 blocks keep only their inputs"]


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "pit_ti_224", "nasnetalarge"])
def test_timm_models(name):
    """With and without BatchNorm; pit_ti_224's own checkpointing raises, so the kit's is used instead."""
    settings = {"num_classes": 3}
    settings |= {"vit_tiny_patch16_224": {"img_size": 32, "depth": 2}, "pit_ti_224": {"img_size": 32}}.get(name, {})
    if name == "nasnetalarge":
        assert enable_checkpointing(timm.create_model(name, num_classes=3))
        return
    gradients = []
    for wanted in (False, True):
        torch.manual_seed(0)
        model = timm.create_model(name, **settings).double()
        if wanted:
            assert bool(enable_checkpointing(model)) == (name != "vit_tiny_patch16_224"), "one has a way of its own"
        torch.manual_seed(1)
        model(torch.randn(2, 3, 32, 32).double()).square().sum().backward()
        gradients.append(gradient_of(model, None))
    assert relative_error(gradients[1], gradients[0]) <= 1e-12


def test_a_way_of_its_own_that_does_nothing_is_not_relied_on():
    """As for timm's models under python -O, where the assertion that would raise is left out."""
    model = unusual()
    model.set_grad_checkpointing = lambda enable: None
    assert len(enable_checkpointing(model)) == 6


def test_timms_refusal_is_replaced_by_the_kits_checkpointing():
    model = unusual()
    model.set_grad_checkpointing = partial(fail, AssertionError("gradient checkpointing not supported"))
    assert len(enable_checkpointing(model)) == 6


@pytest.mark.parametrize("error", [AssertionError("depth must be even"), RuntimeError("no such block")])
def test_any_other_error_of_a_models_own_way_reaches_the_user(error):
    model = unusual()
    model.set_grad_checkpointing = partial(fail, error)
    with pytest.raises(type(error)) as raised:
        enable_checkpointing(model)
    assert raised.value is error


def fail(error, enable):
    raise error


def test_depthwise_convolutions_train_in_float32_where_the_rest_is_bf16():
    """They run as if outside of autocast; a copied model wraps its own layers, and evaluation does not change."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(16, 4, 1), nn.Flatten()
    plain, prepared = nn.Sequential(*layers), deepcopy(nn.Sequential(*layers))
    names = list(prepared.state_dict())
    prepare(prepared, precision="bf16")
    images = torch.randn(2, 3, 6, 6)

    def by_hand(model):
        with torch.autocast("cpu", torch.bfloat16):
            inputs = model[0](images)
        between = model[1](inputs.float())
        with torch.autocast("cpu", torch.bfloat16):
            return model[3](model[2](between))

    def in_bf16(model):
        with torch.autocast("cpu", torch.bfloat16):
            return model(images)

    copied = pickle.loads(pickle.dumps(deepcopy(prepared)))
    assert copied[1].forward.module is copied[1] and list(copied.state_dict()) == names
    for model in (prepared, copied):
        found, wanted = in_bf16(model), by_hand(plain)
        assert torch.equal(found, wanted) and not torch.equal(found, in_bf16(plain))
        gradients = []
        for of, outputs in ((model, found), (plain, wanted)):
            of.zero_grad()
            outputs.float().square().sum().backward()
            gradients.append(gradient_of(of, None))
        assert torch.equal(*gradients)
    assert torch.equal(in_bf16(prepared.eval()), in_bf16(plain.eval()))
    untouched = deepcopy(plain)
    prepare(untouched)
    assert "forward" not in vars(untouched[1])


def test_compiled_in_place(monkeypatch):
    """The compiler itself is not run here, it takes a minute."""
    asked = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: asked.append(self))
    model = deep()
    prepare(model, checkpointing=False, compiled=True)
    assert asked == [model]
    prepare(model)
    assert asked == [model]
