"""Branches that go both ways: when to stop assuming what a tensor decides.

In: the variants of a root or node, what each assumes at which place, how often that failed.
Out: the places that recordings leave to Python from now on: there the function is split, and
both sides run compiled. Invariant: it only chooses among right answers, and is bounded: a place
is given up once, and a root that cannot be split goes on assuming.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from accel import errors, log
from accel.capture import branches
from accel.capture.branches import Place
from accel.capture.recorder import Recording
from accel.roots import Installed, Root, failures

FIRST_DOUBT = 8  # failed speculations of a variant after which somebody looks
RATE = 0.25  # of the calls since the last look: so many failures are too many
MAX_PATHS = 3  # variants that part from a new one, in straight code

Assumed = Sequence[tuple[Place, bool]]


def parting(a: Assumed, b: Assumed) -> Place | None:
    """Where two runs went different ways for the first time; None when they did not, or when
    they had parted before, for another reason than a tensor."""
    for (place, truth), (other_place, other_truth) in zip(a, b, strict=False):
        if place != other_place:
            return None
        if truth != other_truth:
            return place
    return None


def _is_repeated(place: Place, assumed: Assumed) -> bool:
    return sum(p == place for p, _ in assumed) > 1


def places_to_leave(variants: Sequence[Installed], recording: Recording) -> set[Place]:
    """At which places a new recording and the variants so far go both ways, once too often.

    In a loop once is too often: the next call will turn at another round.
    """
    failed = [v for v in variants if failures(v) > 0]
    partings = {
        id(v): (place, v)
        for v in failed
        if (place := parting(v.recording.assumed, recording.assumed)) is not None
    }
    hits = sum(int(v.native.hits) for v in variants)
    if sum(map(failures, failed)) < RATE * hits:
        return set()  # rare: a variant for the rare case is enough
    many = len(partings) >= MAX_PATHS
    return {
        place
        for place, v in partings.values()
        if many
        or _is_repeated(place, recording.assumed)
        or _is_repeated(place, v.recording.assumed)
    }


def places_in_doubt(variants: Sequence[Installed]) -> set[Place]:
    """At which places these variants part from each other."""
    pairs = itertools.combinations([v.recording.assumed for v in variants], 2)
    return {place for a, b in pairs if (place := parting(a, b)) is not None}


def watch(root: Root, installed: Installed) -> None:
    """Native dispatch is to tell of the variant's failures, when they are some."""
    if installed.recording.assumed:
        installed.doubted = (root.entry.calls, failures(installed))
        installed.native.doubt_at = installed.native.misspeculations + FIRST_DOUBT


def doubt(root: Root) -> set[Place]:
    """Native dispatch has told of failures: the places that fail too often to be assumed."""
    found: set[Place] = set()
    for installed in root.variants:
        if installed.native.doubt_at or not installed.recording.assumed:
            continue
        calls, before = installed.doubted
        failed = failures(installed)
        if failed - before >= RATE * max(root.entry.calls - calls, 1):
            if order(root.variants):
                root.publish()
            else:
                found |= places_in_doubt(root.variants)
        # While it is rare, look rarely.
        installed.doubted = (root.entry.calls, failed)
        installed.native.doubt_at = installed.native.misspeculations + max(FIRST_DOUBT, failed)
    return found


def leave(root: Root, places: set[Place]) -> bool:
    """No recording assumes anything at these places; what `root` has that does is dropped.

    False when there is nothing to leave, or the root cannot be split.
    """
    if not places or not _may_be_split(root):
        return False
    branches.both_ways |= places
    shown = ", ".join(sorted(map(branches.text, places)))
    root.history.append(f"branches that go both ways are left to Python: {shown}")
    log.artifact("driver", "%s: branches go both ways: %s", root.name, shown)
    _begin_again(root)
    return True


def leave_operation(root: Root, recording: Recording, error: str) -> bool:
    """The compiler cannot follow one operation: it is Python's from now on, and `root` is
    recorded anew. False when that has been tried, or is no use."""
    found = errors.untraceable_operation(error)
    if found is None or recording.graph is None or not _may_be_split(root):
        return False
    # The error may be that of an equal graph from another place.
    target, location = found
    places = {(o.target, o.location) for o in recording.graph.operations if o.target == target}
    return leave_operations(root, places & {(target, location)} or places, error)


def leave_operations(root: Root, places: set[tuple[str, str]], why: str) -> bool:
    """Operations, by target and location, that are Python's from now on: `root` is recorded anew.
    False when that has been tried, or `root` cannot be split."""
    if not _may_be_split(root) or not places - branches.untraceable:
        return False
    branches.untraceable |= places
    root.history.append(why.splitlines()[0])
    log.artifact("driver", "%s: %s", root.name, why)
    _begin_again(root)
    return True


def order(variants: list[Installed]) -> bool:
    """Puts the variants that serve most before others that assume something; says if it did."""
    before = list(variants)
    positions = [k for k, v in enumerate(variants) if v.recording.assumed]
    busiest = sorted((variants[k] for k in positions), key=lambda v: -int(v.native.hits))
    for k, installed in zip(positions, busiest, strict=True):
        variants[k] = installed
    return variants != before


def _may_be_split(root: Root) -> bool:
    owner = root.owner() if root.owner is not None else root
    return owner is not None and not owner.assumes_all and not owner.fullgraph


def drop_variants(root: Root) -> None:
    """What is compiled of the whole function serves no more calls."""
    root.retire(root.variants)
    root.entry.state = "count"


def _begin_again(root: Root) -> None:
    """Drops the variants; the next call is recorded."""
    drop_variants(root)
    root.entry.threshold = 1
    root.state, root.reason = "cold", ""
    owner = root.owner() if root.owner is not None else None
    if owner is not None and owner.split is not None:
        owner.split.wanted, owner.entry.threshold = True, 1


__all__ = [
    "doubt",
    "drop_variants",
    "leave",
    "leave_operation",
    "order",
    "parting",
    "places_to_leave",
    "watch",
]
