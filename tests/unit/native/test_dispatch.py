"""Dispatch: variants, entries, prologues, modules as roots, and what happens when things fail."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from accel import _native

sys.path.insert(0, str(Path(__file__).parent))
plan_builder = pytest.importorskip("plan_builder")

RUN_BODY, prologue = _native.RUN_BODY, _native.prologue
X = torch.arange(8.0)
# A prologue's roots are the function's locals and then the function itself.
TENSOR_ROOT = [("TENSOR", -1, 0, X)]


def variant(
    run: Any, result: tuple[Any, ...] = ("tensor", 0), guards: Any = None, roots: int = 2
) -> Any:
    program = guards or _native.GuardProgram(TENSOR_ROOT, roots)
    return _native.Variant(program, _native.Ambient(), run, [0], result)


def entry_of(*variants: Any, on_call: Any = None, **settings: Any) -> Any:
    entry = _native.Entry("test", on_call)
    entry.variants = variants
    entry.state = "armed"
    for name, value in settings.items():
        setattr(entry, name, value)
    return entry


def call(entry: Any, x: object) -> object:
    return prologue(entry.index, x)


def plus(n: float) -> Callable[[list[torch.Tensor]], list[torch.Tensor]]:
    return lambda inputs: [inputs[0] + n]


class FakeRecorder:
    """Enough of a recorder for run_recorded: every instruction runs as it is."""

    def __init__(self) -> None:
        self.finished: list[object] = []

        def plain(*_: object) -> None:
            return None

        named = {"finish": self.finish}
        self.handlers = tuple(named.get(name, plain) for name in _native.HANDLER_NAMES)

    def finish(self, result: object, failed: bool, unseen: int) -> None:
        self.finished.append("failed" if failed else result)


# ---- results ----


def test_tensor_result() -> None:
    entry = entry_of(variant(plus(1)))
    assert torch.equal(call(entry, X), X + 1)
    assert (entry.calls, entry.hits, entry.misses) == (1, 1, 0)
    assert entry.variants[0].hits == 1


def test_tuple_result_keeps_identity() -> None:
    entry = entry_of(
        variant(
            lambda i: (i[0] + 1, i[0] + 2), ("parts", [("output", 1), ("output", 0), ("output", 1)])
        )
    )
    first, second, third = call(entry, X)
    assert torch.equal(second, X + 1) and torch.equal(first, X + 2) and first is third


class Plain:
    """Its attributes lie inline until somebody asks for its dict."""


def test_parts_result_is_outputs_slots_and_constants() -> None:
    value, holder = {"a": 1}, Plain()
    holder.x = X
    # The roots are two locals and the function that calls.
    guards = _native.GuardProgram([*TENSOR_ROOT, ("INSTANCE_DICT", 3, 1)], 3)
    parts = [("slot", 0), ("output", 1), ("const", value), ("slot", 3), ("output", 1), ("slot", 1)]
    entry = entry_of(variant(lambda i: (i[0], i[0] + 2), ("parts", parts), guards))
    first, second, third, attributes, fifth, sixth = prologue(entry.index, X, holder)
    assert first is X and torch.equal(second, X + 2) and third is value and second is fifth
    assert attributes == {"x": X} and attributes is holder.__dict__ and sixth is holder


@pytest.mark.parametrize("part", [("slot", 9), ("slot", "x"), ("other", 1), ("output",), 3])
def test_a_part_that_is_none(part: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        variant(plus(1), ("parts", [part]))


def test_constant_result() -> None:
    value = {"a": 1}
    assert call(entry_of(variant(plus(1), ("const", value))), X) is value


@pytest.mark.parametrize("needed", [None, [0], []])
def test_call_result(needed: list[int] | None) -> None:
    seen = []

    def finish(outputs: list[Any], slots: list[Any]) -> str:
        seen.append((outputs, slots, _native.is_paused()))
        return "made"

    result = ("call", finish) if needed is None else ("call", finish, needed)
    assert call(entry_of(variant(plus(1), result)), X) == "made"
    outputs, slots, paused = seen[0]
    assert torch.equal(outputs[0], X + 1) and paused
    assert slots[0] is (None if needed == [] else X)
    assert (slots[1] is test_call_result.__globals__["call"]) == (needed is None)


def test_error_in_finish_is_the_programs() -> None:
    def finish(outputs: object, slots: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        call(entry_of(variant(plus(1), ("call", finish))), X)


@pytest.mark.parametrize(
    "result",
    [
        ("tensor",),
        ("tensor", -1),
        ("tensor", "a"),
        ("tuple", 1),
        ("other", 1),
        ("call", 1),
        "x",
        ("call", print, [99]),
    ],
)
def test_malformed_results(result: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        variant(plus(1), result)


def test_malformed_variants() -> None:
    program, ambient = _native.GuardProgram([], 1), _native.Ambient()
    with pytest.raises(TypeError, match="GuardProgram"):
        _native.Variant(1, ambient, print, [], ("tensor", 0))
    with pytest.raises(TypeError, match="Ambient"):
        _native.Variant(program, 1, print, [], ("tensor", 0))
    with pytest.raises(TypeError, match="callable"):
        _native.Variant(program, ambient, 1, [], ("tensor", 0))
    with pytest.raises(ValueError, match="slot"):
        _native.Variant(program, ambient, print, [3], ("tensor", 0))


def test_missing_output_is_an_error() -> None:
    with pytest.raises(SystemError, match="output 1"):
        call(entry_of(variant(plus(1), ("tensor", 1))), X)


# ---- plans ----


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(plan_builder.build_library(tmp_path_factory.mktemp("dispatch_kernels")))


def add_one_plan(library: str) -> Any:
    plan = {
        "version": 1,
        "library": "kernels.so",
        "inputs": [plan_builder.layout(X)],
        "arena_bytes": 0,
        "buffers": [{"kind": "input", "index": 0}, {"kind": "output", **plan_builder.layout(X)}],
        "steps": [{"op": "kernel", "symbol": "add_one", "buffers": [0, 1], "parallel": False}],
        "commit": [],
        "speculations": [],
        "outputs": [1],
    }
    return _native.Executor(plan, library)


def test_plan_serves_a_call(library: str) -> None:
    entry = entry_of(variant(add_one_plan(library)))
    assert torch.equal(call(entry, X), X + 1)
    assert torch.equal(call(entry, X + 5), X + 6)
    assert call(entry, X.double()) is RUN_BODY
    assert (entry.hits, entry.misses, entry.variants[0].guard_failures) == (2, 1, 1)


def test_plan_input_that_is_no_tensor(library: str) -> None:
    program = _native.GuardProgram([], 2)
    events: list[str] = []
    entry = entry_of(
        variant(add_one_plan(library), guards=program),
        on_event=lambda e, kind, message: events.append(message),
    )
    assert call(entry, 3) is RUN_BODY
    assert "not a plain tensor" in events[0]


# ---- choosing ----


def test_variants_in_order() -> None:
    ints = _native.GuardProgram([("TENSOR", -1, 0, X.long())], 2)
    entry = entry_of(variant(plus(1)), variant(plus(2), guards=ints), variant(plus(3)))
    assert torch.equal(call(entry, X), X + 1)
    assert torch.equal(call(entry, X.long()), X.long() + 2)
    assert [v.hits for v in entry.variants] == [1, 1, 0]


def test_ambient_state_is_checked() -> None:
    entry = entry_of(variant(plus(1)))
    with torch.no_grad():
        assert call(entry, X) is RUN_BODY
    served = entry.variants[0]
    assert served.ambient_failures == 1
    result = call(entry, X)
    why = (served.ambient.difference(), served.ambient_failures, served.guard_failures)
    assert result is not RUN_BODY, why


def test_function_is_the_last_root() -> None:
    def f(x: object) -> object:
        return prologue(entry.index, x)

    def g(x: object) -> object:
        return prologue(entry.index, x)

    entry = entry_of(variant(plus(1), guards=_native.GuardProgram([("IS", -1, 1, f)], 2)))
    assert torch.equal(f(X), X + 1)
    assert g(X) is RUN_BODY


def test_states() -> None:
    asked: list[object] = []
    entry = entry_of(variant(plus(1)), on_call=lambda e, roots: asked.append(roots))
    entry.state = "off"
    assert call(entry, X) is RUN_BODY and entry.calls == 1
    entry.state = "count"
    assert call(entry, X) is RUN_BODY and (entry.calls, entry.hits, entry.misses) == (2, 0, 1)
    assert len(asked) == 1 and asked[0][0] is X
    entry.state = "armed"
    assert call(entry, X) is not RUN_BODY
    assert entry.state == "armed"
    with pytest.raises(ValueError, match="armed"):
        entry.state = "cold"
    with pytest.raises(TypeError):
        entry.variants = [1]
    with pytest.raises(TypeError):
        entry.variants = (1,)


def test_unknown_indices_run_the_body() -> None:
    entry = entry_of(variant(plus(1)))
    index = entry.index
    assert _native.Entry("next").index > index
    del entry
    gc.collect()
    assert prologue(index, X) is RUN_BODY
    assert prologue(10**9, X) is RUN_BODY
    assert prologue(-5, X) is RUN_BODY
    with pytest.raises(TypeError):
        prologue()
    with pytest.raises(TypeError):
        prologue("a", X)


def test_threshold() -> None:
    asked: list[object] = []
    entry = entry_of(on_call=lambda e, roots: asked.append(roots), threshold=3)
    for _ in range(7):
        assert call(entry, X) is RUN_BODY
    assert len(asked) == 2
    entry.threshold = 0
    for _ in range(7):
        call(entry, X)
    assert len(asked) == 2


def test_hits_do_not_count_towards_the_threshold() -> None:
    asked: list[object] = []
    entry = entry_of(variant(plus(1)), on_call=lambda e, roots: asked.append(roots), threshold=2)
    for x in (X, X, X.long(), X, X):
        call(entry, x)
    assert not asked
    call(entry, X.long())
    assert len(asked) == 1


def test_eager_runs_are_asked_for() -> None:
    asked: list[object] = []
    one = variant(plus(1))
    entry = entry_of(one, on_call=lambda e, roots: asked.append(e.sampled))
    one.eager_runs = 2
    answers = [call(entry, X) is RUN_BODY for _ in range(4)]
    assert answers == [True, True, False, False]
    assert asked == [one, one] and one.eager_runs == 0 and entry.sampled is None


def test_a_measured_run() -> None:
    times: list[int] = []
    seen: list[object] = []

    def body(x: torch.Tensor) -> torch.Tensor:
        seen.append(_native.is_paused())
        return x + 5

    entry = entry_of(on_call=lambda e, roots: (times, body, (roots[0],), None), threshold=1)
    assert torch.equal(call(entry, X), X + 5)
    assert seen == [True] and not _native.is_paused()
    assert len(times) == 1 and 0 < times[0] < 10**9

    def broken(x: torch.Tensor) -> None:
        raise KeyError("the program's own")

    entry.on_call = lambda e, roots: (times, broken, (roots[0],), {})
    with pytest.raises(KeyError, match="own"):
        call(entry, X)
    assert len(times) == 1 and not _native.is_paused()


def test_probes() -> None:
    one = variant(plus(1))
    one.probe_every = 2
    entry = entry_of(one)
    for _ in range(10):
        call(entry, X)
    assert 4 <= len(one.ns_compiled) <= 5
    assert all(0 < ns < 10**9 for ns in one.ns_compiled)
    for _ in range(300):
        call(entry, X)
    assert len(one.ns_compiled) == 64
    one.clear_probes()
    assert one.ns_compiled == []
    before = _native.clock_ns()
    assert _native.clock_ns() >= before


def test_reviews() -> None:
    told: list[object] = []
    one = variant(plus(1))
    one.review_at = 3
    entry = entry_of(one, on_event=lambda *event: told.append((*event, one.hits)))
    for _ in range(5):
        call(entry, X)
    assert told == [(entry, "review", "", 3)] and one.review_at == 0
    one.review_at = 6
    call(entry, X)
    assert len(told) == 2


def test_global_switch() -> None:
    entry = entry_of(variant(plus(1)))
    assert _native.set_enabled(False) is True
    try:
        assert call(entry, X) is RUN_BODY
    finally:
        assert _native.set_enabled(True) is False
    assert call(entry, X) is not RUN_BODY


# ---- notification and recording ----


def test_on_call_runs_paused_and_may_raise() -> None:
    inner = entry_of(variant(plus(1)))

    def ask(entry: object, roots: object) -> None:
        assert _native.is_paused()
        assert call(inner, X) is RUN_BODY
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        call(entry_of(on_call=ask), X)
    assert not _native.is_paused() and inner.calls == 0


def test_recorded_run() -> None:
    recorder = FakeRecorder()
    inner = entry_of(variant(plus(1)))

    def f(x: torch.Tensor, *, by: float) -> torch.Tensor:
        assert call(inner, x) is RUN_BODY  # a recording is never served by variants
        return x + by

    def ask(entry: object, roots: tuple[Any, ...]) -> Any:
        return recorder, f, roots[:1], {"by": 2}

    # The functions here have no twins: the recording is void, the run is what it is.
    assert torch.equal(call(entry_of(on_call=ask), X), X + 2)
    assert torch.equal(recorder.finished[0], X + 2)
    assert not _native.is_paused()


def test_recorded_run_that_raises() -> None:
    recorder = FakeRecorder()

    def f() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        call(entry_of(on_call=lambda e, r: (recorder, f, (), None)), X)
    assert recorder.finished == ["failed"]


def test_malformed_answer() -> None:
    with pytest.raises(TypeError, match="on_call"):
        call(entry_of(on_call=lambda e, r: 1), X)


def test_pause_is_per_thread_and_nests() -> None:
    entry = entry_of(variant(plus(1)))
    _native.pause()
    _native.pause()
    seen: list[object] = []
    thread = threading.Thread(target=lambda: seen.append(call(entry, X)))
    thread.start()
    thread.join()
    assert seen[0] is not RUN_BODY
    _native.resume()
    assert call(entry, X) is RUN_BODY
    _native.resume()
    assert call(entry, X) is not RUN_BODY
    with pytest.raises(RuntimeError):
        _native.resume()


# ---- failure ----


def failing(_: list[torch.Tensor]) -> list[torch.Tensor]:
    raise ValueError("backend broke")


def test_failing_executor_runs_the_body_and_is_dropped() -> None:
    events: list[tuple[str, str]] = []
    bad, good = variant(failing), variant(plus(1))
    entry = entry_of(bad, good, on_event=lambda e, kind, message: events.append((kind, message)))
    for _ in range(3):
        assert entry.variants == (bad, good)
        assert call(entry, X) is RUN_BODY
    assert entry.variants == (good,) and bad.errors == 3 and bad.hits == 0
    assert events == [("error", "ValueError: backend broke")] * 3
    assert torch.equal(call(entry, X), X + 1)


def test_error_in_the_event_handler_is_not_the_programs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    entry = entry_of(variant(failing), on_event=lambda *_: 1 / 0)
    assert call(entry, X) is RUN_BODY
    assert reported[0].exc_type is ZeroDivisionError


def test_interrupt_in_the_executor_goes_through() -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    entry = entry_of(variant(interrupted))
    with pytest.raises(KeyboardInterrupt):
        call(entry, X)
    assert not _native.is_paused()


def test_misspeculation_tries_the_next_variant_and_counts_as_a_miss() -> None:
    asked: list[object] = []
    never, good = variant(lambda _: None), variant(plus(1))
    entry = entry_of(never, good)
    assert torch.equal(call(entry, X), X + 1)
    entry = entry_of(never, on_call=lambda e, roots: asked.append(roots))
    assert call(entry, X) is RUN_BODY
    assert never.misspeculations == 2 and entry.misses == 1 and len(asked) == 1


def test_odd_answer_of_a_backend() -> None:
    entry = entry_of(variant(lambda _: 3))
    assert call(entry, X) is RUN_BODY
    assert entry.variants[0].errors == 1


def test_backend_callables_run_paused() -> None:
    inner = entry_of(variant(plus(1)))
    entry = entry_of(variant(lambda i: [i[0] if call(inner, X) is RUN_BODY else None]))
    assert call(entry, X) is X


# ---- replacing things while they run ----


def test_entry_may_vanish_while_it_runs() -> None:
    holder: dict[str, Any] = {}

    def run(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        holder["entry"].variants = ()
        holder.clear()
        gc.collect()
        return [inputs[0] + 1]

    holder["entry"] = entry_of(variant(run))
    assert torch.equal(prologue(holder["entry"].index, X), X + 1)


def test_inputs_stay_alive_while_they_run() -> None:
    class Module:
        pass

    module = Module()
    module.weight = torch.full((8,), 3.0)
    program = _native.GuardProgram(
        [("INSTANCE_DICT", 2, 0), ("DICT_ITEM", 3, 2, "weight"), ("TENSOR", -1, 3, module.weight)],
        2,
    )

    def run(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        del module.weight
        torch.full((8,), 9.0)
        return [inputs[0] * 1]

    made = _native.Variant(program, _native.Ambient(), run, [3], ("tensor", 0))
    assert torch.equal(call(entry_of(made), module), torch.full((8,), 3.0))


def test_threads_replace_variants(library: str) -> None:
    plan = add_one_plan(library)
    entry = entry_of(variant(plan))
    stop, wrong = threading.Event(), []

    def work() -> None:
        while not stop.is_set():
            answer = call(entry, X)
            if answer is not RUN_BODY and not torch.equal(answer, X + 1):
                wrong.append(answer)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for i in range(500):
        entry.variants = (variant(plan),) * (i % 3)
    stop.set()
    for worker in workers:
        worker.join()
    assert not wrong


def test_after_fork(library: str) -> None:
    entry = entry_of(variant(add_one_plan(library)))
    call(entry, X)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if torch.equal(call(entry, X), X + 1) else 1)
    assert os.waitpid(pid, 0)[1] == 0


# ---- ownership ----


def test_no_leaks(library: str) -> None:
    def finish(outputs: list[Any], slots: list[Any]) -> Any:
        return outputs[0]

    plan = add_one_plan(library)
    asked = [0]

    def ask(entry: object, roots: object) -> None:
        asked[0] += 1

    entries = [
        entry_of(variant(plan)),
        entry_of(variant(plan, ("parts", [("output", 0), ("output", 0)]))),
        entry_of(variant(plan, ("call", finish))),
        entry_of(variant(plan, ("const", X))),
        entry_of(variant(plus(1))),
        entry_of(variant(lambda _: None), on_call=ask),
        entry_of(on_call=ask),
    ]
    other = X.long()

    def work(times: int) -> None:
        for _ in range(times):
            for entry in entries:
                call(entry, X)
                call(entry, other)

    work(200)
    gc.collect()
    watched = [X, other, plan, RUN_BODY, finish, call, None, *entries]
    before, blocks = [sys.getrefcount(o) for o in watched], sys.getallocatedblocks()
    work(10000)
    gc.collect()
    after = [sys.getrefcount(o) for o in watched]
    assert all(abs(a - b) < 20 for a, b in zip(after, before, strict=True))
    assert abs(sys.getallocatedblocks() - blocks) < 300


def test_cycles_are_collected() -> None:
    class Owner:
        pass

    owner = Owner()
    owner.entry = entry_of(
        variant(lambda inputs, owner=owner: inputs), on_call=lambda e, r, owner=owner: None
    )
    alive, entry_alive = weakref.ref(owner), weakref.ref(owner.entry)
    call(owner.entry, X)
    del owner
    gc.collect()
    assert alive() is None and entry_alive() is None


# ---- modules ----


@pytest.fixture
def hook() -> Iterator[list[Any]]:
    """Takes the place of the driver's hook; gives the list of what it was asked."""
    asked: list[Any] = []
    _native.set_module_hook(lambda entry, roots: asked.append((entry, roots)), threshold=2)
    yield asked
    _native.set_module_hook(None, threshold=2)


def test_module_calls_are_counted(hook: list[Any]) -> None:
    module, args, kwargs = torch.nn.ReLU(), (X,), {}
    assert _native.module_prologue(module, args, kwargs) is RUN_BODY
    assert not hook
    assert _native.module_prologue(module, args, kwargs) is RUN_BODY
    entry, roots = hook[0]
    assert entry is _native.module_entry(module)
    assert roots[0] is module and roots[1] is args and roots[2] is kwargs and len(roots) == 3
    assert entry.calls == 2 and entry.state == "count" and "ReLU" in entry.name


def test_module_is_served(hook: list[Any]) -> None:
    module = torch.nn.Linear(8, 8)
    program = _native.GuardProgram(
        [
            ("LEN", -1, 1, 1),
            ("LEN", -1, 2, 0),
            ("TUPLE_ITEM", 3, 1, 0),
            ("TENSOR", -1, 3, X),
            ("INSTANCE_DICT", 4, 0),
            ("DICT_ITEM", 5, 4, "training"),
            ("EQUALS", -1, 5, True),
        ],
        3,
    )
    entry = _native.module_entry(module)
    entry.variants = (_native.Variant(program, _native.Ambient(), plus(1), [3], ("tensor", 0)),)
    entry.state = "armed"
    assert torch.equal(_native.module_prologue(module, (X,), {}), X + 1)
    assert _native.module_prologue(module, (X, X), {}) is RUN_BODY
    assert _native.module_prologue(module, (X,), {"a": 1}) is RUN_BODY
    module.eval()
    assert _native.module_prologue(module, (X,), {}) is RUN_BODY
    module.train()
    assert torch.equal(_native.module_prologue(module, (X,), {}), X + 1)
    assert _native.module_entry(torch.nn.Linear(8, 8)) is not entry


def test_without_a_hook_nothing_happens() -> None:
    _native.set_module_hook(None)
    count = _native.module_entry_count()
    assert _native.module_prologue(torch.nn.ReLU(), (X,), {}) is RUN_BODY
    assert _native.module_entry_count() == count
    with pytest.raises(TypeError):
        _native.module_prologue(1)


def test_dead_modules_leave_and_addresses_come_back(hook: list[Any]) -> None:
    gc.collect()
    count, seen, entries = _native.module_entry_count(), set(), set()
    for _ in range(500):
        module = torch.nn.ReLU()
        seen.add(id(module))
        entry = _native.module_entry(module)
        entries.add(entry.index)
        assert entry.calls == 0
        _native.module_prologue(module, (X,), {})
        module.cycle = module
        del module, entry
        gc.collect(0)
    gc.collect()
    assert _native.module_entry_count() == count
    assert len(entries) == 500 and len(seen) < 500


def test_many_modules(hook: list[Any]) -> None:
    modules = [torch.nn.Identity() for _ in range(3000)]
    entries = [_native.module_entry(m) for m in modules]
    del modules[::3]
    gc.collect()
    kept = [e for i, e in enumerate(entries) if i % 3]
    assert [_native.module_entry(m) for m in modules] == kept


def test_copies_have_their_own_entries(hook: list[Any]) -> None:
    module = torch.nn.ReLU()
    entry = _native.module_entry(module)
    for other in (copy.deepcopy(module), copy.copy(module), pickle.loads(pickle.dumps(module))):
        assert _native.module_entry(other) is not entry


def test_denied_types(hook: list[Any]) -> None:
    class Denied(torch.nn.Module):
        pass

    class Derived(Denied):
        pass

    early = Derived()
    entry = _native.module_entry(early)
    _native.deny_module_type(Denied)
    assert entry.state == "off"
    for module in (early, Denied(), Derived()):
        assert _native.module_entry(module) is None
        for _ in range(3):
            assert _native.module_prologue(module, (X,), {}) is RUN_BODY
    assert not hook
    assert _native.module_entry(torch.nn.ReLU()) is not None
    with pytest.raises(TypeError):
        _native.deny_module_type(1)


def test_objects_without_weak_references_are_no_roots(hook: list[Any]) -> None:
    class Odd:
        __slots__ = ()

    odd = Odd()
    for _ in range(3):
        assert _native.module_prologue(odd, (), {}) is RUN_BODY
    with pytest.raises(TypeError):
        _native.module_entry(odd)


def test_module_hook_of_an_entry_made_before(hook: list[Any]) -> None:
    module = torch.nn.ReLU()
    entry = _native.module_entry(module)
    entry.threshold = 1
    other: list[Any] = []
    _native.set_module_hook(lambda e, roots: other.append(e))
    _native.module_prologue(module, (), {})
    assert other == [entry] and not hook
