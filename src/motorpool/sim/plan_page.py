"""A plan as one page: an HTML file that opens offline, by day and by night, and prints.

Decides: the form. Must not: compute what it shows, load anything from anywhere, or write a date or anything random into
the file: the same plan is the same bytes. Called by: ``cli.plan``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from math import floor, log10
from typing import Final

from motorpool.core import carbon
from motorpool.sim.plan import Band, Ledger, Plan

DAYS: Final = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
UNITS: Final = ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"), (1e3, "thousand"), (1.0, ""))
WIDTH, HEIGHT = 760.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 48.0, 18.0, 30.0, 34.0
STYLE: Final = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1f2933;--faint:#5b6875;--line:#e1e6eb;--blue:#0072b2;--sky:#0072b233;
--orange:#c2500a;--green:#00785a;--grey:#8d99a6;--tint:#f4f7fa}
@media (prefers-color-scheme:dark){:root{--paper:#14191f;--ink:#e6ebf0;--faint:#9fb0c0;--line:#2b343e;--blue:#56b4e9;
--sky:#56b4e940;--orange:#f0904d;--green:#3fc59b;--grey:#77848f;--tint:#1b222a}}
@media print{:root{color-scheme:light;--paper:#fff;--ink:#000;--faint:#444;--line:#ccc;--blue:#0072b2;--sky:#0072b233;
--orange:#c2500a;--green:#00785a;--grey:#8d99a6;--tint:#fff}section{break-inside:avoid}main{padding:0}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:860px;margin:0 auto;padding:32px 20px 60px}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 6px}
h2{font-size:1.15rem;margin:38px 0 6px}
p{margin:6px 0 12px;max-width:68ch}
.faint{color:var(--faint)}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(185px,1fr));gap:12px;margin:22px 0 8px}
.fact{background:var(--tint);border:1px solid var(--line);border-radius:8px;padding:12px 14px}
.fact b{display:block;font-size:1.35rem;line-height:1.25}
.fact span{display:block;font-size:.85rem;color:var(--faint)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.92rem;margin:8px 0 14px}
th,td{padding:6px 10px;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}
th:first-child,td:first-child{text-align:left;padding-left:0}
thead th{color:var(--faint);font-weight:600}
tr.sum td{font-weight:700;border-top:2px solid var(--grey)}
svg{width:100%;height:auto;display:block;margin:6px 0 4px}
svg text{font:12px system-ui,sans-serif;fill:var(--faint)}
.grid{stroke:var(--line);stroke-width:1}
.band{fill:var(--sky)}
.mid{fill:none;stroke:var(--blue);stroke-width:2}
.bar{fill:var(--blue)}.bar2{fill:var(--orange)}.bar3{fill:var(--green)}.bar4{fill:var(--grey)}
.whisker{stroke:var(--ink);stroke-width:1.5}
svg text.num{fill:var(--ink);font-weight:600}
li{margin:4px 0}
"""


def render(plan: Plan) -> bytes:
    """The page as the bytes of an HTML file."""
    terms = plan.terms
    title = f"What {terms.fleet:,} parked cars would do"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="faint">{escape(_lead(plan))}</p>',
        _facts(plan),
        _section("A usual day", _day(plan), "Line: half of the weeks have more. Band: eight weeks of ten lie within."),
        _section("A usual week", _week(plan), "The fleet empties in the morning and fills in the evening, as one."),
        _section("Through the year", _weeks(plan), _season_words(plan)),
        _section("Jobs that can be promised", _deadlines(plan), _deadline_words(plan)),
        _section("Money", _money(plan), _money_words(plan)),
        _section("If customers buy less", _sold(plan), "The middle week; idle cars sleep and cost nothing."),
        _section("Energy and wear", _energy(plan), _energy_words(plan)),
        _section("What this rests on", _assumptions(plan), ""),
    ]
    body = "\n".join(parts)
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n"
        "</html>\n"
    )
    return page.encode()


# -- words -------------------------------------------------------------------------------------------------------------


def large(value: float) -> str:
    """A large number with three digits and its word."""
    for size, word in UNITS:
        if abs(value) >= size:
            return f"{value / size:.3g} {word}".strip() if abs(value) / size < 999.5 else f"{value / size:,.0f} {word}"
    return f"{value:.3g}"


def money(micro: float, currency: str) -> str:
    """An amount for people: whole units when there are many."""
    amount = micro / 1_000_000
    return f"{amount:,.0f} {currency}" if abs(amount) >= 1_000 else f"{amount:,.2f} {currency}"


def _lead(plan: Plan) -> str:
    source = "recorded charging sessions" if plan.recorded else "made-up owners with published habits"
    return (
        f"A plan for the model {plan.terms.model}, from {source}: {plan.owners:,} owners, {plan.weeks:,} weeks. "
        "Bands are the weeks that one in ten is below, half, and nine in ten."
    )


def _season_words(plan: Plan) -> str:
    return (
        "Tokens a day in each week of the sessions, with its neighbours; the band is the doubt from knowing few owners."
        if plan.recorded
        else "Made-up owners know no seasons: the band is the doubt from knowing few owners."
    )


def _deadline_words(plan: Plan) -> str:
    return (
        "If all work had this deadline and came in evenly, so much could be promised. What is not promised is free for "
        f"work that may take longer. A job here is {large(plan.terms.job_tokens)} tokens of answers."
    )


def _money_words(plan: Plan) -> str:
    year = plan.owner_net_micro_year
    low, middle, high = (money(each, plan.terms.currency) for each in (year.p10, year.p50, year.p90))
    return (
        "Three weeks as they were drawn, so each column adds up. After electricity and wear, one owner in ten has less "
        f"than {low} a year, half have {middle} or more, one in ten has more than {high}."
    )


def _energy_words(plan: Plan) -> str:
    if plan.idle_hours_of_day:
        hours = ", ".join(f"{hour:02d}" for hour in plan.idle_hours_of_day)
        return f"No work in these hours of the day, for it would cost the owner more than it brings: {hours}."
    return "By stated losses: the computer, the car that is awake for it, the charger and the converter."


# -- parts -------------------------------------------------------------------------------------------------------------


def _section(title: str, content: str, words: str) -> str:
    told = f'<p class="faint">{escape(words)}</p>' if words else ""
    return f"<section><h2>{escape(title)}</h2>{told}{content}</section>"


def _facts(plan: Plan) -> str:
    middle = plan.ledgers[1]
    currency = plan.terms.currency
    day = plan.tokens_day
    facts = [
        (large(day.p50), f"tokens of answers a day ({large(day.p10)} to {large(day.p90)})"),
        (f"{plan.worked_h_week.p50:.1f} h", f"of work a car and week, of {plan.plugged_h_week.p50:.1f} h plugged in"),
        (money(middle.customers_micro * 52, currency), "from customers in 52 such weeks"),
        (money(middle.owners_net_micro * 52 / plan.terms.fleet, currency), "left for each owner in 52 such weeks"),
        (money(middle.operator_net_micro * 52, currency), "left for the operator in 52 such weeks"),
        (f"{_joules(middle):.2f} J", "at the socket for each token of an answer"),
    ]
    cards = "".join(f'<div class="fact"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in facts)
    return f'<div class="facts">{cards}</div>'


def _joules(ledger: Ledger) -> float:
    return ledger.socket_wh * 3600 / max(ledger.output_tokens, 1)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], sums: Sequence[int] = ()) -> str:
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f"<tr{' class=sum' if number in sums else ''}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for number, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _day(plan: Plan) -> str:
    chart = _curve(
        plan.by_hour_of_day, "Tokens an hour by hour of the day", lambda n: f"{n:02d}:00" if n % 3 == 0 else ""
    )
    rows = [
        [f"{hour:02d}:00 to {hour + 3:02d}:00", *(large(sum(getattr(each, q) for each in part)) for q in _QUANTILES)]
        for hour in range(0, 24, 3)
        for part in (plan.by_hour_of_day[hour : hour + 3],)
    ]
    return chart + _table(("tokens of answers in these hours", "10 %", "50 %", "90 %"), rows)


def _week(plan: Plan) -> str:
    return _curve(
        plan.by_hour_of_week, "Tokens an hour by hour of the week", lambda n: DAYS[n // 24] if n % 24 == 12 else ""
    )


def _weeks(plan: Plan) -> str:
    step = max(1, -(-len(plan.by_week) // 9))
    return _curve(plan.by_week, "Tokens a day by week", lambda n: f"week {n + 1}" if n % step == 0 else "")


def _deadlines(plan: Plan) -> str:
    bars = [(f"{each.hours} h", each.tokens_day) for each in plan.deadlines]
    rows = [
        [
            f"{each.hours} h",
            *(large(getattr(each.tokens_day, q)) for q in _QUANTILES),
            large(floor(each.jobs_day.p10)) if each.jobs_day.p10 >= 1 else "0",
            f"{each.part.p10 * 100:.0f} %",
            large(each.largest_tokens.p10),
        ]
        for each in plan.deadlines
    ]
    head = (
        "deadline after hand-in",
        "tokens a day, 10 %",
        "50 %",
        "90 %",
        "jobs a day, 10 %",
        "part of all, 10 %",
        "largest job at any hour, 10 %",
    )
    return _bars(bars, "Tokens a day that can be promised, by deadline") + _table(head, rows)


def _money(plan: Plan) -> str:
    currency = plan.terms.currency
    three = plan.ledgers

    def row(name: str, pick: Callable[[Ledger], int]) -> list[str]:
        return [name, *(money(pick(each), currency) for each in three)]

    rows = [
        row("customers pay", lambda each: each.customers_micro),
        row("of that to owners", lambda each: each.owners_micro),
        row("less their electricity", lambda each: -each.electricity_micro),
        row("less wear of their cars", lambda each: -each.wear_micro),
        row("left for the owners", lambda each: each.owners_net_micro),
        row("of that to the operator", lambda each: each.operator_share_micro),
        row("less the operator's cost of cars", lambda each: -each.operator_cost_micro),
        row("left for the operator", lambda each: each.operator_net_micro),
    ]
    head = ("a week", "a low week (10 %)", "the middle week", "a high week (90 %)")
    return _split(plan.ledgers[1], currency) + _table(head, rows, sums=(4, 7))


def _sold(plan: Plan) -> str:
    currency, fleet = plan.terms.currency, plan.terms.fleet
    rows = [
        [
            f"{part * 100:.0f} %",
            money(owners * 52 / fleet, currency),
            money(operator, currency),
            money(operator * 52, currency),
        ]
        for part, owners, operator in plan.sold_net_micro
    ]
    head = ("part of the capacity that is sold", "each owner, 52 weeks", "operator, a week", "operator, 52 weeks")
    return _table(head, rows)


def _energy(plan: Plan) -> str:
    three = plan.ledgers
    rows = [
        ["hours of work of all cars", *(f"{each.vehicle_h:,.0f} h" for each in three)],
        ["energy at the socket", *(f"{each.socket_wh / 1e6:,.1f} MWh" for each in three)],
        ["of that in the computers", *(f"{each.computer_wh / 1e6:,.1f} MWh" for each in three)],
        ["for a token of an answer", *(f"{_joules(each):.2f} J" for each in three)],
        ["carbon dioxide", *(f"{each.co2_g / 1e6:,.2f} t" for each in three)],
        ["wear of a car", *(f"{each.vehicle_h / plan.terms.fleet:.1f} h of its computer" for each in three)],
        ["battery", *("none: the grid feeds the work" for _ in three)],
    ]
    return _table(("a week", "a low week (10 %)", "the middle week", "a high week (90 %)"), rows)


def _assumptions(plan: Plan) -> str:
    terms, node, currency = plan.terms, plan.terms.node, plan.terms.currency
    tariff = [micro / 1e6 for micro in node.tariff.micro_kwh]
    price = f"{tariff[0]:.3g}" if len(tariff) == 1 else f"{min(tariff):.3g} to {max(tariff):.3g} by the hour"
    grams = carbon.grams_per_kwh(terms.region)
    share = terms.price.owner_share_bp / 100
    items = [
        f"Sessions: {plan.source}. {plan.owners:,} cars, {plan.weeks:,} whole weeks, each taken with two weeks before "
        "and after it. The fleet's owners are taken to be like these.",
        "Charging comes first, at the charger's full power. Work then goes on until the owner leaves, at most "
        f"{terms.budget_h_week:g} hours in any seven days, and never in an hour that would cost the owner money.",
        f"{terms.harvest * 100:g} % of the hours worked become results: starts, departures, checks and gaps "
        "take the rest.",
        f"Customers buy {terms.sold * 100:g} % of what the fleet can do.",
        f"A computer of {node.watts_w} W makes {node.tokens_s:g} tokens of answers a second, and reads "
        f"{node.input_per_output:g} for each. The car that is awake for it draws {node.awake_w:g} W more; with "
        f"the losses of charger and converter that is {plan.power.grid_mw / 1000:,.0f} W at the socket.",
        f"A million tokens cost customers {terms.price.input_micro / 1e6:g} {currency} read and "
        f"{terms.price.output_micro / 1e6:g} {currency} written; owners have {share:g} % of it.",
        f"Electricity: {price} {currency} a kilowatt-hour. Carbon: {grams} g a kilowatt-hour"
        + (f" ({terms.region})." if terms.region else " (the world's mean; name a region for another)."),
        f"An hour at the dearest electricity pays an owner {plan.hour.pay_micro / 1e6:.4f} {currency} and costs "
        f"{plan.hour.electricity_micro / 1e6:.4f} of electricity and {plan.hour.wear_micro / 1e6:.4f} of wear.",
        f"{terms.draws} fleets were drawn for each week, from the seed {terms.seed}.",
        "Not in it: owners who switch it off, weather, cars that are not always online, and competition.",
    ]
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


# -- pictures ----------------------------------------------------------------------------------------------------------

_QUANTILES: Final = ("p10", "p50", "p90")


def _ticks(top: float) -> list[float]:
    """Some round numbers from 0 to the top."""
    if top <= 0:
        return [0.0]
    step = 10.0 ** floor(log10(top / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if top / (step * factor) <= 5)
    return [step * number for number in range(int(top / step) + 1)]


def _frame(title: str, top: float, inner: str) -> str:
    """Axis, its unit, and the picture; ``title`` says what is counted and by what, as in "Tokens a day by week"."""
    size, word = next(unit for unit in UNITS if top >= unit[0] or unit[0] == 1.0)
    lines = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_y(tick, top):.1f}" y2="{_y(tick, top):.1f}"/>'
        f'<text x="{LEFT - 8}" y="{_y(tick, top) + 4:.1f}" text-anchor="end">{tick / size:g}</text>'
        for tick in _ticks(top)
    )
    unit = f"{word} {title[0].lower()}{title[1:]}".strip()
    return (
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(title)}">'
        f'<title>{escape(title)}</title><text x="0" y="14">{escape(unit)}</text>{lines}{inner}</svg>'
    )


def _y(value: float, top: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value / top if top > 0 else 0.0)


def _curve(bands: Sequence[Band], title: str, label: Callable[[int], str]) -> str:
    top = max(band.p90 for band in bands) * 1.05
    step = (WIDTH - LEFT - RIGHT) / max(len(bands) - 1, 1)
    x = [LEFT + step * number for number in range(len(bands))]
    upper = [f"{at:.1f},{_y(band.p90, top):.1f}" for at, band in zip(x, bands, strict=True)]
    lower = [f"{at:.1f},{_y(band.p10, top):.1f}" for at, band in zip(x, bands, strict=True)]
    line = " ".join(f"{at:.1f},{_y(band.p50, top):.1f}" for at, band in zip(x, bands, strict=True))
    names = "".join(
        f'<text x="{at:.1f}" y="{HEIGHT - 12:g}" text-anchor="middle">{escape(label(number))}</text>'
        for number, at in enumerate(x)
        if label(number)
    )
    inner = f'<polygon class="band" points="{" ".join(upper + lower[::-1])}"/><polyline class="mid" points="{line}"/>'
    return _frame(title, top, inner + names)


def _bars(bars: Sequence[tuple[str, Band]], title: str) -> str:
    top = max(max(band.p90 for _, band in bars) * 1.05, 1.0)
    slot = (WIDTH - LEFT - RIGHT) / len(bars)
    parts = []
    for number, (name, band) in enumerate(bars):
        middle = LEFT + slot * (number + 0.5)
        high = _y(band.p50, top)
        parts.append(
            f'<rect class="bar" x="{middle - slot * 0.27:.1f}" width="{slot * 0.54:.1f}" y="{high:.1f}" '
            f'height="{HEIGHT - BOTTOM - high:.1f}"/>'
            f'<line class="whisker" x1="{middle:.1f}" x2="{middle:.1f}" y1="{_y(band.p10, top):.1f}" '
            f'y2="{_y(band.p90, top):.1f}"/>'
            f'<text x="{middle:.1f}" y="{HEIGHT - 12:g}" text-anchor="middle">{escape(name)}</text>'
        )
    return _frame(title, top, "".join(parts))


def _split(week: Ledger, currency: str) -> str:
    """Where what customers pay goes, as one bar."""
    shares = [
        ("owners' electricity", week.electricity_micro, "bar2"),
        ("wear", week.wear_micro, "bar4"),
        ("left for the owners", max(week.owners_net_micro, 0), "bar3"),
        ("operator", max(week.operator_share_micro, 0), "bar"),
    ]
    whole = max(sum(max(amount, 0) for _, amount, _ in shares), 1)
    at, parts = 0.0, []
    shown = [(name, amount, kind) for name, amount, kind in shares if amount > 0]
    for number, (name, amount, kind) in enumerate(shown):
        width = WIDTH * amount / whole
        words = f"{name}: {money(amount, currency)} ({amount / whole * 100:.0f} %)"
        parts.append(
            f'<rect class="{kind}" x="{at:.1f}" y="4" width="{width:.1f}" height="34"/>'
            f'<rect class="{kind}" x="0" y="{52 + 20 * number}" width="12" height="12"/>'
            f'<text x="20" y="{62 + 20 * number}">{escape(words)}</text>'
        )
        at += width
    title = "Where the money of the middle week goes"
    return (
        f'<svg viewBox="0 0 {WIDTH:g} {56 + 20 * len(shown)}" role="img" aria-label="{title}"><title>{title}</title>'
        + "".join(parts)
        + "</svg>"
    )
