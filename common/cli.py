"""The command line: `python -m common VERB COMPETITION [--flags]`. The only place where a name becomes an import."""

import argparse
import difflib
import sys
from collections.abc import Callable

from common import competition as competitions
from common import config as configs
from common import raw
from common.config import Config, Parser
from common.errors import UserError
from common.kaggle import commands
from common.kaggle.kernel import command as kernels


def verb_parser(verb: str, competition: str, description: str) -> Parser:
    """A parser for `python -m common VERB COMPETITION` with the flag that every verb has."""
    parser = Parser(prog=f"python -m common {verb} {competition}", description=description, allow_abbrev=False)
    parser.add_argument("--data", metavar="PATH", help="folder or zip archive with the competition's files [data/COMP]")
    return parser


def configured(
    parser: Parser, recipes: dict[str, Config], argv: list[str], default: str = "default"
) -> tuple[Config, argparse.Namespace]:
    """The recipe's config with the given flags, and all that was given; unknown flags and recipes name the nearest.

    Two passes: the recipe first, because its values are the defaults that --help shows.
    """
    parser.add_argument("--recipe", default=default, help=f"one of {', '.join(recipes)} [{default}]")
    recipe = Parser(prog=parser.prog, add_help=False, allow_abbrev=False)
    recipe.add_argument("--recipe", default=default)
    name = recipe.parse_known_args(argv)[0].recipe
    if name not in recipes:
        near = difflib.get_close_matches(name, recipes, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"RECIPE={name}: expected one of {', '.join(recipes)}.{hint}")
    configs.add_flags(parser, recipes[name])
    given = parser.parse_args(argv)
    return configs.with_flags(recipes[name], given), given


def default_recipe(name: str, recipes: dict[str, Config], argv: list[str]) -> str:
    """ "demo" where there are no data: demo data take seconds, whatever the default recipe is made for."""
    data = Parser(add_help=False, allow_abbrev=False)
    data.add_argument("--data")
    given = data.parse_known_args(argv)[0].data
    return "demo" if "demo" in recipes and raw.would_be_demo(name, given) else "default"


def train(name: str, argv: list[str]) -> None:
    """train a recipe, or go on with the interrupted run of the same command, then write the submission"""
    competition = competitions.load(name)
    parser = verb_parser("train", name, train.__doc__)
    parser.add_argument("--run", metavar="NAME", help="name of the run [next number and recipe]")
    parser.add_argument("--resume", **commands.SWITCH, help="go on though code or data have changed")
    recipes = competition.recipes
    config, given = configured(parser, recipes, argv, default_recipe(name, recipes, argv))
    from common import train as training

    insist = given.resume == "1"
    training.train(competition, config, recipe=given.recipe, data=given.data, run_name=given.run, insist=insist)


def predict(name: str, argv: list[str]) -> None:
    """write the submission of a finished run again; several runs (a,b) are averaged"""
    competition = competitions.load(name)
    parser = verb_parser("predict", name, predict.__doc__)
    parser.add_argument("--run", metavar="NAME[,NAME]", help="finished run or runs [the newest]")
    configs.add_prediction_flags(parser, competition.config_class)
    given = parser.parse_args(argv)
    from common import predict as predicting

    predicting.predict(competition, given)


def check(name: str, argv: list[str]) -> None:
    """read every image of the data, and check everything that can be checked before the training"""
    competition = competitions.load(name)
    config, given = configured(verb_parser("check", name, check.__doc__), competition.recipes, argv)
    from common import train as training

    training.check(competition, config, given.data)


def data(name: str, argv: list[str]) -> None:
    """bring data/COMPETITION to what the competition has, checked; does nothing when it is complete"""
    commands.data(name, competitions.load(name), verb_parser("data", name, data.__doc__), argv)


def submit(name: str, argv: list[str]) -> None:
    """send the best run's checked submission to Kaggle, wait for the score, keep the ledger"""
    commands.submit(name, competitions.load(name), verb_parser("submit", name, submit.__doc__), argv)


def board(name: str, argv: list[str]) -> None:
    """validation against leaderboard for every submission of the ledger, as a table and a plot"""
    commands.board(name, competitions.load(name), verb_parser("board", name, board.__doc__), argv)


def kernel(name: str, argv: list[str]) -> None:
    """train on Kaggle's GPUs: push code and a notebook, follow it, fetch its run (flags: those of train too)"""
    parser = verb_parser("kernel", name, kernel.__doc__)
    kernels.kernel(name, competitions.load(name), parser, argv, configured)


VERBS = {verb.__name__: verb for verb in (train, predict, check, data, submit, board, kernel)}


def verb_of(word: str, competition: str) -> Callable[[str, list[str]], None]:
    """The verb that `word` names, of the core or of the competition; raises UserError saying who has it."""
    there = competitions.names()
    own = {one: competitions.load(one).verbs for one in there}
    found = VERBS | own.get(competition, {})
    if word in found:
        return found[word]
    if having := [one for one in there if word in own[one]]:
        raise UserError(
            f"COMP={competition} has no {word}: only {', '.join(having)} has. Try: make {word} COMP={having[0]}"
        )
    near = difflib.get_close_matches(word, found, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UserError(f"{word!r} is not a verb: expected one of {', '.join(found)}.{hint}")


def _run(argv: list[str]) -> None:
    for word in argv:
        if not word.isascii() and word.encode(errors="surrogateescape") != word.encode(errors="replace"):
            raise UserError(f"{word!r} is not UTF-8: give the file or the run a name that is")
    verb, rest = argv[0], argv[2:]
    given = argv[1] if len(argv) > 1 and not argv[1].startswith("-") else ""
    function = verb_of(verb, given)
    function(competitions.known(given, verb), rest)


def main(argv: list[str]) -> int:
    """Run one verb; returns the exit status. What a user can mend is one line on stderr, without a traceback."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m common VERB COMPETITION [--flags]   (VERB COMPETITION --help shows the flags)\n")
        for verb, function in VERBS.items():
            print(f"  {verb:8} {function.__doc__}")
        print(f"\ncompetitions: {', '.join(competitions.names())}")
        return 0
    try:
        _run(argv)
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
