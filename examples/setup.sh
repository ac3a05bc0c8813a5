#!/usr/bin/env bash
# Makes a virtual environment ($ACCEL_VENV, default .venv) with torch and accel in it, and builds
# accel's native module. Sourced by quickstart.sh and tests/run.sh; does nothing where that is done
# already, and builds again when the native sources have changed.
set -euo pipefail
ACCEL_VENV="${ACCEL_VENV:-$PWD/.venv}"
export ACCEL_VENV
if [ ! -x "$ACCEL_VENV/bin/python" ]; then
  "${PYTHON:-python3.11}" -m venv "$ACCEL_VENV"
fi
_sources="$(cat native/*.cpp native/*.h native/*.py pyproject.toml | sha256sum | cut -d ' ' -f 1) $PWD"
_stamp="$ACCEL_VENV/.accel_sources"
if [ "$(cat "$_stamp" 2>/dev/null)" != "$_sources" ] ||
  ! "$ACCEL_VENV/bin/python" -c "import accel.runtime as r, pytest, transformers; assert r.available" 2>/dev/null; then
  "$ACCEL_VENV/bin/python" -m pip install -q --upgrade pip
  # torch first, by exact version: a bare "torch" would bring gigabytes of CUDA packages.
  "$ACCEL_VENV/bin/python" -m pip install -q "torch==${ACCEL_TORCH:-2.13.0}" "setuptools>=77" pybind11 ninja wheel
  "$ACCEL_VENV/bin/python" -m pip install -q --no-build-isolation -e ".[dev]"
  # The kernels' compiler for GPUs; a torch with CUDA has brought its own.
  "$ACCEL_VENV/bin/python" -c "import triton" 2>/dev/null ||
    "$ACCEL_VENV/bin/python" -m pip install -q --no-deps "triton==3.6.*" ||
    echo "triton cannot be installed here: what needs it is skipped" >&2
  # Models that tests take from timm, in a folder of their own: where transformers finds a torchvision,
  # it imports it, and this one cannot load its library beside a torch without CUDA.
  "$ACCEL_VENV/bin/python" -m pip install -q --no-deps --target "$ACCEL_VENV/vision" timm torchvision pillow ||
    echo "timm cannot be installed here: tests of its models are skipped" >&2
  echo "$_sources" > "$_stamp"
fi
