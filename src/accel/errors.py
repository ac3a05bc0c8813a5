"""Errors that accel raises, and the reasons it gives for not compiling.

In: a reason's name and the thing it is about. Out: one line for the user.
Invariant: every reason that code gives is a row of REASONS.
"""

from __future__ import annotations

import re


class AccelError(Exception):
    """Base of the errors that accel raises to its user."""


class ConfigError(AccelError):
    """A setting is unknown or has a wrong type; names file, key and nearest valid key."""


class CompileError(AccelError):
    """A graph could not be compiled."""


class MissingError(CompileError):
    """Nor any other of its kind, on this machine; names what is missing and the remedy."""


class CacheError(AccelError):
    """No directory can be written, so nothing can be compiled."""


class UnknownBackendError(AccelError):
    """No backend of this name is registered."""


class GraphBreakError(AccelError):
    """A graph break under `fullgraph=True`.

    `file`, `line`, `reason` and `hint` say where, why, and what to do.
    """

    def __init__(self, file: str, line: int, reason: str, hint: str) -> None:
        super().__init__(f"{file}:{line}: {reason}. {hint}")
        self.file, self.line, self.reason, self.hint = file, line, reason, hint


class RecompileError(AccelError):
    """A call that would be compiled anew under the stance `fail_on_recompile`.

    `function`, `what`, `old`, `new`, `location` say whose call it was, what it met with another
    value than compiled code was made for, and which line of the user's reads it.
    """

    def __init__(self, function: str, what: str, old: str, new: str, location: str) -> None:
        changed = f"{what} was {old}, is {new}" if old else what
        place = f", read at {location}" if location else ""
        super().__init__(
            f"{function} would be compiled anew, and the stance is fail_on_recompile: "
            f"{changed}{place}"
        )
        self.function, self.what, self.old, self.new = function, what, old, new
        self.location = location


# Rules for whoever adds a row: name -> (what happened, what the user can do).
# The first text may hold one {} for the thing.
REASONS: dict[str, tuple[str, str]] = {
    "aliased_write": ("a tensor is written through an alias: {}", "pass separate tensors"),
    "ambient_changed": ("the call changes torch's global state: {}", "change it outside"),
    "branch": ("a branch goes both ways, {}", "nothing: Python takes it, between compiled parts"),
    "changes": ("{} is another at each visit", "nothing: what uses it runs as Python"),
    "class_or_module_store": ("a class, module or function is changed: {}", "do it outside"),
    "closure_store": ("a variable of an enclosing function is written", "return the value"),
    "compile_failed": ("compilation failed: {}", "run `python -m accel doctor`"),
    "container": ("contents that cannot be guarded: {}", "use a list, tuple or dict"),
    "container_write": ("a container from outside is changed: {}", "return the change"),
    "dynamic": (
        "sizes that change are used in a way that accel does not follow: {}",
        "nothing: each size is compiled for itself",
    ),
    "definition": (
        "a function is defined that is used behind a graph break",
        "nothing: Python defines it, between compiled parts",
    ),
    "derivatives": ("backward asked for what was not compiled: {}", "nothing: it runs eagerly"),
    "devices": (
        "tensors on two devices in one graph: {}",
        "nothing: Python runs it, between compiled parts; or move them before the call",
    ),
    "disabled": ("{} is left to Python", "nothing: it was asked for"),
    "delete": ("something from outside is deleted: {}", "do it outside"),
    "escaped_operation": ("a torch operation ran unseen: {}", "call it from Python code"),
    "executor_failed": ("compiled code failed: {}", "nothing: these calls ran eagerly"),
    "finaliser": ("an object with __del__ is made: {}", "make it outside"),
    "first_use": ("a value is computed once and kept: {}", "nothing: the call is tried again"),
    "foreign_frame": ("other code ran in between: {}", "nothing: the call is tried again"),
    "global_store": ("a global variable is written: {}", "return the value"),
    "import": ("an import that cannot be guarded: {}", "import at the top of the file"),
    "interrupted": (
        "a signal or a finaliser interrupted the call",
        "nothing: the call is tried again",
    ),
    "late_text": (
        "what is written there would be seen late: {} of work behind it",
        "nothing: code is compiled on both sides",
    ),
    "losing": ("compiled code was slower than eager: {}", "nothing: calls run eagerly"),
    "no_operations": ("no torch operation ran", "nothing: there is nothing to compile"),
    "not_allowed": (
        "a function allowed in graphs does what no operation may: {}",
        "let it take and give plain tensors of their own, without gradients",
    ),
    "no_twin": ("{} cannot be instrumented", "coroutines run as Python"),
    "opaque_attribute": ("an attribute computed by C code is used: {}", "read it outside"),
    "opaque_call": ("a call that accel does not know: {}", "move it out of the compiled part"),
    "opaque_operation": ("an operation that accel does not know: {}", "move it outside"),
    "only_views": ("its results are views of its inputs", "nothing: there is nothing to compile"),
    "operand": ("a torch operation takes {}", "pass tensors and plain numbers"),
    "operation_raised": (
        "an operation raised an exception, which was caught: {}",
        "nothing: Python runs it, between compiled parts",
    ),
    "raised": ("the recorded call raised an exception", "nothing: the call is tried again"),
    "read_after_write": ("a container is read whole after a write: {}", "read it first"),
    "recursion": ("the call recurses too deeply", "nothing: it runs eagerly"),
    "unknown_function": ("a function of unknown origin is called: {}", "pass it as an argument"),
    "recorder_error": ("an error in accel: {}", "please report it"),
    "requires_grad": (
        "gradients are recorded in a way that accel does not compile ({})",
        "nothing: the call runs eagerly",
    ),
    "result": ("a result that cannot be rebuilt: {}", "return tensors and plain containers"),
    "tensor_attribute": ("a tensor's attribute is read: {}", "read it outside"),
    "tensor_attribute_store": ("a tensor's attribute is set: {}", "set it outside"),
    "tensor_kind": (
        "a tensor that accel does not compile: {}",
        "use strided tensors on the processor or a GPU",
    ),
    "tensor_method": ("a tensor method that accel does not record: {}", "call it outside"),
    "tensor_subclass": ("a tensor subclass is used: {}", "use plain tensors"),
    "text_of_object": ("text is made from an object: {}", "format its fields"),
    "too_long": ("more than {} torch operations", "optimize a function that it calls"),
    "too_many_variants": ("{} variants exist already", "keep shapes and flags stable"),
    "unbound_slot": ("a slot without a value is read: {}", "set it first"),
    "unknown_tensor": ("a tensor of unknown origin is used: {}", "pass it as an argument"),
    "unknown_value": ("a value of unknown origin is used: {}", "pass it as an argument"),
    "unseen_write": ("something was written unseen: {}", "please report it"),
    "value_from_tensor": ("Python needs a tensor's values: {}", "use torch operations"),
}


def reason_text(kind: str, detail: str = "") -> str:
    """One line for the user."""
    text, _hint = REASONS[kind]
    return text.format(detail) if "{}" in text else (f"{text}: {detail}" if detail else text)


def reason_hint(kind: str) -> str:
    return REASONS[kind][1]


def hint_for(text: str) -> str:
    """What the user can do about a reason that `reason_text` worded; "" when it is unknown."""
    for template, hint in REASONS.values():
        start, hole, end = template.partition("{}")
        if text.startswith(start) and (text.endswith(end) if hole else text in (start,)):
            return hint
        if not hole and text.startswith(f"{start}: "):
            return hint
    return ""


# What a compiler says of a graph whose results are its inputs, seen otherwise.
ONLY_VIEWS = "all outputs that carry gradients are views of inputs"
_UNTRACEABLE = re.compile(r"(\S+) at (.+?) cannot be traced: ")


def untraceable(target: str, location: str, why: str) -> str:
    """What a compiler says of an operation that it cannot follow."""
    return f"{target} at {location or 'an unknown place'} cannot be traced: {why}"


def untraceable_operation(text: str) -> tuple[str, str] | None:
    """Target and location that `untraceable` was given; None for other texts."""
    found = _UNTRACEABLE.search(text)
    return (found[1], found[2]) if found is not None else None


def graph_break(location: str, kind: str, detail: str) -> GraphBreakError:
    """The error for a void at `location`, "file:line"."""
    file, _, line = location.rpartition(":")
    number = int(line) if line.isdigit() else 0
    return GraphBreakError(file or location, number, reason_text(kind, detail), reason_hint(kind))
