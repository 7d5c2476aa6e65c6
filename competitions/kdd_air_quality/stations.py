"""The 48 stations and 131 series of the competition: names in both spellings, types, cities and pollutants."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

POLLUTANTS = ("PM2.5", "PM10", "O3")  # the forecast ones, in the order of the submission's columns
ALL_POLLUTANTS = (*POLLUTANTS, "NO2", "CO", "SO2")  # the last three are only used as features
CITIES = ("Beijing", "London")

# In the order of the organisers' sample submission.
_BEIJING = {
    "urban": "dongsi tiantan guanyuan wanshouxigong aotizhongxin nongzhanguan wanliu beibuxinqu zhiwuyuan "
    "fengtaihuayuan yungang gucheng",
    "suburban": "fangshan daxing yizhuang tongzhou shunyi pingchang mentougou pinggu huairou miyun yanqin",
    "other": "dingling badaling miyunshuiku donggaocun yongledian yufa liulihe",
    "traffic": "qianmen yongdingmennei xizhimenbei nansanhuan dongsihuan",
}
_LONDON = "CD1 kerbside BL0 urban GR4 suburban MY7 kerbside HV1 roadside GN3 roadside GR9 roadside LW2 roadside "
_LONDON += "GN0 roadside KF1 urban CD9 roadside ST5 industrial TH4 roadside"
# Stations in the organisers' history that are never forecast.
LONDON_OTHER = ("BX1", "BX9", "CR8", "CT2", "CT3", "GB0", "HR1", "KC1", "LH0", "RB7", "TD5")

STATION_TYPE = {f"{name}_aq": kind for kind, names in _BEIJING.items() for name in names.split()}
STATION_TYPE |= dict(zip(_LONDON.split()[::2], _LONDON.split()[1::2], strict=True))
STATIONS = tuple(STATION_TYPE)

# The older files cut Beijing's names to ten characters: aotizhongx_aq is aotizhongxin_aq.
FULL_NAME = {f"{name.removesuffix('_aq')[:10]}_aq": name for name in STATIONS if name.endswith("_aq")}
FULL_NAME |= {name: name for name in STATIONS}


def city_of(station: str) -> str:
    return "Beijing" if station.endswith("_aq") else "London"


@dataclass(frozen=True)
class Network:
    """The stations of a forecast in their order, and their S series: all 48 stations have 131."""

    stations: tuple[str, ...] = STATIONS

    @cached_property
    def series(self) -> tuple[tuple[int, int], ...]:
        """(number of the station, number of the pollutant) of each of the S scored series: London has no O3."""
        return tuple(
            (station, pollutant)
            for station, name in enumerate(self.stations)
            for pollutant in range(3 if city_of(name) == "Beijing" else 2)
        )

    @cached_property
    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the stations [S] and of the pollutants [S] of the series, to index arrays [..., stations, 6]."""
        return tuple(np.array(self.series).T)

    @cached_property
    def cities(self) -> tuple[str, ...]:
        """City of each of the S series."""
        return tuple(city_of(self.stations[n]) for n, _ in self.series)

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """'city pollutant' of each of the S series: the five groups that models and blends are fitted for."""
        return tuple(f"{city} {POLLUTANTS[p]}" for city, (_, p) in zip(self.cities, self.series, strict=True))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """'station pollutant' of each of the S series."""
        return tuple(f"{self.stations[n]} {POLLUTANTS[p]}" for n, p in self.series)

    @cached_property
    def by_group(self) -> dict[str, np.ndarray]:
        """{group: bool [S], which series are in the group}"""
        return {group: np.array(self.groups) == group for group in dict.fromkeys(self.groups)}

    def of_city(self, city: str) -> list[int]:
        """Numbers of the city's stations."""
        return [number for number, station in enumerate(self.stations) if city_of(station) == city]

    def in_city(self, city: str) -> np.ndarray:
        """Which series are of the city, bool [S]."""
        return np.array(self.cities) == city
