"""A CUDA card in software: finds tensors on the wrong device, and steps that wait for the card, without having one.

Its tensors say `cuda:0`, hold their data on the CPU, are refused by numpy and by operations with CPU tensors.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from common.engine.replay import CudaGraph

CARD = torch.device("cuda", 0)
COPIES = {"_to_copy", "copy_", "_foreach_copy_"}  # may have tensors of both devices
INDEXED = {"index", "index_put_", "_index_put_impl_"}  # a tensor on the card may be indexed by one that is not
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal"}
reads: list[str] = []  # what the host has waited for since the list was last cleared


class OnCard(torch.Tensor):
    """A tensor on the card; `held` has its data. C++ takes it for a meta tensor, so that autograd needs no card."""

    device, is_cuda, is_cpu, is_meta = CARD, True, False, False
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        with torch.inference_mode(held.is_inference()):  # in that mode, views of other tensors are none of its own
            made = torch.Tensor._make_wrapper_subclass(cls, held.shape, device="meta", **layout)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, operation, types, given=(), named=None):
        return computed(operation, given, named or {})

    @property
    def data(self):
        return OnCard(self.held)

    @data.setter
    def data(self, other):
        assert isinstance(other, OnCard) and other.stride() == self.stride(), "the card's tensors keep device, layout"
        self.held = other.held

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = pin_memory = numpy

    def tolist(self):
        return self.cpu().tolist()

    def record_stream(self, stream):
        pass

    def __reduce_ex__(self, protocol):
        return self.cpu().__reduce_ex__(protocol)

    def __repr__(self):
        return f"OnCard({self.held})"


def computed(operation, given: tuple, named: dict):
    """The results of an operation, on the device where a real card would have put them."""
    if _has_parts(operation):  # those on tensors of inference mode arrive here before torch has taken them apart
        with _Everywhere():
            return operation.decompose(*given, **named)
    name, tensors = operation.overloadpacket.__name__, [x for x in tree_leaves((given, named)) if torch.is_tensor(x)]
    cards = [x for x in tensors if isinstance(x, OnCard)]
    if cards and name not in COPIES:
        ours = name in INDEXED and isinstance(given[0], OnCard)
        checked = tree_leaves((given[0], given[2:], named)) if ours else tensors
        if [x for x in checked if torch.is_tensor(x) and not isinstance(x, OnCard) and x.ndim]:
            raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found cuda:0 and cpu")
    asked = named.get("device")
    to_card = bool(cards) if asked is None else torch.device(asked).type in ("cuda", "meta")
    if name == "copy_":
        to_card = isinstance(given[0], OnCard)
    masked = name in INDEXED and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in given[1])
    waits = given[-1] is not True if name == "copy_" else not named.get("non_blocking")
    if cards and (name in WAITS or masked or (name in COPIES and not to_card and waits)):
        reads.append(name)
    named = {key: value for key, value in named.items() if key != "pin_memory"}
    if asked is not None:
        named["device"] = torch.device("cpu")
    result = operation(*tree_map(_held, given), **tree_map(_held, named))
    known = {id(_held(x)): x for x in tensors}  # operations in place return a tensor that was given
    return tree_map(lambda x: known.get(id(x)) if id(x) in known else _on(x, to_card), result)


@cache
def _has_parts(operation) -> bool:
    return operation.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)


def _held(x):
    return x.held if isinstance(x, OnCard) else x


def _on(x, card: bool):
    return OnCard(x) if card and torch.is_tensor(x) else x


class _Everywhere(TorchDispatchMode):
    """Handles what makes tensors on the card from none there."""

    def __torch_dispatch__(self, operation, types, given=(), named=None):
        return computed(operation, given, named or {})


def _enter() -> _Everywhere:
    """Let this thread make tensors on the card."""
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) too passes through the mode
    return _Everywhere().__enter__()


@contextmanager
def simulated_card() -> Iterator[None]:
    """Inside the block this process has one CUDA card, whose random numbers are those of the CPU."""
    cuda, cpu = torch.cuda, torch.cpu
    facts = SimpleNamespace(total_memory=2**34, name="simulated card")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "get_device_capability": lambda device=None: (8, 0),
            "get_device_properties": lambda device=None: facts,
            "get_device_name": lambda device=None: facts.name,
            "max_memory_allocated": lambda device=None: 0,
            "is_current_stream_capturing": lambda: False,
            "default_generators": (torch.default_generator,),
            "Stream": lambda device=None: cpu.Stream(),
            "Event": cpu.Event,
            "stream": cpu.stream,
            "current_stream": cpu.current_stream,
        }.items():
            patch.setattr(cuda, name, value)
        for of in ("_accelerator", "_cuda"):  # the name in torch 2.14, and that of earlier versions
            name = f"{of}_graph_capture_health_check"
            patch.setattr(torch.optim.Optimizer, name, lambda optimizer: None, raising=False)
        patch.setattr(CudaGraph, "capture", lambda graph, work: setattr(graph, "_graph", SimpleNamespace(replay=work)))
        in_thread = partial(ThreadPoolExecutor, initializer=_enter)  # modes are those of a thread
        patch.setattr("common.predict.ThreadPoolExecutor", in_thread)
        patch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
        patch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)  # of the CPU too
        patch.setattr(torch.backends.cudnn, "benchmark", False)
        reads.clear()
        mode = _enter()
        try:
            yield
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
            mode.__exit__(None, None, None)
