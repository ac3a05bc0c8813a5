"""Prologues: the instructions in front of a function's body that ask native dispatch.

Interim form on the `bytecode` library."""
from __future__ import annotations

import inspect
import types
import weakref

from bytecode import Bytecode, CellVar, Instr, Label
from bytecode.instr import InstrLocation

_ORIGINAL: dict[types.CodeType, types.CodeType] = {}
_REFUSED = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


def is_eligible(code):
    return bool(code.co_flags & inspect.CO_OPTIMIZED) and not code.co_flags & _REFUSED and not code.co_name.startswith("<")


def original_code(code):
    return _ORIGINAL.get(code, code)


def insert_prologue(code, index, kind="function"):
    bc = Bytecode.from_code(code, conserve_exception_block_stackdepth=True)
    body = list(bc)
    at = next(i for i, x in enumerate(body) if isinstance(x, Instr) and x.name == "RESUME") + 1
    count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4) + bool(code.co_flags & 8)
    names = code.co_varnames[:count]
    loc = InstrLocation(code.co_firstlineno, None, None, None)
    label = Label()
    def I(n, *a): return Instr(n, *a, location=loc)
    pro = [I("LOAD_GLOBAL", (True, "__accel_module_prologue__" if kind == "module" else "__accel_prologue__"))]
    n = 0
    if kind != "module":
        pro.append(I("LOAD_CONST", index)); n = 1
    for name in names:
        pro.append(I("LOAD_DEREF", CellVar(name)) if name in code.co_cellvars else I("LOAD_FAST", name))
    n += count
    pro += [I("PRECALL", n), I("CALL", n), I("COPY", 1), I("LOAD_GLOBAL", (False, "__accel_run_body__")), I("IS_OP", 0), I("POP_JUMP_FORWARD_IF_TRUE", label), I("RETURN_VALUE"), label, I("POP_TOP")]
    for x in body:
        if isinstance(x, Instr):
            l = x.location
            if l is not None and ((l.end_col_offset or 0) > 127 or (l.col_offset or 0) > 127):
                x.location = InstrLocation(l.lineno, None, None, None)
    nb = Bytecode(); nb._copy_attr_from(bc); nb.extend(body[:at] + pro + body[at:])
    new = nb.to_code(stacksize=code.co_stacksize + n + 4, compute_exception_stack_depths=False)
    _ORIGINAL[new] = code
    return new


def remove_prologue(f):
    f.__code__ = original_code(f.__code__)
