"""One frozen dataclass is the configuration; its fields are the flags, the help text and the run's config.json."""

import argparse
from dataclasses import dataclass, fields
from typing import Literal, TypeVar

from common.flags import (
    ABOVE_0,
    BELOW_1,
    add_flag,
    at_least,
    between,
    flag,
    refused,
    with_checked_values,
    with_given,
)

ConfigType = TypeVar("ConfigType", bound="Config")


@dataclass(frozen=True)
class Config:
    """The settings of every competition. A competition's own config is a direct subclass; recipes stand beside it."""

    # What is trained on.
    fold: str = flag("0", "fold to hold out for validation; 'all' trains every fold, 'none' trains on all rows")
    folds: int = flag(5, "number of folds", rule=between(2, 1_000_000))
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
    precision: Literal["auto", "fp32", "bf16", "fp16"] = flag("auto", "auto is bf16 or fp16 where they are faster")
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
    {"micro_batch", "workers", "save_every", "bad_images", "checkpointing", "keep_memory", "graph", "track", "cache_gb"}
)
# Fields for any task: rows and machine. All other fields of `Config` are for networks only.
ANY_TASK_FIELDS = frozenset(
    {"fold", "folds", "seed", "device", "precision", "workers", "threads", "keep_memory", "save_every"}
)
# Fields that `make predict` may set, besides those marked with flag(..., predicts=True); the rest shaped the weights.
PREDICTION_FIELDS = frozenset(
    {"batch_size", "tta", "device", "precision", "workers", "threads", "keep_memory", "channels_last"}
)


def add_prediction_flags(parser: argparse.ArgumentParser, config_class: type[Config]) -> None:
    """Add the flags that may change between training and prediction; all other settings stay those of the run."""
    for item in fields(config_class):
        if item.name in PREDICTION_FIELDS or item.metadata.get("predicts"):
            add_flag(parser, config_class, item, "as the run was trained")


def with_flags(config: ConfigType, given: argparse.Namespace) -> ConfigType:
    """`config` with the fields that were given on the command line replaced, and checked."""
    return checked(with_given(config, given))


def checked(config: ConfigType) -> ConfigType:
    """`config` with values of the declared types; raises UserError when values are invalid, alone or in combination."""
    config = with_checked_values(config, Config)
    together = [
        ("swa", config.ema or config.patience or config.keep == "best", "0, or --ema 0, --patience 0 and --keep last"),
        ("compile", config.checkpointing, "false, or --checkpointing false: torch cannot compile checkpointed blocks"),
        ("pseudo_min", not config.pseudo, "0, or --pseudo RUN"),
        ("patience", config.keep != "best", "0, or --keep best: early stopping keeps the best weights"),
    ]
    for name, clashes, expected in together:
        if getattr(config, name) and clashes:
            raise refused(name, getattr(config, name), expected)
    if config.fold not in ("all", "none") and not (config.fold.isdecimal() and int(config.fold) < config.folds):
        raise refused("fold", config.fold, f"all, none or 0 to {config.folds - 1}")
    return config


def folds_to_train(config: Config) -> list[int | None]:
    """The folds that --fold names, to be held out one after the other; None holds out nothing."""
    return {"all": list(range(config.folds)), "none": [None]}.get(config.fold) or [int(config.fold)]


def differences(old: Config, new: Config) -> list[str]:
    """The fields that make two runs compute different results, as lines 'lr: 0.001 -> 0.003'."""
    return [
        f"{item.name}: {getattr(old, item.name)} -> {getattr(new, item.name)}"
        for item in fields(old)
        if item.name not in MACHINE_FIELDS and getattr(old, item.name) != getattr(new, item.name)
    ]
