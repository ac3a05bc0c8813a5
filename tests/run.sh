#!/usr/bin/env bash
# Sets up a virtual environment (see setup.sh) and runs the tests; arguments go to pytest.
# Without arguments, two processes share them: differential programs, here and on a simulated GPU, take
# as long as the rest.
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/setup.sh
if [ $# -gt 0 ]; then
  exec "$ACCEL_VENV/bin/python" -m pytest "$@"
fi
log="$(mktemp)"
trap 'rm -f "$log"' EXIT
"$ACCEL_VENV/bin/python" -m pytest --durations=15 tests/differential tests/simulated_gpu > "$log" 2>&1 &
differential=$!
rest=0
"$ACCEL_VENV/bin/python" -m pytest --durations=30 --ignore=tests/differential --ignore=tests/simulated_gpu || rest=$?
echo "The differential programs:"
programs=0
wait "$differential" || programs=$?
cat "$log"
exit $((rest > programs ? rest : programs))
