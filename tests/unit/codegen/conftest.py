import os
import sys
import zlib
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)

# Triton's interpreter and compiler are slow: of these files', or tests', cases, one in so many runs.
_SAMPLED = {
    "test_triton_kernels.py": 9,
    "test_triton_build.py": 12,
    "test_elementwise_rows_compile": 40,
}
_WHOLE = os.environ.get("ACCEL_TRITON_TESTS") == "full"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen, left = [], []
    for item in items:
        file, test = item.path.name, item.name.split("[", 1)[0]
        one_in = _SAMPLED.get(test, _SAMPLED.get(file, 1))
        # Cases without parameters always run; whoever names a case gets it.
        sampled = one_in > 1 and "[" in item.name and not _WHOLE and not config.option.keyword
        (left if sampled and zlib.crc32(item.name.encode()) % one_in else chosen).append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = chosen
