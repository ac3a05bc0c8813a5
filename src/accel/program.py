"""Runs a program as `python` would run it.

In: what to run (a script, a folder or zip file, a module, a text, standard input), its arguments,
and a `Rewriter` that may change its code. Out: an exit code. Invariant: the program sees what
plain Python shows it: sys.argv, sys.path, the module `__main__` and its attributes, the modules
beside it, tracebacks without frames of ours, exit codes, death by SIGINT.
"""

from __future__ import annotations

import atexit
import builtins
import importlib.machinery
import os
import pkgutil
import runpy
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol


class Rewriter(Protocol):
    """What accel does to a program's code before it runs."""

    def code(self, code: types.CodeType, path: str) -> types.CodeType:
        """The module code of `__main__`, rewritten; modules beside `path` follow."""

    def folder(self, directory: str) -> None:
        """Modules in `directory` are rewritten as they are imported."""


class Untouched:
    """Changes nothing."""

    def code(self, code: types.CodeType, path: str) -> types.CodeType:
        return code

    def folder(self, directory: str) -> None:
        pass


@dataclass(frozen=True)
class Target:
    """What to run: `kind` is a row of KINDS, `name` a path, a module's name or a text."""

    kind: str
    name: str
    arguments: list[str] = field(default_factory=list)

    @property
    def directory(self) -> str:
        """The folder whose modules belong to the program."""
        if self.kind != "script":
            return os.getcwd()
        path = os.path.realpath(self.name)
        return path if os.path.isdir(path) else os.path.dirname(path)


class _NotFound(Exception):
    """There is no such program; the text is Python's."""


def run(target: Target, rewriter: Rewriter) -> int:
    """Runs the program in this process and gives its exit code. Errors: SystemExit, its own."""
    body = KINDS[target.kind]
    first = {"script": target.name, "module": "-m", "text": "-c", "stdin": "-"}[target.kind]
    sys.argv[:] = [first, *target.arguments]
    return _guarded(lambda: body(target, rewriter))


# ------------------------------------------------------------------- kinds of programs


def _script(target: Target, rewriter: Rewriter) -> None:
    path = target.name
    whole = os.path.join(os.getcwd(), path)
    if pkgutil.get_importer(whole) is not None:  # a folder or a zip file with a __main__.py
        _enter(whole, target.directory, always=True)
        rewriter.folder(whole)
        _new_main()
        _run_as_main("__main__", False)
        return
    try:
        with open(whole, "rb") as file:
            data = file.read()
    except OSError as error:
        raise _NotFound(f"can't open file {whole!r}: {error}".rpartition(": ")[0]) from None
    _enter(target.directory, target.directory)
    main = _new_main()
    loader: Any = importlib.machinery.SourceFileLoader
    if path.endswith(".pyc"):
        loader = importlib.machinery.SourcelessFileLoader
        code = loader("__main__", whole).get_code("__main__")
    else:
        code = compile(data, whole, "exec", dont_inherit=True)
    vars(main).update(__file__=whole, __cached__=None, __loader__=loader("__main__", whole))
    _execute(rewriter.code(code, whole), main)


def _module(target: Target, rewriter: Rewriter) -> None:
    directory = os.getcwd()
    _enter(directory, directory)
    rewriter.folder(directory)
    _new_main()
    _run_as_main(target.name, True)


def _run_as_main(name: str, alter_argv: bool) -> None:
    run_as_main: Any = vars(runpy)["_run_module_as_main"]  # what the interpreter itself calls
    run_as_main(name, alter_argv)


def _text(target: Target, rewriter: Rewriter) -> None:
    _enter("", os.getcwd())
    main = _new_main()
    code = compile(target.name, "<string>", "exec", dont_inherit=True)
    _execute(rewriter.code(code, "<string>"), main)


def _stdin(_target: Target, rewriter: Rewriter) -> None:
    _enter("", os.getcwd())
    main = _new_main()
    code = compile(sys.stdin.buffer.read(), "<stdin>", "exec", dont_inherit=True)
    vars(main).update(__file__="<stdin>", __cached__=None)
    _execute(rewriter.code(code, "<stdin>"), main)


KINDS: dict[str, Callable[[Target, Rewriter], None]] = {
    "script": _script,
    "module": _module,
    "text": _text,
    "stdin": _stdin,
}


# --------------------------------------------------------------- the program's surroundings


def _enter(entry: str, directory: str, always: bool = False) -> None:
    """Puts the program's folder in front of sys.path, unless Python was told not to."""
    if always or not sys.flags.safe_path:
        sys.path.insert(0, entry)
        _make_room(directory)


# Imported by Python itself before any program, so the program's own could not win either; and
# packages with native parts, which cannot be loaded twice.
_STAY = frozenset(
    (
        *("abc", "codecs", "encodings", "genericpath", "io", "os", "posixpath", "site"),
        *("sitecustomize", "stat", "usercustomize", "zipimport", "__main__"),
        *("accel", "numpy", "torch"),
    )
)


def _make_room(directory: str) -> None:
    """Modules beside the program win over modules of the same name that accel has imported."""
    try:
        names = {name.partition(".")[0] for name in os.listdir(directory)}
    except OSError:  # a zip file
        return
    for name in names.intersection(sys.modules) - _STAY - set(sys.builtin_module_names):
        spec = getattr(sys.modules[name], "__spec__", None)
        if spec is None or spec.origin is None or _lies_in(spec.origin, directory):
            continue
        if importlib.machinery.PathFinder.find_spec(name, [directory]) is not None:
            del sys.modules[name]


def _lies_in(path: str, directory: str) -> bool:
    return os.path.realpath(path).startswith(os.path.join(directory, ""))


_replaced: list[Any] = []  # the `__main__` that started us must outlive its functions


def _new_main() -> types.ModuleType:
    """A module `__main__` as CPython makes it."""
    module = types.ModuleType("__main__")
    vars(module).update(
        __annotations__={},
        __builtins__=builtins,
        __loader__=importlib.machinery.BuiltinImporter,
    )
    _replaced.append(sys.modules.get("__main__"))
    sys.modules["__main__"] = module
    if "__mp_main__" in sys.modules:  # multiprocessing's alias, under which children pickle
        sys.modules["__mp_main__"] = module
    return module


def _execute(code: types.CodeType, main: types.ModuleType) -> None:
    exec(code, vars(main))


# ----------------------------------------------------------------------------- its end


def _guarded(program: Callable[[], None]) -> int:
    error = _outcome(program)
    if error is None:
        return 0
    if isinstance(error, _NotFound):
        print(f"{sys.executable}: {error}", file=sys.stderr)
        return 2
    _show(error)
    if isinstance(error, KeyboardInterrupt):
        _die_of_interrupt()
    return 1


def _outcome(program: Callable[[], None]) -> BaseException | None:
    """What the program did not catch; handled outside, where it is nobody's context."""
    try:
        program()
    except SystemExit:
        raise
    except BaseException as error:
        return error
    return None


_HERE = os.path.abspath(__file__)


def _show(error: BaseException) -> None:
    """What the interpreter does with an exception that nobody caught."""
    shown = _without_ours(error)
    sys.last_type, sys.last_value, sys.last_traceback = type(error), error, shown
    try:
        sys.excepthook(type(error), error, shown)
    except SystemExit:
        raise
    except BaseException as second:
        _without_ours(second)
        print("Error in sys.excepthook:", file=sys.stderr)
        traceback.print_exception(second)
        print("\nOriginal exception was:", file=sys.stderr)
        traceback.print_exception(error)


def _without_ours(error: BaseException) -> types.TracebackType | None:
    """The error's traceback, from the first frame that is not of this file."""
    shown = error.__traceback__
    while shown is not None and shown.tb_frame.f_code.co_filename == _HERE:
        shown = shown.tb_next
    error.__traceback__ = shown
    return shown


def _die_of_interrupt() -> None:
    """Ends the process as Python does after an unhandled Ctrl-C: by the signal itself, so that
    a shell script stops too."""
    vars(threading)["_shutdown"]()
    vars(atexit)["_run_exitfuncs"]()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):
            continue
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
