"""One step of the engine, compared with one graph over the whole batch."""

import random
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.batch import Batch, tensors_of
from common.engine import passes as passes_module
from common.engine.ranks import Ranks
from common.engine.step import Engine
from common.errors import UserError
from common.losses import MSE, RMSE, LovaszSoftmax, batch_value, whole_batch
from tests.common.engine.toys import (
    CLASSES,
    LOSSES,
    Contrast,
    RootMeanSquare,
    ScaledEntropy,
    SoftF1,
    cross_entropy,
    gradient_of,
    make_batch,
    make_engine,
    make_model,
    parameters_of,
    reference,
    relative_error,
    silent,
)

every_loss = pytest.mark.parametrize("name", LOSSES)


@every_loss
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("micro_batch", [1, 3, 7, 16, 37, 64])
def test_gradient_of_one_graph_for_every_micro_batch(name, weighted, micro_batch):
    model, loss, batch = make_model(), LOSSES[name](), make_batch(37, weighted)
    value, expected = reference(model, loss, batch)
    found = make_engine(model, loss, micro_batch=micro_batch).gradients(batch, 0)
    assert relative_error(gradient_of(model, loss), expected) <= 1e-12
    torch.testing.assert_close(found, value, rtol=1e-12, atol=0, check_dtype=False)


@every_loss
def test_the_second_batch_is_as_exact_as_the_first(name):
    """A loss over one sum takes two passes for the first batch, and one pass for later ones."""
    model, loss = make_model(), LOSSES[name]()
    engine = make_engine(model, loss, micro_batch=8)
    for number in range(3):
        batch = make_batch(37 - number, seed=number)
        _, expected = reference(model, loss, batch)
        engine.gradients(batch, number)
        assert relative_error(gradient_of(model, loss), expected) <= 1e-12


def forwards(model: nn.Module) -> list[int]:
    """A list to which every later forward pass of the model appends its batch size."""
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    return sizes


@pytest.mark.parametrize("loss, passes", [(cross_entropy, 1), (RootMeanSquare(), 1), (SoftF1(), 2), (Contrast(), 2)])
def test_passes_over_a_batch(loss, passes):
    model = make_model()
    engine = make_engine(model, loss, micro_batch=8)
    engine.step(make_batch(32), 0)
    sizes = forwards(model)
    engine.step(make_batch(32), 1)
    assert sizes == [8] * 4 * passes
    sizes.clear()
    make_engine(model, loss).step(make_batch(32), 0)
    assert sizes == [32], "a batch that fits needs no second pass"


def test_sums_of_large_outputs_are_exact_without_keeping_them(monkeypatch):
    """The loss sees each sample once if the outputs are small enough to be kept, else in both passes."""
    model, loss, batch = make_model(), SoftF1(), make_batch(37, weighted=True)
    _, expected = reference(model, loss, batch)
    calls, stats = [], loss.stats
    loss.stats = lambda outputs, targets: calls.append(len(outputs)) or stats(outputs, targets)
    few = 37 * (CLASSES + 1) * 8  # bytes of outputs and targets
    for limit, passes in ((few, 1), (few - 1, 2)):
        monkeypatch.setattr(passes_module, "SMALL_BYTES", limit)
        calls.clear()
        make_engine(model, loss, micro_batch=8).gradients(batch, 0)
        assert sum(calls) == 37 * passes
        assert relative_error(gradient_of(model, loss), expected) <= 1e-12


def naive(model, loss_of_batch, batch, cut):
    """What accumulation loops do: the mean of the micro-batches' losses."""
    model.zero_grad()
    parts = [batch.slice(start, min(start + cut, len(batch))) for start in range(0, len(batch), cut)]
    for part in parts:
        (loss_of_batch(model(part.inputs), part.targets) / len(parts)).backward()
    return gradient_of(model, None)


def test_naive_accumulation_is_visibly_wrong():
    """Control: for these losses the naive gradient is far off, so the exactness tests can fail."""
    batch, model, f1 = make_batch(64), make_model(), SoftF1()
    _, expected = reference(model, f1, batch)
    wrong = naive(model, lambda outputs, targets: f1.value(f1.stats(outputs, targets).sum(0), None), batch, 4)
    assert relative_error(wrong, expected) > 0.05
    engine = make_engine(model, f1, micro_batch=4)
    engine.gradients(batch, 0)
    assert relative_error(gradient_of(model, None), expected) <= 1e-12

    lovasz = LovaszSoftmax()
    model[-1].weight.data *= 10  # logits as large as those of a trained model
    _, expected = reference(model, lovasz, batch)
    wrong = naive(model, lambda outputs, targets: lovasz(outputs, targets, None), batch, 4)
    assert relative_error(wrong, expected) > 0.5
    make_engine(model, lovasz, micro_batch=4).gradients(batch, 0)
    assert relative_error(gradient_of(model, None), expected) <= 1e-12


def test_short_last_batch_is_a_whole_update():
    """Of 37 rows in batches of 32, the last batch has 5 samples and steps by their own mean."""
    model, rows = make_model(), make_batch(37)
    last = rows.slice(32, 37)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    _, expected = reference(model, cross_entropy, last)
    engine = make_engine(model, cross_entropy, lr=1.0, micro_batch=8)
    engine.step(last, 1)
    update = before - torch.cat([p.detach().flatten() for p in model.parameters()])
    ratio = float(update @ expected / expected.square().sum())
    assert abs(ratio - 1) <= 1e-12 and relative_error(update, expected) <= 1e-12


@pytest.mark.parametrize("make", [ScaledEntropy, Contrast])
def test_a_parameter_in_the_loss_gets_its_gradient_once(make):
    model, loss, batch = make_model(), make(), make_batch(16)
    reference(model, loss, batch)
    expected = float(loss.log_scale.grad)
    make_engine(model, loss, micro_batch=4).gradients(batch, 0)
    assert float(loss.log_scale.grad) / expected == pytest.approx(1, rel=1e-12)


class Centres(nn.Module):
    """A whole-batch loss that uses its parameter transposed, so that the gradient has transposed strides."""

    whole_batch = True

    def __init__(self):
        super().__init__()
        self.centres = nn.Parameter(torch.arange(24.0, dtype=torch.float64).reshape(4, CLASSES))

    def forward(self, outputs, targets, weights):
        return (outputs[:, :, None] - self.centres.t()[None]).square().mean(1).logsumexp((0, 1))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_fused_updates_of_a_parameter_in_the_loss_are_those_of_the_whole_batch(optimizer):
    def updated(micro_batch: int) -> torch.Tensor:
        model, loss = make_model(), Centres()
        fused = optimizer(parameters_of(model, loss), lr=0.1, fused=True)
        Engine(model, loss, fused, micro_batch=micro_batch, log=silent).step(make_batch(8), 0)
        return loss.centres.detach()

    torch.testing.assert_close(updated(3), updated(8), rtol=1e-9, atol=1e-12)


def test_what_carries_no_graph_does_not_stop_a_cut_batch():
    """With a frozen parameter in a whole-batch loss, and with an output that the model has detached."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = make_model()

        def forward(self, inputs):
            outputs = self.body(inputs)
            return {"outputs": outputs, "seen": outputs.detach().exp()}

    class Frozen(Contrast):
        def __init__(self):
            super().__init__()
            self.requires_grad_(False)

        def forward(self, outputs, targets, weights):
            return super().forward(outputs["outputs"], targets, weights) + (outputs["outputs"] * outputs["seen"]).mean()

    model, loss, batch = Heads(), Frozen(), make_batch(16)
    batch_value(loss, model(batch.inputs), batch.targets, batch.weights).backward()
    expected = gradient_of(model, None)
    make_engine(model, loss, micro_batch=5).gradients(batch, 0)
    assert relative_error(gradient_of(model, None), expected) <= 1e-12


def test_trees_of_inputs_outputs_and_targets():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.heads = make_model(), nn.ModuleList([nn.Linear(CLASSES, 2), nn.Linear(CLASSES, 3)]).double()

        def forward(self, inputs):
            features = self.body(inputs["rows"]) * inputs["scale"][:, None]
            return {"a": self.heads[0](features), "b": (self.heads[1](features), features)}

    batch = make_batch(22, weighted=True)
    trees = Batch(
        {"rows": batch.inputs, "scale": batch.weights},
        {"a": batch.targets % 2, "b": batch.targets % 3},
        batch.index,
    )

    def per_sample(outputs, targets):
        return cross_entropy(outputs["a"], targets["a"]) + cross_entropy(outputs["b"][0], targets["b"])

    class Whole:
        whole_batch = True

        def __call__(self, outputs, targets, weights):
            return per_sample(outputs, targets).square().mean().sqrt() + outputs["b"][1].var()

    for loss in (per_sample, Whole()):
        model = TwoHeads()
        _, expected = reference(model, loss, trees)
        make_engine(model, loss, micro_batch=5).gradients(trees, 0)
        assert relative_error(gradient_of(model, loss), expected) <= 1e-12


@pytest.mark.parametrize("name", ["cross-entropy", "sums", "whole batch"])
def test_dropout_is_the_same_in_every_pass_and_for_every_try(name):
    """Compared with one graph over the same micro-batches in the same order."""
    model, loss, batch = make_model(nn.Dropout(0.3)), LOSSES[name](), make_batch(32)
    engine = make_engine(model, loss, micro_batch=8, seed=5)
    engine.gradients(batch, 3)
    found = gradient_of(model, loss)
    engine.passes.begin_pass()
    outputs = torch.cat([model(batch.inputs[start : start + 8]) for start in range(0, 32, 8)])
    for parameter in model.parameters():
        parameter.grad = None
    batch_value(loss, outputs, batch.targets).backward()
    expected = gradient_of(model, loss)
    assert relative_error(found, expected) <= 1e-12
    engine.gradients(batch, 4)
    assert relative_error(gradient_of(model, loss), expected) > 0.01, "another step, other dropout"
    engine.gradients(batch, 3)
    assert torch.equal(gradient_of(model, loss), found)


def test_a_step_number_of_numpy_is_that_of_python():
    engine, batch = make_engine(make_model(nn.Dropout(0.3)), cross_entropy), make_batch(8)
    assert torch.equal(*(engine.gradients(batch, step) for step in (7, np.int64(7))))


def test_an_epoch_of_numpy_is_that_of_python():
    batch = replace(make_batch(8, weighted=True), epoch=np.int64(3), number=np.int64(2))
    part = batch.slice(2, 5).to("cpu")
    assert (len(part), len(part.weights), part.epoch, part.number) == (3, 3, 3, 2)
    assert len(tensors_of(batch)) == 4


def test_only_torchs_own_generators_are_seeded():
    engine, batch = make_engine(make_model(), cross_entropy), make_batch(4)
    random.seed(1), np.random.seed(1)
    expected = random.random(), np.random.rand()
    random.seed(1), np.random.seed(1)
    engine.step(batch, 0)
    assert (random.random(), np.random.rand()) == expected


@pytest.mark.parametrize("name, micro_batches", [("cross-entropy", 4), ("sums", 4), ("whole batch", 4), ("one sum", 4)])
def test_batchnorm_statistics_move_once_a_micro_batch(name, micro_batches):
    model, loss, batch = make_model(nn.BatchNorm1d(48)), LOSSES[name](), make_batch(32)
    twin = make_model(nn.BatchNorm1d(48))
    make_engine(model, loss, micro_batch=8).step(batch, 0)
    for start in range(0, 32, 8):
        twin(batch.inputs[start : start + 8])
    assert int(model[1].num_batches_tracked) == micro_batches
    torch.testing.assert_close(model[1].running_mean, twin[1].running_mean)
    torch.testing.assert_close(model[1].running_var, twin[1].running_var)


def test_the_ghost_batch_is_named_once():
    said = []
    engine = make_engine(make_model(nn.BatchNorm1d(48)), cross_entropy, micro_batch=8, log=said.append)
    for number in range(3):
        engine.step(make_batch(32), number)
    assert len([line for line in said if "BatchNorm" in line]) == 1 and "up to 8 samples" in said[-1]
    said.clear()
    make_engine(make_model(), cross_entropy, micro_batch=8, log=said.append).step(make_batch(32), 0)
    assert not [line for line in said if "BatchNorm" in line]


def test_clipping_is_once_and_over_everything():
    batch, loss = make_batch(37), ScaledEntropy()
    whole, cut = make_model(), make_model()
    _, gradient = reference(whole, loss, batch)
    report = make_engine(cut, loss, lr=1.0, micro_batch=5, clip_norm=0.05).step(batch, 0)
    assert float(report.gradient_norm) == pytest.approx(float(gradient.norm()), rel=1e-12)
    loss.log_scale.data.fill_(0.3)  # the step has changed it
    reference(whole, loss, batch)
    norm = nn.utils.clip_grad_norm_([*whole.parameters(), *loss.parameters()], 0.05)
    assert norm > 0.05, "a test in which nothing is clipped"
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(a - a.grad, b, rtol=1e-9, atol=1e-12)


def test_complex_weights_are_clipped_too():
    class Spectrum(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.complex(*torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))))

        def forward(self, inputs):
            return (inputs.to(self.weight.dtype) @ self.weight).abs()

    inputs, targets = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(1))
    batch, cut, whole = Batch(inputs, targets, torch.arange(8)), Spectrum(), Spectrum()
    loss = lambda outputs, targets: (outputs - targets).square().mean(1)  # noqa: E731
    Engine(cut, loss, torch.optim.SGD(cut.parameters(), lr=1.0), micro_batch=3, clip_norm=0.05).step(batch, 0)
    loss(whole(inputs), targets).mean().backward()
    assert nn.utils.clip_grad_norm_(whole.parameters(), 0.05) > 0.05
    torch.optim.SGD(whole.parameters(), lr=1.0).step()
    torch.testing.assert_close(cut.weight, whole.weight)


def test_dropout_of_micro_batches_is_named_once():
    said = []
    engine = make_engine(make_model(nn.Dropout(0.2)), cross_entropy, micro_batch=8, log=said.append)
    for number in range(3):
        engine.step(make_batch(32), number)
    assert len([line for line in said if "dropout draws" in line]) == 1
    said.clear()
    make_engine(make_model(nn.Dropout(0.2)), cross_entropy, micro_batch=32, log=said.append).step(make_batch(32), 0)
    assert not [line for line in said if "dropout" in line]


@pytest.mark.parametrize("place", ["inputs", "gradient"])
def test_what_is_not_finite_stops_before_the_update(place):
    model, batch = make_model(), make_batch(12)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    if place == "inputs":
        batch.inputs[7, 3] = float("nan")
        loss, word = cross_entropy, "the loss is not finite"
    else:
        # d sqrt(x) / dx at 0
        loss, word = (lambda outputs, targets: (outputs.sum(1) * 0).sqrt()), "the gradient of the loss is not finite"
    with pytest.raises(UserError, match=f"{word} in step 8"):
        make_engine(model, loss, micro_batch=5).step(batch, 7)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_scalar_loss_is_refused_with_the_declaration():
    with pytest.raises(UserError, match="whole_batch"):
        make_engine(make_model(), F.cross_entropy).step(make_batch(8), 0)


@pytest.mark.parametrize("name", ["cross-entropy", "sums", "whole batch"])
@pytest.mark.parametrize("micro_batch", [3, "auto"])
@pytest.mark.parametrize(
    "change, told",
    [
        (lambda b: make_batch(0), "a batch of no samples"),
        (lambda b: replace(b, targets=None), "the targets of the batch hold no tensor"),
        (lambda b: replace(b, inputs={}), "the inputs of the batch hold no tensor"),
        (lambda b: replace(b, index=b.index[:4]), r"the inputs of a batch of 4 samples, .* expected \[4, ...\]"),
        (lambda b: replace(b, targets=b.targets[:4]), "the targets of a batch of 8 samples"),
        (lambda b: replace(b, weights=torch.ones(1)), r"the weights of a batch of 8 samples, .* a tensor \[1\]"),
    ],
)
def test_a_batch_that_does_not_fit_together_is_refused(name, micro_batch, change, told):
    engine = make_engine(make_model(), LOSSES[name](), micro_batch=micro_batch)
    with pytest.raises(UserError, match=told):
        engine.step(change(make_batch(8)), 0)


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"micro_batch": 0}, "micro_batch 0: expected"),
        ({"micro_batch": 2.5}, "micro_batch 2.5: expected"),
        ({"precision": "bfloat16"}, "precision 'bfloat16': expected fp32, bf16 or fp16"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, told):
    with pytest.raises(UserError, match=told):
        make_engine(make_model(), cross_entropy, **settings)


def test_a_model_without_parameters_is_refused():
    with pytest.raises(UserError, match="the model, a Flatten, has no parameters"):
        Engine(nn.Flatten(), cross_entropy, torch.optim.SGD([nn.Parameter(torch.zeros(1))]))


def test_a_model_whose_parameters_appear_later_is_refused():
    """Two processes would draw different ones."""
    for lazy in (nn.LazyLinear(3), nn.Sequential(nn.Linear(4, 4), nn.LazyBatchNorm1d(affine=False))):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
        with pytest.raises(UserError, match="(weight|1.running_mean) has no shape before the first forward pass: call"):
            Engine(lazy, cross_entropy, optimizer)


class Queue(nn.Module):
    """Subtracts the mean of the last outputs, of which it keeps more and more."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 2)
        self.register_buffer("last", torch.zeros(1, 2))

    def forward(self, inputs):
        outputs = self.layer(inputs)
        centre, self.last = self.last.mean(0), torch.cat([self.last, outputs.detach()])[-20:]
        return outputs - centre


@pytest.mark.parametrize("loss", [MSE(), RMSE(), whole_batch(lambda y, t: (y - t).square().mean().sqrt())])
def test_a_buffer_may_grow(loss):
    torch.manual_seed(0)
    model = Queue().double()
    cut = deepcopy(model)
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (model, cut)]
    whole, parts = Engine(model, loss, optimizers[0], micro_batch=8), Engine(cut, loss, optimizers[1], micro_batch=3)
    for step in range(4):
        batch = Batch(torch.randn(8, 6).double(), torch.randn(8, 2).double(), torch.arange(8))
        expected = batch_value(loss, model.layer(batch.inputs) - model.last.mean(0), batch.targets)
        assert float(whole.step(batch, step).loss) == pytest.approx(expected.item(), rel=1e-12)
        assert model.last.shape == (min(20, 9 + 8 * step), 2)
        parts.step(batch, step)  # micro-batches see those before them, so the numbers differ
        assert cut.last.shape == model.last.shape


def test_an_optimizer_that_needs_a_closure_is_refused():
    model = make_model()
    with pytest.raises(UserError, match="LBFGS.step needs a closure"):
        Engine(model, cross_entropy, torch.optim.LBFGS(model.parameters()))


def test_modules_that_talk_to_other_processes_are_refused():
    with pytest.raises(UserError, match="SyncBatchNorm"):
        make_engine(make_model(nn.SyncBatchNorm(48)), cross_entropy)


def single_precision(loss):
    batch = make_batch(24)
    batch = Batch(batch.inputs.float(), batch.targets, batch.index)
    return make_model().float(), loss.float() if isinstance(loss, nn.Module) else loss, batch


@every_loss
def test_bf16_is_near_and_finite(name):
    model, loss, batch = single_precision(LOSSES[name]())
    _, expected = reference(model, loss, batch)
    engine = make_engine(model, loss, micro_batch=7, precision="bf16")
    engine.gradients(batch, 0)
    assert relative_error(gradient_of(model, loss), expected) < 0.05
    assert engine.passes.forward(batch.inputs).dtype == torch.float32


@every_loss
def test_fp16_gradients_are_unscaled(name):
    model, loss, batch = single_precision(LOSSES[name]())
    _, expected = reference(model, loss, batch)
    engine = make_engine(model, loss, micro_batch=7, precision="fp16")
    engine.gradients(batch, 0)
    assert relative_error(gradient_of(model, loss), expected) < 0.02


def test_fp16_scale_follows_torchs_scaler():
    """Overflows and good steps mixed: the factor is that of torch.amp.GradScaler, and an overflow updates nothing."""
    model = make_model().float()
    batch = make_batch(8)
    batch = Batch(batch.inputs.float(), batch.targets, batch.index)
    factor = [1.0]
    engine = make_engine(model, lambda o, t: cross_entropy(o, t) * factor[0], precision="fp16")
    engine.scale.growth_steps = 3
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
    other = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([other], lr=0.1)
    scaler.scale(other.sum())  # torch's scaler creates its factor at the first use
    for number, good in enumerate([1, 1, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1]):
        factor[0] = 1.0 if good else 1e36  # finite in float32, but not once scaled
        before = [parameter.detach().clone() for parameter in model.parameters()]
        engine.step(batch, number)
        moved = not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert moved == bool(good)
        other.grad = torch.full((1,), 1.0 if good else float("inf"))
        scaler.step(optimizer)
        scaler.update()
        assert engine.scale.factor == scaler.get_scale()


def test_fp16_stops_when_no_scale_can_help():
    """A gradient that is NaN at every scale raises as in fp32, instead of training on without updates."""
    model, batch = make_model().float(), make_batch(8)
    batch = Batch(batch.inputs.float(), batch.targets, batch.index)
    engine = make_engine(model, lambda outputs, targets: (outputs.sum(1) * 0).sqrt(), precision="fp16")
    with pytest.raises(UserError, match="gradient of the loss is not finite"):
        for number in range(40):
            engine.step(batch, number)
    assert 20 < number < 40


def test_state_is_plain_and_goes_on():
    engine = make_engine(make_model(), RootMeanSquare(), micro_batch="auto", precision="fp16")
    engine.scale.factor, engine.scale.good_steps, engine.passes.single_sum = 4.0, 7, True
    engine.micro_batch, engine.limited = 3, True
    state = engine.state_dict()
    assert all(isinstance(value, (str, int, float, bool, type(None))) for value in state.values())
    fresh = make_engine(make_model(), RootMeanSquare(), micro_batch="auto", precision="fp16")
    fresh.load_state_dict(state)
    assert fresh.state_dict() == state
    other = make_engine(make_model(), RootMeanSquare(), micro_batch=6)
    other.load_state_dict(state)
    assert other.micro_batch == 6, "what is asked for now counts more"


def test_the_report():
    model, batch = make_model(), make_batch(20, weighted=True)
    value, gradient = reference(model, cross_entropy, batch)
    report = make_engine(model, cross_entropy).step(batch, 0)
    assert report.micro_batch == 20 and not report.loss.requires_grad
    assert float(report.loss) == pytest.approx(float(value), rel=1e-12)
    assert float(report.gradient_norm) == pytest.approx(float(gradient.norm()), rel=1e-12)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_ranks_have_their_own_dropout():
    engines = [make_engine(make_model(), cross_entropy, ranks=Ranks(rank, 2)) for rank in range(2)]
    assert engines[0].passes.generators._first != engines[1].passes.generators._first


def test_a_large_batch_in_fp16_does_not_overflow_with_one_sum():
    model, batch = make_model().float(), make_batch(4000)
    batch = replace(batch, inputs=batch.inputs.float())
    engine = make_engine(model, RootMeanSquare(), micro_batch=500, precision="fp16")
    for step in range(2):
        engine.gradients(batch, step)
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
