"""The distribution of the yield time as a picture, beside what two peers document.

Called by: ``bench.run_yield``. The peers' numbers are from their manuals, not measured: BOINC's client looks at the
user's activity once a second, and HTCondor's start daemon gives a job 600 s (MachineMaxVacateTime) and then 30 s
(KILLING_TIMEOUT) before it is killed.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

PEERS = {"BOINC: looks once a second": 1_000.0, "HTCondor: 600 s to vacate, then 30 s": 630_000.0}
AIM_MS = 200.0
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#666666")


def draw(samples: dict[str, list[float]], path: Path) -> None:
    """One step line for each way to stop, by the share of trials that are over; time on a logarithmic axis."""
    mpl.rcParams.update({"svg.hashsalt": "motorpool", "font.size": 10, "svg.fonttype": "none"})
    figure, axes = plt.subplots(figsize=(9, 4.8), layout="constrained")
    for (name, values), colour in zip(samples.items(), COLOURS, strict=False):
        ordered = sorted(values)
        shares = [(number + 1) / len(ordered) * 100 for number in range(len(ordered))]
        axes.step([ordered[0], *ordered], [0.0, *shares], where="post", color=colour, label=f"{name} ({len(ordered)})")
    axes.axvline(AIM_MS, color="black", linewidth=0.8, linestyle="--")
    axes.text(AIM_MS * 1.08, 3, "aim: 200 ms", fontsize=9)
    for name, at_ms in PEERS.items():
        axes.axvline(at_ms, color="#999999", linewidth=0.8)
        axes.text(at_ms * 0.9, 97, name, rotation=90, ha="right", va="top", fontsize=8, color="#555555")
    axes.set_xscale("log")
    axes.set_xlim(0.5, 1_000_000)
    axes.set_xticks([1, 10, 100, 1_000, 10_000, 100_000, 1_000_000])
    axes.set_xticklabels(["1 ms", "10 ms", "100 ms", "1 s", "10 s", "100 s", "1,000 s"])
    axes.set_ylim(0, 100)
    axes.set_ylabel("share of trials that are over, %")
    axes.set_title("From the owner's act until the engine stands still", loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", bbox_to_anchor=(0.8, 0.12), frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
