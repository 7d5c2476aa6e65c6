"""Steps of one shape replayed from a CUDA graph: the host launches one thing instead of some hundred.

Captured are forward, loss, backward, clipping and the fused update of a batch that fits whole. What cannot be replayed
is found out by looking on at two eager steps, not guessed, and goes on as before, with one line in the log.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from common.batch import Batch, map_tree, tensors_of
from common.engine import memory

if TYPE_CHECKING:
    from common.engine.step import Engine, StepReport

EAGER_STEPS = 3  # of a shape before it is captured; the last two are looked at


class CudaGraph:
    """torch.cuda.CUDAGraph whose failed capture leaves the device's generator usable."""

    def __init__(self, device: torch.device):
        self._device, self._graph = device, None

    def capture(self, work: Callable[[], None]) -> None:
        with torch.cuda.device(self._device):
            graph, generator = torch.cuda.CUDAGraph(), torch.cuda.default_generators[torch.cuda.current_device()]
            spare = generator.clone_state()
            try:
                # Other threads of the process, a loader's, may go on as they like meanwhile.
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    work()
            except BaseException:
                generator.graphsafe_set_state(spare)  # else it would wait for the end of the capture for ever
                raise
            self._graph = graph

    def replay(self) -> None:
        self._graph.replay()


class Replay:
    """Takes the engine's steps: eagerly at first, then, for the shape that keeps coming, from a graph."""

    def __init__(self, engine: "Engine", graph: Callable[[torch.device], Any] = CudaGraph):
        self._engine, self._make = engine, graph
        self._key: tuple | None = None  # what the last steps had in common, and the graph stands for
        self._alike, self._seen, self._graph = 0, [], None
        self._refused = False

    def step(self, batch: Batch, step_number: int) -> "StepReport":
        engine = self._engine
        if self._refused or not engine.outcomes or not engine.fits_whole(batch):
            return engine.eager_step(batch, step_number)
        key = self._key_of(batch)
        if self._graph is not None:
            if key == self._key:
                return self._replayed(batch, step_number)
            return engine.eager_step(batch, step_number)  # the short last batch of an epoch
        if key != self._key:
            self._key, self._alike, self._seen = key, 0, []
        self._alike += 1
        if self._alike <= EAGER_STEPS - 2:
            return engine.eager_step(batch, step_number)
        if self._alike <= EAGER_STEPS:
            return self._watched(batch, step_number)
        return self._captured(batch, step_number)

    def give_up(self, why: str) -> None:
        """Drop the graph, and go on eagerly."""
        self._refused, self._graph, self._results, self._batch, self._held = True, None, None, None, None
        self._engine.log(f"steps are not replayed: {why}")

    def make_room(self) -> bool:
        """Give the memory of the graph back; whether there was one."""
        if self._graph is None:
            return False
        self.give_up("the graph leaves too little memory for the rest")
        memory.release()
        return True

    def _watched(self, batch: Batch, step_number: int) -> "StepReport":
        engine, watch = self._engine, Watch(self._engine)
        if engine.model._compiled_call_impl is not None:
            self.give_up("the model is compiled")
            return engine.eager_step(batch, step_number)
        report = engine.eager_step(batch, step_number, watch)
        self._seen.append(watch.seen)
        if why := watch.why:
            self.give_up(why)
        elif len(self._seen) == 2 and self._seen[0] != self._seen[1]:
            self.give_up("two steps of the same shape do not do the same")
        return report

    def _captured(self, batch: Batch, step_number: int) -> "StepReport":
        engine, device = self._engine, self._engine.device
        fresh = (batch.inputs, batch.targets, batch.weights)
        inputs, targets, weights = map_tree(lambda x: torch.empty_like(x, device=device).copy_(x), fresh)
        self._batch = replace(batch, inputs=inputs, targets=targets, weights=weights)
        groups = engine.optimizer.param_groups
        self._rates = [torch.full((), float(group["lr"]), device=device) for group in groups]
        self._set = [float(group["lr"]) for group in groups]
        graph = self._make(device)
        engine.seed_torch(step_number)
        try:
            graph.capture(self._work)
        except Exception as error:
            if not isinstance(error, (RuntimeError, MemoryError)):
                raise
            self.give_up(f"the capture failed ({str(error).splitlines()[0][:200]})")
        if self._refused:  # outside `except`, where what the capture took can be given back
            engine.forget_gradients()
            memory.release()
            return engine.eager_step(batch, step_number)
        self._held, self._graph = engine.forget_gradients(), graph
        return self._replayed(batch, step_number)

    def _work(self) -> None:
        """What the graph holds: a step over the batch that lies in its memory."""
        engine = self._engine
        engine.forget_gradients()
        with engine.capturing(), self._rates_on_the_device():
            self._results = engine.prepared(self._batch)
            engine.update_ahead()

    def _replayed(self, batch: Batch, step_number: int) -> "StepReport":
        engine = self._engine
        own, fresh = ((b.inputs, b.targets, b.weights) for b in (self._batch, batch))
        for held, given in zip(tensors_of(own), tensors_of(fresh), strict=True):
            held.copy_(given, non_blocking=True)
        for at, group in enumerate(engine.optimizer.param_groups):
            if group["lr"] != self._set[at]:
                self._set[at] = group["lr"]
                self._rates[at].fill_(group["lr"])
        engine.seed_torch(step_number)
        self._graph.replay()
        value, norm, outcome = self._results
        return engine.noted(batch, step_number, value.clone(), norm.clone(), outcome)

    @contextmanager
    def _rates_on_the_device(self) -> Iterator[None]:
        """Learning rates as tensors, for a number would be captured for ever."""
        groups = self._engine.optimizer.param_groups
        kept = [{name: group[name] for name in ("lr", "capturable") if name in group} for group in groups]
        try:
            for group, rate in zip(groups, self._rates, strict=True):
                group["lr"] = rate
                if "capturable" in group:
                    group["capturable"] = True
            yield
        finally:
            for group, values in zip(groups, kept, strict=True):
                group.update(values)

    def _key_of(self, batch: Batch) -> tuple:
        """All that a graph takes for granted."""
        engine = self._engine
        shapes = [(x.shape, x.dtype) for x in tensors_of((batch.inputs, batch.targets, batch.weights))]
        weights = [(parameter.data_ptr(), parameter.requires_grad) for parameter in engine.parameters]
        settings = [
            {name: value for name, value in group.items() if name not in ("params", "lr", "initial_lr")}
            for group in engine.optimizer.param_groups
        ]
        return shapes, weights, settings, engine.model.training, id(engine.optimizer.state)


class Watch(TorchDispatchMode):
    """Looks on at an eager step: what it does, and why that could not be replayed."""

    def __init__(self, engine: "Engine"):
        super().__init__()
        self._engine, self.seen, self.why = engine, [], ""

    def __enter__(self) -> "Watch":
        self._before = self._surroundings()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._surroundings() != self._before:
            self.why = "the model draws from random or np.random, or puts a new tensor in the place of a buffer"

    def __torch_dispatch__(self, operation: Any, types: Any, inputs: tuple = (), named: dict | None = None) -> Any:
        named = named or {}
        found = operation(*inputs, **named)
        if reads_the_device(operation, inputs):
            self.why = f"{operation} needs the host to read a result"
        devices = {x.device.type for x in (*inputs, found) if isinstance(x, Tensor) and x.ndim}
        to_the_device = operation.overloadpacket in TO_THE_DEVICE and found.device == self._engine.device
        if len(devices) > 1 and not to_the_device:
            self.why = f"{operation} works on {' and '.join(sorted(devices))}"
        self.seen.append((str(operation), [_described(value) for value in (*inputs, *named.values())]))
        return found

    def _surroundings(self) -> tuple:
        _, words, *rest = np.random.get_state()
        buffers = [(id(buffer), buffer.data_ptr()) for buffer in self._engine.model.buffers()]
        return random.getstate(), words.tobytes(), rest, buffers


INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
TO_THE_DEVICE = (torch.ops.aten._to_copy, torch.ops.aten.copy_)  # of the batch; in a graph it is there already


def reads_the_device(operation: Any, inputs: tuple) -> bool:
    """Whether the operation returns a number to the host, or a shape that depends on values: indexing does by masks."""
    if operation._schema.name in INDEXING:
        return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in inputs[1])
    return torch.Tag.data_dependent_output in operation.tags or torch.Tag.dynamic_output_shape in operation.tags


def _described(value: Any) -> Any:
    """A tensor by its shape, anything else by itself."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    return [_described(one) for one in value] if isinstance(value, (list, tuple)) else str(value)
