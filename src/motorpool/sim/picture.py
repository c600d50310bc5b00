"""Draws a simulated year: charge at every departure, hours, when the car works, money, and why it does not.

Decides: the form. Must not: compute what it shows, or write a date or anything random into the file: the same year is
the same bytes.
Called by: ``cli.sim``, which imports it only when a picture is wanted: matplotlib is an extra (``plots``).
"""

from __future__ import annotations

from io import BytesIO
from itertools import accumulate
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MultipleLocator

from motorpool.sim import words
from motorpool.sim.year import Year

# Okabe and Ito's colours, which people of every colour vision can tell apart.
BLUE: Final = "#0072B2"
ORANGE: Final = "#D55E00"
GREEN: Final = "#009E73"
GREY: Final = "#C9CED3"
INK: Final = "#1F2933"
FAINT: Final = "#616E7C"
HEAT: Final = LinearSegmentedColormap.from_list("hours", ["#F4F7FA", "#9CC9E3", BLUE, "#01324F"])
STYLE: Final[dict[Any, Any]] = {
    "svg.hashsalt": "motorpool",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": "#9AA5B1",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E7EB",
    "grid.linewidth": 0.7,
}
DAYS: Final = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
WEEK_MS: Final = 7 * 86_400_000
MANY_POINTS: Final = 200
LEGEND: Final[dict[str, Any]] = {
    "frameon": False,
    "fontsize": 8.5,
    "loc": "lower right",
    "bbox_to_anchor": (1.01, 0.985),
    "borderaxespad": 0.3,
    "handletextpad": 0.4,
    "handlelength": 1.3,
    "columnspacing": 1.1,
}
REASONS_SHOWN: Final = 7


def draw(year: Year, source: str, currency: str, *, png: bool = False) -> bytes:
    """The picture as the bytes of an SVG or PNG file."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(13.2, 8.8), facecolor="white")
        _heading(figure, year, source, currency)
        _departures(figure.add_axes((0.055, 0.53, 0.555, 0.285)), year)
        _why(figure.add_axes((0.775, 0.53, 0.2, 0.285)), year)
        _weeks(figure.add_axes((0.055, 0.135, 0.3, 0.27)), year)
        _heat(figure, figure.add_axes((0.425, 0.135, 0.25, 0.27)), year)
        _money(figure.add_axes((0.735, 0.135, 0.15, 0.27)), year, currency)
        file = BytesIO()
        if png:
            figure.savefig(file, format="png", dpi=130)
        else:
            figure.savefig(file, format="svg", dpi=200, metadata={"Date": None})
        return file.getvalue()


def _heading(figure: Figure, year: Year, source: str, currency: str) -> None:
    count = sum(year.violations.values())
    title = f"A year of one owner: {year.user}, {words.months(year)}"
    result = words.violations(count)
    figure.text(0.03, 0.952, title, fontsize=17, weight="bold", va="center")
    colour = GREEN if count == 0 else ORANGE
    figure.text(0.975, 0.952, result, fontsize=17, weight="bold", va="center", ha="right", color=colour)
    facts = (
        f"{len(year.departures)} departures, largest loss of charge {words.loss(year.least_pct)} points",
        f"{words.hours(year.worked_ms):,.0f} of {words.hours(year.plugged_ms):,.0f} plugged-in hours worked",
        f"{year.books_wh / 1000:,.0f} kWh",
        f"{words.money(year.statement.net_micro)} {currency} left for the owner",
    )
    figure.text(0.03, 0.907, "   ·   ".join(facts), fontsize=10.5, color=FAINT, va="center")
    notes = (
        f"Charging sessions: {source}. Times of plug-in and plug-out are recorded; the battery"
        f" ({year.capacity_wh / 1000:.1f} kWh), the charger ({year.charger_w / 1000:.1f} kW), the car and its work are"
        " models.",
        f"The guard looked {year.looks:,} times. Checks that share no rule with it saw each of"
        f" {year.permits_checked:,} permits, and the charge at {len(year.departures)} departures and"
        f" {len(year.ready_by)} ready-by times.",
    )
    figure.text(0.03, 0.037, "\n".join(notes), fontsize=8.5, color=FAINT, va="center", linespacing=1.6)


def _departures(axes: Axes, year: Year) -> None:
    weeks = [(departure.at_ms - year.from_ms) / WEEK_MS for departure in year.departures]
    many = len(weeks) > MANY_POINTS  # then they become one image within the SVG
    axes.set_title("Charge at every departure, %")
    arrived = [departure.arrived_pct for departure in year.departures]
    axes.scatter(weeks, arrived, s=9, color="#9AA5B1", linewidths=0, label="at plug-in", rasterized=many)
    without = [departure.without_pct for departure in year.departures]
    axes.scatter(
        weeks,
        without,
        s=62,
        facecolors="none",
        edgecolors=ORANGE,
        linewidths=1.1,
        label="without Motorpool",
        rasterized=many,
    )
    with_us = [departure.with_pct for departure in year.departures]
    axes.scatter(weeks, with_us, s=17, color=BLUE, linewidths=0, label="with Motorpool", rasterized=many, zorder=3)
    axes.set_xlim(0, len(year.weeks))
    axes.set_ylim(0, 103)
    axes.yaxis.set_major_locator(MultipleLocator(20))
    axes.set_xlabel("week")
    axes.grid(visible=False, axis="x")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], ncols=3, **LEGEND)


def _weeks(axes: Axes, year: Year) -> None:
    numbers = range(1, len(year.weeks) + 1)
    plugged = [words.hours(week.plugged_ms) for week in year.weeks]
    worked = [words.hours(week.worked_ms) for week in year.weeks]
    axes.set_title("Hours a week")
    axes.bar(numbers, plugged, width=0.86, color=GREY, label="plugged in")
    axes.bar(numbers, worked, width=0.86, color=BLUE, label="worked")
    axes.axhline(year.budget_h_week, color=ORANGE, linewidth=1.2, linestyle=(0, (4, 3)), label="budget")
    axes.set_xlim(0.3, max(numbers) + 0.7)
    axes.set_ylim(0, max(80.0, *plugged) * 1.12)
    axes.set_xlabel("week")
    axes.grid(visible=False, axis="x")
    axes.legend(ncols=3, **LEGEND)


def _heat(figure: Figure, axes: Axes, year: Year) -> None:
    weeks = max(1.0, (year.to_ms - year.from_ms) / WEEK_MS)
    share = [[words.hours(worked_ms) / weeks * 100 for worked_ms in day] for day in year.worked_by_hour_ms]
    axes.set_title("When it works, % of such hours")
    axes.grid(visible=False)
    mesh = axes.pcolormesh(range(25), range(8), share, cmap=HEAT, vmin=0, edgecolors="white", linewidth=0.6)
    axes.set_ylim(7, 0)
    axes.set_yticks([number + 0.5 for number in range(7)], DAYS)
    axes.set_xticks(range(0, 25, 6), [f"{hour:02d}" for hour in range(0, 25, 6)])
    axes.set_xlabel("local hour")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=18, format=FuncFormatter(lambda value, _: f"{value:.0f}"))
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)


def _money(axes: Axes, year: Year, currency: str) -> None:
    lines = [
        ("pay", BLUE, "-", 1.6, [week.pay_micro for week in year.weeks]),
        ("electricity", ORANGE, "--", 1.6, [week.electricity_micro for week in year.weeks]),
        ("wear", FAINT, ":", 1.6, [week.wear_micro for week in year.weeks]),
        ("net", GREEN, "-", 2.8, [week.net_micro for week in year.weeks]),
    ]
    axes.set_title(f"Money so far, {currency}")
    ends: list[tuple[float, str, str]] = []
    for name, colour, style, width, amounts in lines:
        sums = [0.0, *(total / 1e6 for total in accumulate(amounts))]
        axes.plot(range(len(sums)), sums, color=colour, linestyle=style, linewidth=width)
        ends.append((sums[-1], f"{name} {sums[-1]:,.2f}", colour))
    low, high = axes.get_ylim()
    least = (high - low) * 0.085
    at = float("-inf")
    for end, text, colour in sorted(ends):
        at = max(end, at + least)
        axes.annotate(
            text,
            (len(year.weeks), at),
            xytext=(6, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            fontsize=9,
        )
    axes.set_xlim(0, len(year.weeks))
    axes.set_xlabel("week")
    axes.grid(visible=False, axis="x")


def _why(axes: Axes, year: Year) -> None:
    bars = [("worked", words.hours(year.worked_ms))]
    bars += [(words.why(code), words.hours(for_ms)) for code, for_ms in list(year.why_ms.items())[:REASONS_SHOWN]]
    rest = sum(list(year.why_ms.values())[REASONS_SHOWN:])
    if rest:
        bars.append(("other reasons", words.hours(rest)))
    axes.set_title("Where the plugged-in hours went", x=-0.62)
    axes.barh(
        [name for name, _ in bars], [value for _, value in bars], color=[BLUE, *[GREY] * (len(bars) - 1)], height=0.68
    )
    axes.invert_yaxis()
    most = max(value for _, value in bars) or 1.0
    for number, (_, value) in enumerate(bars):
        axes.text(
            value + most * 0.02, number, f"{value:,.0f}" if value >= 10 else f"{value:.1f}", va="center", fontsize=8.5
        )
    axes.set_xlim(0, most * 1.22)
    axes.set_xlabel("hours")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)
