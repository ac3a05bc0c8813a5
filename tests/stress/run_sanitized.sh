#!/usr/bin/env bash
# Builds the native module with AddressSanitizer and UndefinedBehaviorSanitizer in a copy of the
# sources, and runs the native unit tests and some differential programs with it.
# PYTHON names the interpreter (default: that of ACCEL_VENV, else python3).
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${PYTHON:-${ACCEL_VENV:+$ACCEL_VENV/bin/python}}"
python="${python:-python3}"
copy="$(mktemp -d)"
trap 'rm -rf "$copy"' EXIT
tar --exclude='*.so' --exclude=__pycache__ -cf - pyproject.toml README.md src rewriter codegen native tests \
  | tar -xf - -C "$copy"
cd "$copy"
ACCEL_SANITIZE=address,undefined PYTHONPATH=native \
  "$python" -c "from setuptools import setup; setup()" -q build_ext --inplace
# Leaks of the interpreter itself at exit are not ours; tests/stress measures ours.
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export OMP_NUM_THREADS=1 PYTHONPATH="$copy/src" PYTHONMALLOC=malloc ACCEL_CACHE_DIR="$copy/cache"
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so)" \
  "$python" -m pytest -q -p no:cacheprovider -W ignore tests/unit/native \
  tests/differential/test_programs.py -k "(native and not addresses_come_back and not flat_over_many_runs) or (test_program and leaks)" "$@"
