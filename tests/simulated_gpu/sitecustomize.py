"""In worker processes that start by themselves."""

import os

if os.environ.get("SIMULATED_GPU"):
    import simulated_gpu

    simulated_gpu.keep_texts()
    simulated_gpu.load()
