"""What the user sees: a progress line while things compile, a summary at the end.

In: root names from the driver; a filled `Summary`. Out: text on stderr. Invariant: nothing
is printed with `quiet`, and no progress line where stderr is no terminal.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from accel.config import Config


@dataclass
class RootLine:
    """One root in the summary."""

    name: str
    location: str
    state: str
    reason: str
    reason_location: str
    variants: int
    calls_compiled: int
    calls_eager: int


@dataclass
class Summary:
    """Numbers of one program's run. Units: seconds; shares are between 0 and 1."""

    counters: dict[str, float]
    roots: list[RootLine] = field(default_factory=list)

    @property
    def share_of_calls(self) -> float:
        return _share(self.counters["calls_compiled"], self.counters["calls_eager"])

    @property
    def share_of_ops(self) -> float:
        return _share(self.counters["ops_compiled"], self.counters["ops_eager"])


def _share(part: float, rest: float) -> float:
    return part / (part + rest) if part + rest else 0.0


class Progress:
    """One line on stderr that names what is being compiled."""

    def __init__(self, config: Config) -> None:
        self._shown = sys.stderr.isatty() and not config.quiet
        self._pending: list[str] = []

    def compiling(self, name: str) -> None:
        self._pending.append(name)
        self._draw()

    def done(self, name: str) -> None:
        if name in self._pending:
            self._pending.remove(name)
        self._draw()

    def _draw(self) -> None:
        if not self._shown:
            return
        text = f"accel: compiling {', '.join(self._pending)[:60]}" if self._pending else ""
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def print_summary(summary: Summary, console: Console | None = None) -> None:
    """The table at a program's exit."""
    console = console or Console(stderr=True, highlight=False)
    c = summary.counters
    console.print(
        f"[bold]accel[/bold]: {c['calls_compiled']:.0f} of "
        f"{c['calls_compiled'] + c['calls_eager']:.0f} calls served compiled "
        f"({summary.share_of_calls:.0%}), {summary.share_of_ops:.0%} of their torch operations; "
        f"{c['recordings']:.0f} recordings ({c['seconds_recording']:.2f} s), "
        f"{c['variants']:.0f} variants ({c['seconds_compiling']:.2f} s), "
        f"{c['recompiles']:.0f} recompiles, {c['graph_breaks']:.0f} graph breaks"
    )
    rows = [r for r in summary.roots if r.state != "cold" or r.reason]
    if not rows:
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("root", "state", "compiled", "eager", "variants", "why not compiled"):
        table.add_column(title, overflow="fold")
    for row in rows[:20]:
        why = f"{row.reason} ({row.reason_location})" if row.reason_location else row.reason
        table.add_row(
            row.name,
            row.state,
            str(row.calls_compiled),
            str(row.calls_eager),
            str(row.variants),
            why,
        )
    console.print(table)
    if len(rows) > 20:
        console.print(f"... and {len(rows) - 20} more roots")
