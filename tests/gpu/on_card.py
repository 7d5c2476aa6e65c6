"""Tests that need a CUDA card, run by test_card.py; alone: `pytest tests/gpu/on_card.py --confcutdir=tests/gpu`."""

import gc
from dataclasses import replace

import pytest
import torch
from torch import nn

from common.batch import Batch, map_tree
from common.device import prepare_device
from common.engine.average import Average
from common.engine.optimizers import allocate_state
from common.engine.schedule import set_learning_rate
from common.engine.step import Engine
from common.errors import UserError
from common.losses import BCE, CrossEntropy, SoftFBeta
from tests.common.engine.test_every_loss import NearIdentity
from tests.common.engine.toys import gradient_of, make_engine, reference, relative_error, silent
from tests.common.losses.cases import SHIPPED

if not torch.cuda.is_available():
    pytest.skip("no card is visible", allow_module_level=True)
CARD = torch.device("cuda", 0)
ROWS = 21


@pytest.fixture(autouse=True)
def _same_sums():
    """Keep cuDNN from adding up in any order: Adam turns a gradient that is only rounding into a whole step."""
    torch.backends.cudnn.deterministic = True


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("case", SHIPPED, ids=lambda case: case.name.replace(" ", "_"))
def test_gradient_of_one_graph(case, weighted):
    outputs, targets = (map_tree(lambda x: x.to(CARD), tree) for tree in case.sample(ROWS, seed=11))
    weights = torch.rand(ROWS, dtype=torch.float64, device=CARD) if weighted else None
    model, loss = NearIdentity(outputs).to(CARD), case.make()
    loss = loss.to(CARD) if isinstance(loss, nn.Module) else loss
    batch = Batch(outputs, targets, torch.arange(ROWS), weights)
    value, expected = reference(model, loss, batch)
    for micro_batch in (3, 16, ROWS):
        engine = make_engine(model, loss, micro_batch=micro_batch)
        for step in range(2):
            found = engine.gradients(batch, step)
            assert relative_error(gradient_of(model, loss), expected) <= 1e-12
            torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-14, check_dtype=False)


def network(dropout: float = 0.2) -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
    ]
    layers += [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 6)]
    return nn.Sequential(*layers).to(CARD)


def images(count: int, seed: int = 0, size: int = 32, hot: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, 6, (count,), generator=generator)
    targets = nn.functional.one_hot(targets, 6).float() if hot else targets
    return Batch(torch.randn(count, 3, size, size, generator=generator), targets, torch.arange(count))


def on_card(batch: Batch) -> Batch:
    return replace(batch, inputs=batch.inputs.to(CARD), targets=batch.targets.to(CARD))


def engine_for(model: nn.Module, loss, optimizer=torch.optim.AdamW, **settings) -> Engine:
    made = optimizer(model.parameters(), lr=1e-2, fused=True)
    allocate_state(made)
    return Engine(model, loss, made, log=settings.pop("log", silent), **settings)


@pytest.mark.parametrize("loss, hot", [(CrossEntropy(), False), (SoftFBeta(1.0, "macro"), True)])
def test_real_out_of_memory(loss, hot):
    """With too little memory for the whole batch, the gradient equals that of fixed small micro-batches."""
    batch, gradients = images(64, size=256, hot=hot), []
    whole = torch.cuda.get_device_properties(CARD).total_memory
    for share in (1.0, None):
        model = network(0.0).eval()
        engine = engine_for(model, loss, micro_batch=8 if share else "auto")
        if share is None:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 1.5 * 2**30) / whole)
        try:
            engine.gradients(batch, 0)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        gradients.append(gradient_of(model, None))
    assert engine.limited and engine.micro_batch < 64
    assert relative_error(gradients[1], gradients[0]) < 1e-2, "convolutions of another size, in TF32"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("micro_batch", ["auto", 8])
def test_every_precision_trains(precision, micro_batch):
    model = network(0.0)
    engine, batch = engine_for(model, CrossEntropy(), precision=precision, micro_batch=micro_batch), on_card(images(32))
    losses = [engine.step(batch, step).loss for step in range(60)]
    engine.settle()
    assert all(torch.isfinite(p).all() for p in model.parameters()) and float(losses[-1]) < 0.7 * float(losses[0])


@pytest.mark.parametrize("micro_batch", ["auto", 6])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("loss, hot", [(CrossEntropy(), False), (BCE(), True), (SoftFBeta(1.0, "macro"), True)])
def test_replayed_steps_are_the_eager_ones(loss, hot, optimizer, precision, micro_batch):
    """CUDA graph replay with dropout, BatchNorm, weight averaging, a changing learning rate and one short batch."""
    found, said = [], []
    for graph in (False, True):
        model = network()
        settings = {"graph": graph, "precision": precision, "micro_batch": micro_batch, "log": said.append}
        engine = engine_for(model, loss, optimizer, clip_norm=1.0, **settings)
        average, values = Average(model, 0.9), []
        for step in range(12):
            set_learning_rate(engine.optimizer, 1 - step / 24)
            report = engine.step(on_card(images(5 if step == 8 else 16, seed=step, hot=hot)), step)
            average.update(model)
            values.append(report.loss)
        engine.settle()
        found.append([*model.state_dict().values(), *average.tensors.values(), *values])
    two_passes = micro_batch == 6 and isinstance(loss, SoftFBeta)
    assert not [line for line in said if "not replayed" in line] and (engine.replay._graph is None) == two_passes
    for eager, replayed in zip(*found, strict=True):
        torch.testing.assert_close(replayed, eager, rtol=1e-3, atol=1e-4)


def test_dropout_differs_from_replay_to_replay_and_is_keyed():
    class Mask(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(1, 2, 1000, device=CARD))  # so no two masks have one sum

        def forward(self, inputs):
            return nn.functional.dropout(inputs * self.weight, 0.5)

    batch = Batch(torch.ones(4, 1000, device=CARD), torch.zeros(4, device=CARD), torch.arange(4))
    engine = engine_for(Mask(), lambda outputs, targets: outputs.mean(1), torch.optim.SGD, graph=True)
    set_learning_rate(engine.optimizer, 0.0)
    losses = [float(engine.step(batch, step).loss) for step in (0, 1, 2, 3, 4, 5, 6, 5, 1)]
    assert engine.replay._graph is not None and len(set(losses[:7])) == 7
    assert losses[7] == losses[5] and losses[8] == losses[1], "a function of seed and step, eager or replayed"


@pytest.mark.parametrize("graph", [False, True])
def test_no_step_waits(graph):
    engine = engine_for(network(), CrossEntropy(ignore_index=None), graph=graph, precision="bf16", clip_norm=1.0)
    batch = on_card(images(16))
    for step in range(8):
        engine.step(batch, step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(8, 12):
            engine.step(batch, step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    engine.settle()


@pytest.mark.parametrize("graph", [False, True])
def test_what_is_not_finite_leaves_the_weights_and_is_told(graph):
    model = network(0.0)
    engine, batch = engine_for(model, CrossEntropy(), graph=graph), on_card(images(16))
    for step in range(8):
        engine.step(batch, step)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(UserError, match="the loss is not finite in step 9"):  # by the step itself if the card is quick
        engine.step(replace(batch, inputs=batch.inputs * float("nan")), 8)
        engine.settle()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_loss_that_reads_the_card_is_found_out():
    said = []
    engine = engine_for(
        network(), lambda o, t: o.square().mean(1) * (1 + (float(o.sum()) > 0)), graph=True, log=said.append
    )
    for step in range(8):
        engine.step(on_card(images(16)), step)
    engine.settle()
    assert [line for line in said if "not replayed" in line and "_local_scalar_dense" in line]


def test_a_capture_that_fails_leaves_everything_usable():
    """A synchronize cannot be detected before the capture, where it is forbidden, so the capture itself fails."""

    def loss(outputs, targets):
        torch.cuda.synchronize()
        return outputs.square().mean(1)

    said, stream = [], torch.cuda.current_stream()
    engine = engine_for(network(), loss, graph=True, log=said.append)
    losses = [float(engine.step(on_card(images(16)), step).loss) for step in range(12)]
    engine.settle()
    assert [
        line for line in said if "not replayed as a CUDA graph: the capture failed" in line
    ] and engine.replay._graph is None
    assert torch.cuda.current_stream() == stream and losses[-1] < losses[0]
    assert torch.rand(3, device=CARD).isfinite().all(), "the generator does not wait for the end of the capture"
    torch.cuda.empty_cache()  # nor does the allocator


def test_another_loss_is_not_replayed_from_the_graph_of_the_old_one():
    model, said = network(0.0), []
    engine, batch = engine_for(model, CrossEntropy(), graph=True, log=said.append), on_card(images(16))
    for step in range(8):
        engine.step(batch, step)
    graph = engine.replay._graph
    engine.use(lambda outputs, targets: outputs.square().mean(1) + 100)
    losses = [float(engine.step(batch, step).loss) for step in range(8, 16)]
    engine.settle()
    assert min(losses) >= 100 and engine.replay._graph not in (None, graph), said


def test_settings_of_a_card():
    torch.set_float32_matmul_precision("highest")
    assert prepare_device(CARD, False) is torch.channels_last and torch.get_float32_matmul_precision() == "high"
