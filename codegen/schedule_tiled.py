"""Groups -> kernels for a GPU: plain loops, of which `tiles` makes blocks.

In: a fused `Group` and which buffers need memory. Out: as `schedule`. Invariant: a row's
value is kept for a later phase only where whole rows fit a block, in registers.
"""

from __future__ import annotations

from accel.codegen.fusion import Group
from accel.codegen.schedule import KernelBuilder, Scheduled, collapse, narrow_iotas, order
from accel.codegen.tiles import LONGEST_TILE


def schedule_tiled(group: Group, sizes: dict[str, int], stored: set[int], name: str) -> Scheduled:
    """The kernel of one group; `stored` are the buffers that other steps read."""
    narrow_iotas(group, sizes)
    order(group, sizes)
    collapse(group, sizes)
    builder = KernelBuilder(group, sizes, stored, name, None, False, 1)
    builder.longest_row = LONGEST_TILE
    return builder.build()
