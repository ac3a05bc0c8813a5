"""Twin functions: a user's function with its twin's code, made when it is inlined.

In: a function. Out: a function with the same globals, defaults and closure whose code is the
bound twin; None for code that has no twin (coroutines). Invariant: a twin's code objects
are known to the native shim, and live for good; twin functions do not outlive the recording
(they hold what their functions close over, and so would keep them alive).
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable

from accel import runtime

CodeKey = tuple[types.CodeType, str]


def code_key(code: types.CodeType) -> CodeKey:
    """What tells code objects apart: two files may hold equal code at the same line."""
    return code, code.co_filename


class TwinFactory:
    """Caches twins by code; `build` gives a bound twin of a code object, or None."""

    def __init__(self, build: Callable[[types.CodeType], types.CodeType | None]) -> None:
        self._build = build
        self._codes: dict[CodeKey, types.CodeType | None] = {}
        self._functions: weakref.WeakSet[types.FunctionType] = weakref.WeakSet()

    def code(self, code: types.CodeType) -> types.CodeType | None:
        try:
            return self._codes[code_key(code)]
        except KeyError:
            twin = self._codes[code_key(code)] = self._build(code)
            if twin is not None:
                mark_twin(twin)
            return twin

    def running(self, codes: set[types.CodeType]) -> list[types.FunctionType]:
        """The functions whose twins have one of these codes."""
        keys = {code_key(code) for code in codes}
        twins = [(f, self._codes.get(code_key(f.__code__))) for f in list(self._functions)]
        return [f for f, twin in twins if twin is not None and code_key(twin) in keys]

    def function(self, f: types.FunctionType) -> types.FunctionType | None:
        """A twin of `f`, which has its code and defaults of now."""
        if runtime.native.is_twin(f.__code__):
            return f
        code = self.code(f.__code__)
        if code is None:
            return None
        self._functions.add(f)
        return with_code(f, code)


def with_code(f: types.FunctionType, code: types.CodeType) -> types.FunctionType:
    """A function like `f` that runs `code`."""
    like = types.FunctionType(code, f.__globals__, f.__name__, f.__defaults__, f.__closure__)
    like.__kwdefaults__ = f.__kwdefaults__
    like.__qualname__ = f.__qualname__
    like.__module__ = f.__module__
    return like


def mark_twin(code: types.CodeType) -> None:
    """Tells the shim about a twin and the twins of its comprehensions."""
    runtime.native.mark_twin(code)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType) and constant.co_name in _NESTED_TWINS:
            mark_twin(constant)


_NESTED_TWINS = frozenset({"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"})
