"""Convolutions with kernels of 3x3 over tiles (Winograd's F(2x2, 3x3), `winograd.cpp`).

In: a convolution that goes on by one pixel. Out: two template nodes: its weights, made ready for
the 16 products of the tiles, and the convolution. 2.25 times fewer multiplications than sums over the taps.
Source: A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural Networks", 2015.
Invariant: as for other products, nothing is remembered from one call to the next; the weights are made ready in each.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields

from accel.codegen.builder import Builder
from accel.codegen.products import shared_text
from accel.codegen.program import TemplateNode
from accel.codegen.tensor_graph import View

# As in winograd.cpp.
_LANES, _PANEL, _MAX_TILES, _SPOTS, _STEP = 16, 32, 64, 16, 2
_PART = 256  # filters of a unit: their sums stay in the second-level cache
_MIN_CHANNELS = 16  # whole vectors
# Results by channels are handed out pixel by pixel: less work for each would not be worth it.
_MIN_WORK_OF_PIXEL = 1024
# What a tile costs as a plain sum and here, and what the weights cost here (more by channels, where plain
# sums are oneDNN's, and where they are turned before), for each channel and filter.
_PLAIN, _TILE, _WEIGHTS, _BY_CHANNELS, _TURNED = 1.4, 0.6, 13, 3, 13
_PARALLEL_WEIGHTS = 1 << 14
# Numbers that all threads have together; fewer threads where that is not enough.
_MAX_ROOM = 1 << 26


@dataclass(frozen=True)
class Tiling:
    """Sizes of a convolution, and which tiles make a block, as the kernel takes them."""

    images: int
    channels: int
    height: int
    width: int
    filters: int
    height_out: int
    width_out: int
    pad_h: int
    pad_w: int
    by_channels: bool = False  # a pixel's channels lie beside each other, in images and results
    weights_by_channels: bool = False

    @property
    def tiles(self) -> tuple[int, int]:
        """Down and across, of one image."""
        return -(-self.height_out // _STEP), -(-self.width_out // _STEP)

    @property
    def block(self) -> tuple[int, int, int]:
        """Images, lines and columns of tiles."""
        down, across = self.tiles
        if down * across <= _MAX_TILES:
            return min(self.images, _MAX_TILES // (down * across)), down, across
        if across <= _MAX_TILES:
            return 1, _even(down, _MAX_TILES // across), across
        return 1, 1, _even(across, _MAX_TILES)

    @property
    def blocks(self) -> int:
        sizes = zip((self.images, *self.tiles), self.block, strict=True)
        images, down, across = (-(-n // block) for n, block in sizes)
        return images * down * across

    @property
    def part(self) -> int:
        """Filters of a unit: fewer where cores would idle."""
        panels = -(-self.filters // _PANEL)
        wanted = 2 * (os.cpu_count() or 1)
        parts = max(-(-self.filters // _PART), min(panels, wanted // self.blocks))
        return -(-panels // parts) * _PANEL

    @property
    def units(self) -> int:
        return self.blocks * -(-self.filters // self.part)

    @property
    def weights(self) -> int:
        """Numbers of the weights that were made ready."""
        return _SPOTS * (_whole(self.filters, _LANES) * self.channels + _LANES)

    @property
    def groups(self) -> int:
        """Units in which weights are made ready, of a panel of filters and a vector of channels; for each
        there is a number that says whether some taps are zero."""
        return -(-self.filters // _PANEL) * -(-self.channels // _LANES)

    @property
    def room(self) -> int:
        """Numbers that a thread needs for its tiles and their sums."""
        results = _MAX_TILES * _STEP * _STEP * self.part if self.by_channels else 0
        lines = (self.channels, self.part)
        return results + sum(_SPOTS * (_MAX_TILES * _line(n) + _LANES) for n in lines)

    @property
    def numbers(self) -> str:
        """As the kernel takes them."""
        layout = self.by_channels, self.weights_by_channels
        sizes = [getattr(self, f.name) for f in fields(self)[: -len(layout)]]
        return ", ".join(map(str, (*sizes, *self.block, self.part, *map(int, layout))))

    def pays(self, turned: bool = False) -> bool:
        down, across = self.tiles
        tiles = self.images * down * across
        # Tiles at the edge reach over it.
        used = self.images * self.height_out * self.width_out / (_STEP * _STEP)
        work = self.channels * _whole(self.filters, _LANES)
        # Taps that meet padding only cost plain sums nothing.
        met = 1 / 3 if 1 in (self.height, self.width) else 1
        enough = self.channels >= _MIN_CHANNELS
        enough = enough and (work >= _MIN_WORK_OF_PIXEL or not self.by_channels)
        weights = _WEIGHTS + self.by_channels * _BY_CHANNELS + turned * _TURNED
        return enough and _PLAIN * used * met > _TILE * tiles + weights


def _even(count: int, most: int) -> int:
    """Pieces of about the same size, at most `most`."""
    return -(-count // -(-count // most))


def _whole(n: int, step: int) -> int:
    return -(-n // step) * step


def _line(numbers: int) -> int:
    return _whole(numbers, _LANES) + _LANES


def append(b: Builder, t: Tiling, x: View, weight: View, sums: View, location: str) -> None:
    """Into `sums`, which lie as the images do."""
    threads = max(min(os.cpu_count() or 1, t.units, _MAX_ROOM // t.room), 1)
    # Behind the weights, and what they say of their groups, each thread has room of its own.
    ready = b.temporary((t.weights + t.groups + threads * t.room,), "float32")
    by_channels = str(t.weights_by_channels).lower()
    text = shared_text(
        f"  winograd_weights_f32((const float*)p[0], {t.filters}, {t.channels}, {by_channels}, "
        f"(float*)p[1], (float*)p[1] + {t.weights}, begin, end);\n",
        t.groups,
    )
    parallel = t.filters * t.channels > _PARALLEL_WEIGHTS
    b.program.steps.append(TemplateNode(ready.buffer, (weight,), text, parallel, location))
    pixels = t.height_out * t.width_out
    results = "@_results"
    if t.images > 1 and not t.by_channels:  # whose columns are the pixels of all images
        results = f"of_images<{t.filters}, {pixels}, {results}>"
    text = (
        "static void @_part(void* const* p, i64 thread, i64 begin, i64 end) {\n"
        f"  static constexpr Winograd sizes = {{{t.numbers}}};\n"
        "  const epilogue_context context = {p, 0};\n"
        f"  float* const room = (float*)p[2] + {t.weights + t.groups} + thread * {t.room};\n"
        "  winograd_f32((const float*)p[0], (const float*)p[1], (const float*)p[2], "
        f"(const float*)p[2] + {t.weights}, room, &sizes, begin, end, &{results}, &context);\n"
        "}\n"
        'extern "C" void @(void* const* p, long threads) { '
        f"share(@_part, p, {t.units}, threads < {threads} ? threads : {threads}); }}\n"
    )
    rows, columns = t.images * t.filters, pixels
    if t.by_channels:
        rows, columns = t.images * pixels, t.filters
    operands, pieces = (x, weight, ready), not t.by_channels
    b.program.steps.append(
        TemplateNode(sums.buffer, operands, text, True, location, rows, columns, pieces)
    )
