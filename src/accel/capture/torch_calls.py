"""Which torch callables are graph operations, and by what dotted name.

In: a callable. Out: its name in a graph, or what else it is (metadata, data, refused).
Invariant: a name given here resolves (`accel.trace.resolve`) to that very callable.
"""

from __future__ import annotations

import functools
import types

import torch
import torch.nn.functional as F

# Read only what the guards on a tensor fix (size, stride, dtype, device, kind).
METADATA_METHODS = frozenset(
    [
        "size",
        "dim",
        "numel",
        "nelement",
        "ndimension",
        "stride",
        "is_contiguous",
        "is_floating_point",
        "is_complex",
        "get_device",
        "element_size",
        "__len__",
        "is_same_size",
        "is_inference",
        "is_neg",
        "is_conj",
        "is_signed",
        "__hash__",
        "is_pinned",
        "is_shared",
        "has_names",
        "dim_order",
        "_is_zerotensor",
        "is_distributed",
    ]
)
METADATA_FUNCTIONS = frozenset(
    [
        "is_floating_point",
        "is_complex",
        "numel",
        "is_same_size",
        "result_type",
        "promote_types",
        "can_cast",
        "get_default_dtype",
        "is_grad_enabled",
        "is_inference_mode_enabled",
        "is_inference",
        "is_conj",
        "is_neg",
        "_is_functional_tensor",
        "is_signed",
        "is_tensor",
        "is_autocast_enabled",
        "is_autocast_cpu_enabled",
        "is_autocast_cache_enabled",
        "get_autocast_dtype",
        "get_autocast_cpu_dtype",
        "get_autocast_gpu_dtype",
        "_is_torch_function_enabled",
        "_len_torch_function_stack",
        "_get_tracing_state",
        "_is_tracing",
        "_log_api_usage_once",
        "is_anomaly_enabled",
        "is_deterministic",
        "_are_functorch_transforms_active",
        "_get_deterministic_algorithms",
        "_is_any_autocast_enabled",
        "is_storage",
        "get_default_device",
        "_has_torch_function",
        "_has_torch_function_unary",
        "_has_torch_function_variadic",
        "broadcast_shapes",
        "_get_cpu_capability",
        "_current_autograd_node",
        "_jit_get_profiling_executor",
        "are_deterministic_algorithms_enabled",
        "is_deterministic_algorithms_warn_only_enabled",
    ]
)
METADATA_ATTRIBUTES = frozenset(
    [
        "shape",
        "dtype",
        "device",
        "ndim",
        "requires_grad",
        "is_cuda",
        "layout",
        "is_leaf",
        "is_sparse",
        "is_quantized",
        "is_meta",
        "itemsize",
        "nbytes",
        "is_nested",
        "is_mkldnn",
        "is_xla",
        "is_mps",
        "is_xpu",
        "is_cpu",
        "is_hpu",
        "grad_fn",
        "names",
        "is_vulkan",
        "is_ipu",
        "is_maia",
        "is_sparse_csr",
        "is_mtia",
        "__class__",
        "output_nr",
        "_backward_hooks",
        "__dict__",
        "_is_param",
    ]
)
# Of a tensor that requires grad, these depend on its history, which no guard compares.
AUTOGRAD_ATTRIBUTES = frozenset({"grad_fn", "is_leaf", "output_nr", "_backward_hooks"})
VIEW_ATTRIBUTES = frozenset({"T", "mT", "H", "mH", "real", "imag", "data"})

# Turn a tensor's values into Python's.
DATA_METHODS = frozenset(
    [
        "item",
        "tolist",
        "numpy",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "__complex__",
        "__array__",
        "__contains__",
        "equal",
        "allclose",
        "is_nonzero",
        "__dlpack__",
        "__format__",
        "__repr__",
        "__str__",
    ]
)
DATA_FUNCTIONS = frozenset({"equal", "allclose", "is_nonzero"})
TRUTH_METHODS = frozenset({"__bool__", "is_nonzero"})

# Change a tensor's identity, storage, metadata or autograd state in place.
REFUSED_METHODS = frozenset(
    [
        "backward",
        "register_hook",
        "register_post_accumulate_grad_hook",
        "requires_grad_",
        "retain_grad",
        # Where in its storage a tensor begins is in no guard.
        "storage_offset",
        "is_set_to",
        "as_strided",
        "as_strided_scatter",
        "set_",
        "resize_",
        "resize_as_",
        "resize",
        "share_memory_",
        "pin_memory",
        "untyped_storage",
        "storage",
        "_typed_storage",
        "data_ptr",
        "as_subclass",
        "map_",
        "map2_",
        "apply_",
        "t_",
        "transpose_",
        "swapaxes_",
        "swapdims_",
        "squeeze_",
        "unsqueeze_",
        "as_strided_",
        "detach_",
        "rename_",
        "rename",
        "refine_names",
        "align_to",
        "align_as",
        "module_load",
        "__setstate__",
        "__reduce_ex__",
        "__reduce__",
        "__deepcopy__",
        "__iter__",
        "sparse_resize_",
        "sparse_resize_and_clear_",
        "swap_",
        "swap_tensors",
    ]
)

# Their results' sizes depend on values: the graph would not be static.
REFUSED_FUNCTIONS = frozenset(
    [
        "as_strided",
        "as_strided_copy",
        "as_strided_scatter",
        "nonzero",
        "masked_select",
        "unique",
        "unique_consecutive",
        "unique_dim",
        "argwhere",
        "from_numpy",
        "frombuffer",
        "from_file",
        "set_grad_enabled",
        "compile",
        "_sync",
    ]
)

# Python functions of torch's own that are recorded whole.
_PYTHON_NAMESPACES = (
    (F, "torch.nn.functional"),
    (torch.functional, "torch.functional"),
)
_NOT_WHOLE = frozenset(
    [
        "boolean_dispatch",
        "has_torch_function",
        "has_torch_function_unary",
        "has_torch_function_variadic",
        "handle_torch_function",
        "assert_int_or_pair",
        "cast",
        "np_bool",
        "grad",
        "Callable",
        "multi_head_attention_forward",
        "gaussian_nll_loss",  # asks whether a variance is negative
        "sparse_",
        "coalesce",
    ]
)
_C_NAMESPACES = (
    (torch, "torch"),
    (F, "torch.nn.functional"),
    (torch._C._nn, "torch._C._nn"),
    (torch.special, "torch.special"),
    (torch.linalg, "torch.linalg"),
    (torch.fft, "torch.fft"),
    (torch._C._VariableFunctions, "torch._C._VariableFunctions"),
)


@functools.cache
def aten_names() -> frozenset[str]:
    """The names, without namespace and overload, of every ATen operator."""
    every = torch._C._dispatch_get_all_op_names()
    return frozenset(n[6:].split(".")[0] for n in every if n.startswith("aten::"))


@functools.cache
def graph_functions() -> dict[int, str]:
    """id -> dotted name of every torch function that may become one graph operation.

    The functions are attributes of modules that live for good, so ids stay valid.
    """
    names: dict[int, str] = {}
    aten = aten_names()
    for module, dotted in _PYTHON_NAMESPACES:
        for name, f in vars(module).items():
            if type(f) is not types.FunctionType or name.startswith("_") or name in _NOT_WHOLE:
                continue
            if f.__module__ in (dotted, "torch._jit_internal"):
                names.setdefault(id(f), f"{dotted}.{name}")
    for module, dotted in _C_NAMESPACES:
        for name in dir(module):
            f = getattr(module, name, None)
            if type(f) is not types.BuiltinFunctionType or name in METADATA_FUNCTIONS:
                continue
            if name in REFUSED_FUNCTIONS or name in DATA_FUNCTIONS:
                continue
            if (
                name in aten
                or f"{name}_forward" in aten
                or dotted.startswith("torch._C._nn")
                or name.startswith(("linalg_", "special_", "fft_"))
                or dotted
                in (
                    "torch.linalg",
                    "torch.special",
                    "torch.fft",
                )
            ):
                names.setdefault(id(f), f"{dotted}.{name}")
    return names


# Methods of Tensor written in Python (or not named after an ATen operator) that are
# functions of the tensor's values and metadata alone.
_PYTHON_METHODS = frozenset(
    [
        "split",
        "norm",
        "unflatten",
        "stft",
        "istft",
        "lu",
        "__rsub__",
        "__rdiv__",
        "__rtruediv__",
        "__idiv__",
        "__itruediv__",
        "__pow__",
        "__rpow__",
        "__ipow__",
        "__floordiv__",
        "__rfloordiv__",
        "__rmod__",
        "__rlshift__",
        "__rrshift__",
        "__rmatmul__",
        "__pos__",
        "__neg__",
        "__abs__",
        "__add__",
        "__radd__",
        "__iadd__",
        "__sub__",
        "__isub__",
        "__mul__",
        "__rmul__",
        "__imul__",
        "__matmul__",
        "__imatmul__",
        "__truediv__",
        "__div__",
        "__mod__",
        "__imod__",
        "__ifloordiv__",
        "__eq__",
        "__ne__",
        "__lt__",
        "__le__",
        "__gt__",
        "__ge__",
        "__and__",
        "__rand__",
        "__iand__",
        "__or__",
        "__ror__",
        "__ior__",
        "__xor__",
        "__rxor__",
        "__ixor__",
        "__invert__",
        "__lshift__",
        "__rshift__",
        "__ilshift__",
        "__irshift__",
        "__getitem__",
        "__setitem__",
        "float",
        "double",
        "half",
        "bfloat16",
        "int",
        "long",
        "short",
        "bool",
        "byte",
        "char",
        "cpu",
        "to",
        "type",
        "type_as",
        "new_tensor",
        "view_as",
        "reshape_as",
        "expand_as",
        "cfloat",
        "cdouble",
        "chalf",
        "contiguous",
        "new_zeros",
        "new_ones",
        "new_empty",
        "new_full",
        "new_empty_strided",
        "requires_grad",
        "clone",
        "detach",
        "permute",
        "copy_",
    ]
)


def is_graph_method(name: str) -> bool:
    """True when Tensor method `name` may become a graph operation."""
    if name in REFUSED_METHODS or name in DATA_METHODS or name in REFUSED_FUNCTIONS:
        return False
    return name in _PYTHON_METHODS or name in aten_names()
