"""The table of roots: one per function code, or per module that was called.

In: code objects, functions and modules. Out: their roots, made when they are first asked for, by
dispatch index. Invariant: equal codes share a root, but for those that a function was given of
its own.
"""

from __future__ import annotations

import sys
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from accel import arming, other_tracers, runtime
from accel.capture.twins import CodeKey, code_key
from accel.capture.values import class_lookup
from accel.rewriter import prologue
from accel.roots import Owners, Root
from accel.selection import Selection

MANY_ROOTS = 128  # made since the last time, they are looked through for dead ones


class RootTable:
    """Roots by dispatch index; `on_call` is asked about calls that no variant of one served."""

    def __init__(
        self,
        selection: Selection,
        on_call: Callable[..., Any],
        threshold: int,
        bury: Callable[[Root], None],
    ) -> None:
        """`bury(root)` is told of roots that are about to be forgotten."""
        self.by_index: dict[int, Root] = {}
        self._selection = selection
        self._on_call = on_call
        self._threshold = threshold
        self._bury = bury
        self._next_burial = MANY_ROOTS
        self._code_index: dict[CodeKey, int] = {}
        self._owners = Owners(self._make)

    def __iter__(self) -> Iterator[Root]:
        return iter(list(self.by_index.values()))  # another thread may make one

    def __len__(self) -> int:
        return len(self.by_index)

    def index_of(self, code: types.CodeType) -> int:
        """The dispatch index of a function's code; makes its entry."""
        index = self._code_index.get(code_key(code))
        if index is None:
            index = self._code_index[code_key(code)] = self._make(code).entry.index
        return index

    def _make(self, code: types.CodeType) -> Root:
        entry = runtime.native.Entry(code.co_qualname, self._on_call)
        entry.threshold = self._threshold
        entry.state = "count"
        location = f"{code.co_filename}:{code.co_firstlineno}"
        root = self.by_index[entry.index] = Root(
            code.co_qualname, "function", location, entry, code=code
        )
        if self._selection.names(code):
            root.forced = True
            entry.threshold = 1
        return root

    def of_function(self, f: types.FunctionType) -> Root:
        """Arms a function: its code gets a prologue if it has none."""
        original = prologue.original_code(f.__code__)
        if not arming.may_be_root(original):
            raise TypeError(
                f"{f.__qualname__} cannot be a root: generators, coroutines and class bodies "
                "run as Python; optimize the function that calls it"
            )
        if (index := prologue.entry_index(f.__code__)) is None:
            index = self.index_of(original)
            f.__code__ = prologue.insert_prologue(original, index)
        return self.by_index[index]

    def own_of_function(self, f: types.FunctionType) -> Root:
        """The same, but not shared with functions of equal code."""
        return self._owners.claim(f, self.of_function(f))

    def of_module(self, module: torch.nn.Module) -> Root:
        entry = runtime.native.module_entry(module)
        return self.of_entry(entry, module)

    def of_entry(self, entry: Any, module: torch.nn.Module) -> Root:
        root = self.by_index.get(entry.index)
        if root is None or root.module is None or root.module() is not module:
            cls = type(module)
            forward = class_lookup(cls, "forward")
            location = "?"
            if isinstance(forward, types.FunctionType):
                location = f"{forward.__code__.co_filename}:{forward.__code__.co_firstlineno}"
            root = Root(cls.__qualname__, "module", location, entry, module=weakref.ref(module))
            entry.threshold = self._threshold
            if self._selection.denies(cls.__module__) or other_tracers.is_wrapper(cls):
                root.turn_off()
            if len(self) >= self._next_burial:
                self._forget_the_dead()
            self.by_index[entry.index] = root
        return root

    def _forget_the_dead(self) -> None:
        """Forgets roots whose modules are gone, but for the last of them: for the summary."""
        dead = [r for r in self if r.is_dead and not r.pending and not r.is_recording]
        for root in dead[: -MANY_ROOTS // 2]:
            self._bury(root)
            del self.by_index[root.entry.index]
        self._next_burial = len(self) + MANY_ROOTS

    def enclosing(self, root: Root) -> Iterator[Root]:
        """The roots whose bodies are running in this thread, innermost first, besides `root`."""
        frame: types.FrameType | None = sys._getframe(1)
        call = torch.nn.Module._wrapped_call_impl.__code__
        while frame is not None:
            code = frame.f_code
            if code is call:
                module = frame.f_locals["self"]
                entry = runtime.native.module_entry(module)
                if entry is not None and root is not (found := self.of_entry(entry, module)):
                    yield found
            else:
                index = prologue.entry_index(code)
                if index is None:
                    index = self._code_index.get(code_key(prologue.original_code(code)))
                if index is not None and self.by_index[index] is not root:
                    yield self.by_index[index]
            frame = frame.f_back


__all__ = ["RootTable"]
