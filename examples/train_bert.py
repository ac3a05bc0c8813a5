"""BERT fine-tuned to classify sentences (made up of token ids): AdamW, linear warm-up and decay."""

from __future__ import annotations

import time

import torch
from reporting import parse_arguments, report
from transformers import BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup


def main() -> None:
    arguments = parse_arguments(__doc__)
    options = {"num_hidden_layers": 4, "hidden_size": 768, "intermediate_size": 3072}
    if arguments.tiny:
        options = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}
        options["num_attention_heads"] = 4
    config = BertConfig(vocab_size=1000, num_labels=2, **options)
    model = BertForSequenceClassification(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5 if not arguments.tiny else 1e-3)
    schedule = get_linear_schedule_with_warmup(optimizer, 10, max(arguments.steps, 11))
    length, batch = (16, 4) if arguments.tiny else (64, 4)
    sentences = torch.randint(5, 1000, (64, length))
    labels = (sentences[:, 1] % 2).long()

    losses, seconds = [], []
    for _ in range(arguments.steps):
        chosen = torch.randint(0, len(sentences), (batch,))
        start = time.perf_counter()
        loss = model(input_ids=sentences[chosen], labels=labels[chosen]).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.detach())
    weights = [p.detach() for p in model.parameters()]
    report("train_bert", [torch.stack(losses), *weights], seconds, arguments)


if __name__ == "__main__":
    main()
