"""The disk cache: plans and kernel libraries by content.

In: a key and a plan with its library. Out: the same, verified. Invariant: a directory that
is not ours alone is never read; a file is written under a temporary name and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from accel import log


def is_private(directory: Path) -> bool:
    """True when only this user can write there."""
    facts = directory.stat()
    return facts.st_uid == os.getuid() and not facts.st_mode & 0o022


class DiskCache:
    """A directory of `<key>.json` records and the libraries they name."""

    def __init__(self, directory: Path) -> None:
        self.reason = ""
        self.directory = self._prepare(directory)
        self.hits = self.misses = self.corrupt = 0

    def _prepare(self, wanted: Path) -> Path:
        try:
            wanted.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not is_private(wanted):
                self.reason = f"{wanted} is not private to this user"
            elif not os.access(wanted, os.W_OK):
                self.reason = f"{wanted} cannot be written"
            else:
                return wanted
        except OSError as error:
            self.reason = f"{wanted}: {error.strerror}"
        log.notice_once(f"no lasting cache: {self.reason}")
        return Path(tempfile.mkdtemp(prefix="accel-"))

    def get(self, key: str) -> dict[str, Any] | None:
        """The plan stored under `key`, if it and its library are intact."""
        path = self.directory / f"{key}.json"
        try:
            record = json.loads(path.read_text())
            library = record["plan"]["library"]
            if (
                library is not None
                and _digest(self.directory / library) != record["library_sha256"]
            ):
                raise ValueError("library does not match its record")
        except FileNotFoundError:
            self.misses += 1
            return None
        except (OSError, ValueError, KeyError, TypeError):
            self.corrupt += 1
            path.unlink(missing_ok=True)
            return None
        self.hits += 1
        return record["plan"]  # type: ignore[no-any-return]

    def put(self, key: str, plan: dict[str, Any]) -> None:
        """Stores a plan whose library lies in the directory already."""
        library = plan["library"]
        record = {
            "plan": plan,
            "library_sha256": _digest(self.directory / library) if library else None,
        }
        handle, name = tempfile.mkstemp(dir=self.directory)
        with os.fdopen(handle, "w") as file:
            json.dump(record, file)
        os.replace(name, self.directory / f"{key}.json")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
