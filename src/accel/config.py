"""Settings: flags over ACCEL_* environment over file over defaults.

In: `accel.toml` or `[tool.accel]` of pyproject.toml beside the script or above, and the
environment. Out: a frozen `Config`. Invariant: an unknown key or a wrong type is a
ConfigError that names file, key and the nearest valid key.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import platformdirs

from accel.errors import ConfigError


@dataclass(frozen=True)
class Config:
    """Every setting; `ROWS` says how each is named and documented."""

    packages: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    functions: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    backend: str = "native"
    threshold: int = 2
    dynamic: bool = False
    deterministic: bool = False
    log: tuple[str, ...] = ()
    cache_dir: str = field(default_factory=lambda: platformdirs.user_cache_dir("accel"))
    quiet: bool = False
    sync: bool = False
    verify: bool = False
    strict: bool = False
    max_variants: int = 8
    stance: str = "default"


# Rules for whoever adds a row: the key is a field of Config; the text is one clause.
ROWS: dict[str, str] = {
    "packages": "packages whose functions are roots, besides the script's own",
    "modules": "single modules whose functions are roots",
    "functions": "dotted names of functions that are recorded at their first call",
    "deny": "packages and modules that stay untouched",
    "backend": "who compiles graphs: native, eager, or a name of torch's registry",
    "threshold": "at which call a root is recorded",
    "dynamic": "reserved for symbolic shapes",
    "deterministic": "install compiled code at fixed call counts; nothing depends on timing",
    "log": "artifacts to log: trace, guards, exits, graph, loops, schedule, code, driver, worker",
    "cache_dir": "where compiled code is kept",
    "quiet": "no progress line and no summary",
    "sync": "wait for each compilation",
    "verify": "check plans and graphs at every stage",
    "strict": "raise accel's own errors instead of running eagerly (for its tests)",
    "max_variants": "how many variants a root may have",
    "stance": "default or force_eager",
}
_TYPES = {f.name: f.type for f in fields(Config)}
_TRUE, _FALSE = frozenset({"1", "true", "yes", "on"}), frozenset({"0", "false", "no", "off", ""})


def _check_key(key: str, where: str) -> None:
    if key not in ROWS:
        near = difflib.get_close_matches(key, ROWS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{where}: unknown key {key!r}{hint}")


def _from_file(key: str, value: Any, where: str) -> Any:
    kind = str(_TYPES[key])
    right: bool
    if kind.startswith("tuple"):
        right = isinstance(value, list) and all(isinstance(v, str) for v in value)
        if right:
            return tuple(value)
        wanted = "a list of strings"
    elif kind == "bool":
        right, wanted = isinstance(value, bool), "true or false"
    elif kind == "int":
        right, wanted = isinstance(value, int) and not isinstance(value, bool), "an integer"
    else:
        right, wanted = isinstance(value, str), "a string"
    if not right:
        raise ConfigError(f"{where}: {key!r} must be {wanted}, not {value!r}")
    return value


def _from_text(key: str, text: str, where: str) -> Any:
    kind = str(_TYPES[key])
    if kind.startswith("tuple"):
        return tuple(part for part in text.split(",") if part)
    if kind == "bool":
        if text.lower() not in _TRUE | _FALSE:
            raise ConfigError(f"{where} must be 1 or 0, not {text!r}")
        return text.lower() in _TRUE
    if kind == "int":
        try:
            return int(text)
        except ValueError:
            raise ConfigError(f"{where} must be an integer, not {text!r}") from None
    return text


def find_file(start: Path) -> Path | None:
    """The nearest accel.toml, or pyproject.toml with [tool.accel], from `start` upwards."""
    for directory in (start, *start.parents):
        if (directory / "accel.toml").is_file():
            return directory / "accel.toml"
        project = directory / "pyproject.toml"
        if project.is_file():
            try:
                if "accel" in tomllib.loads(project.read_text()).get("tool", {}):
                    return project
            except tomllib.TOMLDecodeError:
                return None
    return None


def read_file(path: Path) -> dict[str, Any]:
    """The settings in a file. Errors: ConfigError."""
    try:
        data = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from None
    if path.name == "pyproject.toml":
        data = data["tool"]["accel"]
    values = {}
    for key, value in data.items():
        _check_key(key, str(path))
        values[key] = _from_file(key, value, str(path))
    return values


def load(
    start: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Config:
    """The effective settings. Errors: ConfigError."""
    environment = os.environ if environment is None else environment
    path = find_file((start or Path.cwd()).resolve())
    values = read_file(path) if path is not None else {}
    for key in ROWS:
        text = environment.get(f"ACCEL_{key.upper()}")
        if text is not None:
            values[key] = _from_text(key, text, f"ACCEL_{key.upper()}")
    values.update(flags or {})
    return Config(**values)
