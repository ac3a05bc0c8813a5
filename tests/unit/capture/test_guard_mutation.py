"""Guard mutation: for every kind of guard a change that must fail it and one that must pass.

Each case is a function that is recorded with such a guard; `keep` changes what the guard does not
look at, `change` what it looks at. The kinds come from the tables of accel: a new one without a
case here fails.
"""

from __future__ import annotations

import abc
import ast
import collections
import contextvars
import copy
import functools
import io
import logging
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch.distributions import kl

import accel
from accel import driver
from accel.capture import state
from accel.guards import CHECKS
from accel.roots import Root
from accel.sources import LOADS, Source

# (function, arguments) and two changes, each of which gives the arguments of the next call.
Case = tuple[Callable[..., Any], tuple[Any, ...], Callable[[], Any], Callable[[], Any]]
X = torch.ones(3)


class Box:
    """An object with an instance dict."""

    rate = 1.0

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Slotted:
    __slots__ = ("rate",)


def setter(target: Any, name: str, value: Any) -> Callable[[], tuple[Any, ...]]:
    def change() -> tuple[Any, ...]:
        setattr(target, name, value)
        return (X,)

    return change


def doing(action: Callable[[], Any], *args: Any) -> Callable[[], tuple[Any, ...]]:
    def change() -> tuple[Any, ...]:
        action()
        return args or (X,)

    return change


def giving(*args: Any) -> Callable[[], tuple[Any, ...]]:
    return lambda: args


def plus(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def minus(x: torch.Tensor) -> torch.Tensor:
    return x - 1


def case_equals() -> Case:
    box = Box(flag="a", other=1)
    f = lambda x: x * 2 if box.flag == "a" else x  # noqa: E731
    return f, (X,), setter(box, "other", 2), setter(box, "flag", "b")


def case_type_is() -> Case:
    class Loud(Box):
        def scaled(self, x: torch.Tensor) -> torch.Tensor:
            return x * 3

    f = lambda box, x: box.scaled(x)  # noqa: E731
    return f, (Box(), X), giving(Box(), X), giving(Loud(), X)


def case_is() -> Case:
    box = Box(function=plus, other=plus)
    f = lambda x: box.function(x)  # noqa: E731
    return f, (X,), setter(box, "other", minus), setter(box, "function", minus)


def case_dict_absent() -> Case:
    options: dict[str, Any] = {"a": 1}
    f = lambda x: x * 2 if "b" in options else x + 1  # noqa: E731
    add = options.__setitem__
    return f, (X,), doing(lambda: add("c", 1)), doing(lambda: add("b", 1))


def case_dict_keys() -> Case:
    weights = {"a": torch.ones(3), "b": torch.ones(3)}
    f = lambda x: x * sum(weights.values())  # noqa: E731
    add = weights.__setitem__
    keep = doing(lambda: add("a", torch.full((3,), 2.0)))
    return f, (X,), keep, doing(lambda: add("c", torch.ones(3)))


def case_len() -> Case:
    items = [torch.ones(3), torch.ones(3)]
    f = lambda x: x * len(items)  # noqa: E731
    keep = doing(lambda: items.__setitem__(0, torch.zeros(3)))
    return f, (X,), keep, doing(lambda: items.append(X))


def case_set_equals() -> Case:
    names = {"a", "b"}
    f = lambda x: x * len([n for n in sorted(names)])  # noqa: E731
    keep = doing(lambda: (names.discard("a"), names.add("a")))
    return f, (X,), keep, doing(lambda: names.add("c"))


def case_same() -> Case:
    f = lambda a, b: a * b  # noqa: E731
    y = torch.ones(3)
    return f, (y, y), giving(X, X), giving(X, torch.full((3,), 2.0))


def case_not_same() -> Case:
    a, b = Box(rate=1.0), Box(rate=2.0)

    def f(one: Box, two: Box, x: torch.Tensor) -> torch.Tensor:
        one.rate = x.dim() + 1.0
        return x * two.rate

    return f, (a, b, X), giving(Box(rate=9.0), Box(rate=2.0), X), giving(b, b, X)


def case_type_attrs() -> Case:
    class Own(Box):
        rate = 2.0
        unread = 1.0

    box = Own()
    f = lambda x: x * box.rate  # noqa: E731
    return f, (X,), setter(Own, "unread", 2.0), setter(Own, "rate", 3.0)


def case_tensor() -> Case:
    f = lambda x: torch.relu(x)  # noqa: E731
    return f, (X,), giving(torch.zeros(3)), giving(torch.ones(3, dtype=torch.float64))


def case_no_overlap() -> Case:
    f = lambda a, b: a.add_(1) * b  # noqa: E731
    base = torch.ones(8)
    keep = giving(base[:3], base[5:])
    return f, (torch.ones(3), torch.ones(3)), keep, giving(base[:3], base[2:5])


def case_dict() -> Case:
    box = Box(rate=2.0)
    f = lambda x: x * box.rate  # noqa: E731
    return f, (X,), setter(box, "other", 1), setter(box, "rate", 3.0)


def case_dict_item() -> Case:
    options: dict[str, Any] = {"a": True}
    f = lambda x: x * 2 if options["a"] else x + 1  # noqa: E731
    add = options.__setitem__
    return f, (X,), doing(lambda: add("b", 1)), doing(lambda: add("a", False))


def case_list_item() -> Case:
    flags = [True, False]
    f = lambda x: x * 2 if flags[0] else x + 1  # noqa: E731
    put = flags.__setitem__
    return f, (X,), doing(lambda: put(1, True)), doing(lambda: put(0, False))


def case_deque_item() -> Case:
    flags = collections.deque([True, False])
    f = lambda x: x * 2 if flags[0] else x + 1  # noqa: E731
    put = flags.__setitem__
    return f, (X,), doing(lambda: put(1, True)), doing(lambda: put(0, False))


def case_tuple_item() -> Case:
    f = lambda pair, x: pair[0](x)  # noqa: E731
    return f, ((plus, []), X), giving((plus, [1]), X), giving((minus, []), X)


def case_cell() -> Case:
    flag, other = True, 0

    def f(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if flag else x + 1

    def change(value: bool) -> None:
        nonlocal flag
        flag = value

    def unrelated() -> None:
        nonlocal other
        other += 1

    return f, (X,), doing(unrelated), doing(lambda: change(False))


def case_member() -> Case:
    box = Slotted()
    box.rate = "a"
    f = lambda x: x * 2 if box.rate == "a" else x + 1  # noqa: E731
    return f, (X,), setter(box, "rate", "".join(["a"])), setter(box, "rate", "b")


def case_code() -> Case:
    def inner(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    f = lambda x: inner(x)  # noqa: E731
    same = types.FunctionType(inner.__code__, inner.__globals__)
    keep = doing(lambda: setattr(inner, "note", same))
    return f, (X,), keep, setter(inner, "__code__", minus.__code__)


def case_defaults() -> Case:
    def inner(x: torch.Tensor, rate: float = 2.0) -> torch.Tensor:
        return x * rate

    f = lambda x: inner(x)  # noqa: E731
    return f, (X,), setter(inner, "note", 1), setter(inner, "__defaults__", (3.0,))


def case_kwdefaults() -> Case:
    def inner(x: torch.Tensor, *, rate: str = "a") -> torch.Tensor:
        return x * 2 if rate == "a" else x + 1

    f = lambda x: inner(x)  # noqa: E731
    keep = setter(inner, "__kwdefaults__", {"rate": "a"})
    return f, (X,), keep, setter(inner, "__kwdefaults__", {"rate": "b"})


def function_in(namespace: dict[str, Any]) -> types.FunctionType:
    """A lambda, which is known by its code: it may be made anew at each call."""
    code = compile("lambda x: x * RATE", __file__, "eval").co_consts[0]
    return types.FunctionType(code, namespace)


def case_globals() -> Case:
    """One code in two namespaces."""
    one, two = {"RATE": 2.0}, {"RATE": 3.0}
    f = lambda g, x: g(x)  # noqa: E731
    g = function_in(one)
    same, other = (types.FunctionType(g.__code__, names) for names in (one, two))
    return f, (g, X), giving(same, X), giving(other, X)


def scaler(rate: str) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x * 2 if rate == "a" else x + 1


def case_closure() -> Case:
    f = lambda g, x: g(x)  # noqa: E731
    return f, (scaler("a"), X), giving(scaler("a"), X), giving(scaler("b"), X)


def case_bound_self() -> Case:
    box = Box(method=Box(flag="a").again)
    f = lambda x: box.method(x)  # noqa: E731
    keep = setter(box, "method", Box(flag="a").again)
    return f, (X,), keep, setter(box, "method", Box(flag="b").again)


def again(self: Box, x: torch.Tensor) -> torch.Tensor:
    return x * 2 if self.__dict__["flag"] == "a" else x + 1


Box.again = again  # type: ignore[attr-defined]


def case_bound_function() -> Case:
    inner = Box(flag="a")
    box = Box(method=inner.again)  # type: ignore[attr-defined]
    f = lambda x: box.method(x)  # noqa: E731
    keep = setter(box, "method", inner.again)  # type: ignore[attr-defined]
    return f, (X,), keep, setter(box, "method", inner.scaled)


def case_attribute() -> Case:
    """The contents of a partial object, which C code holds."""

    def two(rate: str, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if rate == "a" else x + 1

    f = lambda g, x: g(x)  # noqa: E731
    partial = functools.partial
    return f, (partial(two, "a"), X), giving(partial(two, "a"), X), giving(partial(two, "b"), X)


def case_constant() -> Case:
    """A global: found in a namespace that the guards themselves hold."""
    namespace: dict[str, Any] = {"RATE": "a", "OTHER": 1}
    text = "def g(x): return x * 2 if RATE == 'a' else x + 1"
    code = compile(text, __file__, "exec").co_consts[0]
    g = types.FunctionType(code, namespace)
    put = namespace.__setitem__
    return g, (X,), doing(lambda: put("OTHER", 2)), doing(lambda: put("RATE", "b"))


def case_root() -> Case:
    f = lambda flag, x: x * 2 if flag else x + 1  # noqa: E731
    return f, (True, X), giving(True, torch.zeros(3)), giving(False, X)


# ---- deep guards, which are calls of these classes ----


def case_refers_to() -> Case:
    box, other = Box(flag="a"), Box(flag="b")
    holder = Box(box=box, ref=weakref.ref(box))
    f = lambda x: x * 2 if holder.box is holder.ref() else x + 1  # noqa: E731
    keep = setter(box, "unread", 1)
    return f, (X,), keep, setter(holder, "ref", weakref.ref(other))


def case_still_gives() -> Case:
    class Own:
        pass

    class Unrelated:
        pass

    kl.register_kl(Own, Own)(lambda p, q: None)

    def f(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if kl._dispatch_kl(Own, Own)(None, None) is None else x + 1

    keep = doing(lambda: kl.register_kl(Unrelated, Unrelated)(lambda p, q: None))
    return f, (X,), keep, doing(lambda: kl.register_kl(Own, Own)(lambda p, q: 1))


def case_still_memoised() -> Case:
    rates = {"a": 2.0}

    @functools.lru_cache
    def rate(name: str) -> float:
        return rates.get(name, 1.0)

    def change() -> None:
        rates["a"] = 3.0
        rate.cache_clear()

    return lambda x: x * rate("a"), (X,), doing(lambda: rate("b")), doing(change)


def case_plain_stream() -> Case:
    class Loud(io.StringIO):
        pass

    stream = Loud()

    def f(x: torch.Tensor) -> torch.Tensor:
        print("text", file=stream)
        return x + 1

    keep = doing(lambda: stream.write("more"))
    return f, (X,), keep, doing(lambda: setattr(stream, "write", lambda text: None))


def case_level_disabled() -> Case:
    logger = logging.getLogger("accel.test_guard_mutation")
    logger.setLevel(logging.WARNING)

    def f(x: torch.Tensor) -> torch.Tensor:
        logger.debug("called")
        return x * 2

    keep = doing(lambda: logger.setLevel(logging.ERROR))
    return f, (X,), keep, doing(lambda: logger.setLevel(logging.DEBUG))


def case_same_registry() -> Case:
    class Abstract(abc.ABC):  # noqa: B024
        pass

    class Own:
        pass

    own = Own()
    f = lambda x: x * 2 if isinstance(own, Abstract) else x + 1  # noqa: E731
    keep = doing(lambda: type("Derived", (Abstract,), {}))
    return f, (X,), keep, doing(lambda: Abstract.register(Own))


def case_lacks_attribute() -> Case:
    weight = torch.ones(3)
    f = lambda x: x * 2 if hasattr(weight, "scale") else x * weight  # noqa: E731
    return f, (X,), setter(weight, "other", 1), setter(weight, "scale", 1)


def case_same_constant() -> Case:
    box = Box(rate=numpy.float64(2.0))
    f = lambda x: x * float(box.rate)  # noqa: E731
    keep = setter(box, "rate", numpy.float64(2.0))
    return f, (X,), keep, setter(box, "rate", numpy.float64(3.0))


def case_key_order() -> Case:
    table = collections.OrderedDict([("a", 1.0), ("b", 2.0)])
    f = lambda x: x * list(table.items())[0][1]  # noqa: E731, RUF015
    keep = doing(lambda: table.move_to_end("b"))
    return f, (X,), keep, doing(lambda: table.move_to_end("a"))


def case_same_members() -> Case:
    numbers = {0, 8}  # in a table of eight places: the order is that of their arrival
    f = lambda x: x * [n + 1 for n in numbers][0]  # noqa: E731, RUF015
    keep = doing(lambda: (numbers.discard(8), numbers.add(8)))
    return f, (X,), keep, doing(lambda: (numbers.clear(), numbers.update((8, 0))))


def case_same_base() -> Case:
    class Rate(float):
        pass

    box = types.SimpleNamespace(rate=Rate(1.5))
    f = lambda x: x * 2 if box.rate > 1 else x + 1  # noqa: E731
    return f, (X,), setter(box, "rate", Rate(1.5)), setter(box, "rate", Rate(0.5))


def case_still_holds() -> Case:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("rate", default="a")
    f = lambda x: x * 2 if variable.get() == "a" else x + 1  # noqa: E731
    return f, (X,), doing(lambda: variable.set("a")), doing(lambda: variable.set("b"))


CASES: dict[str, Callable[[], Case]] = {
    name.removeprefix("case_"): case
    for name, case in list(globals().items())
    if name.startswith("case_")
}
# Tested where they come about: (file, a test's name in it).
ELSEWHERE = {
    "UNBOUND": ("tests/unit/native/test_guards.py", '"UNBOUND": ([("UNBOUND"'),
    "TENSOR_KIND": ("tests/unit/native/test_numbers.py", "TENSOR_KIND"),
    "CALL": ("", ""),  # each class by itself, below
}
DEEP_ELSEWHERE = {
    "NotMuchLarger": ("tests/unit/capture/test_streams.py", "test_open_sizes_with_text"),
}


def deep_guards() -> set[str]:
    """The classes that capture makes CALL guards of."""
    found = set()
    for path in Path(state.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            arguments = node.args
            if node.func.attr == "add" and len(arguments) == 3:
                kind, made = arguments[1:]
                if isinstance(kind, ast.Constant) and kind.value == "CALL":
                    assert isinstance(made, ast.Call) and isinstance(made.func, ast.Name)
                    found.add(made.func.id)
    return found


def snake(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).strip("_")


def test_every_kind_has_a_case() -> None:
    kinds = {name.lower() for name in CHECKS if name not in ELSEWHERE}
    kinds |= set(LOADS) | {snake(name) for name in deep_guards() - set(DEEP_ELSEWHERE)}
    assert kinds == set(CASES)
    for path, text in (*ELSEWHERE.values(), *DEEP_ELSEWHERE.values()):
        assert text in (Path(__file__).parents[3] / path).read_text() if path else True


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    accel.reset()
    yield
    accel.reset()


def kinds_of(root: Root) -> set[str]:
    """The kinds of guards, of loads and of deep guards of a root's variants."""
    found: set[str] = set()
    for installed in root.variants:
        guards = installed.recording.guards
        assert guards is not None
        for guard in guards.all():
            found.add(guard.check.lower())
            if guard.check == "CALL":
                found.add(snake(type(guard.operands[0]).__name__))
            source: Source | None = guard.source
            while source is not None:
                found.add(source.kind)
                source = source.base
    return found


@pytest.mark.parametrize("kind", CASES)
def test_guard(kind: str) -> None:
    f, args, keep, change = CASES[kind]()
    plain = types.FunctionType(
        f.__code__,
        f.__globals__,
        f.__name__,
        f.__defaults__,
        f.__closure__,  # type: ignore[attr-defined]
    )
    accel.optimize(f, backend="eager")
    assert driver.current is not None
    root = driver.current.roots.of_function(f)  # type: ignore[arg-type]

    def served(arguments: tuple[Any, ...]) -> bool:
        before = root.hits
        expected = plain(*copy.deepcopy(arguments)) if kind == "no_overlap" else plain(*arguments)
        assert torch.equal(f(*arguments), expected)
        return root.hits > before

    served(args)
    assert accel.wait()
    assert kind in kinds_of(root), root.reason
    assert served(args)
    assert served(keep())
    assert not served(change())
