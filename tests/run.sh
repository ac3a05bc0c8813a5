#!/usr/bin/env bash
# Sets up a virtual environment (see setup.sh) and runs the tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/setup.sh
exec "$ACCEL_VENV/bin/python" -m pytest "$@"
