"""KDD Cup 2018, fresh air: PM2.5, PM10 and O3 at 48 stations of Beijing and London for the next 48 hours.

    make train COMP=kdd_air_quality DATA=/path/to/files     every model, the blend, and the next two days' forecast
    make train COMP=kdd_air_quality ARGS="--model medians"  one model alone
    make predict COMP=kdd_air_quality ARGS="--first-day 2018-05-01 --last-day 2018-05-29"
    make backtest COMP=kdd_air_quality ARGS="--first-day 2018-03-01 --last-day 2018-04-28"

Five kinds of models and a blend are not one network, so the competition brings its own train, predict and backtest;
files, runs, the training loop of the network and the submission are the core's.
"""

from competitions.kdd_air_quality.config import RECIPES, Config, checked


def build(config: Config, raw, log):
    """The Task of the network on all data, gaps filled in time only: for `make check` and a look at the shapes."""
    from competitions.kdd_air_quality import models, reader, table

    return models.whole_task(config, reader.read(raw, table.stations_of(table.sample_lines(raw))))


def train(competition: str, argv: list[str]) -> None:
    """fit every model and the blend, or go on with the interrupted run, and write the forecast of the next two days"""
    from common.cli import configured, verb_parser

    parser = verb_parser("train", competition, train.__doc__)
    parser.add_argument("--run", metavar="NAME", help="name of the run [next number and recipe]")
    config, given = configured(parser, RECIPES, argv)
    from competitions.kdd_air_quality import pipeline

    pipeline.train(competition, checked(config), given)


def predict(competition: str, argv: list[str]) -> None:
    """forecast any submit days with a fitted run, from what was known before each of them"""
    from common.cli import verb_parser

    parser = verb_parser("predict", competition, predict.__doc__)
    parser.add_argument("--run", metavar="NAME", help="finished run [the newest]")
    _day_flags(parser)
    given = parser.parse_args(argv)
    from competitions.kdd_air_quality import pipeline

    pipeline.predict(competition, given)


def backtest(competition: str, argv: list[str]) -> None:
    """score every model and the blend over a range of submit days; with --run, the models of a fitted run"""
    from common.cli import configured, verb_parser

    parser = verb_parser("backtest", competition, backtest.__doc__)
    parser.add_argument("--run", metavar="NAME", help="finished run whose models are used as they are [fit as needed]")
    config, given = configured(parser, RECIPES, argv)
    from competitions.kdd_air_quality import pipeline

    pipeline.backtest(competition, checked(config), given)


def _day_flags(parser) -> None:
    parser.add_argument("--first-day", metavar="DATE", default="", help="first submit day [the last of the data]")
    parser.add_argument("--last-day", metavar="DATE", default="", help="last submit day [the first]")
