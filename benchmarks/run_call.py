"""Measures one row of `calls.py` in this process and prints its JSON.

Run by `bench.py`, once for each row and number of threads; can be run alone:
`python benchmarks/run_call.py tiny --threads 1`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from calls import CALL_ROWS, CallRow
from measure import Competitor, bootstrap, race, ratio

SEED = 0
WARM_CALLS = 5
SETTLING_CALLS = 12


def fresh(row: CallRow) -> Any:
    torch.manual_seed(SEED)
    return row.make()


def close(expected: Any, got: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        return torch.allclose(expected, got, rtol=1e-4, atol=1e-5)
    if isinstance(expected, dict):
        return all(close(expected[key], got[key]) for key in expected)
    if isinstance(expected, (tuple, list)):
        return all(close(e, g) for e, g in zip(expected, got, strict=True))
    return True


def eager(row: CallRow) -> tuple[Competitor, dict[str, Any]]:
    subject = fresh(row)
    return Competitor("eager", subject.bind(subject.target)), {}


def torch_compile(row: CallRow) -> tuple[Competitor, dict[str, Any]]:
    subject = fresh(row)
    call = subject.bind(torch.compile(subject.target))
    start = time.perf_counter()
    call()
    return Competitor("torch.compile", call), {"first_call_s": time.perf_counter() - start}


@contextlib.contextmanager
def accel_present() -> Iterator[None]:
    """accel's universal root is in nn.Module only during accel's turn: eager stays eager."""
    from accel import driver

    driver.current._patch_module_call()
    try:
        yield
    finally:
        driver.current.unpatch()


def _is_served(call: Callable[[], Any]) -> bool:
    """Whether compiled code serves this call, whole or in segments."""
    import accel

    def total() -> float:
        counts = accel.counters()
        return float(counts["calls_compiled"] + counts["segments_served"])

    before = total()
    call()
    return total() > before


def with_accel(row: CallRow) -> tuple[Competitor, dict[str, Any]]:
    import accel

    subject = fresh(row)
    call = subject.bind(accel.optimize(subject.target))
    start = time.perf_counter()
    call()
    first_s = time.perf_counter() - start
    accel.wait(120)
    for _ in range(SETTLING_CALLS):  # exits are learnt one after the other
        call()
        accel.wait(120)
    served = sum(_is_served(call) for _ in range(WARM_CALLS))
    facts: dict[str, Any] = {"first_call_s": first_s, "served_compiled": served == WARM_CALLS}
    if served < WARM_CALLS:
        from accel import driver

        facts["reasons"] = [r.reason for r in driver.current.roots if r.reason]
    from accel import driver

    driver.current.unpatch()
    return Competitor("accel", call, accel_present), facts


def baseline(row: CallRow) -> Competitor:
    """What accel makes of the row that this one is held against, in the same race."""
    other = next(r for r in CALL_ROWS if r.name == row.baseline)
    found, _ = with_accel(other)
    return Competitor("baseline", found.call, found.turn, answers=False)


MAKERS = {"eager": eager, "torch.compile": torch_compile, "accel": with_accel}


def measure(row: CallRow, names: list[str], rounds: int) -> dict[str, Any]:
    """Race the competitors on one row."""
    competitors, facts = [], {}
    with torch.no_grad():
        for name, make in MAKERS.items():  # accel last: it must not exist while others compile
            if name in names:
                competitor, facts[name] = make(row)
                competitors.append(competitor)
        if row.of_baseline is not None:
            competitors.append(baseline(row))
        expected = competitors[0].call()
        for competitor in competitors[1:]:
            if not competitor.answers:
                continue
            with competitor.turn():
                facts[competitor.name]["agrees"] = close(expected, competitor.call())
        race(competitors, rounds)
    seconds = {c.name: c.seconds for c in competitors}
    result: dict[str, Any] = {
        "us": {n: bootstrap([s * 1e6 for s in v]).to_json() for n, v in seconds.items()},
        "facts": facts,
        "rounds": rounds,
    }
    if "accel" in seconds:
        result["speedup"] = {
            name: ratio(values, seconds["accel"]).to_json()
            for name, values in seconds.items()
            if name != "accel"
        }
    return result


def main() -> None:
    rows = {row.name: row for row in CALL_ROWS}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("row", choices=list(rows))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--competitors", nargs="+", default=list(MAKERS), choices=list(MAKERS))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    row = rows[arguments.row]
    result = measure(row, arguments.competitors, arguments.rounds or row.rounds)
    json.dump(result, sys.stdout)
    print()


if __name__ == "__main__":
    main()
