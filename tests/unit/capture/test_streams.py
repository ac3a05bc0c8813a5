"""What is printed waits for the end of compiled code, but not for long."""

from __future__ import annotations

import io
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


class Asked(io.TextIOWrapper):
    @property
    def closed(self) -> bool:
        return False


class Pretender:
    @property
    def __class__(self) -> Any:
        raise AssertionError("asked for its class")


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


NOT_PLAIN: list[Any] = [
    Python,
    lambda: Asked(io.BytesIO()),
    Pretender,
    object,
    closed,
    overridden,
    lambda: io.TextIOWrapper(io.BufferedWriter(Raw())),
    lambda: io.TextIOWrapper(io.FileIO("/dev/null", "r")),
    lambda: io.TextIOWrapper(io.BytesIO(), "utf-7"),  # a codec in Python
]


@pytest.mark.parametrize("make", NOT_PLAIN)
def test_not_plain(make: Any) -> None:
    with pytest.raises(ValueError, match="closed or runs Python code"):
        streams.PlainStream(make(), False)


def test_plain() -> None:
    for stream in (io.StringIO(), io.TextIOWrapper(io.BytesIO(), "utf-8")):
        assert streams.PlainStream(stream, True)(stream)
    narrow = io.TextIOWrapper(io.BytesIO(), "ascii")
    assert streams.PlainStream(io.StringIO(), False)(narrow)
    assert not streams.PlainStream(io.StringIO(), True)(narrow)


def test_text_of_print() -> None:
    assert streams.printed((1, 2.5, None)) == ["1", " ", "2.5", " ", "None", "\n"]
    assert streams.printed(("é\r\n", (1,)), "-", "") == ["é\r\n", "-", "(1,)", ""]
    with pytest.raises(TypeError):
        streams.printed((), 1)
    assert not streams.is_ascii("é")
    with pytest.raises(ValueError, match="surrogates"):
        streams.is_ascii("\ud800")


def test_more_work_than_recorded_is_another_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MOST_SECONDS", 4 * streams._LEAST_SECONDS)
    tensor = torch.ones(3, 4)
    guard = streams.NotMuchLarger(tensor, 0.0)
    assert guard(torch.ones(6, 4))
    assert not guard(torch.ones(7, 4))
    assert not streams.NotMuchLarger(tensor, 1.0)(torch.ones(13))


def test_open_sizes_with_text(capsys: pytest.CaptureFixture[str]) -> None:
    made = accel.optimize(talking, dynamic=True)
    for n in (3, 4, 5, 6, 7):
        assert torch.equal(made(torch.ones(n)), torch.full((n,), 4.0))
        assert accel.wait()
    compiled = accel.counters()["calls_compiled"]
    assert compiled >= 3
    made(torch.ones(20))
    assert accel.counters()["calls_compiled"] == compiled + 1
    made(torch.ones(1_000_000))  # so much work might keep the text back
    assert accel.counters()["calls_compiled"] == compiled + 1
    guards = str(accel.explain(made)(torch.ones(3)))
    assert "0 graph break" in guards
    assert capsys.readouterr().out == "half of it is done\n" * 8
