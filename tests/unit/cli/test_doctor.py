"""What the doctor says of GPUs: one line each."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from accel import doctor, runtime
from accel.codegen import triton_versions


def lines_of(name: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert doctor._report(name, doctor.CHECKS[name])
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("version", "text"),
    [
        (None, "--    Triton                 Triton is not installed (pip install triton==3.6.*); "
               "only graphs on a GPU need it"),
        ((2, 1), "--    Triton                 Triton 2.1 is not supported, only 3.5, 3.6, 3.7, 3.8, 3.9 "
                 "(pip install triton==3.6.*); "
                 "only graphs on a GPU need it"),
        ((3, 6), "ok    Triton                 3.6, compiles kernels for GPUs"),
    ],
)  # fmt: skip
def test_triton(
    version: Any, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(triton_versions, "version", lambda: version)
    assert lines_of("Triton", capsys) == [text]


def driver(answer: Any) -> Any:
    def cuda_driver() -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    return SimpleNamespace(cuda_driver=cuda_driver)


ADVICE = " " * 29 + "-> "
CASES: dict[str, tuple[str | None, Any, bool, tuple[int, int], str]] = {
    "no CUDA": (None, None, False, (0, 0), "--    GPU                    "
                "this torch is built without CUDA"),
    "no driver": ("13.0", OSError("NVIDIA's driver is too old; get one"), False, (0, 0),
                  f"--    GPU                    NVIDIA's driver is too old\n{ADVICE}get one"),
    "no GPU": ("13.0", {"version": 13000, "devices": 0}, False, (0, 0),
               "--    GPU                    "
               "NVIDIA's driver is there, but torch finds no GPU that it can use\n"
               f"{ADVICE}see what nvidia-smi lists, and CUDA_VISIBLE_DEVICES"),
    "GPU": ("13.0", {"version": 13000, "devices": 1}, True, (9, 0),
            "ok    GPU                    H100 (sm_90)"),
    "old GPU": ("13.0", {"version": 13000, "devices": 1}, True, (7, 5),
                "ok    GPU                    H100 (sm_75; kernels are made for sm_80, "
                "sm_86, sm_89, sm_90, sm_100, sm_103, sm_120)"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_gpu(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cuda, answer, available, capability, text = CASES[name]
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(runtime, "native", driver(answer))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H100")
    assert lines_of("GPU", capsys) == text.splitlines()
