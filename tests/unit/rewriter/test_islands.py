"""Resumable code: a fake native side runs stretches in another frame and lands in the middle."""

from __future__ import annotations

import ctypes
import itertools
import sys
import types

import pytest
from plain_trampolines import TRAMPOLINES

from accel.rewriter import flow, islands, prologue, resumable, twin, verify

LOG: list[object] = []


def opaque(value: object) -> object:
    """What the functions below call that has to run as Python, in place."""
    LOG.append((value, sys._getframe(1).f_lineno, sys._getframe(1).f_code.co_name))
    if value == 3:
        raise ValueError(value)
    return value


class Manager:
    def __init__(self, swallows=()):
        self.swallows = swallows

    def __enter__(self):
        LOG.append("enter")
        return 5

    def __exit__(self, kind, *_):
        LOG.append(("exit", kind))
        return kind in self.swallows


def c_straight(a, b):
    c = a + b
    d = opaque(c)
    e = d * 2 + c
    opaque(e)
    return e - a


def c_nested_call(a, b):
    c = max(a * 2, opaque(b), a - 1)
    return [c + 1, opaque(c + 2), a]


def c_for(a, b):
    total = 0
    for i in range(a):
        total = total + i * b
        opaque(total)
        total += 1
    total = -total
    return total


def c_for_nested(a, b):
    out = []
    for i, x in enumerate([a, b, 7]):
        for y in (x, i):
            z = x * 10 + y
            out.append(opaque(z))
            if z > 60:
                break
            z = z + 1
        out.append(i + 1)
    return out


def c_for_and(a, b):
    out = []
    for i in iter([a, b, 9]):
        i and opaque(i + b)
        opaque(i) or out.append(i)
    return out


def c_while(a, b):
    while a < 20:
        a = a + b
        if a % 2:
            opaque(a)
            continue
        a += 1
    return a


def c_with(a, b):
    x = a + 1
    with Manager() as m:
        y = x + m
        opaque(y)
        z = y + b
    return z * 2


def c_with_raises(a, b):
    with Manager((ValueError,)):
        x = a + b
        opaque(3)
        x += 1
    return x + 1


def c_try(a, b):
    try:
        x = a + b
        opaque(x)
        y = x + opaque(3)
    except ValueError as error:
        y = a - 1
        opaque(str(error))
        y = y * 2
    finally:
        b = b + 1
        opaque(b)
    return y + b


def c_finally_raises(a, b):
    try:
        try:
            opaque(a + b)
            opaque(3)
        finally:
            a = a + 1
            opaque(a)
            a = a + 1
    except ValueError:
        a = a * 2
    return a


def c_loop_in_with_in_try(a, b):
    out = []
    try:
        with Manager() as m:
            for i in range(3):
                x = a + i
                out.append(x)
                opaque(x)
                b = b + x + m
            opaque(3)
    except ValueError:
        out.append(b + 1)
    return out, b


def c_unbound(a, b):
    if a > 1:
        c = b + 1
    opaque(a)
    d = a + 1
    if a > 1:
        d = d + c
        del c
    opaque(d)
    return d + 1


def c_keywords(a, b):
    c = a * b
    d = dict(x=a + 1, y=opaque(c), z=b)
    return dict(d, w=opaque(a + b), **d)["y"] + c


def c_comprehensions(a, b):
    """From CPython 3.12 on, these exits lie in the function's own code."""
    c = a + b
    d = [opaque(i) + c for i in range(a) if i != b]
    opaque(c)
    e = {k: [opaque(k - 1) + i for i in range(2)] for k in d}
    return [i * 2 for i in d], e, c


PROGRAMS = [f for name, f in sorted(globals().items()) if name.startswith("c_")]
ARGUMENTS = [(1, 2), (2, 5), (4, 3)]


def exits_of(code):
    """The calls that load `opaque` or a Manager by name just before."""
    seen = flow.Flow(code)
    found = set()
    for i, stack in enumerate(seen.stacks):
        if stack is None or (base := seen.call_base(i, len(stack))) is None:
            continue
        origin = stack[base].origin
        around = range(max(origin - 1, 0), origin + 2)
        if any(
            seen.names[k] == "LOAD_GLOBAL" and code.co_names[seen.args[k] >> 1] == "opaque"
            for k in around
        ):
            found.add(i)
    assert found
    return found


def outcome(f, arguments):
    LOG.clear()
    try:
        return ("result", f(*arguments), list(LOG))
    except Exception as error:
        return ("raised", type(error), str(error), list(LOG))


def install(f, plan, answer):
    code = resumable.resumable(plan, f.__code__, lambda k: 1000 + k)
    verify.check_code(code)
    sentinel = object()
    names = {resumable.NODE_CALLEE: answer, "__accel_run_body__": sentinel}
    new = types.FunctionType(code, {**f.__globals__, **names}, f.__name__, f.__defaults__)
    return new, sentinel


def test_a_comprehension_with_an_exit_is_an_exit():
    plan = islands.plan_islands(c_comprehensions.__code__, exits_of(c_comprehensions.__code__))
    seen = plan.flow
    for place in (*plan.nodes, *plan.landings):
        assert not any(slot.kind == "saved" for slot in seen.stack(place.at))
    assert len(plan.nodes) >= 2


@pytest.mark.parametrize("f", PROGRAMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_unanswered_nodes_change_nothing(f, arguments):
    plan = islands.plan_islands(f.__code__, exits_of(f.__code__))
    asked = []

    def answer(index):
        asked.append(index)
        return new.__globals__["__accel_run_body__"]

    new, _ = install(f, plan, answer)
    assert outcome(new, arguments) == outcome(f, arguments)
    assert 1000 in asked
    assert plan.nodes and plan.landings


@pytest.mark.parametrize("f", PROGRAMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_twin_that_announces_nodes_and_landings(f, arguments):
    plan = islands.plan_islands(f.__code__, exits_of(f.__code__))
    points = {at: [("land", (k, depth))] for k, (at, depth, *_) in enumerate(plan.landings)}
    for k, node in enumerate(plan.nodes):
        points.setdefault(node.at, []).append(("node", (k, node.depth)))
    code = twin.build_twin_with(f.__code__, points)
    verify.check_code(code)
    told = []
    table = {
        **TRAMPOLINES,
        "land": lambda k, depth: told.append(("land", k)),
        "node": lambda k, depth: told.append(("node", k)),
    }
    new = types.FunctionType(twin.bind_twin(code, table), f.__globals__, f.__name__)
    expected = outcome(f, arguments)
    got = outcome(new, arguments)
    assert got[:2] == expected[:2]
    assert {kind for kind, _ in told} == {"land", "node"}


def bind(frame, **values):
    """Writes locals of a running frame, as native code does."""
    frame.f_locals.update(values)
    if sys.version_info < (3, 13):
        ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))


def answered(f, answers):
    """`f` with resumable code; `answers(number of the node, frame, plan)` is a pad's number and
    values, or None."""
    plan = islands.plan_islands(f.__code__, exits_of(f.__code__))

    def answer(index):
        given = answers(index - 1000, sys._getframe(1), plan)
        return sentinel if given is None else given

    new, sentinel = install(f, plan, answer)
    return new


def landing_with(plan, name):
    """The first landing at an instruction of this name."""
    names = plan.flow.names
    return next(k for k, landing in enumerate(plan.landings) if names[landing.at] == name)


def test_landing_before_the_exit():
    def answers(number, frame, plan):
        if number:
            return None
        bind(frame, c=40)
        return (0, None)

    LOG.clear()
    assert answered(c_straight, answers)(1, 2) == 40 * 2 + 40 - 1
    first = c_straight.__code__.co_firstlineno
    assert list(LOG) == [(40, first + 2, "c_straight"), (120, first + 4, "c_straight")]


def test_landing_inside_a_loop_brings_its_iterator():
    asked = []

    def answers(number, frame, plan):
        asked.append(number)
        if len(asked) > 1:
            return None
        bind(frame, total=100, i=0)
        return (landing_with(plan, "FOR_ITER"), iter([2, 3]))

    LOG.clear()
    assert answered(c_for, answers)(9, 10) == -(100 + 20 + 1 + 30 + 1)
    assert [value for value, *_ in LOG] == [120, 151]


def test_landing_with_half_made_calls():
    def answers(number, frame, plan):
        if number:
            return None
        assert plan.landings[0].nulls
        return (0, (77, max))  # the callable below its first argument

    LOG.clear()
    assert answered(c_nested_call, answers)(1, 2) == [78, 79, 1]


def test_errors_are_handled_where_the_landing_is():
    def answers(number, frame, plan):
        if number:
            return None
        bind(frame, x=3)
        return (0, None)  # before opaque(x), inside the try block

    LOG.clear()
    assert answered(c_try, answers)(4, 5) == (4 - 1) * 2 + 6


def test_originals_are_kept():
    plan = islands.plan_islands(c_for.__code__, exits_of(c_for.__code__))
    body = resumable.resumable(plan, c_for.__code__, lambda k: k)
    code = prologue.insert_prologue(c_for.__code__, 7, body=body)
    verify.check_code(code)
    assert prologue.original_code(code) is c_for.__code__
    assert prologue.under_prologue(code) is c_for.__code__


def test_what_python_entered_python_leaves():
    """An exit that enters a with block makes exits of what leaves it, and so for loops."""

    def f(a):
        with Manager() as m:
            a = a + m
            for _ in range(a):
                a = a * 2
            a = a + 1
        return a

    seen = flow.Flow(f.__code__)
    enters = seen.names.index("BEFORE_WITH")
    plan = islands.plan_islands(f.__code__, [enters])
    left = {i for i in plan.exits if seen.names[i] in ("CALL", "WITH_EXCEPT_START")}
    assert {seen.names[i] for i in left} == {"CALL", "WITH_EXCEPT_START"}
    assert seen.names.index("FOR_ITER") not in plan.exits
    plan = islands.plan_islands(f.__code__, [seen.names.index("GET_ITER")])
    assert seen.names.index("FOR_ITER") in plan.exits and enters in plan.exits


def test_iterators_are_known_behind_and_and_or():
    """What `and` leaves on the stack says nothing about the iterator below it."""
    seen = flow.Flow(c_for_and.__code__)
    (advance,) = (i for i, name in enumerate(seen.names) if name == "FOR_ITER")
    assert [slot.kind for slot in seen.stack(advance)] == ["iterator"]
    calls = [i for i, name in enumerate(seen.names) if name == "CALL"]
    for call in calls[1:]:
        assert advance in islands.plan_islands(c_for_and.__code__, [call]).exits


def test_python_defines_functions_with_all_that_the_definition_takes():
    def f(a, b):
        a = a + 1

        def g(v, k=b, *, shift=2):
            return v * k + a + shift

        return g(a) * 2

    seen = flow.Flow(f.__code__)
    plan = islands.plan_islands(f.__code__, [])
    (whole,) = [n for n in plan.nodes if n.at == seen.names.index("RESUME") + 1]
    (made,) = seen.definitions(whole.stretch)
    assert seen.names[made] in ("MAKE_FUNCTION", "SET_FUNCTION_ATTRIBUTE")
    plan = islands.plan_islands(f.__code__, [made])
    (landing,) = [at for at in plan.landings if not at.returns]
    assert landing.depth == 0 and landing.at < made, "before defaults and cells are fetched"
    assert [n.depth for n in plan.nodes] == [0, 0]
    verify.check_code(resumable.resumable(plan, f.__code__, lambda k: k))


def test_refusals():
    def looks(a):
        return locals()

    assert islands.refusal(looks.__code__)
    assert not islands.refusal(c_for.__code__)
    with pytest.raises(islands.RewriteError):
        islands.plan_islands(looks.__code__, [1])


def test_what_a_stretch_reads_and_writes():
    plan = islands.plan_islands(c_for.__code__, exits_of(c_for.__code__))
    names = c_for.__code__.co_varnames
    body = next(n for n in plan.nodes if n.depth == 1)
    assert {names[i] for i in body.reads} == {"b", "i", "total"}
    assert body.stretch.untouched == 1  # the iterator
    assert "total" in {names[i] for i in body.stretch.writes}


def _takers(function: types.FunctionType, local: str) -> set[str]:
    code = function.__code__
    found = flow.Flow(code)
    start = found.names.index("RESUME") + 1
    stretch = found.stretch(start, frozenset())
    index = flow.local_names(code).index(local)
    return {found.names[i] for i in found.users(start, index, stretch)}


def test_who_takes_the_value_of_a_local() -> None:
    def adds(a, b):
        return b + a * 2

    def tests(a, b):
        if a > 1:
            return b
        return [b, -b]

    def overwrites(a, b):
        a = -b
        return a + 1

    assert _takers(adds, "a") == {"BINARY_OP"} == _takers(adds, "b")
    assert _takers(tests, "a") == {"COMPARE_OP"}
    assert _takers(tests, "b") == {"UNARY_NEGATIVE", "BUILD_LIST"}  # a return is no exit
    assert not _takers(overwrites, "a")


def test_who_takes_a_slot_of_the_stack() -> None:
    def f(a, b):
        return max(a, b * 2)

    found = flow.Flow(f.__code__)
    product = found.names.index("BINARY_OP")
    stretch = found.stretch(product, frozenset())
    call = next(i for i, name in enumerate(found.names) if name == "CALL")
    assert found.users(product, -1, stretch) == {product}  # 2
    assert found.users(product, -2, stretch) == {product}  # b
    assert found.users(product, -3, stretch) == {call}  # a


@pytest.mark.parametrize("function", [c_straight, c_nested_call, c_for], ids=lambda f: f.__name__)
def test_metered_code_does_the_same_and_tells_where_it_comes(function: types.FunctionType) -> None:
    code = function.__code__
    calls = [i for i, name in enumerate(flow.Flow(code).names) if name == "CALL"]
    plan = islands.plan_islands(code, calls)
    marks: list[int] = []
    metered = resumable.metered(plan, code, marks.append)
    verify.check_code(metered)
    LOG.clear()
    expected, expected_log = function(2, 5), list(LOG)
    LOG.clear()
    result = types.FunctionType(metered, function.__globals__)(2, 5)
    assert (result, LOG) == (expected, expected_log)
    assert marks[-1] == -1 and set(marks) <= {-1, *range(len(plan.nodes))}
    assert any(k >= 0 for k in marks)
    # Two landings may follow each other; two nodes cannot without an exit between them.
    assert all(a < 0 or b < 0 for a, b in itertools.pairwise(marks))
