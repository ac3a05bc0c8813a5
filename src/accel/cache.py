"""The disk cache: plans and kernel libraries by content.

In: a key and a plan whose library lies in the cache's directory. Out: the same, verified.
Invariants: a directory that others could write to is never read; a file appears under its
name complete or not at all; a library is handed out only while its hash is the recorded
one; whatever is damaged is a miss.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel import log
from accel.errors import CacheError

MAX_BYTES = 2 << 30
# Files that no record names are somebody's unfinished work until they are this old.
_UNFINISHED_S = 3600.0
_PUTS_BETWEEN_SWEEPS = 64
_LOCK_TIMEOUT_S = 180.0
_USED = ".used"


def refusal(directory: Path) -> str:
    """Why `directory` must not be read; empty when only this user can write there."""
    facts = directory.stat()
    if facts.st_uid != os.getuid():
        return f"{directory} belongs to another user"
    if facts.st_mode & 0o022:
        return f"{directory} can be written by other users"
    if not os.access(directory, os.W_OK | os.X_OK):
        return f"{directory} cannot be written"
    return ""


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Usage:
    """What lies in a cache directory."""

    plans: int
    libraries: int
    size_bytes: int


class DiskCache:
    """A directory of `<key>.json` records and the libraries they name.

    `reason` says why nothing lasts beyond this process; empty when the wanted directory is
    used. `hits`, `misses` and `corrupt` count what `get` found.
    """

    def __init__(self, wanted: Path, max_bytes: int = MAX_BYTES) -> None:
        self.wanted = wanted
        self.max_bytes = max_bytes
        self.hits = self.misses = self.corrupt = 0
        self.reason = self._prepare()
        self._temporary: Path | None = None
        self._puts = 0
        if self.reason:
            log.notice_once(
                f"compiled code is not kept: {self.reason}; ACCEL_CACHE_DIR names another directory"
            )

    def _prepare(self) -> str:
        try:
            self.wanted.mkdir(mode=0o700, parents=True, exist_ok=True)
            return refusal(self.wanted)
        except OSError as error:
            return f"{self.wanted}: {error.strerror}"

    @property
    def directory(self) -> Path:
        """Where plans and libraries lie; a private one for this process if need be.

        Errors: CacheError when no directory can be written at all.
        """
        if not self.reason:
            return self.wanted
        if self._temporary is None:
            try:
                self._temporary = Path(tempfile.mkdtemp(prefix="accel-"))
            except OSError as error:
                raise CacheError(f"there is no directory to compile in: {error}") from error
            atexit.register(_remove_own, self._temporary, os.getpid())
        return self._temporary

    @property
    def is_fresh(self) -> bool:
        """True until a first program has ended with this cache, or a plan is in it."""
        if self.reason:
            return True
        with contextlib.suppress(OSError), os.scandir(self.wanted) as entries:
            return not any(e.name == _USED or e.name.endswith(".json") for e in entries)
        return True

    def mark_used(self) -> None:
        """A program has ended with this cache."""
        if not self.reason:
            with contextlib.suppress(OSError):
                (self.wanted / _USED).touch(mode=0o600)

    def get(self, key: str) -> dict[str, Any] | None:
        """The plan stored under `key`, if it and its library are intact."""
        path = self.directory / f"{key}.json"
        try:
            plan = self._verified(path)
        except FileNotFoundError as error:
            self.misses += 1
            if error.filename != str(path):  # the library is gone: so is the plan
                self.forget(key)
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.corrupt += 1
            log.artifact("driver", "dropped a damaged plan %s: %s", path, error)
            self.forget(key)
            return None
        self.hits += 1
        with contextlib.suppress(OSError):
            os.utime(path)  # eviction drops what was used longest ago
        return plan

    def _verified(self, path: Path) -> dict[str, Any]:
        record = json.loads(path.read_text(encoding="utf-8"))
        plan = record["plan"]
        if digest_of_plan(plan) != record["plan_sha256"]:
            raise ValueError("the plan does not match its hash")
        library = plan["library"]
        if library is not None:
            if os.path.basename(library) != library:
                raise ValueError("the library lies elsewhere")
            if digest(path.parent / library) != record["library_sha256"]:
                raise ValueError("the library does not match its hash")
        return plan  # type: ignore[no-any-return]

    def put(self, key: str, plan: dict[str, Any]) -> None:
        """Stores a plan whose library lies in the directory already. Errors: OSError."""
        library = plan["library"]
        record = {
            "plan": plan,
            "plan_sha256": digest_of_plan(plan),
            "library_sha256": digest(self.directory / library) if library else None,
        }
        handle, name = tempfile.mkstemp(dir=self.directory, prefix=".put_")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(record, file)
            os.replace(name, self.directory / f"{key}.json")
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        if self._puts % _PUTS_BETWEEN_SWEEPS == 0:
            self.sweep()
        self._puts += 1

    def forget(self, key: str) -> None:
        """Drops a plan that turned out to be unusable."""
        with contextlib.suppress(OSError):
            (self.directory / f"{key}.json").unlink()

    @contextlib.contextmanager
    def building(self, key: str) -> Iterator[None]:
        """Held while `key` is compiled, so that many processes compile it once.

        Only saves work: without locks (a file system that has none, a stuck process)
        everybody compiles, and renaming keeps files whole.
        """
        from filelock import FileLock, Timeout  # 30 ms: only the worker pays them

        with contextlib.ExitStack() as stack:
            lock = FileLock(self.directory / f".lock_{key[:2]}", mode=0o600)
            with contextlib.suppress(OSError, NotImplementedError, Timeout):
                stack.enter_context(lock.acquire(timeout=_LOCK_TIMEOUT_S))
            yield

    def usage(self) -> Usage:
        files = _files(self.directory)
        names = [path.name for path, _, _ in files]
        return Usage(
            sum(name.endswith(".json") for name in names),
            sum(name.endswith((".so", ".cubins")) for name in names),
            sum(size for _, size, _ in files),
        )

    def sweep(self) -> None:
        """Drops the plans used longest ago until the rest fits, and what nobody names."""
        from filelock import FileLock, Timeout

        with contextlib.suppress(OSError, NotImplementedError, Timeout):
            lock = FileLock(self.directory / ".lock_sweep", mode=0o600)
            with lock.acquire(timeout=0):
                self._sweep()

    def _sweep(self) -> None:
        files = _files(self.directory)
        total = sum(size for _, size, _ in files)
        now = time.time()
        if total > self.max_bytes:
            records = sorted((f for f in files if f[0].suffix == ".json"), key=lambda f: f[2])
            kept = [path for path, _, _ in records]
            libraries = {path: _library_of(path) for path in kept}
            sizes = {path.name: size for path, size, _ in files}
            while kept and total > self.max_bytes * 3 // 4:
                victim = kept.pop(0)
                victim.unlink(missing_ok=True)
                total -= sizes[victim.name]
                library = libraries.pop(victim)
                if library in sizes and library not in libraries.values():
                    (self.directory / library).unlink(missing_ok=True)
                    total -= sizes[library]
            named = set(libraries.values())
            for path, _, modified in files:
                if path.suffix in (".so", ".o", ".cubins") and path.name not in named:
                    _drop_if_old(path, modified, now)
        for path, _, modified in files:
            if path.name.startswith(".put_"):
                _drop_if_old(path, modified, now)
        for path in self.directory.glob(".build_*"):
            with contextlib.suppress(OSError):
                if now - path.stat().st_mtime > _UNFINISHED_S:
                    shutil.rmtree(path, ignore_errors=True)


# What accel writes below its cache directory, and nothing else is ever removed.
_OWN_FILES = {
    "plans": (
        "*.json",
        "k_*.so",
        "k_*.o",
        "k_*.cubins",
        "*.trial",
        ".put_*",
        ".lock_*",
        ".build_*",
        _USED,
    ),
    "code": ("*.twin", "*.tmp"),
}


def describe(root: Path) -> str:
    """What lies in the cache at `root`, for people."""
    lines = [str(root)]
    for name, patterns in _OWN_FILES.items():
        found = _files(root / name)
        known = [f for f in found if any(f[0].match(pattern) for pattern in patterns)]
        size = sum(size for _, size, _ in known)
        kinds = {pattern: sum(f[0].match(pattern) for f in known) for pattern in patterns[:2]}
        counts = ", ".join(
            f"{count} {pattern[1:].lstrip('_*')}" for pattern, count in kinds.items()
        )
        lines.append(f"  {name:<6} {size / 2**20:8.1f} MiB  {counts}")
    return "\n".join(lines)


def clear(root: Path) -> str:
    """Removes accel's own files below `root`; what was done, for people."""
    removed = size_bytes = 0
    problems = []
    for name, patterns in _OWN_FILES.items():
        for path in [p for pattern in patterns for p in (root / name).glob(pattern)]:
            try:
                size = path.lstat().st_size
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            except FileNotFoundError:  # another process was faster
                continue
            except OSError as error:
                problems.append(f"; {path} stays: {error.strerror}")
                continue
            removed, size_bytes = removed + 1, size_bytes + size
    return f"{root}: removed {removed} files, {size_bytes / 2**20:.1f} MiB{''.join(problems[:3])}"


def digest_of_plan(plan: dict[str, Any]) -> str:
    text = json.dumps(plan, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _files(directory: Path) -> list[tuple[Path, int, float]]:
    """(path, size in bytes, time of last use) of the plain files in `directory`."""
    found = []
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                facts = entry.stat(follow_symlinks=False)
                if entry.is_file(follow_symlinks=False):
                    found.append((Path(entry.path), facts.st_size, facts.st_mtime))
    return found


def _library_of(record: Path) -> str:
    try:
        return str(json.loads(record.read_text(encoding="utf-8"))["plan"]["library"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _drop_if_old(path: Path, modified: float, now: float) -> None:
    if now - modified > _UNFINISHED_S:
        with contextlib.suppress(OSError):
            path.unlink()


def _remove_own(directory: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked child leaves it to its parent
        shutil.rmtree(directory, ignore_errors=True)
