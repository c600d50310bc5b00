"""Writes src/motorpool/core/wear_table.py: what BLAST-Lite's battery models say about a vehicle that computes.

Run it with ``make wear-table`` or ``.venv/bin/python tools/wear_table.py``: it makes a temporary environment of its own
(BLAST-Lite needs numpy below 2 and several hundred megabytes), runs the models there, and writes the table. Nothing in
it is random: two runs with the same packages write the same bytes.

    .venv/bin/python tools/wear_table.py --python /path/to/python   # an environment that has blast-lite already
    .venv/bin/python tools/wear_table.py --check                    # compare with the table in the tree, write nothing
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "src" / "motorpool" / "core" / "wear_table.py"
COMMAND = "make wear-table"
PACKAGES = ("blast-lite==1.1.1", "numpy==1.26.4", "pandas==2.3.3", "scipy==1.17.1")

CAPACITY_KWH = 60.0
TRIP_KWH = 4.0  # twice a day
CHARGE_KW = 7.0
NIGHT_H = 8.0
YEARS = 8
STEP_S = 900
MEAN_C = 20.0
SEASON_C = 8.0
LIMITS_PCT = (60, 80, 95)
# name of the chemistry -> class of BLAST-Lite
MODELS = {
    "nca": "Nca_Gr_Panasonic3Ah_Battery",
    "nmc622": "Nmc622_Gr_DENSO50Ah_Battery",
    "lfp": "Lfp_Gr_250AhPrismatic",
}
# name of the case -> (watts from the battery for 8 hours a night, degrees that the pack is warmer meanwhile)
CASES = {
    "none": (0.0, 0.0),
    "grid+2c": (0.0, 2.0),
    "grid+5c": (0.0, 5.0),
    "battery-250w": (250.0, 0.0),
    "battery-500w": (500.0, 0.0),
    "battery-1000w": (1000.0, 0.0),
    "battery-1000w+5c": (1000.0, 5.0),
}

HEAD = '''"""Loss of battery capacity with and without computing, as BLAST-Lite's models see it. Written by a program.

Made by: {command} (tools/wear_table.py), with
{versions}.
Source: BLAST-Lite 1.1.1 (National Renewable Energy Laboratory; models fitted to published ageing tests), classes
{classes}.
Its own caveat: "it is good to treat all models as qualitative"; "assume that pack lifetime is 20-30% less than cell
lifetime". The models were fitted to one to three years of tests; here they are carried on to {years} years.

The vehicle: {capacity:g} kWh, two trips of {trip:g} kWh a day (08:00 and 17:00), charging at {charge:g} kW to the limit
from 17:30, a pack at {mean:g} Celsius, {season:g} warmer in summer and {season:g} cooler in winter. Computing from
22:00 to 06:00 every night; what it took from the battery is charged again from 06:00. "+2c": the pack is 2 degrees
warmer meanwhile. "none" stands for computing from the grid without warming the battery too: its trace is the same.
Differences of 0.3 percentage points and less are within the models' numerical noise.

Decides: nothing. Called by: ``core.wear``.
"""

from __future__ import annotations

from typing import Final

import msgspec

BLAST_LITE_VERSION: Final = "1.1.1"
CAPACITY_WH: Final = {capacity_wh}
YEARS: Final = {years}
NIGHT_HOURS: Final = {night:g}


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
'''


class ToolError(Exception):
    """A step failed; the text says which, in one line."""


def year(limit_pct: int, battery_w: float, delta_c: float) -> dict[str, Any]:
    """One year of the vehicle: seconds, state of charge (0 to 1) and temperature of the pack."""
    steps_a_day = 86_400 // STEP_S
    top = limit_pct / 100
    step_h = STEP_S / 3600
    soc, temp = [top], [0.0]
    for step in range(365 * steps_a_day):
        hour = (step % steps_a_day) * step_h
        now = soc[-1]
        if 8 <= hour < 8.5 or 17 <= hour < 17.5:
            now -= TRIP_KWH / CAPACITY_KWH * step_h / 0.5
        elif hour >= 22 or hour < 6:
            now -= battery_w / 1000 / CAPACITY_KWH * step_h
        elif hour >= 17.5 or hour < 8:
            now = min(top, now + CHARGE_KW / CAPACITY_KWH * step_h)
        soc.append(now)
        season = MEAN_C - SEASON_C * float(np.cos(2 * np.pi * step / (365 * steps_a_day)))
        temp.append(season + (delta_c if hour >= 22 or hour < 6 else 0.0))
    temp[0] = temp[1]
    return {
        "Time_s": np.arange(len(soc)) * float(STEP_S),
        "SOC": np.array(soc),
        "Temperature_C": np.array(temp),
    }


def simulate() -> None:
    """Inside the temporary environment: run every case and print the results as JSON."""
    models = importlib.import_module("blast.models")
    rows = []
    for chemistry, name in MODELS.items():
        for limit_pct in LIMITS_PCT:
            for case, (battery_w, delta_c) in CASES.items():
                battery = getattr(models, name)()
                battery.simulate_battery_life(year(limit_pct, battery_w, delta_c), threshold_time=YEARS)
                days, q, efc = battery.stressors["t_days"], battery.outputs["q"], battery.stressors["efc"]
                after = [round(100 * (1 - float(np.interp(365 * n, days, q))), 3) for n in (1, YEARS)]
                cycles = round(float(np.interp(365, days, efc)), 1)
                rows.append([chemistry, limit_pct, case, int(battery_w), int(delta_c), *after, cycles])
                print(*rows[-1], file=sys.stderr, flush=True)
    packages = [package.split("==")[0] for package in PACKAGES]
    python = ".".join(str(part) for part in sys.version_info[:2])
    versions = [f"{name} {version(name)}" for name in packages] + [f"Python {python}"]
    print(json.dumps({"versions": versions, "rows": rows}))


def render(result: dict[str, Any]) -> str:
    """The whole module."""
    text = HEAD.format(
        command=COMMAND,
        versions=", ".join(result["versions"]),
        classes=", ".join(MODELS.values()),
        years=YEARS,
        capacity=CAPACITY_KWH,
        capacity_wh=int(CAPACITY_KWH * 1000),
        trip=TRIP_KWH,
        charge=CHARGE_KW,
        mean=MEAN_C,
        season=SEASON_C,
        night=NIGHT_H,
    )
    for chemistry, limit_pct, case, *numbers in result["rows"]:
        text += f'    _row("{chemistry}", {limit_pct}, "{case}", ({", ".join(str(number) for number in numbers)})),\n'
    return text + ")\n"


def run(command: list[str]) -> str:
    """One step; raises ToolError with the last line of what it said."""
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
        raise ToolError(f"{' '.join(command[:4])} ...: {said[-1].strip()}")
    return done.stdout


def results(python: str | None) -> dict[str, Any]:
    """Run the models in an environment that has them: ``python``'s, or a temporary one."""
    with tempfile.TemporaryDirectory(prefix="wear-table-") as folder:
        if python is None:
            print("==> Making a temporary environment with BLAST-Lite (some hundred megabytes)", flush=True)
            run([sys.executable, "-m", "venv", folder])
            python = str(Path(folder) / "bin" / "python")
            run([python, "-m", "pip", "install", "--quiet", *PACKAGES])
        print("==> Running the models", flush=True)
        parsed: dict[str, Any] = json.loads(run([python, __file__, "--simulate"]).splitlines()[-1])
        return parsed


def main() -> int:
    """Write or compare the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="an interpreter that has blast-lite already")
    parser.add_argument("--check", action="store_true", help="compare with the table in the tree, write nothing")
    parser.add_argument("--simulate", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.simulate:
        simulate()
        return 0
    try:
        text = render(results(asked.python))
    except ToolError as error:
        print(f"no table was made: {error}", file=sys.stderr)
        return 1
    if asked.check:
        same = TABLE.read_text() == text
        print("the table in the tree is what the models say" if same else "the table in the tree is another one")
        return 0 if same else 1
    TABLE.write_text(text)
    print(f"==> Wrote {TABLE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
