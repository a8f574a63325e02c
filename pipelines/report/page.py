"""Renders `report.json` as one self-contained page: no script, no address it would load from, all text escaped."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipelines.report import plots


def render(report: dict[str, Any]) -> str:
    """The page of a report (the dict that is written as `report.json`)."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"percent": _percent, "interval": _interval, "number": _number}
    figures = {
        "curves": Markup(plots.curves(report["rounds"])) if any(r.get("training") for r in report["rounds"]) else "",
        "by_round": Markup(plots.by_round(report["evaluation"])) if report["evaluation"] else "",
        "funnels": {r["round"]: Markup(plots.funnel(r["funnel"])) for r in report["rounds"]},
        "rocs": {r["round"]: [Markup(svg) for svg in plots.rocs(r["auc"])] for r in report["rounds"]},
        "histograms": {r["round"]: [Markup(plots.histogram(h)) for h in r["histograms"]] for r in report["rounds"]},
    }
    return environment.get_template("page.html.j2").render(report=report, figures=figures)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _interval(value: dict[str, Any] | None, worst: str = "") -> str:
    """`{value, low, high}` as "93.0 % (90.1 to 95.2)"; a figure that is the `worst` that may be says so, one that was
    freed of noise says what was seen, one with a `unit` is no share."""
    if value is None or value.get("value") is None:
        return "–"
    if unit := value.get("unit"):
        ends = "" if value["low"] is None else f" ({_number(value['low'])} to {_number(value['high'])})"
        return f"{_number(value['value'])} {unit}{ends}"
    told = f"{100 * value['value']:.1f} %"  # of one canary there is no interval
    told += "" if value["low"] is None else f" ({100 * value['low']:.1f} to {100 * value['high']:.1f})"
    if value.get("bound"):
        return f"{worst} {told}"
    return told if value.get("observed") is None else f"{told}, seen {100 * value['observed']:.1f} %"
