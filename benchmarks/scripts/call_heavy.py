"""Runs one of pyperformance's pure-Python programs, copied beside this script, and times it.

call_heavy.py richards|deltablue ROUNDS
"""

import importlib
import json
import sys
import time
import types

sys.modules["pyperf"] = types.ModuleType("pyperf")  # the copies import it, and use it in main only

name, rounds = sys.argv[1], int(sys.argv[2])
module = importlib.import_module(f"{name}_program")
if name == "richards":
    richards = module.Richards()
    work = lambda: richards.run(1)  # noqa: E731
else:
    work = lambda: module.delta_blue(300)  # noqa: E731

work()
seconds = []
for _ in range(rounds):
    start = time.process_time()
    work()
    seconds.append(time.process_time() - start)
print(json.dumps({"seconds": seconds}))
