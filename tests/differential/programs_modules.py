"""Programs about modules as objects: what `optimize` must leave untouched, and odd modules."""

from __future__ import annotations

import copy
import io
import pickle

import torch
from harness import ANY, Program, Session, program
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize

PROGRAMS: list[Program] = []


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("offset", torch.ones(3), persistent=False)

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return self.linear(x).relu() * scale + self.offset


def frozen(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)


@program(PROGRAMS, "class, attributes, state and representation are untouched")
def _(s: Session) -> None:
    model = frozen(Small())
    f = s.root(model)
    s.warm(f, torch.randn(2, 3))
    s.call(lambda: (f is model, type(f), repr(f), list(f.state_dict()), sorted(vars(f))))
    s.call(lambda: (f.forward.__qualname__, f.forward.__code__.co_varnames, isinstance(f, Small)))
    s.call(lambda: [name for name, _ in f.named_modules()])


@program(PROGRAMS, "pickle, deepcopy and save")
def _(s: Session) -> None:
    model = frozen(Small())
    f = s.root(model)
    x = torch.randn(2, 3)
    s.warm(f, x)

    def saved():
        buffer = io.BytesIO()
        torch.save(f, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)(x)

    s.call(lambda: pickle.loads(pickle.dumps(f))(x))
    s.call(saved)
    twin = copy.deepcopy(f)
    with torch.no_grad():
        twin.linear.weight.zero_()
    s.call(lambda: twin(x))
    s.call(lambda: twin(x))
    s.call(f, x)


@program(PROGRAMS, "keyword arguments of forward")
def _(s: Session) -> None:
    f = s.root(frozen(Small()))
    s.warm(f, torch.randn(2, 3))
    s.miss(f, torch.randn(2, 3), scale=2.0)
    s.call(f, x=torch.randn(2, 3))
    s.call(f, x=torch.randn(2, 3), scale=3.0)
    s.call(f, torch.randn(2, 3), wrong=1)
    s.call(f)


@program(PROGRAMS, "forward replaced on the instance")
def _(s: Session) -> None:
    model = frozen(Small())
    f, x = s.root(model), torch.randn(2, 3)
    s.warm(f, x)
    model.forward = lambda x: x * 100
    s.miss(f, x)
    del model.forward
    s.call(f, x)


@program(PROGRAMS, "forward called directly")
def _(s: Session) -> None:
    model = frozen(Small())
    f, x = s.root(model), torch.randn(2, 3)
    s.warm(f, x)
    s.call(f.forward, x)
    s.call(lambda: Small.forward(f, x))


@program(PROGRAMS, "__call__ overridden", expect=ANY)
def _(s: Session) -> None:
    class Calling(Small):
        def __call__(self, x):
            return super().__call__(x) + 1000

    f, x = s.root(frozen(Calling())), torch.randn(2, 3)
    s.warm(f, x)


@program(PROGRAMS, "hooks of every kind", expect=ANY)
def _(s: Session) -> None:
    model = frozen(Small())
    log = s.watch([])
    model.register_forward_pre_hook(lambda m, a: log.append("pre"))
    model.linear.register_forward_hook(lambda m, a, out: log.append(tuple(out.shape)))
    model.register_forward_hook(lambda m, a, k, out: out * 2, with_kwargs=True)
    f = s.root(model)
    s.warm(f, torch.randn(2, 3))
    s.call(f, torch.randn(2, 3), scale=2.0)


@program(PROGRAMS, "hook that captures features", expect=ANY)
def _(s: Session) -> None:
    model = frozen(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    features = s.watch({})

    def keep(module, args, out):
        features["relu"] = out

    model[1].register_forward_hook(keep)
    f = s.root(model)
    s.warm(f, torch.randn(2, 3))
    s.call(f, torch.randn(2, 3))


@program(PROGRAMS, "parametrization and weight norm", expect=ANY)
def _(s: Session) -> None:
    class Doubled(nn.Module):
        def forward(self, w):
            return w * 2

    model = nn.Linear(3, 3)
    parametrize.register_parametrization(model, "weight", Doubled())
    normed = parametrizations.weight_norm(nn.Linear(3, 3))
    f = s.root(frozen(nn.Sequential(model, normed)))
    s.warm(f, torch.randn(2, 3))
    with torch.no_grad():
        model.parametrizations.weight.original.zero_()
    s.call(f, torch.randn(2, 3))


@program(PROGRAMS, "functional call", expect=ANY)
def _(s: Session) -> None:
    model = frozen(Small())
    s.watch(model)

    def f(x, state):
        return functional_call(model, state, (x,))

    f = s.root(f)
    state = {"linear.weight": torch.ones(3, 3), "linear.bias": torch.zeros(3)}
    s.warm(f, torch.randn(2, 3), state)
    state["linear.weight"] = torch.zeros(3, 3)
    s.call(f, torch.randn(2, 3), state)


@program(PROGRAMS, "scripted and traced modules inside", expect=ANY)
def _(s: Session) -> None:
    model = frozen(Small())
    traced = torch.jit.trace(frozen(nn.Linear(3, 3)), torch.randn(2, 3))

    def f(x):
        return traced(model(x)) + 1

    f = s.root(f)
    s.warm(f, torch.randn(2, 3))


@program(PROGRAMS, "graph module as the root", expect=ANY)
def _(s: Session) -> None:
    f = s.root(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU()).eval()))
    with torch.no_grad():
        s.warm(f, torch.randn(2, 3))


@program(PROGRAMS, "custom operator", expect=ANY)
def _(s: Session) -> None:
    library = torch.library.Library("accel_test", "FRAGMENT")
    s.finally_(library._destroy)
    library.define("shout(Tensor x) -> Tensor")
    calls = s.watch([])

    def shout(x):
        calls.append(tuple(x.shape))
        return x * 3

    library.impl("shout", shout, "CPU")

    def f(x):
        return torch.ops.accel_test.shout(x + 1) * 2

    s.warm(s.root(f), torch.ones(3))


@program(PROGRAMS, "module in a dataclass and a closure")
def _(s: Session) -> None:
    layers = {"first": frozen(nn.Linear(3, 3)), "rest": [frozen(nn.Linear(3, 3)) for _ in range(2)]}

    def f(x):
        x = layers["first"](x)
        for layer in layers["rest"]:
            x = layer(x).relu()
        return x

    f, x = s.root(f), torch.randn(2, 3)
    s.warm(f, x)
    layers["rest"].append(frozen(nn.Linear(3, 3)))
    s.miss(f, x)
    layers["first"] = nn.Identity()
    s.miss(f, x)


@program(PROGRAMS, "module replaced by an equal one")
def _(s: Session) -> None:
    class Holder:
        pass

    holder = Holder()
    holder.model = frozen(Small())

    def f(x):
        return holder.model(x) + 1

    f, x = s.root(f), torch.randn(2, 3)
    s.warm(f, x)
    holder.model = frozen(Small())
    s.call(f, x)
    s.call(f, x)


@program(PROGRAMS, "conditional layers and early return")
def _(s: Session) -> None:
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = None
            self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Identity()])
            self.use_skip = True

        def forward(self, x, early=False):
            skip = x
            for layer in self.layers:
                x = layer(x)
                if early:
                    return x
            if self.down is not None:
                skip = self.down(skip)
            return x + skip if self.use_skip else x

    model = frozen(Net())
    f, x = s.root(model), torch.randn(2, 3)
    s.warm(f, x)
    s.miss(f, x, early=True)
    model.down = frozen(nn.Linear(3, 3))
    s.miss(f, x)
    model.use_skip = False
    s.miss(f, x)


@program(PROGRAMS, "lazy module", expect=ANY)
def _(s: Session) -> None:
    model = s.watch(nn.LazyLinear(2).eval())
    f = s.root(model)
    with torch.no_grad():
        for _ in range(4):
            s.call(f, torch.randn(2, 3))


@program(PROGRAMS, "root used by a plain caller in a loop")
def _(s: Session) -> None:
    model = frozen(Small())
    f = s.root(model)

    def epoch(n):
        return torch.stack([f(torch.full((2, 3), float(i))).sum() for i in range(n)])

    s.call(epoch, 4)
    s.call(epoch, 4)
    s.call(epoch, 4)


@program(PROGRAMS, "an optimizer step outside the root")
def _(s: Session) -> None:
    model = Small().eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    f, x = s.root(model), torch.randn(2, 3)
    with torch.no_grad():
        s.warm(f, x)
    for _ in range(2):
        loss = s.call(f, x).square().sum()
        s.call(lambda: loss.backward())
        s.call(optimizer.step)
        optimizer.zero_grad()
        with torch.no_grad():
            s.call(f, x)


@program(PROGRAMS, "backend is eager")
def _(s: Session) -> None:
    f, x = s.root(frozen(Small()), backend="eager"), torch.randn(2, 3)
    s.warm(f, x)
    s.call(f, torch.randn(4, 3))


@program(PROGRAMS, "backend is a function of a graph module")
def _(s: Session) -> None:
    def reversing(gm, example_inputs):
        assert isinstance(gm, torch.fx.GraphModule) and len(example_inputs) > 0
        return gm.forward

    f, x = s.root(frozen(Small()), backend=reversing), torch.randn(2, 3)
    s.warm(f, x)
    s.call(f, torch.randn(4, 3))
