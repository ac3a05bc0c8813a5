"""What the first call costs over an eager one when it is captured for the `eager` backend, under
accel and under Dynamo, in one process; prints JSON.

capture_from_cold.py bert|llama|t5 THREADS

accel comes first: Dynamo leaves nn.Module.__init__ patched, and what it keeps there of the modules
that Llama's forward makes is an exit to accel.
"""

import json
import statistics
import sys
import time

import torch
import torch._dynamo  # its import is no part of a capture
import transformers as t

import accel

EAGER_CALLS = 5
name, threads = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
torch.set_num_threads(threads)
tokens = torch.arange(64)[None]


def bert():
    model = t.BertModel(t.BertConfig())
    return model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def llama():
    config = t.LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=16, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=4000,
    )  # fmt: skip
    return t.LlamaForCausalLM(config), {"input_ids": tokens}


def t5():
    model = t.T5ForConditionalGeneration(t.T5Config())
    return model, {"input_ids": tokens, "decoder_input_ids": tokens[:, :32]}


def seconds(call, inputs):
    start = time.perf_counter()
    call(**inputs)
    return time.perf_counter() - start


def added(who):
    """Each has a model of its own, which is warm: threads, memory, libraries."""
    model, inputs = globals()[name]()
    model.eval()
    with accel.set_stance("force_eager"):
        eager = statistics.median(seconds(model, inputs) for _ in range(EAGER_CALLS))
    with accel.set_stance("default" if who == "accel" else "force_eager"):
        return seconds(captures[who](model), inputs) - eager


captures = {
    "accel": lambda model: accel.optimize(model, backend="eager"),
    "dynamo": lambda model: torch.compile(model, backend="eager"),
}
found = {}
with torch.no_grad():
    for who in captures:
        found[who] = added(who)
counts = accel.counters()
found["whole"] = counts["segments"] == 1 and not counts["graph_breaks"]
print(json.dumps(found))
