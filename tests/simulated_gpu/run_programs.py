"""The differential programs on a simulated GPU, or with `--real` on one.

    python tests/simulated_gpu/run_programs.py [TEXT] [--every N] [--real]

In: part of the names of programs (all), or each so manieth. Out: what differs from eager there, and how many ran compiled.
Tensors and modules that programs make are made on the GPU, by rewriting their source; where one is
still the processor's, a program fails as eager does.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import importlib.machinery
import sys
import time
from pathlib import Path
from types import CodeType
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "differential"), str(HERE.parent / "unit" / "codegen")]

import simulated_gpu  # noqa: E402

REAL = "--real" in sys.argv
if not REAL:
    simulated_gpu.install()

import harness  # noqa: E402
import torch  # noqa: E402

import accel  # noqa: E402

_FACTORIES = frozenset(
    """randn rand ones zeros arange tensor full eye linspace logspace empty randint randperm
    empty_strided scalar_tensor as_tensor tril_indices triu_indices bartlett_window hann_window""".split()
)


class _Moved(ast.NodeTransformer):
    """`torch.randn(3)` becomes `torch.randn(3, device="cuda")`, `nn.Linear(3, 3)` is moved there."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        f = node.func
        if not isinstance(f, ast.Attribute):
            return node
        owner = ast.unparse(f.value)
        if owner == "torch" and f.attr in _FACTORIES:
            if not any(k.arg in ("device", "out", None) for k in node.keywords):
                node.keywords.append(ast.keyword("device", ast.Constant("cuda")))
        elif f.attr == "autocast":
            node.args = [ast.Constant("cuda") if _is_cpu(a) else a for a in node.args]
            for keyword in node.keywords:
                if _is_cpu(keyword.value):
                    keyword.value = ast.Constant("cuda")
        elif owner in ("nn", "torch.nn") and f.attr[0].isupper() and "Param" not in f.attr:
            return ast.Call(ast.Name("_moved_to_gpu", ast.Load()), [node], [])
        return node


def _is_cpu(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value == "cpu"


def moved(source: Any, path: str) -> CodeType:
    """The code of a program whose tensors are on the GPU."""
    tree = ast.fix_missing_locations(_Moved().visit(ast.parse(source)))
    code: CodeType = compile(tree, path, "exec", dont_inherit=True)
    return code


class _Loader(importlib.machinery.SourceFileLoader):
    def source_to_code(self, data: Any, path: Any, **_: Any) -> Any:
        return moved(data, path)

    def get_code(self, fullname: str) -> Any:
        return self.source_to_code(self.get_data(self.path), self.path)


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        if not name.startswith("programs_"):
            return None
        file = HERE.parent / "differential" / f"{name}.py"
        return importlib.util.spec_from_file_location(name, file, loader=_Loader(name, str(file)))


def _moved_to_gpu(made: Any) -> Any:
    return made.cuda() if isinstance(made, torch.nn.Module) else made


builtins._moved_to_gpu = _moved_to_gpu  # type: ignore[attr-defined]
sys.meta_path.insert(0, _Finder())


class OnGpu(harness.Session):
    """A session that does not count references: autograd's thread of the GPU drops its own later."""

    def _call(self, function: Any, args: Any, kwargs: Any) -> Any:
        result = super()._call(function, args, kwargs)
        del self.calls[-1]["references"]
        return result


# Programs that say something else here, and why.
_ELSEWHERE = {
    "torch.compile": "Inductor would look for the GPU",
    "language: special values in pointwise": "oneDNN's gelu of infinity is no number, a GPU's is",
    "autocast inside with float master weights": "eager rounds to bfloat16 once more than a kernel",
}
_UNSERVED = (
    "not served compiled",
    "compiled code ran",
    "compiled segments, not",
    "no reason contains",
    "... and",
)


def launches() -> int:
    """How many kernels have run; on a real GPU: how many calls were compiled code's."""
    if not REAL:
        return len(simulated_gpu.launches)
    counts = accel.counters()
    return int(counts["calls_compiled"] + counts["segments_served"])


def main() -> int:
    harness.Session = OnGpu  # type: ignore[misc]
    parser = argparse.ArgumentParser(description="differential programs on a GPU")
    parser.add_argument("text", nargs="?", default="")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--real", action="store_true", help="on an NVIDIA GPU, not a simulated one")
    wanted = parser.parse_args()
    if REAL and not torch.cuda.is_available():
        parser.error("--real needs an NVIDIA GPU: torch.cuda.is_available() is False")
    import test_programs  # makes tensors on the GPU

    found = served = count = 0
    for parameters in test_programs.PROGRAMS[:: wanted.every]:
        if wanted.text not in parameters.id or any(name in parameters.id for name in _ELSEWHERE):
            continue
        (program,) = parameters.values
        count += 1
        launched, started = launches(), time.perf_counter()
        try:
            harness.check(program)
        except AssertionError as error:
            told = str(error).splitlines()[1:]
            lines = [line for line in told if not any(text in line for text in _UNSERVED)]
            if not lines:
                print(f"NOT SERVED {parameters.id}: {told[0].strip()}", flush=True)
            else:
                found += 1
                print(f"DIFFERS {parameters.id}", *lines[:4], sep="\n", flush=True)
        except Exception as error:
            print(f"RAISES {parameters.id}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        served += launches() > launched
        seconds = time.perf_counter() - started
        if seconds > 20:
            print(f"{seconds:.0f} s {parameters.id}", flush=True)
        accel.reset()
    if graphs := accel.runtime.native.cuda_graphs()["launched"]:
        print(f"{graphs} CUDA graphs launched")
    print(f"{count} programs, {found} differ, {served} launched kernels")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
