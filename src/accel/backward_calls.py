"""`loss.backward()`: torch's own Python between the call and the engine, in native code.

In: torch's `Tensor.backward` and what it calls. Out: a prologue on it, which answers the common
case by calling `torch.autograd.graph._engine_run_backward` as torch's functions would have
(native/backward_calls.cpp). Invariants: where any of these functions is not torch's own, or does what
is not known here, the body runs; from within and in tracebacks the stack looks the same (hooks warn at
the program's line by counting frames).
"""

from __future__ import annotations

import ast
import contextlib
import itertools
import tokenize
import types
from typing import Any

import torch

from accel import log, runtime
from accel.rewriter import prologue

# What torch 2.13's functions use. An unknown name means that a function does more than the native
# code knows of.
_KNOWN_NAMES = {
    "Tensor.backward": frozenset(
        "has_torch_function_unary handle_torch_function Tensor backward torch autograd".split()
    ),
    "backward": frozenset(
        "GradientEdge Mapping RuntimeError Tensor TypeError _C FutureWarning __name__ "
        "_are_functorch_transforms_active _engine_run_backward _make_grads "
        "_tensor_or_tensors_to_tuple cast dict graph handle_torch_function has_torch_function "
        "is_tensor_like isinstance len torch tuple type values warn warnings backward".split()
    ),
    "_make_grads": frozenset(
        "AssertionError GradientEdge NestedTensor RuntimeError Size Tensor TypeError __name__ "
        "_calculate_shape _input_metadata append cast device dtype expect_true graph index "
        "is_complex is_cpp_nested_tensor is_floating_point is_nested is_nested_tensor "
        "is_same_size isinstance node numel ones ones_like output_nr preserve_format "
        "requires_grad shape size str sym_eq torch torch.fx.experimental.symbolic_shapes "
        "torch.nested._internal.nested_tensor tuple type zip all".split()
    ),
    "_tensor_or_tensors_to_tuple": frozenset("Tensor isinstance torch tuple".split()),
}
_HELPERS = ("backward", "_make_grads", "_tensor_or_tensors_to_tuple")  # of torch.autograd
_rewritten: list[types.CodeType] = []  # torch's code and ours, the same each time
_SIGNATURE = ("self", "gradient", "retain_graph", "create_graph", "inputs")


def install() -> None:
    """Puts the prologue on `torch.Tensor.backward`, where torch's functions are as expected."""
    method = torch.Tensor.backward
    if prologue.has_prologue(method.__code__):
        return
    if _rewritten[:1] != [method.__code__]:
        helpers: dict[str, Any] = {name: vars(torch.autograd).get(name) for name in _HELPERS}
        try:
            _check({"Tensor.backward": method, **helpers})
            outer, inner = _short_ways(method, helpers["backward"])
        except _UnexpectedError as why:
            log.artifact("driver", "Tensor.backward stays torch's: %s", why)
            return
        runtime.native.set_backward_chain(
            vars(torch),
            torch.autograd,
            vars(torch.autograd),
            tuple((name, f, f.__code__) for name, f in helpers.items()),
            outer,
            inner,
        )
        _rewritten[:] = (
            method.__code__,
            prologue.insert_prologue(method.__code__, 0, kind="backward"),
        )
    method.__code__ = _rewritten[1]


def uninstall() -> None:
    prologue.remove_prologue(torch.Tensor.backward)


class _UnexpectedError(Exception):
    """Torch's functions do what is not known here."""


def _check(functions: dict[str, Any]) -> None:
    for name, function in functions.items():
        if type(function) is not types.FunctionType:
            raise _UnexpectedError(f"{name} is a {type(function).__name__}")
        unknown = _names(function.__code__) - _KNOWN_NAMES[name]
        if unknown:
            raise _UnexpectedError(f"{name} uses {', '.join(sorted(unknown))}")
    code = functions["Tensor.backward"].__code__
    arguments = code.co_varnames[: prologue.argument_count(code)]
    if arguments != _SIGNATURE:
        raise _UnexpectedError(f"its arguments are {', '.join(arguments)}")


def _names(code: types.CodeType) -> set[str]:
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
    return found


def _short_ways(
    method: types.FunctionType, function: types.FunctionType
) -> tuple[types.FunctionType, types.FunctionType]:
    """What stands for `Tensor.backward` and `autograd.backward` on the stack: functions with their names,
    lines and globals that do their last statement only."""
    passed = ("tensors", "grad_tensors_", "retain_graph", "create_graph", "inputs_tuple")
    call = _last_call(method.__code__, _LAST_OF_METHOD)
    call.func = _at(call, ast.Name("inner", ast.Load()))
    call.args, call.keywords = [_at(call, ast.Name(name, ast.Load())) for name in passed], []
    outer = _function(method, ("inner", *passed), call)
    inner = _function(function, passed, _last_call(function.__code__, _LAST_OF_FUNCTION))
    return outer, inner


_LAST_OF_METHOD = (
    "torch.autograd.backward(self, gradient, retain_graph, create_graph, inputs=inputs)"
)
_LAST_OF_FUNCTION = (
    "_engine_run_backward(tensors, grad_tensors_, retain_graph, create_graph, inputs_tuple, "
    "allow_unreachable=True, accumulate_grad=True)"
)


def _last_call(code: types.CodeType, expected: str) -> ast.Call:
    """The last statement of the function, at its place in its file."""
    first = code.co_firstlineno
    last = max(line or 0 for _, _, line in code.co_lines())
    try:
        with tokenize.open(code.co_filename) as file:
            lines = list(itertools.islice(file, first - 1, last + 2))  # what closes the call
    except (OSError, SyntaxError) as error:
        raise _UnexpectedError(f"its source cannot be read: {error}") from None
    indented = lines[0][:1].isspace()
    for end in range(last - first + 1, len(lines) + 1):
        text = "if 1:\n" * indented + "".join(lines[:end])
        with contextlib.suppress(SyntaxError, ValueError):
            tree = ast.parse(text)
            break
    else:
        raise _UnexpectedError("its source is another")
    defined: Any = tree.body[0].body[0] if indented else tree.body[0]  # type: ignore[attr-defined]
    statement = defined.body[-1]
    if not isinstance(statement, ast.Expr) or ast.unparse(statement) != expected:
        raise _UnexpectedError(f"it ends in {ast.unparse(statement)}")
    ast.increment_lineno(defined, first - 1 - indented)
    assert isinstance(statement.value, ast.Call)
    return statement.value


def _at(place: ast.expr, node: ast.expr) -> ast.expr:
    return ast.copy_location(node, place)


def _function(
    like: types.FunctionType, arguments: tuple[str, ...], call: ast.Call
) -> types.FunctionType:
    code = like.__code__
    module = ast.parse(f"def {code.co_name}({', '.join(arguments)}): pass")
    defined: Any = ast.increment_lineno(module, code.co_firstlineno - 1).body[0]
    defined.body = [ast.copy_location(ast.Expr(call), call)]
    defined.end_lineno = call.end_lineno
    compiled = compile(module, code.co_filename, "exec")
    (made,) = (c for c in compiled.co_consts if isinstance(c, types.CodeType))
    return types.FunctionType(
        made.replace(co_qualname=code.co_qualname), like.__globals__, like.__name__
    )
