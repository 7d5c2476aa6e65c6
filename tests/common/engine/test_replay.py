"""The engine's GPU mode, forced on a CPU: no step waits, and a stand-in for the CUDA graph replays equal shapes."""

import random
import re
from collections import deque
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from common.engine.average import Average
from common.engine.optimizers import allocate_state
from common.engine.replay import CudaGraph, Replay, Watch, _copies, _distances, _put_back
from common.engine.schedule import set_learning_rate
from common.engine.step import WATCH_EVERY, Engine
from common.errors import UserError
from common.losses import BCE, RMSE, CrossEntropy, SoftFBeta
from tests.common.engine.toys import (
    LOSSES,
    SmallMemory,
    cross_entropy,
    make_batch,
    make_model,
    parameters_of,
    silent,
)

SHIPPED = {"shipped": CrossEntropy(), "bce": BCE(), "soft F1": SoftFBeta(1.0, "macro"), "RMSE": RMSE()}
GRAPHABLE = [name for name in LOSSES if name not in ("sums", "one sum")]  # on a CPU their one_hot reads the targets


class Again:
    """A stand-in for a CUDA graph that runs the captured function again at every replay."""

    made = 0

    def __init__(self, device):
        Again.made += 1

    def capture(self, work):
        self.replay = work


class Recorded(TorchDispatchMode):
    """A stand-in that repeats the captured kernels on the same memory, and no line of Python, as a CUDA graph does."""

    def __init__(self, device, engine):
        super().__init__()
        self.written, self.kernels = engine.replay._written, []

    def capture(self, work):
        state = self.written()
        kept = _copies(state)
        with self:
            work()
        _put_back(state, kept)  # a capture computes nothing

    def __torch_dispatch__(self, operation, types, inputs=(), named=None):
        inputs, named = tree_map(held, (inputs, named or {}))
        found = operation(*inputs, **named)
        given = {x.data_ptr(): x for x in tree_leaves((inputs, named)) if torch.is_tensor(x)}
        own = [x for x in tree_leaves(found) if torch.is_tensor(x)]
        owned = {x.untyped_storage().data_ptr() for x in given.values()}
        if operation._schema.is_mutable or any(x.untyped_storage().data_ptr() not in owned for x in own):
            self.kernels.append((operation, inputs, named, tree_map(held, found)))  # all but views
        return found

    @torch.no_grad()
    def replay(self):
        for operation, inputs, named, found in self.kernels:
            for kept, new in zip(tree_leaves(found), tree_leaves(operation(*inputs, **named)), strict=True):
                if torch.is_tensor(new) and new.data_ptr() != kept.data_ptr():
                    kept.copy_(new)


def held(value):
    """The same memory as another tensor, which autograd knows nothing of."""
    return value.detach() if torch.is_tensor(value) else value


def ahead(model, loss, optimizer=torch.optim.AdamW, graph=None, log=silent, **settings) -> Engine:
    """An engine that runs as on a GPU; `graph` stands in for the CUDA graph."""
    made = optimizer(parameters_of(model, loss), lr=0.125, fused=True)
    engine = Engine(model, loss, made, log=log, **settings)
    engine.run_ahead()
    if graph:
        engine.replay = Replay(engine, graph)
    return engine


def state_of(model, engine) -> list[torch.Tensor]:
    states = [value for state in engine.optimizer.state.values() for value in state.values()]
    return [tensor.clone() for tensor in [*model.state_dict().values(), *filter(torch.is_tensor, states)]]


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation, types, inputs=(), named=None):
        self.names.append(str(operation))
        return operation(*inputs, **(named or {}))


class Digits(nn.Sequential):
    """Six convolutions with BatchNorm, as the digits' network has them."""

    def __init__(self):
        torch.manual_seed(0)
        layers, inputs = [], 1
        for at, width in enumerate([8, 8, 16, 16, 32, 32]):
            layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            layers += [nn.MaxPool2d(2)] if at % 2 else []
            inputs = width
        super().__init__(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(288, 10))


def digits_batch():
    batch = make_batch(16)
    return replace(batch, inputs=torch.rand(16, 1, 28, 28), targets=batch.targets)


def test_a_step_costs_few_operations_more_than_a_loop_by_hand_and_never_waits():
    batch, model, twin = digits_batch(), Digits(), Digits()
    optimizer, average = torch.optim.AdamW(model.parameters(), fused=True), Average(model, 0.99)
    allocate_state(optimizer)
    engine, other_average = ahead(twin, CrossEntropy(ignore_index=None)), Average(twin, 0.99)

    def by_hand():
        nn.functional.cross_entropy(model(batch.inputs), batch.targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(model)

    for step in range(3):
        by_hand()
        engine.step(batch, step), other_average.update(twin)
    with Operations() as hand:
        by_hand()
    with Operations() as kit:
        engine.step(batch, 3), other_average.update(twin)
    assert len(kit.names) <= 1.1 * len(hand.names)
    assert not [name for name in kit.names if "_local_scalar_dense" in name or "item" in name]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("micro_batch", ["auto", 5])
def test_running_ahead_trains_as_waiting_does(name, micro_batch):
    found = []
    for runs_ahead in (False, True):
        model, loss = make_model(nn.BatchNorm1d(48), nn.Dropout(0.2)), LOSSES[name]()
        engine = ahead(model, loss, micro_batch=micro_batch, clip_norm=0.1)
        engine.outcomes = engine.outcomes if runs_ahead else None
        reports = [engine.step(make_batch(12, weighted=True, seed=step), step) for step in range(4)]
        engine.settle()
        found.append([*state_of(model, engine), *(report.loss for report in reports)])
    for waiting, running in zip(*found, strict=True):
        torch.testing.assert_close(running, waiting, rtol=1e-7, atol=1e-8)


class Late:
    """An event that is never ready unless somebody waits for it."""

    def record(self, stream):
        self.waited = False

    def query(self):
        return False

    def synchronize(self):
        self.waited = True


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_what_is_not_finite_leaves_the_weights_and_is_told_later(where, optimizer):
    factor = [1.0]

    def loss(outputs, targets):
        if where == "loss":
            return cross_entropy(outputs, targets) * factor[0]
        return cross_entropy(outputs, targets) + (outputs.sum(1) * 0 + (factor[0] == 1.0)).sqrt()  # d sqrt(x) / dx at 0

    model = make_model()
    engine = ahead(model, loss, optimizer)
    engine.outcomes._free = deque((row, Late()) for row, _ in engine.outcomes._free)
    for step in range(3):
        engine.step(replace(make_batch(8), epoch=1, number=step), step)
    before, factor[0] = state_of(model, engine), float("nan")
    engine.step(replace(make_batch(8), epoch=1, number=3), 3)
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(model, engine), strict=True))
    factor[0] = 1.0
    average = Average(model, 0.9)
    for step in range(4, 7):
        engine.step(make_batch(8), step)
        average.update(model)
    assert all(torch.isfinite(tensor).all() for tensor in [*state_of(model, engine), *average.tensors.values()])
    word = "the loss is" if where == "loss" else "the gradient of the loss is"
    with pytest.raises(UserError, match=rf"{word} not finite in step 4 \(epoch 2, batch 4\)"):
        engine.settle()


def test_the_outcome_is_awaited_on_the_stream_of_its_own_device(monkeypatch):
    """An event of the current device, which may be another card, is ready before the numbers have arrived."""
    asked, recorded = [], []
    monkeypatch.setattr(torch.cpu, "current_stream", lambda device=None: asked.append(device) or "its stream")
    monkeypatch.setattr(torch.cpu.Event, "record", lambda event, stream=None: recorded.append(stream))
    engine = ahead(make_model(), cross_entropy)
    engine.step(make_batch(8), 0)
    assert asked == [engine.device] and recorded == ["its stream"]


@pytest.mark.parametrize("room, most", [(2**30, 64), (24 * 8 * (20 + 1) * 8, 24), (1, 2)])
def test_the_host_is_never_far_ahead(room, most, monkeypatch):
    """Neither in steps nor in bytes of their batches, of eight rows of 20 numbers and a target."""
    monkeypatch.setattr("common.engine.finite.BYTES_AHEAD", room)
    engine = ahead(make_model(), lambda outputs, targets: cross_entropy(outputs, targets) * float("nan"))
    engine.outcomes._free = deque((row, Late()) for row, _ in engine.outcomes._free)
    with pytest.raises(UserError, match="not finite in step 1 "):
        for step in range(99):
            engine.step(make_batch(8), step)
    assert step == most


def test_fp16_scale_follows_the_same_rule_without_waiting():
    scales = []
    for runs_ahead in (False, True):
        factor, model = [1.0], make_model().float()
        engine = ahead(model, lambda o, t: cross_entropy(o, t) * factor[0], precision="fp16")  # noqa: B023
        engine.outcomes = engine.outcomes if runs_ahead else None
        engine.scale.growth_steps = 3
        batch, seen = replace(make_batch(8), inputs=make_batch(8).inputs.float()), []
        for number, good in enumerate([1, 1, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1]):
            factor[0], before = 1.0 if good else 1e36, state_of(model, engine)
            engine.step(batch, number)
            same = all(torch.equal(a, b) for a, b in zip(before, state_of(model, engine), strict=True))
            assert same == (not good)
            seen.append(engine.state_dict())
        scales.append(seen)
    assert scales[0] == scales[1]


@pytest.mark.parametrize("micro_batch", ["auto", 5])
@pytest.mark.parametrize("name", [*GRAPHABLE, *SHIPPED])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_replayed_steps_are_the_eager_ones(name, optimizer, micro_batch):
    """With a changing learning rate, a short batch in between, dropout and sample weights.

    Micro-batches are replayed if one pass over them is enough: in a second one dropout would draw other masks.
    """
    found = []
    for graph in (False, True):
        torch.manual_seed(3)
        model = make_model(nn.BatchNorm1d(48), nn.Dropout(0.2))
        loss = LOSSES[name]() if name in LOSSES else SHIPPED[name]
        settings = {"clip_norm": 0.5, "seed": 4, "micro_batch": micro_batch}
        engine, values = ahead(model, loss, optimizer, **settings), []
        engine.replay = Replay(engine, partial(Recorded, engine=engine)) if graph else None
        for step in range(9):
            batch = make_batch(5 if step == 6 else 12, weighted=True, seed=step)
            if name in ("bce", "soft F1", "RMSE"):
                batch = replace(batch, targets=nn.functional.one_hot(batch.targets, 6).double())
            set_learning_rate(engine.optimizer, 0.5 ** (step // 2))
            report = engine.step(batch, step)
            values += [report.loss, report.gradient_norm]
        engine.settle()
        found.append([*state_of(model, engine), *values])
    replayed = micro_batch == "auto" or name == "RMSE" or engine.passes.kind == "per_sample"
    assert replayed == (engine.replay._graph is not None)
    for eager, other in zip(*found, strict=True):
        assert torch.equal(eager, other)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_weights_are_cast_again_in_every_replay(precision):
    """Autocast keeps the weights that it has cast, but only until the end of a forward pass."""
    found = []
    for graph in (False, True):
        engine = ahead(make_model().float(), cross_entropy, precision=precision, micro_batch=5)
        engine.replay = Replay(engine, partial(Recorded, engine=engine)) if graph else None
        for step in range(8):
            batch = make_batch(13, seed=step)
            engine.step(replace(batch, inputs=batch.inputs.float()), step)
        found.append(state_of(engine.model, engine))
    assert engine.replay._graph is not None
    for eager, replayed in zip(*found, strict=True):
        assert torch.equal(eager, replayed)


def refusal(model, loss, steps=6, first=0, **settings) -> tuple[str, Engine]:
    said: list[str] = []
    engine = ahead(model, loss, graph=Again, log=said.append, **settings)
    for step in range(first, first + steps):
        engine.step(make_batch(12), step)
    told = [line for line in said if "not replayed" in line]
    assert len(told) <= 1, "told once"
    return (told or [""])[0], engine


class Drawing(nn.Module):
    def forward(self, inputs):
        return inputs * (2.0 if random.random() < 0.5 else 1.0)


class Assigning(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, inputs):
        self.count = self.count + 1
        return inputs


def by_value(outputs, targets):
    return outputs.square().mean(1) * (2.0 if float(outputs.detach().sum()) > 0 else 1.0)


def by_rows(outputs, targets):
    return outputs.square().mean(1) + outputs[targets > 2].sum() * 0


class Counting:
    def __init__(self):
        self.calls = 0

    def __call__(self, outputs, targets):
        self.calls += 1
        return cross_entropy(outputs, targets) * self.calls


@pytest.mark.parametrize(
    "extra, loss, why",
    [
        (nn.Identity(), by_value, "_local_scalar_dense"),
        (nn.Identity(), by_rows, "nonzero|index"),
        (nn.Identity(), Counting(), "run different operations"),
        (Drawing(), cross_entropy, "draws from random"),
        (Assigning(), cross_entropy, "replaces a buffer by a new tensor"),
    ],
)
def test_what_needs_the_host_is_found_out(extra, loss, why):
    told, engine = refusal(make_model(extra), loss)
    assert re.search(why, told) and engine.replay._graph is None


def test_only_the_batch_may_come_from_the_host():
    """A graph holds the batch, but an array that the loss sends to the card is freed before the replay reads it."""
    batch, engine = make_batch(8), SimpleNamespace(device=torch.device("meta"), model=nn.Identity())
    for sent, refused in ((batch.inputs[2:5], False), (torch.ones(3), True)):
        with Watch(engine, batch) as watch:
            sent.to("meta")
        assert ("works on cpu and meta" in watch.why) == refused


def test_a_graph_does_not_grow_without_bounds(monkeypatch):
    monkeypatch.setattr("common.engine.replay.MOST_OPERATIONS", 60)
    told, _ = refusal(make_model(), cross_entropy)
    assert not told
    told, engine = refusal(make_model(), cross_entropy, micro_batch=1)
    assert "operations are too many" in told and engine.replay._graph is None


@pytest.mark.parametrize("first", [WATCH_EVERY - 1, WATCH_EVERY - 2])
def test_steps_that_the_engine_watches_are_replayed_all_the_same(first):
    """A resumed run may begin at any step; seeding Python's generators is the engine's own doing."""
    told, engine = refusal(make_model(), cross_entropy, first=first)
    assert not told and engine.replay._graph is not None


@pytest.mark.parametrize(
    "error, told",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "CUDA out of memory"),
        (KeyError("capturable"), "'capturable'"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_a_capture_that_fails_goes_on_eagerly(error, told):
    class Full(Again):
        def capture(self, work):
            work()
            raise error

    said = []
    engine = ahead(make_model(), cross_entropy, graph=Full, log=said.append)
    for step in range(5):
        engine.step(make_batch(12), step)
    assert len([line for line in said if f"the capture failed ({told})" in line]) == 1
    assert engine.micro_batch == 12, "the batch itself fits"


class OldAllocator:
    """Stands in for torch.cuda as it was before torch 2.13: an invalid capture never ends for the allocator."""

    def __init__(self, monkeypatch):
        self.underway, self.released = [], []
        for name in ("CUDAGraph", "graph_pool_handle", "graph", "device", "stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "default_generators", (self,))
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda card, pool: self.released.append(pool), raising=False)

    def __getattr__(self, name):
        return lambda *given: self  # CUDAGraph, its reset, and a generator's states

    def graph_pool_handle(self):
        return (0, 1)

    def device(self, device):
        return nullcontext()

    stream = device

    @contextmanager
    def graph(self, graph, pool, capture_error_mode):
        self.underway.append(pool)
        try:
            yield
        except torch.AcceleratorError:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture") from None
        except BaseException:
            self.end(0, pool)
            raise

    def end(self, card, pool):
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)


@pytest.mark.parametrize("error, released", [(torch.AcceleratorError("CUDA error"), 1), (KeyError("capturable"), 0)])
def test_a_capture_that_fails_ends_for_the_allocator(monkeypatch, error, released):
    allocator = OldAllocator(monkeypatch)

    def work():
        raise error

    with pytest.raises((RuntimeError, KeyError)):
        CudaGraph(torch.device("cpu")).capture(work)
    assert not allocator.underway and len(allocator.released) == released


class Stale(Again):
    """A faulty graph: calls `fault` before every replay."""

    def __init__(self, device, fault):
        super().__init__(device)
        self.fault = fault

    def capture(self, work):
        def replay():
            self.fault()
            work()

        self.replay = replay


FAULTS = {
    "another batch": lambda engine: lambda: engine.replay._batch.inputs.zero_(),
    "another dropout": lambda engine: lambda: engine.passes.generators.seed_torch(9),
    "another rate": lambda engine: lambda: [rate.fill_(0.1) for rate in engine.replay._rates],
    "old statistics": lambda engine: lambda: [b.zero_() for b in engine.model.buffers() if b.is_floating_point()],
    "a weight of NaN": lambda engine: lambda: engine.parameters[0].data[0].fill_(float("nan")),
    "old momenta": lambda engine: lambda: [state["exp_avg"].zero_() for state in engine.optimizer.state.values()],
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_graph_that_does_something_else_is_dropped(name):
    """It is dropped at its first step, and the weights are the same as without a graph."""
    found, said = [], []
    for faulty in (False, True):
        model = make_model(nn.BatchNorm1d(48), nn.Dropout(0.2))
        engine = ahead(model, cross_entropy, clip_norm=0.5, log=said.append)
        if faulty:
            engine.replay = Replay(engine, partial(Stale, fault=FAULTS[name](engine)))
        values = [engine.step(make_batch(12, seed=step), step).loss for step in range(8)]
        found.append([*state_of(model, engine), *values])
    assert len([line for line in said if "differs from the same step" in line]) == 1 and engine.replay._graph is None
    for eager, dropped in zip(*found, strict=True):
        torch.testing.assert_close(dropped, eager, rtol=1e-7, atol=1e-8)


class OfItsLoss(Again):
    """Keeps the loss that it was captured with, as a graph keeps its kernels."""

    def __init__(self, device, engine):
        super().__init__(device)
        self.passes = engine.passes

    def capture(self, work):
        captured = self.passes.loss

        def replay():
            present, self.passes.loss = self.passes.loss, captured
            work()
            self.passes.loss = present

        self.replay = replay


def test_another_loss_gets_a_graph_of_its_own():
    """A task may change the loss between epochs; a loss that is named again keeps the graph."""
    found, first, second = [], CrossEntropy(), lambda outputs, targets: outputs.square().mean(1)
    Again.made = 0
    for graph in (False, True):
        model = make_model()
        engine = ahead(model, first)
        if graph:
            engine.replay = Replay(engine, partial(OfItsLoss, engine=engine))
        for step, loss in enumerate([first] * 12 + [second] * 6):
            if step % 6 == 0:
                engine.use(loss)
            engine.step(make_batch(12, seed=step), step)
        found.append(state_of(model, engine))
    assert Again.made == 2 and engine.replay._graph is not None
    for eager, replayed in zip(*found, strict=True):
        assert torch.equal(eager, replayed)


def test_memory_that_is_short_takes_the_graph_first():
    small = SmallMemory(100)
    told, engine = refusal(make_model(small), cross_entropy)
    assert not told and engine.replay._graph is not None
    small.limit, small.at = 4, 0
    calls = []

    def check(rows):
        calls.append(rows)
        if engine.replay._graph is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")

    small.check = check
    engine.step(make_batch(7), 10)
    assert calls == [7, 7] and engine.replay._graph is None and engine.micro_batch == 12


@pytest.mark.parametrize("micro_batch", ["auto", 1])
@pytest.mark.parametrize("at", [1, 2])
def test_copies_for_the_comparison_give_way_to_the_step(at, micro_batch):
    """`at`: which of the two eager steps of the comparison has no room, not even for one sample, beside the copies."""
    small, found = SmallMemory(0), []
    for graph in (None, Again):
        model, said = make_model(small), []
        engine = ahead(model, cross_entropy, graph=graph, micro_batch=micro_batch, log=said.append)

        def check(rows, engine=engine):
            if engine.replay and len(engine.replay._copies) == at:
                raise torch.OutOfMemoryError("CUDA out of memory")

        small.check = check
        reports = [engine.step(make_batch(12, seed=step), step) for step in range(6)]
        found.append([*state_of(model, engine), *(number for report in reports for number in report[:2])])
    assert len([line for line in said if "no memory is left to compare" in line]) == 1 and not engine.replay._copies
    assert engine.micro_batch == (12 if micro_batch == "auto" else 1), "only the copies took the room"
    for eager, dropped in zip(*found, strict=True):
        assert torch.equal(dropped, eager)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_comparison_without_room_is_left_out(monkeypatch, at):
    """`at`: which of its distances do not fit into memory; the last ones are those of the graph's step."""
    found, calls = [], []

    def full(*groups):
        calls.append(1)
        if len(calls) == at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return _distances(*groups)

    monkeypatch.setattr("common.engine.replay._distances", full)
    for graph in (None, Again):
        model, said = make_model(), []
        engine = ahead(model, cross_entropy, graph=graph, log=said.append)
        for step in range(6):
            engine.step(make_batch(12, seed=step), step)
        found.append(state_of(model, engine))
    assert len([line for line in said if "no memory is left to compare" in line]) == 1 and len(calls) == at
    for eager, dropped in zip(*found, strict=True):
        assert torch.equal(dropped, eager)


def test_micro_batches_that_memory_has_cut_stay_eager():
    for asked in ("auto", 8):
        told, engine = refusal(make_model(SmallMemory(5)), cross_entropy, micro_batch=asked)
        assert not told and engine.replay._graph is None and engine.micro_batch == 3


def test_a_batch_that_is_too_large_for_the_card_stays_on_the_host():
    """It is copied in micro-batches, so a graph, which holds the batch that it replays, would take its memory."""
    engine, made = ahead(make_model(), cross_entropy, graph=Again, micro_batch=5), Again.made
    for step in range(6):
        batch = make_batch(12, seed=step)
        engine.device = torch.device("meta")  # not that of the batch
        engine.step(batch, step)
    assert Again.made == made


def test_other_modes_stay_eager():
    _, engine = refusal(make_model(), cross_entropy)
    graph = engine.replay._graph
    seen, graph.replay = [], lambda work=graph.replay: (seen.append(1), work())
    engine.step(make_batch(12), 6)
    engine.parameters[0].requires_grad_(False)
    engine.step(make_batch(12), 7)
    assert seen == [1]
