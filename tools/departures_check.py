"""How good the forecast of departures is on real sessions, on users that its prior was not fitted to.

Usage: ``python tools/departures_check.py --sessions FILE`` prints a Markdown table; FILE as in ``fleet_prior.py``.

Every vehicle lives through its sessions in order with the code of the product. Every half hour that it is plugged it is
asked, before it learns what comes: how long does it stay at least, and does it leave within the hour. Questions count
from the last 30 % of its time only; the prior knows the first 70 % of the time of the users that it is fitted to.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
from fleet_prior import Stays, fit_fleet, live_through, load_stays
from numpy.typing import NDArray

from motorpool.core.departures import DAY_MS, HOUR_MS, RISK_MS, Fleet, Habits

TRAIN_PART: Final = 0.7
ASK_MS: Final = HOUR_MS // 2
COLD_MS: Final = 28 * DAY_MS
FEW: Final = 200  # a user with fewer questions has no share of its own in the spread over users
Answers = NDArray[np.float64]  # a row a question: bound (h), what was left (h), risk of 1 h, risk of 15 min
HEAD: Final = (
    "| prior, and what the vehicle learns | tested on | questions | coverage | middle 80 % of users | bound, mean "
    "| median | Brier 1 h | AUC 1 h | left in 15 min: told / true |\n"
    "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def cut_ms(rows: list[tuple[int, int]]) -> float:
    """Where the last 30 % of a user's time begins."""
    return rows[0][0] + TRAIN_PART * (rows[-1][1] - rows[0][0])


def train_part(stays: Stays) -> Stays:
    """Stays that ended in the first 70 % of their user's time."""
    return {user: [row for row in rows if row[1] <= cut_ms(rows)] for user, rows in stays.items()}


def ask(
    stays: Stays,
    fleet: Fleet,
    *,
    use_age: bool = False,
    learn: bool = True,
    counts: Callable[[int, list[tuple[int, int]]], bool] = lambda at_ms, rows: at_ms >= cut_ms(rows),
) -> list[Answers]:
    """The answers of each user's vehicle to the questions that count."""
    users: list[Answers] = []
    for rows in stays.values():
        habits = Habits(fleet, use_age=use_age)
        answers: list[tuple[float, float, float, float]] = []
        for begin_ms, end_ms in rows:
            if not learn:
                habits = Habits(fleet, use_age=use_age)
            for at_ms in live_through(habits, begin_ms, end_ms):
                if (at_ms - begin_ms) % ASK_MS == 0 and counts(at_ms, rows):
                    bound_h = habits.bound_ms(at_ms, 0) / HOUR_MS
                    risks = habits.risk(at_ms, 0, HOUR_MS), habits.risk(at_ms, 0, RISK_MS)
                    answers.append((bound_h, (end_ms - at_ms) / HOUR_MS, *risks))
        if answers:
            users.append(np.array(answers))
    return users


def auc(risk: NDArray[np.float64], left: NDArray[np.bool_]) -> float:
    """Probability that a question before a departure got a higher risk than one that was not."""
    _, place, count = np.unique(risk, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2)[place]
    ones = int(left.sum())
    return float((ranks[left].sum() - ones * (ones + 1) / 2) / (ones * (len(left) - ones)))


def row(title: str, tested: str, users: list[Answers]) -> str:
    """One line of the table."""
    bound, rest, risk, soon = np.concatenate(users).T
    within = rest <= 1.0
    own = [float((user[:, 1] >= user[:, 0]).mean()) for user in users if len(user) >= FEW]
    low, high = np.quantile(own, (0.1, 0.9))
    return (
        f"| {title} | {tested} | {len(bound):,} | {(rest >= bound).mean():.3f} | {low:.2f}-{high:.2f} "
        f"| {bound.mean():.2f} h | {np.median(bound):.2f} h | {((risk - within) ** 2).mean():.4f} "
        f"| {auc(risk, within):.3f} | {soon.mean():.4f} / {(rest <= 0.25).mean():.4f} |"
    )


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sessions", type=Path, required=True)
    sessions = parser.parse_args().sessions
    private, shared = load_stays(sessions), load_stays(sessions, shared=True)
    names = list(private)
    halves = [{name: private[name] for name in names[part::2]} for part in (0, 1)]
    early = [train_part(half) for half in halves]
    other = "other users, private"
    print(HEAD)

    def crossed(title: str, *, use_age: bool = False, learn: bool = True) -> list[Fleet]:
        fleets = [fit_fleet(half, use_age=use_age, learn=learn) for half in early]
        found = [ask(halves[1 - part], fleets[part], use_age=use_age, learn=learn) for part in (0, 1)]
        print(row(title, other, found[0] + found[1]), flush=True)
        return fleets

    fleets = crossed("**other half; its own week** (the product)")
    crossed("other half; its own week, and a factor by age", use_age=True)
    crossed("other half; nothing", learn=False)
    whole = fit_fleet(train_part(private))
    print(row("same users' earlier time; its own week", "later time, private", ask(private, whole)), flush=True)
    first = [ask(halves[1 - n], fleets[n], counts=lambda at_ms, rows: at_ms < rows[0][0] + COLD_MS) for n in (0, 1)]
    print(row("other half; its own week", "other users, their first 4 weeks", first[0] + first[1]), flush=True)
    print(row("private users; its own week", "shared chargers", ask(shared, whole)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
