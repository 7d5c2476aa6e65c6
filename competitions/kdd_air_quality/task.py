"""KDD Cup 2018, fresh air: PM2.5, PM10 and O3 at 48 stations of Beijing and London for the next 48 hours.

    make train COMP=kdd_air_quality DATA=/path/to/files     every model, the blend, and the next two days' forecast
    make train COMP=kdd_air_quality ARGS="--model medians"  one model alone
    make predict COMP=kdd_air_quality ARGS="--first-day 2018-05-01 --last-day 2018-05-29"
    make backtest COMP=kdd_air_quality ARGS="--first-day 2018-03-01 --last-day 2018-04-28"

Four kinds of models and a blend are not one network, so the competition brings its own train, predict and backtest;
files, runs, the training loop of the network and the submission are the core's.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from common import config as common
from common.config import flag
from common.kaggle.source import Source

MODELS = ("medians", "boosting", "mlp", "prophet")
NOWHERE_TO_SUBMIT = "KDD Cup 2018 was judged at biendata.xyz, which is closed to forecasts: they are scored locally"

SOURCE = Source(
    slug="",
    expected=("*.tsf",),
    higher_is_better=False,
    url="https://zenodo.org/records/4656719/files/kdd_cup_2018_dataset_with_missing_values.zip",
    checksum_url="https://zenodo.org/api/records/4656719",
    nowhere_to_submit=NOWHERE_TO_SUBMIT,
    notes="270 hourly series of 59 stations, 2017-01-01 to 2018-03-31, CC BY 4.0 (Monash archive, Zenodo 4656719). "
    "The organisers' own files can be put beside it: every layout is read, in any mix.",
)


@dataclass(frozen=True)
class Config(common.Config):
    """Settings of the forecasters and of the rolling backtest that the blend is fitted on."""

    fold: str = flag("0", "not used here: the last days are held out by time")
    epochs: int = flag(5, "passes over the training days of the network", "epochs")
    batch_size: int = flag(131, "not used here: the network's windows are whole days")
    weight_decay: float = flag(0.05, "decoupled weight decay of the network; none on biases and normalisation")
    lr: float = flag(1.5e-3, "peak learning rate of the network", "per optimizer step")
    clip_norm: float = flag(1.0, "largest norm of the window's gradient; 0 never clips")
    ema: float = flag(0.995, "decay of the moving average of the network's weights; 0 is off", "per step")
    save_every: float = flag(20.0, "least time between two checkpoints of the network", "seconds")
    models: str = flag("medians,boosting,mlp,prophet", "models to fit and blend")
    model: str = flag("", "one model alone: the same as --models with a single name")
    first_day: str = flag("", "first submit day to forecast; day D forecasts D+1 and D+2 in UTC", "date")
    last_day: str = flag("", "last submit day; train then knows nothing after it", "date")
    backtest_days: int = flag(56, "submit days before the end whose forecasts the blend is fitted on", "days")
    refit_days: int = flag(31, "a backtest fits every model again after this many days", "days")
    jobs: int = flag(-1, "fits at the same time, -1 for one per core", "processes")
    beijing_windows: str = flag("golden_5", "windows of the medians in Beijing")
    london_windows: str = flag("fib_9", "windows of the medians in London")
    boosting_rounds: int = flag(250, "trees of each boosted model", "trees")
    boosting_seeds: int = flag(4, "boosted models per city and kind of tree, each on other rows", "models")
    boosting_share: float = flag(0.12, "part of all rows (origin, hour ahead, series) that a boosted model sees")
    history_days: int = flag(14, "hours before the origin that the network sees; the blog's were 360", "days")
    windows: str = flag("golden_8", "median windows that the network sees")
    train_days: int = flag(420, "last origins that the network is trained on", "days")
    units: int = flag(128, "width of the network")
    dropout: float = flag(0.5, "dropout of the network")


DEFAULT = Config()

RECIPES = {
    "default": DEFAULT,
    # Seconds on the generated sample, to see everything work; its score says nothing.
    "smoke": replace(
        DEFAULT,
        models="medians,boosting,mlp",
        epochs=4,
        backtest_days=6,
        jobs=1,
        boosting_rounds=20,
        boosting_seeds=1,
        boosting_share=0.2,
        history_days=7,
        windows="golden_3",
        train_days=60,
        units=32,
    ),
}


def write_sample(folder: Path) -> None:
    """A seeded two-city data set in the organisers' file formats."""
    from competitions.kdd_air_quality.sample import write

    write(folder)


def build(config: Config, raw):
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

    pipeline.train(competition, with_one_model(config), given)


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

    pipeline.backtest(competition, with_one_model(config), given)


def _day_flags(parser) -> None:
    parser.add_argument("--first-day", metavar="DATE", default="", help="first submit day [the last of the data]")
    parser.add_argument("--last-day", metavar="DATE", default="", help="last submit day [the first]")


def with_one_model(config: Config) -> Config:
    """--model medians is --models medians: the config of a run names its models once."""
    return replace(config, models=config.model, model="") if config.model else config


VERBS = {"train": train, "predict": predict, "backtest": backtest}
