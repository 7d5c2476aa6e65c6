"""Finds the random generators that a dataset holds and restarts them for every sample.

A worker process gets a copy of every generator, so without this all workers draw the same numbers. albumentations
2.0.8 repeats them in every worker and every epoch, and gives all transforms of a Compose(seed=...) one seed. Here its
transforms get one shared pair of generators, once per process.
"""

import dis
import random
import site
import sys
import sysconfig
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

from common.errors import UserError
from common.loading.keys import KeyedGenerator

GLOBAL_RANDOM = random.seed.__self__  # the instance behind random.random() and its siblings
GLOBAL_GENERATORS = (GLOBAL_RANDOM, np.random.mtrand._rand, torch.default_generator)
GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator, torch.Generator)
LEAVES = (
    str,
    bytes,
    int,
    float,
    complex,
    bool,
    type(None),
    type,
    types.ModuleType,
    torch.Tensor,
    np.generic,
    np.dtype,
    PurePath,  # a data set of images holds hundreds of thousands
)
LIBRARIES = tuple({*site.getsitepackages(), *map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib"))})
REPLACED = (".random_generator", ".py_random")  # attributes that set_random_state overwrites
KEYED = KeyedGenerator()  # shared by all loaders of a process, whose datasets may share a transform


class Binding:
    """Binds a dataset's generators to the key of the sample that is loaded; made once in every process.

    Raises UserError naming the attribute when the dataset holds a generator that cannot be restarted.
    """

    def __init__(self, dataset: Any, seed: int):
        self._seed, self._restart = seed, []
        for path, found in held_generators(dataset):
            if _takes_generators(found):
                # The global `random` serves as its second generator: seeding another would cost 4 us a sample.
                found.set_random_state(KEYED.generator, GLOBAL_RANDOM)
            else:
                self._restart.append(_restarter(path, found))

    def rekey(self, epoch: int, index: int, draw: int = 0) -> np.random.Generator:
        """Restart all generators of the process at the sample's key; returns the one to pass to the dataset."""
        generator = KEYED.jump(self._seed, epoch, index, draw)
        words = KEYED.words()  # three for the global generators, one is spare
        GLOBAL_RANDOM.seed(words[0])
        np.random.seed(words[1] & 0xFFFFFFFF)
        torch.default_generator.manual_seed(words[2] & 0xFFFFFFFF)  # torch.manual_seed would take 100 us
        for restart in self._restart:
            restart(KEYED.words())
        return generator


@contextmanager
def kept_global_state() -> Iterator[None]:
    """Restore the global generators of `random`, `np.random` and torch after the block."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def held_generators(dataset: Any) -> list[tuple[str, Any]]:
    """Every generator or albumentations transform reachable from the dataset, with its path ("dataset.noise[2].rng").

    Looks into attributes, containers, partials and bound methods. For functions outside of installed libraries it
    also looks into closures, defaults, and the variables that they use of their own module and of imported ones.
    """
    found, seen, waiting = [], {}, [("dataset", dataset)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, LEAVES) or id(value) in seen or any(value is known for known in GLOBAL_GENERATORS):
            continue
        seen[id(value)] = value  # kept alive, so that no other object gets its id
        if isinstance(value, GENERATORS):
            found.append((path, value))
        elif _takes_generators(value):
            found.append((path, value))
            waiting.extend(part for part in _parts(path, value) if not part[0].endswith(REPLACED))  # functions in it
        else:
            waiting.extend(_parts(path, value))
    return found


def refuse_generators(dataset: Any) -> None:
    """Raises UserError naming a generator that a dataset of batches holds."""
    for path, found in held_generators(dataset):
        raise UserError(
            f"{path} is a {type(found).__name__}, but batch(indices, keys) may draw only from `keys`: other random "
            "numbers would depend on which samples share a batch"
        )


def _parts(path: str, value: Any) -> Iterable[tuple[str, Any]]:
    """The objects directly inside `value`, with their paths."""
    if isinstance(value, (dict, list, tuple, set, frozenset, deque)):
        named = value.items() if isinstance(value, dict) else enumerate(value)
        yield from ((f"{path}[{name!r}]", part) for name, part in named if not isinstance(part, LEAVES))
    elif isinstance(value, np.ndarray):
        if value.dtype == object:
            yield from _parts(path, value.ravel().tolist())
    elif isinstance(value, types.MethodType):
        yield from ((path, value.__self__), (path, value.__func__))
    elif isinstance(value, types.BuiltinFunctionType):
        yield path, value.__self__  # rng.random kept as a function
    elif isinstance(value, types.FunctionType):
        yield from _parts_of_function(path, value)
    elif isinstance(value, partial):
        yield from ((f"{path}.func", value.func), (f"{path}.args", value.args), (f"{path}.keywords", value.keywords))
    elif type(value).__module__.partition(".")[0] not in ("pandas", "pyarrow"):
        yield from _parts_of_object(path, value)


def _parts_of_object(path: str, value: Any) -> Iterable[tuple[str, Any]]:
    for attribute, part in getattr(value, "__dict__", {}).items():
        if not isinstance(part, LEAVES):
            yield f"{path}.{attribute}", part
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            yield f"{path}.{slot}", getattr(value, slot, None)
        for attribute, part in vars(kind).items():
            if isinstance(part, (staticmethod, classmethod)):
                part = part.__func__
            if isinstance(part, types.FunctionType):
                if not _is_library(part.__code__.co_filename):
                    yield f"{path}.{attribute}", part
            elif isinstance(part, (*GENERATORS, list, tuple, dict)) or _takes_generators(part):
                yield f"{path}.{attribute}", part  # class attributes


def _parts_of_function(path: str, function: types.FunctionType) -> Iterable[tuple[str, Any]]:
    if _is_library(function.__code__.co_filename):
        return
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f"{path}:{name}", cell.cell_contents
        except ValueError:
            continue  # the cell of a name that was never assigned
    yield f"{path}:defaults", (function.__defaults__, function.__kwdefaults__)
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes.extend(constant for constant in code.co_consts if isinstance(constant, types.CodeType))
        seen, names = set(), set(code.co_names)
        for instruction in dis.get_instructions(code):
            name = instruction.argval
            if instruction.opname == "LOAD_GLOBAL" and name in function.__globals__:
                yield from _reached(f"{function.__module__}.{name}", function.__globals__[name], names, seen)
            elif instruction.opname == "IMPORT_NAME" and name in sys.modules:
                yield from _reached(name, sys.modules[name], names, seen)


def _reached(path: str, value: Any, names: set[str], seen: set[str]) -> Iterable[tuple[str, Any]]:
    """The value itself; for a module outside of installed libraries its variables in `names`, nested modules too."""
    if not isinstance(value, types.ModuleType):
        yield path, value
    elif value.__name__ not in seen and not _is_library(getattr(value, "__file__", None)):
        seen.add(value.__name__)
        for name in names & vars(value).keys():
            yield from _reached(f"{value.__name__}.{name}", vars(value)[name], names, seen)


def _is_library(file: str | None) -> bool:
    """Whether a source file belongs to Python or to an installed package."""
    return file is None or file.startswith((*LIBRARIES, "<frozen"))


def _takes_generators(value: Any) -> bool:
    """True for albumentations' transforms and compositions, which hand a pair of generators on to their parts."""
    return callable(getattr(type(value), "set_random_state", None)) and hasattr(value, "py_random")


def _restarter(path: str, generator: Any) -> Callable[[list[int]], Any]:
    """A function that restarts `generator` from four 64-bit words; raises UserError if that is impossible."""
    if isinstance(generator, random.Random) and not isinstance(generator, random.SystemRandom):
        return lambda words: generator.seed(words[0])
    if isinstance(generator, torch.Generator) and generator.device.type == "cpu":
        return lambda words: generator.manual_seed(words[0] & 0xFFFFFFFF)
    if isinstance(generator, np.random.RandomState) and isinstance(generator._bit_generator, np.random.MT19937):
        return lambda words: generator.seed(words[0] & 0xFFFFFFFF)
    if isinstance(generator, np.random.Generator):
        return _restarter(path, generator.bit_generator)
    if isinstance(generator, np.random.MT19937):
        return lambda words: generator._legacy_seeding(words[0] & 0xFFFFFFFF)
    if isinstance(generator, (np.random.PCG64, np.random.PCG64DXSM, np.random.Philox, np.random.SFC64)):
        unused = generator.state | {"buffer_pos": 4, "has_uint32": 0, "uinteger": 0}  # no word is left of a draw
        return lambda words: setattr(generator, "state", unused | {"state": _numpy_state(generator, words)})
    kind = f"{type(generator).__module__}.{type(generator).__name__}"
    raise UserError(
        f"{path} is a {kind}, which cannot be restarted for every sample, so batches would depend on the "
        f"number of workers: draw from the `rng` of sample(index, rng), or hold a np.random.Generator"
    )


def _numpy_state(generator: np.random.BitGenerator, words: list[int]) -> dict[str, Any]:
    """The state of a Philox, SFC64 or PCG64 generator that starts with these four words."""
    if isinstance(generator, np.random.Philox):
        return {"key": np.array(words[:2], np.uint64), "counter": np.array([0, 0, *words[2:]], np.uint64)}
    if isinstance(generator, np.random.SFC64):
        return {"state": np.array(words, np.uint64)}
    return {"state": words[0] << 64 | words[1], "inc": words[2] << 64 | words[3] | 1}
