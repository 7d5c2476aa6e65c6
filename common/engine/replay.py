"""Steps of one shape replayed from a CUDA graph: the host launches one graph instead of hundreds of kernels.

The graph holds forward, loss, backward, clipping and the fused update of a batch, whole or in micro-batches that take
one pass. Two eager steps are recorded first, to find operations that cannot be replayed. If there are some, or if the
first step of the graph differs from the eager step from the same weights, the training stays eager and the log has a
line with the reason.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from common.batch import Batch, map_tree, tensors_of
from common.engine import memory
from common.errors import first_line

if TYPE_CHECKING:
    from common.engine.step import Engine, StepReport

MOST_OPERATIONS = 20_000  # of a step in many micro-batches: each takes memory in the graph, and time in its capture
NO_ROOM = "no memory is left to compare it with a normal step"
TOLERANCE = 0.02  # of the length of a step, plus the noise of eager steps; a wrong mask, rate or batch exceeds it


class CudaGraph:
    """A torch.cuda.CUDAGraph; a failed capture leaves generator, allocator and current stream as they were."""

    def __init__(self, device: torch.device):
        self._device, self._graph = device, None

    def capture(self, work: Callable[[], None]) -> None:
        # Enters the current stream too, since torch.cuda.graph does not restore it if the end of the capture raises.
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.current_stream(self._device)):
            graph, pool, card = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), torch.cuda.current_device()
            generator = torch.cuda.default_generators[card]
            spare = generator.clone_state()
            try:
                # thread_local: other threads of the process, such as a loader's, may use the card meanwhile.
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    work()
            except BaseException:
                generator.graphsafe_set_state(spare)  # else it would stay in capture mode for ever
                # Up to torch 2.12 the allocator takes an invalid capture for one that goes on: emptying its cache
                # fails, and memory used on two streams is never free again. If it knows better, it refuses to end it.
                with suppress(RuntimeError):
                    graph.reset()
                    torch._C._cuda_endAllocateToPool(card, pool)
                    torch._C._cuda_releasePool(card, pool)
                raise
            self._graph = graph

    def replay(self) -> None:
        self._graph.replay()


class Replay:
    """Takes the engine's steps: eagerly at first, then from a graph once batches of one shape follow each other."""

    def __init__(self, engine: "Engine", graph: Callable[[torch.device], Any] = CudaGraph):
        self._engine, self._make = engine, graph
        self._key: tuple | None = None  # of the last steps, and of the graph (see _key_of)
        self._graph = None
        self._seen: list[list] = []  # the operations of the recorded steps
        self._copies: list[list[list[Tensor]]] = []  # of a step's numbers, while the graph is made and compared
        self._refused = False

    def step(self, batch: Batch, step_number: int) -> "StepReport":
        engine = self._engine
        if self._refused or not self._can_replay(batch):
            return engine.eager_step(batch, step_number)
        key = self._key_of(batch)
        if self._graph is not None:
            if key == self._key:
                return engine.noted(batch, step_number, *self._launched(batch, step_number))
            return engine.eager_step(batch, step_number)  # the short last batch of an epoch
        if key != self._key:  # the first step of a shape may still set things up, so it is not recorded
            self._key, self._seen = key, []
            return engine.eager_step(batch, step_number)
        if len(self._seen) < 2:
            return self._watched(batch, step_number)
        return self._captured(batch, step_number)

    def _can_replay(self, batch: Batch) -> bool:
        """Whole, or in the micro-batches that were asked for.

        Not in those found by running out of memory, nor for a batch that stays on the host because it is large: a graph
        holds the whole batch on the card.
        """
        engine = self._engine
        if engine.passes.fits_whole(batch):
            return True
        given = tensors_of((batch.inputs, batch.targets, batch.weights))
        on_card = all(tensor.device == engine.device for tensor in given)
        return engine.micro_batch == engine.asked and on_card and engine.passes.takes_one_pass(batch)

    def forget(self) -> None:
        """Drop the graph, and make a new one when batches of one shape follow each other again."""
        self._key, self._graph, self._results, self._batch = None, None, None, None
        self._copies = []

    def give_up(self, why: str) -> None:
        """Drop the graph, log the reason and stay eager."""
        self.forget()
        self._refused = True
        self._engine.log(f"steps are not replayed as a CUDA graph: {why}")

    def make_room(self) -> bool:
        """Free the memory of the graph, or of copies for its comparison; return whether there was any."""
        if self._graph is None and not self._copies:
            return False
        self.give_up("it leaves too little memory for the rest" if self._graph else NO_ROOM)
        memory.release()
        return True

    def _watched(self, batch: Batch, step_number: int) -> "StepReport":
        engine, watch = self._engine, Watch(self._engine, batch)
        if engine.model._compiled_call_impl is not None:
            self.give_up("the model is compiled")
            return engine.eager_step(batch, step_number)
        report = engine.eager_step(batch, step_number, watch)
        self._seen.append(watch.seen)
        if engine.passes.generators.drawn:
            self.give_up("the model or the loss draws from random or np.random")
        elif watch.why:
            self.give_up(watch.why)
        elif len(self._seen) == 2 and self._seen[0] != self._seen[1]:
            self.give_up("two steps of the same shape run different operations")
        elif len(watch.seen) > MOST_OPERATIONS:
            self.give_up(f"{len(watch.seen)} operations are too many for one")
        return report

    def _captured(self, batch: Batch, step_number: int) -> "StepReport":
        """Take the step twice eagerly and once from the new graph, always from the same weights, and compare.

        An eager step that does not fit beside the copies drops them (`make_room`): it is then the only one.
        """
        engine, state = self._engine, self._written()
        if not self._copied(state):
            self.give_up(NO_ROOM)
            return engine.eager_step(batch, step_number)
        report = engine.eager_step(batch, step_number)
        if not self._refused and not (torch.isfinite(report.loss) and torch.isfinite(report.gradient_norm)):
            self._copies = []
            return report  # fp16 may begin with too large a factor: try again with the next step
        if not self._refused and not self._copied([*state, report[:2]]):
            self.give_up(NO_ROOM)
        if self._refused:
            return report
        _put_back(state, self._copies[0])
        again = engine.eager_step(batch, step_number)
        bounds, fits = (None, True) if self._refused else memory.attempt(partial(self._bounds, state, again))
        if not fits:
            self.give_up(NO_ROOM)
        if self._refused:
            return again
        start, once = self._copies
        _put_back(state, start)
        if why := self._failed_capture(batch):
            self.give_up(why)
        else:
            found, fits = memory.attempt(partial(self._first_launch, batch, step_number, state))
            if fits and all(far <= bound for far, bound in zip(found[1], bounds, strict=True)):
                self._copies = []
                return engine.noted(batch, step_number, *found[0])
            self.give_up(f"its step {step_number + 1} differs from the same step without it" if fits else NO_ROOM)
        _put_back(state, once)
        del start, once
        memory.release()
        return report

    def _bounds(self, state: list[list[Tensor]], again: "StepReport") -> list[float]:
        """How far the graph's step may be from the eager one, which has just been repeated, for each group."""
        start, once = self._copies
        sizes = _distances(once, [*start, [torch.zeros_like(number) for number in once[-1]]])
        noises = _distances([*state, again[:2]], once)
        return [TOLERANCE * size + 4 * noise for size, noise in zip(sizes, noises, strict=True)]

    def _first_launch(self, batch: Batch, step_number: int, state: list[list[Tensor]]) -> tuple[tuple, list[float]]:
        """Value, norm and outcome of the graph's step, and its distances from the eager one."""
        value, norm, outcome = self._launched(batch, step_number)
        return (value, norm, outcome), _distances([*state, [value, norm]], self._copies[1])

    def _copied(self, groups: list[Sequence[Tensor]]) -> bool:
        """Keep copies of the tensors, if there is memory for them."""
        copies, fits = memory.attempt(partial(_copies, groups))
        self._copies += [copies] if fits else []
        return fits

    def _failed_capture(self, batch: Batch) -> str:
        """Capture a step; return why that failed, or an empty text.

        The batch and the learning rates are zeros, so that a graph which keeps them fails the comparison later.
        """
        engine, device = self._engine, self._engine.device
        given = (batch.inputs, batch.targets, batch.weights)
        memory.release()  # an old autograd graph in a cycle keeps gradients on its own stream, outside the capture
        try:
            inputs, targets, weights = map_tree(lambda x: torch.zeros_like(x, device=device), given)
            self._batch = replace(batch, inputs=inputs, targets=targets, weights=weights)
            self._rates = [torch.zeros((), device=device) for _ in engine.optimizer.param_groups]
            graph = self._make(device)
            graph.capture(self._work)
            self._graph = graph
        except Exception as error:  # of any kind: the same step has just worked without a capture
            return f"the capture failed ({first_line(error)})"
        finally:
            engine.passes.drop_gradients()
        return ""

    def _work(self) -> None:
        """The work that is captured: a step over the batch in the graph's own memory."""
        engine = self._engine
        engine.passes.drop_gradients()
        with engine.passes.capturing(), self._rates_on_the_device():
            self._results = engine.prepared(self._batch)
            engine.update_ahead()

    def _launched(self, batch: Batch, step_number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Replay the graph over the batch; returns value, norm and outcome of the step."""
        engine = self._engine
        own, fresh = ((b.inputs, b.targets, b.weights) for b in (self._batch, batch))
        for held, given in zip(tensors_of(own), tensors_of(fresh), strict=True):
            held.copy_(given, non_blocking=True)
        for rate, group in zip(self._rates, engine.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        engine.passes.generators.seed_torch(step_number)
        self._graph.replay()
        value, norm, outcome = self._results
        return value.clone(), norm.clone(), outcome

    def _written(self) -> list[list[Tensor]]:
        """The tensors that a step changes: weights, buffers, optimizer state, fp16 factor."""
        engine = self._engine
        states = [value for state in engine.optimizer.state.values() for value in state.values()]
        return [
            [parameter.data for parameter in engine.parameters],
            [*engine.passes.buffers.present(), *engine.passes.loss_buffers.present()],
            [value for value in states if isinstance(value, Tensor)],
            [engine.scale.factor, engine.scale.good_steps] if engine.scale.enabled else [],
        ]

    @contextmanager
    def _rates_on_the_device(self) -> Iterator[None]:
        """Turn learning rates into tensors inside the block, because the graph would fix plain numbers for ever."""
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
        """Everything that must stay the same for a graph to be valid."""
        engine = self._engine
        shapes = [(x.shape, x.dtype) for x in tensors_of((batch.inputs, batch.targets, batch.weights))]
        weights = [(parameter.data_ptr(), parameter.requires_grad) for parameter in engine.parameters]
        settings = [
            {name: value for name, value in group.items() if name not in ("params", "lr", "initial_lr")}
            for group in engine.optimizer.param_groups
        ]
        return shapes, weights, settings, engine.micro_batch, engine.model.training, id(engine.optimizer.state)


class Watch(TorchDispatchMode):
    """Records the operations of an eager step (`seen`), and why they cannot be replayed (`why`, empty if they can)."""

    def __init__(self, engine: "Engine", batch: Batch):
        super().__init__()
        self._engine, self.seen, self.why = engine, [], ""
        given = tensors_of((batch.inputs, batch.targets, batch.weights))
        self._given = {tensor.untyped_storage().data_ptr() for tensor in given}

    def __enter__(self) -> "Watch":
        self._before = self._buffers()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._buffers() != self._before:
            self.why = "the model replaces a buffer by a new tensor"

    def __torch_dispatch__(self, operation: Any, types: Any, inputs: tuple = (), named: dict | None = None) -> Any:
        named = named or {}
        found = operation(*inputs, **named)
        if reads_the_device(operation, inputs):
            self.why = f"{operation} makes the CPU wait for a result"
        arrays = [x for x in (*inputs, found) if isinstance(x, Tensor) and x.ndim]
        devices = {x.device.type for x in arrays}
        if len(devices) > 1 and not self._moves_the_batch(operation, arrays):
            self.why = f"{operation} works on {' and '.join(sorted(devices))}"
        self.seen.append((str(operation), [_described(value) for value in (*inputs, *named.values())]))
        return found

    def _moves_the_batch(self, operation: Any, arrays: list[Tensor]) -> bool:
        """Whether the batch goes to the device; a replay would read any other memory of the host after it is freed."""
        if operation.overloadpacket not in TO_THE_DEVICE or arrays[-1].device != self._engine.device:
            return False
        on_host = [x for x in arrays if x.device != self._engine.device]
        return all(x.untyped_storage().data_ptr() in self._given for x in on_host)

    def _buffers(self) -> list[tuple[int, int]]:
        return [(id(buffer), buffer.data_ptr()) for buffer in self._engine.model.buffers()]


def _copies(groups: list[Sequence[Tensor]]) -> list[list[Tensor]]:
    return [[tensor.clone() for tensor in group] for group in groups]


def _put_back(groups: list[Sequence[Tensor]], copies: list[list[Tensor]]) -> None:
    for group, copied in zip(groups, copies, strict=False):  # numbers of a report, at the end, stay out
        memory.copy_(group, copied)


def _distances(groups: list[Sequence[Tensor]], others: list[Sequence[Tensor]]) -> list[float]:
    """The Euclidean distance of each group of tensors from that in `others`; NaN if one of them has a NaN."""

    def square(one: Tensor, other: Tensor) -> Tensor:
        one, other = one.double(), other.double()
        return torch.where(one == other, 0.0, one - other).square().sum()  # equal infinities: 0

    pairs = [zip(group, other, strict=True) for group, other in zip(groups, others, strict=True)]
    return [float(sum(square(one, other) for one, other in pair)) ** 0.5 for pair in pairs]


INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
TO_THE_DEVICE = (torch.ops.aten._to_copy, torch.ops.aten.copy_)  # copy the batch, which a graph holds already


def reads_the_device(operation: Any, inputs: tuple) -> bool:
    """Whether the host reads a number back, or the result's shape depends on values, as in indexing by a mask."""
    if operation._schema.name in INDEXING:
        return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in inputs[1])
    return torch.Tag.data_dependent_output in operation.tags or torch.Tag.dynamic_output_shape in operation.tags


def _described(value: Any) -> Any:
    """Shape and dtype of a tensor, the text of anything else; lists item by item."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    return [_described(one) for one in value] if isinstance(value, (list, tuple)) else str(value)
