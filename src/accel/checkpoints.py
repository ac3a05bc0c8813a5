"""torch.utils.checkpoint(use_reentrant=False): which calls its first run of a function was served.

In: the functions that torch's hooks of such a checkpoint pack with, and calls that native dispatch
serves under these hooks (native/checkpoints.cpp). Out: for each call of a second run the variant that
has served it in the first. Invariants: the log lies with torch's own frame object and dies with it; a
call is known by how many tensors had been saved before it, and by its function or module; where
torch's hooks are not as expected, nothing is served under them.
"""

from __future__ import annotations

import types
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch.utils import checkpoint

from accel import log, runtime

installed = False  # whether the setting asks for it, and torch's hooks are as expected

_NAME = "_accel_log"  # the attribute of torch's frame object


@dataclass
class _Log:
    """`calls`: (tensors saved before, callee, variant or None) of each; `next`: by run of the engine,
    how many of them have come again. Closed by a recording, which calls what its twins inline by no
    prologue."""

    calls: list[tuple[int, Any, Any]] = field(default_factory=list)
    next: dict[Any, int] = field(default_factory=dict)
    is_closed: bool = False


def install() -> None:
    """Lets native dispatch serve calls under the hooks of checkpoints."""
    try:
        first = _inner(checkpoint._checkpoint_hook.__init__.__code__, "unpack_hook", "frame")
        again = _inner(checkpoint._recomputation_hook.__init__.__code__, "unpack_hook")
        _inner(checkpoint._checkpoint_hook.__init__.__code__, "pack_hook", "frame")
        _inner(
            checkpoint._recomputation_hook.__init__.__code__, "pack_hook", "gid", "target_frame_ref"
        )
        generator: Any = checkpoint._checkpoint_without_reentrant_generator
        _inner(generator.__code__, "recompute_fn", "preserve_rng_state")
        frame: Any = checkpoint._CheckpointFrame(None, True, None, None)
        if not isinstance(frame.weak_holders, list) or frame.recomp_counter[0] != 0:
            raise AttributeError("weak_holders, recomp_counter")
    except (AttributeError, TypeError) as error:
        log.artifact("driver", "calls in torch.utils.checkpoint are not served: %s", error)
        return
    global installed
    installed = True
    runtime.native.set_checkpoints(first, again, _place, _write, _served, _refuse)


def uninstall() -> None:
    global installed
    installed = False
    runtime.native.set_checkpoints(*[None] * 6)


def _inner(code: types.CodeType, name: str, *cells: str) -> types.CodeType:
    """The function of this name that `code` makes, which closes over `cells`."""
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType) and inner.co_name == name:
            if set(cells) <= set(inner.co_freevars):
                return inner
    raise AttributeError(f"{code.co_qualname} makes no {name} over {', '.join(cells)}")


def _cell(function: Any, name: str) -> Any:
    """What `function`, or the one below its decorators, closes over by this name."""
    while name not in function.__code__.co_freevars:
        function = function.__wrapped__
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


def _log_of(frame: Any) -> _Log:
    kept: _Log | None = vars(frame).get(_NAME)
    if kept is None:
        kept = vars(frame)[_NAME] = _Log()
    return kept


def _place(pack: Any) -> tuple[int | None, bool]:
    """Where a first run is, None where nothing is served any more; whether the second draws the same
    random numbers."""
    frame = _cell(pack, "frame")
    if _log_of(frame).is_closed:
        return None, False
    return len(frame.weak_holders), bool(_cell(frame.recompute_fn, "preserve_rng_state"))


def _write(pack: Any, place: int | None, callee: Any, variant: Any) -> None:
    """A call, with the variant that has served it; without a place, the end of the log."""
    kept = _log_of(_cell(pack, "frame"))
    if place is None:
        kept.is_closed = True
    else:
        kept.calls.append((place, _identity(callee), variant))


def _served(pack: Any, callee: Any) -> Any:
    frame, group = _cell(pack, "target_frame_ref")(), _cell(pack, "gid")
    kept = vars(frame).get(_NAME)
    if kept is None:
        return None
    place, identity = frame.recomp_counter[group], _identity(callee)
    for k in range(kept.next.get(group, 0), len(kept.calls)):
        before, who, variant = kept.calls[k]
        if before > place:
            break
        if before == place and who == identity:
            kept.next[group] = k + 1
            return variant
    return None


def _identity(callee: Any) -> Any:
    """A function by its code's place: it may have been given another code object in between, or be
    another function made of the same code."""
    if not isinstance(callee, types.FunctionType):
        return callee
    code = callee.__code__
    return code.co_filename, code.co_firstlineno, code.co_qualname


def _refuse(name: str, why: str) -> NoReturn:
    raise checkpoint.CheckpointError(
        f"torch.utils.checkpoint: {name} was served by code that accel had compiled, and cannot be "
        f"served by it again: {why}. What the checkpointed function reads must not change before its "
        f"backward. `accel.disable({name})` runs it eagerly."
    )


__all__ = ["install", "installed", "uninstall"]
