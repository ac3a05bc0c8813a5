"""Calls BERT-base in a loop from a cold start; prints the seconds of each call as JSON.

bert_from_cold.py eager|accel|torch.compile CALLS LIMIT_S THREADS
"""

import json
import sys
import time

how, most_calls, limit_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
if how == "accel":
    import accel  # where programs have it: beside the other imports

import torch  # noqa: E402
from transformers import BertConfig, BertModel  # noqa: E402

torch.manual_seed(0)
torch.set_num_threads(int(sys.argv[4]))
model = BertModel(BertConfig()).eval()
tokens, mask = torch.arange(128)[None], torch.ones(1, 128, dtype=torch.int64)
mask[:, 100:] = 0

served = lambda: 0  # noqa: E731
call = model
if how == "accel":
    call = accel.optimize(model)
    served = lambda: accel.counters()["calls_compiled"]  # noqa: E731
elif how == "torch.compile":
    call = torch.compile(model)

seconds: list[float] = []
served_after = None
calls_before = 0
with torch.no_grad():
    begin = time.perf_counter()
    while len(seconds) < most_calls and time.perf_counter() - begin < limit_s:
        start = time.perf_counter()
        call(tokens, attention_mask=mask)
        end = time.perf_counter()
        seconds.append(end - start)
        is_served = how == "torch.compile" or (how == "accel" and served() > 0)
        if served_after is None and is_served:
            calls_before = len(seconds) - 1
            # The call that was served began here (torch.compile's first ends with code).
            served_after = (end if how == "torch.compile" else start) - begin
print(
    json.dumps({"seconds": seconds, "served_after_s": served_after, "calls_before": calls_before})
)
