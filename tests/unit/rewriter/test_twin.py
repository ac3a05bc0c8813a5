"""Twins do what their originals do: results, exceptions, positions, and what they announce."""

from __future__ import annotations

import glob
import os
import sys
import traceback
import types

import pytest
import snippets
from plain_trampolines import COUNTS, TRAMPOLINES

from accel.rewriter import layout, twin, verify

SNIPPETS = [f for name, f in sorted(vars(snippets).items()) if name.startswith("s_")]


def twin_function(f):
    code = twin.bind_twin(twin.build_twin(f.__code__), TRAMPOLINES)
    new = types.FunctionType(code, f.__globals__, f.__name__, f.__defaults__, f.__closure__)
    new.__kwdefaults__ = f.__kwdefaults__
    return new


def outcome(f):
    """Result, or exception with its text."""
    snippets.reset()
    try:
        return ("result", f(), list(snippets.LOG))
    except Exception as error:
        return ("raised", type(error), str(error), list(snippets.LOG))


@pytest.mark.parametrize("f", SNIPPETS, ids=lambda f: f.__name__)
def test_snippet(f):
    expected = outcome(f)
    COUNTS.clear()
    assert outcome(twin_function(f)) == expected
    for name in f.__defaults__ or ():
        assert COUNTS[name], f"trampoline {name} was not called"


@pytest.mark.parametrize("f", SNIPPETS, ids=lambda f: f.__name__)
def test_snippet_is_sound(f):
    verify.check_code(twin.build_twin(f.__code__))


def test_snippets_reach_every_trampoline():
    tested = {name for f in SNIPPETS for name in f.__defaults__ or ()}
    tested |= {"ex", "exkw"}
    if sys.version_info >= (3, 13):
        tested.add("not_")  # UNARY_NOT follows TO_BOOL there
    assert tested >= set(TRAMPOLINES)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="LOAD_SUPER_ATTR is new in 3.12")
def test_super_attributes_are_announced():
    COUNTS.clear()
    derived = snippets.Derived()
    assert twin_function(snippets.Derived.method)(derived, 1, k=2) == derived.method(1, k=2)
    assert COUNTS["attr"] >= 2 and COUNTS["call"] >= 2


def _all_code(code):
    yield code
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _all_code(inner)


def _stdlib():
    library = os.path.dirname(os.__file__)
    for path in sorted(glob.glob(f"{library}/[a-z]*.py") + glob.glob(f"{library}/asyncio/*.py")):
        with open(path, encoding="utf-8") as file:
            yield compile(file.read(), path, "exec", dont_inherit=True)


def _kept_positions(original, new):
    """(positions of the original's instructions, positions where they now begin)."""
    a, b = layout.decode(original.co_code), layout.decode(new.co_code)
    return (
        [list(original.co_positions())[unit] for unit in a.starts[:-1]],
        [list(new.co_positions())[unit] for unit in b.starts[:-1]],
    )


@pytest.mark.filterwarnings("ignore")
def test_twins_of_the_stdlib_keep_positions_and_verify():
    count = 0
    for number, module in enumerate(_stdlib()):
        for code in _all_code(module):
            if not twin.is_twinnable(code):
                continue
            count += 1
            built = twin.build_twin(code)
            before, after = _kept_positions(code, built)
            # Inserted instructions repeat their instruction's position.
            shortened = [p for i, p in enumerate(after) if not i or p != after[i - 1]]
            expected = [p for i, p in enumerate(before) if not i or p != before[i - 1]]
            assert shortened == expected, code
            assert list(built.co_lines())[-1][1] == len(built.co_code)
            if number % 8 == 0:  # the verifier is slow
                verify.check_code(built)
    assert count > 4000


def test_wide_lines_keep_their_columns():
    source = "def f(a):\n    return " + "(" * 0 + " + ".join(["a.real"] * 60) + "\n"
    space: dict = {}
    exec(compile(source, "<wide>", "exec"), space)
    code = space["f"].__code__
    assert max(p[3] or 0 for p in code.co_positions()) > 300
    before, after = _kept_positions(code, twin.build_twin(code))
    assert set(before) == set(after)
    assert twin_function(space["f"])(2) == 120


def test_long_jumps_are_widened():
    source = "def f(n):\n  for i in range(n):\n    if i:\n" + "      n = n + 1\n" * 900
    space: dict = {}
    exec(source + "  return n\n", space)
    assert twin_function(space["f"])(3) == space["f"](3) == 1803


def test_thousands_of_constants():
    source = "def f():\n  x = 0\n" + "".join(f"  x = x + {i}.5\n" for i in range(300))
    space: dict = {}
    exec(source + "  return x\n", space)
    assert twin_function(space["f"])() == space["f"]()


def _trace_of(f):
    try:
        f()
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        return [
            (x.name, x.lineno, x.colno, x.end_lineno, x.end_colno)
            for x in frames
            if x.filename == snippets.__file__
        ]
    raise AssertionError("nothing raised")


@pytest.mark.parametrize("f", snippets.RAISERS, ids=lambda f: f.__name__)
def test_tracebacks_are_the_originals(f):
    assert _trace_of(twin_function(f)) == _trace_of(f)


def test_generators_keep_their_protocol():
    def run(make):
        log = []
        g = make()
        log += [next(g), g.send("sent"), g.throw(ValueError("thrown"))]
        try:
            g.send("last")
        except StopIteration as stop:
            log.append(stop.value)
        closing = make()
        next(closing)
        closing.close()
        return log, snippets.LOG

    snippets.reset()
    expected = run(snippets.generator)
    snippets.reset()
    assert run(twin_function(snippets.generator)) == expected


def test_nested_functions_stay_ordinary_but_comprehensions_do_not():
    built = twin.build_twin(snippets.makes_functions.__code__)
    original = [
        c for c in snippets.makes_functions.__code__.co_consts if isinstance(c, types.CodeType)
    ]
    new = [c for c in built.co_consts if isinstance(c, types.CodeType)]
    assert [c.co_name for c in new] == [c.co_name for c in original]
    for before, after in zip(original, new, strict=True):
        assert (after is before) == (before.co_name not in twin.CALLED_AT_ONCE)


async def _coroutine():
    return 1


async def _async_generator():
    yield 1


def test_what_has_no_twin_is_refused():
    class_body = next(
        c
        for c in compile("class A: x = 1", "<t>", "exec").co_consts
        if isinstance(c, types.CodeType)
    )
    module = compile("x = 1", "<t>", "exec")
    for code in (_coroutine.__code__, _async_generator.__code__, class_body, module):
        assert not twin.is_twinnable(code)
        with pytest.raises(layout.RewriteError):
            twin.build_twin(code)


def test_missing_trampoline_and_marker_like_constants_are_errors():
    with pytest.raises(layout.RewriteError, match="no trampoline"):
        twin.bind_twin(twin.build_twin(SNIPPETS[0].__code__), {})
    space: dict = {}
    exec("def f(): return '\\0accel:call'", space)
    with pytest.raises(layout.RewriteError, match="marker"):
        twin.build_twin(space["f"].__code__)


def test_twins_share_the_originals_constants():
    f = snippets.makes_functions.__code__
    built = twin.build_twin(f)
    for a, b in zip(f.co_consts, built.co_consts, strict=False):
        if not isinstance(a, types.CodeType):
            assert a is b


def test_the_verifier_finds_damage():
    code = twin.build_twin(SNIPPETS[0].__code__)
    with pytest.raises(layout.RewriteError, match="needs"):
        verify.check_code(code.replace(co_stacksize=1))
    with pytest.raises(layout.RewriteError, match="line table"):
        verify.check_code(code.replace(co_linetable=code.co_linetable + bytes([128 | 15 << 3])))
    nop = bytes([layout.OPMAP["POP_TOP"], 0])
    with pytest.raises(layout.RewriteError):
        verify.check_code(
            code.replace(
                co_code=code.co_code + nop, co_linetable=code.co_linetable + bytes([128 | 15 << 3])
            ).replace(
                co_code=nop + code.co_code, co_linetable=bytes([128 | 15 << 3]) + code.co_linetable
            )
        )
