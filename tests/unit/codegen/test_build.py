"""Libraries: built once, complete or not at all, rebuilt when damaged."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from accel.codegen import build as build_module
from accel.codegen.build import build, is_sound
from accel.codegen.options import CodegenOptions, CompileError

KERNEL = 'extern "C" void k0(void* const* p, long) { *(float*)p[0] = 7; }\n'
PRODUCT = (
    'extern "C" void k1(void* const* p, long) {\n'
    "  pack_columns_f32((const float*)p[0], 4, (float*)p[1], 4, 4, 0, 1);\n}\n"
)


def test_a_library_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = build([KERNEL], tmp_path, CodegenOptions())
    function = ctypes.CDLL(str(tmp_path / name)).k0
    value = ctypes.c_float(0)
    function((ctypes.c_void_p * 1)(ctypes.addressof(value)), ctypes.c_long(1))
    assert value.value == 7.0

    def fail(*_: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(build_module, "_compile", fail)
    assert build([KERNEL], tmp_path, CodegenOptions()) == name


@pytest.mark.parametrize("damage", [b"", b"not a library", None])
def test_damaged_files_are_built_again(
    tmp_path: Path, damage: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "PREBUILT", tmp_path / "nothing")
    name = build([KERNEL, PRODUCT], tmp_path, CodegenOptions())
    files = list(tmp_path.glob("k_*"))
    assert len(files) == 2 and all(is_sound(f) for f in files)
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[:100] + b"!" + content[101:] if damage is None else damage)
        assert not is_sound(file)
    assert build([KERNEL, PRODUCT], tmp_path, CodegenOptions()) == name
    assert all(is_sound(f) for f in files)
    ctypes.CDLL(str(tmp_path / name))


@pytest.mark.parametrize("is_damaged", [False, True])
def test_objects_built_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_damaged: bool
) -> None:
    ahead, folder = tmp_path / "ahead", tmp_path / "cache"
    build_module.prebuild(ahead)
    monkeypatch.setattr(build_module, "PREBUILT", ahead)
    made = sorted(ahead.iterdir())
    assert len(made) == sum(map(build_module.multiplies, ("f32", "bf16")))
    assert all(is_sound(f) for f in made)
    if is_damaged:
        for file in made:
            file.write_bytes(b"")
    ctypes.CDLL(str(folder / build([KERNEL, PRODUCT], folder, CodegenOptions())))
    assert len(list(folder.glob("*.o"))) == int(is_damaged)


def test_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="failed"):
        build(["no C++ at all"], tmp_path, CodegenOptions())
    assert not list(tmp_path.iterdir())
    with pytest.raises(CompileError, match="no C\\+\\+ compiler"):
        build([KERNEL], tmp_path, CodegenOptions(compiler="/nowhere/g++"))


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CompileError, match="cannot build"):
        build([KERNEL], tmp_path / "file" / "folder", CodegenOptions())


def test_a_full_process_table_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, refused = subprocess.run, []

    def sometimes(command: list[str], **more: Any) -> Any:
        if "-shared" in command and len(refused) < 2:
            refused.append(command)
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return run(command, **more)

    monkeypatch.setattr(build_module.subprocess, "run", sometimes)
    monkeypatch.setattr(build_module, "_PAUSES_S", (0.0, 0.0))
    assert (tmp_path / build([KERNEL], tmp_path, CodegenOptions())).exists()
    assert len(refused) == 2
