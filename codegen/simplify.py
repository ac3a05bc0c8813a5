"""Tensor graph -> smaller tensor graph: common subexpressions, dead nodes.

Invariant: two tensors that eager keeps apart as outputs stay apart, so a node whose result
is the memory of an output is never merged.
"""

from __future__ import annotations

from typing import Any

import torch

from accel.codegen.tensor_graph import Node, TensorGraph, View, map_views
from accel.codegen.totality import may_raise


def eliminate_common(graph: TensorGraph) -> None:
    """One node for equal nodes without randomness and with results."""
    kept = {view.buffer for view in graph.outputs}
    renamed: dict[int, int] = {}
    seen: dict[Any, Node] = {}
    nodes = []

    def rename(view: View) -> View:
        target = renamed.get(view.buffer)
        return view if target is None else View(target, *_rest(view))

    for node in graph.nodes:
        node.args = map_views(node.args, rename)
        node.kwargs = map_views(node.kwargs, rename)
        key = _key(node, graph)
        twin = seen.get(key) if key is not None else None
        if twin is not None and not kept.intersection(r for r in node.results if r is not None):
            for old, new in zip(node.results, twin.results, strict=True):
                if old is not None and new is not None:
                    renamed[old] = new
            continue
        if key is not None:
            seen.setdefault(key, node)
        nodes.append(node)
    graph.nodes = nodes
    graph.outputs = [rename(v) for v in graph.outputs]
    graph.speculations = [(rename(v), e) for v, e in graph.speculations]
    for commit in graph.commits:
        commit.value = rename(commit.value)
        if commit.state is not None:
            commit.state = rename(commit.state)


def _rest(view: View) -> tuple[Any, ...]:
    return (view.sizes, view.strides, view.offset, view.dtype)


def _key(node: Node, graph: TensorGraph) -> Any:
    """What makes two nodes the same, or None for a node that is never the same."""
    if isinstance(node.target, str) or not node.results:
        return None
    if torch.Tag.nondeterministic_seeded in node.target.tags:
        return None
    layouts = tuple(
        None if r is None else (graph.buffers[r].sizes, graph.buffers[r].strides)
        for r in node.results
    )
    try:
        key = (node.target, _frozen(node.args), _frozen(node.kwargs), layouts)
        hash(key)
    except TypeError:
        return None
    return key


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in sorted(value.items()))
    # 1, 1.0 and True are equal, and so are 0.0 and -0.0: the text tells them apart.
    return (type(value), repr(value)) if isinstance(value, (bool, int, float)) else value


def eliminate_dead(graph: TensorGraph) -> None:
    """Drops nodes whose results nobody reads; what draws numbers, may raise or has no result stays."""
    needed = {view.buffer for view in graph.roots()}
    kept = []
    for node in reversed(graph.nodes):
        if needed.intersection(r for r in node.results if r is not None) or _has_effect(node):
            needed.update(view.buffer for view in node.views())
            kept.append(node)
    graph.nodes = kept[::-1]


def _has_effect(node: Node) -> bool:
    return not isinstance(node.target, str) and (
        torch.Tag.nondeterministic_seeded in node.target.tags or not node.results or may_raise(node)
    )
