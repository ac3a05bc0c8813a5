"""Minimum cuts of small networks (Dinic's algorithm).

In: edges between hashable nodes, with capacities. Out: the cut's value, and the nodes on the
source's side of the cut that lies nearest to the sink.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

INFINITE = float(1 << 60)
_NOTHING = 1e-9


class Network:
    """A directed network; edges between the same nodes add up."""

    def __init__(self) -> None:
        self.index: dict[Hashable, int] = {}
        self.edges: list[list[int]] = []  # by node: numbers of the edges that leave it
        self.heads: list[int] = []  # by edge
        self.room: list[float] = []  # by edge; edge ^ 1 is its reverse

    def add(self, tail: Hashable, head: Hashable, capacity: float) -> None:
        a, b = self._node(tail), self._node(head)
        for at, to, room in ((a, b, capacity), (b, a, 0.0)):
            self.edges[at].append(len(self.heads))
            self.heads.append(to)
            self.room.append(room)

    def _node(self, name: Hashable) -> int:
        if name not in self.index:
            self.index[name] = len(self.edges)
            self.edges.append([])
        return self.index[name]

    def minimum_cut(self, source: Hashable, sink: Hashable) -> tuple[float, set[Hashable]]:
        """The cut's value (INFINITE or more when there is none), and the source's side."""
        s, t = self._node(source), self._node(sink)
        flow = 0.0
        while flow < INFINITE:
            levels = self._levels(s)
            if levels[t] < 0:
                break
            tried = [0] * len(self.edges)
            while flow < INFINITE and (pushed := self._augment(s, t, levels, tried)) > 0:
                flow += pushed
        from_sink = self._reaches(t)
        return flow, {name for name, i in self.index.items() if not from_sink[i]}

    def _levels(self, source: int) -> list[int]:
        levels = [-1] * len(self.edges)
        levels[source] = 0
        queue = deque([source])
        while queue:
            at = queue.popleft()
            for e in self.edges[at]:
                to = self.heads[e]
                if self.room[e] > _NOTHING and levels[to] < 0:
                    levels[to] = levels[at] + 1
                    queue.append(to)
        return levels

    def _augment(self, source: int, sink: int, levels: list[int], tried: list[int]) -> float:
        """Pushes flow along one shortest path; 0 when there is none left."""
        path: list[int] = []
        at = source
        while at != sink:
            if tried[at] == len(self.edges[at]):
                if not path:
                    return 0.0
                at = self.heads[path.pop() ^ 1]
                tried[at] += 1
                continue
            e = self.edges[at][tried[at]]
            to = self.heads[e]
            if self.room[e] > _NOTHING and levels[to] == levels[at] + 1:
                path.append(e)
                at = to
            else:
                tried[at] += 1
        pushed = min(self.room[e] for e in path)
        for e in path:
            self.room[e] -= pushed
            self.room[e ^ 1] += pushed
        return pushed

    def _reaches(self, sink: int) -> list[bool]:
        """Which nodes still reach the sink."""
        reaches = [False] * len(self.edges)
        reaches[sink] = True
        queue = deque([sink])
        while queue:
            at = queue.popleft()
            for e in self.edges[at]:
                back = self.heads[e]
                if self.room[e ^ 1] > _NOTHING and not reaches[back]:
                    reaches[back] = True
                    queue.append(back)
        return reaches
