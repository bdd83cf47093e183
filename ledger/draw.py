"""What all drawings of the ledger share: marks, widths, and how figures are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ledger.summary import signed
from ledger.trials import TrialView

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.text import Text

MARKS = {
    "proposed": ("·", "dim"),
    "running": ("…", "cyan"),
    "kept": ("●", "bold green"),
    "reverted": ("↩", "yellow"),
    "rejected": ("✗", "yellow"),
    "failed": ("!", "red"),
    "refused": ("–", "dim"),
    "abandoned": ("∅", "dim"),
}
"""status -> (mark, style). The mark alone tells the status, for those who see no colours."""

WIDE = 120
"""From this many columns on, tables show their second set of columns."""


@dataclass
class Adaptive:
    """Builds its content for the width that it is drawn at; a table is no wider than it needs to be."""

    build: Callable[[int], RenderableType]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.measure import Measurement
        from rich.table import Table

        content = self.build(options.max_width)
        if isinstance(content, Table):
            # Only a table of a given width lets its prose column (the one with a ratio) give way first.
            natural = Measurement.get(console, options.update(max_width=10_000), content).maximum
            content.width = min(natural, options.max_width)
        yield content


VERDICT_WIDTH = 19
"""The longest reason code, "rejected.immaterial"."""


def widest(texts: Iterable[str], most: int) -> int:
    """Columns that the texts need, ``most`` at most: a name is never squeezed to make room for prose."""
    return min(most, max((len(text) for text in texts), default=0))


def trial_dict(view: TrialView) -> dict[str, Any]:
    """JSON-able."""
    return {**asdict(view), "settled": view.settled}


def delta(value: float | None, digits: int, unit: str = "") -> Text:
    """A signed difference: less is better, and green."""
    from rich.text import Text

    if value is None:
        return Text()
    style = "green" if value < 0 else ("red" if value > 0 else "")
    return Text(signed(value, digits) + unit, style=style)


def cost(view: TrialView) -> str:
    """Worker time and the agent's dollars."""
    seconds = f"{view.seconds:.0f} s" if view.seconds < 600 else f"{view.seconds / 60:.0f} min"
    return seconds + (f" + ${view.cost_usd:.2f}" if view.cost_usd else "")
