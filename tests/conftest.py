"""Settings for the whole test run: one torch thread, and a cache directory of its own."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests must neither read nor fill the user's cache. Worker processes inherit this.
os.environ.setdefault("ACCEL_CACHE_DIR", tempfile.mkdtemp(prefix="accel-test-cache-"))

# A run started in the background of a shell inherits an ignored SIGINT; tests send themselves one.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

try:
    import torch
except ImportError:  # the rewriter's tests run on interpreters without torch
    pass
else:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list) -> None:  # type: ignore[type-arg]
    """Marks what tests/known_failures.py lists."""
    import pytest
    from known_failures import KNOWN_FAILURES

    for item in items:
        for part, reason in KNOWN_FAILURES:
            if part in item.nodeid:
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
