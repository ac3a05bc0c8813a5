"""Code generation: recorded graphs become plans over compiled kernels."""

from accel.codegen.basic.pipeline import compile_graph

__all__ = ["compile_graph"]
