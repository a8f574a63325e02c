"""Figures of filters with their intervals: shares, ROC-AUC, precision, and what noise among the twins does to them.

A figure is {value, low, high, n}; intervals are Wilson's at 95 %. The variance of an AUC is at most A(1-A)/min(m, n)
(Birnbaum and Klose, 1957), so Wilson's with the smaller count is a wide enough one. The AUC of a verdict is
(1 + recall - false drops) / 2, with Newcombe's interval for a difference of shares (1998).
Twins of pairs that nobody vouched for have the defect too, a share v of them. Then a share of the twins is
(1-v) f + v r, and an AUC (1-v) A + v/2, which is solved for f and A. No score's share of twins over its share of
canaries, below any threshold, can be under v (Blanchard, Lee and Scott, JMLR 2010): the least of them bounds it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

Figure = dict[str, Any]
Z = 1.959964  # 95 %
MOST_NOISE = 0.8  # above it nothing is corrected: no score tells canaries from twins
TAIL = 0.25  # the least share of the canaries that a bound on the noise is read from
POINTS = 40


def wilson(hits: float, n: float) -> Figure:
    """A share with Wilson's 95 % interval; `hits` of 0 to `n`, null where n is 0."""
    n, hits = int(n), float(hits)
    if not n:
        return {"value": None, "low": None, "high": None, "n": 0}
    share, spread = hits / n, Z * Z / n
    middle = (share + spread / 2) / (1 + spread)
    half = Z * np.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    low, high = max(0.0, middle - half), min(1.0, middle + half)  # at 0 and 1 equal to the share, but for rounding
    return {"value": share, "low": float(min(share, low)), "high": float(max(share, high)), "n": n}


def roc_auc(canaries: np.ndarray, twins: np.ndarray) -> Figure:
    """The chance that a twin scores higher than a canary, ties half; 0.5 tells nothing, below it the score is turned
    round. Nulls (NaN) are left out."""
    bad, good = canaries[~np.isnan(canaries)], np.sort(twins[~np.isnan(twins)])
    if not len(bad) or not len(good):
        return wilson(0, 0)
    above = len(good) - (np.searchsorted(good, bad, "left") + np.searchsorted(good, bad, "right")) / 2
    n = min(len(bad), len(good))
    return wilson(float(above.mean() / len(good)) * n, n)


def roc_points(canaries: np.ndarray, twins: np.ndarray) -> list[list[float]]:
    """(false drops, recall) from (0, 0) to (1, 1), on the side of the score where the canaries lie."""
    bad, good = (np.sort(v[~np.isnan(v)]) for v in (canaries, twins))
    if (roc_auc(bad, good)["value"] or 0.5) < 0.5:
        bad, good = np.sort(-bad), np.sort(-good)
    ends = np.unique(np.quantile(np.concatenate([bad, good]), np.linspace(0, 1, POINTS), method="lower"))
    shares = [[np.searchsorted(v, end, "right") / max(1, len(v)) for v in (good, bad)] for end in ends]
    return [[0.0, 0.0], *([round(float(x), 4), round(float(y), 4)] for x, y in shares)]


def verdict_auc(recall: Figure, false_drops: Figure) -> Figure:
    """The AUC of a yes or no."""
    if recall["value"] is None or false_drops["value"] is None:
        return wilson(0, 0)
    r, f = recall, false_drops
    value = (1 + r["value"] - f["value"]) / 2
    down = np.hypot(r["value"] - r["low"], f["high"] - f["value"]) / 2
    up = np.hypot(r["high"] - r["value"], f["value"] - f["low"]) / 2
    ends = {"low": float(max(0.0, value - down)), "high": float(min(1.0, value + up))}
    return {"value": value, **ends, "n": min(r["n"], f["n"])}


def precision(recall: Mapping[str, Any], false_drops: Mapping[str, Any], prevalence: float) -> Figure:
    """Of what is dropped, the share that has the defect, if `prevalence` of the pairs have it; the interval takes
    the two figures' ends together."""

    def share(caught: float | None, wrong: float | None) -> float | None:
        if caught is None or wrong is None:
            return None
        dropped = prevalence * caught + (1 - prevalence) * wrong
        return prevalence * caught / dropped if dropped else None

    ends = {"low": share(recall["low"], false_drops["high"]), "high": share(recall["high"], false_drops["low"])}
    return {"prevalence": prevalence, "value": share(recall["value"], false_drops["value"]), **ends, "n": recall["n"]}


def recall_at_false_drops(scores_canaries: np.ndarray, scores_twins: np.ndarray, false_drop_rate: float) -> Figure:
    """The share of canaries below the highest threshold that drops at most `false_drop_rate` of the twins.

    A score that is NaN is dropped at any threshold, as rules do. What is compared between two scorers has to be asked
    at the same rate: that is how a round's model earns its promotion.
    """
    bad, good = (np.where(np.isnan(v), -np.inf, v.astype(float)) for v in (scores_canaries, scores_twins))
    allowed = int(false_drop_rate * len(good))
    threshold = np.sort(good)[allowed] if allowed < len(good) else np.inf
    return wilson(((bad < threshold) | np.isneginf(bad)).sum(), len(bad)) | {"threshold": float(threshold)}


def noise(scores: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure | None:
    """The share of the twins that may have the defect themselves: `low` is 0, `high` the least bound that a score
    (canaries, twins) gives, `value` half of it without its sampling error: only its ends are known. None where no
    score bounds it usefully."""
    best = (np.inf, 0.0, 0)
    for canaries, twins in scores.values():
        for sign in (1.0, -1.0):
            bad, good = (np.sort(sign * v[~np.isnan(v)]) for v in (canaries, twins))
            if len(bad) and len(good):
                best = min(best, *_bounds(bad, good))
    return None if best[0] > MOST_NOISE else {"value": best[1] / 2, "low": 0.0, "high": best[0], "n": best[2]}


def _bounds(bad: np.ndarray, good: np.ndarray) -> list[tuple[float, float, int]]:
    """Upper end, value and count of the bound at some thresholds; both arrays are sorted."""
    found = []
    for end in np.unique(np.quantile(bad, np.linspace(TAIL, 0.95, 15), method="lower")):
        below, of_good = np.searchsorted(bad, end, "right"), np.searchsorted(good, end, "right")
        caught, wrong = wilson(below, len(bad)), wilson(of_good, len(good))
        found.append((wrong["high"] / caught["low"], wrong["value"] / caught["value"], len(good)))
    return found


def without_noise(figure: Figure, dirt: Figure | None, defective: Figure | None = None) -> Figure:
    """A share of twins (with the `defective` ones' share, their recall) or an AUC as it would be without noise; what
    was seen stays as `observed`. The interval reaches from no noise at all to the most that there can be. Without a
    bound on the noise the figure stays, and is the worse end of what may be (`bound`)."""
    if figure["value"] is None:
        return figure
    if dirt is None:
        return figure | {"observed": figure["value"], "bound": "worst"}

    def solve(seen: float, v: float, other: float) -> float:
        return float(np.clip((seen - v * other) / (1 - v), 0, 1))

    r = defective or {"value": 0.5, "low": 0.5, "high": 0.5}
    value = solve(figure["value"], dirt["value"], r["value"])
    low = min(figure["low"], solve(figure["low"], dirt["high"], r["high"]))
    high = max(figure["high"], solve(figure["high"], dirt["high"], r["low"]))
    return {"value": value, "low": low, "high": high, "n": figure["n"], "observed": figure["value"]}
