"""Resumable code: a fake native side runs stretches in another frame and lands in the middle."""

from __future__ import annotations

import builtins
import contextlib
import glob
import os
import sys
import types

import pytest
import snippets
from plain_trampolines import TRAMPOLINES

from accel.rewriter import flow, islands, prologue, twin, verify

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
    else:
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


PROGRAMS = [f for name, f in sorted(globals().items()) if name.startswith("c_")]
ARGUMENTS = [(1, 2), (2, 5), (4, 3)]


def exits_of(code):
    """The calls that load `opaque` or a Manager by name just before."""
    seen = flow.Flow(code)
    found = set()
    for i, name in enumerate(seen.names):
        stack = seen.stacks[i]
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


class FakeNative:
    """Answers at nodes by running the stretch in another frame: a twin that starts at the node
    and stops at the next landing. It is the model of what native code does."""

    def __init__(self, f, plan):
        self.plan = plan
        self.landed = 0
        self.returned = 0
        self.f = f


def outcome(f, arguments):
    LOG.clear()
    try:
        return ("result", f(*arguments), list(LOG))
    except Exception as error:
        return ("raised", type(error), str(error), list(LOG))


def install(f, plan, answer):
    code = islands.resumable(plan, f.__code__, lambda k: 1000 + k)
    verify.check_code(code)
    sentinel = object()
    names = {islands.NODE_CALLEE: answer, "__accel_run_body__": sentinel}
    new = types.FunctionType(code, {**f.__globals__, **names}, f.__name__, f.__defaults__)
    return new, sentinel


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
