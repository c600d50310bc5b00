"""Loss of battery capacity with and without computing, as BLAST-Lite's models see it. Written by a program.

Made by: make wear-table (tools/wear_table.py), with
blast-lite 1.1.1, numpy 1.26.4, pandas 2.3.3, scipy 1.17.1, Python 3.11.
Source: BLAST-Lite 1.1.1 (National Renewable Energy Laboratory; models fitted to published ageing tests), classes
Nca_Gr_Panasonic3Ah_Battery, Nmc622_Gr_DENSO50Ah_Battery, Lfp_Gr_250AhPrismatic.
Its own caveat: "it is good to treat all models as qualitative"; "assume that pack lifetime is 20-30% less than cell
lifetime". The models were fitted to one to three years of tests; here they are carried on to 8 years.

The vehicle: 60 kWh, two trips of 4 kWh a day (08:00 and 17:00), charging at 7 kW to the limit
from 17:30, a pack at 20 Celsius, 8 warmer in summer and 8 cooler in winter. Computing from
22:00 to 06:00 every night; what it took from the battery is charged again from 06:00. "+2c": the pack is 2 degrees
warmer meanwhile. "none" stands for computing from the grid without warming the battery too: its trace is the same.
Differences of 0.3 percentage points and less are within the models' numerical noise.

Decides: nothing. Called by: ``core.wear``.
"""

from __future__ import annotations

from typing import Final

import msgspec

BLAST_LITE_VERSION: Final = "1.1.1"
CAPACITY_WH: Final = 60000
YEARS: Final = 8
NIGHT_HOURS: Final = 8


class WearRow(msgspec.Struct, frozen=True, kw_only=True):
    """Percentage points of capacity lost after one year and after eight, and equivalent full cycles a year.

    ``battery_w``: watts taken from the battery for eight hours a night. ``pack_delta_c``: how much warmer the pack is
    meanwhile.
    """

    chemistry: str
    limit_pct: int
    case: str
    battery_w: int
    pack_delta_c: int
    year_pp: float
    years_8_pp: float
    cycles_year: float


def _row(chemistry: str, limit_pct: int, case: str, numbers: tuple[int, int, float, float, float]) -> WearRow:
    battery_w, pack_delta_c, year_pp, years_8_pp, cycles_year = numbers
    return WearRow(
        chemistry=chemistry,
        limit_pct=limit_pct,
        case=case,
        battery_w=battery_w,
        pack_delta_c=pack_delta_c,
        year_pp=year_pp,
        years_8_pp=years_8_pp,
        cycles_year=cycles_year,
    )


ROWS: Final[tuple[WearRow, ...]] = (
    _row("nca", 60, "none", (0, 0, 3.672, 10.76, 48.6)),
    _row("nca", 60, "grid+2c", (0, 2, 3.764, 11.027, 48.6)),
    _row("nca", 60, "grid+5c", (0, 5, 3.912, 11.457, 48.6)),
    _row("nca", 60, "battery-250w", (250, 0, 3.66, 10.746, 60.8)),
    _row("nca", 60, "battery-500w", (500, 0, 3.646, 10.726, 73.0)),
    _row("nca", 60, "battery-1000w", (1000, 0, 3.614, 10.67, 97.3)),
    _row("nca", 60, "battery-1000w+5c", (1000, 5, 3.837, 11.317, 97.3)),
    _row("nca", 80, "none", (0, 0, 4.644, 13.58, 48.6)),
    _row("nca", 80, "grid+2c", (0, 2, 4.758, 13.912, 48.6)),
    _row("nca", 80, "grid+5c", (0, 5, 4.941, 14.445, 48.6)),
    _row("nca", 80, "battery-250w", (250, 0, 4.625, 13.548, 60.8)),
    _row("nca", 80, "battery-500w", (500, 0, 4.604, 13.508, 73.0)),
    _row("nca", 80, "battery-1000w", (1000, 0, 4.557, 13.411, 97.3)),
    _row("nca", 80, "battery-1000w+5c", (1000, 5, 4.833, 14.213, 97.3)),
    _row("nca", 95, "none", (0, 0, 5.541, 16.186, 48.6)),
    _row("nca", 95, "grid+2c", (0, 2, 5.675, 16.577, 48.6)),
    _row("nca", 95, "grid+5c", (0, 5, 5.891, 17.203, 48.6)),
    _row("nca", 95, "battery-250w", (250, 0, 5.516, 16.136, 60.8)),
    _row("nca", 95, "battery-500w", (500, 0, 5.489, 16.078, 73.0)),
    _row("nca", 95, "battery-1000w", (1000, 0, 5.428, 15.944, 97.3)),
    _row("nca", 95, "battery-1000w+5c", (1000, 5, 5.752, 16.886, 97.3)),
    _row("nmc622", 60, "none", (0, 0, 2.994, 8.508, 48.6)),
    _row("nmc622", 60, "grid+2c", (0, 2, 3.042, 8.643, 48.6)),
    _row("nmc622", 60, "grid+5c", (0, 5, 3.119, 8.859, 48.6)),
    _row("nmc622", 60, "battery-250w", (250, 0, 3.044, 8.651, 60.8)),
    _row("nmc622", 60, "battery-500w", (500, 0, 3.162, 8.995, 73.0)),
    _row("nmc622", 60, "battery-1000w", (1000, 0, 3.37, 9.599, 97.3)),
    _row("nmc622", 60, "battery-1000w+5c", (1000, 5, 3.476, 9.898, 97.3)),
    _row("nmc622", 80, "none", (0, 0, 2.79, 7.93, 48.6)),
    _row("nmc622", 80, "grid+2c", (0, 2, 2.827, 8.034, 48.6)),
    _row("nmc622", 80, "grid+5c", (0, 5, 2.886, 8.201, 48.6)),
    _row("nmc622", 80, "battery-250w", (250, 0, 2.839, 8.071, 60.8)),
    _row("nmc622", 80, "battery-500w", (500, 0, 2.96, 8.423, 73.0)),
    _row("nmc622", 80, "battery-1000w", (1000, 0, 3.175, 9.046, 97.3)),
    _row("nmc622", 80, "battery-1000w+5c", (1000, 5, 3.25, 9.259, 97.3)),
    _row("nmc622", 95, "none", (0, 0, 3.028, 8.617, 48.6)),
    _row("nmc622", 95, "grid+2c", (0, 2, 3.063, 8.714, 48.6)),
    _row("nmc622", 95, "grid+5c", (0, 5, 3.119, 8.873, 48.6)),
    _row("nmc622", 95, "battery-250w", (250, 0, 3.062, 8.715, 60.8)),
    _row("nmc622", 95, "battery-500w", (500, 0, 3.177, 9.053, 73.0)),
    _row("nmc622", 95, "battery-1000w", (1000, 0, 3.368, 9.61, 97.3)),
    _row("nmc622", 95, "battery-1000w+5c", (1000, 5, 3.432, 9.788, 97.3)),
    _row("lfp", 60, "none", (0, 0, 1.14, 3.956, 48.6)),
    _row("lfp", 60, "grid+2c", (0, 2, 1.179, 4.064, 48.6)),
    _row("lfp", 60, "grid+5c", (0, 5, 1.248, 4.256, 48.6)),
    _row("lfp", 60, "battery-250w", (250, 0, 1.181, 4.194, 60.8)),
    _row("lfp", 60, "battery-500w", (500, 0, 1.221, 4.427, 73.0)),
    _row("lfp", 60, "battery-1000w", (1000, 0, 1.307, 4.922, 97.3)),
    _row("lfp", 60, "battery-1000w+5c", (1000, 5, 1.404, 5.17, 97.3)),
    _row("lfp", 80, "none", (0, 0, 1.422, 4.795, 48.6)),
    _row("lfp", 80, "grid+2c", (0, 2, 1.475, 4.944, 48.6)),
    _row("lfp", 80, "grid+5c", (0, 5, 1.567, 5.207, 48.6)),
    _row("lfp", 80, "battery-250w", (250, 0, 1.456, 5.014, 60.8)),
    _row("lfp", 80, "battery-500w", (500, 0, 1.488, 5.221, 73.0)),
    _row("lfp", 80, "battery-1000w", (1000, 0, 1.553, 5.655, 97.3)),
    _row("lfp", 80, "battery-1000w+5c", (1000, 5, 1.675, 5.981, 97.3)),
    _row("lfp", 95, "none", (0, 0, 1.581, 5.268, 48.6)),
    _row("lfp", 95, "grid+2c", (0, 2, 1.638, 5.431, 48.6)),
    _row("lfp", 95, "grid+5c", (0, 5, 1.739, 5.718, 48.6)),
    _row("lfp", 95, "battery-250w", (250, 0, 1.623, 5.512, 60.8)),
    _row("lfp", 95, "battery-500w", (500, 0, 1.664, 5.748, 73.0)),
    _row("lfp", 95, "battery-1000w", (1000, 0, 1.748, 6.237, 97.3)),
    _row("lfp", 95, "battery-1000w+5c", (1000, 5, 1.895, 6.635, 97.3)),
)
