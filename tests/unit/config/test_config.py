"""Settings: precedence, origins, errors that name what is wrong, and the generated page."""

from __future__ import annotations

from pathlib import Path

import pytest

from accel import config
from accel.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]


def write(directory: Path, name: str, text: str) -> Path:
    path = directory / name
    path.write_text(text)
    return path


def test_the_page_of_settings_is_current() -> None:
    assert (ROOT / "docs" / "switches.md").read_text() == config.markdown()


def test_flags_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "accel.toml", "threshold = 3\nmax_variants = 4\nsync = true\n")
    loaded = config.load_all(
        tmp_path, {"threshold": 9}, {"ACCEL_THRESHOLD": "7", "ACCEL_MAX_VARIANTS": "5"}
    )
    assert (loaded.config.threshold, loaded.config.max_variants, loaded.config.sync) == (9, 5, True)
    assert loaded.origins["threshold"] == "--threshold"
    assert loaded.origins["max_variants"] == "ACCEL_MAX_VARIANTS"
    assert loaded.origins["sync"] == f"{path}:3"
    assert loaded.origins["verify"] == "default"


def test_pyproject_above_the_script(tmp_path: Path) -> None:
    write(tmp_path, "pyproject.toml", '[project]\nname = "x"\n\n[tool.accel]\ndeny = ["a.b"]\n')
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    loaded = config.load_all(below, {}, {})
    assert loaded.config.deny == ("a.b",)
    assert loaded.origins["deny"].endswith("pyproject.toml:5")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("\nthresold = 3\n", ["accel.toml:2", "'thresold'", "did you mean 'threshold'"]),
        ('threshold = "3"\n', ["accel.toml:1", "'threshold'", "must be an integer", "'3'"]),
        ("threshold = true\n", ["an integer", "True"]),
        ("threshold = 0\n", ["at least 1"]),
        ("packages = 'a'\n", ["a list of strings"]),
        ("packages = [1]\n", ["a list of strings"]),
        ("log = ['gard']\n", ["'gard'", "did you mean"]),
        ("threshold = \n", ["accel.toml", "line 1"]),
    ],
)
def test_errors_say_what_and_where(tmp_path: Path, text: str, parts: list[str]) -> None:
    write(tmp_path, "accel.toml", text)
    with pytest.raises(ConfigError) as caught:
        config.load_all(tmp_path, {}, {})
    for part in parts:
        assert part in str(caught.value)


def test_errors_in_the_environment(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ACCEL_THRESHOLD must be an integer, not 'x'"):
        config.load_all(tmp_path, {}, {"ACCEL_THRESHOLD": "x"})
    loaded = config.load_all(tmp_path, {}, {"ACCEL_BACKND": "eager"})
    assert loaded.remarks == ("ACCEL_BACKND is no setting; did you mean ACCEL_BACKEND?",)


def test_a_broken_pyproject_of_somebody_else_is_not_ours_to_report(tmp_path: Path) -> None:
    write(tmp_path, "pyproject.toml", "[tool.other\naccel\n")
    assert config.find_file(tmp_path) != tmp_path / "pyproject.toml"


def test_every_setting_has_a_flag_a_variable_and_a_text() -> None:
    rows = config.settings()
    assert len({row.flag for row in rows.values()}) == len(rows)
    assert all(row.text and row.variable.startswith("ACCEL_") for row in rows.values())


@pytest.mark.parametrize("key", list(config.settings()))
def test_every_setting_can_be_given_as_text(key: str, tmp_path: Path) -> None:
    setting = config.settings()[key]
    texts = {"strings": "guards,trace", "integer": "3", "string": "default"}
    text = texts.get(setting.kind, "1")
    loaded = config.load_all(tmp_path, {}, {setting.variable: text})
    wanted = {"strings": ("guards", "trace"), "integer": 3, "string": "default"}
    assert getattr(loaded.config, key) == wanted.get(setting.kind, True)
