"""Plots as SVG text (matplotlib, no display), small enough to stand inside the report."""

import io
import itertools
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

INK, SOFT, MARK = "#21506e", "#9cc3d9", "#c4462d"
ACROSS = 5  # small plots in a row
plt.rcParams.update(
    {
        "svg.hashsalt": "pairmill",
        "svg.fonttype": "none",
        "text.parse_math": False,  # a rule may hold a dollar sign
        "font.size": 8,
        "font.family": "sans-serif",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
)


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)
    return out.getvalue()[out.getvalue().index("<svg") :]


def histogram(facts: dict[str, Any]) -> str:
    """A score's histogram: all scored web pairs, trusted ones as a line, its threshold if it has one."""
    figure, axes = plt.subplots(figsize=(3.4, 1.7))
    edges, counts = facts["edges"], facts["counts"]
    widths = [b - a for a, b in itertools.pairwise(edges)]
    axes.bar(edges[:-1], counts, width=widths, align="edge", color=SOFT, label="web")
    if any(facts.get("trusted_counts", [])):
        axes.stairs(facts["trusted_counts"], edges, color=INK, label="trusted")
        axes.legend(frameon=False, fontsize=7)
    for threshold in facts.get("thresholds", []):
        axes.axvline(threshold, color=MARK, linewidth=1.2)
    axes.set_title(facts["column"], loc="left", fontsize=8)
    return _svg(figure)


def rocs(scores: list[dict[str, Any]]) -> list[str]:
    """For each defect the curves of the scores that tell most of it: recall over false drops."""
    return [_roc(name, list(mine)[:4]) for name, mine in itertools.groupby(scores, key=lambda score: score["defect"])]


def _roc(defect: str, scores: list[dict[str, Any]]) -> str:
    figure, axes = plt.subplots(figsize=(2.3, 2.1))
    axes.plot([0, 1], [0, 1], color=MARK, linewidth=0.8, linestyle=":")
    for score in scores:
        axes.plot(*zip(*score["curve"], strict=True), linewidth=1, label=score["column"][:32])
    axes.set_xlabel("false drops")
    axes.set_ylabel("recall")
    axes.legend(frameon=False, fontsize=5, loc="lower right")
    axes.set_title(defect[:32], loc="left", fontsize=8)
    return _svg(figure)


def funnel(steps: list[dict[str, Any]]) -> str:
    """How many are left after each step, as bars from the top."""
    figure, axes = plt.subplots(figsize=(6.4, 0.24 * len(steps) + 0.4))
    left = [step["left"] for step in steps]
    axes.barh(range(len(steps)), left, color=SOFT)
    for row, count in enumerate(left):
        axes.text(count, row, f" {count:,}", va="center", fontsize=7)
    axes.set_yticks(range(len(steps)), [step["step"][:48] for step in steps])
    axes.invert_yaxis()
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    return _svg(figure)


def curves(rounds: list[dict[str, Any]]) -> str:
    """The training loss of each round over its steps."""
    figure, axes = plt.subplots(figsize=(4.6, 2.0))
    for round_ in rounds:
        points = (round_.get("training") or {}).get("loss", [])
        if points:
            axes.plot(*zip(*points, strict=True), linewidth=1, label=f"round {round_['round']}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend(frameon=False, fontsize=7)
    return _svg(figure)


def by_round(rows: list[dict[str, Any]]) -> str:
    """Each figure of the evaluation by round, with its interval and the level of chance."""
    rows = [row for row in rows if row["value"] is not None and row["low"] is not None]
    names = list(dict.fromkeys(row["figure"] for row in rows))
    high, wide = max(1, -(-len(names) // ACROSS)), max(1, min(len(names), ACROSS))
    figure, axes = plt.subplots(high, wide, figsize=(2.1 * wide, 1.9 * high), squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, names, strict=False):
        mine = [row for row in rows if row["figure"] == name]
        places = range(len(mine))
        values = [row["value"] for row in mine]
        spread = [[v - r["low"] for v, r in zip(values, mine, strict=True)]]
        spread.append([r["high"] - v for v, r in zip(values, mine, strict=True)])
        axis.errorbar(places, values, yerr=spread, fmt="o", color=INK, capsize=3, markersize=4)
        if mine[0]["chance"] is not None:
            axis.axhline(mine[0]["chance"], color=MARK, linewidth=0.8, linestyle=":")
        turned: dict[str, Any] = {"rotation": 30, "ha": "right"} if len(mine) > 3 else {}
        axis.set_xticks(places, [row["model"] for row in mine], fontsize=6, **turned)
        axis.set_ylim(0, None if mine[0].get("unit") else 1)
        axis.margins(x=0.4)
        axis.set_title(name, loc="left", fontsize=8)
    figure.tight_layout()
    return _svg(figure)
