"""A deep, narrow MLP, called at module level: no class and no function of its own."""

import time

import torch
from reporting import parse_arguments, report
from torch import nn

arguments = parse_arguments(__doc__)
depth = 4 if arguments.tiny else 50

layers = []
for _ in range(depth):
    layers += [nn.Linear(16, 16), nn.ReLU()]
model = nn.Sequential(*layers, nn.Linear(16, 4)).eval()
# Deep ReLU chains with torch's default weights die out; this keeps the signal alive.
for layer in model:
    if isinstance(layer, nn.Linear):
        nn.init.kaiming_normal_(layer.weight)

batches = torch.randn(4, 8, 16)
outputs = {}
seconds = []
with torch.no_grad():
    for step in range(arguments.steps):
        index = step % len(batches)
        start = time.perf_counter()
        out = model(batches[index])
        seconds.append(time.perf_counter() - start)
        outputs[index] = out

report("mlp_sequential", [outputs[index] for index in sorted(outputs)], seconds, arguments)
