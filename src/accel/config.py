"""Settings: flags over ACCEL_* environment over file over defaults.

In: `accel.toml` or `[tool.accel]` of pyproject.toml beside the script or above it, else in
the working directory or above it; the environment; flags. Out: a frozen `Config`, and where
each value came from. Invariant: an unknown key, a wrong type or a value out of range is a
ConfigError that names file, line, key and the nearest valid key.

Rules for whoever adds a setting: a field of `Config` with a default and a `_setting` text of
one clause is all; file key, ACCEL_* variable, command line flag and docs/switches.md follow.
"""

from __future__ import annotations

import os
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel.errors import ConfigError

if TYPE_CHECKING:
    import argparse

ARTIFACTS = (
    "trace", "guards", "exits", "graph", "loops", "schedule", "code", "driver", "worker", "recompiles",
)  # fmt: skip


def _setting(
    text: str,
    default: Any = None,
    *,
    make: Callable[[], Any] | None = None,
    choices: tuple[str, ...] = (),
    minimum: int | None = None,
) -> Any:
    metadata = {"text": text, "choices": choices, "minimum": minimum}
    if make is not None:
        return field(default_factory=make, metadata=metadata)
    return field(default=default, metadata=metadata)


def _default_cache() -> str:
    import platformdirs

    return platformdirs.user_cache_dir("accel")


@dataclass(frozen=True)
class Config:
    """Every setting; its text is the documentation."""

    packages: tuple[str, ...] = _setting("packages whose functions may be recorded", ())
    modules: tuple[str, ...] = _setting("single modules whose functions may be recorded", ())
    functions: tuple[str, ...] = _setting(
        "functions (`package.module:name`, `__main__:name`) that are recorded at their first call",
        (),
    )
    deny: tuple[str, ...] = _setting("packages and modules that stay untouched", ())
    backend: str = _setting(
        "who compiles graphs: `native`, `eager`, or a name of torch's backend registry", "native"
    )
    threshold: int = _setting("at which of its calls a function is recorded", 2, minimum=1)
    dynamic: bool | None = _setting(
        "leave sizes open: all at once (true), none (false), or those that change (absent)"
    )
    deterministic: bool = _setting(
        "install compiled code at fixed call counts; nothing depends on timing", False
    )
    log: tuple[str, ...] = _setting("what to log on stderr", (), choices=ARTIFACTS)
    cache_dir: str = _setting("where compiled code is kept", make=_default_cache)
    cache_size_mb: int = _setting("how large it may grow, in MiB", 2048, minimum=1)
    quiet: bool = _setting("no progress line and no summary", False)
    sync: bool = _setting("wait for each compilation", False)
    worker: bool = _setting("compile in a worker process; else in the program, pausing it", True)
    verify: bool = _setting("check plans and graphs at every stage", False)
    strict: bool = _setting("raise accel's own errors instead of running eagerly", False)
    max_variants: int = _setting("how many compiled variants a function may have", 8, minimum=1)
    stance: str = _setting(
        "what to do with calls: `default`; `force_eager`; `eager_on_recompile` or "
        "`fail_on_recompile` where no compiled code fits", "default",
        choices=("default", "force_eager", "eager_on_recompile", "fail_on_recompile"),
    )  # fmt: skip
    fast_dropout: bool = _setting(
        "compiled code draws dropout masks itself, faster: other random numbers than eager's, "
        "seeded from them",
        False,
    )
    tiled_convolutions: bool = _setting(
        "3x3 convolutions in float32 are computed over tiles (Winograd), with 2.25 times fewer "
        "multiplications; rounding errors are then relative to all that a window meets, also where taps are small",
        True,
    )
    gpus: bool = _setting(
        "programs on NVIDIA's GPUs are compiled too; each GPU is tried first, and stays with eager where a "
        "kernel's result is another",
        True,
    )
    cuda_graphs: bool = _setting(
        "on a GPU, kernels of ours that follow each other are launched at once, as a CUDA graph; each GPU is tried "
        "first, and launches kernels one by one where a graph's result is another",
        False,
    )
    checkpoints: bool = _setting(
        "functions given to torch.utils.checkpoint(use_reentrant=False) run compiled, both times; what "
        "they read must not change before their backward",
        False,
    )
    dump_dir: str = _setting(
        "a folder that gets, for each graph, one numbered file per compiler stage", ""
    )


@dataclass(frozen=True)
class Setting:
    """One row of the table that drives files, environment, flags and documentation."""

    key: str
    kind: str  # a row of _KINDS
    text: str
    choices: tuple[str, ...]
    minimum: int | None

    @property
    def variable(self) -> str:
        return f"ACCEL_{self.key.upper()}"

    @property
    def flag(self) -> str:
        return f"--{self.key.replace('_', '-')}"


@dataclass(frozen=True)
class _Kind:
    """What values of a setting look like in a file and as text."""

    wanted: str
    is_right: Callable[[Any], bool]
    from_text: Callable[[str], Any]  # ValueError for a text that means nothing


_TRUTHS = {"1": True, "true": True, "yes": True, "on": True,
           "0": False, "false": False, "no": False, "off": False, "": False}  # fmt: skip


def _truth(text: str) -> bool:
    try:
        return _TRUTHS[text.strip().lower()]
    except KeyError:
        raise ValueError(text) from None


def _is_strings(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)


_KINDS = {
    "strings": _Kind(
        "a list of strings",
        _is_strings,
        lambda text: tuple(part.strip() for part in text.split(",") if part.strip()),
    ),
    "truth": _Kind("true or false", lambda v: isinstance(v, bool), _truth),
    "choice of truth": _Kind(
        "true, false or absent",
        lambda v: v is None or isinstance(v, bool),
        lambda text: None if text.strip().lower() in ("", "auto") else _truth(text),
    ),
    "integer": _Kind("an integer", lambda v: isinstance(v, int) and not isinstance(v, bool), int),
    "string": _Kind("a string", lambda v: isinstance(v, str), str),
}
_KIND_OF_TYPE: dict[Any, str] = {
    tuple[str, ...]: "strings",
    bool: "truth",
    bool | None: "choice of truth",
    int: "integer",
    str: "string",
}


@cache
def settings() -> Mapping[str, Setting]:
    """Every setting by its key, in the order of `Config`."""
    hints = typing.get_type_hints(Config)
    rows = {}
    for f in fields(Config):
        meta = f.metadata
        kind = _KIND_OF_TYPE[hints[f.name]]
        rows[f.name] = Setting(f.name, kind, meta["text"], meta["choices"], meta["minimum"])
    return types.MappingProxyType(rows)


def _checked(setting: Setting, value: Any, where: str) -> Any:
    """`value` in its final form. Errors: ConfigError."""
    kind = _KINDS[setting.kind]
    if not kind.is_right(value):
        raise ConfigError(f"{where} must be {kind.wanted}, not {value!r}")
    if setting.minimum is not None and value < setting.minimum:
        raise ConfigError(f"{where} must be at least {setting.minimum}, not {value}")
    for part in value if setting.kind == "strings" else (value,):
        if setting.choices and part not in setting.choices:
            near = _nearest(part, setting.choices)
            raise ConfigError(f"{where}: {part!r} is not one of {', '.join(setting.choices)}{near}")
    return tuple(value) if setting.kind == "strings" else value


def _nearest(word: str, known: typing.Iterable[str]) -> str:
    import difflib

    near = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _parsed(setting: Setting, text: str, where: str) -> Any:
    kind = _KINDS[setting.kind]
    try:
        value = kind.from_text(text)
    except ValueError:
        raise ConfigError(f"{where} must be {kind.wanted}, not {text!r}") from None
    return _checked(setting, value, where)


def find_file(start: Path) -> Path | None:
    """The nearest accel.toml, or pyproject.toml with [tool.accel], from `start` upwards.

    Errors: ConfigError when a pyproject.toml that speaks of tool.accel cannot be read.
    """
    import tomllib

    for directory in (start, *start.parents):
        own, project = directory / "accel.toml", directory / "pyproject.toml"
        if own.is_file():
            return own
        if project.is_file() and "accel" in (text := _text(project)):
            try:
                tool = tomllib.loads(text).get("tool")
            except tomllib.TOMLDecodeError as error:
                if re.search(r"^\s*\[\s*tool\s*\.\s*accel", text, re.MULTILINE):
                    raise ConfigError(f"{project}: {error}") from None
                continue  # somebody else's broken file is not ours to report
            if isinstance(tool, dict) and "accel" in tool:
                return project
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def read_file(path: Path) -> dict[str, tuple[Any, str]]:
    """Each setting in a file, with the place it stands at. Errors: ConfigError."""
    import tomllib

    text = _text(path)
    try:
        data: Any = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from None
    if path.name == "pyproject.toml":
        data = data["tool"]["accel"]
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: tool.accel must be a table, not {data!r}")
    values = {}
    for key, value in data.items():
        place = f"{path}{_line(text, key, path.name == 'pyproject.toml')}"
        setting = settings().get(key)
        if setting is None:
            raise ConfigError(f"{place}: unknown key {key!r}{_nearest(key, settings())}")
        values[key] = (_checked(setting, value, f"{place}: {key!r}"), place)
    return values


def _line(text: str, key: str, in_section: bool) -> str:
    """`:12` where the key is set on a line of its own; empty where it cannot be told."""
    inside = not in_section
    for number, line in enumerate(text.splitlines(), 1):
        if in_section and (header := re.match(r"\s*\[+\s*([^\]]*?)\s*\]", line)):
            inside = header[1].replace(" ", "") == "tool.accel"
        elif inside and re.match(rf"""\s*["']?{re.escape(key)}["']?\s*=""", line):
            return f":{number}"
    return ""


@dataclass(frozen=True)
class Loaded:
    """The effective settings, where each came from, and remarks on the environment."""

    config: Config
    origins: dict[str, str]
    remarks: tuple[str, ...]


def load_all(
    start: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Loaded:
    """Like `load`, and tells where each value came from. Errors: ConfigError."""
    environment = os.environ if environment is None else environment
    origins = dict.fromkeys(settings(), "default")
    values: dict[str, Any] = {}
    path = find_file(start.resolve()) if start is not None else None
    path = path or find_file(Path.cwd())
    if path is not None:
        for key, (value, place) in read_file(path).items():
            values[key], origins[key] = value, place
    for key, setting in settings().items():
        text = environment.get(setting.variable)
        if text is not None:
            values[key] = _parsed(setting, text, setting.variable)
            origins[key] = setting.variable
    for key, value in (flags or {}).items():
        setting = settings()[key]
        values[key] = _checked(setting, value, setting.flag)
        origins[key] = setting.flag
    return Loaded(Config(**values), origins, tuple(_remarks(environment)))


def _remarks(environment: Mapping[str, str]) -> typing.Iterator[str]:
    """Variables that look like a setting with a slip in its name."""
    import difflib

    known = {setting.variable for setting in settings().values()}
    for name in environment:
        if name.startswith("ACCEL_") and name not in known:
            near = difflib.get_close_matches(name, known, 1, cutoff=0.85)
            if near:
                yield f"{name} is no setting; did you mean {near[0]}?"


def load(
    start: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Config:
    """The effective settings; `start` is the script's folder. Errors: ConfigError."""
    return load_all(start, flags, environment).config


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each setting."""
    import argparse

    group = parser.add_argument_group("settings")
    for key, setting in settings().items():
        text = setting.text.replace("%", "%%")
        if setting.kind in ("truth", "choice of truth"):
            group.add_argument(
                setting.flag, dest=key, action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS, help=text,
            )  # fmt: skip
        else:
            metavar = {"strings": "A,B", "integer": "N"}.get(setting.kind, "TEXT")
            group.add_argument(
                setting.flag, dest=key, metavar=metavar, default=argparse.SUPPRESS, help=text
            )


def flags_of(options: argparse.Namespace) -> dict[str, Any]:
    """The settings given as flags. Errors: ConfigError."""
    flags = {}
    for key, setting in settings().items():
        if hasattr(options, key):
            value = getattr(options, key)
            is_text = isinstance(value, str)
            flags[key] = _parsed(setting, value, setting.flag) if is_text else value
    return flags


def default_of(key: str) -> Any:
    """The default, as documentation shows it."""
    found = next(f for f in fields(Config) if f.name == key)
    return found.default


def markdown() -> str:
    """The page docs/switches.md."""
    lines = [
        "# Settings",
        "",
        "Generated by `python -m accel config --markdown`; do not edit.",
        "",
        "A flag wins over the environment, the environment over the file, the file over the "
        "default. The file is `accel.toml`, or the table `[tool.accel]` of `pyproject.toml`: the "
        "nearest one beside the script or above it, else in the working directory or above it. "
        "In the environment and in flags, lists are comma-separated; truths are `1` or `0`.",
        "",
        "| in the file | in the environment | as a flag | type | default | what it does |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for key, s in settings().items():
        default = default_of(key)
        shown = "the user's cache folder" if key == "cache_dir" else f"`{as_toml(default)}`"
        text = s.text + (f": {', '.join(f'`{c}`' for c in s.choices)}" if key == "log" else "")
        flag = f"`{s.flag}`" + (f", `--no-{s.flag[2:]}`" if "truth" in s.kind else "")
        wanted = _KINDS[s.kind].wanted
        lines.append(f"| `{key}` | `{s.variable}` | {flag} | {wanted} | {shown} | {text} |")
    return "\n".join(lines) + "\n"


def as_toml(value: Any) -> str:
    """A value as a file would hold it."""
    if value is None:
        return "absent"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)
