"""Code generation: recorded graphs become plans over compiled kernels.

In: a `SegmentGraph`. Out: `compile_graph`'s plan (docs/architecture.md, "the plan") and a
shared library. Invariant: nothing is unsupported, only unfused; what cannot be compiled
with eager's exact aliasing and layout raises `CompileError`.
"""

from accel.codegen.options import CodegenOptions, CompileError
from accel.codegen.pipeline import compile_graph

__all__ = ["CodegenOptions", "CompileError", "compile_graph"]
