"""Lifted numbers: ints and floats of the program's state that differ between calls.

In: the events of a recording of a root whose numbers changed since an earlier recording. Out: a
`NumberProgram` of what Python computed with them, and tensors without dimensions among the
graph's inputs where operations on tensors used them. A lifted number is an exact int or float
that is no other object, as a traced size is (`capture/numbers.py`), and who else looks at its
value settles it: the program of numbers tests that it is what it was.

An int among the sizes and indices of an operation of `_SIZED` becomes a number of the graph, as a
size is; a size that meets a lifted number becomes a value of the program.

Rules for whoever changes an event's handler here:
1. A number is lifted only where the object that the program gets can be replaced: the answer
   to an event in `_READS`, or an argument of the root. Everywhere else it is guarded by value.
2. A tensor operation sees a lifted number only in the places of `_SCALARS` and `_FACTORS`,
   where a tensor of that dtype computes what the number would have.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable
from typing import Any

import torch

from accel import runtime
from accel.capture.number_program import (
    FUNCTIONS,
    OPERATORS,
    UNARY,
    NumberProgram,
    Step,
    Use,
    is_same,
)
from accel.capture.numbers import NumberEvents
from accel.capture.operators import BINARY_NAMES
from accel.capture.state import Effect, user_location
from accel.capture.steps import OPERATION, Answer, Void
from accel.capture.values import PLAIN_TENSORS, SMALL_INTS, is_constant
from accel.capture.variation import Variation
from accel.sources import Source
from accel.trace import Ref, TensorMeta

_IN_PLACE = 13  # of CPython's NB_* numbers
_COMPARE = {"<": "lt", "<=": "le", "==": "eq", "!=": "ne", ">": "gt", ">=": "ge"}
# Events whose answer is the object that the program gets.
_READS = frozenset({"attr", "subscr", "glob", "deref", "call"})
_PASSED_ON = frozenset({"glob", "deref"})  # whose first operand it is, without an answer
_PLAIN_CONTAINERS = (dict, list, tuple)

_ARITHMETIC = frozenset({"add", "sub", "mul"})
_COMPARISONS = frozenset({"lt", "le", "eq", "ne", "gt", "ge"})
_REAL_ONLY = frozenset({"truediv", "div", "true_divide", "divide", "pow"})
# Operations of a tensor and a number, by their names without `__`, a leading `i` or `r` of an
# operator, and a trailing `_`.
_SCALARS = (
    _ARITHMETIC
    | _COMPARISONS
    | _REAL_ONLY
    | {"multiply", "subtract", "less", "less_equal", "greater", "greater_equal", "not_equal"}
)
# Operations with a factor in an option, which multiplies the second operand: the option, and by
# which operations the operands are put together.
_FACTORS: dict[str, tuple[str, tuple[str, ...]]] = {
    "add": ("alpha", ("add",)),
    "sub": ("alpha", ("sub",)),
    "addcmul": ("value", ("mul", "add")),
    "addcdiv": ("value", ("div", "add")),
}
# Operations whose ints are sizes, positions and steps.
_SIZED = frozenset(
    """arange empty expand full getitem index_select linspace narrow new_empty new_full new_ones new_zeros
    ones pad repeat reshape roll select setitem split tril triu unflatten unfold view zeros""".split()
)
# How the program computes what the graph does with sizes.
_FOLLOWED = {
    f"_operator.{n}": getattr(operator, n) for n in ("add", "sub", "mul", "floordiv", "mod", "neg")
}
# Not the halves: ATen computes with the number as it is, not rounded to the tensor's dtype.
_EXACT_DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.int64: "int64"}


def _is_small(number: int) -> bool:
    """Whether CPython keeps one object for all ints that equal this one."""
    return number in SMALL_INTS


def _size(tensor: torch.Tensor, dim: int) -> int:
    return int(tensor.size(dim))


def _plain_name(target: str) -> str:
    """`mul` of "_operator.imul", "torch.mul", "__rmul__", "mul_"."""
    last = target.rsplit(".", maxsplit=1)[-1]
    is_method = last.startswith("__") and last.endswith("__")
    name = last.strip("_")
    if name in _SCALARS:
        return name
    if (is_method or target.startswith("_operator.")) and name[:1] in ("i", "r"):
        return name[1:]
    return name


def _reads_one(f: Any) -> bool:
    """Whether a call's answer is the one thing that it reads."""
    if f is getattr:
        return True
    return type(f) is types.BuiltinFunctionType and (
        f.__name__ in ("get", "setdefault") and issubclass(type(f.__self__), dict)
    )


def _is_item(value: Any, container: Any, key: Any) -> bool:
    """Whether `value` is what CPython reads in `container[key]`."""
    if type(container) not in _PLAIN_CONTAINERS or type(key) is slice or not is_constant(key):
        return False
    return container[key] is value


def _writes(effect: Effect, source: Source) -> bool:
    """Whether an effect of this call writes what lies at `source`, whatever way it went."""
    target = effect.target
    if target is None or not effect.operands:
        return False
    key = effect.operands[0]
    if effect.kind == "call":  # of a container: whatever lies in it
        return source.base is target
    if source.kind == "member":
        return source.base is target and source.key.__name__ == key
    if type(source.key) is not type(key) or source.key != key:
        return False
    holder = source.base
    return holder is target or (holder is not None and holder.base is target)


class LiftedEvents(NumberEvents):
    """Handlers that follow numbers of the program's state; as below them where none is lifted."""

    def follow_numbers(self, variation: Variation | None) -> None:
        super().follow_numbers(variation)
        self.lifted: dict[int, int] = {}  # id of a number -> its number in the program
        self.number_program = NumberProgram()
        self.leaves: dict[int, tuple[Source, Any]] = {}  # by id of the source
        self.leaf_sources: list[Source] = []
        self.originals: dict[int, Any] = {}  # id of what stands for a leaf -> the program's object
        self.spoiled: Void | None = None  # why the recording is void although the run goes on
        self.leaf_of: dict[int, Source] = {}  # number in the program -> source
        self.tensor_leaves: dict[int, int] = {}  # id of an input's source -> number
        self.size_values: dict[str, int | None] = {}  # name in the graph -> number
        self.read_numbers: list[tuple[Any, Source]] | None = None
        self.own_globals: dict[tuple[int, str], tuple[Any, Any]] = {}
        self.own_arguments: dict[tuple[int, Any], Any] = {}
        self.scalar_names: list[str] = []  # by position among the program's operands
        self.scalar_dtype = ""  # while an operation's operands are named
        self.takes_sizes = False  # the same

    # ------------------------------------------------------------ reads

    def track(self, value: Any, source: Source) -> None:
        kind = type(value)
        if (
            self.read_numbers is not None
            and (kind is int or kind is float)
            and self.variation is not None
            and not (self.c_looks or self.tests_later)
            and self.variation.lifts(value, source)
        ):
            self.read_numbers.append((value, source))
        else:
            super().track(value, source)

    def number_handler(self, name: str, handler: Callable[..., Any]) -> Callable[..., Any]:
        handler = super().number_handler(name, handler)
        if self.variation is None or name not in _READS:
            return handler
        may_read = _reads_one if name == "call" else None

        def reading(*operands: Any) -> Any:
            if may_read is not None and not may_read(operands[0]):
                return handler(*operands)
            self.read_numbers = []
            try:
                answer = handler(*operands)
            finally:
                read, self.read_numbers = self.read_numbers, None
            return self._replace(name, operands, answer, read) if read else answer

        return reading

    def _replace(
        self, name: str, operands: tuple[Any, ...], answer: Answer, read: list[tuple[Any, Source]]
    ) -> Answer:
        """The answer with the number's own object in place of the one that was read."""
        *others, (value, source) = read
        for number, path in others:
            super().track(number, path)
        if answer is not None and len(answer) == 1:
            is_read = answer[0] is value
        elif name in _PASSED_ON:
            is_read = answer is None and operands[0] is value
        else:
            is_read = name == "subscr" and _is_item(value, *operands)
        if not is_read:
            super().track(value, source)
            return answer
        own = self.leaf(value, source)
        if name == "glob":
            self.own_globals[id(operands[2]), operands[1]] = (value, own)
        return (own,)

    def glob(self, value: Any, name: str, namespace: dict[str, Any]) -> Answer:
        known = self.own_globals.get((id(namespace), name))
        if known is not None and known[0] is value:
            return (known[1],)
        return super().glob(value, name, namespace)

    def raw_setitem(self, obj: Any, key: Any, value: Any) -> Answer:
        """What lies under the key is not looked at, only whether something does."""
        before, self.read_numbers = self.read_numbers, []
        earlier = len(self.effects)
        try:
            return super().raw_setitem(obj, key, value)
        finally:
            read, self.read_numbers = self.read_numbers, before
            for number, source in read:
                self.leaf(number, source, earlier)

    def leaf(self, value: Any, source: Source, earlier: int | None = None) -> Any:
        """What stands for the number at `source`, which is guarded by its type only; only the
        first `earlier` effects count as writes before it."""
        found = self.leaves.get(id(source))
        if found is not None:
            if not is_same(found[1], value):
                raise Void("unseen_write", str(source))
            return found[1]
        assert self.variation is not None
        if any(_writes(effect, source) for effect in self.effects[:earlier]):
            raise Void("read_after_write", str(source))
        self.variation.has_lifted = True
        self.guards.add(source, "TYPE_IS", type(value))
        number = self.number_program.add_leaf(str(source))
        self.leaf_sources.append(source)
        self.leaf_of[number] = source
        own = self._own(value, number)
        self.originals[id(own)] = value
        self.leaves[id(source)] = (source, own)
        return own

    def track_starred(self, values: Any, source: Source) -> None:
        """*args or **kwargs; a tuple of constants is not guarded as one where some may differ."""
        if type(values) is tuple and any(type(v) in (int, float) for v in values):
            self.guards.add(source, "TYPE_IS", tuple)
            self.known[id(values)] = (values, source)
        else:
            self.track(values, source)
        self.consume(values)

    def lift_arguments(self, index: int) -> None:
        """Root number `index` has been tracked: its numbers are replaced in the call's arguments."""
        read, self.read_numbers = self.read_numbers, None
        for value, source in read or ():
            base = source.base
            if source.kind == "root":
                self.own_arguments[index, None] = self.leaf(value, source)
            elif base is not None and base.kind == "root":  # of *args or **kwargs
                self.own_arguments[index, source.key] = self.leaf(value, source)
            else:
                super().track(value, source)

    def bound_arguments(self, values: list[Any]) -> list[Any]:
        """The root's locals with the numbers that stand for those lifted."""
        values = list(values)
        for (index, key), own in self.own_arguments.items():
            if key is None:
                values[index] = own
            elif type(values[index]) is dict:
                values[index] = {**values[index], key: own}
            else:
                values[index] = (*values[index][:key], own, *values[index][key + 1 :])
        return values

    # ------------------------------------------------------------ the program

    def _own(self, value: Any, number: int) -> Any:
        own = runtime.native.own_number(value)
        self.lifted[id(own)] = number
        self.numbers[id(own)] = (own, f"h{number}")
        return own

    def is_lifted(self, value: Any) -> bool:
        return id(value) in self.lifted

    def _compute(self, function: Callable[..., Any], operands: tuple[Any, ...], value: Any) -> Any:
        """A step of the program that gave `value`; what stands for it from now on."""
        uses = tuple(map(self._use, operands))
        expected = value if type(value) is bool else None
        step = Step(function, uses, type(value), expected, user_location())
        number = self.number_program.add_step(step)
        return value if type(value) is bool else self._own(value, number)

    def _use(self, value: Any) -> Any:
        """A step's operand: a value of the program, or a constant."""
        number = self.lifted.get(id(value))
        if number is None and (name := self.number_of(value)) is not None:
            number = self._size_value(name, value)
        if number is not None:
            return Use(number)
        self.settle(value)
        return value

    def _size_value(self, name: str, value: int) -> int | None:
        """The program's value for a number of the graph that hangs on sizes of inputs; else None."""
        if name not in self.size_values:
            step = self._size_step(name, value)
            self.size_values[name] = None if step is None else self.number_program.add_step(step)
        return self.size_values[name]

    def _size_step(self, name: str, value: int) -> Step | None:
        made = next((o for o in reversed(self.operations) if o.name == name), None)
        if made is None or type(value) is not int:
            return None
        if made.target == "size" and len(made.args) == 2:
            tensor = self._input_leaf(made.args[0])
            return None if tensor is None else Step(_size, (Use(tensor), made.args[1]), int)
        function = _FOLLOWED.get(made.target)
        if function is None:
            return None
        uses = []
        for operand in made.args:
            number: Any = operand
            if type(operand) is Ref:
                number = self._size_value(operand.name, self.hints[operand.name])
                if number is None:
                    return None
                number = Use(number)
            uses.append(number)
        return Step(function, tuple(uses), int)

    def _input_leaf(self, ref: Ref) -> int | None:
        """The program's leaf for an input tensor; None where the run has written to it."""
        source = next((source for name, source, _ in self.inputs if name == ref.name), None)
        if source is None or any(o.may_write and ref in o.args for o in self.operations):
            return None
        number = self.tensor_leaves.get(id(source))
        if number is None:
            number = self.tensor_leaves[id(source)] = self.number_program.add_leaf(str(source))
            self.leaf_sources.append(source)
        return number

    def _is_arithmetic(self, operands: tuple[Any, ...]) -> bool:
        """Whether a lifted number is among operands that are all plain numbers."""
        return any(id(o) in self.lifted for o in operands) and all(
            type(o) is int or type(o) is float for o in operands
        )

    def _computed(self, function: Callable[..., Any], operands: tuple[Any, ...]) -> Answer:
        """The answer of a step on numbers; None where Python shall do it, on settled ones."""
        try:
            value = function(*operands)
        except (ArithmeticError, ValueError, TypeError):
            return None
        if type(value) not in (int, float, bool):
            return None
        return (self._compute(function, operands, value),)

    def settle(self, value: Any, depth: int = 0, seen: set[int] | None = None) -> None:
        kind = type(value)
        if (kind is int or kind is float) and id(value) in self.lifted:
            self._fix(value)
        else:
            super().settle(value, depth, seen)

    def _fix(self, value: Any) -> None:
        """The number is what it is in every call that this recording serves."""
        number = self.lifted[id(value)]
        source = self.leaf_of.get(number)
        if self.variation is not None and self.variation.leaves_numbers:
            raise Void("changes", str(source or "a number"))
        if self.variation is not None:
            self.variation.fix_number(source)
        plain = runtime.native.own_number(value)  # int(value) would be the very object
        self._compute(is_same, (value, plain), True)
        del self.lifted[id(value)]
        self.settled.append(self.numbers.pop(id(value)))

    def ask(self, name: str, a: Any, b: Any) -> bool:
        if self._is_arithmetic((a, b)):
            function = getattr(operator, name)
            return bool(self._compute(function, (a, b), bool(function(a, b))))
        return super().ask(name, a, b)

    def lifted_source(self, value: Any) -> Source | None:
        """Where the lifted number comes from, when it is none that was computed."""
        number = self.lifted.get(id(value))
        return None if number is None else self.leaf_of.get(number)

    def lifted_output(self, value: Any) -> int | None:
        number = self.lifted.get(id(value))
        return None if number is None else self.number_program.output(number)

    # ------------------------------------------------------------ events

    def binary(self, a: Any, b: Any, op: int) -> Answer:
        if self.lifted and self._is_arithmetic((a, b)):
            name = BINARY_NAMES[op - _IN_PLACE if op >= _IN_PLACE else op]
            function = OPERATORS.get(name)
            answer = None if function is None else self._computed(function, (a, b))
            if answer is not None:
                return answer
        return super().binary(a, b, op)

    def unary(self, a: Any, op: str) -> Answer:
        if id(a) in self.lifted:
            answer = self._computed(UNARY[op], (a,))
            if answer is not None:
                return answer
        return super().unary(a, op)

    def compare(self, a: Any, b: Any, op: str) -> Answer:
        if self.lifted and self._is_arithmetic((a, b)):
            return (self.ask(_COMPARE[op], a, b),)
        return super().compare(a, b, op)

    def test(self, value: Any) -> Answer:
        if id(value) in self.lifted:
            return (self._compute(operator.truth, (value,), bool(value)),)
        return super().test(value)

    def not_(self, value: Any) -> Answer:
        if id(value) in self.lifted:
            return (not self._compute(operator.truth, (value,), bool(value)),)
        return super().not_(value)

    def is_(self, a: Any, b: Any) -> Answer:
        changing = id(a) in self.lifted or id(b) in self.lifted
        if not changing and id(a) not in self.originals and id(b) not in self.originals:
            return super().is_(a, b)
        if a is b:
            return (True,)
        if not self._are_same(a, b) if changing else not is_same(a, b):
            return (False,)
        if type(a) is int and a in SMALL_INTS:
            self._compute(_is_small, (a,), True)
            return (True,)
        # The run goes on with the answer for the program's own objects.
        self.spoiled = Void("dynamic", "whether two equal numbers are one object")
        return (self.originals.get(id(a), a) is self.originals.get(id(b), b),)

    def _are_same(self, a: Any, b: Any) -> bool:
        numbers = type(a) is type(b) and self._is_arithmetic((a, b))
        return numbers and bool(self._compute(is_same, (a, b), is_same(a, b)))

    def _own_divmod(self, args: tuple[Any, ...]) -> Answer:
        if not self.lifted or not self._is_arithmetic(args) or len(args) != 2 or args[1] == 0:
            return super()._own_divmod(args)
        parts = (operator.floordiv, operator.mod)
        return (tuple(self._compute(part, args, part(*args)) for part in parts),)

    def _own_abs(self, args: tuple[Any, ...]) -> Answer:
        return None if self._is_arithmetic(args) else super()._own_abs(args)

    def call(self, f: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Answer:
        if self.lifted and not kwargs and id(f) in FUNCTIONS and self._is_arithmetic(args):
            answer = self._computed(FUNCTIONS[id(f)], args)
            if answer is not None:
                return answer
        return super().call(f, args, kwargs)

    # ------------------------------------------------------------ tensors

    def refs(self, value: Any) -> Any:
        if id(value) in self.lifted and (type(value) is int or type(value) is float):
            if self.scalar_dtype:
                return self._scalar(value, self.scalar_dtype)
            if self.takes_sizes and type(value) is int and (name := self._size_name(value)):
                return Ref(name)
            self.settle(value)
            return value
        return super().refs(value)

    def _size_name(self, value: int) -> str:
        """The graph's number for a lifted int that is a size or a position; "" for none."""
        variation = self.variation
        if variation is None or variation.no_size_numbers:
            return ""
        if variation.no_gradients and variation.grad_mode:
            return ""
        number = self.lifted[id(value)]
        if number not in self.size_numbers:
            if self.tests_later:
                raise Void("dynamic", self.tests_later)
            variation.has_size_numbers = True
            self.size_numbers[number] = (f"z{len(self.size_numbers)}", value)
        return self.size_numbers[number][0]

    def _scalar(self, value: Any, dtype: str) -> Ref:
        """The graph's input for a lifted number."""
        position = self.number_program.operand(self.lifted[id(value)], dtype)
        if position == len(self.scalar_names):
            self.scalar_names.append(f"s{position}")
        return Ref(self.scalar_names[position])

    def scalar_inputs(self) -> list[tuple[str, TensorMeta]]:
        """The graph's inputs behind its tensors."""
        dtypes = self.number_program.dtypes
        return [
            (name, TensorMeta((), (), dtype))
            for name, dtype in zip(self.scalar_names, dtypes, strict=True)
        ]

    def operation(
        self, kind: str, target: str, f: Callable[..., Any], args: Any, kwargs: Any
    ) -> Answer:
        if not self.lifted:
            return super().operation(kind, target, f, args, kwargs)
        name = _plain_name(target)
        if self._has_factor(name, args, kwargs):
            return self._multiplied(kind, target, f, args, kwargs)
        if name in _SCALARS and not kwargs and len(args) == 2:
            self.scalar_dtype = self._dtype_for(name, args)
        self.takes_sizes = name in _SIZED
        try:
            return super().operation(kind, target, f, args, kwargs)
        finally:
            self.scalar_dtype, self.takes_sizes = "", False

    def _dtype_for(self, name: str, args: Any) -> str:
        """As which dtype the number of (tensor, number) or (number, tensor) computes what the
        number would; "" where none does."""
        first, second = args
        tensor, number = (first, second) if type(first) in PLAIN_TENSORS else (second, first)
        if type(tensor) not in PLAIN_TENSORS or id(number) not in self.lifted:
            return ""
        dtype = _EXACT_DTYPES.get(tensor.dtype, "")
        if dtype == "int64" and (type(number) is float or name in _REAL_ONLY):
            return ""
        return dtype

    def _has_factor(self, name: str, args: Any, kwargs: Any) -> bool:
        """Whether an operation of plain float tensors has a lifted number as its only option."""
        if name not in _FACTORS or not kwargs or len(kwargs) != 1:
            return False
        option, operations = _FACTORS[name]
        if id(kwargs.get(option)) not in self.lifted or len(args) != len(operations) + 1:
            return False
        plain = all(type(a) in PLAIN_TENSORS for a in args)
        dtypes = {a.dtype if plain else None for a in args}
        return dtypes in ({torch.float32}, {torch.float64})

    def _multiplied(
        self, kind: str, target: str, f: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Answer:
        """`x.add(y, alpha=n)` as `x.add(y * n)`; the run itself does what the program says."""
        option, (*inner, last) = _FACTORS[_plain_name(target)]
        first, second, *others = [self.refs(a) for a in args]
        factor = self._scalar(kwargs[option], _EXACT_DTYPES[args[0].dtype])
        value = self._silent("_operator.mul", (second, factor))
        for name, operand in zip(inner, others, strict=True):
            value = self._silent(f"torch.{name}", (value, operand))
        method = f"{last}_" if target.endswith("_") else last
        token: Any = ("call_method", method, (first, value), {})
        return (OPERATION, f, args, kwargs, self.after_operation, token)

    def _silent(self, target: str, args: tuple[Any, ...]) -> Ref:
        """An operation of the graph that the run does as a part of another."""
        name = self.append_operation("call_function", target, args, {})
        if not torch.is_grad_enabled():
            self.no_grad.add(name)
        return Ref(name)
