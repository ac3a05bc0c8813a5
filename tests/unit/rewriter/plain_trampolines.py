"""Trampolines that do what their instruction does, in plain Python.

No `annotations` future here: `exec` would inherit it from `call`.
They are the reference for the contract: what each is called with, and what it must give back.
`COUNTS` says how often each was called. Runs on every CPython, without torch.
"""

import builtins
import collections
import operator
import sys

COUNTS: collections.Counter[str] = collections.Counter()
EX, EXKW = object(), object()

BINARY = [
    operator.add, operator.and_, operator.floordiv, operator.lshift, operator.matmul,
    operator.mul, operator.mod, operator.or_, operator.pow, operator.rshift, operator.sub,
    operator.truediv, operator.xor, operator.iadd, operator.iand, operator.ifloordiv,
    operator.ilshift, operator.imatmul, operator.imul, operator.imod, operator.ior,
    operator.ipow, operator.irshift, operator.isub, operator.itruediv, operator.ixor,
]  # fmt: skip
COMPARE = {
    "<": operator.lt, "<=": operator.le, "==": operator.eq,
    "!=": operator.ne, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
UNARY = {"-": operator.neg, "+": operator.pos, "~": operator.invert}


def _frame_call(f, args, kwargs, frame):
    """Calls that look at their caller's frame, which a C trampoline would not hide."""
    if f is builtins.super and not args:
        return super(frame.f_locals["__class__"], next(iter(frame.f_locals.values())))
    if f is builtins.locals:
        return frame.f_locals
    if f is builtins.globals:
        return frame.f_globals
    if f is builtins.vars and not args:
        return frame.f_locals
    if f is builtins.dir and not args:
        return sorted(frame.f_locals)
    if f in (builtins.eval, builtins.exec) and len(args) == 1:
        return f(args[0], frame.f_globals, frame.f_locals)
    if f is sys._getframe:
        return sys._getframe(2 + (args[0] if args else 0))
    if f is builtins.__import__ and len(args) == 1:
        return f(args[0], frame.f_globals)
    return f(*args, **kwargs)


_SENSITIVE = (
    builtins.super, builtins.locals, builtins.globals, builtins.vars, builtins.dir,
    builtins.eval, builtins.exec, sys._getframe, builtins.__import__,
)  # fmt: skip


def call(f, *args, **kwargs):
    COUNTS["call"] += 1
    if args and args[-1] is EX:
        (args,) = args[:-1]
    elif args and args[-1] is EXKW:
        args, kwargs = args[:-1]
    if any(f is s for s in _SENSITIVE):
        return _frame_call(f, args, kwargs, sys._getframe(1))
    return f(*args, **kwargs)


def attr(obj, name):
    COUNTS["attr"] += 1
    return getattr(obj, name)


def binary(a, b, op):
    COUNTS["binary"] += 1
    return BINARY[op](a, b)


def compare(a, b, op):
    COUNTS["compare"] += 1
    return COMPARE[op](a, b)


def contains(item, container):
    COUNTS["contains"] += 1
    return item in container


def is_(a, b):
    COUNTS["is_"] += 1
    return a is b


def subscr(obj, key):
    COUNTS["subscr"] += 1
    return obj[key]


def setitem(obj, key, value):
    COUNTS["setitem"] += 1
    obj[key] = value


def delitem(obj, key):
    COUNTS["delitem"] += 1
    del obj[key]


def setattr_(obj, value, name):
    COUNTS["setattr"] += 1
    setattr(obj, name, value)


def delattr_(obj, name):
    COUNTS["delattr"] += 1
    delattr(obj, name)


def unary(a, op):
    COUNTS["unary"] += 1
    return UNARY[op](a)


def not_(a):
    COUNTS["not_"] += 1
    return not a


def with_(manager):
    COUNTS["with_"] += 1
    cls = type(manager)
    enter, leave = cls.__enter__, cls.__exit__
    return enter(manager), lambda *exc: leave(manager, *exc)


def format_(value, conversion, spec):
    COUNTS["format_"] += 1
    value = (lambda v: v, str, repr, ascii)[conversion](value)
    return format(value, "" if spec is None else spec)


def _checked(name, arity):
    """A note: gives its first argument back."""

    def note(*args):
        COUNTS[name] += 1
        assert len(args) == arity, (name, args)
        return args[0]

    return note


def deref(value, cell):
    COUNTS["deref"] += 1
    assert cell.cell_contents is value
    return value


def delete_global(name):
    COUNTS["delete_global"] += 1
    assert type(name) is str


def delete_deref(cell):
    COUNTS["delete_deref"] += 1
    assert cell.cell_contents is not cell


TRAMPOLINES = {
    "call": call, "attr": attr, "binary": binary, "compare": compare, "contains": contains,
    "is_": is_, "subscr": subscr, "setitem": setitem, "delitem": delitem, "setattr": setattr_,
    "delattr": delattr_, "unary": unary, "not_": not_, "with_": with_, "format_": format_,
    "deref": deref, "delete_global": delete_global, "delete_deref": delete_deref,
    "glob": _checked("glob", 2),
    "store_deref": _checked("store_deref", 2), "store_global": _checked("store_global", 2),
    "test": _checked("test", 1), "get_iter": _checked("get_iter", 1),
    "unpack": _checked("unpack", 2), "consume": _checked("consume", 1),
    "hashed": _checked("hashed", 1),
    "grown": _checked("grown", 3),
    "caught": _checked("caught", 1),
    "imported": _checked("imported", 2), "match": _checked("match", 2),
    "ex": EX, "exkw": EXKW,
}  # fmt: skip
