"""The worker process: compiles graphs beside the program.

In: jobs as dicts. Out: answers as dicts, from `poll`. Invariant: one process per program,
fed through pipes with one JSON document a line; it dies with the program; a forked child
has none.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from typing import Any

import accel

_MAX_RESTARTS = 3


class Worker:
    """Handle of the worker process; started at the first job or by `start`."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()
        self._pending: dict[str, dict[str, Any]] = {}
        self._failed: list[dict[str, Any]] = []
        self._buffer = b""
        self._starts = 0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Starts the process if there is none; returns at once."""
        if os.getpid() != self._owner:  # a forked child: the parent's pipes are not ours
            self._process, self._owner, self._starts = None, os.getpid(), 0
            self._pending.clear()
            self._buffer = b""
        if self._process is not None or self._starts > _MAX_RESTARTS:
            return
        self._starts += 1
        package = os.path.dirname(os.path.dirname(os.path.abspath(accel.__file__)))
        environment = dict(os.environ, OMP_NUM_THREADS="1")
        environment["PYTHONPATH"] = os.pathsep.join(
            p for p in [package, *sys.path, environment.get("PYTHONPATH", "")] if p
        )
        self._process = subprocess.Popen(
            [sys.executable, "-m", "accel.compile.worker_main"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if "worker" in os.environ.get("ACCEL_LOG", "") else subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)

    def submit(self, job: dict[str, Any]) -> None:
        """Sends a job; its answer, or an error with its id, comes from `poll`."""
        self.start()
        self._pending[job["id"]] = job
        if self._process is None:
            self._lost("the worker could not be started")
            return
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            self._lost("the worker process died")

    def _lost(self, why: str) -> None:
        for key in self._pending:
            self._failed.append({"id": key, "error": why})
        self._pending.clear()
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._process.kill()
            self._process.wait()
        self._process = None
        self._buffer = b""

    def poll(self) -> list[dict[str, Any]]:
        """Answers that arrived since the last poll."""
        answers, self._failed = self._failed, []
        if self._process is None or not self._pending or os.getpid() != self._owner:
            return answers
        assert self._process.stdout is not None
        chunk: bytes | None = b"-"
        while chunk:
            try:
                chunk = os.read(self._process.stdout.fileno(), 1 << 20)
            except BlockingIOError:
                break
            if chunk == b"":
                self._lost("the worker process died")
                return answers + self.poll()
            self._buffer += chunk
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            answer = json.loads(line)
            self._pending.pop(answer["id"], None)
            answers.append(answer)
        return answers

    def wait(self, timeout_s: float) -> None:
        """Until something arrives, or the time is over."""
        if self._process is not None and self._pending and not self._failed:
            select.select([self._process.stdout], [], [], timeout_s)
