"""Vision models of timm: what accel compiles of each, whether it is right, and how fast.

    pip install --no-deps --target FOLDER timm torchvision pillow
    PYTHONPATH=FOLDER python benchmarks/vision.py [--batch N] [--threads N] [--train] [--write] [name ...]

In: names of timm's models (one small model of each family without one). Out: a table on stdout, and
with `--write` `VISION.md` and `results/vision.json`. Exit code 1 when a model fails, or its error is
more than eager's. Weights are random, and so are the statistics of batch norms. Invariant: each model
runs in a process of its own, eager and accel by turns in it; errors are of a float64 run of the model.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import torch

import accel

FOLDER = Path(__file__).parent
SECONDS, ROUNDS = 5.0, 40
LIMIT_S = 300
WARM_CALLS = 5
# Beyond this the model's output is sensitive, and the comparison says nothing of kernels.
SENSITIVE = 1e-4
# Sizes of a family are one program; these are their small ones.
FAMILIES = """
flexivit_small mobileone_s1 beit_base_patch16_224 eca_botnext26ts_256 poolformerv2_s12 cait_xxs24_224
coat_tiny coatnet_pico_rw_224 convit_tiny convmixer_768_32 convnext_atto_rms cpubone_nano
crossvit_tiny_240 cs3darknet_focus_s csatv2 cspnext_tiny davit_tiny deit_tiny_patch16_224 densenet121
dla46x_c nf_regnet_b0 dpn48b ese_vovnet19b_slim_dw resnet18 edgenext_xx_small efficientformer_l1
efficientformerv2_s0 mnasnet_050 efficientvim_m1 efficientvit_b0 efficientvit_m0
eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 mobilenetv3_small_050 focalnet_tiny_srf gcvit_xxtiny
ghostnet_050 gmlp_ti16_224 hardcorenas_b hgnetv2_b0 hiera_tiny_224 hrnet_w18_small iformer_t
inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small legacy_seresnet18
legacy_xception levit_384_s8 lowformer_b0 mambaout_femto mobilevit_xxs mvitv2_tiny
nasnetalarge nest_tiny nextvit_small pit_ti_224 pnasnet5large pvt_v2_b0 rdnet_tiny regnetx_002
repghostnet_050 repvit_m1 res2net50_14w_8s resnest14d resnetv2_18 rexnet_100 selecsls42 sequencer2d_s
shvit_s1 skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window8_256
swinv2_cr_tiny_224 vit_srelpos_small_patch16_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m
twins_svt_small vgg11 visformer_tiny vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224 xception41p
xcit_nano_12_p8_224
""".split()

Result = dict[str, Any]


def build(name: str, batch: int, size: int = 0) -> tuple[torch.nn.Module, torch.Tensor]:
    """The model, and images of the size that it wants (`size` for models that take any)."""
    architectures.provide_torchvision_schema()
    import timm

    torch.manual_seed(0)
    model: torch.nn.Module = timm.create_model(name)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    channels, height, width = model.pretrained_cfg.get("input_size", (3, 224, 224))
    return model, torch.randn(batch, channels, size or height, size or width)


def tensors_of(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in tensors_of(v)] if isinstance(value, (list, tuple)) else []


def runner(model: torch.nn.Module, call: Any, train: bool) -> Callable[..., list[torch.Tensor]]:
    """A forward; in training a forward and a backward, whose results are the gradients."""

    def forward(x: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            return tensors_of(call(x))

    def step(x: torch.Tensor) -> list[torch.Tensor]:
        for parameter in model.parameters():
            parameter.grad = None
        loss = sum(t.float().square().mean() for t in tensors_of(call(x)))
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        return [loss.detach(), *grads]

    return step if train else forward


def error(got: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """The difference relative to all exact values."""
    pairs = list(zip(got, exact, strict=True))
    difference = sum(float((g.double() - e).square().sum()) for g, e in pairs)
    return float((difference / max(sum(float(e.square().sum()) for e in exact), 1e-300)) ** 0.5)


def measure(name: str, batch: int, train: bool, size: int = 0, seconds: float = SECONDS) -> Result:
    model, x = build(name, batch, size)
    model.train(train)
    with accel.disable():
        double = copy.deepcopy(model).double()
        exact = runner(double, double, train)(x.double())
        plain = copy.deepcopy(model)
        eager = runner(plain, plain, train)
        eager_error = error(eager(x), exact)
    ours = runner(model, accel.optimize(model), train)
    state = copy.deepcopy(model.state_dict())
    for _ in range(WARM_CALLS):
        ours(x)
        accel.wait()
    model.load_state_dict(state)
    before = accel.counters()
    got = ours(x)
    after = accel.counters()
    now = {k: after[k] - before[k] for k in after}
    ran = now["ops_compiled"] + now["ops_eager"]
    times: dict[str, list[float]] = {"eager": [], "accel": []}
    end = time.perf_counter() + seconds
    while len(times["eager"]) < 5 or (time.perf_counter() < end and len(times["eager"]) < ROUNDS):
        with accel.disable():
            times["eager"].append(_seconds(eager, x))
        times["accel"].append(_seconds(ours, x))
    return {
        "name": name,
        "error": error(got, exact),
        "eager_error": eager_error,
        "share": 100 * now["ops_compiled"] / ran if ran else 0.0,
        "calls_compiled": now["calls_compiled"],
        "breaks": after["graph_breaks"],
        "eager_ms": 1e3 * statistics.median(times["eager"]),
        "accel_ms": 1e3 * statistics.median(times["accel"]),
        "ratio": statistics.median(e / a for e, a in zip(*times.values(), strict=True)),
    }


def _seconds(call: Callable[..., Any], x: torch.Tensor) -> float:
    start = time.perf_counter()
    call(x)
    return time.perf_counter() - start


def is_right(row: Result) -> bool:
    """An output that small changes turn over (in training, at kinks) is as wrong in eager."""
    if row["eager_error"] > SENSITIVE:
        return bool(row["error"] < 1)
    return bool(row["error"] <= 3 * row["eager_error"])


def line(row: Result) -> str:
    return (
        f"| {row['name']} | {row['eager_ms']:.1f} | {row['accel_ms']:.1f} | {row['ratio']:.2f} "
        f"| {row['eager_error']:.1e} | {row['error']:.1e} | {row['breaks']} | {row['share']:.1f} |"
    )


HEADING = (
    "| model | eager ms | accel ms | x eager | eager's error | error | breaks | ops % |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)
PAGE = """# Vision models

Command: `python benchmarks/vision.py{arguments} --write`. torch {torch}, timm {timm}, {cpu}.

One small model of each of timm's families with random weights, in its own image size; nothing here was
tuned for any of them. Eager and accel by turns in one process, medians; errors relative to a float64 run.

Geometric mean {mean:.2f}, least {least:.2f} of eager's speed; {whole} of {count} without a break.

{table}
"""


def write(found: list[Result], arguments: str) -> None:
    import bench

    architectures.provide_torchvision_schema()
    import timm

    (FOLDER / "results" / "vision.json").write_text(json.dumps(found, indent=1) + "\n")
    ratios = [row["ratio"] for row in found]
    page = PAGE.format(
        arguments=arguments,
        torch=torch.__version__,
        timm=timm.__version__,
        cpu=bench.machine()["cpu"],
        mean=statistics.geometric_mean(ratios),
        least=min(ratios),
        whole=sum(row["breaks"] == 0 for row in found),
        count=len(found),
        table="\n".join([HEADING, *map(line, found)]),
    )
    (FOLDER / "VISION.md").write_text(page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help=argparse.SUPPRESS)
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    if options.child:
        warnings.simplefilter("ignore")
        torch.set_num_threads(options.threads)
        (name,) = options.names
        row = measure(name, options.batch, options.train, options.size, options.seconds)
        print(json.dumps(row))
        return 0
    settings = [f"--batch={options.batch}", f"--threads={options.threads}"]
    settings += ["--train"] if options.train else []
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    found, failed = [], []
    print(HEADING)
    for name in options.names or FAMILIES:
        command = [sys.executable, __file__, "--child", *settings, name]
        child = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT_S, env=environment, check=False
        )
        if child.returncode:
            failed.append(name)
            print(f"| {name} | failed: {child.stderr.strip().splitlines()[-1:]} |", flush=True)
            continue
        found.append(json.loads(child.stdout.splitlines()[-1]))
        print(line(found[-1]), flush=True)
        if not is_right(found[-1]):
            failed.append(name)
    if options.write:
        write(found, "".join(f" {s}" for s in settings))
    if failed:
        print(f"failed, or with more error than eager: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
