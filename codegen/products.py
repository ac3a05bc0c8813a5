"""Matrix products: when to generate a kernel instead of calling BLAS, and which.

In: mm and addmm nodes. Out: template nodes over `products.cpp` and `preamble.h`:
    small     everything fits the first-level caches, where a call costs more than the work, and
              the right side lies as [K, N] or is tiny
    columns   16 to 48 rows times a weight that lies as [N, K], as out.T = weight @ rows.T: nothing is
              turned between products that follow each other (`layouts.py`)
    few_rows  up to ten rows times a weight that lies as [N, K]
    product   more rows times such a weight; the rows are packed by a node of their own, which
              products of the same rows share
    wide      rows times a matrix that lies as [K, N]
Invariant: no operand is remembered from one call to the next; what a kernel packs it packs
in that call.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from accel.codegen.affine import Affine
from accel.codegen.build import cpu_features
from accel.codegen.builder import Builder, Unsupported
from accel.codegen.loop_ir import Expr
from accel.codegen.program import TemplateNode
from accel.codegen.symbols import is_symbolic
from accel.codegen.tensor_graph import Node, TensorGraph, View
from accel.codegen.trials import MIN_NARROW_WORK, MIN_WORK, Shape

aten = torch.ops.aten

_SMALL_EXTENT = 128
_SMALL_COLUMNS = 512
_TURNING_USES = 3  # of one weight by one graph, as in a loop: from then on turning it once pays
_SMALL_WORK = 1 << 19  # multiplications
_SMALL_WEIGHT = 400  # numbers that `small` turns faster than the others are called
_SMALL_ROWS = 8  # that are worth turning a weight in pieces of 16x16
_TURNED_WEIGHT = 10_000  # numbers of it; more of them leave the first-level cache
_COLUMN_ROWS = (
    16,
    32,
    48,
)  # that are whole vectors, few enough for the results of a tile's columns
_COLUMN_NUMBERS = 12_288  # of the rows: what tiles read again and again
_COLUMN_WEIGHT = 1 << 17  # larger ones come from memory, where the others fetch them ahead
_COLUMN_UNIT = 32  # as in preamble.h
_FEW_ROWS = 10
_MIN_INNER = 16
_MIN_COLUMNS = 4
# Packed rows beyond this stream from memory again and again: BLAS blocks better.
_MAX_PACKED_BYTES = 16 << 20
_PARALLEL_WORK = 1 << 20
_PARALLEL_PACKING = 1 << 17
_PARALLEL_WEIGHT = 1 << 18  # numbers: with few rows, reading them is what takes time
# As in products.cpp, with vectors of 64 bytes.
_LANES, _BLOCK, _WIDE, _TILE_ROWS, _MAX_ROWS, _MAX_COLUMNS = 16, 48, 64, 12, 516, 256
_MIN_UNITS = 8


@dataclass(frozen=True)
class Product:
    """out[m, n] = sum over k of left[m, k] * right[k, n] (+ bias)."""

    left: View
    right: View
    bias: View | None
    out: View
    location: str
    templates: bool  # those of products.cpp may be used
    pays: Callable[[Shape], bool]  # and are as fast as ATen's, with an epilogue if there may be one

    @property
    def extents(self) -> tuple[int, int, int]:
        return self.left.sizes[0], self.right.sizes[1], self.left.sizes[1]

    @property
    def work(self) -> int:
        m, n, k = self.extents
        return m * n * k


def lower_product(b: Builder, node: Node) -> None:
    """Errors: Unsupported when BLAS is the better choice."""
    if any(is_symbolic(n) for v in node.views() for n in (*v.sizes, *v.strides)):
        raise Unsupported("a product whose extents differ between calls")
    product = _product(b, node)
    if product is None:
        raise Unsupported("not a dense product")
    if not _goes_by_columns(product) and _is_worth_turning(b, product):
        product = replace(product, right=_turned_right(b, product.right))
    for fits, build in _KINDS:
        if fits(product):
            return build(b, product)
    raise Unsupported("BLAS is as fast")


def _product(b: Builder, node: Node) -> Product | None:
    if node.kwargs or any(not isinstance(v, View) for v in node.args):
        return None
    bias = node.args[0] if node.target is aten.addmm.default else None
    left, right = node.args[-2:]
    (buffer,) = node.results
    if buffer is None:
        return None
    out = b.program.graph.buffers[buffer].view
    continued = buffer in b.continued

    def pays(shape: Shape) -> bool:
        return b.product_pays(shape, continued)

    product = Product(left, right, bias, out, node.location, b.products, pays)
    m, n, k = product.extents
    views = [v for v in (left, right, bias, out) if v is not None]
    same = len({v.dtype for v in views}) == 1
    rows = left.strides[1] == 1 or k == 1
    dense = out.strides in ((n, 1), (max(n, 1), 1))
    by_columns = _lies_by_columns(left) or _lies_by_columns(out)
    fits = (rows and dense) or (by_columns and _is_few_columns(left, right))
    return product if same and fits and min(m, n, k) > 0 else None


# ---------------------------------------------------------------- by columns


def count_uses(graph: TensorGraph) -> Counter[View]:
    """Products that a view is the right side of."""
    rights = (n.args[-1] for n in graph.nodes if n.target in PRODUCTS)
    return Counter(v for v in rights if isinstance(v, View))


def may_go_by_columns(graph: TensorGraph, node: Node, uses: Counter[View]) -> bool:
    """Whether the product may take and give matrices that lie by columns."""
    if node.target not in PRODUCTS or node.kwargs or node.results[0] is None:
        return False
    if any(not isinstance(v, View) or v.dtype != "float32" for v in node.args):
        return False
    left, right = node.args[-2:]
    return uses[right] < _TURNING_USES and _is_few_columns(left, right)


def _is_few_columns(left: View, right: View) -> bool:
    (m, k), n = left.sizes, right.sizes[1]
    numbers = (m, n, k, *left.strides, *right.strides)
    return (
        not any(is_symbolic(x) for x in numbers)
        and left.dtype == "float32"
        and m in _COLUMN_ROWS
        and n % _LANES == k % _LANES == 0
        and m * k <= _COLUMN_NUMBERS
        and n * k <= _COLUMN_WEIGHT
        and right.strides[0] == 1
        and right.strides[1] >= k
    )


def _lies_by_columns(view: View) -> bool:
    return len(view.sizes) == 2 and view.strides == (1, view.sizes[0])


def _goes_by_columns(p: Product) -> bool:
    if not p.templates or not _is_few_columns(p.left, p.right):
        return False
    m, n, k = p.extents
    chained = _lies_by_columns(p.left) or _lies_by_columns(p.out)
    return chained or (p.left.strides[1] == 1 and m * (n + k) < n * k)


def _lower_columns(b: Builder, p: Product) -> None:
    m, n, k = p.extents
    bias_m, bias_n = _bias_strides(p.bias)
    bias = "(const float*)p[2]" if p.bias is not None else "nullptr"
    out = 3 if p.bias is not None else 2
    by_columns = _lies_by_columns(p.left)
    turned_in = "false" if by_columns else "true"
    turned_out = "false" if _lies_by_columns(p.out) else "true"
    body = (
        f"  columns_gemm<{m}, {n}, {k}, {turned_in}, {turned_out}>((const float*)p[1], "
        f"{p.right.strides[1]}, (const float*)p[0], {p.left.strides[1 if by_columns else 0]}, "
        f"{bias}, {bias_n}, {bias_m}, (float*)p[{out}], begin, end);\n"
    )
    units = -(-n // _COLUMN_UNIT)
    operands = (p.left, p.right) if p.bias is None else (p.left, p.right, p.bias)
    text, parallel = shared_text(body, units), p.work > _PARALLEL_WORK and units > 1
    b.program.steps.append(TemplateNode(p.out.buffer, operands, text, parallel, p.location))


# ---------------------------------------------------------------- small


def _is_small(p: Product) -> bool:
    right = p.right
    m, n, k = p.extents
    in_pieces = n % 16 == 0 and k % 16 == 0 and n * k <= _TURNED_WEIGHT
    if n * k > _SMALL_WEIGHT and _is_weight(p) and not (in_pieces and m >= _SMALL_ROWS):
        return False
    columns = right.strides[1] == 1 or n == 1 or right.strides[0] == 1 or k == 1
    # Columns that lie next to each other are taken as they come, however many.
    most = _SMALL_COLUMNS if right.strides[1] == 1 or in_pieces else _SMALL_EXTENT
    return (
        p.left.dtype == "float32"
        and max(m, k) <= _SMALL_EXTENT
        and n <= most
        and p.work <= _SMALL_WORK
        and columns
    )


def _is_worth_turning(b: Builder, p: Product) -> bool:
    """A weight that lies as [N, K], and would be turned in each of several small products."""
    if p.right.strides[1] == 1 or p.right.strides[0] != 1 or p.extents[1] == 1:
        return False
    turned = replace(p, right=replace(p.right, strides=(p.extents[1], 1)))
    return b.uses[p.right] >= _TURNING_USES and _is_small(turned)


def _turned_right(b: Builder, right: View) -> View:
    known = b.turned_rights.get(right)
    if known is None:
        known = b.turned_rights[right] = b.temporary(right.sizes, right.dtype)
        b.pointwise(known, lambda index: b.load(right, index))
    return known


def _lower_small(b: Builder, p: Product) -> None:
    m, n, k = p.extents
    transposed = p.right.strides[1] != 1 and n > 1
    layout, ldb = ("true", p.right.strides[1]) if transposed else ("false", p.right.strides[0])
    bias_m, bias_n = _bias_strides(p.bias)
    bias = "(const float*)p[2]" if p.bias is not None else "nullptr"
    out = 3 if p.bias is not None else 2
    text = (
        f'extern "C" void @(void* const* p, long) {{\n'
        f"  small_gemm<{m}, {n}, {k}, {layout}>((const float*)p[0], {p.left.strides[0]}, "
        f"(const float*)p[1], {ldb}, {bias}, {bias_m}, {bias_n}, (float*)p[{out}]);\n"
        "}\n"
    )
    operands = (p.left, p.right) if p.bias is None else (p.left, p.right, p.bias)
    b.program.steps.append(TemplateNode(p.out.buffer, operands, text, False, p.location))


def _bias_strides(bias: View | None) -> tuple[int, int]:
    if bias is None:
        return 0, 0
    sizes, strides = bias.sizes, bias.strides
    column = strides[-1] if sizes and sizes[-1] > 1 else 0
    row = strides[0] if len(sizes) == 2 and sizes[0] > 1 else 0
    return row, column


# ---------------------------------------------------------------- vectors of 64 bytes


@dataclass(frozen=True)
class _Element:
    """What products.cpp multiplies, and how many numbers of memory that is."""

    name: str
    numbers: int
    suffix: str


_ELEMENTS = {"float32": _Element("float", 1, "f32"), "bfloat16": _Element("pair", 2, "bf16")}


def _element(p: Product) -> _Element | None:
    features = cpu_features().split()
    if not p.templates or p.extents[2] < _MIN_INNER or p.extents[1] < _MIN_COLUMNS:
        return None
    element = _ELEMENTS.get(p.left.dtype)
    if element is None or element.numbers == 1:
        return element
    if "avx512_bf16" not in features:
        return None
    # Pairs lie along k, in both operands or (by rows) in the left one.
    numbers = [p.left.strides[0], p.left.offset, p.extents[2]]
    if p.right.strides[1] != 1:
        numbers += [p.right.strides[1], p.right.offset]
    return element if all(n % 2 == 0 for n in numbers) else None


def _is_weight(p: Product) -> bool:
    """The right side lies as [N, K]."""
    return p.right.strides[0] == 1 and _element(p) is not None


def _has_few_rows(p: Product) -> bool:
    return p.extents[0] <= _FEW_ROWS and _is_weight(p)


def _fits_product(p: Product) -> bool:
    m, n, k = p.extents
    if not _is_weight(p) or m * k * 4 > _MAX_PACKED_BYTES:
        return False
    return _pays(p, column_block(m, n))


def _fits_wide(p: Product) -> bool:
    m, n, k = p.extents
    right = p.right
    return (
        right.strides[1] == 1
        and _element(p) is not None
        and m >= _LANES
        and m * k * 4 <= _MAX_PACKED_BYTES
        and _pays(p, row_block(m, n))
    )


def _pays(p: Product, block: int) -> bool:
    # Packing the rows is much of the work where there are few columns.
    if p.work < (MIN_WORK if p.extents[1] >= _BLOCK else MIN_NARROW_WORK):
        return True
    return p.pays(Shape(p.left.dtype, *p.extents, p.right.strides[1] != 1, block))


def _lower_few_rows(b: Builder, p: Product) -> None:
    element = _element(p)
    assert element is not None
    m, n, k = p.extents
    lda, ldw = p.left.strides[0] // element.numbers, p.right.strides[1] // element.numbers
    e = element.name
    call = (
        f"few_rows_{element.suffix}((const {e}*)p[0], {lda}, (const {e}*)p[1], {ldw}, "
        f"{m}, {n}, {k // element.numbers}, begin, end, &@_results, &context)"
    )
    _append_shared(b, p, (p.left, p.right), call, -(-n // _LANES))


def _lower_packed(b: Builder, p: Product) -> None:
    element = _element(p)
    assert element is not None
    m, n, k = p.extents
    packed = _packed_rows(b, p.left, element, p.location)
    ldw = p.right.strides[1] // element.numbers
    e = element.name
    call = (
        f"product_{element.suffix}((const {e}*)p[0], (const {e}*)p[1], {ldw}, "
        f"{m}, {n}, {k // element.numbers}, {column_block(m, n)}, begin, end, &@_results, &context)"
    )
    units = -(-n // _BLOCK) * -(-m // column_block(m, n))
    _append_shared(b, p, (packed, p.right), call, units)


def _packed_rows(b: Builder, rows: View, element: _Element, location: str) -> View:
    known = b.packed_rows.get(rows)
    if known is not None:
        return known
    m, k = rows.sizes[0], rows.sizes[1] // element.numbers
    units = -(-m // _LANES)
    packed = b.temporary((units * _LANES, k), "float32" if element.numbers == 1 else "int32")
    e = element.name
    text = shared_text(
        f"  pack_columns_{element.suffix}((const {e}*)p[0], "
        f"{rows.strides[0] // element.numbers}, ({e}*)p[1], {m}, {k}, begin, end);\n",
        units,
    )
    node = TemplateNode(packed.buffer, (rows,), text, m * k > _PARALLEL_PACKING, location)
    b.program.steps.append(node)
    b.packed_rows[rows] = packed
    return packed


def _lower_wide(b: Builder, p: Product) -> None:
    element = _element(p)
    assert element is not None
    m, n, k = p.extents
    lda, ldb = p.left.strides[0] // element.numbers, p.right.strides[0]
    item = 4 // element.numbers
    from_buffers = "((const epilogue_context*)context)->p[1]"
    if element.numbers == 1:
        pack = packer(f"pack_rows((const float*){from_buffers}, {ldb}, ", element.name)
    else:
        pack = packer(f"pack_pairs((const bfloat16*){from_buffers}, {ldb}, ", element.name)
    block = row_block(m, n)
    call = (
        f"wide_{element.suffix}((const {element.name}*)p[0], {lda}, {m}, {n}, "
        f"{k // element.numbers}, {block}, begin, end, {pack}, &@_results, &context, "
        f"(const char*)p[1], {ldb * item}, {item})"
    )
    _append_shared(b, p, (p.left, p.right), call, wide_units(m, n, block))


def column_block(m: int, n: int) -> int:
    """Packed rows of one unit: many, so that a weight is read once, unless cores would idle."""
    block = _MAX_COLUMNS
    while block > _MAX_COLUMNS // 4 and -(-n // _BLOCK) * -(-m // block) < _wanted_units():
        block //= 2
    return block


def _wanted_units() -> int:
    return max(_MIN_UNITS, 2 * (os.cpu_count() or 1))


def row_block(m: int, n: int, units: int = 0) -> int:
    """Rows of one unit: many for little packing, few where there would be less than `units`."""
    blocks = -(-m // _MAX_ROWS)
    while m > blocks * (_MAX_ROWS // 2) and blocks * -(-n // _WIDE) < (units or _wanted_units()):
        blocks *= 2
    # Blocks of about the same size, of whole tiles.
    return -(-m // (blocks * _TILE_ROWS)) * _TILE_ROWS


def wide_units(m: int, n: int, block: int) -> int:
    return -(-m // block) * -(-n // _WIDE)


def packer(call: str, element: str = "float") -> str:
    """The function that packs columns; `call` begins with its own arguments."""
    return (
        f"[](const void* context, i64 k, i64 count, i64 n, i64 columns, {element}* to) "
        f"{{ {call}k, count, n, columns, to); }}"
    )


def _append_shared(
    b: Builder, p: Product, operands: tuple[View, ...], call: str, units: int
) -> None:
    """The product into a buffer of sums, and what is left to do with them as a loop node."""
    m, n, k = p.extents
    sums = b.temporary((m, n), "float32")
    text = shared_text(f"  const epilogue_context context = {{p, 0}};\n  {call};\n", units)
    parallel = (p.work > _PARALLEL_WORK or n * k > _PARALLEL_WEIGHT) and units > 1
    b.program.steps.append(TemplateNode(sums.buffer, operands, text, parallel, p.location, m, n))

    def value(index: list[Affine]) -> Expr:
        total = b.load(sums, index)
        return total if p.bias is None else total + b.load(p.bias, index)

    b.pointwise(p.out, value)


def shared_text(body: str, units: int) -> str:
    return (
        f"static void @_part(void* const* p, i64 begin, i64 end) {{\n{body}}}\n"
        f'extern "C" void @(void* const* p, long threads) {{ '
        f"share(@_part, p, {units}, threads); }}\n"
    )


def store_results(first_param: int, columns: int) -> str:
    """`@_results` for a template without epilogue: stores the results as they come."""
    where = f"(float*)e.p[{first_param}] + (e.row + m) * {columns} + n"
    return (
        "static void @_finish(const void* context, i64 m, i64 n, i64 length, "
        "const float* values) {\n"
        "  const epilogue_context& e = *(const epilogue_context*)context;\n"
        f"  float* const out = {where};\n"
        "  for (i64 i = 0; i < length; i++) out[i] = values[i];\n"
        "}\n"
        "static char* @_where(const void* context, i64 m, i64 n) {\n"
        "  const epilogue_context& e = *(const epilogue_context*)context;\n"
        f"  return (char*)({where});\n"
        "}\n"
        "static constexpr Results @_results = {@_finish, @_where};\n"
    )


_KINDS = (
    (_goes_by_columns, _lower_columns),
    (_is_small, _lower_small),
    (_has_few_rows, _lower_few_rows),
    (_fits_product, _lower_packed),
    (_fits_wide, _lower_wide),
)
PRODUCTS = frozenset({aten.mm.default, aten.addmm.default})
