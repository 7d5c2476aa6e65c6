"""The 48 stations and 131 series of the competition: names in both spellings, types, cities and pollutants."""

from dataclasses import dataclass
from functools import cached_property

POLLUTANTS = ("PM2.5", "PM10", "O3")  # forecast, in the order of the submission's columns
ALL_POLLUTANTS = (*POLLUTANTS, "NO2", "CO", "SO2")  # the last three only inform the forecasts
CITIES = ("Beijing", "London")

# In the order of the organisers' sample submission.
BEIJING_TYPES = {
    "urban": "dongsi tiantan guanyuan wanshouxigong aotizhongxin nongzhanguan wanliu beibuxinqu zhiwuyuan "
    "fengtaihuayuan yungang gucheng",
    "suburban": "fangshan daxing yizhuang tongzhou shunyi pingchang mentougou pinggu huairou miyun yanqin",
    "other": "dingling badaling miyunshuiku donggaocun yongledian yufa liulihe",
    "traffic": "qianmen yongdingmennei xizhimenbei nansanhuan dongsihuan",
}
LONDON = ("CD1", "BL0", "GR4", "MY7", "HV1", "GN3", "GR9", "LW2", "GN0", "KF1", "CD9", "ST5", "TH4")
LONDON_TYPES = {
    "urban": ("BL0", "KF1"),
    "suburban": ("GR4",),
    "kerbside": ("CD1", "MY7"),
    "industrial": ("ST5",),
    "roadside": ("HV1", "GN3", "GR9", "LW2", "GN0", "CD9", "TH4"),
}
# In the organisers' history, never forecast.
LONDON_OTHER = ("BX1", "BX9", "CR8", "CT2", "CT3", "GB0", "HR1", "KC1", "LH0", "RB7", "TD5")

STATION_TYPE = {f"{name}_aq": kind for kind, names in BEIJING_TYPES.items() for name in names.split()} | {
    name: kind for kind, names in LONDON_TYPES.items() for name in names
}
STATIONS = (*(name for name in STATION_TYPE if name.endswith("_aq")), *LONDON)

# The older files cut Beijing's names to ten characters: aotizhongx_aq is aotizhongxin_aq.
FULL_NAME = {f"{name.removesuffix('_aq')[:10]}_aq": name for name in STATIONS if name.endswith("_aq")} | {
    name: name for name in STATIONS
}


def city_of(station: str) -> str:
    return "Beijing" if station.endswith("_aq") else "London"


def scored(station: str, pollutant: str) -> bool:
    """Whether the competition scores this series: Beijing's three pollutants, London's two."""
    return pollutant in POLLUTANTS and not (pollutant == "O3" and city_of(station) == "London")


@dataclass(frozen=True)
class Network:
    """The stations of a forecast in their order, and the S series over them: 131 of all 48 stations."""

    stations: tuple[str, ...] = STATIONS

    @cached_property
    def series(self) -> tuple[tuple[int, int], ...]:
        """(number of the station, number of the pollutant) of each of the S scored series."""
        return tuple(
            (number, POLLUTANTS.index(pollutant))
            for number, station in enumerate(self.stations)
            for pollutant in POLLUTANTS
            if scored(station, pollutant)
        )

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """'city pollutant' of each of the S series: the five groups that models and blends are fitted for."""
        return tuple(f"{city_of(self.stations[n])} {POLLUTANTS[p]}" for n, p in self.series)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """'station pollutant' of each of the S series."""
        return tuple(f"{self.stations[n]} {POLLUTANTS[p]}" for n, p in self.series)

    def of_city(self, city: str) -> list[int]:
        """Numbers of the city's stations."""
        return [number for number, station in enumerate(self.stations) if city_of(station) == city]
