"""The import hook: modules that the caller selects get prologues as they are imported.

In: which modules (`select(name, path)`) and a number for each function (`assign_index(code)`).
Out: modules whose functions, at any nesting, ask native dispatch before they run.
Invariant: a module's loader, spec, source, .pyc file and tracebacks are those of an ordinary
import: the real loader finds and compiles, our part is to change the code object on its way to
`exec`, while no frame of ours is on the stack. What cannot be rewritten stays as it is.
"""

from __future__ import annotations

import gc
import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from importlib.machinery import ModuleSpec
from typing import Any

from accel.rewriter import prologue
from accel.rewriter.layout import RewriteError

Select = Callable[[str, "str | None"], bool]
AssignIndex = Callable[[types.CodeType], int]

# Qualified name of a function that was left as it is -> why.
refused: dict[str, str] = {}

# importlib's own exec_module: get_code, then exec with its frames taken out of tracebacks.
_EXEC_BY_CODE = importlib.machinery.SourceFileLoader.exec_module
_WITHOUT_CODE = (
    importlib.machinery.BuiltinImporter,
    importlib.machinery.FrozenImporter,
    importlib.machinery.ExtensionFileLoader,
)


# ------------------------------------------------------------------ code objects


def _is_candidate(code: types.CodeType) -> bool:
    """Special methods are parts of what their callers do: constructors, comparisons, text."""
    name = code.co_name
    special = name.startswith("__") and name.endswith("__") and name != "__call__"
    return prologue.is_eligible(code) and not special


def rewrite_module_code(code: types.CodeType, assign_index: AssignIndex) -> types.CodeType:
    """A module's code (or any other) whose functions have prologues, at any nesting."""
    nested: dict[int, types.CodeType] = {}
    for i, inner in enumerate(code.co_consts):
        if isinstance(inner, types.CodeType):
            changed = rewrite_module_code(inner, assign_index)
            if changed is not inner:
                nested[i] = changed
    if nested:
        code = prologue.with_nested(code, nested)
    if _is_candidate(code) and not prologue.has_prologue(code):
        try:
            return prologue.insert_prologue(code, assign_index(prologue.original_code(code)))
        except RewriteError as error:
            refused[code.co_qualname] = str(error)
    return code


# --------------------------------------------------------------- modules imported


def _functions_of(modules: Iterable[types.ModuleType]) -> list[types.FunctionType]:
    """Every function alive whose globals are those of one of these modules."""
    tables = [vars(module) for module in modules]
    known = {id(table) for table in tables}
    return [
        f
        for f in gc.get_referrers(*tables)
        if type(f) is types.FunctionType and id(f.__globals__) in known
    ]


def rewrite_loaded_modules(modules: Iterable[types.ModuleType], assign_index: AssignIndex) -> int:
    """Gives the functions of imported modules their prologues; returns how many changed."""
    count = 0
    for f in _functions_of(modules):
        code = rewrite_module_code(f.__code__, assign_index)
        if code is not f.__code__:
            f.__code__ = code
            count += 1
    return count


def rewrite_loaded_module(module: types.ModuleType, assign_index: AssignIndex) -> int:
    """As `rewrite_loaded_modules`, for one."""
    return rewrite_loaded_modules([module], assign_index)


def restore_modules(modules: Iterable[types.ModuleType]) -> int:
    """Gives every function of these modules its original `__code__` back."""
    count = 0
    for f in _functions_of(modules):
        code = prologue.original_code(f.__code__)
        if code is not f.__code__:
            f.__code__ = code
            count += 1
    return count


def restore_module(module: types.ModuleType) -> int:
    """As `restore_modules`, for one."""
    return restore_modules([module])


# ----------------------------------------------------------------- import machinery


class _Loader(importlib.abc.Loader):
    """Stands in for a module's loader until its code is asked for."""

    def __init__(self, spec: ModuleSpec, loader: Any, assign_index: AssignIndex) -> None:
        self._spec = spec
        self._loader = loader
        self._assign_index = assign_index

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> types.ModuleType | None:
        module: types.ModuleType | None = self._loader.create_module(spec)
        return module

    def _step_aside(self) -> None:
        """From here on everyone sees the module's own loader."""
        self._spec.loader = self._loader
        module = sys.modules.get(self._spec.name)
        if module is not None and getattr(module, "__loader__", None) is self:
            module.__loader__ = self._loader


class _CodeLoader(_Loader):
    """For loaders that execute what their `get_code` gives."""

    exec_module = _EXEC_BY_CODE

    def get_code(self, fullname: str) -> types.CodeType | None:
        self._step_aside()
        code: types.CodeType | None = self._loader.get_code(fullname)
        return None if code is None else rewrite_module_code(code, self._assign_index)


class _ExecLoader(_Loader):
    """For loaders that execute a module in their own way, as pytest's does."""

    def exec_module(self, module: types.ModuleType) -> None:
        self._step_aside()
        self._loader.exec_module(module)
        rewrite_loaded_module(module, self._assign_index)


class _Finder(importlib.abc.MetaPathFinder):
    """Asks the finders behind it, and wraps the loader of a selected module."""

    def __init__(self, select: Select, assign_index: AssignIndex) -> None:
        self.select = select
        self.assign_index = assign_index

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: types.ModuleType | None = None,
    ) -> ModuleSpec | None:
        # A module of a package lies in the package's folders: most need not be looked for.
        if path is not None and not any(
            self.select(fullname, f"{folder}{os.sep}{fullname}") for folder in path
        ):
            return None
        spec = self._spec_of_others(fullname, path, target)
        loader: Any = spec.loader if spec is not None else None
        if spec is None or loader is None or isinstance(loader, (_Loader, type)):
            return spec
        if isinstance(loader, _WITHOUT_CODE) or not hasattr(loader, "exec_module"):
            return spec
        if self.select(fullname, spec.origin):
            by_code = getattr(type(loader), "exec_module", None) is _EXEC_BY_CODE
            wrapper = _CodeLoader if by_code else _ExecLoader
            spec.loader = wrapper(spec, loader, self.assign_index)
        return spec

    def _spec_of_others(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None
    ) -> ModuleSpec | None:
        finders = list(sys.meta_path)
        # Those before us have been asked; unless someone calls us directly, we are among them.
        start = finders.index(self) + 1 if self in finders else 0
        for finder in finders[start:]:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(fullname, path, target) if find else None
            if spec is not None:
                return spec
        return None


_installed: _Finder | None = None


def install(select: Select, assign_index: AssignIndex, cache: object = None) -> None:
    """Puts the hook in front of `sys.meta_path`, in place of the one installed before.

    `cache` is not used: rewriting a function costs about as much as loading it from disk.
    """
    global _installed
    uninstall()
    _installed = _Finder(select, assign_index)
    sys.meta_path.insert(0, _installed)


def uninstall() -> None:
    """Takes the hook away; modules already rewritten stay so."""
    global _installed
    if _installed is not None and _installed in sys.meta_path:
        sys.meta_path.remove(_installed)
    _installed = None


__all__ = [
    "install",
    "refused",
    "restore_module",
    "restore_modules",
    "rewrite_loaded_module",
    "rewrite_loaded_modules",
    "rewrite_module_code",
    "uninstall",
]
