"""The command line: `python -m common VERB COMPETITION [--flags]`. The only place where a name becomes an import."""

import argparse
import difflib
import importlib
import sys
from pathlib import Path
from types import ModuleType

from common import config as configs
from common.config import Config, Parser
from common.errors import UserError
from common.kaggle import commands
from common.kaggle.kernel import command as kernels

COMPETITIONS = Path(__file__).parents[1] / "competitions"


def competitions() -> list[str]:
    return sorted(file.parent.name for file in COMPETITIONS.glob("*/task.py"))


def known(name: str, verb: str) -> str:
    """`name` if it is a competition; raises UserError listing them all, or naming the nearest."""
    names = competitions()
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    what = f"COMP={name} is not a competition." if name else "COMP= is missing."
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UserError(
        f"{what}{hint} There are: {', '.join(names)}. Try: make {verb} COMP={near[0] if near else names[0]}"
    )


def task_module(competition: str) -> ModuleType:
    """competitions/<competition>/task.py (common.task lists what it holds). Importing it costs no torch."""
    return importlib.import_module(f"competitions.{competition}.task")


def verb_parser(verb: str, competition: str, description: str) -> Parser:
    """A parser for `python -m common VERB COMPETITION` with the flag that every verb has."""
    parser = Parser(prog=f"python -m common {verb} {competition}", description=description, allow_abbrev=False)
    parser.add_argument("--data", metavar="PATH", help="folder or zip archive with the competition's files [data/COMP]")
    return parser


def configured(parser: Parser, recipes: dict[str, Config], argv: list[str]) -> tuple[Config, argparse.Namespace]:
    """The recipe's config with the given flags, and all that was given; unknown flags and recipes name the nearest.

    Two passes: the recipe first, because its values are the defaults that --help shows.
    """
    parser.add_argument("--recipe", default="default", help=f"one of {', '.join(recipes)} [default]")
    recipe = Parser(prog=parser.prog, add_help=False, allow_abbrev=False)
    recipe.add_argument("--recipe", default="default")
    name = recipe.parse_known_args(argv)[0].recipe
    if name not in recipes:
        near = difflib.get_close_matches(name, recipes, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"RECIPE={name}: expected one of {', '.join(recipes)}.{hint}")
    configs.add_flags(parser, recipes[name])
    given = parser.parse_args(argv)
    return configs.with_flags(recipes[name], given), given


def train(competition: str, argv: list[str]) -> None:
    """train a recipe, or go on with the interrupted run of the same command, then write the submission"""
    module = task_module(competition)
    parser = verb_parser("train", competition, train.__doc__)
    parser.add_argument("--run", metavar="NAME", help="name of the run [next number and recipe]")
    config, given = configured(parser, module.RECIPES, argv)
    from common import train as training

    training.train(competition, module, config, recipe=given.recipe, data=given.data, run_name=given.run)


def predict(competition: str, argv: list[str]) -> None:
    """write the submission of a finished run again; several runs (a,b) are averaged"""
    module = task_module(competition)
    parser = verb_parser("predict", competition, predict.__doc__)
    parser.add_argument("--run", metavar="NAME[,NAME]", help="finished run or runs [the newest]")
    configs.add_prediction_flags(parser, type(module.RECIPES["default"]))
    given = parser.parse_args(argv)
    from common import predict as predicting

    predicting.predict(competition, module, given)


def check(competition: str, argv: list[str]) -> None:
    """read every image of the data and list those that cannot be decoded"""
    module = task_module(competition)
    given_config, given = configured(verb_parser("check", competition, check.__doc__), module.RECIPES, argv)
    from common import train as training

    training.check_images(competition, module, given_config, given.data)


def data(competition: str, argv: list[str]) -> None:
    """bring data/COMPETITION to what the competition has, checked; does nothing when it is complete"""
    commands.data(competition, task_module(competition), verb_parser("data", competition, data.__doc__), argv)


def submit(competition: str, argv: list[str]) -> None:
    """send the best run's checked submission to Kaggle, wait for the score, keep the ledger"""
    commands.submit(competition, task_module(competition), verb_parser("submit", competition, submit.__doc__), argv)


def board(competition: str, argv: list[str]) -> None:
    """validation against leaderboard for every submission of the ledger, as a table and a plot"""
    commands.board(competition, task_module(competition), verb_parser("board", competition, board.__doc__), argv)


def kernel(competition: str, argv: list[str]) -> None:
    """train on Kaggle's GPUs: push code and a notebook, follow it, fetch its run (flags: those of train too)"""
    parser = verb_parser("kernel", competition, kernel.__doc__)
    kernels.kernel(competition, task_module(competition), parser, argv, configured)


def name(competition: str, argv: list[str]) -> None:
    """succeed when the competition exists, name the nearest when it does not (for the target that is given next)"""


VERBS = {verb.__name__: verb for verb in (train, predict, check, data, submit, board, kernel, name)}


def main(argv: list[str]) -> int:
    """Run one verb; returns the exit status. What a user can mend is one line on stderr, without a traceback."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m common VERB COMPETITION [--flags]   (VERB COMPETITION --help shows the flags)\n")
        for verb, function in VERBS.items():
            print(f"  {verb:8} {function.__doc__}")
        print(f"\ncompetitions: {', '.join(competitions())}")
        return 0
    try:
        verb, rest = argv[0], argv[2:]
        given = argv[1] if len(argv) > 1 and not argv[1].startswith("-") else ""
        verbs_of = VERBS | (getattr(task_module(given), "VERBS", {}) if given in competitions() else {})
        if verb not in verbs_of:
            near = difflib.get_close_matches(verb, verbs_of, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UserError(f"{verb!r} is not a verb: expected one of {', '.join(verbs_of)}.{hint}")
        verbs_of[verb](known(given, rest[0] if verb == "name" and rest else verb), rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("common", "competitions"):
            raise
        print(
            f"error: {sys.executable} has no {error.name}: use make, which installs everything into .venv, or "
            f".venv/bin/python",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("stopped: the same command goes on where this left off", file=sys.stderr)
        return 130
    return 0
