"""Import rules that import-linter cannot see, because the native module is no Python file."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "accel"


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def test_runtime_is_the_only_importer_of_the_native_module() -> None:
    # Path.rglob does not follow the links to rewriter/ and codegen/.
    folders = [PACKAGE, PACKAGE / "rewriter", PACKAGE / "codegen"]
    files = {path for folder in folders for path in folder.glob("**/*.py")}
    assert len(files) > 50
    importers = {
        path.name
        for path in files
        if any(name.startswith("accel._native") for name in imported(path))
    }
    assert importers == {"runtime.py"}
