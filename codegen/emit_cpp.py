"""Loop IR -> C++.

In: a verified `Kernel` and its lane count. Out: the text of one function, without the
headers it needs (`build.py`). Invariant: names are numbered in order of appearance, so
kernels that do the same on other buffers have the same text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from accel.codegen import loop_ir as ir
from accel.codegen.cpp_expressions import COMPUTE_TYPE, MEMORY_TYPE, Expressions
from accel.codegen.jamming import copied
from accel.codegen.symbols import hint, is_same, is_symbolic

COMBINE = {
    "sum": "{0} + {1}",
    "prod": "{0} * {1}",
    "max": "v_max({0}, {1})",
    "min": "v_min({0}, {1})",
    "any": "{0} | {1}",
    "all": "{0} & {1}",
}
_LOWEST = {
    "f32": "-__builtin_inff()",
    "f64": "-__builtin_inf()",
    "i32": "(-2147483647 - 1)",
    "i64": "(-9223372036854775807L - 1)",
}
_HIGHEST = {
    "f32": "__builtin_inff()",
    "f64": "__builtin_inf()",
    "i32": "2147483647",
    "i64": "9223372036854775807L",
}
# Where a kernel finds symbol {0}: its last parameter, {1}, are the values of all.
SYMBOL = "const i64 s{0} = ((const i64*)p[{1}])[{0}];"
# Longer chains of additions are cut: a part is added up before the next begins.
_SUM_CHAIN = 32
_UNROLL = 4
# Of values that are the same in all lanes so many are computed: narrow roots and divisions take less time.
_UNIFORM_LANES = 4
# Threads share out at least this many units where the loops allow it.
_MIN_UNITS = 32


def emit(kernel: ir.Kernel, lanes: int, name: str | None = None) -> str:
    """The C++ function `name` (default: the kernel's own name)."""
    return _Emitter(kernel, lanes, name or kernel.name).text()


def emit_epilogue(
    kernel: ir.Kernel, lanes: int, first_param: int, columns: int, pieces: bool
) -> str:
    """`@_results`: the kernel on a template's results; its params begin at `first_param`.

    With `pieces` the template hands out parts of a row that begin and end anywhere.
    """
    return _Emitter(kernel, lanes, "@").epilogue(first_param, columns, pieces)


def _chain(additions: int) -> int:
    """How many additions to make at once of so many: the square root balances both levels."""
    return int(min(max(2 ** round(math.log2(max(additions, 1)) / 2), _SUM_CHAIN), 8 * _SUM_CHAIN))


def identity(kind: str, type_: str) -> str:
    if kind == "max":
        return _LOWEST[type_]
    if kind == "min":
        return _HIGHEST[type_]
    return {"sum": "0", "prod": "1", "any": "0", "all": "-1"}[kind]


class _Emitter(Expressions):
    def __init__(self, kernel: ir.Kernel, lanes: int, name: str) -> None:
        super().__init__(kernel, lanes)
        self.name = name
        self.accumulators: dict[str, tuple[str, str, int, bool]] = {}
        self._turn_to(kernel.body)

    # ------------------------------------------------------------ function

    def text(self) -> str:
        k = self.kernel
        units, parts = self._units()
        if k.tile_var is not None:
            units, parts = self._tiled_units(), 1
        for i, param in enumerate(k.params):
            const = "" if param.written else "const "
            type_ = f"{const}{MEMORY_TYPE[param.dtype]}*"
            self.line(f"{type_} __restrict__ const p{i} = ({type_})p[{i}];")
        self.line("i64 unit = begin;")
        if k.jammed is not None:
            self._jammed_rows(k.jammed)
        self._row_buffers(k.scratch)
        self.line("for (; unit < end; ++unit) {")
        self.depth += 1
        self._decode(parts)
        for statement in k.body:
            if not isinstance(statement, ir.Loop):
                self.statement(statement)
            elif k.tile_var is not None:
                self._tiled_loop(statement)
            elif parts > 1:
                self._shared_loop(statement, parts)
            else:
                self.statement(statement)
        self.depth -= 1
        self.line("}")
        if k.streamed:
            self.line("end_of_stream();")
        tables = [f"  {t}" for t in self.tables]
        call = (
            f"share({self.name}_part, p, {units}, threads)"
            if k.parallel
            else (f"{self.name}_part(p, 0, {units})")
        )
        head = f"static void {self.name}_part(void* const* p, i64 begin, i64 end) {{"
        sizes = _symbols("\n".join(self.lines), len(k.params))
        of_call = "".join(_symbols(call, len(k.params)))
        entry = f'extern "C" void {self.name}(void* const* p, long threads) {{{of_call} {call}; }}'
        return "\n".join([head, self._widths, *sizes, *tables, *self.lines, "}", entry, ""])

    def _turn_to(self, body: list[Any]) -> None:
        """The statements that are written now: the kernel's own, or those of several rows."""
        self.body = body
        self.moved = ir.moved(body)

    @property
    def _widths(self) -> str:
        return f"  constexpr int L = {self.lanes}, U = {min(self.lanes, _UNIFORM_LANES)};"

    def _row_buffers(self, scratch: dict[str, tuple[int, str]]) -> None:
        for name, (length, type_) in scratch.items():
            size = length * (self.lanes if self.kernel.lanes_over_rows else 1)
            size = -(-size // self.lanes) * self.lanes
            row = self.rename(name + "/row", "row")
            self.line(f"alignas(64) {COMPUTE_TYPE[type_]} {row}[{size}];")

    def _jammed_rows(self, jammed: ir.Jammed) -> None:
        self._row_buffers(jammed.scratch)
        self.line(f"for (; unit + {jammed.rows} <= end; unit += {jammed.rows}) {{")
        self.depth += 1
        for row in range(jammed.rows):
            self.line(f"const i64 unit_{row} = unit + {row};")
            self._decode(1, row)
        self._turn_to(jammed.body)
        for statement in jammed.body:
            self.statement(statement)
        self._turn_to(self.kernel.body)
        self.depth -= 1
        self.line("}")

    def epilogue(self, first_param: int, columns: int, pieces: bool) -> str:
        k = self.kernel
        (loop,) = k.body
        assert isinstance(loop, ir.Loop) and loop.vector
        self.line("const epilogue_context& e = *(const epilogue_context*)context;")
        for i, param in enumerate(k.params):
            const = "" if param.written else "const "
            type_ = f"{const}{MEMORY_TYPE[param.dtype]}*"
            self.line(f"{type_} __restrict__ const p{i} = ({type_})e.p[{first_param + i}];")
        if k.outer:
            self.line("const i64 unit = e.row + m;")
            self._decode(1)
        v = self.var(loop.var)
        store = next((s for s in loop.body if isinstance(s, ir.Store)), None)
        where, name = "", "nullptr"
        if store is not None:
            name = "@_where"
            place = f"(char*)({self._pointer(store.param, store.address)[0]})"
            place = f"  const i64 {v} = n;\n  return {place};\n}}"
            head = f"static char* {name}(const void* context, i64 m, i64 n) {{"
            where = "\n".join([head, *self.lines, place])
        self.line("const float* const results = values - n;")
        self._step_function(loop, [])
        self.line(f"i64 {v} = n;")
        self.line(f"for (; {v} + L <= n + length; {v} += L) step({v}, count<L>{{}});")
        tail = self.lanes // 2 if pieces else columns % self.lanes
        while tail:
            self.line(
                f"if ({v} + {tail} <= n + length) step({v}, count<{tail}>{{}}), {v} += {tail};"
            )
            tail = tail // 2 if pieces else 0
        head = (
            "static void @_finish(const void* context, i64 m, i64 n, i64 length, "
            "const float* values) {"
        )
        tables = [f"  {t}" for t in self.tables]
        body = [head, self._widths, *tables, *self.lines, "}"]
        results = f"static constexpr Results @_results = {{@_finish, {name}}};"
        return "\n".join([*body, where, results, ""])

    def _units(self) -> tuple[int, int]:
        """How many units threads share out, and how many parts of the vector loop that is."""
        rows = 1
        for _, size in self.kernel.outer:
            rows *= size
        loop = self._shared()
        if loop is None or not self.kernel.parallel or hint(rows) >= _MIN_UNITS:
            return rows, 1
        blocks = -(-hint(loop.size) // self.lanes)
        parts = max(min(blocks, -(-_MIN_UNITS // max(hint(rows), 1))), 1)
        return rows * parts, parts

    def _shared(self) -> ir.Loop | None:
        """The outermost vector loop, when nothing but constants of it is beside it."""
        *before, last = self.kernel.body
        alone = all(isinstance(s, ir.Let) for s in before)
        return last if alone and isinstance(last, ir.Loop) and last.vector else None

    def _decode(self, parts: int, row: int | None = None) -> None:
        """The outer variables of a unit, or of one of several."""
        tiled = self.kernel.tile_var
        suffix = "" if row is None else f"_{row}"
        factors = [
            ("tile", -(-n // self.lanes))
            if v == tiled
            else (self.var(v if row is None else copied(v, row)), n)
            for v, n in self.kernel.outer
        ]
        if parts > 1:
            factors.append(("part", parts))
        rest = f"unit{suffix}"
        for i in range(len(factors) - 1, -1, -1):
            name, size = factors[i]
            if i == 0:
                self.line(f"const i64 {name} = {rest};")
                continue
            self.line(f"const i64 {name} = {rest} % {size};")
            after = f"u{i}{suffix}"
            self.line(f"const i64 {after} = {rest} / {size};")
            rest = after

    # ------------------------------------------------------------ loops

    def _shared_loop(self, loop: ir.Loop, parts: int) -> None:
        blocks = loop.size // self.lanes
        self.line(f"const i64 from = part * {blocks} / {parts} * L;")
        self.line(f"const i64 to = (part + 1) * {blocks} / {parts} * L;")
        self._step_function(loop, [])
        v = self.var(loop.var)
        self.line(f"for (i64 {v} = from; {v} < to; {v} += L) step({v}, count<L>{{}});")
        if is_same(loop.size % self.lanes, 0):
            return
        self.line(f"if (part == {parts - 1}) {{")
        self._tail(loop.size, lambda at, count: f"step({at}, count<{count}>{{}});")
        self.line("}")

    def _tail(self, size: Any, call: Callable[[str, int], str]) -> None:
        """The last elements, which do not fill a vector."""
        rest = size % self.lanes
        if not is_symbolic(rest):
            if rest:
                self.line(call(str(size - rest), rest))
            return
        # How many there are is known when the kernel runs: halves, quarters, ... of a vector.
        self.line(f"i64 at = {size - rest}; const i64 rest = {rest};")
        count = self.lanes // 2
        while count:
            self.line(f"if (rest & {count}) {{ {call('at', count)} at += {count}; }}")
            count //= 2

    def _tiled_units(self) -> int:
        units = 1
        for v, size in self.kernel.outer:
            units *= -(-size // self.lanes) if v == self.kernel.tile_var else size
        return units

    def _tiled_loop(self, loop: ir.Loop) -> None:
        """Squares of the vector variable and another: loads that stride over the first are
        transposed on the way, so that every line of memory is read once."""
        tiled = self.kernel.tile_var
        assert tiled is not None
        size = dict(self.kernel.outer)[tiled]
        t, v = self.var(tiled), self.var(loop.var)
        self.line("const i64 first = tile * L;")
        self.line(f"const i64 last = first + L < {size} ? first + L : {size};")
        self.line(f"auto square = [&](const i64 {v}, auto k) __attribute__((always_inline)) {{")
        self.depth += 1
        self.line("constexpr int K = decltype(k)::value;")
        outside, self.in_vector = self.in_vector, True
        for load in self._transposed_loads(loop):
            pointer, step = self._pointer(load.buffer, load.address)
            name = f"tile{len(self.tiles)}"
            self.tiles[pointer] = name
            type_ = MEMORY_TYPE[load.dtype]
            self.line(f"alignas(64) {type_} {name}[L * L];")
            self.line(
                f"{{ const i64 {t} = first; transpose_tile<L, K>({pointer}, {step}, last - first, {name}); }}"
            )
        self.line(f"for (i64 {t} = first; {t} < last; ++{t}) {{")
        self.depth += 1
        for s in loop.body:
            self.statement(s)
        self.depth -= 1
        self.line("}")
        self.in_vector = outside
        self.tiles = {}
        self.depth -= 1
        self.line("};")
        whole, tail = loop.size - loop.size % self.lanes, loop.size % self.lanes
        self.line(f"for (i64 {v} = 0; {v} < {whole}; {v} += L) square({v}, count<L>{{}});")
        if tail:
            self.line(f"square({whole}, count<{tail}>{{}});")

    def _transposed_loads(self, loop: ir.Loop) -> list[ir.Load]:
        tiled = self.kernel.tile_var
        assert tiled is not None
        found: dict[ir.Load, None] = {}
        for s in loop.body:
            for e in ir.leaves(s.expr):
                if isinstance(e, ir.Load) and self._step(e.address) not in (0, 1):
                    if e.address.coefficient(tiled) == 1:
                        found[e] = None
        return list(found)

    def _step_function(self, loop: ir.Loop, accumulators: list[str]) -> None:
        """`step`: the loop's body for one vector, of which `k` lanes count."""
        self.name_divisors(loop)
        params = [f"const i64 {self.var(loop.var)}", "auto k", *self._sums(accumulators)]
        self.line(f"auto step = [&]({', '.join(params)}) __attribute__((always_inline)) {{")
        self.depth += 1
        self.line("constexpr int K = decltype(k)::value;")
        outside, self.in_vector = self.in_vector, True
        for s in loop.body:
            self.statement(s)
        self.in_vector = outside
        self.divisors = {}  # they end with the loop
        self.depth -= 1
        self.line("};")

    def _sums(self, accumulators: list[str]) -> list[str]:
        """The parameters of a loop's body that it accumulates into."""
        types = {name: COMPUTE_TYPE[self.accumulators[name][1]] for name in accumulators}
        return [f"vec<{type_}, L>& {self.local(name)}_" for name, type_ in types.items()]

    def _slots(self, accumulators: list[str], slot: int) -> str:
        """The arguments for them, of those that take turns."""
        return "".join(f", {self.local(name)}[{slot}]" for name in accumulators)

    def _vector_loop(self, loop: ir.Loop) -> None:
        inside = [s.name for s in loop.body if isinstance(s, ir.Accumulate)]
        unroll = max((self.accumulators[n][2] for n in inside), default=1)
        chained = any(self.accumulators[n][3] for n in inside)
        lanes, size = self.lanes, loop.size
        v = self.var(loop.var)

        def call(at: str, lane_count: str, slot: int) -> str:
            return f"step({at}, count<{lane_count}>{{}}{self._slots(inside, slot)});"

        self.line("{")
        self.depth += 1
        self._step_function(loop, inside)
        block = _chain(hint(size) // (unroll * lanes)) * unroll * lanes
        end = str(size - size % lanes)
        start = "0"
        if chained:
            self.line(f"for (i64 block = 0; block < {end}; block += {block}) {{")
            self.depth += 1
            self.line(f"const i64 stop = block + {block} < {end} ? block + {block} : {end};")
            start, end = "block", "stop"
        if unroll > 1 or chained:
            self.line(f"i64 {v} = {start};")
            if unroll > 1:
                width = unroll * lanes
                calls = " ".join(call(f"{v} + {lanes * u}", "L", u) for u in range(unroll))
                self.line(f"for (; {v} + {width} <= {end}; {v} += {width}) {{ {calls} }}")
            self.line(f"for (; {v} < {end}; {v} += L) {call(v, 'L', 0)}")
        elif hint(size) >= lanes or is_symbolic(size):
            self.line(f"for (i64 {v} = 0; {v} < {end}; {v} += L) {call(v, 'L', 0)}")
        if chained:
            for n in inside:
                if self.accumulators[n][3]:
                    self._flush(n)
            self.depth -= 1
            self.line("}")
        self._tail(size, lambda at, count: call(at, str(count), 0))
        self.depth -= 1
        self.line("}")

    def _flush(self, name: str) -> None:
        """Adds a sum's partial sums to its total."""
        a, unroll = self.local(name), self.accumulators[name][2]
        self.line(f"{a}_total += {self._combined(name)};")
        self.line(f"for (int u = 0; u < {unroll}; u++) {a}[u] = decltype({a}_total){{}};")

    def _combined(self, name: str) -> str:
        kind, _, unroll, _ = self.accumulators[name]
        parts = [f"{self.local(name)}[{u}]" for u in range(unroll)]
        while len(parts) > 1:
            parts = [
                f"({COMBINE[kind].format(parts[i], parts[i + 1])})" for i in range(0, len(parts), 2)
            ]
        return parts[0]

    def _serial_loop(self, loop: ir.Loop) -> None:
        v, size = self.var(loop.var), loop.size
        inside = [s.name for s in loop.body if isinstance(s, ir.Accumulate)]
        unroll = max((self.accumulators[n][2] for n in inside), default=1)
        chained = [n for n in inside if self.accumulators[n][3]]
        long = hint(size) > _SUM_CHAIN * unroll
        start, end = "0", str(size)
        self.line("{")
        self.depth += 1
        if unroll > 1:
            self._line_function(loop, inside)
        if chained and long:
            part = _chain(hint(size) // unroll) * unroll
            self.line(f"for (i64 block = 0; block < {size}; block += {part}) {{")
            self.depth += 1
            self.line(f"const i64 stop = block + {part} < {size} ? block + {part} : {size};")
            start, end = "block", "stop"
        if unroll > 1:
            self._unrolled(v, start, end, unroll, inside)
        else:
            self.line(f"for (i64 {v} = {start}; {v} < {end}; ++{v}) {{")
            self.depth += 1
            for s in loop.body:
                self.statement(s)
            self.depth -= 1
            self.line("}")
        for n in chained:
            self._flush(n)
        if chained and long:
            self.depth -= 1
            self.line("}")
        self.depth -= 1
        self.line("}")

    def _line_function(self, loop: ir.Loop, accumulators: list[str]) -> None:
        """`line`: the body of a loop over lines, which several sums take in turns."""
        params = [f"const i64 {self.var(loop.var)}", *self._sums(accumulators)]
        self.line(f"auto line = [&]({', '.join(params)}) __attribute__((always_inline)) {{")
        self.depth += 1
        for s in loop.body:
            self.statement(s)
        self.depth -= 1
        self.line("};")

    def _unrolled(self, v: str, start: str, end: str, unroll: int, inside: list[str]) -> None:
        def call(u: int) -> str:
            return f"line({v} + {u}{self._slots(inside, u)});"

        self.line(f"i64 {v} = {start};")
        calls = " ".join(call(u) for u in range(unroll))
        self.line(f"for (; {v} + {unroll} <= {end}; {v} += {unroll}) {{ {calls} }}")
        self.line(f"for (; {v} < {end}; ++{v}) {call(0)}")

    # ------------------------------------------------------------ statements

    def statement(self, s: Any) -> None:
        getattr(self, f"_emit_{type(s).__name__.lower()}")(s)

    def _emit_loop(self, s: ir.Loop) -> None:
        if s.vector:
            self._vector_loop(s)
        else:
            self._serial_loop(s)

    def _emit_let(self, s: ir.Let) -> None:
        bits = s.name in self.moved
        value = self._moved(s.expr) if bits else self.expr(s.expr)
        self.line(f"const auto {self.local(s.name)} = {value};")
        for dtype in ("bfloat16", "float16"):
            if self.is_rounded(s.expr, dtype):
                self.rounded[s.name] = dtype
        self._note_width(s.name)

    def _moved(self, e: ir.Expr) -> str:
        """The bits of what is only stored again."""
        if isinstance(e, ir.Gather):
            return self.gather(e, bits=True)
        assert isinstance(e, ir.Load)
        return self.load(e, bits=True)

    def _note_width(self, name: str) -> None:
        if not self.in_vector:
            self.uniform.add(name)

    def _emit_store(self, s: ir.Store) -> None:
        pointer, step = self._pointer(s.param, s.address)
        value = self.expr(s.expr)
        store = "store"
        if isinstance(s.expr, ir.Local) and s.expr.name in self.moved:
            store = "store_bits"
        elif s.dtype == "bfloat16" and self.is_rounded(s.expr, s.dtype):
            pointer = f"(rounded_bfloat16*)({pointer})"
        if is_same(step, 0):
            self.line(f"{store}_one<{self.width}>({pointer}, {value});")
        elif is_same(step, 1):
            store = "stream" if store == "store" and self._streams(s) else store
            self.line(f"{store}<L, K>({pointer}, {value});")
        else:
            self.line(f"{store}_strided<L, K>({pointer}, {step}, {value});")

    def _emit_scatter(self, s: ir.Scatter) -> None:
        assert isinstance(s.expr, ir.Op)
        pointer, step = self._pointer(s.param, s.address)
        value, place = s.expr.args
        if self.in_vector and not (self._is_same_in_lanes(place) and is_same(step, 1)):
            self.line(
                f"add_scattered<L, K>({pointer}, {self.expr(place)}, {step}, {self.expr(value)});"
            )
            return
        add = "add_to<L, K>" if self.in_vector else "add_one<U>"
        self.line(f"{add}({pointer} + {self.common_place(place)}, {self.expr(value)});")

    def _streams(self, s: ir.Store) -> bool:
        """True when the store is to be streamed and fills whole, aligned vectors."""
        if s.param not in self.kernel.streamed:
            return False
        vector = self.kernel.vector_var
        steps = [c for v, c in s.address.terms if v != vector]
        return all(is_same(c % self.lanes, 0) for c in (*steps, s.address.const))

    def _emit_keep(self, s: ir.Keep) -> None:
        self.line(f"store_raw<L, L>({self.row_buffer(s.scratch, s.address)}, {self.expr(s.expr)});")

    def _emit_begin(self, s: ir.Begin) -> None:
        first = f"splat<{COMPUTE_TYPE[s.type]}, L>({identity(s.kind, s.type)})"
        if s.name in ir.scanned(
            self.body
        ):  # the value itself, since each step waits for the one before
            self.line(f"auto {self.local(s.name)} = {first};")
            return
        loop, nested = self._loop_of(s.name, self.body, 0)
        long_chain = nested > 1
        unroll = 1
        if loop.vector:
            vectors = hint(loop.size) // self.lanes
            unroll = _UNROLL if vectors >= 2 * _UNROLL else 2 if vectors >= 4 else 1
            long_chain |= vectors > _SUM_CHAIN * unroll
        else:
            unroll = self._lines_at_once(loop)
            long_chain |= hint(loop.size) > _SUM_CHAIN * unroll
        chained = s.kind == "sum" and s.type == "f32" and long_chain
        self.accumulators[s.name] = (s.kind, s.type, unroll, chained)
        a, type_ = self.local(s.name), COMPUTE_TYPE[s.type]
        self.line(f"vec<{type_}, L> {a}[{unroll}] = {{{', '.join([first] * unroll)}}};")
        if chained:
            self.line(f"vec<{type_}, L> {a}_total = {{}};")

    def _lines_at_once(self, loop: ir.Loop) -> int:
        """Of a loop over lines of sums, which wait for each other: so many sums take turns."""
        if any(isinstance(s, ir.Loop) for s in loop.body) or hint(loop.size) < 2 * _UNROLL:
            return 1
        return _UNROLL if sum(isinstance(s, ir.Accumulate) for s in loop.body) <= 2 else 1

    def _loop_of(self, name: str, body: list[Any], depth: int) -> tuple[ir.Loop, int]:
        """The innermost loop that accumulates into `name`, and the loops around it."""
        for s in body:
            if not isinstance(s, ir.Loop):
                continue
            if any(isinstance(x, ir.Accumulate) and x.name == name for x in s.body):
                return s, depth + (0 if s.vector and self.kernel.lanes_over_rows else 1)
            inner = depth + (0 if s.vector else 1)
            try:
                return self._loop_of(name, s.body, inner)
            except LookupError:
                continue
        raise LookupError(name)

    def _emit_accumulate(self, s: ir.Accumulate) -> None:
        kind, type_, _, _ = self.accumulators[s.name]
        value = self.expr(s.expr)
        a = self.local(s.name)
        direct = self.kernel.lanes_over_rows and self.accumulators[s.name][2] == 1
        target = f"{a}[0]" if direct else f"{a}_"
        if not self.kernel.lanes_over_rows:
            value = f"keep_first<K>({value}, {identity(kind, type_)})"
        self.line(f"{target} = {COMBINE[kind].format(target, value)};")

    def _emit_scan(self, s: ir.Scan) -> None:
        a, value = self.local(s.accumulator), self.expr(s.expr)
        if self.kernel.lanes_over_rows:
            self.line(f"{a} = {COMBINE[s.kind].format(a, value)};")
            self.line(f"const auto {self.local(s.name)} = {a};")
            return
        way = "in_order" if s.in_order else "in_steps"
        self.line(f"const auto {self.local(s.name)} = scan_{way}<K, scan_{s.kind}>({value}, {a});")

    def _emit_finish(self, s: ir.Finish) -> None:
        kind, type_, _, chained = self.accumulators[s.accumulator]
        value = self._combined(s.accumulator)
        if chained:
            value = f"({self.local(s.accumulator)}_total + {value})"
        if not self.kernel.lanes_over_rows:
            value = f"splat<{COMPUTE_TYPE[type_]}, U>(across_{kind}({value}))"
        self.line(f"const auto {self.local(s.name)} = {value};")
        self._note_width(s.name)


def _symbols(text: str, position: int) -> list[str]:
    """Definitions of the symbols in a text, from the memory behind parameter `position`."""
    numbers = sorted({int(n) for n in re.findall(r"\bs(\d+)\b", text)})
    return [f"  {SYMBOL.format(n, position)}" for n in numbers]


def reads_symbols(text: str) -> bool:
    """Whether a kernel's last parameter are the values of the graph's symbols."""
    return bool(re.search(r"const i64 s\d+ = ", text))
