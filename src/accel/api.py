"""The public functions: what `import accel` offers.

In: the user's functions, modules, package names. Out: the same objects, armed; counters,
explanations. Invariant: without a working native module every function here still returns,
and programs run eagerly.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, overload

from accel import config as _config
from accel import log, runtime

_NOT_A_CALL = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_ROW = "running eagerly: {}"


def _driver() -> Any:
    """The driver, or None (said once) where the native module cannot be used."""
    if not runtime.available:
        log.notice_once(_ROW.format(runtime.reason))
        return None
    from accel import driver

    if driver.current is None:
        from accel.capture import left_to_python

        # Called in a recorded function, they are to hold from there on.
        for function in (disable, set_stance):
            left_to_python.functions.add(function)  # type: ignore[arg-type]
    return driver.current or driver.start(_config.load())


def _is_backend(candidate: Any) -> bool:
    """True for `(gm: fx.GraphModule, example_inputs)`, the field's backend signature."""
    if isinstance(candidate, str):
        return True
    if not callable(candidate) or isinstance(candidate, (type, types.MethodType)):
        return False
    if type(candidate).__module__.partition(".")[0] == "torch":  # modules, scripted functions
        return False
    try:
        parameters = list(inspect.signature(candidate).parameters.values())
    except (TypeError, ValueError):
        return False
    names = [p.name for p in parameters]
    return len(names) >= 2 and (
        "GraphModule" in str(parameters[0].annotation)
        or (
            names[0] in ("gm", "graph_module", "graph")
            and names[1] in ("example_inputs", "inputs", "args", "sample_inputs")
        )
    )


def optimize(
    target: Any = None,
    *,
    backend: str | Callable[..., Any] | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
) -> Any:
    """Makes a function or module a root that is recorded at its first call.

    Use it as `optimize(f)`, `@optimize`, `@optimize("eager")`, `optimize(my_backend)(model)`
    or `optimize(backend=..., fullgraph=...)(model)`. The target comes back as the same object.
    A backend is a name or `(gm: torch.fx.GraphModule, example_inputs) -> callable`.
    `dynamic`: True leaves the sizes of all inputs but parameters open from the first recording
    on, False none, None (default) those that have changed.

    Errors: TypeError for what can be no root (a generator, a class, a builtin);
    UnknownBackendError for a backend name that nobody registered.
    """
    if target is not None and _is_backend(target) and backend is None:
        target, backend = None, target
    if isinstance(backend, str):
        _check_backend(backend)
    if target is None:
        return functools.partial(_arm, backend=backend, dynamic=dynamic, fullgraph=fullgraph)
    return _arm(target, backend=backend, dynamic=dynamic, fullgraph=fullgraph)


def _check_backend(name: str) -> None:
    from accel.compile import backends

    backends.check_name(name)


def _arm(
    target: Any,
    *,
    backend: Any = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    unless_armed: bool = False,
) -> Any:
    """`unless_armed` leaves alone what the user has asked for already, in his way."""
    import torch

    driver = _driver()
    if isinstance(target, torch.nn.Module):
        root = driver.roots.of_module(target) if driver else None
        if driver:
            from accel.capture import left_to_python

            left_to_python.discard_module(target)
    else:
        function = target.__func__ if isinstance(target, types.MethodType) else target
        if not isinstance(function, types.FunctionType):
            raise TypeError(
                f"accel.optimize() takes a function, a method or an nn.Module, not {target!r}"
            )
        root = driver.roots.own_of_function(function) if driver else None
        if driver:
            from accel.capture import left_to_python

            left_to_python.functions.discard(function)
    if root is not None and not (unless_armed and root.forced and root.state != "disabled"):
        if root.state == "disabled":
            root.state = "cold"
        elif root.judged and (root.backend, root.dynamic) != (backend, dynamic):
            driver.forget(root)  # what serves it was compiled in another way
        root.forced = True
        root.fullgraph = fullgraph
        root.dynamic, root.variation = dynamic, None
        root.backend = backend
        root.entry.threshold = 1
        root.entry.state = "armed" if root.variants else "count"
    return target


@overload
def enable(name: str) -> None: ...
@overload
def enable(name: types.ModuleType) -> None: ...
def enable(name: str | types.ModuleType) -> None:
    """Makes the functions of a package roots: modules to come, and those imported already.

    Errors: TypeError when `name` is neither a name nor a module.
    """
    name = name.__name__ if isinstance(name, types.ModuleType) else name
    if not isinstance(name, str):
        raise TypeError(f"accel.enable() takes a package's name or module, not {name!r}")
    driver = _driver()
    if driver is not None:
        driver.enable_package(name)


class _Disabled(contextlib.ContextDecorator):
    """While it lasts, nothing in this thread is recorded or served from compiled code."""

    def __enter__(self) -> None:
        if runtime.available:
            runtime.native.pause()

    def __exit__(self, *_: object) -> None:
        if runtime.available:
            runtime.native.resume()

    def __call__(self, function: Any) -> Any:
        return disable(function)


def disable(target: Any = None) -> Any:
    """Undoes `enable` or `optimize`; a function or module runs eagerly from now on.

    A function is left to Python also where compiled code calls it: that code ends before the
    call and begins anew behind it. A function or module is returned, so that this works as a
    decorator, `@disable` or `@disable()`. `with disable():` makes everything that this thread
    calls inside run eagerly.

    Errors: TypeError for what is no package, module, function or nn.Module.
    """
    if target is None:
        return _Disabled()
    driver = _driver()
    if driver is not None:
        driver.disable(target)
    return target


def set_stance(stance: str) -> Any:
    """Sets what calls do from now on: `set_stance("force_eager")`, `with set_stance(...):`, or
    `@set_stance(...)` for the calls of one function.

    `default`; `force_eager`: nothing is recorded or served; `eager_on_recompile`: compiled code
    serves the calls it fits, others run eagerly and are not recorded; `fail_on_recompile`: so
    too, but a call of a compiled function that nothing fits raises `accel.RecompileError`.

    Errors: ValueError for another name.
    """
    from accel.stance import Stance

    driver = _driver()
    return Stance(stance, (lambda name: name) if driver is None else driver.set_stance)


def allow_in_graph(function: Any) -> Any:
    """Lets graphs call a function as it is: recording does not look inside, compiled code runs it
    as one operation. The function itself is returned.

    It must hang on nothing but its arguments, take plain tensors (and constants beside them), and
    give new ones; a call that does otherwise, or that gradients flow through, runs as Python.

    Errors: TypeError for what is no Python function, and for generators and coroutines.
    """
    plain = function.__func__ if isinstance(function, types.MethodType) else function
    if not isinstance(plain, types.FunctionType) or plain.__code__.co_flags & _NOT_A_CALL:
        raise TypeError(f"accel.allow_in_graph() takes a plain function, not {function!r}")
    if _driver() is not None:
        from accel.capture import left_to_python

        left_to_python.allowed.add(plain)
    return function


def assume_constant_result(function: Any) -> Any:
    """Promises that a function's result hangs on nothing that changes: compiled code keeps what
    the recorded call gave, without guards. The function itself is returned.

    Errors: TypeError for what is no Python function.
    """
    plain = function.__func__ if isinstance(function, types.MethodType) else function
    if not isinstance(plain, types.FunctionType):
        raise TypeError(f"accel.assume_constant_result() takes a function, not {function!r}")
    if _driver() is not None:
        from accel.capture import left_to_python

        left_to_python.constant.add(plain)
    return function


def mark_dynamic(tensor: Any, dim: int | tuple[int, ...] | list[int]) -> None:
    """Says that sizes along `dim` differ between calls: a recording that reads this tensor
    leaves them open at once, not only after the first change.

    Errors: TypeError for what is no tensor; IndexError for a dimension that it has not.
    """
    from accel.capture import variation

    variation.mark(tensor, dim, variation.DYNAMIC_MARK)


def mark_static(tensor: Any, dim: int | tuple[int, ...] | list[int] | None = None) -> None:
    """Says that each size along `dim` (default: every dimension) is worth a variant of its own.

    Errors: as `mark_dynamic`.
    """
    from accel.capture import variation

    every = list(range(getattr(tensor, "ndim", 0)))
    variation.mark(tensor, every if dim is None else dim, variation.STATIC_MARK)


def reset() -> None:
    """Forgets every recording and variant; roots are recorded anew."""
    driver = _driver()
    if driver is not None:
        driver.reset()


def wait(timeout_s: float | None = None) -> bool:
    """Until compilation is idle. False when `timeout_s` seconds ran out first."""
    driver = _driver()
    return True if driver is None else driver.wait(timeout_s)


def counters() -> dict[str, float]:
    """What happened so far, as plain numbers; see docs/glossary.md for the words."""
    driver = _driver()
    if driver is None:
        from accel.counting import Counters

        return Counters().snapshot()
    return driver.read_counters()  # type: ignore[no-any-return]


def explain(target: Any) -> Callable[..., Any]:
    """`explain(f)(*args)`: calls `f` once, recorded, and tells graph, guards and breaks."""
    from accel import explanation

    return explanation.explain(target, _driver(), functools.partial(_arm, unless_armed=True))


def is_available() -> bool:
    """True when accel can record and compile in this process."""
    return bool(runtime.available)


__all__ = [
    "allow_in_graph",
    "assume_constant_result",
    "counters",
    "disable",
    "enable",
    "explain",
    "is_available",
    "mark_dynamic",
    "mark_static",
    "optimize",
    "reset",
    "set_stance",
    "wait",
]
