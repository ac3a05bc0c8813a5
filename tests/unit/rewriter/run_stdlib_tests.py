"""Runs stdlib test modules with every function of a stdlib module replaced by its twin.

    python run_stdlib_tests.py json,json.decoder test.test_textwrap ...
    arguments: modules to twin (commas), then unittest names

Prints one JSON line: outcomes by test, and the trampolines' counts.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import types
import unittest

sys.path.insert(0, os.path.dirname(__file__))


def twin_modules(names: list[str], trampolines) -> int:
    """Gives every function whose globals are one of these modules its twin's code."""
    from accel.rewriter import twin

    modules = {id(vars(importlib.import_module(name))) for name in names}
    done = 0
    for f in gc.get_objects():
        if type(f) is types.FunctionType and id(f.__globals__) in modules:
            if twin.is_twinnable(f.__code__):
                f.__code__ = twin.bind_twin(twin.build_twin(f.__code__), trampolines)
                done += 1
    return done


class Outcomes(unittest.TestResult):
    def __init__(self) -> None:
        super().__init__()
        self.by_test: dict[str, str] = {}
        self.texts: dict[str, str] = {}

    def addSuccess(self, test):
        self.by_test.setdefault(test.id(), "ok")

    def addSkip(self, test, reason):
        self.by_test[test.id()] = "skip"

    def _bad(self, test, err, kind):
        self.by_test[test.id()] = kind
        self.texts[test.id()] = self._exc_info_to_string(err, test)

    def addError(self, test, err):
        self._bad(test, err, "error")

    def addFailure(self, test, err):
        self._bad(test, err, "failure")

    def addSubTest(self, test, subtest, err):
        if err is not None:
            self._bad(test, err, "failure")


def main() -> None:
    modules, *tests = sys.argv[1:]
    suite = unittest.defaultTestLoader.loadTestsFromNames(tests)
    counts, twins = {}, 0
    if modules != "-":
        import plain_trampolines

        if os.environ.get("NATIVE_TRAMPOLINES"):
            import torch  # noqa: F401

            from accel import runtime

            trampolines = runtime.native.TRAMPOLINES
        else:
            trampolines = plain_trampolines.TRAMPOLINES
        counts = plain_trampolines.COUNTS
        twins = twin_modules(modules.split(","), trampolines)
    result = Outcomes()
    sys.stdout = open(os.devnull, "w")
    suite.run(result)
    sys.stdout = sys.__stdout__
    print(
        "RESULT "
        + json.dumps(
            {"twins": twins, "outcomes": result.by_test, "counts": counts, "texts": result.texts}
        )
    )


if __name__ == "__main__":
    main()
