"""Timing segments: is compiled code faster than Python between the same two points?

In: measured hits of a node's variants; calls of the root that ran as Python and told when they
came to a node or a landing. Out: nodes that lose, which are dropped. Invariant: a metered call
is a call of the program's own; such calls are as rare as `trial` says.
"""

from __future__ import annotations

import time
import types
from collections.abc import Sequence
from typing import Any

from accel import log
from accel.capture.twins import with_code
from accel.errors import reason_text
from accel.rewriter import resumable
from accel.rewriter.islands import Islands
from accel.roots import Root
from accel.trial import Trial

ENOUGH = 8  # times of a node that is being compiled
_MOST_VISITS = 64  # measured stretches of one call


class Meter:
    """Takes the times of one metered call."""

    def __init__(self, nodes: Sequence[Root]) -> None:
        self.nodes = nodes
        self.node: Root | None = None
        self.started = 0
        self.visits = 0

    def mark(self, number: int) -> None:
        """The call has come to node `number`, or to a landing."""
        now = time.perf_counter_ns()
        if self.node is not None:
            self.node.eager_ns.append(now - self.started)
        self.node = None
        if number >= 0 and self.visits < _MOST_VISITS:
            self.visits += 1
            self.node = self.nodes[number]
            self.started = time.perf_counter_ns()


def metered(
    plan: Islands, nodes: Sequence[Root], function: types.FunctionType, under: types.CodeType
) -> types.FunctionType:
    """`function` as Python runs it, its code without prologue being `under`, with a meter."""
    return with_code(function, resumable.metered(plan, under, Meter(nodes).mark))


def review(node: Root, trial: Trial) -> bool:
    """Native dispatch has told that a variant of the node is due; True when a metered call is
    wanted. A node that loses runs as Python from now on."""
    natives: list[Any] = [v.native for v in node.variants]
    due = [n for n in natives if n.review_at == 0]
    times = [ns for native in natives for ns in native.ns_compiled]
    trial.eager_ns.extend(node.eager_ns)
    node.eager_ns.clear()
    ruling = trial.review(times)
    if ruling.losing:
        _lose(node, trial.text(times))
        return False
    for native in natives:
        if trial.strikes or ruling.probe_every == 1:
            native.clear_probes()
        native.probe_every = ruling.probe_every
    for native in due:
        native.review_at = native.hits + ruling.review_in
    return ruling.eager_runs > 0


def _lose(node: Root, text: str) -> None:
    log.artifact("driver", "%s is losing: %s", node.name, text)
    node.retire(node.variants)
    node.state, node.entry.state = "losing", "off"
    node.reason = reason_text("losing", text)


__all__ = ["ENOUGH", "Meter", "metered", "review"]
