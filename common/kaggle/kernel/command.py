"""The flags of `make kernel` and `make notebook`."""

import argparse
from collections.abc import Callable

from common.competition import Competition
from common.config import Parser, add_prediction_flags
from common.errors import UserError
from common.kaggle.commands import seconds
from common.kaggle.kernel.notebook import ACCELERATOR, SESSION_HOURS

NO_BF16 = ("NvidiaTeslaT4", "NvidiaTeslaP100")  # cards where half precision is fp16
Configured = Callable[[Parser, dict, list[str]], tuple[object, argparse.Namespace]]


def kernel(competition: str, module: Competition, parser: Parser, argv: list[str], configured: Configured) -> None:
    """Flags of the training are checked here by `configured`, as those of `train`, and handed on as they are."""
    own = Parser(add_help=False, allow_abbrev=False)
    for one in (own, parser):
        one.add_argument("--fetch", action="store_true", help="push nothing: follow and fetch the notebook pushed last")
        one.add_argument("--accelerator", default=ACCELERATOR, metavar="NAME", help=f"Kaggle's name [{ACCELERATOR}]")
        one.add_argument("--hours", type=seconds, default=SESSION_HOURS, help=f"length of a session [{SESSION_HOURS}]")
        one.add_argument("--internet", choices=("on", "off"), default="on", help="in the notebook [on]")
        one.add_argument("--wait", metavar="SECONDS", type=seconds, default=43200.0, help="follow it so long [43200]")
    parser.add_argument("--run", metavar="NAME", help="name of the run [next number and recipe]")
    given, training = own.parse_known_args(argv)
    config, checked = configured(parser, module.recipes, training)
    if checked.data:
        raise UserError(f"DATA={checked.data}: on Kaggle the files of {module.source.slug or competition} are at hand")
    if getattr(config, "precision", "") == "auto" and given.accelerator.startswith(NO_BF16):
        training = [*training, "--precision", "fp16"]
    from common.kaggle.kernel import push

    push.kernel(
        competition,
        module.source,
        training,
        accelerator=given.accelerator,
        internet=given.internet == "on",
        fetch=given.fetch,
        hours=given.hours,
        wait=given.wait,
    )


def notebook(competition: Competition, parser: Parser, argv: list[str]) -> None:
    """Flags of the prediction are checked here as those of `predict`, and handed on as they are."""
    own = Parser(add_help=False, allow_abbrev=False)
    for one in (own, parser):
        one.add_argument("--run", metavar="NAME[,NAME]", help="finished run or runs [the newest]")
        one.add_argument("--limit", type=duration, default=duration("9h"), help="of the notebook: 9h, 30m [9h]")
        one.add_argument("--accelerator", default=ACCELERATOR, metavar="NAME", help=f"Kaggle's name [{ACCELERATOR}]")
        one.add_argument("--fetch", action="store_true", help="push nothing: follow the notebook pushed last")
        one.add_argument("--submit", action="store_true", help="submit this version of the notebook")
    own.add_argument("--data")
    add_prediction_flags(parser, competition.config_class)
    words = own.parse_known_args(argv)[1]
    given = parser.parse_args(argv)
    from common.kaggle.kernel import inference

    inference.publish(competition, given, words)


def duration(text: str) -> float:
    """9h, 30m or 45s in seconds."""
    if text[-1:] not in ("h", "m", "s") or not (value := float(text[:-1])) > 0:
        raise ValueError
    return value * {"h": 3600, "m": 60, "s": 1}[text[-1]]
