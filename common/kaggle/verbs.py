"""The flags of `make data`, `submit`, `board` and `kernel`; the work is done by the modules of the same names.

Each takes the competition's name and task module, a parser that has --data already, and the command line's words.
"""

import argparse
from collections.abc import Callable

from common.competition import Competition
from common.config import Parser
from common.errors import UserError
from common.kaggle.source import Source

Configured = Callable[[Parser, dict, list[str]], tuple[object, argparse.Namespace]]


def data(competition: str, module: Competition, parser: Parser, argv: list[str]) -> None:
    source: Source = module.source
    _force(parser, "fetch the files again, over whatever is there, and keep an archive that Kaggle's list denies")
    if source.labels:
        parser.add_argument("--labels-only", action="store_true", help=f"fetch only {', '.join(source.labels)}")
    if source.images:
        parser.add_argument(
            "--images", metavar="N", default="0", help=f"fetch N training images too, of {source.images.total} [0]"
        )
    if source.url:
        parser.add_argument(
            "--url", default="", help=f"a mirror of {source.url}: its host (https://host), or another archive's address"
        )
        parser.add_argument("--checksum", default="", help="of that archive: md5:... or sha256:... [the published one]")
    given = vars(parser.parse_args(argv))
    if given["data"]:
        raise UserError(f"DATA={given['data']}: make data writes to data/{competition}; DATA= is for make train")
    from common.kaggle.data import fetch

    fetch(
        competition,
        source,
        force=is_yes("FORCE", given["force"]),
        labels_only=given.get("labels_only", False),
        images=_number("--images", given.get("images", "0"), int),
        url=given.get("url", ""),
        checksum=given.get("checksum", ""),
    )


def submit(competition: str, module: Competition, parser: Parser, argv: list[str]) -> None:
    parser.add_argument("--run", metavar="NAME", help="run whose newest submission is sent [the best one]")
    parser.add_argument("--file", metavar="CSV", help="file to send [chosen by the run]")
    parser.add_argument("--msg", metavar="TEXT", help="message [run, recipe, score and commit]")
    parser.add_argument("--wait", metavar="SECONDS", default="900", help="how long the score is waited for [900]")
    _force(parser, "send a file that was sent before")
    given = parser.parse_args(argv)
    from common.kaggle import submit as submits

    submits.submit(
        competition,
        module,
        run=given.run,
        file=given.file,
        message=given.msg,
        force=is_yes("FORCE", given.force),
        data=given.data,
        wait=_number("--wait", given.wait, float),
    )


def board(competition: str, module: Competition, parser: Parser, argv: list[str]) -> None:
    parser.parse_args(argv)
    from common.kaggle import board as boards

    boards.board(competition, module.source)


def kernel(competition: str, module: Competition, parser: Parser, argv: list[str], configured: Configured) -> None:
    """Flags of the training are checked here by `configured`, as those of `train`, and handed on as they are."""
    own = Parser(add_help=False, allow_abbrev=False)
    for one in (own, parser):
        one.add_argument("--fetch", action="store_true", help="push nothing: follow and fetch the notebook pushed last")
        one.add_argument("--accelerator", default="", metavar="NAME", help="Kaggle's name of it [its default GPU]")
        one.add_argument("--internet", choices=("on", "off"), help="in the notebook [off where notebooks are scored]")
        one.add_argument("--wait", metavar="SECONDS", default="43200", help="how long it is followed [43200]")
    parser.add_argument("--run", metavar="NAME", help="name of the run [next number and recipe]")
    given, training = own.parse_known_args(argv)
    _, checked = configured(parser, module.recipes, training)
    if checked.data:
        raise UserError(f"DATA={checked.data}: on Kaggle the files of {module.source.slug or competition} are at hand")
    from common.kaggle import kernel as kernels

    kernels.kernel(
        competition,
        module.source,
        training,
        accelerator=given.accelerator,
        internet=None if given.internet is None else given.internet == "on",
        fetch=given.fetch,
        wait=_number("--wait", given.wait, float),
    )


def _force(parser: Parser, help: str) -> None:
    parser.add_argument("--force", nargs="?", const="1", default="0", help=help)


def is_yes(name: str, text: str) -> bool:
    """FORCE=1 and FORCE=0 mean what they say."""
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False, "": False}
    if text.lower() not in words:
        raise UserError(f"{name}={text}: expected 1 or 0")
    return words[text.lower()]


def _number(name: str, text: str, kind: type) -> float:
    try:
        value = kind(text)
    except ValueError as error:
        raise UserError(f"{name} {text}: expected a number") from error
    if value < 0:
        raise UserError(f"{name} {text}: expected 0 or more")
    return value
