"""Devices -> how their kernels are scheduled, printed and built: one row each.

In: a device's type, as a graph has it. Out: its `Target`. Invariant: everything before the
schedule is the same for all devices, but for the numbers that a row gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel.codegen.build import build, vector_bytes
from accel.codegen.builder import Splitting
from accel.codegen.emit_cpp import emit
from accel.codegen.epilogues import attach_epilogues
from accel.codegen.fusion import Group, Step
from accel.codegen.options import CodegenOptions, CompileError
from accel.codegen.plan import Launch
from accel.codegen.program import Program
from accel.codegen.schedule import LONGEST_ROW, Scheduled, lanes_for, schedule
from accel.codegen.tiles import LONGEST_TILE

Texts = dict[str, str]  # a kernel's text, "@" for its name -> its name


@dataclass(frozen=True)
class Target:
    """One device type.

    `longest_row` is how many elements of a row are kept between its phases, `templates`
    says whether the kernels of products.cpp run there, `asserts` whether a kernel may end a run, `draws`
    whether launches hand kernels a part of the generator's stream, `lanes` whether kernels walk with
    vectors of lanes rather than blocks. `emit` gives a kernel's text and, for
    a device beside the processor, how it is launched; `join` puts groups into the kernels of products; `build` what the plan says of the
    library.
    """

    longest_row: int
    templates: bool
    asserts: bool
    draws: bool
    lanes: bool
    splitting: Splitting
    join: Callable[[Program, list[Step], set[int], CodegenOptions, Path], list[Step]]
    schedule: Callable[[Group, dict[str, int], set[int], str], Scheduled]
    emit: Callable[[Group, Scheduled], tuple[str, Launch | None]]
    build: Callable[[Texts, Path, CodegenOptions], dict[str, Any]]


def _schedule_cpu(group: Group, sizes: dict[str, int], stored: set[int], name: str) -> Scheduled:
    return schedule(group, sizes, stored, name, vector_bytes())


def _emit_cpp(group: Group, scheduled: Scheduled) -> tuple[str, Launch | None]:
    return emit(scheduled.kernel, lanes_for(group, vector_bytes()), "@"), None


def _build_cpp(texts: Texts, out_dir: Path, options: CodegenOptions) -> dict[str, Any]:
    named = [text.replace("@", symbol) for text, symbol in texts.items()]
    return {"library": build(named, out_dir, options)}


def _join_templates(
    program: Program, steps: list[Step], kept: set[int], options: CodegenOptions, out_dir: Path
) -> list[Step]:
    return attach_epilogues(program, steps, kept)


def _join_products(
    program: Program, steps: list[Step], kept: set[int], options: CodegenOptions, out_dir: Path
) -> list[Step]:
    from accel.codegen.product_trials import chooser
    from accel.codegen.products_triton import take_products

    return take_products(program, steps, kept, options, chooser(options, out_dir))


def _schedule_tiled(group: Group, sizes: dict[str, int], stored: set[int], name: str) -> Scheduled:
    from accel.codegen.products_triton import Product, schedule_product
    from accel.codegen.schedule_tiled import schedule_tiled

    if isinstance(group, Product):
        return schedule_product(group, sizes, stored)
    return schedule_tiled(group, sizes, stored, name)


def _emit_triton(group: Group, scheduled: Scheduled) -> tuple[str, Launch | None]:
    from accel.codegen.emit_products import emit_product
    from accel.codegen.emit_triton import emit_triton, run_numbers, symbols_of
    from accel.codegen.products_triton import Product
    from accel.codegen.tiles import choose_tiles

    if isinstance(group, Product):
        text, grid = emit_product(group, scheduled)
    else:
        tiles = choose_tiles(scheduled.kernel)
        text, grid = emit_triton(scheduled.kernel, tiles), tiles.grid()
    params = zip(scheduled.buffers, scheduled.kernel.params, strict=True)
    hosts = [buffer for buffer, param in params if param.host]
    return text, Launch(grid, symbols_of(text), run_numbers(scheduled.kernel), hosts)


def _build_cubins(texts: Texts, out_dir: Path, options: CodegenOptions) -> dict[str, Any]:
    from accel.codegen.build_triton import build_cubins, kernels_of

    if options.gpu is None:
        raise CompileError("it is not known for which GPU to compile")
    name, rows = build_cubins(kernels_of(texts), out_dir, options.gpu)
    return {"library": name, "kernels": rows}


TARGETS: dict[str, Target] = {
    "cpu": Target(
        longest_row=LONGEST_ROW,
        templates=True,
        asserts=False,
        draws=False,
        lanes=True,
        splitting=Splitting(),
        join=_join_templates,
        schedule=_schedule_cpu,
        emit=_emit_cpp,
        build=_build_cpp,
    ),
    "cuda": Target(
        longest_row=LONGEST_TILE,
        templates=False,
        asserts=True,
        draws=True,
        lanes=False,
        # Enough programs for all multiprocessors, several each.
        splitting=Splitting(results=512, elements=1 << 17, programs=1024, columns=False),
        join=_join_products,
        schedule=_schedule_tiled,
        emit=_emit_triton,
        build=_build_cubins,
    ),
}


def target_of(device: str) -> Target:
    """Errors: CompileError for a device of which no kernels can be made."""
    kind = device.split(":", maxsplit=1)[0]
    found = TARGETS.get(kind)
    if found is None:
        raise CompileError(f"tensors on {kind}; only {' and '.join(TARGETS)} are compiled")
    return found
