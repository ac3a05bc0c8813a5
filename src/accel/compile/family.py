"""Families: the executors of one graph for several sizes, made from its blueprint as they come.

In: a plan's blueprint with its library, the graph's symbols. Out: a callable for a variant, from
the inputs' list to the outputs' list, or None for sizes that the graph does not serve.
Invariant: sizes, strides and numbers of every input are those that the executor's plan was
made for; what is kept has bounds, in number and by its arenas.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from typing import Any

import torch

from accel import expressions, runtime
from accel.compile.blueprint import instantiate
from accel.trace import SegmentGraph

# An executor takes some 15 KB and its arena. A generator's cache has a size for each token, and
# whoever comes back to a size that was dropped pays 0.2 ms.
MAX_EXECUTORS = 2048
MAX_ARENA_BYTES = 64 << 20  # of all together, but for the newest few
_KEPT = 16
_MAX_REFUSED = 256  # sizes remembered as not served
_INT64 = range(-(1 << 62), 1 << 62)


class _Member:
    """One executor, the values of the symbols behind its inputs, and the numbers it returns."""

    __slots__ = ("arena_bytes", "executor", "numbers", "values")

    def __init__(
        self, executor: Any, values: torch.Tensor, numbers: list[int], arena_bytes: int
    ) -> None:
        self.executor, self.values, self.numbers = executor, values, numbers
        self.arena_bytes = arena_bytes


class Family:
    """Serves calls of a variant whose sizes differ."""

    def __init__(
        self, graph: SegmentGraph, blueprint: dict[str, Any], library_path: str | None
    ) -> None:
        assert graph.sizes is not None
        self.blueprint, self.library_path = blueprint, library_path
        self.symbols = graph.sizes.symbols
        self.tests: list[Any] = blueprint["sizes"]["tests"]
        self.number_outputs: list[Any] = blueprint["sizes"]["outputs"]
        self.tensor_count = len(graph.inputs)
        # Only these may differ; what the guards fix is not looked at again.
        self.open = sorted({s.origin[1] for s in self.symbols if s.origin[0] == "size"})
        self.members: OrderedDict[Any, _Member] = OrderedDict()
        self.arena_bytes = 0  # of all members
        self.made = 0  # executors made so far
        self.refusals = 0  # calls that were not served
        self.why = ""  # the newest refusal, for people
        self._refused: dict[Any, str] = {}

    def __call__(self, inputs: list[Any]) -> list[Any] | None:
        tensors = inputs[: self.tensor_count]
        numbers = [int(n) for n in inputs[self.tensor_count :]]
        key = (*numbers, *((inputs[i].size(), inputs[i].stride()) for i in self.open))
        member = self.members.get(key)
        if member is not None:
            self._used(key)
        else:
            member = self._make(key, tensors, numbers)
            if member is None:
                self.refusals += 1
                return None
        outputs: list[Any] | None = member.executor.run([*tensors, member.values])
        if outputs is not None and self.number_outputs:
            outputs.append(member.numbers)
        return outputs

    def _make(self, key: Any, tensors: list[Any], numbers: list[int]) -> _Member | None:
        known = self._refused.get(key)
        if known is not None:
            self.why = known
            return None
        values = [self._value(s.origin, tensors, numbers) for s in self.symbols]
        self.why = self._refusal(tensors, values)
        if self.why:
            if len(self._refused) >= _MAX_REFUSED:
                self._refused.clear()
            self._refused[key] = self.why
            return None
        plan = instantiate(self.blueprint, values)
        executor = runtime.native.Executor(plan, self.library_path)
        results = [expressions.evaluate(node, values) for node in self.number_outputs]
        symbols = torch.tensor(values, dtype=torch.int64)
        member = _Member(executor, symbols, results, plan["arena_bytes"])
        self.made += 1
        self.members[key] = member
        self.arena_bytes += member.arena_bytes
        while self._is_too_much():
            self.arena_bytes -= self.members.popitem(last=False)[1].arena_bytes
        return member

    def _is_too_much(self) -> bool:
        count = len(self.members)
        return count > MAX_EXECUTORS or (count > _KEPT and self.arena_bytes > MAX_ARENA_BYTES)

    def _used(self, key: Any) -> None:
        with contextlib.suppress(KeyError):  # another thread made room meanwhile
            self.members.move_to_end(key)

    @staticmethod
    def _value(origin: tuple[Any, ...], tensors: list[Any], numbers: list[int]) -> int:
        if origin[0] == "size":
            return int(tensors[origin[1]].size(origin[2]))
        return int(numbers[origin[1]])

    def _refusal(self, tensors: list[Any], values: list[int]) -> str:
        """Why these sizes are not served; "" when they are."""
        names = [self._name(s.origin) for s in self.symbols]
        if any(v not in _INT64 for v in values):
            return "a number that does not fit 64 bits"
        for test in self.tests:
            if not expressions.holds(test, values):
                shown = ", ".join(f"{n} = {v}" for n, v in zip(names, values, strict=True))
                return f"{expressions.text(test, names)} does not hold: {shown}"
        for i in self.open:
            expected = self.blueprint["inputs"][i]
            for what, found in (("sizes", tensors[i].size()), ("strides", tensors[i].stride())):
                wanted = [
                    expressions.evaluate(n["e"], values) if type(n) is dict else n
                    for n in expected[what]
                ]
                if wanted != list(found):
                    return f"{what} of input {i} are {list(found)}, not {wanted}"
        return ""

    def _name(self, origin: tuple[Any, ...]) -> str:
        if origin[0] == "size":
            return f"input{origin[1]}.size({origin[2]})"
        return f"number{origin[1]}"
