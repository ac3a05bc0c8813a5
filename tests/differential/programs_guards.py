"""Programs that change what compiled code relied on: each change must be noticed by a guard."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from harness import ANY, Program, Session, program
from torch import nn

PROGRAMS: list[Program] = []

SCALE = 2.0


def helper(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def other_helper(x: torch.Tensor) -> torch.Tensor:
    return x - 5


def with_defaults(x: torch.Tensor, factor: float = 2.0, *, offset: float = 1.0) -> torch.Tensor:
    return x * factor + offset


class Scale(nn.Module):
    def __init__(self, factor: float, size: int = 3) -> None:
        super().__init__()
        self.factor = factor
        self.linear = nn.Linear(size, size)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.linear(x)) * self.factor


def frozen(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)


@program(PROGRAMS, "changed attribute")
def _(s: Session) -> None:
    model = frozen(Scale(2.0))
    f, x = s.root(model), torch.randn(4, 3)
    s.warm(f, x)
    model.factor = 3.0
    s.miss(f, x)
    s.call(f, x)
    model.factor = 2.0
    s.call(f, x)


@program(PROGRAMS, "changed attribute of an argument")
def _(s: Session) -> None:
    class Settings:
        scale = 1.0

    def f(x, settings):
        return x * settings.scale

    f, x, settings = s.root(f), torch.randn(4), Settings()
    s.warm(f, x, settings)
    settings.scale = 4.0  # shadows the class attribute
    s.miss(f, x, settings)
    del settings.scale
    s.call(f, x, settings)
    s.patch(Settings, "scale", 7.0)
    s.miss(f, x, settings)


@program(PROGRAMS, "parameter replaced")
def _(s: Session) -> None:
    model = frozen(Scale(2.0))
    f, x = s.root(model), torch.randn(4, 3)
    s.warm(f, x)
    model.linear.weight = nn.Parameter(torch.ones(3, 3), requires_grad=False)
    s.call(f, x)
    s.call(f, x)


@program(PROGRAMS, "parameter resized")
def _(s: Session) -> None:
    model = frozen(Scale(2.0))
    f = s.root(model)
    s.warm(f, torch.randn(4, 3))
    model.linear.weight = nn.Parameter(torch.ones(5, 3), requires_grad=False)
    model.linear.bias = nn.Parameter(torch.ones(5), requires_grad=False)
    s.miss(f, torch.randn(4, 3))
    s.call(f, torch.randn(4, 3))


@program(PROGRAMS, "parameter rewritten through .data")
def _(s: Session) -> None:
    model = frozen(Scale(2.0))
    f, x = s.root(model), torch.randn(4, 3)
    s.warm(f, x)
    model.linear.weight.data.fill_(0.5)
    s.call(f, x)
    model.linear.weight.data = torch.full((3, 3), 0.25)
    s.call(f, x)
    model.linear.weight.data = torch.full((2, 3), 0.25)
    model.linear.bias.data = torch.zeros(2)
    s.miss(f, x)


@program(PROGRAMS, "parameter rewritten through numpy")
def _(s: Session) -> None:
    model = frozen(Scale(2.0))
    f, x = s.root(model), torch.randn(4, 3)
    s.warm(f, x)
    model.linear.weight.numpy()[:] = 0.125
    s.call(f, x)


@program(PROGRAMS, "parameter updated in place")
def _(s: Session) -> None:
    model = frozen(Scale(2.0))
    f, x = s.root(model), torch.randn(4, 3)
    s.warm(f, x)
    with torch.no_grad():
        model.linear.weight.add_(1)
    s.hit(f, x)
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
    s.call(f, x)


@program(PROGRAMS, "strides of a parameter changed")
def _(s: Session) -> None:
    model = frozen(Scale(2.0))
    f, x = s.root(model), torch.randn(4, 3)
    s.warm(f, x)
    model.linear.weight.data = torch.randn(3, 3).t()
    s.miss(f, x)


@program(PROGRAMS, "module hook added and removed")
def _(s: Session) -> None:
    model = frozen(Scale(2.0))
    f, x = s.root(model), torch.randn(4, 3)
    s.warm(f, x)
    handle = model.linear.register_forward_hook(lambda module, args, out: out + 100)
    s.miss(f, x)
    handle.remove()
    s.call(f, x)
    handle = model.register_forward_pre_hook(lambda module, args: (args[0] * 0,))
    s.miss(f, x)
    handle.remove()
    s.call(f, x)


@program(PROGRAMS, "global hook added and removed")
def _(s: Session) -> None:
    model = frozen(Scale(2.0))
    f, x = s.root(model), torch.randn(4, 3)
    s.warm(f, x)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: out + 1)
    s.finally_(handle.remove)
    s.miss(f, x)
    handle.remove()
    s.call(f, x)


@program(PROGRAMS, "train mode")
def _(s: Session) -> None:
    model = frozen(Scale(2.0))
    f, x = s.root(model), torch.randn(4, 3)
    s.warm(f, x)
    model.train()
    s.miss(f, x)
    s.call(f, x)
    model.eval()
    s.call(f, x)
    model.drop.training = True  # what was compiled for train() fits: no other flag is read
    s.call(f, x)


@program(PROGRAMS, "other batch size, rank and strides")
def _(s: Session) -> None:
    model = frozen(Scale(2.0))
    f = s.root(model)
    s.warm(f, torch.randn(4, 3))
    s.miss(f, torch.randn(5, 3))
    s.call(f, torch.randn(5, 3))
    s.call(f, torch.randn(4, 3))
    s.miss(f, torch.randn(2, 4, 3))
    s.miss(f, torch.randn(3, 4).t())
    s.miss(f, torch.randn(4, 6)[:, ::2])
    s.call(f, torch.randn(0, 3))


@program(PROGRAMS, "storage offset of an input")
def _(s: Session) -> None:
    def f(x):
        return x.exp() + 1, x

    f, buffer = s.root(f), torch.randn(40)
    s.warm(f, buffer[:8])
    s.call(f, buffer[8:16])
    s.call(f, buffer[3:11])
    s.call(f, buffer[:8])


@program(PROGRAMS, "other dtype")
def _(s: Session) -> None:
    def f(x):
        return (x * 2 + 1).sum(-1)

    f = s.root(f)
    s.warm(f, torch.randn(4, 3))
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool):
        s.miss(f, torch.ones(4, 3).to(dtype))
        s.call(f, torch.ones(4, 3).to(dtype))


@program(PROGRAMS, "default dtype")
def _(s: Session) -> None:
    def f(x):
        return x + torch.ones(3), torch.tensor(1.5), torch.arange(3) / 2

    f, x = s.root(f), torch.ones(3)
    s.warm(f, x)
    s.finally_(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(torch.float64)
    s.miss(f, x)
    torch.set_default_dtype(torch.float32)
    s.call(f, x)


@program(PROGRAMS, "default device")
def _(s: Session) -> None:
    def f(x):
        return torch.ones(3), x + 1

    f, x = s.root(f), torch.ones(3)
    s.warm(f, x)
    s.finally_(lambda: torch.set_default_device(None))
    torch.set_default_device("meta")
    s.miss(f, x)
    torch.set_default_device(None)
    s.call(f, x)
    with torch.device("meta"):
        s.miss(f, x)


@program(PROGRAMS, "other device")
def _(s: Session) -> None:
    def f(x):
        return (x + 1) * 2

    f = s.root(f)
    s.warm(f, torch.ones(3))
    s.miss(f, torch.ones(3, device="meta"))
    s.call(f, torch.ones(3))


@program(PROGRAMS, "grad mode")
def _(s: Session) -> None:
    model = Scale(2.0).eval()
    f, x = s.root(model), torch.randn(4, 3)
    with torch.no_grad():
        s.warm(f, x)
    loss = s.miss(f, x)
    s.watch(model)
    s.call(lambda: loss.sum().backward())
    with torch.no_grad():
        s.call(f, x)


@program(PROGRAMS, "grad mode inside the function", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        with torch.enable_grad():
            y = x * 2
        return y, y.requires_grad, torch.is_grad_enabled()

    f, x = s.root(f), torch.randn(4, requires_grad=True)
    with torch.no_grad():
        for _ in range(3):
            s.call(f, x)


@program(PROGRAMS, "input starts to require grad")
def _(s: Session) -> None:
    def f(x):
        return x * 3 + 1

    f = s.root(f)
    s.warm(f, torch.ones(3))
    x = torch.ones(3, requires_grad=True)
    y = s.miss(f, x)
    s.call(lambda: y.sum().backward())
    s.watch(x)
    s.call(f, torch.ones(3))


@program(PROGRAMS, "autocast")
def _(s: Session) -> None:
    model = frozen(Scale(2.0))
    f, x = s.root(model), torch.randn(4, 3)
    s.warm(f, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s.miss(f, x)
        s.call(f, x)
    s.call(f, x)
    with torch.autocast("cpu", dtype=torch.float16):
        s.miss(f, x)


@program(PROGRAMS, "inference mode")
def _(s: Session) -> None:
    def f(x):
        return x * 2 + 1

    f, x = s.root(f), torch.randn(4)
    s.warm(f, x)
    with torch.inference_mode():
        s.call(f, x)
        s.call(f, x)
        s.call(f, x)
    s.call(f, x)


@program(PROGRAMS, "inference tensors outside inference mode")
def _(s: Session) -> None:
    def f(x):
        return x * 2 + 1, x.view(2, 2)

    f = s.root(f)
    with torch.inference_mode():
        inside = torch.ones(4)
    s.warm(f, torch.ones(4))
    s.call(f, inside)
    s.call(f, torch.ones(4))


@program(PROGRAMS, "vmap around the root")
def _(s: Session) -> None:
    def f(x):
        return (x * 2).sum() + x

    f = s.root(f)
    s.warm(f, torch.randn(3))
    s.miss(torch.vmap(f), torch.randn(5, 3))
    s.call(f, torch.randn(3))


@program(PROGRAMS, "functional grad around the root")
def _(s: Session) -> None:
    def f(x):
        return (x * x).sum()

    f, x = s.root(f), torch.randn(3)
    s.warm(f, x)
    s.miss(torch.func.grad(f), x)
    s.miss(lambda x: torch.func.jvp(f, (x,), (x,)), x)
    s.call(f, x)


@program(PROGRAMS, "torch.compile around the root")
def _(s: Session) -> None:
    def f(x):
        return (x * 2 + 1).relu()

    f, x = s.root(f), torch.randn(3)
    s.finally_(torch._dynamo.reset)
    s.warm(f, x)
    compiled = torch.compile(f, backend="eager")
    s.call(compiled, x)
    s.call(f, x)


@program(PROGRAMS, "torch.jit.trace and make_fx around the root")
def _(s: Session) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def f(x):
        return (x * 2 + 1).relu()

    f, x = s.root(f), torch.randn(3)
    s.warm(f, x)
    s.miss(lambda x: make_fx(f)(x).code, x)
    s.miss(lambda x: torch.jit.trace(f, x)(x * 3), x)
    s.call(f, x)


@program(PROGRAMS, "torch function mode around the root")
def _(s: Session) -> None:
    class Negate(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            return -out if function is torch.relu else out

    def f(x):
        return torch.relu(x) + 1

    def inside(x):
        with Negate():
            return f(x)

    f, x = s.root(f), torch.randn(3)
    s.warm(f, x)
    s.miss(inside, x)
    s.call(f, x)


@program(PROGRAMS, "tensor subclass as input")
def _(s: Session) -> None:
    class Tagged(torch.Tensor):
        pass

    def f(x):
        return x * 2

    f = s.root(f)
    s.warm(f, torch.ones(3))
    s.miss(f, torch.ones(3).as_subclass(Tagged))


@program(PROGRAMS, "monkeypatched function")
def _(s: Session) -> None:
    def f(x):
        return helper(x) + F.relu(x)

    f, x = s.root(f), torch.randn(3)
    s.warm(f, x)
    s.patch(F, "relu", lambda x: x * 10)
    s.miss(f, x)
    s.patch(globals(), "helper", other_helper)
    s.miss(f, x)


@program(PROGRAMS, "monkeypatched method and code")
def _(s: Session) -> None:
    class Model(nn.Module):
        def forward(self, x):
            return self.inner(x) + 1

        def inner(self, x):
            return x * 2

    def replacement(self, x):
        return x * 5

    model = Model()
    f, x = s.root(model), torch.randn(3)
    s.warm(f, x)
    s.patch(Model, "inner", replacement)
    s.miss(f, x)
    model.inner = lambda x: x * 7
    s.miss(f, x)
    del model.inner
    s.call(f, x)


@program(PROGRAMS, "replaced __code__")
def _(s: Session) -> None:
    def callee(x):
        return x * 2

    def f(x):
        return callee(x) + 1

    f, x = s.root(f), torch.randn(3)
    s.warm(f, x)
    callee.__code__ = other_helper.__code__
    s.miss(f, x)


@program(PROGRAMS, "changed global")
def _(s: Session) -> None:
    def f(x):
        return x * SCALE

    f, x = s.root(f), torch.randn(3)
    s.warm(f, x)
    s.patch(globals(), "SCALE", 5.0)
    s.miss(f, x)
    s.patch(globals(), "SCALE", 5)
    s.miss(f, torch.ones(3, dtype=torch.int64))


@program(PROGRAMS, "changed global tensor")
def _(s: Session) -> None:
    def f(x):
        return x + TABLE

    s.patch(globals(), "TABLE", torch.ones(3))
    f, x = s.root(f), torch.randn(3)
    s.warm(f, x)
    s.patch(globals(), "TABLE", torch.full((3,), 2.0))
    s.call(f, x)
    s.patch(globals(), "TABLE", torch.full((1,), 3.0))
    s.miss(f, x)
    s.patch(globals(), "TABLE", 4.0)
    s.miss(f, x)


@program(PROGRAMS, "global shadows a builtin")
def _(s: Session) -> None:
    def f(x):
        return x * len([1, 2, 3])

    f, x = s.root(f), torch.randn(3)
    s.warm(f, x)
    s.patch(globals(), "len", lambda items: 10)
    s.miss(f, x)


@program(PROGRAMS, "changed defaults")
def _(s: Session) -> None:
    def f(x):
        return with_defaults(x)

    f, x = s.root(f), torch.randn(3)
    s.warm(f, x)
    s.patch(with_defaults, "__defaults__", (3.0,))
    s.miss(f, x)
    s.patch(with_defaults, "__kwdefaults__", {"offset": 9.0})
    s.miss(f, x)


@program(PROGRAMS, "changed defaults of the root")
def _(s: Session) -> None:
    def f(x, factor=2.0, *, offset=1.0):
        return x * factor + offset

    root, x = s.root(f), torch.randn(3)
    s.warm(root, x)
    s.call(root, x, 3.0)
    s.call(root, x, factor=4.0, offset=0.0)
    f.__defaults__ = (5.0,)
    s.call(root, x)
    f.__kwdefaults__ = {"offset": 6.0}
    s.call(root, x)


@program(PROGRAMS, "changed closure cell")
def _(s: Session) -> None:
    factor = 2.0

    def f(x):
        return x * factor

    f, x = s.root(f), torch.randn(3)
    s.warm(f, x)
    factor = 3.0
    s.miss(f, x)
    factor = torch.tensor(4.0)
    s.miss(f, x)


@program(PROGRAMS, "two closures of one code")
def _(s: Session) -> None:
    def make(factor):
        def f(x):
            return x * factor

        return f

    double, triple = s.root(make(2.0)), s.root(make(3.0))
    x = torch.randn(3)
    s.warm(double, x)
    s.call(triple, x)
    s.call(triple, x)
    s.call(double, x)


@program(PROGRAMS, "attribute that appears later")
def _(s: Session) -> None:
    class Model(nn.Module):
        def forward(self, x):
            y = x * 2
            if hasattr(self, "bias"):
                y = y + self.bias
            return y * getattr(self, "gain", 1.0)

    model = Model()
    f, x = s.root(model), torch.randn(3)
    s.warm(f, x)
    model.bias = torch.ones(3)
    s.miss(f, x)
    s.call(f, x)
    model.gain = 4.0
    s.miss(f, x)
    s.call(f, x)
    s.patch(Model, "gain", 9.0)
    del model.gain
    s.miss(f, x)


@program(PROGRAMS, "dictionary key that appears later")
def _(s: Session) -> None:
    options = {"a": 1.0}

    def f(x):
        if "shift" in options:
            x = x + options["shift"]
        try:
            return x * options["gain"]
        except KeyError:
            return x * options.get("other", 3.0)

    f, x = s.root(f), torch.randn(3)
    s.warm(f, x)
    for key in ("unused", "shift", "other", "gain"):
        options[key] = 2.0
        s.call(f, x)
        s.call(f, x)


@program(PROGRAMS, "aliased arguments")
def _(s: Session) -> None:
    def f(x, y):
        x.add_(1)
        return x * y

    f = s.root(f)
    s.warm(f, torch.ones(3), torch.ones(3))
    same = torch.ones(3)
    s.call(f, same, same)
    base = torch.ones(6)
    s.call(f, base[:3], base[1:4])
    s.call(f, base[:3], base[3:])
    s.call(f, torch.ones(3), torch.ones(3))


@program(PROGRAMS, "aliased arguments compared by identity")
def _(s: Session) -> None:
    def f(x, y):
        return x * 2 if x is y else x + y

    f = s.root(f)
    s.warm(f, torch.ones(3), torch.ones(3))
    same = torch.ones(3)
    s.miss(f, same, same)


@program(PROGRAMS, "aliased parameters")
def _(s: Session) -> None:
    first, second = (frozen(nn.Linear(3, 3)) for _ in range(2))

    def f(x):
        return first(x) + second(x)

    f, x = s.root(f), torch.randn(2, 3)
    s.warm(f, x)
    second.weight = first.weight
    s.call(f, x)
    first.weight.data.mul_(2)
    s.call(f, x)


@program(PROGRAMS, "second instance with other sizes")
def _(s: Session) -> None:
    small, big = frozen(Scale(2.0, 3)), frozen(Scale(3.0, 5))
    f, g = s.root(small), s.root(big)
    s.warm(f, torch.randn(4, 3))
    s.warm(g, torch.randn(4, 5))
    s.call(f, torch.randn(4, 3))
    s.call(g, torch.randn(2, 5))


@program(PROGRAMS, "method root on two instances")
def _(s: Session) -> None:
    class Layer:
        def __init__(self, weight):
            self.weight = weight

        def apply(self, x):
            return x @ self.weight

    apply = s.root(Layer.apply)
    one, two = Layer(torch.randn(3, 3)), Layer(torch.randn(3, 5))
    x = torch.randn(2, 3)
    s.warm(apply, one, x)
    s.call(apply, two, x)
    s.call(apply, two, x)
    s.call(apply, one, x)
    one.weight = two.weight
    s.call(apply, one, x)


@program(PROGRAMS, "number argument")
def _(s: Session) -> None:
    def f(x, n, t):
        return x * n + math.sqrt(t)

    f, x = s.root(f), torch.randn(3)
    s.warm(f, x, 3, 2.0)
    s.call(f, x, 4, 2.0)
    s.call(f, x, 4.0, 2.0)
    s.call(f, x, True, 2.0)
    s.call(f, x, 3, 0.0)
    s.call(f, x, 3, -1.0)
    s.call(f, x, 3, 2.0)


@program(PROGRAMS, "zero, negative zero and nan as arguments")
def _(s: Session) -> None:
    def f(x, zero):
        return torch.copysign(x, torch.tensor(zero)), math.copysign(1.0, zero)

    f, x = s.root(f), torch.ones(3)
    s.warm(f, x, 0.0)
    s.call(f, x, -0.0)
    s.call(f, x, float("nan"))
    s.call(f, x, float("nan"))


@program(PROGRAMS, "string, None and bool arguments")
def _(s: Session) -> None:
    def f(x, mode, mask=None, flip=False):
        if mask is not None:
            x = x * mask
        y = {"relu": torch.relu, "tanh": torch.tanh}[mode](x)
        return y.flip(0) if flip else y

    f, x = s.root(f), torch.randn(3)
    s.warm(f, x, "relu")
    s.miss(f, x, "tanh")
    s.miss(f, x, "relu", torch.ones(3))
    s.miss(f, x, "relu", flip=True)
    s.call(f, x, "gelu")
    s.call(f, x, "".join(["re", "lu"]))


@program(PROGRAMS, "container argument grows")
def _(s: Session) -> None:
    def f(tensors, weights):
        total = 0
        for name, tensor in tensors.items():
            total = total + tensor * weights[name]
        return total

    f = s.root(f)
    tensors = {"a": torch.ones(3), "b": torch.ones(3)}
    weights = {"a": 1.0, "b": 2.0, "c": 3.0}
    s.warm(f, tensors, weights)
    tensors["c"] = torch.ones(3)
    s.miss(f, tensors, weights)
    del tensors["a"]
    s.call(f, tensors, weights)
    s.call(f, dict(reversed(tensors.items())), weights)
    weights["b"] = 10.0
    s.miss(f, tensors, weights)


@program(PROGRAMS, "module list edited")
def _(s: Session) -> None:
    model = frozen(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)))
    f, x = s.root(model), torch.randn(2, 3)
    s.warm(f, x)
    model[1] = nn.Tanh()
    s.miss(f, x)
    model.append(nn.Sigmoid())
    s.miss(f, x)
    del model[0]
    s.miss(f, x)


@program(PROGRAMS, "number of threads and determinism flags", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        return x.softmax(-1), torch.get_num_threads()

    f, x = s.root(f), torch.randn(4, 5)
    s.warm(f, x)
    threads = torch.get_num_threads()
    s.finally_(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(2)
    s.call(f, x)
    s.finally_(lambda: torch.use_deterministic_algorithms(False))
    torch.use_deterministic_algorithms(True)
    s.call(f, x)


@program(PROGRAMS, "class of an object changed")
def _(s: Session) -> None:
    class A:
        def go(self, x):
            return x + 1

    class B:
        def go(self, x):
            return x - 1

    def f(x, thing):
        return thing.go(x)

    f, x, thing = s.root(f), torch.randn(3), A()
    s.warm(f, x, thing)
    thing.__class__ = B
    s.miss(f, x, thing)


@program(PROGRAMS, "module moved to another dtype")
def _(s: Session) -> None:
    model = frozen(Scale(2.0))
    f = s.root(model)
    s.warm(f, torch.randn(4, 3))
    model.double()
    s.miss(f, torch.randn(4, 3).double())
    s.call(f, torch.randn(4, 3))
    model.float()
    s.call(f, torch.randn(4, 3))


@program(PROGRAMS, "saved tensor hooks")
def _(s: Session) -> None:
    def f(x):
        return (x * x).sum()

    f = s.root(f)
    s.warm(f, torch.randn(3))
    x = torch.randn(3, requires_grad=True)
    packed = s.watch([])

    def pack(t):
        packed.append(t.sum().item())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        s.miss(f, x)
