"""The worker process: compiles graphs beside the program.

In: jobs as dicts with an "id". Out: answers as dicts, from `poll`. Invariants: one process,
fed through a private socket, that imports nothing of the user's and dies with the program;
no call here blocks but `wait`; the program gets no thread of ours; a forked child never
touches its parent's worker; every job is answered, if only with an error.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

import accel
from accel import log, runtime
from accel.compile import forked_worker, prefork
from accel.compile.channel import Decoder, encode

Answer = dict[str, Any]


@dataclass(frozen=True)
class WorkerLimits:
    """Each limit, one row."""

    max_starts: int = 4  # the first start and three restarts
    max_tries: int = 2  # times a job is given to a worker; its death may be the job's fault
    job_s: float = 300.0  # without any answer for so long, the worker is taken for stuck


@dataclass
class _Job:
    message: bytes
    tries: int = 0


class _Process(subprocess.Popen[bytes]):
    """Popen warns when a process outlives its handle; here that is the rule at exit."""

    def __del__(self) -> None:
        pass


class Worker:
    """Handle of the worker process; started at the first job, or early by `start`."""

    def __init__(self, limits: WorkerLimits | None = None) -> None:
        self.limits = limits or WorkerLimits()
        self._inbox: deque[tuple[str, _Job]] = deque()
        self._answers: deque[Answer] = deque()
        self._clear()
        _WORKERS.add(self)
        atexit.register(_close, weakref.ref(self))

    def _clear(self) -> None:
        # Held while the process's state changes; who finds it held goes on without.
        self._lock = threading.Lock()
        self._process: _Process | forked_worker.ForkedProcess | None = None
        self._socket: socket.socket | None = None
        self._errors: IO[bytes] | None = None
        self._decoder = Decoder()
        self._outbox = bytearray()
        self._pending: dict[str, _Job] = {}
        self._starts = 0
        self._progress = time.monotonic()
        self._closed = False

    def _forget_parent(self) -> None:
        """After a fork, in the child: the process and the socket are the parent's."""
        if self._process is not None:
            self._process.returncode = 0
        for handle in (self._socket, self._errors):
            if handle is not None:
                with contextlib.suppress(OSError):
                    handle.close()
        unfinished = list(self._pending.items())
        self._clear()
        self._inbox.extendleft(reversed(unfinished))

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def is_busy(self) -> bool:
        """True while a job has not been answered, or an answer not been polled."""
        return bool(self._pending or self._inbox or self._answers)

    def start(self) -> None:
        """Starts the process if there is none; returns at once."""
        if not self._lock.locked():
            with self._lock:
                self._ensure_started()

    def fork(self, preload: bool) -> None:
        """The first process as a copy of this one, which has not run any code of the user's.

        `preload`: it is going to be needed, and prepares itself at once.
        """
        if self._process is not None:
            return
        try:
            prefork.fork(preload)
        except OSError as error:  # the first job starts one in the other way
            log.artifact("worker", "not forked: %s", error)
        self._adopt()

    def _adopt(self) -> bool:
        """Takes the process that was forked before, if there is one."""
        forked = prefork.take()
        if forked is None:
            return False
        self._process, self._socket, self._errors = forked.process, forked.socket, forked.errors
        self._starts += 1
        self._decoder = Decoder()
        return True

    def submit(self, job: dict[str, Any]) -> None:
        """Sends a job. Errors: TypeError, ValueError when it is no JSON."""
        self._inbox.append((job["id"], _Job(encode(job))))
        self._pump()

    def poll(self) -> list[Answer]:
        """Answers that arrived since the last poll: {"id", ...} or {"id", "error", "kind"}."""
        if not self.is_busy:
            return []
        self._pump()
        answers = []
        with contextlib.suppress(IndexError):
            while True:
                answers.append(self._answers.popleft())
        return answers

    def wait(self, timeout_s: float) -> None:
        """Until something happens at the worker's end, or the time is over."""
        runtime.native.undisturbed(self._pump)  # a job must not get lost in an interrupt
        handle = self._socket
        if self._answers or handle is None:
            return
        poller = select.poll()  # select() refuses descriptors above 1023
        poller.register(handle, select.POLLIN | (select.POLLOUT if self._outbox else 0))
        poller.poll(timeout_s * 1000)

    def close(self) -> None:
        """Ends the process; what is pending is answered with an error."""
        self._closed = True
        with self._lock:
            self._drop()
            self._answer_all("the program is exiting")

    # ------------------------------------------------- below: with the lock held

    def _pump(self) -> None:
        """Moves what can be moved without waiting; another thread's pump will do as well."""
        if self._lock.locked():
            return
        # Not acquire(): what a signal handler raises behind that call would leave it locked.
        with self._lock:
            while self._inbox:
                key, job = self._inbox.popleft()
                self._accept(key, job)
            if self._pending:
                self._receive()
                self._send()
                if time.monotonic() - self._progress > self.limits.job_s:
                    self._lost(f"no answer for {self.limits.job_s:.0f} s")

    def _accept(self, key: str, job: _Job) -> None:
        if not self._pending:
            self._progress = time.monotonic()
        self._pending[key] = job
        why = "the program is exiting" if self._closed else self._ensure_started()
        if why:
            del self._pending[key]
            self._answers.append({"id": key, "kind": "worker", "error": why})
            return
        job.tries += 1
        self._outbox += job.message

    def _ensure_started(self) -> str:
        """Starts the process unless it runs; why that is impossible, or nothing."""
        if self._process is not None:
            return ""
        if self._adopt():
            return ""
        if self._starts >= self.limits.max_starts:
            return f"the worker process died {self._starts} times"
        self._starts += 1
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            if not sys.executable:
                raise OSError("this program has no Python executable")
            self._errors = None if log.is_enabled("worker") else tempfile.TemporaryFile()
            self._process = _spawn(theirs, self._errors)
        except OSError as error:
            ours.close()
            return f"the worker process cannot be started: {error}"
        finally:
            theirs.close()
        with contextlib.suppress(OSError):  # its death is noticed when we read
            ours.send(encode(_greeting()), socket.MSG_NOSIGNAL)
        self._socket = ours
        self._decoder = Decoder()
        log.artifact("worker", "started process %d", self._process.pid)
        return ""

    def _send(self) -> None:
        while self._socket is not None and self._outbox:
            try:
                # Without SIGPIPE: the program may have set its default action back.
                sent = self._socket.send(self._outbox, socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self._lost("it closed its socket")
                return
            del self._outbox[:sent]

    def _receive(self) -> None:
        while self._socket is not None:
            try:
                piece = self._socket.recv(1 << 20)
                answers = self._decoder.feed(piece)
            except (BlockingIOError, InterruptedError):
                return
            except (OSError, ValueError) as error:
                self._lost(str(error))
                return
            if not piece:
                self._lost("")
                return
            for answer in answers:
                self._progress = time.monotonic()
                if self._pending.pop(answer["id"], None) is not None:
                    self._answers.append(answer)

    def _lost(self, why: str) -> None:
        """The process is of no use any more: start another one, or answer its jobs."""
        why = f"the worker process died ({self._drop() or why or 'without a word'})"
        log.artifact("worker", "%s", why)
        jobs, self._pending = self._pending, {}
        self._outbox.clear()
        for key, job in jobs.items():
            if job.tries >= self.limits.max_tries:
                self._answers.append({"id": key, "kind": "worker", "error": why})
            else:
                self._accept(key, job)

    def _drop(self) -> str:
        """Ends the process and everything it started; its last words."""
        if self._socket is not None:
            self._socket.close()
        process, errors = self._process, self._errors
        self._process = self._socket = self._errors = None
        words = ""
        if process is not None:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, 9)
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                code = process.wait(5)
                words = f"exit code {code}" if code > 0 else f"signal {-code}" if code else ""
        if errors is not None:
            with errors:
                errors.seek(0)
                lines = errors.read().decode(errors="replace").strip().splitlines()
            words = f"{words}: {lines[-1][:300]}" if lines else words
        return words

    def _answer_all(self, why: str) -> None:
        for key in self._pending:
            self._answers.append({"id": key, "kind": "worker", "error": why})
        self._pending.clear()


def _spawn(theirs: socket.socket, errors: IO[bytes] | None) -> _Process:
    """Runs worker_main by path: `-m` would need our package on the child's path, and `-P`
    keeps the script's folder off it, where a user's `random.py` may lie."""
    flags = ["-P", "-I"] if sys.flags.isolated else ["-P"]
    flags += ["-E"] if sys.flags.ignore_environment else []
    flags += ["-s"] if sys.flags.no_user_site else []
    main = Path(__file__).with_name("worker_main.py")
    environment = dict(os.environ, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    return _Process(
        [sys.executable, *flags, str(main), str(theirs.fileno())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,  # None: the program's own, for ACCEL_LOG=worker
        env=environment,
        pass_fds=(theirs.fileno(),),
        # A Ctrl-C in the terminal is not for the worker. In a session of its own, though, Linux
        # would give it as much of the processor as the whole program, whatever its niceness.
        process_group=0,
    )


def _greeting() -> dict[str, Any]:
    """Where the worker finds the same accel and the same torch."""
    return {
        "packages": {"accel": accel.__file__, "torch": torch.__file__},
        "path": [entry for entry in sys.path[1:] if entry],
    }


_WORKERS: weakref.WeakSet[Worker] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for worker in list(_WORKERS):
        worker._forget_parent()


def _close(reference: weakref.ref[Worker]) -> None:
    worker = reference()
    if worker is not None:
        worker.close()


os.register_at_fork(after_in_child=_after_fork_in_child)
