"""Runs a small program in a fresh process and reads the facts it prints.

In: Python source, environment. Out: its exit code, the JSON of its last line, its stderr.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

TIMEOUT_S = 120

# `f` is cheap to compile and needs a kernel of our own; `warm` brings it to compiled code.
PRELUDE = """
import json, os, signal, sys, threading, time
import torch
import accel
torch.set_num_threads(1)

def f(x, y):
    return torch.relu(x * y + 1.0).softmax(-1)

def eager(x, y):
    return torch.relu(x * y + 1.0).softmax(-1)

x, y = torch.randn(4, 8), torch.randn(4, 8)

def check(function=f, x=x, y=y):
    torch.testing.assert_close(function(x, y), eager(x, y))

def warm(function=f, calls=4):
    accel.optimize(function)
    for _ in range(calls):
        check(function)
        assert accel.wait(60), "compilation never became idle"

def served():
    return accel.counters()["calls_compiled"]
"""


@dataclass
class Finished:
    """A child process that has ended."""

    code: int
    facts: Any
    stdout: str
    stderr: str

    def complaints(self) -> list[str]:
        """What accel said on stderr."""
        return [line for line in self.stderr.splitlines() if "accel" in line.lower()]


def run(source: str, *, prefix: Sequence[str] = (), **environment: str) -> Finished:
    """Run PRELUDE and `source`; its last line of output, if JSON, becomes `facts`.

    `prefix` is a command that runs the rest of its arguments.
    """
    text = PRELUDE + textwrap.dedent(source)
    done = subprocess.run(
        [*prefix, sys.executable, "-c", text],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    lines = done.stdout.splitlines()
    try:
        facts = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        facts = None
    return Finished(done.returncode, facts, done.stdout, done.stderr)
