# mypy: ignore-errors
"""What every generated Triton kernel builds on; its text is the head of each kernel module.

Rules: NaN, infinities, signed zeros and the rounding of integer division come out as in
ATen's kernels; a function takes blocks of any shape, of any type its rows in
`scalar_ops.py` allow.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def divide(a, b):
    """Correctly rounded: `/` of float32 is not."""
    if a.dtype.is_fp32():
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def square_root(a):
    if a.dtype.is_fp32():
        return tl.sqrt_rn(a)
    else:
        return libdevice.sqrt(a)


@triton.jit
def negate(a):
    """Keeps the sign of zero, which 0 - a loses."""
    if a.dtype.is_floating():
        return a * -1.0
    else:
        return 0 - a


@triton.jit
def is_nan(a):
    return a != a  # noqa: PLR0124


@triton.jit
def maximum(a, b):
    """A NaN in either operand wins; of equals the second is taken."""
    if a.dtype.is_floating():
        return tl.where((a > b) | is_nan(a), a, b)
    else:
        return tl.where(a > b, a, b)


@triton.jit
def minimum(a, b):
    if a.dtype.is_floating():
        return tl.where((a < b) | is_nan(a), a, b)
    else:
        return tl.where(a < b, a, b)


@triton.jit
def multiply(a, b):
    return a * b


@triton.jit
def sigmoid(a):
    return divide(tl.full(a.shape, 1.0, a.dtype), 1.0 + libdevice.exp(negate(a)))


@triton.jit
def gelu(a):
    return a * 0.5 * (1.0 + libdevice.erf(a * 0.7071067811865476))


@triton.jit
def truncate_divide(a, b):
    if a.dtype.is_floating():
        return libdevice.trunc(divide(a, b))
    else:
        return a // b


@triton.jit
def floor_divide(a, b):
    """Python's floor division; floats as c10::div_floor_floating."""
    if a.dtype.is_floating():
        m = libdevice.fmod(a, b)
        q = divide(a - m, b)
        q = tl.where((m != 0) & ((b < 0) != (m < 0)), q - 1.0, q)
        f = libdevice.floor(q)
        f = tl.where(q - f > 0.5, f + 1.0, f)
        plain = divide(a, b)
        f = tl.where(q != 0, f, libdevice.copysign(q * 0.0, plain))
        return tl.where(b == 0, plain, f)
    else:
        q = a // b
        return tl.where((a % b != 0) & ((a < 0) != (b < 0)), q - 1, q)


@triton.jit
def remainder(a, b):
    m = libdevice.fmod(a, b) if a.dtype.is_floating() else a % b
    return tl.where((m != 0) & ((b < 0) != (m < 0)), m + b, m)


@triton.jit
def bounded(place, count):
    """An index out of range ends the run, as in ATen's kernels."""
    tl.device_assert((place >= 0) & (place < count), "index out of bounds")
    return tl.minimum(tl.maximum(place, 0), count - 1)


@triton.jit
def random_bits(position, first, second):
    """32 random bits of a position and two seeds; shifts are of unsigned numbers."""
    x = (position ^ first).to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 17)) * 0xED5AD4BB
    x = (x ^ (x >> 11)) + second.to(tl.uint32, bitcast=True)
    x = x * 0xAC4C1B51
    x = (x ^ (x >> 15)) * 0x31848BAB
    return (x ^ (x >> 14)).to(tl.int32, bitcast=True)


@triton.jit
def philox_words(seed, counter, thread):
    """Philox4x32-10, by Triton's own rounds: seeds and counters have 64 bits."""
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32)
    word = thread.to(tl.uint32)
    zero = word ^ word
    return tl.philox(seed.to(tl.uint64, bitcast=True), low ^ zero, high ^ zero, word, zero)


@triton.jit
def philox_uniform(seed, counter, thread, lane):
    a, b, c, d = philox_words(seed, counter, thread)
    word = tl.where(lane < 2, tl.where(lane == 0, a, b), tl.where(lane == 2, c, d))
    return word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10


@triton.jit
def philox_uniform_wide(seed, counter, thread, lane):
    a, b, c, d = philox_words(seed, counter, thread)
    low = tl.where(lane == 0, a, c).to(tl.uint64)
    bits = low ^ (tl.where(lane == 0, b, d).to(tl.uint64) << 21)
    return bits.to(tl.float64) * 1.1102230246251565e-16 + 5.551115123125783e-17


@triton.jit
def grouped(tile, rows, columns, height: tl.constexpr):
    """The block of rows and that of columns of a product's tile: `height` blocks of rows are walked
    together, so that what they read of either side is met in the cache."""
    first = tile // (height * columns) * height
    inside = tile % (height * columns)
    group = tl.minimum(rows - first, height)
    return first + inside % group, inside // group


@triton.jit
def round_tf32(a):
    """To the nearest of ten bits, ties away from zero: the tensor cores would cut the others off."""
    bits = a.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(is_nan(a), float("nan"), rounded)
