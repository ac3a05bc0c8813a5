"""The recorder's memory: what is known, what is fresh, what was recorded so far.

In: facts from the event handlers. Out: guards, operations, inputs, effects, in program order.
Invariant: a value is a constant, a tensor with a name, known by a source, or fresh; a
value that is none of these voids the recording. Nothing here runs user code.
"""

from __future__ import annotations

import collections
import sys
import types
from dataclasses import dataclass
from typing import Any

import torch

from accel import runtime
from accel.capture import branches
from accel.capture.deep_guards import KeyOrder, SameBase, SameConstant, SameMembers
from accel.capture.steps import Answer, Void
from accel.capture.streams import Waiting
from accel.capture.values import (
    BOUND_C_METHODS,
    BUILTIN_CONTAINERS,
    BUILTIN_ITERATORS,
    CONSTANT_BASES,
    CONSTANT_TYPES,
    FUNCTION_TYPES,
    HEAP_TYPE,
    IMMUTABLE_TYPE,
    PLAIN_TENSORS,
    SPECIAL_NAMES,
    TRANSIENT_TYPES,
    VALUE_TYPES,
    class_lookup,
    flags_of,
    has_finaliser,
    has_receiver,
    holds_numpy,
    is_closure,
    is_constant,
    is_fixed,
    is_made_anew,
    is_python_class,
    is_static,
)
from accel.capture.variation import Variation
from accel.casts import Autocast
from accel.guards import GuardSet
from accel.sources import Source, constant
from accel.trace import Operation, TensorMeta

ABSENT = object()  # what lies where nothing lies
_TORCH_FILES = torch.__file__.rpartition("/")[0] + "/"


@dataclass
class Effect:
    """A write to something that existed before the call, replayed at commit.

    `kind` is a row of `accel.capture.results.EFFECTS`; `target` is the object's source
    (None for effects on the process, such as print).
    """

    kind: str
    target: Source | None
    operands: tuple[Any, ...]


def running_frame() -> types.FrameType:
    """The innermost frame that is not accel's own."""
    frame = branches.program_frame()
    if frame is None:
        raise Void("foreign_frame", "no frame of the program's")
    return frame


def user_location() -> str:
    """`file:line` of the innermost frame that is not accel's own."""
    frame = branches.program_frame()
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else "?"


def reading_location() -> str:
    """`file:line` of the innermost frame that is neither accel's nor torch's own; where there
    is none, of the innermost that is not accel's."""
    frame: types.FrameType | None = sys._getframe(1)
    torchs: types.FrameType | None = None
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(_TORCH_FILES):
            torchs = torchs or frame
        elif not path.startswith(branches.PACKAGE_FILES):
            break
        frame = frame.f_back
    frame = frame or torchs
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else ""


def version(tensor: torch.Tensor) -> int | None:
    """The tensor's version counter; None for inference tensors, which have none."""
    return None if tensor.is_inference() else tensor._version


def as_it_is(tensor: torch.Tensor) -> Any:
    """What a guard compares tensors with: the program may change this one's size or kind later."""
    try:
        return runtime.native.TensorMetaGuard(tensor)
    except ValueError:
        return tensor  # making the guard says why it cannot be


class RecorderState:
    """Facts of one recording. Holds known objects until the recording ends, tensors weakly."""

    variation: Variation | None = None

    def __init__(self) -> None:
        self.guards = GuardSet(reading_location)
        self.known: dict[int, tuple[object, Source]] = {}
        self.fresh: dict[int, object] = {}
        self.frozen: dict[int, object] = {}
        self.cells: dict[int, tuple[object, Source]] = {}
        # What was hashed or compared as the object that it is.
        self.told_apart: dict[int, object] = {}
        self.noted_classes: set[type] = set()
        # Of constants that are guarded by value: by id, the constant and where it was read.
        self.read_at: dict[int, tuple[Any, dict[int, Source]]] = {}
        self.written: dict[tuple[int, Any], int] = {}  # places, and what the trace put there
        self.writes_seen: dict[int, Source] = {}
        # Of written lists and deques the length, of dicts the keys, of sets the members.
        self.before: dict[int, Any] = {}
        # Of written lists and deques, for each item the position that it had when the call began,
        # or ~id of what the trace put there.
        self.origins: dict[int, list[int]] = {}
        self.table = runtime.native.TensorTable()
        self.names: list[str] = []
        self.inputs: list[tuple[str, Source, TensorMeta]] = []
        self.device: torch.device | None = None  # of its inputs and what is made of them
        self.inputless: set[str] = set()  # operations that no input goes into
        # Of results on a GPU that do not lie by rows, the strides: random numbers follow memory.
        self.layouts: dict[str, tuple[int, ...]] = {}
        self.operations: list[Operation] = []
        self.output_tensors: list[torch.Tensor] = []
        self.speculations: list[tuple[str, bool]] = []
        self.assumed: list[tuple[branches.Place, bool]] = []  # where, for each of them
        self.assumes_all = False  # also where branches are known to go both ways
        self.effects: list[Effect] = []
        self.waiting: Waiting | None = None  # what was printed, for the end of the call
        # Those that were printed to, and whether more than ASCII.
        self.streams: dict[tuple[int, bool], Source] = {}
        self.voided: Void | None = None
        self.location = ""
        self.constants: dict[int, tuple[object, Source]] = {}
        self.versions: dict[str, int | None] = {}
        self.grad_inputs: list[str] = []  # names of inputs that require grad
        self.no_grad: set[str] = set()  # names of operations that ran with grad mode off
        self.differentiable = False  # autograd recorded something
        # Regions of autocast: as graphs have them; those that are open; what it is without them.
        self.casts: list[tuple[str, Autocast | None]] = []
        self.cast_regions: list[Autocast | None] = []
        self.cast_outside: Autocast | None = None
        self.casts_unsettled = False  # something about them was called since the last operation

    # ------------------------------------------------------------- sources

    def constant_source(self, value: object) -> Source:
        """The source of an object that the guards themselves keep alive."""
        found = self.constants.get(id(value))
        if found is None:
            found = self.constants[id(value)] = (value, constant(value))
        return found[1]

    def source_of(self, value: object) -> Source | None:
        found = self.known.get(id(value))
        return found[1] if found is not None else None

    def assume_static(self, value: object) -> Source:
        """`value`'s identity is implied by a guard made elsewhere; it may be loaded as itself."""
        found = self.known.get(id(value))
        if found is None:
            found = self.known[id(value)] = (value, self.constant_source(value))
            self.note_class(type(value))
        else:  # where it was read before, another may lie the next time
            self.pin(value)
        return found[1]

    def track(self, value: Any, source: Source) -> None:
        """`value` was read at `source`, which the trace itself has not written."""
        kind = type(value)
        if kind in CONSTANT_TYPES or ((kind is tuple or kind is slice) and is_constant(value)):
            if holds_numpy(value):
                self.guards.add(source, "CALL", SameConstant(value))
            else:
                self.guards.add(source, "EQUALS", value)
            if kind in VALUE_TYPES:
                self.read_at.setdefault(id(value), (value, {}))[1][id(source)] = source
            return
        found = self.known.get(id(value))
        if found is not None:
            if found[1] is not source:
                if is_fixed(value):
                    self.guards.add(source, "IS", value)
                else:
                    self.guards.add(source, "SAME", found[1])
            return
        if kind in PLAIN_TENSORS:
            if self.table.get(value) is not None:
                raise Void("unseen_write", str(source))
            self.guard_tensor(value, source)
        elif is_made_anew(value) and (is_closure(value) or self.is_own_variable(source)):
            # What it closes over is guarded as it is read.
            self.guards.add(source, "TYPE_IS", kind)
            self.guards.add(source.child("code"), "IS", value.__code__)
        elif kind in BOUND_C_METHODS and has_receiver(value):
            self._track_method(value, source)
        elif is_static(value):
            self.guards.add(source, "IS", value)
            self.note_class(kind)
        else:
            if id(value) in self.fresh:
                raise Void("unseen_write", str(source))
            self.guards.add(source, "TYPE_IS", kind)
            self.note_class(kind)
            if issubclass(kind, CONSTANT_BASES):
                self.guards.add(source, "CALL", SameBase(value))
        self.known[id(value)] = (value, source)

    def note_class(self, kind: type) -> None:
        """What instances of a Python class do, and classes of a Python metaclass, hangs on special
        methods, also on those that it does not have yet; most are asked for by C code, unseen."""
        if kind in self.noted_classes:
            return
        self.noted_classes.add(kind)
        if flags_of(kind) & (HEAP_TYPE | IMMUTABLE_TYPE) == HEAP_TYPE:
            for name, value in runtime.native.class_attributes(kind, SPECIAL_NAMES):
                self.guards.add_class_attribute(kind, name, value)

    def is_own_variable(self, source: Source) -> bool:
        """Whether the running function itself may have put there what it defines at each call."""
        return False

    def _track_method(self, method: Any, source: Source) -> None:
        """A method of C code bound to an object, `losses.append`: made anew at each call, often.
        What counts is whose method it is."""
        found = class_lookup(type(method.__self__), method.__name__)
        if type(found) is types.MethodDescriptorType:
            self.guards.add(source, "TYPE_IS", type(method))
            self.guards.add(source.child("attribute", "__name__"), "EQUALS", method.__name__)
        else:
            self.guards.add(source, "IS", method)
        self.track_receiver(method, source)

    def track_receiver(self, method: Any, source: Source) -> None:
        """Through a bound method of C code, the object that it is bound to is read and written."""
        if type(method) in BOUND_C_METHODS and has_receiver(method):
            self.track(method.__self__, source.child("bound_self"))

    # ------------------------------------------------------------- tensors

    def guard_tensor(self, tensor: torch.Tensor, source: Source) -> None:
        self.guards.add(source, "TENSOR", as_it_is(tensor))

    # ---------------------------------------------------------- containers

    def consume(self, container: Any, in_order: bool = True) -> None:
        """C code is about to read all of a container: guard its size and its elements, and, unless
        that does not matter, their order in a set."""
        source = self.source_of(container)
        kind = type(container)
        if id(container) in self.frozen:
            return
        if source is None:
            if in_order and issubclass(kind, (set, frozenset)):  # as their addresses are
                for member in kind.__iter__(container):
                    self.pin_address(member)
            return
        self.reads(container)
        if issubclass(kind, tuple):
            self.guards.add(source, "LEN", len(container))
            for i, v in enumerate(tuple.__iter__(container)):
                self.track(v, source.child("tuple_item", i))
        elif issubclass(kind, (list, collections.deque)):
            self.length_before(container, source)
            for i in range(c_length(container)):
                self.sequence_item(container, i, source)
        elif issubclass(kind, dict):
            keys = self.keys_before(container)
            self.check_growth(source, len(keys))
            for key in keys:
                self.check_key(key)
            self.guards.add(source, "DICT_KEYS", keys)
            if issubclass(kind, collections.OrderedDict) and len(keys) > 1:
                # It keeps an order of its own, which the dict below it does not show.
                self.guards.add(source, "CALL", KeyOrder(keys))
            for key in keys:
                value = dict.get(container, key, ABSENT)
                if not self.is_written(container, key, value):
                    self.track(value, source.child("dict_item", key))
        elif issubclass(kind, (set, frozenset)):
            if in_order and id(container) in self.writes_seen:
                raise Void("read_after_write", str(source))
            members = frozenset(self.before.get(id(container), container))
            if not all((is_constant(m) or is_static(m)) and not holds_numpy(m) for m in members):
                raise Void("container", "a set of objects")
            self.guards.add(source, "SET_EQUALS", members)
            if in_order and len(members) > 1:
                self.guards.add(source, "CALL", SameMembers(tuple(kind.__iter__(container))))
        elif kind in _DICT_VIEWS or kind in BUILTIN_ITERATORS or kind in BUILTIN_CONTAINERS:
            raise Void("container", f"a {kind.__name__} from outside")

    def consume_deeply(self, value: Any, depth: int = 0) -> None:
        """C code is about to compare, print or sort `value`: everything in it counts."""
        kind = type(value)
        if kind in CONSTANT_TYPES or is_static(value):
            self.pin_function(value)
            return
        if depth > 20:
            raise Void("container", "too deeply nested")
        if kind in PLAIN_TENSORS or issubclass(kind, torch.Tensor):
            raise Void("value_from_tensor", "comparison or text of tensors in a container")
        if issubclass(kind, (tuple, list, dict, set, frozenset, collections.deque)):
            self.consume(value, in_order=False)
            if issubclass(kind, dict):
                for k, v in dict.items(value):
                    self.consume_deeply(k, depth + 1)
                    self.consume_deeply(v, depth + 1)
            elif kind in BUILTIN_CONTAINERS or issubclass(kind, tuple):
                for v in value:
                    self.consume_deeply(v, depth + 1)
            return
        if kind in BUILTIN_CONTAINERS and kind is not slice:
            self.consume(value)
            items = value.items() if kind is types.MappingProxyType else value
            for part in list(items):
                self.consume_deeply(part, depth + 1)
            return
        if id(value) in self.fresh or id(value) in self.known:
            self.check_own_code(value)
            self.tell_apart(value)
            return  # its class's own methods run in frames that are watched
        if kind is slice or kind in TRANSIENT_TYPES:
            self.tell_apart(value)
            return
        raise Void("unknown_value", f"a {kind.__name__}")

    def pin(self, value: Any) -> None:
        """The trace hangs on which object this is: it is looked up by identity."""
        source = self.source_of(value)
        if source is not None and source.kind != "constant":
            self.guards.add(source, "IS", value)

    def pin_function(self, value: Any) -> None:
        """C code compares or hashes `value`: as an object, if it is a function."""
        if is_made_anew(value):
            self.pin(value)

    def _identified_by(self, value: Any) -> tuple[Any, ...] | None:
        """The objects by which C code hashes and compares a tuple, frozenset or bound method; None
        for what is compared as it is."""
        kind = type(value)
        if issubclass(kind, (tuple, frozenset)):
            self.consume(value)
            return tuple(kind.__iter__(value))
        if kind is types.MethodType or (kind in BOUND_C_METHODS and has_receiver(value)):
            self.read_method(value)
            return (value.__self__,)
        return None

    def tell_apart(self, value: Any) -> None:
        """C code hashes or compares `value` as the object that it is: whether it is one of those
        that were told apart already is a fact of the trace."""
        kind = type(value)
        if kind in CONSTANT_TYPES:
            return
        if (parts := self._identified_by(value)) is not None:
            for part in parts:
                self.tell_apart(part)
        elif is_static(value):
            self.pin_function(value)
        elif id(value) in self.known:
            for name in ("__hash__", "__eq__"):
                self.guards.add_class_attribute(kind, name, class_lookup(kind, name))
            self.told_apart[id(value)] = value

    def pin_address(self, value: Any) -> None:
        """A number or an order is about to be made of where `value` lies in memory.

        Errors: Void for an object that the trace itself made, which lies elsewhere each time.
        """
        kind = type(value)
        if kind in CONSTANT_TYPES:
            return
        if (parts := self._identified_by(value)) is not None:
            for part in parts:
                self.pin_address(part)
        elif id(value) in self.known or is_static(value):
            self.tell_apart(value)
            if type(class_lookup(kind, "__hash__")) is not types.FunctionType:
                self.pin(value)
        elif class_lookup(kind, "__hash__") is object.__hash__ or kind in PLAIN_TENSORS:
            raise Void("text_of_object", f"the hash of a {kind.__name__}")
        else:
            self.check_value(value, "what is hashed")

    def read_method(self, method: Any) -> None:
        """A bound method's object, and its function, are about to be read."""
        source = self.source_of(method)
        if source is None:
            return
        self.track_receiver(method, source)
        if type(method) is types.MethodType:
            self.track(method.__self__, source.child("bound_self"))
            self.track(method.__func__, source.child("bound_function"))

    def hashed(self, value: Any) -> Answer:
        """A key of a dict, or a member of a set, that the trace makes."""
        self.tell_apart(value)
        return None

    def check_own_code(self, value: Any) -> None:
        """An object from outside that C code is about to read: only classes written in Python
        read their state in frames that are watched."""
        if id(value) in self.known and not is_python_class(type(value)) and not is_static(value):
            raise Void("opaque_attribute", f"the contents of a {type(value).__name__}")

    def check_key(self, key: Any) -> None:
        if not (is_constant(key) or is_static(key)) or holds_numpy(key):
            raise Void("container", f"a dict key of type {type(key).__name__}")
        self.pin_function(key)

    def reads(self, container: Any) -> None:
        """A container that the trace has written can no longer be guarded as a whole, unless
        it is known what it was."""
        if id(container) in self.writes_seen and id(container) not in self.before:
            raise Void("read_after_write", str(self.source_of(container)))

    def length_before(self, container: Any, source: Source) -> int:
        """The length that a known list had when the call began, which is guarded."""
        length: int = self.before.get(id(container), c_length(container))
        self.guard_length(source, length)
        return length

    def guard_length(self, source: Source, length: int) -> None:
        self.check_growth(source, length)
        self.guards.add(source, "LEN", length)

    def check_growth(self, source: Source, length: int) -> None:
        """Errors: Void for a container that grows from call to call."""
        if self.variation is not None and self.variation.grows(source, length):
            raise Void("container", f"{source}, which grows from call to call")

    @staticmethod
    def item_of(container: Any, index: int) -> Any:
        """Item `index` of a list, deque or tuple, whatever a Python class says about it."""
        return _base(container).__getitem__(container, index)

    def sequence_item(self, container: Any, index: int, source: Source) -> None:
        """Item `index` of a known list or deque is read; the trace may have put it there.

        Errors: Void when somebody else changed it after the trace did.
        """
        value = self.item_of(container, index)
        self.length_before(container, source)
        origins = self.origins.get(id(container))
        if origins is not None and len(origins) != c_length(container):
            raise Void("foreign_frame", f"{source} was written by others")
        origin = index if origins is None else origins[index]
        if origin >= 0:
            self.track(value, source.child(_ITEM_LOADS[_base(container)], origin))
        elif ~origin != id(value):
            raise Void("foreign_frame", f"{source} was written by others")

    def check_replaced_item(self, container: Any, index: int, source: Source) -> None:
        """`check_replaced` for an item of a known list or deque."""
        origins = self.origins.get(id(container))
        origin = index if origins is None else origins[index]
        path = source.child(_ITEM_LOADS[_base(container)], origin) if origin >= 0 else None
        self.check_replaced(self.item_of(container, index), path)

    def keys_before(self, container: Any) -> tuple[Any, ...]:
        """The keys that a known dict had when the call began."""
        keys: tuple[Any, ...] = self.before.get(id(container), tuple(dict.keys(container)))
        return keys

    def is_written(self, owner: object, key: Any, value: object) -> bool:
        """Whether the trace itself has put there what lies there: `value`.

        Errors: Void when somebody else did after it (a finaliser, another thread).
        """
        put = self.written.get((id(owner), key))
        if put is None:
            return False
        if put != id(value):
            raise Void("foreign_frame", f"{key!r} was written by others")
        return True

    def check_replaced(self, old: object, source: Source | None = None) -> None:
        """What a store is about to replace, at `source` unless it was tracked, may die of it.

        Errors: Void when code would run then: later, while a recording or a commit holds it.
        """
        if source is not None:
            self.guards.add(source, "TYPE_IS", type(old))
            self.note_class(type(old))
        if has_finaliser(old):
            raise Void("finaliser", "it is replaced by a store")

    def effect(self, kind: str, target: Any, *operands: Any) -> None:
        """A write to a known object: it happens now, and again at each commit."""
        source = self.source_of(target)
        assert source is not None
        if id(target) not in self.writes_seen:
            base = _base(target)
            if base in _ITEM_LOADS:
                self.before[id(target)] = c_length(target)
                self.origins[id(target)] = list(range(c_length(target)))
            elif base is dict or base is set:
                self.before[id(target)] = tuple(base.__iter__(target))
        self.writes_seen[id(target)] = source
        self.effects.append(Effect(kind, source, operands))

    # ------------------------------------------------------------- results

    def check_value(self, value: Any, what: str = "") -> None:
        """A value that C code gave: of known origin, or the recording is void."""
        kind = type(value)
        if kind in CONSTANT_TYPES:
            return
        if kind in PLAIN_TENSORS:
            if self.table.get(value) is None and id(value) not in self.known:
                raise Void("unknown_tensor", what)
            return
        if (
            id(value) in self.known
            or id(value) in self.fresh
            or kind in BUILTIN_CONTAINERS
            or kind in BUILTIN_ITERATORS
            or kind in TRANSIENT_TYPES
            or kind in FUNCTION_TYPES
            or issubclass(kind, BaseException)
        ):
            return
        if is_static(value):
            self.assume_static(value)
            return
        raise Void("unknown_value", f"{what} gave a {kind.__name__}".strip())

    def checked(self, value: Any, what: Any) -> Answer:
        """`check_value` as a step's post."""
        self.check_value(value, what if type(what) is str else "")
        return None

    def adopt_frozen(self, value: Any, _what: Any) -> Answer:
        """Post of a fold whose result nobody else holds: all of it is constant."""
        self.adopt_constant(value, None)
        if type(value) not in CONSTANT_TYPES and not is_static(value):
            self.frozen[id(value)] = value
        return None

    def adopt_constant(self, value: Any, _what: Any) -> Answer:
        """Post of a fold: the result is the same object at every replay."""
        if type(value) in CONSTANT_TYPES:
            return None
        if not issubclass(type(value), torch.Tensor):
            self.assume_static(value)
        elif id(value) in self.known:
            self.pin(value)
        elif self.table.get(value) is None:
            raise Void("unknown_tensor", "result of a folded call")
        return None


# How guards reach the items of what a program indexes and changes.
_ITEM_LOADS: dict[type, str] = {list: "list_item", collections.deque: "deque_item"}
_BASES = (list, dict, tuple, collections.deque, set, frozenset)


def _base(container: Any) -> Any:
    """The builtin class whose C code keeps what a container holds; None for other objects."""
    return next((base for base in _BASES if issubclass(type(container), base)), None)


def c_length(container: Any) -> int:
    """The length of a builtin container, whatever a Python class says about it."""
    base = _base(container)
    return int(base.__len__(container)) if base is not None else len(container)


_DICT_VIEWS = frozenset({type({}.keys()), type({}.values()), type({}.items())})
