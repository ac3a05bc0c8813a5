"""The opcode tables are complete, and the layout helpers are exact."""

from __future__ import annotations

import opcode

import pytest

from accel.rewriter import layout, opcodes


def test_every_opcode_of_this_interpreter_has_a_row():
    names = {
        name
        for name, op in opcode.opmap.items()
        if op < 256 and not name.startswith("INSTRUMENTED_")
    }
    assert set(opcodes.rows_of(layout.VERSION)) == names


@pytest.mark.parametrize("version", layout.SUPPORTED)
def test_no_opcode_has_two_rows(version):
    own, kept = opcodes._BY_VERSION[version]
    names = [*own, *opcodes._EVERYWHERE, *(opcodes._KEPT_EVERYWHERE + kept).split()]
    assert sorted(names) == sorted(set(names))


def test_unknown_version_has_no_rows():
    assert opcodes.rows_of((3, 99)) == {}


@pytest.mark.parametrize(
    "entries",
    [
        [],
        [(0, 1, 2, 3)],
        [(1, 63, 64, 65), (63, 4096, 5000, 2), (4096, 300000, 1 << 20, 131)],
    ],
)
def test_exception_table_round_trip(entries):
    assert layout.read_exceptions(layout.write_exceptions(entries)) == entries


def test_exception_tables_of_the_compiler_are_written_alike():
    code = compile("try:\n  with a: b\nexcept C: d\nfinally: e\n" * 90, "<test>", "exec")
    table = code.co_exceptiontable
    assert table
    assert layout.write_exceptions(layout.read_exceptions(table)) == table


def test_lines_that_do_not_move_stay_as_they_are():
    code = compile("x = [\n  a,\n  b +\n c]\n" + " " * 0 + "y" * 200 + " = f(1)", "<t>", "exec")
    units = len(code.co_code) // 2
    assert layout.move_lines(code.co_linetable, range(units + 1)) == code.co_linetable


def test_malformed_tables_are_refused():
    with pytest.raises(layout.RewriteError):
        layout.read_exceptions(bytes([128, 1, 2]))
    with pytest.raises(layout.RewriteError):
        list(layout.line_entries(b"\x01"))
    with pytest.raises(layout.RewriteError):
        layout.move_lines(bytes([128 | 15 << 3]), [0, 1, 2, 3])


def test_arguments_of_every_size_round_trip():
    ops = [layout.OPMAP["LOAD_CONST"]] * 4
    args = [5, 256, 70000, 1 << 24]
    decoded = layout.decode(layout.encode(ops, args))
    assert (decoded.ops, decoded.args) == (ops, args)
    assert decoded.starts == [0, 1, 3, 6, 10]
