"""Small models of the transformers library: masks, caches, model outputs, other instances."""

from __future__ import annotations

import torch
from harness import ANY, Program, Session, program

PROGRAMS: list[Program] = []


def bert() -> torch.nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
    )
    return BertModel(config).eval()


@program(PROGRAMS, "BERT with a padding mask")
def _(s: Session) -> None:
    model = bert()
    f = s.root(model)
    mask = torch.ones(2, 7, dtype=torch.int64)
    padded = mask.clone()
    padded[1, 4:] = 0
    with torch.no_grad():
        s.warm(f, torch.randint(0, 100, (2, 7)), attention_mask=padded)
        s.hit(f, torch.randint(0, 100, (2, 7)), attention_mask=padded.flip(0))
        s.call(f, torch.randint(0, 100, (2, 7)), attention_mask=mask)
        s.call(f, torch.randint(0, 100, (2, 7)), attention_mask=padded)
        s.call(f, torch.randint(0, 100, (2, 5)))
        s.call(f, torch.randint(0, 100, (2, 7)), output_hidden_states=True)


@program(PROGRAMS, "two BERTs of one class")
def _(s: Session) -> None:
    first, second = s.root(bert()), s.root(bert())
    tokens = torch.randint(0, 100, (2, 7))
    with torch.inference_mode():
        s.warm(first, tokens)
        s.warm(second, tokens)
        s.call(first, tokens)


@program(PROGRAMS, "GPT-2 prefill with a cache")
def _(s: Session) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=100, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).eval()
    f = s.root(model)
    with torch.no_grad():
        s.warm(f, torch.randint(0, 100, (1, 6)), use_cache=False)
        s.warm(f, torch.randint(0, 100, (1, 6)), use_cache=True)


@program(PROGRAMS, "GPT-2 generation", expect=ANY)
def _(s: Session) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=100, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = s.root(GPT2LMHeadModel(config).eval())
    s.call(model.generate, torch.tensor([[1, 2, 3]]), max_new_tokens=6, do_sample=False)
    s.call(model.generate, torch.tensor([[1, 2, 3]]), max_new_tokens=6, do_sample=True)


@program(PROGRAMS, "Llama prefill", expect=ANY)
def _(s: Session) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    f = s.root(LlamaForCausalLM(config).eval())
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[0, :2] = 0
    with torch.no_grad():
        s.warm(f, torch.randint(0, 100, (2, 6)))
        s.warm(f, torch.randint(0, 100, (2, 6)), attention_mask=mask)


@program(PROGRAMS, "ViT classification")
def _(s: Session) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
        num_labels=5,
    )
    f = s.root(ViTForImageClassification(config).eval())
    with torch.no_grad():
        s.warm(f, pixel_values=torch.rand(1, 3, 16, 16))
        s.call(f, torch.rand(1, 3, 16, 16))
