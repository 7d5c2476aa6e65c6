"""Unusual models and losses: a batch in micro-batches has the gradient of one graph, or raises an error."""

import random
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.batch import Batch, map_tree, tensors_of
from common.engine.step import Engine
from common.errors import UserError
from common.losses import RMSE, batch_value, whole_batch
from tests.common.engine.toys import (
    CLASSES,
    LOSSES,
    SmallMemory,
    cross_entropy,
    gradient_of,
    make_batch,
    make_engine,
    make_model,
    relative_error,
    silent,
)


def gradients_of(engine: Engine, batch: Batch, step: int = 0) -> Tensor:
    """Gradients of all parameters of the optimizer, in one vector; zeros for a parameter without a gradient."""
    engine.gradients(batch, step)
    parameters = [parameter for group in engine.optimizer.param_groups for parameter in group["params"]]
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]).clone()


def cut_and_whole(model: nn.Module, loss, batch: Batch, parameters=None, steps: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Gradients of `steps` batches in micro-batches of 5 and in one graph, each from a copy of the same batch."""
    found = []
    optimizer = torch.optim.SGD(parameters or model.parameters(), lr=0.0)
    engines = [Engine(model, loss, optimizer, micro_batch=size, log=silent) for size in (5, len(batch))]
    for step in range(steps):
        copies = [replace(batch, inputs=map_tree(Tensor.clone, batch.inputs)) for _ in engines]
        found.append(tuple(gradients_of(engine, copy, step) for engine, copy in zip(engines, copies, strict=True)))
    return found


def assert_equal(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for cut, whole in pairs:
        assert float(whole.norm()) > 0 and relative_error(cut, whole) <= 1e-12


class HeadInValue(nn.Module):
    """A loss over sums whose value uses a head that belongs neither to the loss nor to the model."""

    def __init__(self, head: nn.Module, single: bool):
        super().__init__()
        self.heads, self.single = [head], single

    def stats(self, outputs, targets):
        return outputs.square().mean(1) if self.single else outputs.square()

    def value(self, sums, count):
        return (self.heads[0].weight.square().sum() * (sums / count + 1).log()).mean()


@pytest.mark.parametrize("way", ["whole batch", "per sample", "sums", "one sum"])
def test_two_modules_under_one_optimizer(way):
    body, head, batch = make_model(), nn.Linear(CLASSES, 3).double(), make_batch(12)

    def whole(features, targets):
        return (head(features.tanh()) - targets[:, None]).square().mean().sqrt()

    loss = {
        "whole batch": whole_batch(whole),
        "per sample": lambda features, targets: (head(features) - targets[:, None]).square().mean(1),
        "sums": HeadInValue(head, single=False),
        "one sum": HeadInValue(head, single=True),
    }[way]
    pairs = cut_and_whole(body, loss, batch, [*body.parameters(), *head.parameters()])
    assert_equal(pairs)
    assert float(pairs[0][0][-head.weight.numel() - 3 : -3].norm()) > 0


class WritesToItsInput(nn.Module):
    def __init__(self, *more: nn.Module):
        super().__init__()
        self.body, self.more, self.writes = make_model(), nn.Sequential(*more), True

    def forward(self, inputs):
        if self.writes:
            inputs = inputs.sub_(0.5).div_(0.25)
        return self.body(self.more(inputs))


@pytest.mark.parametrize("name", LOSSES)
def test_a_model_may_write_to_its_input(name):
    batch, loss = make_batch(12), LOSSES[name]()
    before = batch.inputs.clone()
    model, pure = WritesToItsInput(), make_model()
    batch_value(loss, pure((before - 0.5) / 0.25), batch.targets).backward()
    expected = gradient_of(pure, None)
    for micro_batch in (12, 5):
        engine = make_engine(model, loss, micro_batch=micro_batch)
        for step in range(2):
            engine.gradients(batch, step)
            assert relative_error(gradient_of(model, None), expected) <= 1e-12
    assert torch.equal(batch.inputs, before), "the batch belongs to the data set"


def test_a_model_may_write_to_its_input_before_the_memory_is_full():
    batch, model = make_batch(12), WritesToItsInput(SmallMemory(4))
    pure = make_model()
    batch_value(cross_entropy, pure((batch.inputs - 0.5) / 0.25), batch.targets).backward()
    make_engine(model, cross_entropy, micro_batch=12).gradients(batch, 0)
    assert relative_error(gradient_of(model, None), gradient_of(pure, None)) <= 1e-12


def test_a_loss_may_write_to_its_targets():
    def shifted(outputs, targets):
        return (outputs - targets.sub_(1)[:, None]).square().mean().sqrt()

    batch = make_batch(12)
    assert_equal(cut_and_whole(make_model(), whole_batch(shifted), batch))


def test_a_model_that_begins_to_write_later_is_told():
    model = WritesToItsInput()
    model.writes = False
    engine = make_engine(model, LOSSES["whole batch"](), micro_batch=5)
    engine.gradients(make_batch(12), 0)
    model.writes = True
    with pytest.raises(UserError, match="changed its input in place in step 2"):
        engine.gradients(make_batch(12), 1)
    engine.gradients(make_batch(12), 2)


def test_complex_outputs():
    class Spectrum(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = make_model(), nn.Linear(20, 3).double()

        def forward(self, inputs):
            return {"f": torch.fft.fft(self.body(inputs)), "p": self.head(inputs)}

    def loss(outputs, targets):
        return outputs["f"].abs().square().mean().sqrt() + outputs["f"].real.exp().mean() + outputs["p"].mean().exp()

    assert_equal(cut_and_whole(Spectrum(), whole_batch(loss), make_batch(12)))


class Dropped(nn.Module):
    """Drops layers with Python's generators, as in hand-written stochastic depth."""

    def __init__(self, draw):
        super().__init__()
        self.head, self.draw, self.kept = nn.Linear(20, CLASSES).double(), draw, []
        self.layers = nn.ModuleList(nn.Linear(20, 20).double() for _ in range(6))

    def forward(self, inputs):
        drawn = [self.draw() < 0.5 for _ in self.layers]
        self.kept.append(drawn)
        for layer, keep in zip(self.layers, drawn, strict=True):
            inputs = inputs + layer(inputs).tanh() if keep else inputs
        return self.head(inputs)


@pytest.mark.parametrize("draw", [random.random, np.random.random], ids=["random", "np.random"])
@pytest.mark.parametrize("name", ["sums", "whole batch"])
def test_layers_dropped_by_pythons_generators_are_the_same_in_both_passes(draw, name):
    batch, loss = make_batch(12), LOSSES[name]()
    runs = []
    for disturbance in range(2):
        torch.manual_seed(0)
        model = Dropped(draw)
        engine = make_engine(model, loss, micro_batch=4)
        for step in range(3):
            random.seed(disturbance), np.random.seed(disturbance)
            after = random.random(), np.random.random()
            random.seed(disturbance), np.random.seed(disturbance)
            model.kept.clear()
            found = gradients_of(engine, batch, step)
            assert model.kept[:3] == model.kept[3:] and len(model.kept) == 6
            assert (random.random(), np.random.random()) == after, "the generators are the user's"
        runs.append((model.kept[:3], found))
    assert runs[0][0] == runs[1][0] and torch.equal(runs[0][1], runs[1][1]), "a function of seed and step"


def test_drawing_from_pythons_generators_is_noticed_from_the_epoch_on_in_which_it_begins():
    model = Dropped(lambda: 0.1)
    engine, batch = make_engine(model, LOSSES["sums"](), micro_batch=4), make_batch(12)
    state = random.getstate()
    for step in range(2):
        engine.gradients(batch, step)
    model.draw = random.random
    for step in range(2, 5):
        model.kept.clear()
        engine.gradients(replace(batch, epoch=1), step)
        assert model.kept[: len(model.kept) // 2] == model.kept[len(model.kept) // 2 :]
    assert random.getstate() == state


class Remembers(nn.Module):
    """A loss with a buffer that its statistics use and update; `value` updates it too."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def stats(self, outputs, targets):
        self.calls += 1
        return outputs.square() * self.calls

    def value(self, sums, count):
        self.calls += 100
        return (sums / count + 1).log().mean()

    def forward(self, outputs, targets, weights):
        self.calls += 1
        return outputs.square().mean().sqrt()


def test_a_buffer_of_the_loss_counts_once():
    batch, model = make_batch(12), make_model()
    sums, whole = Remembers("sums"), Remembers("whole_batch")
    engine = make_engine(model, sums, micro_batch=4)
    engine.gradients(batch, 0)
    assert float(sums.calls) == 103
    stats = torch.cat([model(batch.inputs[at : at + 4]).square() * (at // 4 + 1) for at in range(0, 12, 4)])
    for parameter in model.parameters():
        found, parameter.grad = parameter.grad, None
        parameter.found = found
    (stats.sum(0) / 12 + 1).log().mean().backward()
    for parameter in model.parameters():
        torch.testing.assert_close(parameter.found, parameter.grad, rtol=1e-12, atol=1e-14)
    for step in range(2):
        make_engine(model, whole, micro_batch=5).gradients(batch, step)
        assert float(whole.calls) == step + 1


def test_a_buffer_of_a_loss_that_takes_the_place_of_another_counts_once():
    loss, engine = Remembers("sums"), make_engine(make_model(), cross_entropy, micro_batch=4)
    engine.use(loss)
    engine.gradients(make_batch(12), 0)
    assert float(loss.calls) == 103


@pytest.mark.parametrize("name", ["cross-entropy", "per sample with parameters", "one sum"])
def test_weights_with_a_negative_sum_divide_like_any_other(name):
    model, loss, batch = make_model(), LOSSES[name](), make_batch(12, weighted=True)
    batch = replace(batch, weights=torch.where(batch.index < 8, -batch.weights, batch.weights))
    assert float(batch.weights.sum()) < 0
    if name == "one sum":
        loss = RMSE()
        batch = replace(batch, targets=torch.zeros(12, CLASSES).double(), weights=-batch.weights.abs())
    assert_equal(cut_and_whole(model, loss, batch))
    if name == "cross-entropy":
        losses = cross_entropy(model(batch.inputs), batch.targets).detach()
        expected = (losses * batch.weights).sum() / batch.weights.sum()
        torch.testing.assert_close(make_engine(model, loss, micro_batch=5).gradients(batch, 0), expected)


class Sometimes(nn.Module):
    """Only rows with a first input above 0 use the network; outputs of a micro-batch without any have no graph."""

    def __init__(self):
        super().__init__()
        self.body = make_model()

    def forward(self, inputs):
        rows = inputs[:, 0] > 0
        outputs = torch.zeros(len(inputs), CLASSES, dtype=inputs.dtype)
        return outputs.index_put((rows.nonzero()[:, 0],), self.body(inputs[rows])) if rows.any() else outputs


@pytest.mark.parametrize("name", LOSSES)
def test_a_micro_batch_without_a_graph(name):
    batch = make_batch(15)
    batch.inputs[:, 0] = torch.where(batch.index < 5, 1.0, -1.0).double()
    model, loss = Sometimes(), LOSSES[name]()
    if isinstance(loss, nn.Module):
        loss.requires_grad_(False)
    assert_equal(cut_and_whole(model, loss, batch))


@pytest.mark.parametrize("micro_batch", [12, 5])
def test_nothing_to_train_is_an_error(micro_batch):
    model = make_model().requires_grad_(False)
    with pytest.raises(UserError, match="gives no parameter a gradient"):
        make_engine(model, cross_entropy, micro_batch=micro_batch).step(make_batch(12), 0)


Pair = namedtuple("Pair", "logits extra")


@dataclass
class Found:
    logits: Tensor
    extra: Tensor | None = None
    name: str = "found"


class ModelOutput(OrderedDict):
    """As in transformers: a dictionary whose keys are also attributes."""

    def __init__(self, **values):
        super().__init__(values)
        for key, value in values.items():
            setattr(self, key, value)

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        object.__setattr__(self, key, value)


CONTAINERS = {
    "namedtuple": lambda x: Pair(x, (x.exp(), None)),
    "dataclass": lambda x: Found(x),
    "nested dataclass": lambda x: Found(x, Pair(x.sin(), None)),
    "ModelOutput": lambda x: ModelOutput(logits=x, hidden=None),
}


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.body, self.wrap = make_model(), wrap

    def forward(self, inputs):
        return self.wrap(self.body(inputs))


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_containers_of_outputs(container, precision):
    loss = whole_batch(lambda outputs, targets: outputs.logits.square().mean().sqrt())
    model, batch = Wrapped(CONTAINERS[container]), make_batch(12)
    assert_equal(cut_and_whole(model, loss, batch))
    kept = map_tree(lambda x: x + 1, model(batch.inputs))
    assert type(kept) is type(model(batch.inputs)) and torch.equal(kept.logits, model.body(batch.inputs) + 1)
    assert len(tensors_of(kept)) == len(tensors_of(model(batch.inputs)))
    engine = make_engine(model.float(), loss, micro_batch=5, precision=precision)
    assert torch.isfinite(gradients_of(engine, replace(batch, inputs=batch.inputs.float()))).all()


class WithTemperature(nn.Module):
    """Has outputs without rows, such as CLIP's temperature: computed from a weight, or if `bare` the weight itself."""

    def __init__(self, bare: bool):
        super().__init__()
        self.body, self.bare = make_model(), bare
        self.temperature = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.centres = nn.Parameter(torch.randn(2, 3, CLASSES, dtype=torch.float64))

    def forward(self, inputs):
        return self.body(inputs), self.temperature if self.bare else self.temperature.exp(), self.centres * 1.0


@pytest.mark.parametrize("bare", [False, True])
def test_outputs_that_belong_to_no_sample(bare):
    def loss(outputs, targets):
        logits, temperature, centres = outputs
        return (logits[:, None, None] * temperature - centres).square().mean().sqrt()

    torch.manual_seed(0)
    assert_equal(cut_and_whole(WithTemperature(bare), whole_batch(loss), make_batch(12)))


class OfAllOutputs:
    """A loss over several sums that uses three outputs, of which only the first has rows."""

    def stats(self, outputs, targets):
        logits, temperatures, centres = outputs
        return (logits[:, None] * temperatures[:, None] - centres[0, 0]).square()

    def value(self, sums, count):
        return (sums / count).sqrt().mean()


def test_outputs_that_seem_to_have_rows():
    """As many temperatures as a micro-batch has samples: joined over 3 micro-batches like rows, they would be 12."""

    class Temperatures(WithTemperature):
        def forward(self, inputs):
            logits, temperature, centres = super().forward(inputs)
            return logits, torch.stack([temperature, temperature * 2, temperature.square(), 1 / temperature]), centres

    torch.manual_seed(0)
    assert_equal(cut_and_whole(Temperatures(False), OfAllOutputs(), make_batch(12)))


@pytest.mark.parametrize("frozen", [False, True])
def test_sums_that_the_loss_itself_learns(frozen):
    """The statistics use the loss's own parameters; with a frozen model the outputs need no gradient."""

    class Prototypes(nn.Module):
        def __init__(self):
            super().__init__()
            self.centres = nn.Parameter(torch.randn(CLASSES, dtype=torch.float64))

        def stats(self, outputs, targets):
            return (outputs - self.centres).square()

        def value(self, sums, count):
            return (sums / count).sqrt().mean()

    torch.manual_seed(0)
    model, loss = make_model().requires_grad_(not frozen), Prototypes()
    assert_equal(cut_and_whole(model, loss, make_batch(12), [*model.parameters(), *loss.parameters()]))


def test_outputs_without_rows_that_differ_are_refused():
    class Balance(WithTemperature):
        def forward(self, inputs):
            return self.body(inputs), inputs.mean()

    with pytest.raises(UserError, match=r"shape \[\] for 4 samples.*--micro-batch 12"):
        loss = whole_batch(lambda outputs, targets: outputs[0].mean() * outputs[1])
        make_engine(Balance(True), loss, micro_batch=5).gradients(make_batch(12), 0)
