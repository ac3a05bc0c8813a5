"""Every program, run plainly and optimized, must behave the same."""

from __future__ import annotations

import dataclasses
import importlib
import pathlib

import pytest
from harness import ANY, AccelRecording, Eager, Program, check

TABLES = sorted(path.stem for path in pathlib.Path(__file__).parent.glob("programs_*.py"))
PROGRAMS = [
    pytest.param(program, id=f"{table.removeprefix('programs_')}: {program.name}")
    for table in TABLES
    for program in importlib.import_module(table).PROGRAMS
]


def test_there_are_enough_programs_and_no_two_of_one_name() -> None:
    names = [parameters.id for parameters in PROGRAMS]
    assert len(names) == len(set(names)) >= 60


@pytest.mark.parametrize("program", PROGRAMS)
def test_program_is_deterministic(program: Program) -> None:
    """Two plain runs agree; otherwise the program could not show anything."""
    check(dataclasses.replace(program, expect=ANY), Eager())


@pytest.mark.parametrize("program", PROGRAMS)
def test_recording_changes_nothing(program: Program) -> None:
    """Each call is a recording, which must be the eager run."""
    check(dataclasses.replace(program, expect=ANY), AccelRecording())


@pytest.mark.parametrize("program", PROGRAMS)
def test_program(program: Program) -> None:
    check(program)
