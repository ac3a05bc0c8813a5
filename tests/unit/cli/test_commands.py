"""What the commands print, and their exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from accel import cli, config, errors, explanation, guards, report
from accel.program import KINDS, Target

PROGRAM = """
import torch
import accel

def f(x):
    return torch.relu(x * 2.0)

def g(x):
    open("/dev/null").close()
    return x + 1

for _ in range(6):
    f(torch.ones(3)), g(torch.ones(3))
print("done")
"""

CLOSURES = """
import torch
import accel

def whole(x):
    scale = 2.0
    def add(v):
        nonlocal scale
        scale += 1.0
        return v * scale
    return add(torch.tanh(add(x)))

def broken(x):
    kept = []
    def add(v):
        kept.append(v * 2)
        return kept[-1] + x
    y = add(torch.tanh(x))
    open("/dev/null").close()
    return torch.cos(add(y)) + 1

for f in (whole, broken):
    for _ in range(9):
        f(torch.ones(3))
    counters = accel.counters()
    print(f.__name__, counters["calls_compiled"], counters["segments_served"])
"""


def accel(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-m", "accel", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("commands") / "program.py"
    path.write_text(PROGRAM)
    return path


def test_run_ends_with_a_summary_on_stderr(program: Path) -> None:
    done = accel("run", "--sync", "program.py", cwd=program.parent)
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert "2 roots" in done.stderr and "2 graph breaks" in done.stderr  # open, close
    assert "program.py:9: g: a call that accel does not know: io.open" in done.stderr
    assert "\x1b" not in done.stderr, "no colours where there is no terminal"
    quiet = accel("run", "--sync", "--quiet", "program.py", cwd=program.parent)
    assert (quiet.stdout, quiet.stderr) == ("done\n", "")


def test_functions_made_in_hooked_functions_are_compiled_with_them(tmp_path: Path) -> None:
    """Their code has prologues of its own, which the code that recordings make has not."""
    (tmp_path / "closures.py").write_text(CLOSURES)
    done = accel("run", "--sync", "--quiet", "closures.py", cwd=tmp_path)
    assert done.stderr == ""
    (_, whole, _), (_, _, segments) = (line.split() for line in done.stdout.splitlines())
    assert int(whole) >= 6, "calls of whole"
    assert int(segments) >= 8, "stretches of broken, two in a call"


def test_explain_prints_graphs_guards_and_breaks(program: Path) -> None:
    done = accel("explain", "--sync", "program.py", cwd=program.parent)
    assert done.returncode == 0, done.stderr
    for text in ("f (program.py:5): compiled", "torch.relu(v0)", "# program.py:6", "x has the"):
        assert text in done.stdout
    assert "graph break at program.py:9" in done.stdout


def test_doctor_is_content_here(tmp_path: Path) -> None:
    done = accel("doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "everything that is needed works" in done.stdout


def test_doctor_without_a_compiler(tmp_path: Path) -> None:
    done = accel("doctor", cwd=tmp_path, PATH=str(tmp_path), CXX="")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    (failed,) = [i for i, line in enumerate(lines) if line.startswith("FAIL  C++ compiler")]
    assert "apt-get install g++" in lines[failed + 1]
    for i, line in enumerate(lines):
        assert not line.startswith("FAIL") or "-> " in lines[i + 1]


def test_config_shows_where_values_come_from(tmp_path: Path) -> None:
    (tmp_path / "accel.toml").write_text("\nthreshold = 5\n")
    done = accel("config", "--sync", cwd=tmp_path, ACCEL_MAX_VARIANTS="3")
    rows = {line.split()[0]: line.rsplit("  # ", 1) for line in done.stdout.splitlines()}
    assert set(rows) == set(config.settings())
    assert rows["threshold"][1] == f"{tmp_path / 'accel.toml'}:2"
    assert rows["max_variants"][1] == "ACCEL_MAX_VARIANTS"
    assert rows["sync"][1] == "--sync"
    assert rows["verify"][1] == "default"


def test_cache_clear_removes_only_its_own(tmp_path: Path) -> None:
    plans = tmp_path / "plans"
    plans.mkdir()
    own, foreign = plans / "abc.json", plans / "letter.txt"
    own.write_text("{}")
    foreign.write_text("mine")
    (tmp_path / "other.json").write_text("mine")
    done = accel("cache", "clear", cwd=tmp_path, ACCEL_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0 and "removed 1 files" in done.stdout
    assert not own.exists() and foreign.exists() and (tmp_path / "other.json").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["run"], "wants a program"),
        (["rn", "x.py"], "no command is called 'rn'"),
        (["run", "-m"], "-m wants an argument"),
        (["cache"], "info|clear"),
        (["run", "--backend", "nativ", "x.py"], "did you mean 'native'"),
        (["run", "--threshold", "x", "x.py"], "--threshold must be an integer"),
    ],
)
def test_wrong_command_lines(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    assert text in capsys.readouterr().err


def test_what_belongs_to_the_program() -> None:
    split = cli._split
    assert split(["--sync", "--log", "graph", "a.py", "--sync", "-m"]) == (
        ["--sync", "--log", "graph"],
        Target("script", "a.py", ["--sync", "-m"]),
    )
    assert split(["--log=graph", "-m", "p", "-x"]) == (
        ["--log=graph"],
        Target("module", "p", ["-x"]),
    )
    assert split(["-", "x"])[1] == Target("stdin", "-", ["x"])
    assert split(["--", "-odd.py"])[1] == Target("script", "-odd.py", [])
    assert split(["--quiet"]) == (["--quiet"], None)
    assert {"script", "module", "text", "stdin"} == set(KINDS)


def test_every_guard_has_words() -> None:
    assert set(explanation.HOLDS) == set(guards.CHECKS)


@pytest.mark.parametrize("kind", list(errors.REASONS))
def test_every_reason_leads_to_its_hint(kind: str) -> None:
    assert errors.hint_for(errors.reason_text(kind, "something")) == errors.reason_hint(kind)


def test_progress_draws_at_the_right_and_never_moves_the_cursor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: list[str] = []

    class Terminal:
        def isatty(self) -> bool:
            return True

        def fileno(self) -> int:
            return 2

        def write(self, text: str) -> None:
            written.append(text)

        def flush(self) -> None:
            pass

    import os

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(os, "get_terminal_size", lambda _fd: os.terminal_size((80, 24)))
    progress = report.Progress(config.Config())
    progress.compiling("Model")
    progress.done("Model")
    assert written == ["\x1b7\x1b[58G\x1b[2maccel: compiling Model\x1b[0m\x1b8", "\x1b[K"]
    silent = report.Progress(config.Config(quiet=True))
    silent.compiling("Model")
    assert len(written) == 2


def test_names_in_the_settings_that_nothing_has(tmp_path: Path) -> None:
    """A name with a typing error does nothing: that is said at the end."""
    (tmp_path / "helper.py").write_text("def f(x):\n    return x.relu() + 1\n")
    script = tmp_path / "script.py"
    script.write_text("import torch, helper\nfor _ in range(4): helper.f(torch.ones(2))\n")
    (tmp_path / "accel.toml").write_text(
        'packages = ["helper", "halper"]\nfunctions = ["helper:f", "helper:g", "gone:f"]\n'
    )
    done = accel("run", str(script), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "no such" in line]
    assert said == [
        "accel: packages: 'halper': no such module was imported",
        "accel: functions: 'helper:g': no such function was defined",
        "accel: functions: 'gone:f': no such function was defined",
    ]
    assert "no such" not in accel("run", "--quiet", str(script), cwd=tmp_path).stderr
