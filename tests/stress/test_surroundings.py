"""Without a compiler, a usable cache or a worker, programs run on, eagerly, and say why once."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import children
import pytest

NOBODY = 65534

PROGRAM = """
warm()
print(json.dumps(accel.counters()))
"""


def succeeded(done: children.Finished) -> children.Finished:
    assert done.code == 0, f"exit code {done.code}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_a_healthy_run_is_compiled_and_silent(tmp_path: Path) -> None:
    done = succeeded(children.run(PROGRAM, ACCEL_CACHE_DIR=str(tmp_path)))
    assert done.facts["calls_compiled"] >= 2
    assert done.stderr == ""


def test_no_compiler(tmp_path: Path) -> None:
    empty = tmp_path / "bin"
    empty.mkdir()
    cache = str(tmp_path / "cache")
    done = succeeded(children.run(PROGRAM, PATH=str(empty), CXX="", ACCEL_CACHE_DIR=cache))
    assert done.facts["calls_compiled"] == 0
    assert sum("compiler" in line for line in done.complaints()) == 1, done.stderr


def test_a_broken_compiler(tmp_path: Path) -> None:
    compiler = tmp_path / "broken-g++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    done = succeeded(
        children.run(PROGRAM, CXX=str(compiler), ACCEL_CACHE_DIR=str(tmp_path / "cache"))
    )
    assert done.facts["calls_eager"] >= 1
    assert len(done.complaints()) == 1, done.stderr
    assert "the C++ compiler failed" in done.complaints()[0]


def test_a_cache_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = str(tmp_path / "file" / "cache")
    done = succeeded(children.run(PROGRAM, ACCEL_CACHE_DIR=cache))
    assert len(done.complaints()) <= 1, done.stderr


def read_only_mount(directory: Path) -> list[str]:
    """A command prefix under which `directory` is read-only, for root too."""
    mount = f'mount -t tmpfs -o ro tmpfs {directory} && exec "$@"'
    prefix = ["unshare", "-m", "sh", "-c", mount, "sh"]
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount")
    return prefix


def test_a_read_only_cache(tmp_path: Path) -> None:
    prefix: list[str] = []
    if os.getuid() == 0:
        prefix = read_only_mount(tmp_path)
    else:
        tmp_path.chmod(0o555)
    done = succeeded(children.run(PROGRAM, prefix=prefix, ACCEL_CACHE_DIR=str(tmp_path)))
    assert len(done.complaints()) <= 1, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to give files away")
def test_a_foreign_cache_is_not_loaded_from(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    succeeded(children.run(PROGRAM, ACCEL_CACHE_DIR=str(cache)))
    libraries = list(cache.rglob("*.so"))
    assert libraries, "the healthy run must have cached a library"
    for path in (cache, *cache.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    loaded = """
    warm()
    mapped = open("/proc/self/maps").read()
    print(json.dumps(os.environ["ACCEL_CACHE_DIR"] in mapped))
    """
    done = succeeded(children.run(loaded, ACCEL_CACHE_DIR=str(cache)))
    assert done.facts is False, "a library of another user was loaded"
    assert done.complaints(), "nothing was said about the foreign cache directory"


@pytest.mark.parametrize("content", [b"", b"garbage" * 100], ids=["truncated", "overwritten"])
def test_a_corrupt_cache(tmp_path: Path, content: bytes) -> None:
    succeeded(children.run(PROGRAM, ACCEL_CACHE_DIR=str(tmp_path)))
    for path in tmp_path.rglob("*"):
        if path.is_file():
            path.write_bytes(content)
    again = succeeded(children.run(PROGRAM, ACCEL_CACHE_DIR=str(tmp_path)))
    assert again.facts["calls_compiled"] >= 2, "what is damaged must be built again"
    assert again.stderr == ""
    for library in tmp_path.rglob("*.so"):
        assert library.read_bytes() != content, "a damaged library was left there"


KILLED = """
from accel import driver

def kill_worker():
    deadline = time.time() + 30
    while driver.current.service.worker.pid is None and time.time() < deadline:
        check()
        time.sleep(0.01)
    pid = driver.current.service.worker.pid
    os.kill(pid, signal.SIGKILL)
    return pid

accel.optimize(f)
check()
killed = [kill_worker()]  # the copy of this process
for _ in range(20):
    check()
assert accel.wait(60), "waiting for a dead worker"
for _ in range(3):
    check()

def h(x, y):
    return (x - y).exp().relu()

accel.optimize(h)
h(x, y)
killed.append(kill_worker())  # one that was started
for _ in range(4):
    torch.testing.assert_close(h(x, y), (x - y).exp().relu())
    accel.wait(60)

def g(x, y):
    return (x + y).exp().relu()

accel.optimize(g)
for _ in range(4):
    torch.testing.assert_close(g(x, y), (x + y).exp().relu())
    accel.wait(60)
print(json.dumps({"killed": len(set(killed)), **accel.counters()}))
"""


def test_a_killed_worker(tmp_path: Path) -> None:
    done = succeeded(children.run(KILLED, ACCEL_CACHE_DIR=str(tmp_path)))
    assert done.facts["killed"] == 2
    assert done.facts["calls_compiled"] + done.facts["calls_eager"] >= 20
