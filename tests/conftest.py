"""Settings for the whole test run: one torch thread, and a cache directory of its own."""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests must neither read nor fill the user's cache. Worker processes inherit this.
os.environ.setdefault("ACCEL_CACHE_DIR", tempfile.mkdtemp(prefix="accel-test-cache-"))

try:
    import torch
except ImportError:  # the rewriter's tests run on interpreters without torch
    pass
else:
    torch.set_num_threads(1)
