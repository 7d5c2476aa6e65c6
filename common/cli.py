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
    parser.add_argument("--no-submission", action="store_true", help="leave the test rows for make predict")
    config, given = configured(parser, recipes, argv, default_recipe(name, recipes, argv))
    from common import train as training

    insist, submits = given.resume == "1", not given.no_submission
    training.train(competition, config, given.recipe, given.data, given.run, insist, submits)


def predict(name: str, argv: list[str]) -> None:
    """write the submission of a finished run again; several runs (a,b) are averaged"""
    competition = competitions.load(name)
    parser = verb_parser("predict", name, predict.__doc__)
    parser.add_argument("--run", metavar="NAME[,NAME]", help="finished run or runs [the newest]")
    configs.add_prediction_flags(parser, competition.config_class)
    parser.add_argument(
        "--fallback",
        action="store_true",
        help="give rows of unreadable images the sample submission's own values, and name them",
    )
    parser.add_argument("--budget", type=commands.seconds, metavar="SECONDS", help="then --fallback for what is left")
    given = parser.parse_args(argv)
    from common import predict as predicting

    predicting.predict(competition, given, given.fallback, given.budget)


def tune(name: str, argv: list[str]) -> None:
    """search for settings with Optuna: every trial is a run; the same command goes on (flags: those of train too)"""
    competition = competitions.load(name)
    own = verb_parser("tune", name, tune.__doc__)
    own.add_argument("--search", metavar="SPACE", help="lr=1e-4:1e-2:log,dropout=0:0.5,optimizer=adamw|sgd")
    own.add_argument("--trials", type=int, default=30, help="trials that the search has in the end [30]")
    mine = Parser(add_help=False, allow_abbrev=False)
    mine.add_argument("--search")
    mine.add_argument("--trials")
    mine.add_argument("--recipe")
    rest = mine.parse_known_args(argv)[1]  # goes to every trial
    config, given = configured(own, competition.recipes, argv, default_recipe(name, competition.recipes, argv))
    if not given.search:
        raise UserError(f'--search is missing: make tune COMP={name} ARGS="--search lr=1e-4:1e-2:log"')
    from common import tune as tuning

    tuning.tune(competition, config, given.recipe, given.search, given.trials, rest)


def runs(name: str, argv: list[str]) -> None:
    """all runs side by side, the best first: a table, runs/COMPETITION/runs.csv and the page runs.html"""
    verb_parser("runs", name, runs.__doc__).parse_args(argv)
    from common import runs_table

    runs_table.show(competitions.load(name))


def blend(name: str, argv: list[str]) -> None:
    """combine runs by weights chosen on their out-of-fold predictions, nested over folds: a run of its own"""
    parser = verb_parser("blend", name, blend.__doc__)
    parser.add_argument("--run", metavar="NAME,NAME", help="runs to blend [all that are comparable with the best]")
    parser.add_argument("--by", default="hill", choices=("hill", "nnls", "optimum", "mean", "stack"),
        help="hill climbing, non-negative least squares, the metric's own optimum, equal weights, or a linear model "
        "[hill]")  # fmt: skip
    parser.add_argument("--space", default="plain", help="mean of plain predictions, of rank, or of power:P [plain]")
    parser.add_argument("--per-class", action="store_true", help="weights of their own for every class")
    parser.add_argument("--oof", metavar="FILE[,FILE]", help="CSV of an id and out-of-fold predictions made elsewhere")
    parser.add_argument("--test", metavar="FILE[,FILE]", help="the predictions of test rows that belong to --oof")
    parser.add_argument("--name", metavar="NAME", help="name of the new run [next number and blend]")
    given = parser.parse_args(argv)
    from common import blend as blending

    blending.blend(competitions.load(name), given)


def check(name: str, argv: list[str]) -> None:
    """read every image of the data, and check everything that can be checked before the training"""
    competition = competitions.load(name)
    config, given = configured(verb_parser("check", name, check.__doc__), competition.recipes, argv)
    from common import train as training

    training.check(competition, config, given.recipe, given.data)


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


def new(name: str, argv: list[str]) -> None:
    """start a competition: a copy of a template that trains on its demo data at once"""
    parser = Parser(prog="python -m common new NAME", description=new.__doc__, allow_abbrev=False)
    parser.add_argument("--kind", default="", help="images, masks or table")
    from common import new as templates

    templates.new(name, parser.parse_args(argv).kind)


def notebook(name: str, argv: list[str]) -> None:
    """push runs with a notebook that predicts offline on Kaggle, and submit it: for code competitions"""
    kernels.notebook(competitions.load(name), verb_parser("notebook", name, notebook.__doc__), argv)


VERBS = {
    verb.__name__: verb
    for verb in (new, train, predict, tune, runs, blend, check, data, submit, board, kernel, notebook)
}


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
    verb = argv[0]
    given = argv[1] if len(argv) > 1 and not argv[1].startswith("-") else ""
    function = verb_of(verb, given)
    function(given if function is new else competitions.known(given, verb), argv[1 + bool(given) :])


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
