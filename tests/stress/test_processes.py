"""Threads, forks and spawned children of a program with compiled code."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import children

THREADS = """
accel.optimize(f)
errors = []
start = threading.Barrier(8)

def work(seed):
    generator = torch.Generator().manual_seed(seed)
    rows = 4 if seed % 2 else 5
    try:
        start.wait()
        for step in range(300):
            a = torch.randn(rows, 8, generator=generator)
            b = torch.randn(rows, 8, generator=generator)
            check(f, a, b)
            if step in (50, 100):  # the second shape's recording may come after the first wait
                accel.wait(60)
    except BaseException as error:
        errors.append(repr(error))

threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
print(json.dumps({"errors": errors, "served": served()}))
"""


def test_eight_threads_on_one_root() -> None:
    done = children.run(THREADS)
    assert done.code == 0, done.stderr
    assert done.facts["errors"] == []
    assert done.facts["served"] > 1000


FORK = """
warm()
def in_child(action):
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def old_root():
    before = served()
    for _ in range(10):
        check()
    assert served() >= before + 10, "a forked child must use what was compiled before"

def new_root():
    def g(x, y):
        return (x - y).sigmoid()
    accel.optimize(g)
    for _ in range(4):
        torch.testing.assert_close(g(x, y), (x - y).sigmoid())
        accel.wait(60)

def reset():
    accel.reset()
    warm()

codes = [in_child(action) for action in (old_root, new_root, reset)]
check()
before = served()
check()
print(json.dumps({"codes": codes, "still": served() > before}))
"""


def test_fork_after_compiling() -> None:
    done = children.run(FORK)
    assert done.code == 0, done.stderr
    assert done.facts == {"codes": [0, 0, 0], "still": True}, done.stderr


FORK_EARLY = """
accel.optimize(f)
check()  # recorded; its compilation is under way
pid = os.fork()
for _ in range(20):
    check()
assert accel.wait(60)
check()
if pid == 0:
    os._exit(0)
print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
"""


def test_fork_while_compiling() -> None:
    done = children.run(FORK_EARLY)
    assert done.code == 0, done.stderr
    assert done.facts == 0, done.stderr


SPAWN = """
import multiprocessing
import torch

def f(x):
    return torch.relu(x * 2 + 1)

def child(n):
    out = None
    for _ in range(4):
        out = f(torch.ones(n))
    return out.sum().item()

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        print(pool.map(child, [1, 2, 3, 4]))
"""


def test_spawned_workers_of_a_script(tmp_path: Path) -> None:
    import subprocess
    import sys

    script = tmp_path / "spawning.py"
    script.write_text(SPAWN)
    done = subprocess.run(
        [sys.executable, "-m", "accel", "run", str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[3.0, 6.0, 9.0, 12.0]"


LEFT_RUNNING = """
accel.optimize(f)
check()
sys.exit(7)
"""


def test_exit_while_compiling_is_prompt_and_keeps_the_code() -> None:
    done = children.run(LEFT_RUNNING)
    assert done.code == 7
    assert "Traceback" not in done.stderr, done.stderr


def run_under_accel(script: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "accel", "run", "--quiet", str(script)],
        capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **variables},
    )  # fmt: skip


def test_a_program_that_waits_for_all_its_children(tmp_path: Path) -> None:
    """The worker is no child of the program: waiting for every child comes to an end."""
    script = tmp_path / "waits.py"
    script.write_text(
        "import os\n"
        "for code in (3, 4):\n"
        "    if os.fork() == 0:\n"
        "        os._exit(code)\n"
        "ends = []\n"
        "while True:\n"
        "    try:\n"
        "        ends.append(os.waitstatus_to_exitcode(os.wait()[1]))\n"
        "    except ChildProcessError:\n"
        "        break\n"
        "print(sorted(ends))\n"
    )
    done = run_under_accel(script)
    assert (done.returncode, done.stdout) == (0, "[3, 4]\n"), done.stderr


def test_the_worker_of_a_program_has_nothing_open_and_ends_with_it(tmp_path: Path) -> None:
    script = tmp_path / "looks.py"
    script.write_text(
        "import os, torch, accel\n"
        "from accel import driver\n"
        "kept = open(os.devnull)\n"
        "def f(x):\n"
        "    return torch.relu(x * 2 + 1)\n"
        "for _ in range(4):\n"
        "    f(torch.ones(8))\n"
        "    assert accel.wait(60)\n"
        "pid = driver.current.service.worker.pid\n"
        "links = [os.readlink(f'/proc/{pid}/fd/{n}') for n in os.listdir(f'/proc/{pid}/fd')]\n"
        "print(pid, accel.counters()['calls_compiled'], sum('socket' in l for l in links))\n"
        "print([l for l in links if not l.startswith(('socket', '/dev/null', '/tmp/'))])\n"
    )
    done = run_under_accel(script, ACCEL_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    pid, served, sockets = first.split()
    assert float(served) >= 1 and sockets == "1" and second == "[]"
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()
