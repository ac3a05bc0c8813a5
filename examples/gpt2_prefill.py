"""GPT-2 reading prompts (prefill): logits for every position, and a key-value cache.

Tokens are the prompts' bytes, so no tokenizer has to be downloaded.
"""

from __future__ import annotations

import pathlib
import time

import torch
from reporting import parse_arguments, report
from transformers import GPT2Config, GPT2LMHeadModel

CORPUS = pathlib.Path(__file__).with_name("corpus.txt")
LENGTH = 64
BATCH = 2


def main() -> None:
    arguments = parse_arguments(__doc__)
    config = GPT2Config()
    if arguments.tiny:
        config = GPT2Config(
            n_embd=64, n_layer=2, n_head=4, vocab_size=256, bos_token_id=None, eos_token_id=None
        )
    model = GPT2LMHeadModel(config).eval()

    text = CORPUS.read_bytes()
    tokens = torch.tensor(list(text[: len(text) // (LENGTH * BATCH) * LENGTH * BATCH]))
    prompts = tokens.view(-1, BATCH, LENGTH)

    outputs: dict[int, list[torch.Tensor]] = {}
    seconds = []
    with torch.inference_mode():
        for step in range(arguments.steps):
            index = step % len(prompts)
            start = time.perf_counter()
            result = model(prompts[index], use_cache=True)
            seconds.append(time.perf_counter() - start)
            first_layer = result.past_key_values.layers[0]
            outputs[index] = [result.logits[:, -1], first_layer.keys, first_layer.values]
    flat = [tensor for index in sorted(outputs) for tensor in outputs[index]]
    report("gpt2_prefill", flat, seconds, arguments)


if __name__ == "__main__":
    main()
