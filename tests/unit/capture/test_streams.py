"""What is printed waits for the end of compiled code, but not for long."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import accel
from accel.capture import recorder, streams


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    accel.reset()
    yield
    accel.reset()


def talking(x: torch.Tensor) -> torch.Tensor:
    x = x + 1
    print("half of it is done")
    return x * 2


def warmed(function: Any) -> Any:
    made = accel.optimize(function)
    for _ in range(4):
        made(torch.ones(3))
        assert accel.wait()
    return made


def test_text_is_part_of_compiled_code(capsys: pytest.CaptureFixture[str]) -> None:
    made = warmed(talking)
    explanation = str(accel.explain(made)(torch.ones(3)))
    assert "0 graph break" in explanation
    assert capsys.readouterr().out == "half of it is done\n" * 5


def test_text_with_much_work_behind_it_is_a_graph_break(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "MOST_SECONDS", -1.0)
    made = warmed(talking)
    explanation = str(accel.explain(made)(torch.ones(3)))
    assert "1 graph break" in explanation
    assert "what is written there would be seen late" in explanation
    assert "test_streams.py:" in explanation
    assert "compiled segments ran" in explanation
    assert capsys.readouterr().out == "half of it is done\n" * 5


class Python(io.StringIO):
    def write(self, text: str) -> int:
        return super().write(text)


class Raw(io.RawIOBase):
    def writable(self) -> bool:
        return True


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


def overridden() -> io.TextIOWrapper:
    stream = io.TextIOWrapper(io.BufferedWriter(io.FileIO("/dev/null", "w")))
    stream.buffer.flush = lambda: None  # type: ignore[method-assign]
    return stream


@pytest.mark.parametrize(
    "make",
    [Python, closed, overridden, object, lambda: io.TextIOWrapper(io.BufferedWriter(Raw()))],
)
def test_not_plain(make: Any) -> None:
    with pytest.raises(ValueError, match="closed or runs Python code"):
        streams.PlainStream(make())


def test_plain() -> None:
    for stream in (io.StringIO(), io.TextIOWrapper(io.BytesIO()), sys.__stdout__):
        assert streams.PlainStream(stream)(stream)
    ascii_only = streams.PlainStream(io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert not ascii_only(io.TextIOWrapper(io.BytesIO(), "utf-8"))
    assert not ascii_only(io.StringIO())


def test_text_of_print() -> None:
    assert streams.printed((1, 2.5, None, "é\r\n"), {"sep": "-", "end": ""}) == "1-2.5-None-é\r\n"
