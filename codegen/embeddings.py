"""The gradient of an embedding: rows of a gradient, added to zeros where the indices say.

In: an `embedding_dense_backward`. Out: one kernel, which writes its result into planned memory: a
fresh one of a vocabulary's size costs more in page faults than all else here. Invariant: a
row's gradients are added in the order of the indices, as ATen adds them: equal bits.
"""

from __future__ import annotations

from accel.codegen.builder import Builder, Unsupported
from accel.codegen.loop_ir import ITEM_BYTES
from accel.codegen.lowerings_gather import scatter_embedding_gradient
from accel.codegen.products import shared_text
from accel.codegen.program import TemplateNode
from accel.codegen.symbols import is_symbolic
from accel.codegen.tensor_graph import Node, View, contiguous_strides

_C_TYPES = {"float32": "float", "float64": "double", "int64": "i64", "int32": "int"}
_PARALLEL_BYTES = 1 << 18  # of zeros; less is not worth a second thread


def lower_embedding_backward(b: Builder, node: Node, out: View) -> None:
    """Errors: Unsupported for 16 bits (ATen rounds every sum), sizes that differ between calls, and
    gradients scaled by frequency."""
    gradient, index, rows, padding, by_frequency = node.args
    if not b.templates:
        return scatter_embedding_gradient(b, node, out)
    if by_frequency:
        raise Unsupported("the gradient of an embedding, scaled by frequency")
    if any(is_symbolic(n) for v in (*node.views(), out) for n in (*v.sizes, *v.strides)):
        raise Unsupported("the gradient of an embedding whose sizes differ between calls")
    dense = all(v.strides == contiguous_strides(v.sizes) for v in (gradient, out))
    if not dense or {gradient.dtype, index.dtype} - set(_C_TYPES):
        raise Unsupported("the gradient of an embedding, of another layout or dtype")
    parallel = rows * out.sizes[1] * ITEM_BYTES[out.dtype] > _PARALLEL_BYTES
    text = shared_text(_body(gradient, index, rows, padding), rows)
    b.program.steps.append(
        TemplateNode(out.buffer, (gradient, index), text, parallel, node.location)
    )


def _body(gradient: View, index: View, rows: int, padding: int) -> str:
    """For rows `begin` to `end`: no two threads write one row."""
    width, type_ = gradient.sizes[-1], _C_TYPES[gradient.dtype]
    names = [f"i{d}" for d in range(len(index.sizes))]
    loops = "".join(
        f"  for (i64 {name} = 0; {name} < {size}; {name}++)\n"
        for name, size in zip(names, index.sizes, strict=True)
    )
    place = " + ".join(f"{name} * {s}" for name, s in zip(names, index.strides, strict=True))
    counts = "row >= begin && row < end"
    if 0 <= padding < rows:
        counts += f" && row != {padding}"
    return (
        f"  const {type_}* __restrict__ gradient = (const {type_}*)p[0];\n"
        f"  const {_C_TYPES[index.dtype]}* index = (const {_C_TYPES[index.dtype]}*)p[1];\n"
        f"  {type_}* __restrict__ out = ({type_}*)p[2];\n"
        f"  __builtin_memset(out + begin * {width}, 0, (end - begin) * {width} * sizeof *out);\n"
        f"{loops or '  '}{{\n"
        f"    const i64 row = index[{place or '0'}];\n"
        f"    if ({counts})\n"
        f"      for (i64 n = 0; n < {width}; n++) out[row * {width} + n] += gradient[n];\n"
        f"    gradient += {width};\n"
        f"  }}\n"
    )
