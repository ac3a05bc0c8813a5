#!/usr/bin/env bash
# Sets everything up and runs the main job: an ordinary script, made faster by accel.
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/setup.sh
"$ACCEL_VENV/bin/python" -m accel doctor
echo "--- python examples/bert_base.py"
"$ACCEL_VENV/bin/python" examples/bert_base.py "$@"
echo "--- python -m accel run examples/bert_base.py"
"$ACCEL_VENV/bin/python" -m accel run examples/bert_base.py "$@"
