"""One frozen dataclass is the configuration; its fields are the flags, the help text and the run's config.json."""

import argparse
import difflib
import json
import types
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from common.errors import UserError

ConfigType = TypeVar("ConfigType", bound="Config")


def flag(default: Any, help: str, unit: str = "") -> Any:
    """A field of a Config that is also a command-line flag: its default, a line of help and the unit of its value."""
    return field(default=default, metadata={"help": help, "unit": unit})


@dataclass(frozen=True)
class Config:
    """What every competition can set. A competition extends it by one level and names its recipes beside it."""

    # What is trained on.
    fold: str = flag("0", "fold to hold out for validation; 'all' trains every fold, 'none' trains on everything")
    folds: int = flag(5, "number of folds")
    seed: int = flag(0, "seed of the folds, the order, the augmentation, the weights and the dropout")
    # The optimizer step.
    epochs: int = flag(10, "passes over the training part", "epochs")
    batch_size: int = flag(64, "effective batch: samples of one optimizer step, over all processes", "samples")
    micro_batch: int | Literal["auto"] = flag(
        "auto", "samples on the device at once; the step is that of the whole batch (but for BatchNorm)", "samples"
    )
    optimizer: Literal["adamw", "adam", "radam", "sgd"] = flag("adamw", "optimizer; sgd uses Nesterov momentum")
    lr: float = flag(1e-3, "peak learning rate", "per optimizer step")
    weight_decay: float = flag(
        1e-2, "weight decay, decoupled for adamw and radam, in the gradient of others; none on biases and normalisation"
    )
    momentum: float = flag(0.9, "momentum of sgd, beta1 of the others")
    schedule: Literal["cosine", "onecycle", "linear", "step", "constant"] = flag("cosine", "learning rate over the run")
    warmup: float = flag(0.05, "part of the run in which the learning rate rises", "fraction of the steps")
    clip_norm: float = flag(0.0, "largest norm of the window's gradient; 0 never clips")
    ema: float = flag(
        0.0, "decay of the moving average of the weights, which is evaluated and kept; 0 is off", "per step"
    )
    swa: float = flag(
        0.0,
        "keep the plain mean of the weights over this last part of the steps, with BatchNorm's statistics estimated "
        "again for it at the end (validations before have their mean); 0 is off",
        "fraction of the steps",
    )
    # Evaluation and stopping.
    evaluate_every: int = flag(1, "validate after this many epochs; the last epoch always", "epochs")
    keep: Literal["best", "last"] = flag("best", "weights to keep: of the best validation or of the last step")
    patience: int = flag(0, "stop after this many validations without a better score; 0 never stops", "validations")
    views: bool = flag(True, "average the test-time views of the competition")
    # The machine: these change speed and memory only (low precisions round).
    device: str = flag("auto", "auto, cpu, cuda or mps")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = flag("auto", "auto is bf16 where the hardware has it")
    workers: int = flag(2, "processes that read and augment files; data held as tensors needs none", "processes")
    threads: int = flag(0, "CPU threads of the training process; 0 lets torch decide", "threads")
    checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, more time")
    keep_memory: bool = flag(True, "on a CPU, keep freed memory for the next step: faster, but a higher peak")
    compile: bool = flag(False, "torch.compile the model: a minute more at the start, faster steps")
    channels_last: bool = flag(False, "keep image tensors in channels-last order")
    save_every: float = flag(60.0, "least time between two checkpoints inside an epoch", "seconds")
    bad_images: Literal["raise", "skip"] = flag("raise", "stop at an unreadable image, or leave it out and list it")


# Fields that change where and how fast a run computes but not what it computes: a resumed run may differ in them.
MACHINE_FIELDS = frozenset({"micro_batch", "workers", "save_every", "bad_images", "checkpointing", "keep_memory"})


def _choices(hint: Any) -> tuple[Any, ...]:
    """The literal values that a type allows: Literal["a", "b"] and int | Literal["auto"] alike."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(choice for part in get_args(hint) for choice in _choices(part))
    return ()


def _parse_value(name: str, hint: Any, text: str) -> Any:
    """Text of a flag to a value of its type; raises UserError naming the flag, the value and what is expected."""
    if text in _choices(hint):
        return text
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        values = tuple(_parse_value(name, item, part) for part in text.replace("x", ",").split(",") if part)
        expected = len(get_args(hint)) if get_args(hint)[-1] is not Ellipsis else len(values)
        if len(values) != expected:
            raise UserError(f"--{name} {text}: expected {expected} values separated by commas, found {len(values)}")
        return values
    if hint is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if text.lower() in words:
            return words[text.lower()]
    kinds = [part for part in (get_args(hint) or (hint,)) if part in (int, float, str)]
    for kind in kinds:
        try:
            return kind(text)
        except ValueError:
            continue
    raise UserError(f"--{name} {text}: expected {_type_text(hint)}. See --help")


def _type_text(hint: Any) -> str:
    if get_origin(hint) is tuple:
        return ",".join(_type_text(item) for item in get_args(hint) if item is not Ellipsis)
    names = [part.__name__ for part in (get_args(hint) or (hint,)) if isinstance(part, type)]
    return "|".join([*names, *map(str, _choices(hint))]).replace("bool", "true|false")


def _value_text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


class Parser(argparse.ArgumentParser):
    """argparse that raises UserError and names the nearest flag for one that it does not know."""

    def error(self, message: str) -> None:
        raise UserError(f"{message}. See: {self.prog} --help")

    def parse_args(self, args: list[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UserError(f"unknown flag {unknown[0]}.{hint} See: {self.prog} --help")
        return known


def add_flags(parser: argparse.ArgumentParser, config: Config) -> None:
    """Give `parser` a flag for every field of the config's class; the help shows `config`'s values as the defaults."""
    hints = get_type_hints(type(config))
    for item in fields(config):
        name, unit = item.name.replace("_", "-"), item.metadata.get("unit", "")
        default = _value_text(getattr(config, item.name))
        help_text = f"{item.metadata.get('help', '')} [{default}{' ' + unit if unit else ''}]".replace("%", "%%")
        optional_value = {"nargs": "?", "const": "true"} if hints[item.name] is bool else {}
        parser.add_argument(
            f"--{name}",
            dest=item.name,
            default=MISSING,
            metavar=_type_text(hints[item.name]),
            help=help_text,
            **optional_value,
        )


def with_flags(config: ConfigType, given: argparse.Namespace) -> ConfigType:
    """`config` with the fields that were given on the command line replaced; checks their types."""
    hints = get_type_hints(type(config))
    values = {item.name: getattr(given, item.name, MISSING) for item in fields(config)}
    changes = {
        name: _parse_value(name.replace("_", "-"), hints[name], text)
        for name, text in values.items()
        if text is not MISSING
    }
    return checked(replace(config, **changes))


def checked(config: ConfigType) -> ConfigType:
    """`config` if its values make sense together; raises UserError naming the flag, its value and what is expected."""
    hints = get_type_hints(type(config))
    for item in fields(config):
        value, choices = getattr(config, item.name), _choices(hints[item.name])
        if get_origin(hints[item.name]) is Literal and value not in choices:
            near = difflib.get_close_matches(str(value), map(str, choices), n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            name, expected = item.name.replace("_", "-"), ", ".join(map(str, choices))
            raise UserError(f"--{name} {value}: expected one of {expected}.{hint}")
    rules = [
        ("epochs", config.epochs >= 1, "at least 1"),
        ("batch-size", config.batch_size >= 1, "at least 1"),
        ("folds", config.folds >= 2, "at least 2"),
        ("ema", 0 <= config.ema < 1, "0 up to, not including, 1"),
        (
            "swa",
            0 <= config.swa <= 1 and not (config.swa and (config.ema or config.patience or config.keep == "best")),
            "0 to 1, together with --ema 0, --patience 0 and --keep last: the mean is of the last steps",
        ),
        ("lr", config.lr > 0, "above 0"),
        ("weight-decay", config.weight_decay >= 0, "0 or more"),
        ("momentum", 0 <= config.momentum < 1, "0 up to, not including, 1"),
        ("warmup", 0 <= config.warmup <= 1, "0 to 1"),
        ("clip-norm", config.clip_norm >= 0, "0 or more"),
        ("patience", config.patience >= 0, "0 or more"),
        ("threads", config.threads >= 0, "0 or more"),
        ("workers", config.workers >= 0, "0 or more"),
        ("evaluate-every", config.evaluate_every >= 1, "at least 1"),
        ("micro-batch", config.micro_batch == "auto" or config.micro_batch >= 1, "auto or at least 1"),
        (
            "fold",
            config.fold in ("all", "none") or config.fold.isdecimal() and int(config.fold) < config.folds,
            f"all, none or 0 to {config.folds - 1}",
        ),
    ]
    for name, holds, expected in rules:
        if not holds:
            raise UserError(f"--{name} {getattr(config, name.replace('-', '_'))}: expected {expected}")
    return config


def to_json(config: Config) -> str:
    return json.dumps({item.name: getattr(config, item.name) for item in fields(config)}, indent=2)


def from_json(config_class: type[ConfigType], text: str) -> ConfigType:
    """The config that `to_json` wrote; raises UserError when its fields are not those of `config_class`."""
    values, known = json.loads(text), {item.name for item in fields(config_class)}
    if values.keys() != known:
        difference = ", ".join(sorted(values.keys() ^ known))
        raise UserError(f"the run was made with other settings than this version has ({difference}): train it again")
    return config_class(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def differences(old: Config, new: Config) -> list[str]:
    """Fields in which two runs compute something different, as lines 'lr: 0.001 -> 0.003'."""
    return [
        f"{item.name}: {getattr(old, item.name)} -> {getattr(new, item.name)}"
        for item in fields(old)
        if item.name not in MACHINE_FIELDS and getattr(old, item.name) != getattr(new, item.name)
    ]
