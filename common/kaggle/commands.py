"""The flags of `make data`, `submit` and `board`; the work is done by the modules of the same names.

Each takes the competition's name and task module, a parser that has --data already, and the command line's words.
"""

from common.competition import Competition
from common.config import Parser
from common.errors import UserError
from common.kaggle.source import Source

SWITCH = {"nargs": "?", "const": "1", "default": "0", "choices": ("0", "1")}  # make hands FORCE=1 on with its value


def data(competition: str, module: Competition, parser: Parser, argv: list[str]) -> None:
    source: Source = module.source
    parser.add_argument("--force", **SWITCH, help="fetch again, and keep an archive that Kaggle's list denies")
    if source.labels:
        parser.add_argument("--labels-only", action="store_true", help=f"fetch only {', '.join(source.labels)}")
    if source.images:
        total = source.images.total
        parser.add_argument(
            "--images", metavar="N", type=count, default=0, help=f"training images to fetch, of {total}"
        )
    if source.url:
        own = f"a mirror of {source.url}: its host (https://host), or another archive's address"
        parser.add_argument("--url", default="", help=own)
        parser.add_argument("--checksum", default="", help="of that archive: md5:... or sha256:... [the published one]")
    given = vars(parser.parse_args(argv))
    if path := given.pop("data"):
        raise UserError(f"DATA={path}: make data writes to data/{competition}; DATA= is for make train")
    from common.kaggle.data import fetch

    fetch(competition, source, **given | {"force": given["force"] == "1"})


def submit(competition: str, module: Competition, parser: Parser, argv: list[str]) -> None:
    parser.add_argument("--run", metavar="NAME", help="run whose newest submission is sent [the best one]")
    parser.add_argument("--file", metavar="CSV", help="file to send [chosen by the run]")
    parser.add_argument("--msg", metavar="TEXT", dest="message", help="message [run, recipe, score and commit]")
    parser.add_argument("--wait", metavar="SECONDS", type=seconds, default=900.0, help="for the score, at most [900]")
    parser.add_argument("--force", **SWITCH, help="send a file that was sent before")
    given = vars(parser.parse_args(argv))
    from common.kaggle import submit as submits

    submits.submit(competition, module, **given | {"force": given["force"] == "1"})


def board(competition: str, module: Competition, parser: Parser, argv: list[str]) -> None:
    parser.parse_args(argv)
    from common.kaggle import board as boards

    boards.board(competition, module.source)


def count(text: str) -> int:
    if (value := int(text)) < 0:
        raise ValueError
    return value


def seconds(text: str) -> float:
    if not (value := float(text)) >= 0:
        raise ValueError
    return value
