"""Twins on disk, by content, so that a program's next run need not build them again.

In: a function's original code object. Out: its twin, from the directory or built now.
Invariant: what is loaded was written by this user with this rewriter for exactly this code:
file names are digests of the code, of the interpreter and of the rewriter's own source; files
carry a digest of what they hold. A directory or file that others can write, or own, is never
read. Whatever goes wrong with the disk costs the cache, never the program; `reason` says why.

Modules with prologues are not kept: inserting one takes about as long as loading it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import marshal
import os
import stat
import tempfile
import types
from pathlib import Path
from typing import Any

from accel.rewriter import layout, opcodes, twin
from accel.rewriter.twin import TwinParts, assemble_twin, build_twin, twin_parts

_DIGEST_BYTES = 16
_MAX_FILE_BYTES = 1 << 24


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def _tool_version() -> bytes:
    """Changes with the interpreter and with everything that decides what a twin looks like."""
    parts = [importlib.util.MAGIC_NUMBER]
    for module in (layout, opcodes, twin):
        loader: Any = module.__loader__
        source = loader.get_source(module.__name__) if hasattr(loader, "get_source") else None
        if source is None:
            raise OSError(f"the source of {module.__name__} cannot be read")
        parts.append(source.encode())
    return _digest(*parts)


class CodeCache:
    """Twins in one directory; without a usable directory it just builds them.

    `hits`, `built` and `rejected` count twins loaded, built, and files not trusted or broken.
    `reason` is why nothing is read from disk, `write_reason` why nothing is kept; or "".
    """

    def __init__(self, directory: str | os.PathLike[str] | None) -> None:
        self.hits = self.built = self.rejected = 0
        self.reason = self.write_reason = ""
        self._directory = Path(directory or os.devnull)
        self._tool = b""
        if directory is None:
            self.reason = "no directory is configured"
            return
        try:
            self._tool = _tool_version()
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.reason = _distrust(os.stat(self._directory))
        except OSError as error:
            self.reason = str(error)

    def twin(self, code: types.CodeType) -> types.CodeType:
        """The twin of `code`, with markers. Errors: RewriteError, as `build_twin`."""
        if self.reason:
            self.built += 1
            return build_twin(code)
        # Version 2 writes no references, whose presence would hang on reference counts.
        key = _digest(self._tool, marshal.dumps(code, 2))
        parts = self._load(key)
        if parts is None:
            parts = twin_parts(code)
            self.built += 1
            self._store(key, parts)
        else:
            self.hits += 1
        return assemble_twin(code, parts)

    def _path(self, key: bytes) -> Path:
        return self._directory / f"{key.hex()}.twin"

    def _load(self, key: bytes) -> TwinParts | None:
        try:
            fd = os.open(self._path(key), os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        except FileNotFoundError:
            return None
        except OSError:
            self.rejected += 1
            return None
        with open(fd, "rb") as file:
            status = os.fstat(fd)
            if _distrust(status) or status.st_size > _MAX_FILE_BYTES:
                self.rejected += 1
                return None
            try:
                content = file.read()
            except OSError:
                self.rejected += 1
                return None
        payload = content[_DIGEST_BYTES:]
        if content[:_DIGEST_BYTES] != _digest(key, payload):
            self.rejected += 1
            return None
        return _parts(marshal.loads(payload))

    def _store(self, key: bytes, parts: TwinParts) -> None:
        if self.write_reason:
            return
        payload = marshal.dumps(_plain(parts))
        try:
            fd, name = tempfile.mkstemp(dir=self._directory, suffix=".tmp")
            try:
                with open(fd, "wb") as file:
                    file.write(_digest(key, payload) + payload)
                os.replace(name, self._path(key))
            except BaseException:
                os.unlink(name)
                raise
        except OSError as error:  # a full or read-only disk: what is there is still used
            self.write_reason = str(error)


def _distrust(status: os.stat_result) -> str:
    """Why a file or directory is not to be trusted; "" when it is."""
    if hasattr(os, "geteuid") and status.st_uid != os.geteuid():
        return f"owned by user {status.st_uid}"
    if status.st_mode & (stat.S_IWOTH | stat.S_IWGRP):
        return "others may write to it"
    return ""


def _plain(parts: TwinParts) -> Any:
    """The parts as marshal takes them: named tuples it does not."""
    nested = {i: _plain(inner) for i, inner in parts.nested.items()}
    return (*parts[:-1], nested)


def _parts(plain: Any) -> TwinParts:
    """The inverse of `_plain`."""
    code, consts, lines, exceptions, nested = plain
    inner = {i: _parts(each) for i, each in nested.items()}
    return TwinParts(code, consts, lines, exceptions, inner)
