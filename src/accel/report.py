"""What the user sees: a progress line while things compile, a summary at the end.

In: root names from the driver; a filled `Summary`. Out: text on stderr. Invariant: no progress
is shown with `quiet` or where stderr is no terminal; and drawing it never moves the cursor, so
that the program's own output is never overwritten.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field
from typing import Any

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
    hint: str = ""
    is_break: bool = False


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


# ---------------------------------------------------------------------------- progress

_NAMES_WIDTH = 44
# Save the cursor, go to a column, draw dimly, go back.
_DRAW = "\x1b7\x1b[{column}G\x1b[2m{text}\x1b[0m\x1b8"
_ERASE_TO_THE_RIGHT = "\x1b[K"


class Progress:
    """A word at the right edge of the terminal that tells what is being compiled."""

    def __init__(self, config: Config) -> None:
        stream = sys.stderr
        self._shown = (
            not config.quiet
            and stream is not None
            and stream.isatty()
            and os.environ.get("TERM", "dumb") != "dumb"
        )
        self._pending: list[str] = []
        self._finished = 0
        self._started = 0.0
        self._drawn = False

    def compiling(self, name: str) -> None:
        if not self._pending:
            self._started = time.monotonic()
        self._pending.append(name)
        self._draw()

    def done(self, name: str) -> None:
        if name in self._pending:
            self._pending.remove(name)
            self._finished += 1
        self._draw()

    def close(self) -> None:
        """The program is over; nothing is shown any more."""
        self._pending.clear()
        self._draw()
        self._shown = False

    @property
    def text(self) -> str:
        names = ", ".join(dict.fromkeys(self._pending))
        if len(names) > _NAMES_WIDTH:
            names = names[: _NAMES_WIDTH - 3] + "..."
        seconds = time.monotonic() - self._started
        since = f", {seconds:.0f} s" if seconds >= 1 else ""
        before = f" ({self._finished} done{since})" if self._finished else ""
        return f"accel: compiling {names}{before}"

    def _draw(self) -> None:
        if not self._shown:
            return
        try:
            if self._pending:
                text = self.text
                column = os.get_terminal_size(sys.stderr.fileno()).columns - len(text)
                if column > 0:
                    erased = _ERASE_TO_THE_RIGHT if self._drawn else ""
                    sys.stderr.write(erased + _DRAW.format(column=column, text=text))
                    self._drawn = True
            elif self._drawn:
                sys.stderr.write(_ERASE_TO_THE_RIGHT)
                self._drawn = False
            sys.stderr.flush()
        except (OSError, ValueError):  # the terminal has gone
            self._shown = False


# ----------------------------------------------------------------------------- summary

_MOST_ROWS = 20
_MOST_NAMES = 3


def headline(summary: Summary) -> str:
    """The summary in three lines."""
    c = {name: int(value) for name, value in summary.counters.items()}
    seconds = summary.counters
    calls = c["calls_compiled"] + c["calls_eager"]
    if not c["recordings"]:
        return "accel: nothing was compiled; no function or module with torch operations got hot"
    judged = len(summary.roots)
    split = ""
    if c["calls_split"]:
        split = (
            f"       {c['calls_split']:,} more were split at graph breaks; compiled segments "
            f"ran {c['segments_served']:,} times in them\n"
        )
    return (
        f"accel: {c['calls_compiled']:,} of {calls:,} calls of {_count(judged, 'root')} ran "
        f"compiled ({summary.share_of_calls:.0%}), with {summary.share_of_ops:.0%} of their torch "
        f"operations\n{split}"
        f"       {_count(c['segments'], 'segment')}, {_count(c['variants'], 'variant')}, "
        f"{_count(c['recompiles'], 'recompile')}, {_count(c['graph_breaks'], 'graph break')}, "
        f"{_count(c['deopts'], 'deopt')}; recording took {seconds['seconds_recording']:.2f} s, "
        f"compiling {seconds['seconds_compiling']:.2f} s"
    )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def reasons(summary: Summary) -> list[tuple[str, str, str]]:
    """(place, why, what can be done) for the roots that are not served compiled, and why.

    What has one cause is said once: the place, or the reason, is the same.
    """
    groups: dict[tuple[str, str], list[RootLine]] = {}
    for row in summary.roots:
        if row.reason:
            is_elsewhere = row.reason_location not in ("", row.location)
            place = row.reason_location if is_elsewhere else ""
            groups.setdefault((place, row.reason), []).append(row)
    found = []
    for (place, reason), rows in groups.items():
        names = ", ".join(dict.fromkeys(row.name for row in rows[:_MOST_NAMES]))
        if len(rows) > _MOST_NAMES:
            names += f" and {len(rows) - _MOST_NAMES} more"
        text = reason.splitlines()[0]
        found.append((place or rows[0].location, f"{names}: {text}", rows[0].hint))
    return found


_COLUMNS = ("root", "defined at", "state", "compiled", "eager", "variants")
_NUMBERS = frozenset(("compiled", "eager", "variants"))


def _cells(row: RootLine) -> tuple[str, ...]:
    numbers = (row.calls_compiled, row.calls_eager, row.variants)
    return (row.name, short_place(row.location), row.state, *(f"{n:,}" for n in numbers))


def short_place(place: str) -> str:
    """A place as short as it stays clear: relative, or from the package's folder on."""
    path, colon, line = place.rpartition(":")
    if "site-packages/" in path:
        path = path.rpartition("site-packages/")[2]
    elif path.startswith(os.path.join(_cwd(), "")):
        path = os.path.relpath(path, _cwd())
    return f"{path}{colon}{line}"


def _cwd() -> str:
    try:
        return os.getcwd()
    except OSError:  # the program removed it
        return "/"


def print_summary(summary: Summary, console: Any = None) -> None:
    """The summary at a program's exit: in colours on a terminal, else as plain lines."""
    if console is None and not (sys.stderr is not None and sys.stderr.isatty()):
        _print_plain(summary)
        return
    from rich.console import Console  # 70 ms: only a terminal is worth them
    from rich.table import Table
    from rich.text import Text

    console = console or Console(stderr=True, highlight=False, soft_wrap=False)
    first, *rest = headline(summary).splitlines()
    console.print(Text(first, style="bold"), *map(Text, rest), sep="\n")
    if not summary.roots:
        return
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for title in _COLUMNS:
        table.add_column(title, justify="right" if title in _NUMBERS else "left", overflow="fold")
    for row in summary.roots[:_MOST_ROWS]:
        table.add_row(*map(Text, _cells(row)), style="" if row.calls_compiled else "yellow")
    console.print(table)
    for place, why, hint in reasons(summary)[:_MOST_ROWS]:
        console.print(Text.assemble((short_place(place), "cyan"), f": {why}", (f"; {hint}", "dim")))
    _mention_rest(len(summary.roots), lambda text: console.print(Text(text)))


def _print_plain(summary: Summary) -> None:
    def say(text: str) -> None:
        print(text, file=sys.stderr)

    try:
        say(headline(summary))
        rows = [_COLUMNS, *(_cells(row) for row in summary.roots[:_MOST_ROWS])]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows if summary.roots else ():
            cells = zip(row, widths, _COLUMNS, strict=True)
            texts = (f"{c:>{w}}" if title in _NUMBERS else f"{c:<{w}}" for c, w, title in cells)
            say("       " + "  ".join(texts).rstrip())
        for place, why, hint in reasons(summary)[:_MOST_ROWS]:
            say(f"       {short_place(place)}: {why}; {hint}")
        _mention_rest(len(summary.roots), say)
    except (OSError, ValueError):  # stderr is closed, or its reader has gone
        return


def _mention_rest(count: int, say: Any) -> None:
    if count > _MOST_ROWS:
        say(f"... and {count - _MOST_ROWS} more roots; `python -m accel explain` shows all")
