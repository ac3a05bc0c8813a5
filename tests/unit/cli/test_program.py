"""Programs behave under `python -m accel run` as they do under `python`, byte for byte.

Each program is run twice, and exit code, stdout and stderr are compared. The programs import no
torch: what is compared is how they are started and how they end.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

TIMEOUT_S = 120

LOOK = '''"""A docstring."""
import sys
main = sys.modules["__main__"]
names = ("__annotations__ __builtins__ __cached__ __doc__ __file__ __name__ __package__ "
         "__loader__ __spec__").split()
for name in names:
    value = getattr(main, name, "missing")
    text = repr(value).partition(" object at ")[0]
    print(name, text)
print(sys.argv, sys.path[:3], vars(main) is globals(), sys.flags)
'''

FILES = {
    "look.py": LOOK,
    "package/__init__.py": "",
    "package/__main__.py": LOOK + "from . import sibling\nprint(sibling.__name__)\n",
    "package/look.py": LOOK,
    "package/sibling.py": "",
    "folder/__main__.py": LOOK + "import beside\n",
    "folder/beside.py": "print(__name__, __file__)\n",
    # A module of the program that has the name of one that accel uses.
    "filelock.py": "VALUE = 'mine'\n",
    "shadow.py": "import filelock; print(filelock.VALUE)\n",
    "raises.py": "def f(n):\n    return 1 / n\n\n\nf(0)\n",
    "chain.py": "try:\n    {}['x']\nexcept KeyError as e:\n    raise ValueError('y') from e\n",
    "syntax.py": "x = 1\ny = = 2\n",
    "exits.py": "import sys\nsys.exit(int(sys.argv[1]))\n",
    "exits_text.py": "import sys\nsys.exit('a message')\n",
    "exits_none.py": "raise SystemExit\n",
    "handlers.py": (
        "import atexit, threading, time\n"
        "atexit.register(print, 'first')\natexit.register(print, 'second')\n"
        "threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()\n"
        "print('end')\n"
    ),
    "hook.py": (
        "import sys\nsys.excepthook = lambda t, v, tb: print('hook', t, v, tb.tb_lineno)\n"
        "raise RuntimeError('x')\n"
    ),
    "broken_hook.py": (
        "import sys\ndef hook(t, v, tb):\n    raise KeyError(1)\n"
        "sys.excepthook = hook\nraise RuntimeError('x')\n"
    ),
    "reads.py": "import sys\nprint(input(), sys.stdin.read().upper())\n",
    "interrupted.py": (
        "import atexit, os, signal, time\natexit.register(print, 'atexit', flush=True)\n"
        "os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(5)\n"
    ),
    "terminated.py": (
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(5)\n"
    ),
    "pickles.py": (
        "import pickle\nclass C:\n    pass\n\nc = C()\n"
        "print(pickle.dumps(C), type(pickle.loads(pickle.dumps(c))) is C)\n"
        "import sys, inspect\nprint(inspect.getsource(C), C.__module__)\n"
    ),
    "spawns.py": (
        "import multiprocessing as m, sys\nclass C:\n    def __init__(self, n):\n"
        "        self.n = n\n\ndef f(c):\n    return C(c.n + 1), __name__, len(sys.argv)\n\n"
        "if __name__ == '__main__':\n"
        "    for method in ('spawn', 'fork', 'forkserver'):\n"
        "        with m.get_context(method).Pool(1) as pool:\n"
        "            (c, name, n), = pool.map(f, [C(1)])\n"
        "        print(method, type(c) is C, c.n, name, n)\n"
    ),
    "warns.py": "import warnings\nwarnings.warn('old', stacklevel=1)\n",
    "future.py": "x: undefined = 1\n",
    "finalised.py": "class C:\n    def __del__(self):\n        print('gone')\n\nc = C()\n",
    "encoding.py": "# -*- coding: latin-1 -*-\nprint(ascii('\xe9'))\n",
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("programs")
    for name, text in FILES.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="latin-1")
    with zipfile.ZipFile(directory / "app.zip", "w") as archive:
        archive.writestr("__main__.py", FILES["folder/__main__.py"])
        archive.writestr("beside.py", FILES["folder/beside.py"])
    (directory / "link.py").symlink_to(directory / "folder" / "__main__.py")
    return directory


def start(
    command: list[str], cwd: Path, stdin: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        input=stdin,
        env={**os.environ, "ACCEL_QUIET": "1", **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


# (arguments to the interpreter, the program and its arguments, standard input)
CASES = [
    ([], ["look.py", "a", "-m", "--sync", "--", "-h"], ""),
    (["-O", "-W", "error::SyntaxWarning"], ["look.py"], ""),
    (["-P"], ["look.py"], ""),
    ([], ["./folder/../look.py"], ""),
    ([], ["-m", "package", "--help"], ""),
    ([], ["-m", "package.look", "x"], ""),
    ([], ["-mpackage.look"], ""),
    ([], ["folder", "x"], ""),
    ([], ["./folder"], ""),
    ([], ["app.zip"], ""),
    (["-P"], ["app.zip"], ""),
    ([], ["link.py"], ""),
    ([], ["-c", LOOK, "a", "-c"], ""),
    ([], ["-", "a"], LOOK),
    ([], ["shadow.py"], ""),
    ([], ["raises.py"], ""),
    ([], ["-m", "raises"], ""),
    ([], ["-c", "1/0"], ""),
    ([], ["chain.py"], ""),
    ([], ["syntax.py"], ""),
    ([], ["exits.py", "7"], ""),
    ([], ["exits_text.py"], ""),
    ([], ["exits_none.py"], ""),
    ([], ["handlers.py"], ""),
    ([], ["hook.py"], ""),
    ([], ["broken_hook.py"], ""),
    ([], ["reads.py"], "one\ntwo\nthree"),
    ([], ["interrupted.py"], ""),
    ([], ["-m", "interrupted"], ""),
    ([], ["terminated.py"], ""),
    ([], ["pickles.py"], ""),
    ([], ["spawns.py"], ""),
    ([], ["warns.py"], ""),
    ([], ["future.py"], ""),
    ([], ["finalised.py"], ""),
    ([], ["encoding.py"], ""),
    ([], ["missing.py"], ""),
    ([], ["-m", "missing"], ""),
    ([], ["-m", "package.missing"], ""),
]


@pytest.mark.parametrize(
    ("flags", "program", "stdin"), CASES, ids=[" ".join(c[0] + c[1][:2])[:40] for c in CASES]
)
def test_as_python(flags: list[str], program: list[str], stdin: str, programs: Path) -> None:
    plain = start([sys.executable, *flags, *program], programs, stdin)
    ours = start([sys.executable, *flags, "-m", "accel", "run", *program], programs, stdin)
    assert ours.stdout == plain.stdout
    assert ours.stderr == plain.stderr
    assert ours.returncode == plain.returncode


def test_a_changed_pythonpath_is_seen(programs: Path) -> None:
    program = ["-c", "import beside, sys; print(sys.path[:2])"]
    path = str(programs / "folder")
    plain = start([sys.executable, *program], programs, PYTHONPATH=path)
    ours = start([sys.executable, "-m", "accel", "run", *program], programs, PYTHONPATH=path)
    assert (ours.stdout, ours.returncode) == (plain.stdout, plain.returncode)


def test_a_reader_that_leaves(programs: Path) -> None:
    """SIGPIPE stays Python's: an exception in the program, exit code 120 or 1."""
    text = "import sys\nfor i in range(100000):\n    print(i)\n"
    (programs / "prints.py").write_text(text)
    codes = []
    for command in ([], ["-m", "accel", "run"]):
        with subprocess.Popen(
            [sys.executable, *command, "prints.py"],
            cwd=programs,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "ACCEL_QUIET": "1"},
        ) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.readline()
            process.stdout.close()
            error = process.stderr.read().decode().splitlines()[-1]
            codes.append((process.wait(TIMEOUT_S), error))
    assert codes[0] == codes[1]


def test_ctrl_c_reaches_the_program_and_not_the_worker(programs: Path) -> None:
    """A signal to the whole group, as a terminal sends it."""
    text = "import time\nprint('ready', flush=True)\ntime.sleep(60)\n"
    (programs / "sleeps.py").write_text(text)
    with subprocess.Popen(
        [sys.executable, "-m", "accel", "run", "sleeps.py"],
        cwd=programs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "ACCEL_QUIET": "1"},
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)
        error = process.stderr.read().decode()
        code = process.wait(TIMEOUT_S)
    assert code == -signal.SIGINT
    assert error.count("KeyboardInterrupt") == 1 and "accel" not in error
