"""Predictions, one tensor or a flat dict of tensors: average them, take rows of them, keep them on disk."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.files import not_read, read_npy, replacing, write_text

Predictions = Any  # a tensor or array [n, ...], or a flat dict of them


def leaves(predictions: Predictions) -> dict[str, Any]:
    """The tensors or arrays of predictions by name; a single one has the name ''."""
    return predictions if isinstance(predictions, dict) else {"": predictions}


def check_names(predictions: Predictions) -> None:
    """Raises UserError for names that cannot be part of a file's name."""
    for name in leaves(predictions):
        if not isinstance(name, str) or "/" in name:
            raise UserError(
                f"predictions are named {name!r}: expected a text without /, as in {{'masks': ...}}, in the "
                f"dict that build()'s Postprocess or fit_predict gives"
            )


def rebuilt(parts: dict[str, Any]) -> Predictions:
    """The predictions whose `leaves` these are."""
    return parts.get("", parts)


def part_of(predictions: Predictions, part: Any) -> Predictions:
    """Some of the rows: `part` is a row number, a slice or an array, as numpy and torch take them."""
    return rebuilt({name: values[part] for name, values in leaves(predictions).items()})


def count_of(predictions: Predictions) -> int:
    """The number of rows."""
    return len(next(iter(leaves(predictions).values())))


def mean_of(predictions: Sequence[Predictions]) -> Predictions:
    """The mean over several predictions of the same samples; tensors that are not floating-point stay the first's."""
    if len(predictions) == 1:
        return predictions[0]

    def mean(first: Tensor, *others: Tensor) -> Tensor:
        return sum(others, start=first) / len(predictions) if first.is_floating_point() else first

    parts = [leaves(one) for one in predictions]
    return rebuilt({name: mean(*(part[name] for part in parts)) for name in parts[0]})


def pack(predictions: Tensor | np.ndarray, kind: str) -> np.ndarray:
    """Predictions [B, ...] as they are kept on disk; uint8 holds probabilities in 255 steps.

    Raises UserError for numbers that the dtype `kind` cannot hold.
    """
    array = predictions.detach().cpu().numpy() if isinstance(predictions, Tensor) else np.asarray(predictions)
    array = np.rint(array * 255) if kind == "uint8" else array
    with np.errstate(over="ignore", invalid="ignore"):
        packed = array.astype(kind)
    if not (np.array_equal(packed, array) if kind == "uint8" else np.isfinite(packed).all()):
        low, high = (float(value) / (255 if kind == "uint8" else 1) for value in (array.min(), array.max()))
        raise UserError(
            f"predictions from {low:.5g} to {high:.5g} cannot be kept as {kind}: expected probabilities for uint8, and "
            f'smaller numbers for float16, or build()\'s Postprocess with kept="float32"'
        )
    return packed


def pack_all(predictions: Predictions, kept: str | dict[str, str]) -> dict[str, np.ndarray]:
    """`pack` every leaf, as the dtype `kept` or as its own."""
    kinds = kept if isinstance(kept, dict) else dict.fromkeys(leaves(predictions), kept)
    return {leaf: pack(values, kinds[leaf]) for leaf, values in leaves(predictions).items()}


def unpack(kept: Predictions) -> Predictions:
    """Undo `pack`: float32 tensors [B, ...] (float64 if kept as float64), or a dict of these."""
    if isinstance(kept, dict):
        return {name: unpack(part) for name, part in kept.items()}
    exact = kept.astype(np.float64 if kept.dtype == np.float64 else np.float32)
    return torch.from_numpy(exact / (255 if kept.dtype == np.uint8 else 1))


class PredictionWriter:
    """Writes predictions batch by batch into <folder>/<name>.npy, or one <name>.<leaf>.npy for every leaf.

    Predictions of masks do not fit into memory as a whole. All files are put in place together, when the block ends.
    """

    def __init__(self, folder: Path, name: str, rows: int, kept: str | dict[str, str]):
        self.folder, self.name, self.rows, self.kept = folder, name, rows, kept
        self.done, self._stack = 0, ExitStack()
        self._streams: dict[str, tuple[IO, np.dtype, tuple]] = {}

    def add(self, predictions: Predictions) -> None:
        self.add_packed(pack_all(predictions, self.kept))

    def add_packed(self, parts: dict[str, np.ndarray]) -> None:
        """Add arrays that already have the kept dtype, by their names in `leaves`."""
        for leaf, packed in parts.items():
            if leaf not in self._streams:
                file = self.folder / f"{self.name}{leaf and '.'}{leaf}.npy"
                stream = self._stack.enter_context(replacing(file))
                self._streams[leaf] = stream, packed.dtype, packed.shape[1:]
                write_npy_header(stream, packed.dtype, (self.rows, *packed.shape[1:]))
            stream, _, shape = self._streams[leaf]
            if packed.shape[1:] != shape:
                raise UserError(
                    f"the {self.name} predictions{' ' * bool(leaf)}{leaf} of a row have the shape "
                    f"{list(packed.shape[1:])}, those of the rows before {list(shape)}, and one array keeps them all: "
                    f"give them one shape in build(), in the dataset or in Postprocess's `predict`"
                )
            stream.write(np.ascontiguousarray(packed).data)
        self.done += len(packed)

    def __enter__(self) -> "PredictionWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None and self.done < self.rows:  # unreadable images were left out
            for stream, dtype, shape in self._streams.values():
                stream.seek(0)
                write_npy_header(stream, dtype, (self.done, *shape))  # as long as before: numpy pads it
        self._stack.__exit__(*error)


def write_predictions(folder: Path, name: str, predictions: Predictions, count: int, kept: str | dict) -> None:
    """Write predictions [count, ...] at once; raises UserError for another number of rows and for NaN or infinity."""
    check_names(predictions)
    for leaf, values in leaves(predictions).items():
        if len(values) != count:
            raise UserError(f"{name} predictions{' ' * bool(leaf)}{leaf}: {len(values)} rows, expected {count}")
        if not np.isfinite(np.asarray(values, np.float64)).all():
            raise UserError(f"{name} predictions{' ' * bool(leaf)}{leaf} have values that are NaN or infinite")
    with PredictionWriter(folder, name, count, kept) as writer:
        writer.add(predictions)


def write_ids(folder: Path, name: str, ids: Iterable[Any]) -> None:
    """Write the ids of the rows of the predictions `name`, one per line."""
    write_text(folder / f"{name}_ids.txt", "".join(f"{one}\n" for one in ids))


def read_ids(folder: Path, name: str, again: str = "") -> list[str]:
    """The ids that `write_ids` wrote; raises UserError when they are damaged, or not as many as the predictions.

    `again` is passed to `not_read`.
    """
    file, kept = folder / f"{name}_ids.txt", read_predictions(folder, name, again)
    try:
        found = file.read_bytes().decode().split("\n")[:-1]  # no splitlines: an id may hold other line separators
        if kept is not None and len(found) != count_of(kept):
            raise ValueError(f"{len(found)} ids, expected {count_of(kept)} for the predictions beside it")
    except (ValueError, OSError) as error:
        raise not_read(file, error, again) from error
    return found


def row_numbers(folder: Path, name: str, ids: Iterable[Any]) -> np.ndarray:
    """The places in `ids` of the rows of the predictions `name`, int64 [m]."""
    row_of = {str(one): row for row, one in enumerate(ids)}
    return np.array([row_of[one] for one in read_ids(folder, name)], np.int64)


def read_predictions(folder: Path, name: str, again: str = "") -> Predictions | None:
    """The predictions kept under `name`, as memory-mapped arrays [n, ...]; None where there are none.

    `again` is passed to `not_read`.
    """
    files = {file.name[len(name) + 1 : -4]: file for file in folder.glob(f"{name}.*npy")}
    return rebuilt({leaf: read_npy(file, again) for leaf, file in sorted(files.items())}) if files else None


def writable(kept: Predictions) -> Predictions:
    """What `read_predictions` gave, mapped anew: changes stay in memory, neither the file nor `kept` sees them."""
    try:
        return rebuilt({leaf: np.lib.format.open_memmap(part.filename, "c") for leaf, part in leaves(kept).items()})
    except OSError:  # more than the system promises: a file that is larger than the memory
        return kept


def remove_predictions(folder: Path, name: str) -> None:
    for file in folder.glob(f"{name}.*npy"):
        file.unlink()


def write_npy_header(stream: IO, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """Write the header of a .npy file; the array's numbers must follow it."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
