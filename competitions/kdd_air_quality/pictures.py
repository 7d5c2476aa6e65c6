"""Pictures of a run (placeholder order: forecast and truth, error by hour ahead, station by day, missing data)."""


def draw(run, observations, forecasts) -> None:
    """Write the run's pictures and page."""
