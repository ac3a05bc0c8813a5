"""Architectures with tiny random weights: what accel compiles of each, and whether it is right.

    python benchmarks/architectures.py [--write] [name ...]

In: names of rows (all without one): `ARCHITECTURES` of `transformers`, `GENERATE` with its
generate(), and the models of `handwritten.py`. Out: a table on stdout, and with `--write`
`ARCHITECTURES.md` and `results/architectures.json`. Exit code 1 when a result differs from eager's.
Invariant: every call gets fresh inputs, and its result (and gradients) are compared with those of
the same call with accel switched off.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from handwritten import HANDWRITTEN

import accel
from accel import driver, runtime

WARM_CALLS = 4  # calls before those that count: recordings and compilations
CALLS = 4  # that count
TOLERANCE = 1e-4

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {**_SIZES, "vocab_size": 96, "intermediate_size": 64, "max_position_embeddings": 64}
_LLAMA = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_IMAGE = {**_SIZES, "intermediate_size": 64, "image_size": 16, "patch_size": 8}
_SPEECH = {
    **_SIZES, "intermediate_size": 64, "vocab_size": 32, "conv_dim": (16, 16), "conv_stride": (5, 2),
    "conv_kernel": (10, 3), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0, "layerdrop": 0.0,
}  # fmt: skip
_SEQ2SEQ = {
    "vocab_size": 96, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
_T5 = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}


def text() -> dict[str, Any]:
    ids = torch.randint(3, 90, (2, 7))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def pair() -> dict[str, Any]:
    return {**text(), "decoder_input_ids": torch.randint(3, 90, (2, 5))}


def image() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def big_image() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def sound() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 400)}


def whisper() -> dict[str, Any]:
    return {
        "input_features": torch.randn(2, 8, 32),
        "decoder_input_ids": torch.randint(3, 90, (2, 5)),
    }


Inputs = Callable[[], dict[str, Any]]
# name -> (stem of the Config and Model classes, suffix of the model class, configuration, inputs)
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any], Inputs]] = {
    "bert": ("Bert", "Model", _TEXT, text),
    "roberta": ("Roberta", "Model", {**_TEXT, "pad_token_id": 1}, text),
    "distilbert": (
        "DistilBert", "Model",
        {"vocab_size": 96, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}, text,
    ),
    "electra": ("Electra", "Model", {**_TEXT, "embedding_size": 32}, text),
    "albert": ("Albert", "Model", {**_TEXT, "embedding_size": 16}, text),
    "deberta-v2": ("DebertaV2", "Model", {**_TEXT, "relative_attention": True}, text),
    "mpnet": ("MPNet", "Model", _TEXT, text),
    "gpt2": (
        "GPT2", "LMHeadModel",
        {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, text,
    ),
    "gpt-neox": ("GPTNeoX", "ForCausalLM", _TEXT, text),
    "opt": (
        "OPT", "ForCausalLM",
        {**_SIZES, "vocab_size": 96, "ffn_dim": 64, "word_embed_proj_dim": 32,
         "max_position_embeddings": 64}, text,
    ),
    "bloom": ("Bloom", "ForCausalLM", {"vocab_size": 96, "hidden_size": 32, "n_layer": 2,
              "n_head": 4}, text),
    "llama": ("Llama", "ForCausalLM", _LLAMA, text),
    "mistral": ("Mistral", "ForCausalLM", {**_LLAMA, "sliding_window": 4}, text),
    "qwen2": ("Qwen2", "ForCausalLM", _LLAMA, text),
    "qwen3": ("Qwen3", "ForCausalLM", _LLAMA, text),
    "gemma2": ("Gemma2", "ForCausalLM", _LLAMA, text),
    "phi": ("Phi", "ForCausalLM", _TEXT, text),
    "mixtral": ("Mixtral", "ForCausalLM", {**_LLAMA, "num_local_experts": 4}, text),
    "qwen3-moe": ("Qwen3Moe", "ForCausalLM", {**_LLAMA, **_EXPERTS}, text),
    "olmoe": ("Olmoe", "ForCausalLM", {**_LLAMA, **_EXPERTS}, text),
    "mamba": ("Mamba", "ForCausalLM", {"vocab_size": 96, "hidden_size": 32, "state_size": 8,
              "num_hidden_layers": 2}, text),
    "mamba2": ("Mamba2", "ForCausalLM", {"vocab_size": 96, "hidden_size": 32, "state_size": 8,
               "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "n_groups": 1,
               "chunk_size": 4}, text),
    "t5": ("T5", "ForConditionalGeneration", _T5, pair),
    "bart": ("Bart", "ForConditionalGeneration", _SEQ2SEQ, pair),
    "marian": ("Marian", "MTModel", _SEQ2SEQ, pair),
    "whisper": (
        "Whisper", "ForConditionalGeneration",
        {**_SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16},
        whisper,
    ),
    "wav2vec2": ("Wav2Vec2", "Model", _SPEECH, sound),
    "hubert": ("Hubert", "Model", _SPEECH, sound),
    "vit": ("ViT", "Model", _IMAGE, image),
    "deit": ("DeiT", "Model", _IMAGE, image),
    "dinov2": ("Dinov2", "Model", _IMAGE, image),
    "convnext": ("ConvNext", "Model", {"hidden_sizes": [8, 16], "depths": [1, 1],
                 "num_stages": 2}, big_image),
    "segformer": ("Segformer", "Model", {"hidden_sizes": [8, 16], "depths": [1, 1],
                  "num_encoder_blocks": 2, "num_attention_heads": [1, 2], "sr_ratios": [2, 1],
                  "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}, big_image),
}  # fmt: skip


# The models of which generate() is called, with the sort of inputs.
GENERATE = (
    "gpt2 gpt-neox opt llama mistral qwen2 gemma2 phi t5 bart mixtral".split()  # eleven
)


@dataclass
class Row:
    """What was seen of one architecture; counts are those of the last `CALLS` calls, but for
    `graphs`, `breaks` and `reasons`, which are of all."""

    name: str
    mode: str
    compiled: int
    eager: int
    graphs: int
    breaks: int
    share: float  # of the torch operations of roots: percent that ran compiled
    wrong: int
    reasons: list[str]

    @property
    def is_whole(self) -> bool:
        return not self.breaks and self.share > 99.0

    def line(self) -> str:
        verdict = f"{self.wrong} WRONG" if self.wrong else "equal"
        return (
            f"| {self.name} | {self.mode} | {self.compiled} | {self.eager} | {self.graphs} "
            f"| {self.breaks} | {self.share:.1f} | {verdict} | {'; '.join(self.reasons)[:160]} |"
        )


def provide_torchvision_schema() -> None:
    """Operators that transformers and torchvision ask for by name, also where torchvision's library,
    which has them, cannot be loaded."""
    try:
        torch.ops.torchvision.nms  # noqa: B018
    except AttributeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        globals()["_TORCHVISION"] = library  # an operator lives as long as its library


def build(name: str) -> torch.nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    stem, suffix, settings, _ = ARCHITECTURES[name]
    config = getattr(transformers, f"{stem}Config")(**settings)
    model: torch.nn.Module = getattr(transformers, f"{stem}{suffix}")(config)
    return model.eval()


Call = Callable[[torch.nn.Module], Any]


def forward(inputs: Inputs) -> Call:
    def call(model: torch.nn.Module) -> Any:
        given = inputs()
        with torch.no_grad():
            return model(**given)

    return call


def generated(inputs: Inputs) -> Call:
    def call(model: torch.nn.Module) -> Any:
        given = {k: v for k, v in inputs().items() if not k.startswith("decoder")}
        return model.generate(  # type: ignore[operator]
            **given, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0
        )

    return call


def by_hand(mode: str, inputs: Callable[[], tuple[Any, ...]]) -> Call:
    def call(model: torch.nn.Module) -> Any:
        given = inputs()
        if mode == "generate":
            return model.generate(*given)  # type: ignore[operator]
        if mode == "forward":
            with torch.no_grad():
                return model(*given)
        results = tensors(model(*given))
        sum((t.sum() if t.dim() else t) for t in results if t.requires_grad).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return [*results, *gradients]

    return call


def rows() -> dict[str, tuple[str, Callable[[], torch.nn.Module], Call]]:
    """name -> (mode, what makes the model, one call of it)."""
    found: dict[str, tuple[str, Callable[[], torch.nn.Module], Call]] = {}
    for name, row in ARCHITECTURES.items():
        found[name] = ("forward", lambda name=name: build(name), forward(row[3]))
    for name in GENERATE:
        inputs = ARCHITECTURES[name][3]
        found[f"{name}, generate()"] = (
            "generate", lambda name=name: build(name), generated(inputs)
        )  # fmt: skip
    for name, model in HANDWRITTEN.items():
        made = model.make if model.mode == "train" else lambda model=model: model.make().eval()
        found[name] = (model.mode, made, by_hand(model.mode, model.inputs))
    return found


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [t for part in value for t in tensors(part)]
    if hasattr(value, "__dict__") and not isinstance(value, type):  # caches
        return [t for part in vars(value).values() for t in tensors(part)]
    return []


def differs(a: Any, b: Any) -> bool:
    left, right = tensors(a), tensors(b)
    return len(left) != len(right) or any(
        x.shape != y.shape
        or x.dtype != y.dtype
        or not torch.allclose(x, y, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
        for x, y in zip(left, right, strict=True)
    )


def outcomes(make: Callable[[], torch.nn.Module], call: Call, optimized: bool) -> list[Any]:
    """The results of all calls; the counters before those that count come first."""
    torch.manual_seed(0)
    model = make()
    before: dict[str, Any] = {}
    results = []
    if optimized:
        accel.optimize(model)
    for k in range(WARM_CALLS + CALLS):
        if k == WARM_CALLS:
            before = accel.counters()
        torch.manual_seed(1000 + k)
        results.append(call(model))
        accel.wait(120)
    return [before, *results]


def measure(name: str) -> Row:
    mode, make, call = rows()[name]
    was = runtime.native.set_enabled(False)
    try:
        _, *expected = outcomes(make, call, False)
    finally:
        runtime.native.set_enabled(was)
    accel.reset()
    before, *got = outcomes(make, call, True)
    after = accel.counters()
    now = {k: v - before[k] for k, v in after.items() if type(v) is int}
    ran = now["ops_compiled"] + now["ops_eager"]
    roots = driver.current.roots if driver.current else []
    return Row(
        name,
        mode,
        now["calls_compiled"],
        now["calls_eager"],
        after["segments"],
        after["graph_breaks"],
        100 * now["ops_compiled"] / ran if ran else 0.0,
        sum(differs(a, b) for a, b in zip(got, expected, strict=True)),
        sorted({r.reason for r in roots if r.reason and r.recordings}),
    )


HEADING = (
    "| model | call | compiled | eager | graphs | breaks | ops % | result | reasons |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)
PAGE = """# Architectures

Command: `python benchmarks/architectures.py --write`. torch {torch}, transformers {transformers}.

Each model has a tiny random configuration and is given to `accel.optimize`. {warm} calls with fresh
inputs come first, then {calls} that count: calls that ran compiled and calls that ran eagerly, and the
share of the torch operations in them that compiled code did. Graphs and breaks are those of all calls.
Results (and gradients) are compared with those of the same calls with accel switched off, within
{tolerance}. `generate()` runs as Python, each of its steps is a call of the model.

{whole} of {count} rows have no break and more than 99% of their operations compiled.

{table}
"""


def write(found: list[Row]) -> None:
    import transformers

    folder = Path(__file__).parent
    data = {"warm_calls": WARM_CALLS, "calls": CALLS, "rows": [asdict(row) for row in found]}
    (folder / "results" / "architectures.json").write_text(json.dumps(data, indent=1) + "\n")
    page = PAGE.format(
        torch=torch.__version__,
        transformers=transformers.__version__,
        warm=WARM_CALLS,
        calls=CALLS,
        tolerance=TOLERANCE,
        whole=sum(row.is_whole for row in found),
        count=len(found),
        table="\n".join([HEADING, *(row.line() for row in found)]),
    )
    (folder / "ARCHITECTURES.md").write_text(page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(1)
    provide_torchvision_schema()
    print(HEADING)
    found = []
    for name in options.names or rows():
        found.append(measure(name))
        print(found[-1].line(), flush=True)
    if options.write:
        write(found)
    return int(any(row.wrong for row in found))


if __name__ == "__main__":
    sys.exit(main())
