"""CPython's code layout: the only file that knows how instructions and tables are stored.

In: the bytes of a code object (`co_code`, `co_linetable`, `co_exceptiontable`). Out: decoded
instructions, and the same tables moved to where edited instructions now lie.
Invariant: the order of the original instructions never changes, so positions are moved and
split but never re-encoded: lines and columns stay exactly what the compiler wrote.

Source: Objects/locations.md and Objects/exception_handling_notes.txt, CPython 3.11 to 3.13.
"""

from __future__ import annotations

import itertools
import opcode
import sys
from collections.abc import Iterator, Sequence

VERSION = sys.version_info[:2]
SUPPORTED = ((3, 11), (3, 12), (3, 13))

OPMAP: dict[str, int] = {name: op for name, op in opcode.opmap.items() if op < 256}
EXTENDED_ARG = OPMAP["EXTENDED_ARG"]


class RewriteError(Exception):
    """A code object has a shape this rewriter does not know; it stays as it is."""


def _cache_units() -> tuple[int, ...]:
    """Inline cache units that follow each opcode."""
    entries = opcode._inline_cache_entries  # type: ignore[attr-defined]
    if isinstance(entries, dict):  # 3.13
        by_op = {OPMAP[name]: units for name, units in entries.items() if name in OPMAP}
        return tuple(by_op.get(op, 0) for op in range(256))
    return tuple(entries[:256])


CACHES = _cache_units()
_CACHE_BYTES = tuple(b"\0\0" * units for units in CACHES)
_UNITS = tuple(1 + units for units in CACHES)
JUMPS = frozenset(op for op in opcode.hasjrel if op < 256)
BACKWARD = frozenset(op for op in JUMPS if "BACKWARD" in opcode.opname[op])


class Instructions:
    """Decoded instructions as parallel lists.

    `starts[i]` is the unit where instruction i begins (its EXTENDED_ARG prefix included);
    one more entry tells where the code ends. A jump's argument is still a distance in units.
    """

    __slots__ = ("args", "ops", "starts")

    def __init__(self, ops: list[int], args: list[int], starts: list[int]) -> None:
        self.ops = ops
        self.args = args
        self.starts = starts

    def jump_targets(self) -> dict[int, int]:
        """Index of each jump -> index of the instruction it jumps to."""
        starts, ops, args = self.starts, self.ops, self.args
        jumps = [i for i, op in enumerate(ops) if op in JUMPS]
        if not jumps:
            return {}
        index_of = {unit: i for i, unit in enumerate(starts)}
        targets = {}
        for i in jumps:
            distance = -args[i] if ops[i] in BACKWARD else args[i]
            target = index_of.get(starts[i + 1] + distance)
            if target is None or target == len(ops):
                raise RewriteError(f"jump at unit {starts[i]} into the middle of an instruction")
            targets[i] = target
        return targets


def decode(code: bytes) -> Instructions:
    """Splits `co_code` into instructions."""
    ops: list[int] = []
    args: list[int] = []
    starts: list[int] = []
    units = _UNITS
    at, end = 0, len(code)
    while at < end:
        starts.append(at >> 1)
        op, arg = code[at], code[at + 1]
        while op == EXTENDED_ARG:
            at += 2
            op, arg = code[at], arg << 8 | code[at + 1]
        ops.append(op)
        args.append(arg)
        at += 2 * units[op]
    if at != end:
        raise RewriteError("code ends in the middle of an instruction")
    starts.append(at >> 1)
    return Instructions(ops, args, starts)


def prefixes(arg: int) -> int:
    """How many EXTENDED_ARG an argument needs."""
    return 0 if arg < 256 else 1 if arg < 65536 else 2 if arg < 1 << 24 else 3


def assemble(
    ops: Sequence[int], args: list[int], jumps: dict[int, int], groups: Sequence[int]
) -> tuple[bytes, list[int]]:
    """Encodes instructions; returns the code and the unit at which each group starts.

    `jumps` maps the index of a jump to the *group* it goes to; `groups[g]` is the index of
    the first instruction of group g, with one more entry for the end. Arguments of jumps in
    `args` are written by this function.
    """
    units = _UNITS
    sizes = [
        units[op] if arg < 256 else units[op] + prefixes(arg)
        for op, arg in zip(ops, args, strict=True)
    ]
    for i in jumps:
        sizes[i] = units[ops[i]]
    while True:  # a jump that grows moves others: sizes only grow, so this ends
        starts = [0, *itertools.accumulate(sizes)]
        grown = False
        for i, group in jumps.items():
            distance = starts[groups[group]] - starts[i + 1]
            if ops[i] in BACKWARD:
                distance = -distance
            if distance < 0:
                raise RewriteError("a jump changed its direction")
            args[i] = distance
            size = units[ops[i]] + prefixes(distance)
            if size > sizes[i]:
                sizes[i] = size
                grown = True
        if not grown:
            break
    return encode(ops, args, sizes), [starts[g] for g in groups]


def encode(ops: Sequence[int], args: Sequence[int], sizes: Sequence[int] | None = None) -> bytes:
    """The bytes of instructions whose arguments are final.

    `sizes` may give an instruction more EXTENDED_ARG than its argument needs.
    """
    out = bytearray()
    append = out.append
    for i, op in enumerate(ops):
        arg = args[i]
        extra = prefixes(arg) if sizes is None else sizes[i] - _UNITS[op]
        for shift in range(8 * extra, 0, -8):
            append(EXTENDED_ARG)
            append(arg >> shift & 255)
        append(op)
        append(arg & 255)
        if CACHES[op]:
            out += _CACHE_BYTES[op]
    return bytes(out)


# ------------------------------------------------------------- exception table


def _varints(table: bytes) -> Iterator[int]:
    """The big-endian base-64 numbers of an exception table."""
    number = 0
    for byte in table:
        number = number << 6 | byte & 63
        if not byte & 64:
            yield number
            number = 0


def read_exceptions(table: bytes) -> list[tuple[int, int, int, int]]:
    """Entries (start, end, handler, depth << 1 | lasti), in units."""
    numbers = list(_varints(table))
    if len(numbers) % 4:
        raise RewriteError("truncated exception table")
    fields = iter(numbers)
    return [
        (start, start + length, target, depth)
        for start, length, target, depth in zip(fields, fields, fields, fields, strict=True)
    ]


def write_exceptions(entries: Sequence[tuple[int, int, int, int]]) -> bytes:
    """The table of these entries."""
    out = bytearray()
    for start, end, target, depth in entries:
        first = len(out)
        for number in (start, end - start, target, depth):
            shift = 6 * max((number.bit_length() - 1) // 6, 0)
            while shift:
                out.append(64 | number >> shift & 63)
                shift -= 6
            out.append(number & 63)
        out[first] |= 128  # marks where an entry starts
    return bytes(out)


def move_exceptions(table: bytes, unit_of: Sequence[int]) -> bytes:
    """The table with each old unit u at unit `unit_of[u]`."""
    if not table:
        return table
    return write_exceptions(
        [
            (unit_of[start], unit_of[end], unit_of[target], depth)
            for start, end, target, depth in read_exceptions(table)
            if unit_of[start] != unit_of[end]
        ]
    )


# ------------------------------------------------------------------ line table

_NO_COLUMNS, _LONG, _NO_LOCATION = 13, 14, 15
_ONE_LINE = 10


def line_entries(table: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Entries (kind, payload, units covered)."""
    at, end = 0, len(table)
    while at < end:
        head = table[at]
        if head < 128:
            raise RewriteError("malformed line table")
        after = at + 1
        while after < end and table[after] < 128:
            after += 1
        yield head >> 3 & 15, table[at + 1 : after], (head & 7) + 1
        at = after


def _repeated(kind: int, payload: bytes) -> tuple[int, bytes]:
    """The entry that says: the same location as the entry just written."""
    if kind < _ONE_LINE or kind == _NO_LOCATION:
        return kind, payload
    if kind < _NO_COLUMNS:
        return _ONE_LINE, payload
    if kind == _NO_COLUMNS:
        return kind, b"\0"
    rest = 0
    while payload[rest] & 64:
        rest += 1
    return kind, b"\0" + payload[rest + 1 :]


def _write_location(out: bytearray, kind: int, payload: bytes, units: int) -> None:
    """Writes a location for any number of units."""
    while units > 0:
        out.append(128 | kind << 3 | min(units, 8) - 1)
        out += payload
        units -= 8
        if units > 0:
            kind, payload = _repeated(kind, payload)


def _moves_line(kind: int, payload: bytes) -> bool:
    return kind in (11, 12) or (kind in (_NO_COLUMNS, _LONG) and payload[0] != 0)


def move_lines(table: bytes, unit_of: Sequence[int]) -> bytes:
    """The table with each old unit u at unit `unit_of[u]`; what is inserted between two old
    instructions belongs to the first of them."""
    out = bytearray()
    old = 0
    for kind, payload, units in line_entries(table):
        moved = unit_of[old + units] - unit_of[old]
        old += units
        if moved:
            _write_location(out, kind, payload, moved)
        elif _moves_line(kind, payload):
            raise RewriteError("a location begins in the middle of an instruction")
    if old != len(unit_of) - 1:
        raise RewriteError("the line table does not cover the code")
    return bytes(out)


def insert_lines(table: bytes, at: int, units: int, at_first_line: int = 0) -> bytes:
    """The table with `units` more at unit `at`, before the first that has a location: without
    one, but for `at_first_line` of them, which come last but one."""
    out = bytearray()
    covered = done = 0
    for kind, payload, length in line_entries(table):
        if covered == at:
            break
        done += 1 + len(payload)
        covered += length
        if covered > at:
            raise RewriteError("a location goes across the start of the body")
        _write_location(out, kind, payload, length)
    if not at_first_line:
        _write_location(out, _NO_LOCATION, b"", units)
        return bytes(out) + table[done:]
    _write_location(out, _NO_LOCATION, b"", units - at_first_line - 1)
    _write_location(out, _NO_COLUMNS, b"\0", at_first_line)  # no lines on from there
    _write_location(out, _NO_LOCATION, b"", 1)
    return bytes(out) + table[done:]


def append_lines(table: bytes, units: int) -> bytes:
    """The table with `units` more at its end, without a location."""
    out = bytearray(table)
    _write_location(out, _NO_LOCATION, b"", units)
    return bytes(out)
