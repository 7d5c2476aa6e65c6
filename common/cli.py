"""The command line: `python -m common VERB COMPETITION [--flags]`. Each verb imports what it needs when it runs."""

import argparse
import math
import os
import signal
import sys
from collections.abc import Callable
from typing import TextIO

from common import competition as competitions
from common import config as configs
from common import raw
from common.config import Config
from common.errors import UserError, did_you_mean, of_killed_worker
from common.files import FULL
from common.flags import Joined, Parser, add_flags
from common.kaggle.kernel.notebook import ACCELERATOR, SESSION_HOURS, refuse_what_stays

SWITCH = {"nargs": "?", "const": "1", "default": "0", "choices": ("0", "1")}  # make passes FORCE=1 as --force=1
NO_TEMPORARY = "No usable temporary directory"  # how tempfile's error begins
NO_BF16 = ("NvidiaTeslaT4", "NvidiaTeslaP100")  # Kaggle's cards where half precision is fp16


def own_parser(verb: str, competition: str) -> Parser:
    """A parser for a verb's own flags, where it passes on the others: a parent of its `verb_parser`."""
    return Parser(prog=f"python -m common {verb} {competition}", add_help=False, allow_abbrev=False)


def verb_parser(verb: str, competition: str, description: str, data: bool = True, own: Parser | None = None) -> Parser:
    """A parser for `python -m common VERB COMPETITION`, with --data for verbs that read the data, and `own` flags."""
    prog, parents = f"python -m common {verb} {competition}", [own] if own else []
    parser = Parser(prog=prog, description=description, allow_abbrev=False, parents=parents)
    if data:
        what = "folder or zip archive with the competition's files [data/COMP]"
        parser.add_argument("--data", metavar="PATH", help=what)
    return parser


def early(flag: str, argv: list[str], default: str | None = None) -> str | None:
    """The value of a flag on which the other flags depend; a flag without a value is left for the whole parser."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag, dest="value", nargs="?", const=default, default=default)
    return parser.parse_known_args(argv)[0].value


def configured(
    parser: Parser, recipes: dict[str, Config], argv: list[str], default: str = "default"
) -> tuple[Config, argparse.Namespace]:
    """The recipe's config with the given flags applied, and the parsed arguments.

    Parses in two passes: the recipe first, because its values are the defaults that --help shows. Raises UserError for
    unknown flags and recipes, with the nearest name.
    """
    parser.add_argument("--recipe", default=default, help=f"one of {', '.join(recipes)} [{default}]")
    name = early("--recipe", argv, default)
    if name not in recipes:
        raise UserError(f"RECIPE={name}: expected one of {', '.join(recipes)}.{did_you_mean(name, recipes)}")
    add_flags(parser, recipes[name])
    given = parser.parse_args(argv)
    return configs.with_flags(recipes[name], given), given


def default_recipe(name: str, recipes: dict[str, Config], argv: list[str]) -> str:
    """The recipe when none is given: "demo" on demo data, where the competition has it, else "default"."""
    return "demo" if "demo" in recipes and raw.would_be_demo(name, early("--data", argv)) else "default"


def train(name: str, argv: list[str]) -> None:
    """train a recipe, or resume the same command's interrupted run, then write the submission"""
    competition = competitions.load(name)
    parser = verb_parser("train", name, train.__doc__)
    parser.add_argument("--run", metavar="NAME", help="name of the run [next number and recipe]")
    parser.add_argument("--resume", **SWITCH, help="resume even if code or data have changed")
    parser.add_argument("--no-submission", action="store_true", help="train only; make predict writes it later")
    config, given = configured(parser, competition.recipes, argv, default_recipe(name, competition.recipes, argv))
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
        help="fill rows of unreadable images with the sample submission's values, and list them",
    )
    parser.add_argument(
        "--budget", type=number, metavar="SECONDS", help="time limit; rows left then get --fallback values"
    )
    given = parser.parse_args(argv)
    from common import predict as predicting

    predicting.predict(competition, given, given.fallback, given.budget)


def tune(name: str, argv: list[str]) -> None:
    """search for settings with Optuna: every trial is a run; the same command resumes it (takes train's flags too)"""
    competition = competitions.load(name)
    own = own_parser("tune", name)
    what = "such as lr=1e-4:1e-2:log,dropout=0:0.5,optimizer=adamw|sgd"
    own.add_argument("--search", metavar="SPACE", action=Joined, help=what)
    own.add_argument("--trials", type=int, default=30, help="number of trials, with those of earlier commands [30]")
    parser = verb_parser("tune", name, tune.__doc__, own=own)
    own.add_argument("--recipe")
    rest = own.parse_known_args(argv)[1]  # goes to every trial
    config, given = configured(parser, competition.recipes, argv, default_recipe(name, competition.recipes, argv))
    if not given.search:
        raise UserError(f'--search is missing: make tune COMP={name} ARGS="--search lr=1e-4:1e-2:log"')
    from common import tune as tuning

    tuning.tune(competition, config, given.recipe, given.search, given.trials, rest, given.data)


def runs(name: str, argv: list[str]) -> None:
    """all runs side by side, the best first: a table, runs/COMPETITION/runs.csv and the page runs.html"""
    verb_parser("runs", name, runs.__doc__, data=False).parse_args(argv)
    from common import runs_table

    runs_table.show(competitions.load(name))


def blend(name: str, argv: list[str]) -> None:
    """combine runs with weights chosen on their out-of-fold predictions, nested over folds, into a new run"""
    parser = verb_parser("blend", name, blend.__doc__)
    parser.add_argument("--run", metavar="NAME,NAME", help="runs to blend [all that are comparable with the best]")
    parser.add_argument("--by", default="hill", choices=("hill", "nnls", "optimum", "mean", "stack"),
        help="hill climbing, non-negative least squares, the metric's own optimum, equal weights, or a linear model "
        "[hill]")  # fmt: skip
    parser.add_argument("--space", default="plain", help="what is averaged: plain, rank or power:P [plain]")
    parser.add_argument("--per-class", action="store_true", help="separate weights for every class")
    what = "CSV of an id and out-of-fold predictions made elsewhere"
    parser.add_argument("--oof", metavar="FILE[,FILE]", action=Joined, help=what)
    what = "the predictions of test rows that belong to --oof"
    parser.add_argument("--test", metavar="FILE[,FILE]", action=Joined, help=what)
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
    """fetch the competition's files to data/COMPETITION and check them; does nothing when they are complete"""
    source, parser = competitions.load(name).source, verb_parser("data", name, data.__doc__)
    parser.add_argument("--force", **SWITCH, help="fetch again; keep an archive that differs from Kaggle's list")
    if source.labels:
        parser.add_argument("--labels-only", action="store_true", help=f"fetch only {', '.join(source.labels)}")
    if source.images:
        what = f"training images to fetch, of {source.images.total}"
        parser.add_argument("--images", metavar="N", type=count, default=0, help=what)
    if source.url:
        own = f"a mirror of {source.url}: its host (https://host), or another archive's address"
        parser.add_argument("--url", default="", help=own)
        parser.add_argument("--checksum", default="", help="its checksum, md5:... or sha256:... [the published one]")
    given = vars(parser.parse_args(argv))
    if path := given.pop("data"):
        raise UserError(f"DATA={path}: make data writes to data/{name}; DATA= is for make train")
    from common.kaggle.data import fetch

    fetch(name, source, **given | {"force": given["force"] == "1"})


def submit(name: str, argv: list[str]) -> None:
    """send the best run's checked submission to Kaggle, wait for the score, keep the ledger"""
    parser = verb_parser("submit", name, submit.__doc__)
    parser.add_argument("--run", metavar="NAME", help="run whose newest submission is sent [the best one]")
    parser.add_argument("--file", metavar="CSV", help="file to send [chosen by the run]")
    parser.add_argument("--msg", metavar="TEXT", dest="message", help="message [run, recipe, score and commit]")
    parser.add_argument(
        "--wait", metavar="SECONDS", type=number, default=900.0, help="longest wait for the score [900]"
    )
    parser.add_argument("--force", **SWITCH, help="send a file that was sent before")
    given = vars(parser.parse_args(argv))
    from common.kaggle import submit as submits

    submits.submit(name, competitions.load(name), **given | {"force": given["force"] == "1"})


def board(name: str, argv: list[str]) -> None:
    """validation against leaderboard for every submission of the ledger, as a table and a plot"""
    verb_parser("board", name, board.__doc__, data=False).parse_args(argv)
    from common.kaggle import board as boards

    boards.board(name, competitions.load(name).source)


def kernel(name: str, argv: list[str]) -> None:
    """train on Kaggle's GPUs: push code and a notebook, follow it, fetch its run (takes train's flags too)"""
    competition, own = competitions.load(name), own_parser("kernel", name)
    own.add_argument("--fetch", action="store_true", help="push nothing: follow and fetch the notebook pushed last")
    own.add_argument("--accelerator", default=ACCELERATOR, metavar="NAME", help=f"Kaggle's GPU [{ACCELERATOR}]")
    own.add_argument("--hours", type=number, default=SESSION_HOURS, help=f"length of a session [{SESSION_HOURS}]")
    own.add_argument("--internet", choices=("on", "off"), default="on", help="internet in the notebook [on]")
    own.add_argument(
        "--wait", metavar="SECONDS", type=number, default=43200.0, help="follow it at most so long [43200]"
    )
    parser = verb_parser("kernel", name, kernel.__doc__, own=own)
    parser.add_argument("--run", metavar="NAME", help="name of the run [next number and recipe]")
    given, training = own.parse_known_args(argv)
    config, checked = configured(parser, competition.recipes, training)  # the rest is passed on as it is
    if checked.data:
        raise UserError(f"DATA={checked.data}: on Kaggle the notebook reads the competition's own files: leave it out")
    refuse_what_stays(competition, config, given.internet == "on")
    if config.precision == "auto" and given.accelerator.startswith(NO_BF16):
        training = [*training, "--precision", "fp16"]
    from common.kaggle.kernel import push

    options = vars(given) | {"internet": given.internet == "on"}
    push.kernel(name, competition.source, training, **options)


def new(name: str, argv: list[str]) -> None:
    """start a competition: a copy of a template that trains on its demo data at once"""
    parser = verb_parser("new", "NAME", new.__doc__, data=False)
    parser.add_argument("--kind", default="", help="images, masks or table")
    from common import new as templates

    templates.new(name, parser.parse_args(argv).kind)


def notebook(name: str, argv: list[str]) -> None:
    """push runs with a notebook that predicts offline on Kaggle, and submit it: for code competitions"""
    competition, own = competitions.load(name), own_parser("notebook", name)
    own.add_argument("--run", metavar="NAME[,NAME]", help="finished run or runs [the newest]")
    own.add_argument("--limit", type=duration, default=duration("9h"), help="the notebook's time limit: 9h, 30m [9h]")
    own.add_argument("--accelerator", default=ACCELERATOR, metavar="NAME", help=f"Kaggle's GPU [{ACCELERATOR}]")
    own.add_argument("--fetch", action="store_true", help="push nothing: follow the notebook pushed last")
    own.add_argument("--submit", action="store_true", help="submit this version of the notebook")
    parser = verb_parser("notebook", name, notebook.__doc__, own=own)
    own.add_argument("--data")
    configs.add_prediction_flags(parser, competition.config_class)
    words = own.parse_known_args(argv)[1]  # flags of the prediction, passed on as they are
    given = parser.parse_args(argv)
    from common.kaggle.kernel import inference

    inference.publish(competition, given, words)


def count(text: str) -> int:
    if (value := int(text)) < 0:
        raise ValueError
    return value


def number(text: str) -> float:
    if not 0 <= (value := float(text)) < math.inf:
        raise ValueError
    return value


def duration(text: str) -> float:
    """9h, 30m or 45s in seconds."""
    if text[-1:] not in ("h", "m", "s") or not (value := number(text[:-1])):
        raise ValueError
    return value * {"h": 3600, "m": 60, "s": 1}[text[-1]]


VERBS = {
    verb.__name__: verb
    for verb in (new, train, predict, tune, runs, blend, check, data, submit, board, kernel, notebook)
}


def verb_of(word: str, competition: str) -> Callable[[str, list[str]], None]:
    """The verb `word` of the core or of the competition; raises UserError naming the competitions that have it."""
    there = competitions.names()
    found = VERBS | (competitions.load(competition).verbs if competition in there else {})
    if word in found:
        return found[word]
    if having := [one for one in there if word in competitions.load(one).verbs]:
        raise UserError(
            f"COMP={competition} has no {word}: only {', '.join(having)} has. Try: make {word} COMP={having[0]}"
        )
    raise UserError(f"{word!r} is not a verb: expected one of {', '.join(found)}.{did_you_mean(word, found)}")


def _run(argv: list[str]) -> None:
    for word in argv:
        if word != word.encode(errors="replace").decode():
            raise UserError(f"{word!r} is not UTF-8: rename the file or the run")
    verb = argv[0]
    given = argv[1] if len(argv) > 1 and not argv[1].startswith("-") else ""
    function = verb_of(verb, given)
    function(given if function is new else competitions.known(given, verb), argv[1 + bool(given) :])


def main(argv: list[str]) -> int:
    """Run one verb; returns the exit status. A UserError is printed as one line on stderr, without a traceback.

    So are an output that takes no more, such as a log on a full disk, and a disk that is full for a library: torch
    wants a temporary directory. A reader that has read enough, such as `head`, ends it without a word.
    """
    try:
        try:
            return _status(argv)
        finally:  # also after --help, which exits: Python's own flush would come too late to be caught
            print(end="", flush=True)
    except OSError as error:
        reason = str(error.strerror or error)
        if not _takes("\n", sys.stdout):
            if isinstance(error, BrokenPipeError):
                return 128 + signal.SIGPIPE  # as a shell reports programs that the signal ends
            told = f"the output cannot be written ({reason}): give it a place and repeat the same command"
        elif error.errno in FULL or reason.startswith(NO_TEMPORARY):
            told = f"{error}: free disk space, or set TMPDIR to a folder on another disk, and repeat the same command"
        else:
            raise
        _takes(f"error: {told}\n", sys.stderr)  # which may go where the output goes
        return 1


def _takes(words: str, stream: TextIO) -> bool:
    """Print; whether the stream takes it. If not, the rest goes nowhere: Python's own flush at the end would fail."""
    try:
        print(words, end="", file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return False
    return True


def _status(argv: list[str]) -> int:
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
    except RuntimeError as error:
        print(f"error: {of_killed_worker(error)}", file=sys.stderr)
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
        print("stopped: repeat the same command to go on from here", file=sys.stderr)
        return 130
    return 0
