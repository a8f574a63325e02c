"""What a person sees while a run goes on: one line per stage, a bar where something is counted.

On a terminal the bar is live (rich); elsewhere, in logs and under a scheduler, a line is printed at most every few
seconds. With `quiet` nothing is printed.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console as Rich
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

EVERY_S = 10.0


def printable(text: str) -> str:
    """The text with what could command a terminal (escapes, turned directions) written out; line ends stay."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


class Console:
    """Prints to stderr, so that stdout stays free for `--json`."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.rich = Rich(stderr=True, quiet=quiet, highlight=False)
        self._bars: Progress | None = None
        self._last = 0.0

    def say(self, text: str) -> None:
        self.rich.print(printable(text), markup=False)

    def begin(self, name: str) -> None:
        self._last = time.monotonic()
        if self.rich.is_terminal and not self.quiet:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self._bars = Progress(*columns, TimeRemainingColumn(), console=self.rich, transient=True)
            self._bars.start()
            self._bars.add_task(name, total=None)

    def progress(self, name: str) -> Callable[[int, int, str], None]:
        """A callback (done, total, note) for the stage `name`; total 0 where it isn't known."""

        def update(done: int, total: int, note: str = "") -> None:
            if self._bars and self._bars.tasks:
                label = f"{name} {note}".rstrip()
                self._bars.update(self._bars.tasks[-1].id, completed=done, total=total or None, description=label)
            elif time.monotonic() - self._last > EVERY_S:
                self._last = time.monotonic()
                self.say(f"  {name} {done}/{total or '?'} {note}")

        return update

    def end(self, name: str, seconds: float, facts: dict[str, Any]) -> None:
        self.close()
        how = "reused" if facts.get("reused") else f"{seconds:.1f} s"
        self.say(f"{'=' if facts.get('reused') else '✓'} {name:<20} {how:>9}  {facts.get('note', '')}")

    def close(self) -> None:
        if self._bars:
            self._bars.stop()
            self._bars = None
        sys.stderr.flush()
