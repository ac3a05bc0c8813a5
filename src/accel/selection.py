"""Selection: which modules' functions may become roots, by settings, calls of enable() and place.

In: the allowlist, what the user enables and disables, where the script lies. Out: whether a module
gets prologues, and which of its functions are recorded at their first call. Invariant: what is
denied stays untouched, whatever else names it.
"""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Iterable
from pathlib import Path

from accel import errors
from accel.config import Config


class Selection:
    """The packages that have a say, in this process."""

    def __init__(self, config: Config) -> None:
        """Errors: ConfigError for a function that is not named as one."""
        self.script_directory: Path | None = None
        self._allowed = {*config.packages, *config.modules}
        self._has_packages = bool(config.packages)
        self.denied = set(config.deny)
        self._functions = functions_by_module(config.functions)
        self._named_in: dict[str, str] = {}  # file -> its module, of which functions are named
        # Names in the settings that nothing has matched so far: (key, name).
        self._unmatched = dict.fromkeys(
            [("packages", name) for name in config.packages]
            + [("modules", name) for name in config.modules]
            + [("functions", name) for name in config.functions]
        )

    def allow(self, package: str) -> None:
        self._allowed.add(package)
        self.denied.discard(package)

    def deny(self, package: str) -> None:
        self._allowed.discard(package)
        self.denied.add(package)

    def denies(self, module: str) -> bool:
        return inside(module, self.denied)

    def selects(self, name: str, path: str | None) -> bool:
        """Whether a module about to be imported gets prologues."""
        if self._unmatched:
            self._match(name)
        if self.denies(name):
            return False
        if name in self._functions and path is not None:
            self._named_in[path] = name
            return True
        if inside(name, self._allowed):
            return True
        if self.script_directory is None or path is None or self._has_packages:
            return False
        return _is_beside(str(self.script_directory), os.path.dirname(path))

    def names(self, code: types.CodeType) -> bool:
        """Whether the settings name this very function."""
        module = self._named_in.get(code.co_filename)
        if module is None or code.co_qualname not in self._functions[module]:
            return False
        self._unmatched.pop(("functions", f"{module}:{code.co_qualname}"), None)
        return True

    def _match(self, module: str) -> None:
        for key, name in list(self._unmatched):
            if key != "functions" and inside(module, {name}):
                del self._unmatched[key, name]

    def unmatched(self) -> list[str]:
        """What the settings name and the program does not have, in words."""
        said = {"functions": "no such function was defined"}
        return [
            f"{key}: {name!r}: {said.get(key, 'no such module was imported')}"
            for key, name in self._unmatched
        ]


def functions_by_module(names: Iterable[str]) -> dict[str, set[str]]:
    """{module: qualified names} of `package.module:name`s. Errors: ConfigError."""
    found: dict[str, set[str]] = {}
    for text in names:
        module, colon, name = text.partition(":")
        if not (module and colon and name):
            raise errors.ConfigError(f"functions: {text!r} is no `package.module:name`")
        found.setdefault(module, set()).add(name)
    return found


def inside(name: str, packages: Iterable[str]) -> bool:
    """True when module `name` is one of `packages` or lies in one."""
    return any(name == p or name.startswith(p + ".") for p in packages)


@functools.lru_cache(4096)
def _is_beside(program: str, directory: str) -> bool:
    """True when the modules in `directory` belong to the program in the folder `program`."""
    path = Path(directory).resolve()
    return (path == Path(program) or Path(program) in path.parents) and (
        "site-packages" not in path.parts
    )


__all__ = ["Selection", "functions_by_module", "inside"]
