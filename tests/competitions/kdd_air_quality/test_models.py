"""The forecasters: no leakage from after the origin; the loss, the network, Prophet and the blend."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import softmax

from common.engine.ranks import SINGLE
from common.errors import UserError
from common.fit import fit
from common.run import Run
from competitions.kdd_air_quality import blend, boosting, features, impute, linear, metric, mlp, models, table
from competitions.kdd_air_quality.backtest import periods_of
from competitions.kdd_air_quality.config import RECIPES
from competitions.kdd_air_quality.origins import HOUR, days_between, first_hour
from competitions.kdd_air_quality.parallel import fit_trees
from competitions.kdd_air_quality.stations import Network

CONFIG = replace(
    RECIPES["smoke"],
    epochs=1,
    boosting_rounds=5,
    boosting_seeds=3,  # the third one starts from the linear forecast
    train_days=10,
    history_days=3,
    windows="golden_1",
    units=8,
    jobs=1,
)
DAYS = days_between("2018-03-20", "2018-03-23")


@pytest.fixture(scope="module")
def fitted(observations, tmp_path_factory):
    """Models fitted on the data before the first of DAYS."""
    run = Run(tmp_path_factory.mktemp("run"), {})
    known = observations.before(first_hour(DAYS[0]))
    found = models.Models(CONFIG, run)
    for name in ("medians", "linear", "boosting", "mlp"):
        found.fit(name, known)
    return found


def with_other_future(observations, hour: np.datetime64):
    """The observations with random values at and after `hour`."""
    row = int((hour - observations.start) / HOUR)
    values = observations.values.copy()
    values[row:] = np.random.default_rng(0).lognormal(5, 2, values[row:].shape)
    return replace(observations, values=values)


@pytest.mark.parametrize("name", ["medians", "linear", "boosting", "mlp"])
def test_forecasts_see_nothing_at_or_after_their_origin(observations, fitted, name):
    expected = fitted.forecast(name, observations, DAYS)
    assert expected.shape == (4, 48, 21) and np.isfinite(expected).all() and (expected >= 0).all()
    origin = first_hour(DAYS[-1])
    changed = fitted.forecast(name, with_other_future(observations, origin), DAYS)
    np.testing.assert_array_equal(changed, expected)
    without = fitted.forecast(name, observations.before(origin), DAYS)
    np.testing.assert_array_equal(without, expected)
    alone = fitted.forecast(name, observations, DAYS[1:2])
    np.testing.assert_allclose(alone[0], expected[1], rtol=1e-5)
    known = fitted.forecast(name, with_other_future(observations, origin - 3 * HOUR), DAYS)
    assert not np.array_equal(known[-1], expected[-1]), "the last hours before the origin do count"
    np.testing.assert_array_equal(known[:-1], expected[:-1])


@pytest.mark.parametrize("name", ["boosting", "mlp"])  # boosting with the linear forecaster that it starts from
def test_fits_see_nothing_at_or_after_the_cut(observations, fitted, tmp_path, name):
    cut = first_hour(DAYS[0])
    other = models.Models(CONFIG, Run(tmp_path, {}))
    other.fit(name, with_other_future(observations, cut).before(cut))
    expected = fitted.forecast(name, observations, DAYS)
    np.testing.assert_array_equal(other.forecast(name, observations, DAYS), expected)


def test_the_network_of_a_period_learns_nothing_from_its_held_days(observations, tmp_path):
    """The held-out days are only scored: other values on these days do not change the weights."""
    cut, weights = first_hour(DAYS[0]), []
    for number, source in enumerate((observations, with_other_future(observations, cut))):
        run = Run(tmp_path / str(number), {})
        run.path.mkdir()
        models.Models(CONFIG, run, 0).fit("mlp", source.before(cut), DAYS, source)
        weights.append(torch.load(run.path / "fold-0" / "model.pt", weights_only=True)["model"])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_what_is_fitted_is_not_fitted_again(observations, fitted):
    before = {file: file.stat().st_mtime_ns for file in fitted.run.path.rglob("*") if file.suffix in (".json", ".pt")}
    for name in ("medians", "linear", "boosting", "mlp"):
        fitted.fit(name, observations.before(first_hour(DAYS[0])))
    assert before and all(file.stat().st_mtime_ns == time for file, time in before.items())


def test_no_training_row_reaches_past_the_cut(observations):
    known = observations.before(first_hour(DAYS[0]))
    ends = features.training_ends(known)
    assert ends[-1] * 24 + 48 == len(known.values)


def test_features_of_an_origin_do_not_depend_on_the_others(observations):
    whole = features.build(observations, np.array([40, 41, 60]))
    alone = features.build(observations.before(observations.start + 41 * 24 * HOUR), np.array([41]))
    for name in ("base", "per_series", "per_hour", "calendar"):
        np.testing.assert_array_equal(getattr(whole, name)[1], getattr(alone, name)[0], err_msg=name)
    table = whole.table(np.array([1]), np.array([30]), np.array([5]))
    assert table.shape == (1, len(whole.names))
    assert table[0, whole.names.index("hours_ahead")] == 30 and table[0, whole.names.index("hour")] == 6
    # Origin 41 is Sunday 2018-02-11 00:00, so 30 hours ahead is Monday, weekday 0.
    assert table[0, whole.names.index("weekday")] == 0


def test_the_smape_gradient_is_the_slope_of_the_loss():
    target, scores = np.zeros(5), np.array([-3, -1, 0.5, 1, 4.0])

    class Data:
        def get_label(self):
            return target

    gradient, curvature = boosting.smape_gradient(scores, Data())
    step = 1e-6
    slope = (2 * np.tanh(np.abs(scores + step) / 2) - 2 * np.tanh(np.abs(scores - step) / 2)) / (2 * step)
    np.testing.assert_allclose(gradient, slope, rtol=1e-6)
    assert (curvature > 0).all()
    forecast, truth = np.exp(scores), np.exp(target)
    np.testing.assert_allclose(2 * np.tanh(np.abs(scores) / 2), metric.terms(truth, forecast))


def test_too_short_a_history_is_named(observations):
    with pytest.raises(UserError, match="4 days of history"):
        features.training_ends(observations.before(observations.start + 4 * 24 * HOUR))


@pytest.mark.parametrize("name", ["linear", "boosting"])
def test_the_least_history_that_is_let_through_is_enough(observations, tmp_path, name):
    config = replace(CONFIG, models=name)
    for days in range(1, 12):
        known = observations.before(observations.start + days * 24 * HOUR)
        try:
            models.refuse_short_history(known, config)
            break
        except UserError:
            with pytest.raises(UserError, match="days of history"):
                models.Models(config, Run(tmp_path, {})).fit(name, known)
    models.Models(config, Run(tmp_path, {})).fit(name, known)


def smape_and_penalty(coefficients: np.ndarray, table: np.ndarray, target: np.ndarray, penalty: np.ndarray) -> float:
    """The linear forecaster's objective, by numerical integration of the loss's slope that its rounds use."""
    steps = np.linspace(0, 12, 24_001)
    slope = (1 - np.tanh(steps / 2) ** 2) * np.minimum(steps / linear.ROUNDED_OFF, 1)
    loss = np.concatenate([[0], np.cumsum((slope[1:] + slope[:-1]) / 2 * np.diff(steps))])
    error = np.abs(table @ coefficients[:-1] + coefficients[-1] - target)
    return np.interp(error, steps, loss).sum() + (penalty / 2 * coefficients[:-1] ** 2).sum()


def test_the_linear_forecaster_minimises_the_smape_and_its_penalty(monkeypatch):
    from scipy.optimize import minimize

    random = np.random.default_rng(0)
    table = random.normal(0, 1, (300, 2, 3))
    table[:, 1, 2] = table[:, 0, 2]  # the season is the same at all stations
    table = ((table - table.mean((0, 1))) / table.std((0, 1))).astype(np.float32)
    target = (table @ np.array([0.8, -0.4, 0.3]) + 0.2 + random.laplace(0, 0.4, (300, 2))).astype(np.float32)
    target[::10] = 6  # outliers, which least squares would follow
    target[5:50, 1] = np.nan
    monkeypatch.setattr(linear, "ROUNDS", 60)
    penalty = np.array([5.0, 20, 1])  # per station
    found = linear._fit_one(table[..., :1], table[..., 1:2], table[:, 0, 2:], target, penalty)
    there = np.isfinite(target)
    arguments = (table[there], target[there], 2 * penalty)
    best = minimize(smape_and_penalty, np.zeros(4), arguments, method="Nelder-Mead", options={"maxiter": 5000})
    np.testing.assert_allclose(found, best.x, atol=0.01)
    assert found[0] == pytest.approx(0.8, abs=0.1) and found[-1] < 0.4


def test_the_linear_forecaster_of_a_pollutant_without_values_is_its_daily_cycle():
    nothing = np.full((30, 2), np.nan, np.float32)
    given = *np.ones((2, 30, 2, 4), np.float32), np.ones((30, 2), np.float32)
    assert not linear._fit_one(*given, nothing, np.ones(10)).any()


def test_the_penalty_grows_with_the_root_of_a_feature_s_age():
    """Ages are in days, 1 for features without an age. The city's past is penalised less, single past days more."""
    days = {"last_value": 1 / 24, "city_shape": 1 / 24, "last_6_hours": 1 / 4, "here_CO_last_24_hours": 1}
    days |= {"city_NO2_last_168_hours": 7, "same_hour_7_days_ago": 7, "median_30_days": 1, "spread_last_day": 1}
    expected = {name: age**0.5 for name, age in days.items()} | {"city_last_48_hours": 0.4 * 2**0.5}
    expected |= {"day_5_ago": 2.5 * 5**0.5, "city_day_2_ago": 2.5 * 2**0.5}
    found = linear.penalties(tuple(expected), 3)
    np.testing.assert_allclose(found[:-3], linear.PENALTY * np.array([*expected.values(), 1, 1]))
    assert (found[-3:] == linear.PENALTY_OF_DEPARTURES).all()


def test_what_stations_share_is_where_the_air_of_their_own_city_is(observations):
    """Compared with a slow loop: a series' last six hours relative to its daily cycle, minus the mean of its city."""
    network, hour = observations.network, 50 * 24
    known = features.build(observations, np.array([50]))
    recent = features.log_of(observations.series()[hour - 6 : hour]) - known.base[0, 18:]
    shared = linear._shared(known, network, "Beijing O3")
    assert shared.shape == (1, 48, 2 + len(network.series))
    for number, group in enumerate(network.groups):
        of_city = np.nanmean(np.nanmean(recent[:, network.by_group[group]], axis=1))
        own = recent[:, number][np.isfinite(recent[:, number])]
        away = own.mean() - of_city if len(own) and group.startswith("Beijing") else 0
        np.testing.assert_allclose(shared[0, :, 2 + number], away, atol=1e-4, err_msg=group)
    assert np.abs(shared[0, 0, 2:]).max() > 0.05


def test_each_city_has_the_windows_of_its_own_flag(observations, fitted):
    def forecast(beijing: str, london: str) -> np.ndarray:
        config = replace(CONFIG, beijing_windows=beijing, london_windows=london)
        return replace(fitted, config=config).forecast("medians", observations, DAYS[:1])

    in_london = np.array([group.startswith("London") for group in observations.network.groups])
    golden, fibonacci, both = (
        forecast("golden_1", "golden_1"),
        forecast("fib_3", "fib_3"),
        forecast("fib_3", "golden_1"),
    )
    np.testing.assert_array_equal(both[..., in_london], golden[..., in_london])
    np.testing.assert_array_equal(both[..., ~in_london], fibonacci[..., ~in_london])
    assert (golden != fibonacci).any((0, 1)).all(), "the windows show in every series"


def test_the_network_is_trained_on_the_last_days(observations, tmp_path, monkeypatch):
    known, tasks = observations.before(first_hour(DAYS[0])), []
    monkeypatch.setattr("common.fit.fit", lambda task, *rest: tasks.append(task))
    models.Models(CONFIG, Run(tmp_path, {})).fit("mlp", known)
    data = tasks[0].data
    days = {int(name.split("/")[0]) for name, fold in zip(data.ids, data.folds, strict=True) if fold == -1}
    assert sorted(days) == features.training_ends(known)[-10:].tolist()


def drawn(observations, share: float, seed: int, draw: int, parts: int = 1) -> np.ndarray:
    """The training rows of Beijing that one draw gives a boosted model, from `parts` copies of the same data."""
    ends = np.arange(40, 43)
    known = features.build(observations, ends)
    part = known, features.targets(observations, known.base, ends), np.float32(0)
    return boosting._rows([part] * parts, observations.network.in_city("Beijing"), share, seed, draw)[0]


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """The share of the rows of `one` that are also in `other`."""
    return len({row.tobytes() for row in one} & {row.tobytes() for row in other}) / len(one)


def test_every_draw_of_the_boosting_sees_other_rows(observations):
    first = drawn(observations, 0.3, seed=0, draw=0)
    assert len(first) / len(drawn(observations, 1.0, 0, 0)) == pytest.approx(0.3, abs=0.05)
    assert overlap(first, drawn(observations, 0.3, seed=0, draw=0)) == 1
    for seed, draw in ((0, 1), (0, 2), (1, 0)):
        assert overlap(first, drawn(observations, 0.3, seed, draw)) == pytest.approx(0.3, abs=0.1), (seed, draw)
    both = drawn(observations, 0.3, seed=0, draw=0, parts=2)
    assert overlap(*np.array_split(both, 2)) < 0.5, "and so does every hour of the day"


def test_training_origins_of_the_boosting_keep_their_hour_of_the_day(observations, monkeypatch):
    parts = []
    monkeypatch.setattr(boosting, "_rows", lambda given, *rest: parts.extend(given) or (np.zeros((0, 1)), np.zeros(0)))
    monkeypatch.setattr(linear, "at", lambda *given: np.float32(0))
    next(boosting.fit(observations, None, [0], CONFIG, ""))
    series = observations.series()
    for shift, (known, target, _) in zip((0, 6, 12, 18), parts[:4], strict=True):
        assert (known.calendar[:, :24, known.names.index("hour") - 1] == (shift + np.arange(24)) % 24).all()
        last = features.log_of(series[-48:] if not shift else series[shift - 72 : shift - 24])
        absolute = target[-1] + np.tile(known.base[-1], (2, 1))
        there = np.isfinite(absolute)
        assert there.mean() > 0.5
        np.testing.assert_allclose(absolute[there], last[there], atol=1e-4)


def test_kinds_of_trees_split_differently():
    random = np.random.default_rng(0)
    table = random.normal(size=(500, 3)).astype(np.float32)
    target = table[:, 0] + random.normal(0, 0.1, 500).astype(np.float32)
    settings = boosting.SETTINGS | {"objective": boosting.smape_gradient, "seed": 0, "min_data_in_leaf": 5}
    first, second, again = (
        fit_trees(table, target, settings | kind, 3).split("parameters:")[0] for kind in (*boosting.KINDS, {})
    )
    assert first == again != second and len(boosting.KINDS) == 2


def test_stations_that_repeat_each_other_change_no_line():
    """The penalty grows with the number of stations as the number of rows does, so copies do not change the fit."""
    random = np.random.default_rng(0)
    context, hourly = random.normal(0, 1, (2, 60, 1, 2)).astype(np.float32)
    season = random.normal(0, 1, (60, 2)).astype(np.float32)
    target = (context[..., 0] + 0.5 * hourly[..., 1] + random.normal(0, 0.3, (60, 1))).astype(np.float32)
    penalty = linear.penalties(("last_24_hours",) * 4, 0)
    alone = linear._fit_one(context, hourly, season, target, penalty)
    three = linear._fit_one(
        *(np.repeat(part, 3, axis=1) for part in (context, hourly)), season, target.repeat(3, axis=1), penalty
    )
    assert 0.05 < alone[0] < 0.9, "the penalty shows"
    np.testing.assert_allclose(three[:-1], alone[:-1], atol=1e-4)


def test_a_part_of_the_trees_starts_from_the_linear_forecast(observations, fitted):
    """One of three draws starts from the linear forecast: with 0.1 more in its logarithm, the mean has 0.1 / 3 more."""
    folder = fitted.folder
    files = sorted(folder.glob("boosting-*.json"))
    members = [member for file in files for member in json.loads(file.read_text())]
    lines = np.load(folder / "linear.npy")
    higher = lines + np.eye(lines.shape[-1])[-1] * 0.1
    known = observations.before(first_hour(DAYS[0]))
    ends = np.array([len(known.values) // 24])
    ratio = boosting.forecast(members, higher, known, ends) / boosting.forecast(members, lines, known, ends)
    np.testing.assert_allclose(np.log(ratio), 0.1 / 3, atol=1e-6)  # one of three draws


def network_rows(observations, ends):
    completed = impute.complete(observations.series(), observations.network)
    return mlp.Rows(observations, completed, np.array(ends), CONFIG)


def test_rows_hold_the_past_and_the_targets_in_their_places(observations):
    """Each value is the number of its hour: the inputs end just before the origin, where the targets begin."""
    hours = np.arange(len(observations.values), dtype=np.float32) + 1
    timed = replace(observations, values=np.broadcast_to(hours[:, None, None], observations.values.shape).copy())
    rows = network_rows(timed, [30, 31])
    count = rows.series_count
    inputs, targets = rows.batch(np.array([0, count + 2]))
    for row, end in enumerate((30, 31)):
        past = np.exp(inputs[row, : 3 * 24].numpy() + np.tile(rows.base[row, :, 2 * row], 3))
        np.testing.assert_allclose(past, hours[end * 24 - 72 : end * 24], rtol=1e-4)
        ahead = np.exp(targets[row].numpy() + np.tile(rows.base[row, :, 2 * row], 2))
        np.testing.assert_allclose(ahead, hours[end * 24 : end * 24 + 48], rtol=1e-4)
    relative = np.stack([rows.batch(np.arange(len(rows)))[1].numpy()])[0]
    np.testing.assert_allclose(rows.forecast(relative)[1, :, 0], hours[31 * 24 : 31 * 24 + 48], rtol=1e-4)


def test_the_raw_inputs_join_again_after_the_first_layer():
    model = mlp.ShortcutMLP(10, 4, 0.0).eval()
    assert model.rest[0].in_features == 14
    with torch.no_grad():
        for parameter in model.first.parameters():
            parameter.zero_()
        model.rest[-1].weight.normal_()
        changed = model(torch.zeros(1, 10)) - model(torch.ones(1, 10))
    assert changed.abs().sum() > 0, "the inputs get through although the first layer is dead"


def test_batches_of_the_training_are_days_and_its_fold_is_the_held_days(observations, tmp_path):
    rows = network_rows(observations, [30, 31, 32, 50])
    task = mlp.task(rows, np.array([50]), 0, CONFIG)
    count = rows.series_count
    plan = task.data.order(np.flatnonzero(task.data.folds != 0))(0, 0)
    assert plan.sizes.tolist() == [count] * 3
    for batch in range(3):
        part = plan.index[batch * count : (batch + 1) * count]
        assert len({task.data.ids[row].split("/")[0] for row in part}) == 1
    assert (np.flatnonzero(task.data.folds == 0) == np.arange(3 * count, 4 * count)).all()
    run = Run(tmp_path, {})
    folder = fit(task, replace(CONFIG, keep="last"), run, 0, SINGLE)
    assert np.isfinite(np.load(folder / "oof.npy")).all()


def test_missing_and_zero_values_give_a_finite_loss(observations):
    values = observations.values.copy()
    values[:, 0] = 0
    values[:, 1] = np.nan
    rows = network_rows(replace(observations, values=values), [30])
    inputs, targets = rows.batch(np.arange(len(rows)))
    assert torch.isfinite(inputs).all()
    from common.losses import LogSMAPE, batch_value

    outputs = torch.zeros(len(rows), 48, requires_grad=True)
    loss = batch_value(LogSMAPE(), outputs, targets)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(outputs.grad).all()


def test_the_blend_beats_the_models_it_is_of_and_leaves_out_the_one_behind():
    random = np.random.default_rng(0)
    network = Network(("dongsi_aq", "CD1"))
    truth = random.lognormal(3, 0.5, (20, 48, 5))
    forecasts = {
        name: truth * np.exp(random.normal(0, scale, truth.shape))
        for name, scale in (("better", 0.4), ("good", 0.403), ("bad", 0.6))
    }
    fitted = blend.fit(forecasts, truth, np.ones(truth.shape, bool), network.groups)
    for weights in fitted["weights"].values():
        assert weights["bad"] == 0 and weights["better"] == pytest.approx(0.5, abs=0.1)
        assert sum(weights.values()) == pytest.approx(1, abs=1e-3)
    assert fitted["level"] == pytest.approx(1, abs=0.02)
    mixed = metric.terms(truth, blend.apply(fitted, forecasts, network.groups)).mean()
    assert mixed < 0.8 * min(metric.terms(truth, forecast).mean() for forecast in forecasts.values())
    nothing = blend.fit(forecasts, truth, np.zeros(truth.shape, bool), network.groups)
    equal = dict.fromkeys(forecasts, pytest.approx(1 / 3, abs=1e-4))
    assert nothing == {"level": 1.0, "weights": dict.fromkeys(network.groups, equal)}


def test_the_blend_halves_the_weight_of_a_model_that_is_one_percent_behind(monkeypatch):
    monkeypatch.setattr(blend, "PULL_TO_START", 1e3)  # the weights stay at their initial values
    monkeypatch.setattr(blend, "PULL_TO_SHARED", 1e3)
    network, truth = Network(("dongsi_aq",)), np.full((4, 48, 3), 20.0)
    forecasts = {name: truth * np.exp(2 * np.arctanh(error)) for name, error in (("best", 0.3), ("behind", 0.303))}
    fitted = blend.fit(forecasts, truth, np.ones(truth.shape, bool), network.groups)
    assert fitted["weights"]["Beijing O3"] == pytest.approx({"best": 2 / 3, "behind": 1 / 3}, abs=1e-3)


def test_the_blend_leans_to_the_model_that_a_city_needs():
    """Two models with equal total errors, each better in one of two cities with six series each."""
    random = np.random.default_rng(0)
    network = Network(("dongsi_aq", "tiantan_aq", "CD1", "BL0", "GR4"))
    truth = random.lognormal(3, 0.5, (20, 48, 12))
    rough, fine = 0.6 * random.normal(size=(20, 48, 6)), 0.3 * random.normal(size=(20, 48, 6))
    forecasts = {
        "of Beijing": truth * np.exp(np.concatenate([fine, rough], axis=2)),
        "of London": truth * np.exp(np.concatenate([rough, fine], axis=2)),
    }
    weights = blend.fit(forecasts, truth, np.ones(truth.shape, bool), network.groups)["weights"]
    assert weights["Beijing O3"]["of Beijing"] > 0.6 > 0.4 > weights["London PM10"]["of Beijing"]


def test_the_blend_s_level_mends_forecasts_that_are_too_low():
    random = np.random.default_rng(0)
    network = Network(("dongsi_aq", "CD1"))
    truth = random.lognormal(3, 0.5, (20, 48, 5))
    low = {name: 0.9 * truth * np.exp(random.normal(0, 0.3, truth.shape)) for name in ("one", "two")}
    fitted = blend.fit(low, truth, np.ones(truth.shape, bool), network.groups)
    assert 1.05 < fitted["level"] < 1 / 0.9


def test_the_honest_score_of_a_day_is_by_weights_that_share_no_hour_with_it():
    rng, network = np.random.default_rng(0), Network(("CD1", "BL0"))
    days, shape = 5, (5, 48, len(network.series))
    truth = np.full((days, 48, 2, 3), np.nan)
    truth[..., :2] = rng.lognormal(3, 0.5, (days, 48, 2, 2)) * rng.lognormal(0, 0.5, (days, 1, 1, 1))
    forecasts = {name: rng.lognormal(3, 0.5, shape) for name in ("one", "other")}

    def scores(rows, by):
        weights = blend.tuned({name: values[by] for name, values in forecasts.items()}, truth[by], network)
        found = blend.apply(weights, {name: values[rows] for name, values in forecasts.items()}, network.groups)
        return metric.daily(truth[rows], table.grid(found, network), network.stations)

    expected = [scores([day], [other for other in range(days) if abs(other - day) >= 2])[0] for day in range(days)]
    found = blend.honest(forecasts, truth, network)
    assert found == pytest.approx(np.mean(expected)) and found > scores(range(days), range(days)).mean()
    assert np.isfinite(blend.honest({name: values[:1] for name, values in forecasts.items()}, truth[:1], network))


def test_the_blend_s_gradient_finds_the_minimum_of_a_grid():
    random = np.random.default_rng(1)
    target = random.normal(0, 1, 400)
    logs = np.stack([target + random.normal(0.3, 0.5, 400), target + random.normal(-0.3, 0.4, 400)])
    grid = np.linspace(0, 1, 201)
    values = [2 * np.tanh(np.abs(w * logs[0] + (1 - w) * logs[1] - target) / 2).mean() for w in grid]
    free, level = blend._minimum(logs, target, np.zeros(2), 2e-5, 0.0)
    assert level == 0 and softmax(free)[0] == pytest.approx(grid[np.argmin(values)], abs=0.06)


def test_periods_are_refitted_and_the_first_blend_comes_from_before():
    days = days_between("2018-03-01", "2018-04-28")
    before, march, april = periods_of(days, 31, 28)
    assert [str(before[0]), str(before[-1])] == ["2018-01-31", "2018-02-27"]
    assert str(march[0]) == "2018-03-01" and str(april[0]) == "2018-04-01" and len(april) == 28
    # The 48 forecast hours of the last day before March end no later than the first origin of March.
    assert first_hour(before[-1]) + 48 * HOUR <= first_hour(march[0])


def test_prophet_is_its_line_and_its_week():
    import pandas as pd

    from competitions.kdd_air_quality import prophet_model  # takes a second, for this test alone

    random = np.random.default_rng(0)
    hours = np.datetime64("2018-01-01T00") + np.arange(30 * 24) * HOUR
    values = 50 + np.arange(len(hours)) * 0.02 + 10 * np.sin(np.arange(len(hours)) / 24 * 2 * np.pi)
    values = (values + random.normal(0, 2, len(hours))).astype(np.float32)
    values[100:130] = np.nan
    fitted = prophet_model.fit_one(hours, values, "Beijing")
    later = hours[-1] + (1 + 24 * 20 + np.arange(48)) * HOUR
    there = np.isfinite(values)
    model = prophet_model.fitted_prophet(hours[there], values[there], "Beijing")
    expected = model.predict(pd.DataFrame({"ds": later.astype("datetime64[ns]")}))["yhat"].to_numpy()
    found = prophet_model.forecast(fitted[:, None], later[:1])[0, :, 0]
    np.testing.assert_allclose(found, np.maximum(expected, 0), rtol=1e-6)
    assert np.isnan(prophet_model.fit_one(hours, np.full(len(hours), np.nan), "London")).all()


def test_models_are_chosen_by_name():
    assert models.names_of(replace(CONFIG, models="boosting,medians")) == ["medians", "boosting"]
    assert models.names_of(replace(CONFIG, model="mlp")) == ["mlp"]
    for wrong in ("", "medians,forest"):
        with pytest.raises(UserError, match="medians,linear,boosting,mlp,prophet"):
            models.names_of(replace(CONFIG, models=wrong))
