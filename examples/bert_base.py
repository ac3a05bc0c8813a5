"""BERT-base over padded batches of text: tokenizer, attention mask, random weights.

python examples/bert_base.py
python -m accel run examples/bert_base.py
"""

from __future__ import annotations

import collections
import pathlib
import re
import time

import torch
from reporting import parse_arguments, report
from tokenizers import BertWordPieceTokenizer
from transformers import BertConfig, BertModel

CORPUS = pathlib.Path(__file__).with_name("corpus.txt")
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LENGTH = 64
BATCH = 4


def build_vocabulary(lines: list[str], most_common: int = 150) -> dict[str, int]:
    """A WordPiece vocabulary: the frequent words, and every character, alone and continuing."""
    words = collections.Counter(re.findall(r"[a-z]+|[^\sa-z]", " ".join(lines).lower()))
    characters = sorted({character for word in words for character in word})
    frequent = sorted(word for word, _ in words.most_common(most_common))
    pieces = [*SPECIAL_TOKENS, *characters, *(f"##{c}" for c in characters), *frequent]
    return {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}


def build_batches(tokenizer: BertWordPieceTokenizer, lines: list[str]) -> list[dict]:
    """Padded batches of equal shape, as a data loader would hand them over."""
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    batches = []
    for start in range(0, len(lines), BATCH):
        encoded = tokenizer.encode_batch(lines[start : start + BATCH])
        batches.append(
            {
                "input_ids": torch.tensor([e.ids for e in encoded]),
                "attention_mask": torch.tensor([e.attention_mask for e in encoded]),
                "token_type_ids": torch.tensor([e.type_ids for e in encoded]),
            }
        )
    return batches


def main() -> None:
    arguments = parse_arguments(__doc__)
    lines = CORPUS.read_text().splitlines()
    tokenizer = BertWordPieceTokenizer(build_vocabulary(lines))
    batches = build_batches(tokenizer, lines)

    config = BertConfig()
    if arguments.tiny:
        config = BertConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
        )
    model = BertModel(config).eval()

    outputs: dict[int, torch.Tensor] = {}
    seconds = []
    with torch.no_grad():
        for step in range(arguments.steps):
            index = step % len(batches)
            start = time.perf_counter()
            result = model(**batches[index])
            seconds.append(time.perf_counter() - start)
            outputs[index] = result.last_hidden_state
    report("bert_base", [outputs[index] for index in sorted(outputs)], seconds, arguments)


if __name__ == "__main__":
    main()
