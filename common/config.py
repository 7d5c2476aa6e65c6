"""One frozen dataclass is the configuration; its fields are the flags, the help text and the run's config.json."""

import argparse
import difflib
import json
import math
import types
from collections.abc import Callable, Collection
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from common.errors import UserError, did_you_mean

ConfigType = TypeVar("ConfigType", bound="Config")
Rule = tuple[Callable[[Any], bool], str]  # whether a value is allowed, and what is expected in words


def at_least(low: float) -> Rule:
    return lambda value: value >= low, f"at least {low}"


def between(low: float, high: float) -> Rule:
    return lambda value: low <= value <= high, f"{low} to {high}"


ABOVE_0: Rule = lambda value: value > 0, "above 0"
BELOW_1: Rule = lambda value: 0 <= value < 1, "at least 0 and below 1"


def flag(
    default: Any,
    help: str,
    unit: str = "",
    rule: Rule | None = None,
    predicts: bool = False,
    names: Literal["", "runs", "weights"] = "",
) -> Any:
    """A Config field that is also a command-line flag, with its default, help line, unit and rule for allowed values.

    Numbers must always be finite; a tuple's rule applies to each of its numbers. A flag that `predicts` is also one of
    `make predict`: it changes the predictions, but not the training. `names` marks a flag that names runs, or weights
    (imagenet, none or a path): these may exist on this machine only, which `make kernel` checks.
    """
    facts = {"help": help, "unit": unit, "rule": rule, "predicts": predicts, "names": names}
    return field(default=default, metadata=facts)


@dataclass(frozen=True)
class Config:
    """The settings of every competition. A competition's own config is a direct subclass; recipes stand beside it."""

    # What is trained on.
    fold: str = flag("0", "fold to hold out for validation; 'all' trains every fold, 'none' trains on all rows")
    folds: int = flag(5, "number of folds", rule=at_least(2))
    seed: int = flag(0, "seed of the folds, the order, the augmentation, the weights and the dropout")
    pseudo: str = flag(
        "",
        "pseudo-labels: also train on the test rows, with these finished runs' predictions (a,b) as targets",
        names="runs",
    )
    pseudo_weight: float = flag(1.0, "loss weight of a pseudo-labelled test row; a training row has 1", rule=ABOVE_0)
    pseudo_min: float = flag(
        0.0,
        "leave out test rows with a lower confidence: the largest class probability, or the mean of max(p, 1 - p) over "
        "labels",
        "probability",
        between(0, 1),
    )
    # The optimizer step.
    epochs: int = flag(10, "epochs of training", "epochs", at_least(1))
    batch_size: int = flag(
        64, "effective batch: samples of one optimizer step, over all processes", "samples", at_least(1)
    )
    micro_batch: int | Literal["auto"] = flag(
        "auto",
        "samples on the device at once; the step equals that of the whole batch (except for BatchNorm)",
        "samples",
        (lambda value: value == "auto" or value >= 1, "auto or at least 1"),
    )
    optimizer: Literal["adamw", "adam", "radam", "sgd"] = flag("adamw", "optimizer; sgd uses Nesterov momentum")
    lr: float = flag(1e-3, "peak learning rate", "per optimizer step", ABOVE_0)
    weight_decay: float = flag(
        1e-2,
        "weight decay: decoupled for adamw and radam, L2 for sgd and adam; none on biases and normalisation",
        rule=at_least(0),
    )
    momentum: float = flag(0.9, "momentum of sgd, beta1 of the others", rule=BELOW_1)
    schedule: Literal["cosine", "onecycle", "linear", "step", "constant"] = flag("cosine", "shape of the learning rate")
    warmup: float = flag(
        0.05, "part of the run in which the learning rate rises", "fraction of the steps", between(0, 1)
    )
    clip_norm: float = flag(0.0, "largest norm of the gradient of the batch; 0 never clips", rule=at_least(0))
    ema: float = flag(
        0.0, "decay of the moving average of the weights, which is evaluated and kept; 0 is off", "per step", BELOW_1
    )
    swa: float = flag(
        0.0,
        "average the weights over this last part of the steps (SWA), and estimate BatchNorm's statistics anew at the "
        "end (earlier validations use averaged ones); 0 is off",
        "fraction of the steps",
        between(0, 1),
    )
    # Evaluation and stopping.
    evaluate_every: int = flag(1, "validate once per this many epochs, and after the last", "epochs", at_least(1))
    keep: Literal["best", "last"] = flag("best", "weights to keep: of the best validation or of the last step")
    patience: int = flag(
        0, "stop after this many validations without a better score; 0 never stops", "validations", at_least(0)
    )
    tta: bool = flag(True, "average the test-time augmentations (TTA) of the competition")
    # The machine: these change speed and memory only (low precisions round).
    device: str = flag("auto", "auto, cpu, cuda or mps")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = flag("auto", "auto is bf16 where the hardware has it")
    workers: int | Literal["auto"] = flag(
        "auto",
        "processes that read and augment files; auto: all cores but one for a GPU, a quarter of them for a CPU, none "
        "for data held as tensors",
        "processes",
        (lambda value: value == "auto" or 0 <= value <= 1024, "auto or 0 to 1024"),
    )
    threads: int = flag(
        0, "CPU threads of the training process; 0: the cores that no worker uses", "threads", between(0, 1024)
    )
    checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, more time")
    keep_memory: bool = flag(True, "on a CPU, keep freed memory for the next step: faster, but a higher peak")
    compile: bool = flag(False, "torch.compile the model: a minute more at the start, faster steps")
    graph: bool = flag(
        True, "on a CUDA card, replay steps of a fixed shape as a CUDA graph, without waiting for Python"
    )
    channels_last: bool = flag(False, "keep image tensors in channels-last order; always on a CUDA card")
    save_every: float = flag(60.0, "least time between two checkpoints inside an epoch", "seconds", at_least(0))
    track: Literal["none", "tensorboard", "wandb"] = flag(
        "none", "log every epoch there too (pip install its package; WANDB_MODE=offline keeps wandb's files here)"
    )
    bad_images: Literal["raise", "skip"] = flag("raise", "stop at an unreadable image, or leave it out and list it")


# Fields that change where and how fast a run computes but not what it computes: a resumed run may differ in them.
MACHINE_FIELDS = frozenset(
    {"micro_batch", "workers", "save_every", "bad_images", "checkpointing", "keep_memory", "graph", "track"}
)
# Fields for any task: rows and machine. All other fields of `Config` are for networks only.
ANY_TASK_FIELDS = frozenset(
    {"fold", "folds", "seed", "device", "precision", "workers", "threads", "keep_memory", "save_every"}
)
# Fields that `make predict` may set, besides those marked with flag(..., predicts=True); the rest shaped the weights.
PREDICTION_FIELDS = frozenset(
    {"batch_size", "tta", "device", "precision", "workers", "threads", "keep_memory", "channels_last"}
)


def _choices(hint: Any) -> tuple[Any, ...]:
    """The literal values that a type allows: Literal["a", "b"] and int | Literal["auto"] alike."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(choice for part in get_args(hint) for choice in _choices(part))
    return ()


def _parse_value(name: str, hint: Any, text: str) -> Any:
    """Parse a flag's text as its type; raises UserError naming the flag, the value and what is expected."""
    for choice in _choices(hint):
        if text == str(choice):
            return choice
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
    raise _refused(name, text, f"{_type_text(hint)}{_nearest(text, hint)}")


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
    """An argparse parser that raises UserError, and suggests the nearest flag for an unknown one."""

    def error(self, message: str) -> None:
        raise UserError(f"{message}. See: {self.prog} --help")

    def parse_args(self, args: list[str]) -> argparse.Namespace:
        known, unknown = self.parse_known_args(args)
        if unknown:
            flags = [option for action in self._actions for option in action.option_strings]
            hint = did_you_mean(unknown[0].split("=")[0], flags, cutoff=0.5)
            raise UserError(f"unknown flag {unknown[0]}.{hint} See: {self.prog} --help")
        return known


def add_flags(parser: argparse.ArgumentParser, config: Config) -> None:
    """Give `parser` a flag for every field of the config's class; the help shows `config`'s values as the defaults."""
    for item in fields(config):
        unit = item.metadata.get("unit", "")
        _add_flag(parser, type(config), item, f"{_value_text(getattr(config, item.name))}{' ' + unit if unit else ''}")


def add_prediction_flags(parser: argparse.ArgumentParser, config_class: type[Config]) -> None:
    """Add the flags that may change between training and prediction; all other settings stay those of the run."""
    for item in fields(config_class):
        if item.name in PREDICTION_FIELDS or item.metadata.get("predicts"):
            _add_flag(parser, config_class, item, "as the run was trained")


def _add_flag(parser: argparse.ArgumentParser, config_class: type[Config], item: Field, default: str) -> None:
    hint = get_type_hints(config_class)[item.name]
    parser.add_argument(
        f"--{item.name.replace('_', '-')}",
        dest=item.name,
        default=MISSING,
        metavar=_type_text(hint),
        help=f"{item.metadata.get('help', '')} [{default}]".replace("%", "%%"),
        **({"nargs": "?", "const": "true"} if hint is bool else {}),
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
    """`config` with values of the declared types; raises UserError when values are invalid, alone or in combination."""
    hints = get_type_hints(type(config))
    values = {item.name: _as_flag(item.name, hints[item.name], getattr(config, item.name)) for item in fields(config)}
    config = replace(config, **values)
    core = {item.name: item.metadata["rule"] for item in fields(Config)}  # also for fields that a competition redefines
    for item in fields(config):
        value, hint = getattr(config, item.name), hints[item.name]
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise _refused(item.name, value, f"one of {', '.join(map(str, get_args(hint)))}{_nearest(value, hint)}")
        holds, expected = item.metadata.get("rule") or core.get(item.name) or (lambda value: True, "a finite number")
        for number in value if isinstance(value, tuple) else (value,):
            if (isinstance(number, float) and not math.isfinite(number)) or not holds(number):
                raise _refused(item.name, value, expected)
    together = [
        ("swa", config.ema or config.patience or config.keep == "best", "0, or --ema 0, --patience 0 and --keep last"),
        ("compile", config.checkpointing, "false, or --checkpointing false: torch cannot compile checkpointed blocks"),
        ("pseudo_min", not config.pseudo, "0, or --pseudo RUN"),
        ("patience", config.keep != "best", "0, or --keep best: early stopping keeps the best weights"),
    ]
    for name, clashes, expected in together:
        if getattr(config, name) and clashes:
            raise _refused(name, getattr(config, name), expected)
    if config.fold not in ("all", "none") and not (config.fold.isdecimal() and int(config.fold) < config.folds):
        raise _refused("fold", config.fold, f"all, none or 0 to {config.folds - 1}")
    return config


def _as_flag(name: str, hint: Any, value: Any) -> Any:
    """Convert a recipe's value to what its flag and config.json would give: fold=0 becomes "0", a list a tuple."""
    if isinstance(value, list):
        return tuple(value)
    is_word = hint in (bool, int, float, str) or get_origin(hint) in (Union, types.UnionType)
    return _parse_value(name, hint, _value_text(value)) if is_word and value is not None else value


def refuse_unused(config: Config, recipe: Config, default: Config, uses: Collection[str]) -> None:
    """Raise UserError for a network's setting that a task without a network does not name in its `uses`.

    Such a setting must equal the `recipe`'s, and the recipe's must equal that of the `default` recipe or of the core.
    The latter is not checked if a flag of the competition's own was changed, such as the kind of model: then the recipe
    may be one for a network.
    """
    core = [item.name for item in fields(Config)]
    same_kind = all(getattr(config, one.name) == getattr(recipe, one.name) for one in fields(config)[len(core) :])
    for item in fields(config)[: len(core)]:
        name, value = item.name, getattr(config, item.name)
        if name in ANY_TASK_FIELDS or name in uses:
            continue
        if value != getattr(recipe, name) or (same_kind and value not in (getattr(default, name), item.default)):
            raise UserError(
                f"--{name.replace('_', '-')} {_value_text(value)}: this task has no network that uses it. Leave "
                f"it out, also in the recipe in config.py"
            )


def folds_to_train(config: Config) -> list[int | None]:
    """The folds that --fold names, to be held out one after the other; None holds out nothing."""
    return {"all": list(range(config.folds)), "none": [None]}.get(config.fold) or [int(config.fold)]


def _refused(name: str, value: Any, expected: str) -> UserError:
    return UserError(f"--{name.replace('_', '-')} {_value_text(value)}: expected {expected}. See --help")


def _nearest(value: Any, hint: Any) -> str:
    near = difflib.get_close_matches(str(value), map(str, _choices(hint)), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def to_json(config: Config) -> str:
    return json.dumps({item.name: getattr(config, item.name) for item in fields(config)}, indent=2)


def from_values(config_class: type[ConfigType], values: dict[str, Any]) -> ConfigType:
    """The config that `to_json` wrote; raises UserError when it has fields that `config_class` does not have.

    A flag that is newer than the run gets its default. So the default of a new flag must be the earlier behaviour.
    """
    if gone := sorted(values.keys() - {item.name for item in fields(config_class)}):
        raise UserError(f"the run has settings that this version no longer has ({', '.join(gone)}): train it again")
    return config_class(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def differences(old: Config, new: Config) -> list[str]:
    """The fields that make two runs compute different results, as lines 'lr: 0.001 -> 0.003'."""
    return [
        f"{item.name}: {getattr(old, item.name)} -> {getattr(new, item.name)}"
        for item in fields(old)
        if item.name not in MACHINE_FIELDS and getattr(old, item.name) != getattr(new, item.name)
    ]
