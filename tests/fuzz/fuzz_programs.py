"""Random programs, eager against accel: the answer must never differ.

    python tests/fuzz/fuzz_programs.py --programs 500 --seed 1

Each program is a function over tensors with state, branches, loops, containers, a class and
callbacks. It is called several times with fresh inputs, flipped flags and other sizes, once
plainly and once under `accel.optimize`; values, state, shapes, dtypes and exceptions must
agree. A failure is shrunk by deleting statements, printed, and exits with 1.
"""

from __future__ import annotations

import argparse
import random
import sys
import textwrap
from typing import Any

import torch

import accel

UNARY = (
    "torch.relu({0})",
    "torch.tanh({0})",
    "torch.sigmoid({0})",
    "torch.nn.functional.gelu({0})",
    "torch.nn.functional.silu({0})",
    "torch.exp({0}.clamp(-3, 3))",
    "{0}.abs().sqrt()",
    "-{0}",
    "{0} * 0.5 + 1",
    "torch.softmax({0}, -1)",
    "torch.nn.functional.layer_norm({0}, {0}.shape[-1:])",
    "{0}.sum(-1, keepdim=True) + {0}",
    "{0}.mean(0) + {0}",
    "{0}.transpose(0, 1).contiguous().transpose(0, 1)",
    "{0}.reshape(-1).view({0}.shape)",
    "torch.cat([{0}, {0}], 0)[: {0}.shape[0]]",
    "{0}.clone().add_(1)",
    "{0}.masked_fill({0} > 0.5, 0.0)",
    "torch.where({0} > 0, {0}, -{0})",
    "{0}.cumsum(0)",
    "{0}.flip(0)",
    "{0}.to(torch.float64).to(torch.float32)",
    "{0} @ s.weight",
    "s.linear({0})",
    "{0}.max(-1, keepdim=True).values + {0}",
    "helper({0}, s.scale)",
    "s.apply({0})",
    "s.callbacks[0]({0})",
    "list(map(helper, [{0}]))[0]",
    "sum([{0}, {0}])",
    "[v + 1 for v in ({0}, {0})][1]",
    "max([{0}], key=lambda t: t.dim())",
)
BINARY = ("{0} + {1}", "{0} * {1}", "{0} - {1}", "torch.maximum({0}, {1})", "{0} / (1 + {1}.abs())")
CONDITIONS = (
    "flag",
    "not flag",
    "s.mode == 'a'",
    "s.count > 1",
    "{0}.sum() > 0",
    "({0} > 10).any()",
    "len(s.items) > 2",
    "'k' in s.table",
    "{0}.shape[0] > 3",
    "s.maybe is None",
    "isinstance({0}, torch.Tensor)",
    "hasattr(s, 'late')",
)
EFFECTS = (
    "s.count += 1",
    "s.last = {0}",
    "s.items.append({0})",
    "s.table['k'] = {0}.shape[0]",
    "s.mode = 'b' if s.mode == 'a' else 'a'",
    "s.buffer.add_(1)",
    "d = {{'x': {0}, 'n': {0}.dim()}}",
    "print('step', s.mode)",
    # Only Python can run these: the function is split there.
    "s.table['n'] = int(({0} > 0).sum().item())",
    "s.items.extend([len(s.items) % 3])",
    "zlib.crc32(b'opaque')",
    "{0}.tolist() and zlib.crc32(b'more')",
)

PRELUDE = """
import torch
import zlib


def helper(v, k=2.0):
    return v * k + 1


class State:
    def __init__(self):
        g = torch.Generator().manual_seed(0)
        self.weight = torch.randn(4, 4, generator=g) * 0.3
        self.buffer = torch.zeros(4)
        self.linear = torch.nn.Linear(4, 4).requires_grad_(False)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(4, 4, generator=g) * 0.3)
            self.linear.bias.zero_()
        self.scale = 0.5
        self.mode = "a"
        self.count = 0
        self.items = [1, 2]
        self.table = {}
        self.maybe = None
        self.last = None
        self.callbacks = [lambda v: v + self.scale]

    def apply(self, v):
        return v * self.scale
"""


class Writer:
    """Writes one random program as a list of statements (each a list of lines)."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.counter = 0

    def expression(self, names: list[str]) -> str:
        a = self.rng.choice(names)
        if self.rng.random() < 0.3:
            return self.rng.choice(BINARY).format(a, self.rng.choice(names))
        return self.rng.choice(UNARY).format(a)

    def assignment(self, names: list[str]) -> list[str]:
        target = self.rng.choice(["a", "b", "c"])
        line = f"{target} = {self.expression(names)}"
        if target not in names:
            names.append(target)
        return [line]

    def block(self, names: list[str], depth: int) -> list[list[str]]:
        return [self.statement(names, depth) for _ in range(self.rng.randint(1, 3))]

    def statement(self, names: list[str], depth: int) -> list[str]:
        kind = self.rng.random()
        if depth >= 2 or kind < 0.55:
            return self.assignment(names)
        if kind < 0.7:
            return [self.rng.choice(EFFECTS).format(self.rng.choice(names))]
        inner = list(names)
        if kind < 0.88:
            condition = self.rng.choice(CONDITIONS).format(self.rng.choice(names))
            lines = [f"if {condition}:", *_indent(self.block(inner, depth + 1))]
            if self.rng.random() < 0.5:
                lines += ["else:", *_indent(self.block(list(names), depth + 1))]
            return lines
        if kind < 0.95:
            return [
                f"for i in range({self.rng.randint(1, 3)}):",
                *_indent(self.block(inner, depth + 1)),
            ]
        return [
            "try:",
            *_indent(self.block(inner, depth + 1)),
            "    s.table['missing']",
            "except KeyError:",
            f"    a = {self.expression(['x'])}",
        ]

    def program(self) -> list[list[str]]:
        names = ["x", "y"]
        body = [["a = x + y"]]
        names.append("a")
        body += [self.statement(names, 0) for _ in range(self.rng.randint(2, 7))]
        return body


def _indent(block: list[list[str]]) -> list[str]:
    return ["    " + line for statement in block for line in statement]


def source(body: list[list[str]]) -> str:
    lines = [line for statement in body for line in statement]
    inside = textwrap.indent("\n".join(lines), "    ")
    return f"{PRELUDE}\n\ndef f(s, x, y, flag):\n    b = c = x\n{inside}\n    return a, b, [c]\n"


def calls(seed: int) -> list[tuple[tuple[int, ...], bool, float]]:
    """(shape, flag, sign) of each call of one program."""
    rng = random.Random(seed)
    shapes = [(3, 4)] * 4 + [(5, 4)] * 2
    return [(s, rng.random() < 0.7, rng.choice([1.0, 1.0, -1.0])) for s in shapes]


def outcome(f: Any, state: Any, call: Any, index: int) -> Any:
    shape, flag, sign = call
    g = torch.Generator().manual_seed(index)
    x = torch.rand(shape, generator=g) * sign
    y = torch.rand(shape, generator=g) * sign
    try:
        result = f(state, x, y, flag)
    except Exception as error:
        return ("raised", type(error).__name__, str(error))
    return ("returned", result, x, y)


def state_of(state: Any) -> dict[str, Any]:
    return {k: v for k, v in vars(state).items() if k not in ("linear", "callbacks")}


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and a.stride() == b.stride()
            and torch.allclose(a, b, rtol=2e-5, atol=2e-5, equal_nan=True)
        )
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def check(body: list[list[str]], seed: int) -> str:
    """The difference between eager and accel; empty when there is none."""
    text = source(body)
    runs = []
    for compiled in (False, True):
        space: dict[str, Any] = {"__name__": "fuzzed"}
        exec(compile(text, f"<fuzz {seed}>", "exec"), space)
        state, f = space["State"](), space["f"]
        if compiled:
            f = accel.optimize(f)
        seen = []
        with torch.no_grad():
            for index, call in enumerate(calls(seed)):
                seen.append(outcome(f, state, call, index))
                seen.append(dict(state_of(state)))
                if compiled:
                    accel.wait()
        runs.append(seen)
    for index, (a, b) in enumerate(zip(*runs, strict=True)):
        if not same(a, b):
            what = "result" if index % 2 == 0 else "state"
            return f"{what} of call {index // 2} differs:\n  eager {a}\n  accel {b}"
    return ""


def shrink(body: list[list[str]], seed: int) -> list[list[str]]:
    """Deletes statements while the difference stays."""
    changed = True
    while changed:
        changed = False
        for i in range(len(body)):
            smaller = body[:i] + body[i + 1 :]
            try:
                if smaller and check(smaller, seed):
                    body, changed = smaller, True
                    break
            except Exception:
                continue
    return body


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    failures = 0
    for seed in range(options.seed, options.seed + options.programs):
        body = Writer(random.Random(seed)).program()
        difference = check(body, seed)
        if difference:
            failures += 1
            small = shrink(body, seed)
            print(f"seed {seed}: {check(small, seed)}\n{source(small)}", flush=True)
    numbers = accel.counters()
    print(
        f"{options.programs} programs from seed {options.seed}: {failures} wrong; "
        f"{numbers['calls_compiled']:.0f} calls compiled, {numbers['calls_eager']:.0f} eager, "
        f"{numbers['recordings']:.0f} recordings, {numbers['recordings_voided']:.0f} voided"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
