"""Forks in the middle of accel's own work, and workers that are killed again and again."""

from __future__ import annotations

from pathlib import Path

import children

HERE = str(Path(__file__).parent)

SET_UP = f"""
sys.path.insert(0, {HERE!r})
from accel import driver, runtime, trial
from accel.capture.recorder import Recorder
from accel.capture.operations import OperationEvents
from accel.compile.service import CompileService
from accel.compile.worker import Worker, WorkerLimits
from accel.driver import Driver
from accel.installing import Installer
from disturbing import inside, root_of, served as served_of

trial.FIRST_REVIEW = 10**9
"""

# In the child, and then in the parent: the call that forked is right, so are later ones, and
# both are served compiled code in the end. `known`: the graph has been compiled before.
FORKS = """
def known(x, y):
    return torch.relu(x * y + 1.0).softmax(-1)

assert served_of(lambda: accel.optimize(known)(x, y)) >= 3
facts = {}

def function(number):
    scope = {"torch": torch}
    text = "x * y + 1.0" if number is None else f"x * {number} + y"
    exec(f"def f(x, y):\\n    return torch.relu({text}).softmax(-1)", scope)
    return accel.optimize(scope["f"]), eval(f"torch.relu({text}).softmax(-1)")

def try_step(owner, name, number):
    f, wanted = function(number)
    right = lambda: torch.testing.assert_close(f(x, y), wanted)
    pids = []
    with inside(owner, name, lambda: pids.append(os.fork())) as hit:
        right()
        deadline = time.time() + 30
        while not pids and time.time() < deadline:
            right()
            accel.wait(0.05)
    assert served_of(right) >= 3
    assert not root_of(f).is_recording
    if pids[0] == 0:
        os._exit(0)
    facts[name] = [hit.recording, os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1])]

try_step(OperationEvents, "after_operation", None)
try_step(Installer, "compile", 1.5)
try_step(Worker, "_accept", 2.5)
try_step(CompileService, "_finished", 3.5)

def forks(x, y):
    z = torch.relu(x * y + 1.0)
    pids.append(os.fork() if len(pids) < 2 else -1)
    return z.softmax(-1)

pids = []
accel.optimize(forks)
right = lambda: torch.testing.assert_close(forks(x, y), eager(x, y))
served_of(right, 10)
segments = served_of(right)
if 0 in pids:
    os._exit(0 if segments else 1)
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids if pid > 0]
facts["a function of the user's"] = [segments >= 3, *codes]
print(json.dumps(facts))
"""


def test_forks(tmp_path: Path) -> None:
    done = children.run(SET_UP + FORKS, ACCEL_CACHE_DIR=str(tmp_path))
    assert done.code == 0, done.stderr
    assert done.facts == {
        "after_operation": [True, 0],
        "compile": [True, 0],
        "_accept": [True, 0],
        "_finished": [False, 0],
        "a function of the user's": [True, 0, 0],
    }, done.stderr
    assert done.complaints() == []


KILLS = """
def kill():
    deadline = time.time() + 30
    while driver.current.service.worker.pid is None and time.time() < deadline:
        check()
        time.sleep(0.005)
    pid = driver.current.service.worker.pid
    if pid is not None:
        os.kill(pid, signal.SIGKILL)
        killed.add(pid)

killed, roots = set(), []
accel.optimize(f)
driver.current.service.worker.limits = WorkerLimits(max_starts=3)
check()
for n in range(5):  # more often than it is started again
    scope = {"torch": torch}
    exec(f"def g(x, y):\\n    return (x * {n}.5 + y).relu().softmax(-1)", scope)
    g = accel.optimize(scope["g"])
    wanted = (x * (n + 0.5) + y).relu().softmax(-1)
    torch.testing.assert_close(g(x, y), wanted)
    assert root_of(g).pending == 1
    if driver.current.service.worker._starts < 3 or driver.current.service.worker.pid:
        kill()
    started = time.time()
    assert accel.wait(60), "waiting for a dead worker"
    assert time.time() - started < 40
    for _ in range(3):
        torch.testing.assert_close(g(x, y), wanted)
        check()
    roots.append(root_of(g).state)
print(json.dumps({"killed": len(killed), "pending": driver.current.service.pending, "roots": roots}))
"""


def test_workers_are_killed_while_they_compile(tmp_path: Path) -> None:
    done = children.run(SET_UP + KILLS, ACCEL_CACHE_DIR=str(tmp_path))
    assert done.code == 0, done.stderr
    assert done.facts["killed"] == 3 and done.facts["pending"] == 0
    assert "blacklisted" in done.facts["roots"]  # when no worker is left: a reason, and eager
    assert "Traceback" not in done.stderr, done.stderr
