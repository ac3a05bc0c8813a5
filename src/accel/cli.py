"""The command line: `python -m accel run script.py`, `explain`, `doctor`, `config`, `cache`.

In: arguments. Out: an exit code. Invariant: under `run` the program sees what `python` would
show it: sys.argv, sys.path, `__main__`, exit code, traceback; accel prints to stderr only.
"""

from __future__ import annotations

import argparse
import atexit
import builtins
import os
import runpy
import shutil
import sys
import traceback
import types
from pathlib import Path
from typing import Any

import accel
from accel.errors import AccelError


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m accel",
        description="Runs unmodified PyTorch programs faster.",
    )
    top.add_argument("--version", action="version", version=f"accel {accel.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="command")
    for name, text in (
        ("run", "run a script or module under accel"),
        ("explain", "run a script and print its graphs, guards and graph breaks"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "-m", dest="module", action="store_true", help="a module, as python -m"
        )
        command.add_argument("--quiet", action="store_true", help="no progress line, no summary")
        command.add_argument("--backend", help="native (default), eager, or torch's backends")
        command.add_argument("--sync", action="store_true", help="wait for each compilation")
        command.add_argument("--log", help="artifacts to log, comma-separated")
        command.add_argument("target", help="the script's path, or the module's name with -m")
        command.add_argument("args", nargs=argparse.REMAINDER, help="the program's own arguments")
    commands.add_parser("doctor", help="check that everything accel needs works")
    commands.add_parser("config", help="show the effective settings")
    cache = commands.add_parser("cache", help="show or clear the disk cache")
    cache.add_argument("action", choices=("info", "clear"))
    return top


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    try:
        return _COMMANDS[options.command](options)
    except AccelError as error:
        print(f"accel: {error}", file=sys.stderr)
        return 2


def _flags(options: argparse.Namespace) -> dict[str, Any]:
    flags: dict[str, Any] = {}
    if options.quiet:
        flags["quiet"] = True
    if options.sync:
        flags["sync"] = True
    if options.backend:
        flags["backend"] = options.backend
    if options.log:
        flags["log"] = tuple(options.log.split(","))
    return flags


def _load_config(options: argparse.Namespace) -> Any:
    from accel import config, log

    start = Path.cwd() if options.module else Path(options.target).resolve().parent
    loaded = config.load(start, _flags(options))
    log.configure(list(loaded.log))
    return loaded


def _run(options: argparse.Namespace, explain: bool = False) -> int:
    if not options.module and not Path(options.target).exists():
        print(f"accel: can't open file {options.target!r}: no such file", file=sys.stderr)
        return 2
    config = _load_config(options)
    from accel import log, runtime

    driver: Any = None
    if runtime.available:
        from accel import driver

        if config.backend != "native":
            from accel.compile import backends

            backends.check_name(config.backend)
        driver.start(config).service.start()
    else:
        log.notice_once(f"running eagerly: {runtime.reason}")
    if driver is not None:
        # Registered first, so that it runs after every handler of the program's own.
        owner = os.getpid()
        atexit.register(lambda: _report(driver, config, explain) if os.getpid() == owner else None)
    sys.argv = [options.target, *options.args]
    if options.module:
        return _run_module(options.target, driver)
    return _run_script(options.target, driver)


def _report(driver: Any, config: Any, explain: bool) -> None:
    if sys.stdout is not None:
        sys.stdout.flush()
    if explain:
        from accel.explanation import RootReport, report_text

        driver.current.wait(60)
        roots = [r for r in driver.current.roots.values() if r.recordings]
        print(report_text([RootReport.of(r) for r in roots]))
        return
    if not config.quiet:
        from accel.report import print_summary

        print_summary(driver.finish())


def _fresh_main(file: str | None) -> types.ModuleType:
    """A module for `__main__` as CPython makes one."""
    module = types.ModuleType("__main__")
    module.__builtins__ = builtins  # type: ignore[attr-defined]
    module.__file__ = file
    module.__loader__ = None
    module.__spec__ = None
    module.__annotations__ = {}
    vars(module)["__cached__"] = None
    sys.modules["__main__"] = module
    return module


def _run_script(path: str, driver: Any) -> int:
    sys.path[0] = str(Path(path).resolve().parent)
    with open(path, "rb") as file:
        source = file.read()
    try:
        code = compile(source, path, "exec", dont_inherit=True)
    except SyntaxError:
        traceback.print_exception(*sys.exc_info()[:2], None)
        return 1
    module = _fresh_main(path)
    if driver is not None:
        code = driver.prepare_script(code, path)
    return _execute(lambda: exec(code, vars(module)))


def _run_module(name: str, driver: Any) -> int:
    sys.path[0] = os.getcwd()
    if driver is not None:
        driver.current.script_directory = Path.cwd()
        driver.current.install_hook()
    return _execute(lambda: runpy.run_module(name, run_name="__main__", alter_sys=True))


def _execute(program: Any) -> int:
    """Runs the program; its uncaught exceptions look as if Python had started it."""
    try:
        program()
    except SystemExit:
        raise
    except BaseException as error:
        shown = error.__traceback__
        while shown is not None and _is_ours(shown.tb_frame.f_code.co_filename):
            shown = shown.tb_next
        error.__traceback__ = shown
        if isinstance(error, KeyboardInterrupt):
            sys.excepthook(type(error), error, shown)
            raise SystemExit(130) from None
        sys.excepthook(type(error), error, shown)
        return 1
    return 0


_HERE = os.path.dirname(os.path.abspath(__file__))


def _is_ours(file: str) -> bool:
    return file.startswith(_HERE) or file == "<frozen runpy>" or file.endswith("runpy.py")


def _explain(options: argparse.Namespace) -> int:
    options.quiet = True
    return _run(options, explain=True)


def _doctor(_options: argparse.Namespace) -> int:
    from accel import doctor

    return doctor.run()


def _config(_options: argparse.Namespace) -> int:
    from accel import config

    loaded = config.load()
    for key, setting in config.settings().items():
        print(f"{key} = {getattr(loaded, key)!r}  # {setting.text}")
    return 0


def _cache(options: argparse.Namespace) -> int:
    from accel import config

    directory = Path(config.load().cache_dir)
    if options.action == "clear":
        shutil.rmtree(directory, ignore_errors=True)
        print(f"removed {directory}")
        return 0
    files = [p for p in directory.rglob("*") if p.is_file()] if directory.exists() else []
    size = sum(p.stat().st_size for p in files)
    print(f"{directory}: {len(files)} files, {size / 1e6:.1f} MB")
    return 0


_COMMANDS = {
    "run": _run,
    "explain": _explain,
    "doctor": _doctor,
    "config": _config,
    "cache": _cache,
}
