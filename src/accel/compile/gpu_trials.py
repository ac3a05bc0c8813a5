"""Whether kernels do on a GPU what eager does there: asked before the first graph is compiled for it.

In: graphs on GPUs, held until their GPU is known. Out: what is wrong with it, or nothing. Invariant: no kernel of
accel runs for a program on a GPU where one of `trial_graphs` has given another result than eager, or has failed;
where only random numbers differ, only graphs that draw are left to eager; where only CUDA graphs differ, or nobody
has asked for them, kernels are launched one by one. The program's streams of random numbers stay
where they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from accel import log, runtime
from accel.compile import trial_graphs

KINDS = (
    *(k for k in trial_graphs.KERNELS if k not in ("convolution", "ATen")),
    *trial_graphs.GPU_KERNELS,
)
_SUBJECTS = {
    "wrong": "programs on {} stay eager",
    "wrong_draws": "random numbers on {} stay eager",
    "wrong_replays": "kernels on {} are launched without CUDA graphs",
}


class Refusal(NamedTuple):
    """Why nothing is compiled for a GPU; no text where it is. `is_missing`: for want of something to install."""

    text: str = ""
    is_missing: bool = False


_NOTHING = Refusal()


@dataclass
class _Trial:
    segments: dict[str, Any] = field(default_factory=dict)  # by kind
    waiting: list[Callable[[], None]] = field(default_factory=list)
    is_over: bool = False
    wrong: Refusal = _NOTHING  # kernels
    wrong_draws: Refusal = _NOTHING  # random numbers
    wrong_replays: Refusal = _NOTHING  # CUDA graphs


class GpuTrials:
    """`compile` compiles a graph and calls back; `cuda_graphs`: kernels may be launched as such."""

    def __init__(
        self, compile_: Callable[[Any, Callable[[Any], None]], None], cuda_graphs: bool
    ) -> None:
        self._compile = compile_
        self._cuda_graphs = cuda_graphs
        self._trials: dict[str, _Trial] = {}

    @property
    def held(self) -> int:
        """How many graphs wait for an answer."""
        return sum(len(trial.waiting) for trial in self._trials.values())

    def refusal(self, device: str, is_random: bool) -> Refusal | None:
        """None while it is not known."""
        trial = self._trials.get(device)
        if trial is None or not trial.is_over:
            return None
        return trial.wrong_draws if is_random and not trial.wrong.text else trial.wrong

    def hold(self, device: str, go_on: Callable[[], None]) -> None:
        """Calls `go_on` from a later `poll`, when the answer is there."""
        if device in self._trials:
            self._trials[device].waiting.append(go_on)
            return
        trial = self._trials[device] = _Trial(waiting=[go_on])
        for kind in KINDS:
            graph = trial_graphs.graph_of(kind, device)
            self._compile(graph, functools.partial(trial.segments.__setitem__, kind))

    def poll(self) -> None:
        """Runs what is compiled, at a time when nobody listens to torch or captures a stream."""
        for device, trial in self._trials.items():
            if trial.is_over or len(trial.segments) < len(KINDS) or not _is_quiet(device):
                continue
            trial.is_over = True  # whatever comes
            self._run(device, trial)
            waiting, trial.waiting = trial.waiting, []
            for go_on in waiting:
                go_on()

    def _run(self, device: str, trial: _Trial) -> None:
        runtime.native.set_cuda_graphs(torch.device(device).index, False)
        for kind, segment in trial.segments.items():
            fault = _fault(kind, device, segment)
            if segment.error and segment.is_missing:  # whoever has asked is told so
                trial.wrong = Refusal(fault, is_missing=True)
                return
            if not fault:
                continue
            text = f"{kind} on {torch.cuda.get_device_name(device)}: {fault}"
            if kind in trial_graphs.RANDOM:
                trial.wrong_draws = Refusal(text)
            elif not trial.wrong.text:
                trial.wrong = Refusal(text)
        if self._cuda_graphs and not trial.wrong.text:
            trial.wrong_replays = _replay(device, trial.segments[trial_graphs.REPLAYED])
        for name, what in _SUBJECTS.items():
            wrong: Refusal = getattr(trial, name)
            if wrong.text:
                advice = "`python -m accel doctor` says more"
                log.notice_once(f"{what.format(device)}: {wrong.text}; {advice}")
                break


def _fault(kind: str, device: str, segment: Any) -> str:
    if segment.error:
        return str(segment.error)
    graph = trial_graphs.graph_of(kind, device)
    try:
        if trial_graphs.agrees(graph, segment.plan, segment.library_path):
            return ""
    except Exception as error:  # of the driver, of the executor, out of memory
        return f"{type(error).__name__}: {error}"
    return "a kernel's result is not eager's"


def _replay(device: str, segment: Any) -> Refusal:
    """Turns CUDA graphs on for a GPU, unless they do something else than launches there."""
    index = torch.device(device).index
    runtime.native.set_cuda_graphs(index, True)
    try:
        graph = trial_graphs.graph_of(trial_graphs.REPLAYED, device)
        fault = trial_graphs.replay_fault(graph, segment.plan, segment.library_path)
    except Exception as error:  # of the driver, of the executor, out of memory
        fault = f"{type(error).__name__}: {error}"
    if fault:
        runtime.native.set_cuda_graphs(index, False)
    return Refusal(fault)


def _is_quiet(device: str) -> bool:
    return (
        not torch._C._len_torch_function_stack()
        and not torch._C._len_torch_dispatch_stack()
        and not torch.is_autocast_enabled("cuda")
        and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
    )
