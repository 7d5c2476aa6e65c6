"""Settings of the KDD forecasters: the flags, the recipes and the source of the data."""

from dataclasses import dataclass, replace
from typing import Literal

from common import config as common
from common.config import at_least, between, flag
from common.errors import UserError
from common.flags import Rule
from common.kaggle.source import Source

MODELS = ("medians", "linear", "boosting", "mlp", "prophet")
JOBS: Rule = lambda jobs: jobs == -1 or jobs >= 1, "at least 1, or -1 for one per core"
FRACTION: Rule = lambda share: 0 < share <= 1, "a part of all rows, above 0 and at most 1"
# The core's settings that the network among the models uses. Not the batch size, as a batch is a day of all series. Nor
# settings that stop or choose weights by the held-out days: the score on these days would be too good.
USES = "epochs micro_batch optimizer lr weight_decay momentum schedule warmup clip_norm ema swa checkpointing compile"
USES = (*USES.split(), "graph", "track")
NOWHERE_TO_SUBMIT = "biendata.xyz, which judged KDD Cup 2018, takes no more forecasts: they are scored locally"

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
    """Settings of the forecasters, and of the rolling backtest that the blend is fitted to."""

    epochs: int = flag(10, "epochs of the network over its training days", "epochs")
    batch_size: int = flag(131, "not used here: a batch of the network is a whole day")
    keep: Literal["best", "last"] = flag("last", "not used here: the network keeps its last weights")
    weight_decay: float = flag(0.05, "decoupled weight decay of the network; none on biases and normalisation")
    lr: float = flag(1.5e-3, "peak learning rate of the network", "per optimizer step")
    clip_norm: float = flag(1.0, "largest norm of the batch's gradient; 0 never clips")
    ema: float = flag(0.995, "decay of the moving average of the network's weights; 0 is off", "per step")
    # The network is small: bfloat16 saves seconds at most, and a score should not depend on the CPU's instructions.
    precision: Literal["auto", "fp32", "bf16", "fp16"] = flag("fp32", "precision of the network")
    save_every: float = flag(20.0, "least time between two checkpoints of the network", "seconds")
    models: str = flag("medians,linear,boosting,mlp", "models to fit and blend; also prophet, the slowest")
    model: str = flag("", "one model alone: the same as --models with a single name")
    first_day: str = flag("", "first submit day of a backtest, as 2018-03-01; day D forecasts D+1 and D+2 in UTC")
    last_day: str = flag("", "last submit day; train uses no data after it")
    backtest_days: int = flag(56, "last submit days on whose forecasts the blend is fitted", "days", at_least(1))
    refit_days: int = flag(31, "days after which a backtest fits every model again", "days", at_least(1))
    jobs: int = flag(-1, "fits at the same time", "processes", JOBS)
    beijing_windows: str = flag("golden_5", "windows of the medians in Beijing")
    london_windows: str = flag("fib_9", "windows of the medians in London")
    boosting_rounds: int = flag(250, "trees of each boosted model", "trees", at_least(1))
    boosting_seeds: int = flag(
        4, "boosted models per city and kind of tree, each on different rows", "models", at_least(1)
    )
    boosting_fraction: float = flag(
        0.08, "part of all rows (origin, hour, series) that a tree model sees", "", FRACTION
    )
    history_days: int = flag(1, "days of hours before the origin that the network sees", "days", at_least(1))
    windows: str = flag("golden_1", "median windows that the network sees")
    train_days: int = flag(420, "number of last origins to train the network on", "days", at_least(1))
    units: int = flag(128, "width of the network", rule=at_least(1))
    dropout: float = flag(0.5, "dropout of the network", rule=between(0, 1))


DEFAULT = Config()

RECIPES = {
    "default": DEFAULT,
    "demo": replace(DEFAULT, backtest_days=28),  # make train COMP=kdd_air_quality without data
    # Seconds on demo data, to check that everything works; its score means nothing.
    "smoke": replace(
        DEFAULT,
        epochs=4,
        backtest_days=6,
        jobs=1,
        boosting_rounds=20,
        boosting_seeds=1,
        boosting_fraction=0.2,
        history_days=7,
        windows="golden_3",
        train_days=60,
        units=32,
    ),  # fmt: skip
}


def refuse_folds(config: Config) -> None:
    """Raise UserError for --fold and --folds, which have no meaning here."""
    for name in ("fold", "folds"):
        if (value := getattr(config, name)) != getattr(DEFAULT, name):
            raise UserError(
                f"--{name} {value}: the last days are held out instead of folds: set --last-day and --backtest-days"
            )


def predict(competition: str, argv: list[str]) -> None:
    """forecast any submit days with a fitted run, from the data before each of them"""
    from common.cli import verb_parser

    parser = verb_parser("predict", competition, predict.__doc__)
    parser.add_argument("--run", metavar="NAME[,NAME]", help="finished run, or runs to average [the newest]")
    parser.add_argument(
        "--first-day", metavar="DATE", default="", help="first submit day [the last: of DATA, or the run's]"
    )
    parser.add_argument("--last-day", metavar="DATE", default="", help="last submit day [the first]")
    given = parser.parse_args(argv)
    from competitions.kdd_air_quality import pipeline

    pipeline.predict(competition, given)


def backtest(competition: str, argv: list[str]) -> None:
    """score every model and the blend over a range of submit days; with --run, the models of a fitted run"""
    from common.cli import configured, verb_parser

    parser = verb_parser("backtest", competition, backtest.__doc__)
    parser.add_argument("--run", metavar="NAME", help="finished run whose models are used as they are [fit new ones]")
    config, given = configured(parser, RECIPES, argv)
    from competitions.kdd_air_quality import pipeline

    pipeline.backtest(competition, config, given)


VERBS = {"predict": predict, "backtest": backtest}
