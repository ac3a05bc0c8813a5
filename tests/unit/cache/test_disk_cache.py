"""The disk cache: what is damaged or foreign is never used, and it stays within its size."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from accel import log
from accel.cache import DiskCache, clear, describe


def plan_of(cache: DiskCache, name: str, size: int = 100) -> dict[str, Any]:
    library = f"k_{name}.so"
    (cache.directory / library).write_bytes(name.encode() * size)
    return {"version": 1, "library": library, "steps": []}


def test_what_was_put_is_got(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "plans")
    assert cache.get("a") is None
    plan = plan_of(cache, "a")
    cache.put("a", plan)
    assert DiskCache(tmp_path / "plans").get("a") == plan
    assert (cache.hits, cache.misses, cache.corrupt) == (0, 1, 0)
    assert (tmp_path / "plans").stat().st_mode & 0o777 == 0o700


DAMAGES = {
    "truncated library": lambda p: (p / "k_a.so").write_bytes(b""),
    "other library": lambda p: (p / "k_a.so").write_bytes(b"x" * 100),
    "no library": lambda p: (p / "k_a.so").unlink(),
    "truncated record": lambda p: (p / "a.json").write_text((p / "a.json").read_text()[:40]),
    "empty record": lambda p: (p / "a.json").write_text(""),
    "no object": lambda p: (p / "a.json").write_text("[1]"),
    "changed plan": lambda p: (p / "a.json").write_text(
        (p / "a.json").read_text().replace('"version": 1', '"version": 2')
    ),
    "library elsewhere": lambda p: (p / "a.json").write_text(
        (p / "a.json").read_text().replace("k_a.so", "../k_a.so")
    ),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_damage_is_a_miss_and_is_removed(damage: str, tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    plan = plan_of(cache, "a")
    cache.put("a", plan)
    DAMAGES[damage](tmp_path)
    assert cache.get("a") is None
    assert not (tmp_path / "a.json").exists()
    cache.put("a", plan_of(cache, "a"))
    assert cache.get("a") == plan, "it can be built again"


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_directory_that_others_can_write_is_refused(
    mode: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = tmp_path / "plans"
    wanted.mkdir()
    wanted.chmod(mode)
    log._said.clear()
    cache = DiskCache(wanted)
    assert "can be written by other users" in cache.reason
    assert cache.directory != wanted
    assert cache.directory.stat().st_mode & 0o777 == 0o700
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to give a directory away")
def test_a_foreign_directory_is_refused(tmp_path: Path) -> None:
    wanted = tmp_path / "plans"
    wanted.mkdir(mode=0o700)
    os.chown(wanted, 65534, 65534)
    assert "belongs to another user" in DiskCache(wanted).reason


def test_the_longest_unused_goes_first(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, max_bytes=6000)
    for i, name in enumerate("abcd"):
        cache.put(name, plan_of(cache, name, 1000))
        os.utime(tmp_path / f"{name}.json", (time.time() - 100 + i, time.time() - 100 + i))
    assert cache.get("a") is not None  # used now, so b is the oldest
    cache.put("e", plan_of(cache, "e", 3000))
    cache.sweep()
    left = {path.stem for path in tmp_path.glob("*.json")}
    assert "b" not in left and {"a", "e"} <= left
    assert {path.stem[2:] for path in tmp_path.glob("*.so")} == left


def test_fresh_until_a_program_ended(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "one")
    assert cache.is_fresh
    cache.mark_used()
    assert not DiskCache(tmp_path / "one").is_fresh
    other = DiskCache(tmp_path / "two")
    other.put("a", plan_of(other, "a"))
    assert not other.is_fresh


def test_describe_and_clear(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "plans")
    cache.put("a", plan_of(cache, "a"))
    assert "1 json, 1 so" in describe(tmp_path).replace(".", "")
    assert "removed 3 files" in clear(tmp_path)  # a plan, a library, a lock
    assert cache.get("a") is None
    assert "removed 0 files" in clear(tmp_path / "absent")
