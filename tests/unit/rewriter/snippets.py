"""Functions for the twin tests; a default names a trampoline that must have been called."""

import contextlib
import dataclasses
import sys

LOG = []
GLOBAL = 5
TEMPORARY = 1


def reset():
    global GLOBAL, TEMPORARY
    LOG.clear()
    GLOBAL = 5
    TEMPORARY = 1


class Truth:
    """Counts how often it is asked for its truth."""

    def __init__(self, value):
        self.value = value

    def __bool__(self):
        LOG.append(("bool", self.value))
        if self.value == "raise":
            raise ValueError("no truth")
        return bool(self.value)

    def __eq__(self, other):
        return Truth(isinstance(other, Truth) and self.value == other.value)

    __hash__ = None


@dataclasses.dataclass
class Point:
    x: int
    y: int


class Base:
    label = "base"

    def __init__(self):
        self.items = {}

    def method(self, *args, **kwargs):
        return ("base", args, kwargs)

    def __getitem__(self, key):
        return self.items.get(key, key)

    def __setitem__(self, key, value):
        LOG.append(("set", key, value))
        self.items[key] = value

    def __delitem__(self, key):
        LOG.append(("del", key))
        del self.items[key]


class Derived(Base):
    def method(self, *args, **kwargs):
        def uses_self():
            return self

        return (super().method(*args, **kwargs), super().label, uses_self() is self)


@contextlib.contextmanager
def manager(name):
    LOG.append(("enter", name))
    try:
        yield name
    except KeyError:
        LOG.append(("swallow", name))
    finally:
        LOG.append(("exit", name))


def s_calls(_t="call"):
    def f(a, b=2, *c, d=4, **e):
        return a, b, c, d, e

    args, kwargs = [3, 4, 5], {"k": 6}
    return [
        f(1), f(1, 2, 3, d=9, z=1), f(*args), f(*args, **kwargs), f(1, *args, d=2, **kwargs),
        f(*range(3)), max(1, 2), "a".join(["x", "y"]), [1, 2].index(2), (lambda: 7)(),
        Point(1, y=2), dict(a=1), f(**{"a": 1}, **{"q": 2}), f(a=f(1)), int("7", base=8),
    ]  # fmt: skip


def s_call_errors(_t="call", _u="caught"):
    def f(a):
        return a

    out = []
    for attempt in (
        lambda: f(), lambda: f(1, a=2), lambda: f(**{"b": 1}), lambda: GLOBAL(), lambda: len(),
    ):  # fmt: skip
        try:
            attempt()
        except TypeError as error:
            out.append(str(error))
    return out


def s_duplicate_keyword(_t="consume"):
    def f(**k):
        return k

    return f(**{"a": 1}, **({"a": 2} if sys.version_info < (3, 13) else {}))


def s_attributes(_t="attr", _u="setattr", _v="delattr"):
    p = Point(1, 2)
    p.x, p.y = p.y, p.x
    p.z = p.x + p.y
    first = vars(p).copy()
    del p.z
    return first, vars(p), hasattr(p, "z"), p.x.real.imag, p.__class__.__name__


def s_missing_attribute(_t="attr"):
    return Point(1, 2).nothing


def s_items(_t="subscr", _u="setitem", _v="delitem"):
    b = Base()
    b[1] = 2
    b["k"] = b[1] + b[7]
    if sys.version_info >= (3, 12):  # where slices are hashable
        b[1:2] = 3 if False else 4
    del b[1]
    x = list(range(10))
    x[2:4] = [0]
    del x[0]
    x[-1] += 5
    return b["k"], b[slice(1, 2)] if sys.version_info >= (3, 12) else None, x[1:3], x[::2], x[-2]


def s_unhashable_key(_t="setitem"):
    {}[[]] = 1


def s_binary(_t="binary"):
    a, b = 7, 3
    out = [a + b, a - b, a * b, a / b, a // b, a % b, a**b, a << b, a >> b, a & b, a | b, a ^ b]
    x = 7
    x += 1
    x -= 2
    x *= 3
    x /= 2
    x //= 2
    x **= 2
    x %= 13
    y = 12
    y <<= 2
    y >>= 1
    y &= 30
    y |= 1
    y ^= 7
    z = s = [1]
    z += [2]
    return out, x, y, s


def s_matmul(_t="binary"):
    class M:
        def __matmul__(self, other):
            return "matmul"

        def __imatmul__(self, other):
            return "imatmul"

    m = M()
    n = m @ m
    m @= m
    return n, m


def s_bad_operands(_t="binary"):
    return 1 + "a"


def s_compare(_t="compare", _u="contains", _v="is_"):
    a, b, c = 1, 2, [1, 2]
    other = c
    return (
        a < b, a <= b, a == b, a != b, a > b, a >= b, a in c, a not in c, c is other,
        c is not other, a is None, None is not a, a < b < 3, 1 < a < b, a == 1 == 1.0,
    )  # fmt: skip


def s_compare_objects(_t="compare"):
    a, b = Truth(1), Truth(0)
    out = [] if a == b else ["different"]
    if a == a and not (a == b):
        out.append("same")
    return out


def s_unary(_t="unary", _u="not_" if sys.version_info < (3, 13) else "test"):
    a = 5
    return -a, +a, ~a, not a, not Truth(0), -(-a), not not Truth([])


def s_branches(_t="test"):
    out = []
    for value in (Truth(1), Truth(0), 1, 0, "", None, [], True, False):
        if value:
            out.append("yes")
        elif not value and value is not None:
            out.append("no")
        else:
            out.append("none")
        out.append("x" if value else "y")
        while value:
            break
        else:
            out.append("else")
    return out


def s_short_circuit(_t="test"):
    t, f = Truth(1), Truth(0)
    out = [t and f, f and t, t or f, f or t, t and t and f, f or f or t, (t and f) or 3]
    out.append((t or f) and (f or t))
    out.append(1 and [] or "z")
    if t and (f or t) and not f:
        out.append("in")
    return [getattr(v, "value", v) for v in out]


def s_truth_raises(_t="test"):
    bad = Truth("raise")
    return bad and 1


def s_truth_raises_in_if(_t="test"):
    if Truth("raise"):
        return 1


def s_iteration(_t="get_iter"):
    out = []
    for i in range(5):
        if i == 1:
            continue
        for j in "ab":
            out.append((i, j))
        if i == 3:
            break
    else:
        out.append("never")
    return (
        out,
        [i * 2 for i in out],
        {k: v for v, k in out},
        {i for i, _ in out},
        sum(i for i, _ in out if i),
    )


def s_nested_comprehension(_t="subscr"):
    table = [[1, 2], [3]]
    base = 10
    return [[base + cell for cell in row] for row in table if row[0]], [
        lambda: i for i in range(2)
    ][0]()


def s_not_iterable(_t="get_iter"):
    return list(x for x in 5)  # noqa: C400


def s_unpack(_t="unpack", _u="consume"):
    a, b = 1, 2
    (c, d), *e = [(3, 4), 5, 6]
    *f, g = "xyz"
    h = [*e, *f, g]
    i = {**{"a": 1}, "b": 2}
    j = {*h, *e}
    k = (*h, 1)
    return a, b, c, d, e, f, g, h, i, sorted(map(str, j)), k


def s_hashed(_t="hashed"):
    a, b = "a", (1, 2)
    built = {a, b, a}, {a: 1, b: 2}, {v for v in (a, b)}, {v: [v] for v in (a, b)}, {a: b}
    errors = []
    for attempt in (lambda: {a, []}, lambda: {a: 1, b: 2, (): 3, (1, []): 4}, lambda: {[]: 1}):
        try:
            attempt()
        except TypeError as error:
            errors.append(str(error))
    return [sorted(map(str, parts)) for parts in built], built[1], built[3], errors


def s_grown(_t="grown"):
    a, b = [1, 2], {"x": 1}
    long = [
        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24,
        25, 26, 27, 28, 29, 30, len(a),
    ]  # fmt: skip
    parts = (*a, len(a), *a, 5), [0, *a, len(a), *a], {*a, len(a), *a}, {**b, "y": len(a), **b}
    merged = dict(**b, z=len(a), **{"w": 0})
    return long, parts, merged, {v: {v, 1} for v in a}, [[v] for v in a]


def s_unpack_too_many(_t="unpack"):
    a, b = [1, 2, 3]
    return a, b


def s_with(_t="with_"):
    with manager("a") as a, manager("b"):
        LOG.append(a)
        with manager("c"):
            raise KeyError(1)
    for _ in range(2):
        with manager("d"):
            break
    with manager("e"):
        return "out"


def s_with_raises(_t="with_"):
    with manager("a"), manager("b") as b:
        raise ValueError(b)


def s_exceptions(_t="compare"):
    out = []
    for i in range(4):
        try:
            if i == 0:
                raise KeyError("k")
            if i == 1:
                [][i]
            if i == 2:
                int("x")
        except KeyError as error:
            out.append(repr(error))
        except (IndexError, ValueError) as error:
            out.append(str(error))
            try:
                raise RuntimeError("inner") from error
            except RuntimeError as inner:
                out.append(str(inner.__cause__))
        else:
            out.append("else")
        finally:
            out.append(i)
    return out


def s_finally_return(_t="glob"):
    def f():
        try:
            return LOG.append("try") or 1
        finally:
            LOG.append("finally")

    try:
        raise ValueError
    except ValueError:
        return f()


def s_exception_groups(_t="attr"):
    out = []
    try:
        raise ExceptionGroup("g", [ValueError(1), TypeError(2), KeyError(3)])
    except* ValueError as g:
        out.append(g.exceptions)
    except* (TypeError, KeyError) as g:
        out.append(len(g.exceptions))
    return repr(out)


def s_assert(_t="test"):
    assert GLOBAL == 5, "fine"
    assert GLOBAL is None, f"global is {GLOBAL}"


def s_globals(_t="glob", _u="store_global", _v="delete_global"):
    global GLOBAL, TEMPORARY
    GLOBAL = GLOBAL + 1
    del TEMPORARY
    return GLOBAL, "TEMPORARY" in globals()


def s_missing_global(_t="glob"):
    return GLOBAL + nothing_of_that_name  # noqa: F821


def make_closure():
    count, extra = 0, 1

    def s_closure(_t="deref", _u="store_deref", _v="delete_deref"):
        nonlocal count, extra
        extra = 1
        count = count + extra
        total = [count + i for i in range(2)]
        own = count

        def inner():
            nonlocal own
            own = own + 1
            return own

        total += [inner(), own, inner()]
        del extra
        count = 0
        return total

    return s_closure


s_closure = make_closure()


def s_unbound_local(_t="compare"):
    if GLOBAL == 6:
        x = 1
    return x


def s_super(_t="call"):
    class Local(Base):
        label = "local"

        def method(self, *args):
            return super().method(*args), super().label, super(Local, self).label

    return Local().method(1)


def s_derived(_t="call"):
    return Derived().method(1, k=2)


def s_imports(_t="imported"):
    import os.path as p
    from json import JSONDecoder, dumps

    return p.join("a", "b"), dumps([1]), JSONDecoder.__name__


def s_missing_import(_t="glob"):
    assert GLOBAL
    from json import nothing  # noqa: F401


def s_format(_t="format_"):
    x, w = 3.14159, 8
    return f"{x} {x!r} {x:.2f} {x:{w}.1f} {'é'!a} {x!s:>9} {w}{w:03}", f"{[1, 'a']}"


def s_bad_format(_t="format_"):
    return f"{[]:d}"


def s_match(_t="match"):
    out = []
    for subject in (
        1,
        "a",
        [1, 2],
        [1, 2, 3],
        {"k": 1, "j": 2},
        Point(1, 2),
        Point(0, 5),
        None,
        4.5,
    ):
        match subject:
            case 1 | 2:
                out.append("small")
            case str() as text:
                out.append(text)
            case [a, b]:
                out.append((a, b))
            case [first, *rest]:
                out.append((first, rest))
            case {"k": value, **others}:
                out.append((value, others))
            case Point(x=0, y=y):
                out.append(("on axis", y))
            case Point(x, y) if x < y:
                out.append((x, y))
            case None:
                out.append("none")
            case _:
                out.append("other")
    return out


def s_decorated(_t="call"):
    def twice(f):
        return lambda *a: 2 * f(*a)

    @twice
    def g(x):
        return x + 1

    @dataclasses.dataclass
    class C:
        a: int = 3

        @property
        def b(self):
            return self.a

    return g(1), repr(C()), C(4).b


def s_walrus_and_slices(_t="get_iter"):
    data = list(range(8))
    if (n := len(data)) > 3:
        data[1:3], data[5:] = data[5:], []
    for _ in data:
        n += 1
    return n, data, [y := 1, y**2]


def s_frame(_t="call"):
    return (
        sorted(locals()),
        sys._getframe().f_code.co_name,
        globals() is sys.modules[__name__].__dict__,
    )


def generator():
    try:
        got = yield 1
        LOG.append(got)
        try:
            yield from [2]
        except ValueError as error:
            LOG.append(str(error))
        last = yield 3
        return last
    finally:
        LOG.append("closed")


def makes_functions(xs=(1, 2)):
    f = lambda x: x + 1  # noqa: E731
    g = sum(x for x in xs)
    return f(1), g, {f(x) for x in xs}


def r_binary():
    a = 1
    return (
        a + 2,
        a + "text" + "more",
    )


def r_call():
    x = Point(1, 2)
    return len(x, x), x


def r_attribute():
    x = Point(1, 2)
    y = x.x.real.nothing.deeper
    return y


def r_with():
    with manager("m"):
        a = [1, 2, 3]
        return a[7]


def r_handler():
    try:
        {}["k"]
    except KeyError:
        for i in range(3):
            if i == 2:
                i.nothing = i
    finally:
        reset()


def r_comprehension():
    return [
        1 / x
        for x in (1, 0)
    ]  # fmt: skip


def r_iterate():
    for a, b in [(1, 2), (3,)]:
        LOG.append(a)


RAISERS = [r_binary, r_call, r_attribute, r_with, r_handler, r_comprehension, r_iterate]
