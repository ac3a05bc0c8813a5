"""A worker that starts as a copy of this process, with torch imported already.

In: the thread's process, which must not have run any code of the user's yet: a copy would
inherit it, its locks and its handlers. Out: the worker's process id and our end of its socket.
Invariant: the copy keeps nothing open but its socket and never returns into this program's
code; it is no child of this process, so that a program that waits for all of its children
does not wait for the worker.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable
from typing import IO


class ForkedProcess:
    """What `subprocess.Popen` would be for it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Whether and how it ends only its new parent could tell."""
        return 0


def is_possible() -> bool:
    return hasattr(os, "fork") and hasattr(os, "closerange")


def fork_worker(
    serve: Callable[[socket.socket], None], errors: IO[bytes] | None
) -> tuple[ForkedProcess, socket.socket]:
    """Runs `serve(socket)` in the copy; `errors` becomes its stderr (None: stays as it is).

    Errors: OSError when the system has no room for another process.
    """
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    result, report = os.pipe()
    try:
        with warnings.catch_warnings():  # 3.12 warns of threads; NumPy's are idle
            warnings.simplefilter("ignore")
            child = os.fork()
        if child == 0:
            _run_grandchild(serve, theirs, report, errors)
        _, status = os.waitpid(child, 0)
        pid = int.from_bytes(os.read(result, 8), "little")
        if status != 0 or pid == 0:
            raise OSError("the worker process could not be forked")
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()
        os.close(result)
        os.close(report)
    return ForkedProcess(pid), ours


def _run_grandchild(
    serve: Callable[[socket.socket], None],
    connection: socket.socket,
    report: int,
    errors: IO[bytes] | None,
) -> None:
    """In the child: forks once more and ends. In the grandchild: serves and ends."""
    try:
        if (pid := os.fork()) != 0:
            os.write(report, pid.to_bytes(8, "little"))
            os._exit(0)
        os.setpgid(0, 0)  # a Ctrl-C in the terminal is not for the worker
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        if errors is not None:
            os.dup2(errors.fileno(), 2)
        handle = connection.fileno()
        os.closerange(3, handle)
        os.closerange(handle + 1, os.sysconf("SC_OPEN_MAX"))
        serve(connection)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(1)
