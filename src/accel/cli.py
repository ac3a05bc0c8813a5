"""The command line: `python -m accel run script.py`, `explain`, `doctor`, `config`, `cache`, `bench`.

In: arguments. Out: an exit code. Invariant: accel prints to stderr only under `run`; everything
that follows the program's name is the program's.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import accel
from accel import config, program
from accel.errors import AccelError, ConfigError

if TYPE_CHECKING:
    import argparse

_USAGE = """\
usage: python -m accel COMMAND ...

Runs unmodified PyTorch programs faster.

  run [FLAGS] PROGRAM [ARGS]      run a program under accel
  explain [FLAGS] PROGRAM [ARGS]  run it, then print its graphs, guards and graph breaks
  doctor                          check that everything accel needs works here
  config [FLAGS] [SCRIPT]         show the settings, and where each comes from
  cache info|clear                show or empty the cache of compiled code
  bench kernel [FLAGS] FOLDER     time the kernels of graphs that --dump-dir wrote

PROGRAM is what python takes: a script, a folder or zip file with a __main__.py, -m MODULE,
-c TEXT, or - for standard input. `python -m accel COMMAND --help` shows the flags.
"""


class _UsageError(AccelError):
    """The command line makes no sense."""


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"accel {accel.__version__}")
        return 0
    command = _COMMANDS.get(arguments[0])
    try:
        if command is None:
            hint = " (did you forget `run`?)" if os.path.exists(arguments[0]) else ""
            raise _UsageError(f"no command is called {arguments[0]!r}{hint}; see --help")
        return command(arguments[1:])
    except AccelError as error:
        print(f"accel: {error}", file=sys.stderr)
        return 2


# ------------------------------------------------------------------------------- arguments

_INTRODUCERS = {"-m": "module", "-c": "text"}


def _split(arguments: list[str]) -> tuple[list[str], program.Target | None]:
    """Our flags, and the program with its arguments."""
    takes_value = {s.flag for s in config.settings().values() if "truth" not in s.kind}
    i = 0
    while i < len(arguments):
        word, rest = arguments[i], arguments[i + 1 :]
        if word in _INTRODUCERS:
            if not rest:
                raise _UsageError(f"{word} wants an argument")
            return arguments[:i], program.Target(_INTRODUCERS[word], rest[0], rest[1:])
        if word[:2] in _INTRODUCERS:  # -mpackage, as python takes it
            return arguments[:i], program.Target(_INTRODUCERS[word[:2]], word[2:], rest)
        if word == "-":
            return arguments[:i], program.Target("stdin", "-", rest)
        if word == "--" and rest:
            return arguments[:i], program.Target("script", rest[0], rest[1:])
        if not word.startswith("-"):
            return arguments[:i], program.Target("script", word, rest)
        i += 2 if word in takes_value else 1
    return arguments, None


def _flags(command: str, words: list[str]) -> dict[str, Any]:
    if not words:
        return {}
    return config.flags_of(_parser(command).parse_args(words))


def _parser(command: str) -> argparse.ArgumentParser:
    import argparse

    usages = {
        "run": "[FLAGS] (SCRIPT | -m MODULE | -c TEXT | -) [ARGS]",
        "explain": "[FLAGS] (SCRIPT | -m MODULE | -c TEXT | -) [ARGS]",
        "config": "[FLAGS] [SCRIPT]",
    }
    made = argparse.ArgumentParser(
        f"python -m accel {command}",
        usage=f"python -m accel {command} {usages[command]}",
        description=_COMMANDS[command].__doc__,
        allow_abbrev=False,
    )
    if command == "config":
        made.add_argument("--markdown", action="store_true", help="print the page docs/switches.md")
    config.add_flags(made)
    return made


def _loaded(target: program.Target | None, flags: dict[str, Any]) -> config.Loaded:
    start = Path(target.directory) if target is not None else Path.cwd()
    return config.load_all(start, flags)


# -------------------------------------------------------------------------- run, explain


class _Rewriter:
    """Arms the program's own functions through the driver."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver

    def code(self, code: types.CodeType, path: str) -> types.CodeType:
        return self._driver.prepare_script(code, path)  # type: ignore[no-any-return]

    def folder(self, directory: str) -> None:
        current = self._driver.current
        current.script_directory = Path(directory).resolve()
        current.install_hook()


def _run(arguments: list[str]) -> int:
    """Runs a program under accel, exactly as python would run it."""
    return _start("run", arguments, _summarise)


def _explain(arguments: list[str]) -> int:
    """Runs a program under accel, then prints its graphs, guards and graph breaks."""
    return _start("explain", arguments, _print_explanation)


def _start(command: str, arguments: list[str], at_exit: Callable[[Any], None]) -> int:
    words, target = _split(arguments)
    flags = _flags(command, words)
    if target is None:
        raise _UsageError(f"{command} wants a program; see `python -m accel {command} --help`")
    if command == "explain":
        flags.setdefault("quiet", True)
    loaded = _loaded(target, flags)
    from accel import log

    log.configure(list(loaded.config.log))
    for remark in loaded.remarks:
        log.notice_once(remark)
    driver = _driver(loaded.config)
    if driver is None:
        return program.run(target, program.Untouched())
    # Registered first, so that it runs after every handler of the program's own.
    owner = os.getpid()
    atexit.register(lambda: at_exit(driver) if os.getpid() == owner else None)
    return program.run(target, _Rewriter(driver))


def _driver(settings: config.Config) -> Any:
    """The driver, started; None (said once) where the native module cannot be used."""
    from accel import log, runtime

    if not runtime.available:
        log.notice_once(f"running eagerly: {runtime.reason}")
        return None
    from accel import driver

    if settings.backend != "native":
        from accel.compile import backends

        backends.check_name(settings.backend)
    # A plain program starts with a few thousand objects, this one with those of torch and ours.
    # The collector is not to walk over them each time; a fork also shares their pages longer.
    gc.freeze()
    driver.start(settings).service.start()
    return driver


def _summarise(driver: Any) -> None:
    _flush_stdout()
    driver.current.progress.close()
    driver.finish()
    if not driver.current.config.quiet:
        from accel import log
        from accel.explanation import summary
        from accel.report import print_summary

        print_summary(summary(driver.current))
        for text in driver.current.selection.unmatched():
            log.notice_once(text)


_EXPLAIN_WAIT_S = 60.0


def _print_explanation(driver: Any) -> None:
    from accel.explanation import RootReport, report_text

    driver.current.wait(_EXPLAIN_WAIT_S)
    driver.finish()
    roots = [RootReport.of(r) for r in driver.current.roots if r.recordings]
    print(report_text(roots) if roots else "accel: no call was recorded")


def _flush_stdout() -> None:
    try:
        sys.stdout.flush()
    except (AttributeError, OSError, ValueError):
        return  # closed, or its reader has gone: the interpreter will say so itself


# --------------------------------------------------------------------------- the others


def _doctor(arguments: list[str]) -> int:
    """Checks that everything accel needs works here."""
    _refuse(arguments)
    from accel import doctor

    return doctor.run()


def _config(arguments: list[str]) -> int:
    """Shows the settings, and where each comes from."""
    words, target = _split([word for word in arguments if word != "--markdown"])
    if "--markdown" in arguments:
        print(config.markdown(), end="")
        return 0
    loaded = _loaded(target, _flags("config", words))
    values = {key: config.as_toml(getattr(loaded.config, key)) for key in config.settings()}
    rows = {key: f"{key:<{max(map(len, values))}} = {value}" for key, value in values.items()}
    for key, row in rows.items():
        print(f"{row:<{max(map(len, rows.values()))}}  # {loaded.origins[key]}")
    for remark in loaded.remarks:
        print(f"accel: {remark}", file=sys.stderr)
    return 0


def _cache(arguments: list[str]) -> int:
    """Shows or empties the cache of compiled code."""
    if len(arguments) != 1 or arguments[0] not in ("info", "clear"):
        raise _UsageError("usage: python -m accel cache info|clear")
    from accel.cache import clear, describe

    directory = Path(config.load().cache_dir)
    print(clear(directory) if arguments[0] == "clear" else describe(directory))
    return 0


def _bench(arguments: list[str]) -> int:
    """Runs dumped graphs again, from their kernels' text, and times every step."""
    import argparse
    import dataclasses
    import json

    made = argparse.ArgumentParser("python -m accel bench", description=_bench.__doc__)
    made.add_argument("what", choices=["kernel"], help="what to time")
    made.add_argument("folder", type=Path, help="a graph's dump, or a folder of them")
    made.add_argument("--only", default="", metavar="STEP", help="a kernel (k3) or operation")
    made.add_argument("--threads", type=int, default=0, help="default: torch's")
    made.add_argument("--rounds", type=int, default=21, help="default: 21")
    made.add_argument("--rows", type=int, default=20, help="of the table; default: 20")
    made.add_argument("--json", action="store_true", help="print JSON, all steps")
    words = made.parse_args(arguments)
    for name, least in (("rounds", 1), ("rows", 1), ("threads", 0)):
        if getattr(words, name) < least:
            raise _UsageError(f"--{name} wants at least {least}, not {getattr(words, name)}")
    most = max(os.cpu_count() or 1, 64)
    if words.threads > most:
        raise _UsageError(f"--threads wants at most {most} here, not {words.threads}")
    import torch

    from accel import replay

    if words.threads:
        torch.set_num_threads(words.threads)
    results = []
    for folder in replay.folders(words.folder):
        try:
            results.append(replay.replay(folder, words.rounds, words.only))
        except replay.ReplayError as error:  # the others may be timed
            print(f"accel: {error}", file=sys.stderr)
    if words.json:
        print(json.dumps([dataclasses.asdict(r) for r in results], indent=1))
    else:
        print("\n\n".join(replay.table(r, words.rows) for r in results))
    return 0 if results else 2


def _refuse(arguments: list[str]) -> None:
    if arguments:
        raise _UsageError(f"unexpected {arguments[0]!r}")


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "run": _run,
    "explain": _explain,
    "doctor": _doctor,
    "config": _config,
    "cache": _cache,
    "bench": _bench,
}

__all__ = ["ConfigError", "main"]
