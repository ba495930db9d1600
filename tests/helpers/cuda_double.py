"""Runs a script as on a GPU, on a machine without one.

    python -m tests.helpers.cuda_double REPORT.json finetune.py FLAG...

Tensors stay in the host's memory and are computed there. But each remembers whether it would be on the
GPU and says so (`.device`, `.is_cuda`), and the script takes the paths that it takes on a GPU. An error is
what CUDA, NCCL or torch's attention kernel would refuse:

- an operation on tensors of both sides, NCCL with a tensor of the host, gloo with one of the GPU;
- `numpy()` of a tensor on the GPU;
- tensors that `varlen_attn` does not take. It is computed document by document.

What would make the host wait for the GPU is counted by the line of this project that asks for it.
Nothing is said of kernels, streams, memory, rounding and speed: those need a GPU.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import runpy
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
FACTORIES = {
    getattr(torch, name)
    for name in (
        "arange as_tensor empty empty_like empty_strided eye full full_like linspace ones ones_like rand "
        "rand_like randint randn randn_like randperm tensor zeros zeros_like"
    ).split()
}
LIKE = {each for each in FACTORIES if each.__name__.endswith("_like")} | {
    getattr(torch.Tensor, f"new_{name}") for name in ("empty", "full", "ones", "tensor", "zeros")
}
# They take tensors of both sides.
BETWEEN = (
    "aten.copy_",
    "aten._to_copy",
    "aten.set_",
    "aten.index.Tensor",
    "aten.index_put_",
    "aten.lift",
    "aten.scatter.src",  # in the backward pass of topk, on zeros that only C++ has seen
)
WAITING = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten._unique")

waits: Counter[str] = Counter()
kernel_calls = 0
_gloo_groups: set[str] = set()


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether a tensor would be on the GPU: views share the memory of what they are views of."""
    local: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    try:
        return bool(getattr(local.untyped_storage(), "on_gpu", False))
    except RuntimeError:  # it has no memory, as a meta tensor
        return False


def _put(tensor: torch.Tensor, gpu: bool) -> torch.Tensor:
    local = getattr(tensor, "_local_tensor", tensor)
    with contextlib.suppress(RuntimeError):
        setattr(local.untyped_storage(), "on_gpu", gpu)  # noqa: B010
    return tensor


def _tensors(values: Any) -> list[torch.Tensor]:
    return [each for each in pytree.tree_leaves(values) if isinstance(each, torch.Tensor)]


def _waits() -> None:
    """Count a wait for the innermost lines of this project."""
    frames = [
        f"{Path(frame.filename).relative_to(ROOT)}:{frame.name}"
        for frame in traceback.extract_stack()
        if frame.filename.startswith(str(ROOT)) and ".venv" not in frame.filename
    ]
    frames = [frame for frame in frames if not frame.startswith("tests")]
    waits[frames[-1] if frames else "libraries"] += 1


def _means_gpu(device: Any) -> bool:
    if isinstance(device, int) and not isinstance(device, bool):
        return True
    return device is not None and torch.device(device).type == "cuda"


class _Refusals(TorchDispatchMode):
    """Sees every operation, those of the backward pass too, and gives results the side of their inputs."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name, given = str(func), _tensors((args, kwargs))
        if name.startswith("c10d."):
            self._check_collective(name, args, given)
            return func(*args, **kwargs)
        gpu = any(map(on_gpu, given))
        if gpu and name.startswith(WAITING):
            _waits()
        # A number of the host may take part in operations of the GPU (most), but not the other way round.
        numbers = "_fused_adam" in name
        sides = {on_gpu(each) for each in given if each.dim() > 0 or numbers}
        if sides == {False} and gpu and len(given) > 1:
            sides = {False, True}
        if len(sides) == 2 and not name.startswith(BETWEEN):
            found = [("cuda" if on_gpu(each) else "cpu", tuple(each.shape)) for each in given]
            raise RuntimeError(f"{name}: tensors on different devices: {found}")
        if name.startswith("aten.index.Tensor"):
            gpu = on_gpu(given[0])
        if _means_gpu(kwargs.get("device")):  # asked for inside a call that `_Names` let through
            gpu, kwargs = True, kwargs | {"device": CPU}
        out = func(*args, **kwargs)
        known = {each.untyped_storage()._cdata for each in given if each.layout == torch.strided}
        for each in _tensors(out):
            if each.layout == torch.strided and each.untyped_storage()._cdata not in known:
                _put(each, gpu)
        return out

    def _check_collective(self, name: str, args: Any, given: list[torch.Tensor]) -> None:
        group = None
        for each in pytree.tree_leaves(args):
            if isinstance(each, torch.ScriptObject):
                with contextlib.suppress(RuntimeError):
                    group = dist.ProcessGroup.unbox(each)
        if "barrier" in name or group is None:
            return
        nccl = group.group_name not in _gloo_groups
        for each in given:
            if on_gpu(each) != nccl:
                backend, side = "nccl" if nccl else "gloo", "cuda" if on_gpu(each) else "cpu"
                raise RuntimeError(f"{name}: {backend} with a {side} tensor {tuple(each.shape)}")
            if nccl and not each.is_contiguous():
                raise RuntimeError(f"{name}: tensor {tuple(each.shape)} is not contiguous")


class _Names(TorchFunctionMode):
    """Sees what names a device, asks for one, or moves a tensor."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options, tensor = dict(kwargs or {}), torch.Tensor
        if func == tensor.device.__get__:
            return GPU if on_gpu(args[0]) else func(*args)
        if func == tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return on_gpu(args[0])
        if func == tensor.is_cpu.__get__:  # type: ignore[attr-defined]
            return not on_gpu(args[0])
        if func is tensor.cuda:
            return self._moved(args[0], True)
        if func is tensor.cpu:
            return self._moved(args[0], False)
        if func is tensor.to:
            return self._to(args[0], list(args[1:]), options)
        if func is tensor.pin_memory:
            if on_gpu(args[0]):
                raise RuntimeError("cannot pin a tensor on the GPU")
            pinned: torch.Tensor = args[0].clone()
            pinned.untyped_storage().is_pinned_double = True  # type: ignore[attr-defined]
            return pinned
        if func is tensor.numpy and on_gpu(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func is tensor.tolist and on_gpu(args[0]):
            _waits()
        if func is tensor.type and len(args) == 1 and not options:
            name = func(*args)
            return name.replace("torch.", "torch.cuda.", 1) if on_gpu(args[0]) else name
        if func in FACTORIES or func in LIKE:
            return self._make(func, args, options)
        if not _means_gpu(options.get("device")):
            return func(*args, **options)
        out = func(*args, **(options | {"device": CPU}))
        for each in _tensors(out):
            _put(each, True)
        return out

    def _moved(self, value: torch.Tensor, gpu: bool) -> torch.Tensor:
        if on_gpu(value) == gpu:
            return value
        if not (gpu and getattr(value.untyped_storage(), "is_pinned_double", False)):
            _waits()  # copies to pageable memory and from it are not queued
        return _Move.apply(value, gpu)

    def _to(self, value: Any, words: list[Any], options: dict[str, Any]) -> Any:
        target, copy = None, options.pop("copy", False)
        if words and isinstance(words[0], torch.Tensor):
            target, words[0] = on_gpu(words[0]), words[0].dtype
        elif words and words[0] is not None and not isinstance(words[0], torch.dtype):
            if torch.device(words[0]).type == "meta":
                return value.to(*words, **options)
            target = _means_gpu(words.pop(0))
        device = options.pop("device", None)
        if device is not None:
            if torch.device(device).type == "meta":
                return value.to(*words, device=device, **options)
            target = _means_gpu(device)
        options.pop("non_blocking", None)
        out = value.to(*words, **options) if words or options else value
        if target is not None:
            out = self._moved(out, target)
        return out.clone() if copy and out is value else out

    def _make(self, func: Any, args: Sequence[Any], options: dict[str, Any]) -> Any:
        options.pop("pin_memory", None)
        device = options.get("device")
        if device is None:
            out = func(*args, **options)
            return _put(out, on_gpu(args[0])) if func in LIKE else out
        if not _means_gpu(device) and torch.device(device).type != "cpu":
            return func(*args, **options)
        out = func(*args, **(options | {"device": CPU}))
        if func in (torch.tensor, torch.as_tensor) and _means_gpu(device):
            _waits()  # its values lie in pageable memory
        if any(
            out.untyped_storage()._cdata == each.untyped_storage()._cdata for each in _tensors(args)
        ):
            return self._moved(out, _means_gpu(device))
        return _put(out, _means_gpu(device))


class _Move(torch.autograd.Function):
    """A copy on the other side, whose gradient comes back."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, gpu: bool) -> torch.Tensor:
        ctx.gpu = gpu
        return _put(value.detach().clone(), gpu)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _put(gradients[0].clone(), not ctx.gpu), None


def _attention_double(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def varlen_attn(*args: Any, **kwargs: Any) -> torch.Tensor:
        global kernel_calls
        kernel_calls += 1
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        options = given.arguments
        query, key, value = (options[name] for name in ("query", "key", "value"))
        bounds = [options[name] for name in ("cu_seq_q", "cu_seq_k")]
        longest = [options[name] for name in ("max_q", "max_k")]
        assert all(map(on_gpu, (query, key, value, *bounds))), "tensors of the host"
        assert query.dtype in (torch.bfloat16, torch.float16), query.dtype
        assert query.dim() == 3 and query.shape[-1] % 8 == 0, query.shape
        assert all(each.stride(-1) == 1 for each in (query, key, value)), "strided heads"
        assert key.shape[1] == query.shape[1] or options.get("enable_gqa"), "grouped heads"
        assert all(type(each) is int for each in longest), longest
        assert all(each.dtype == torch.int32 and each.is_contiguous() for each in bounds)
        # Causal, where the last query sees the last key.
        back, ahead = options.get("window_size") or (-1, 0)
        assert options.get("is_causal") or ahead == 0 == options["window_size"][1]
        with torch._C.DisableTorchFunction():
            documents = [
                list(zip(ends[:-1], ends[1:], strict=True))
                for ends in (each.tolist() for each in bounds)
            ]
        for pieces, rows, most in zip(documents, (query, key), longest, strict=True):
            assert pieces[-1][1] == rows.shape[0]
            assert max(end - begin for begin, end in pieces) <= most
        parts = []
        for (q0, q1), (k0, k1) in zip(*documents, strict=True):
            q, k, v = (
                each.permute(1, 0, 2)[None] for each in (query[q0:q1], key[k0:k1], value[k0:k1])
            )
            seen = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool, device=query.device)
            shift = (k1 - k0) - (q1 - q0)
            seen = seen.tril(shift)
            out = torch.nn.functional.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=seen if back < 0 else seen.triu(shift - back),
                scale=options.get("scale"),
                enable_gqa=q.shape[1] != k.shape[1],
            )
            parts.append(out[0].permute(1, 0, 2))
        return torch.cat(parts)

    setattr(varlen_attn, "__signature__", signature)  # noqa: B010
    return varlen_attn


def _pretend_collectives() -> None:
    init, new = dist.init_process_group, dist.new_group

    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        assert backend == "nccl", backend
        kwargs.pop("device_id", None)
        init("gloo", *args, **kwargs)

    def new_group(
        ranks: Any = None, timeout: Any = None, backend: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        kwargs.pop("pg_options", None)
        group = new(ranks, timeout, "gloo", None, *args[1:], **kwargs)
        if backend == "gloo" and isinstance(group, dist.ProcessGroup):
            _gloo_groups.add(group.group_name)
        return group

    def get_backend(group: Any = None) -> str:
        return "gloo" if group is not None and group.group_name in _gloo_groups else "nccl"

    for owner in (dist, distributed_c10d):
        for each in (init_process_group, new_group, get_backend):
            setattr(owner, each.__name__, each)
    setattr(  # noqa: B010
        distributed_c10d,
        "_get_object_coll_device",
        lambda group=None: "cpu" if get_backend(group) == "gloo" else "cuda",
    )


def pretend() -> None:
    """Make this process believe in a GPU; before the platform layer and Megatron are imported."""
    torch.cuda.is_available = lambda: True
    from post_training.platform import compilation
    from post_training.platform.cpu import cuda_runtime

    # Streams and events without a device, and no compiler.
    compilation.apply()
    cuda_runtime.apply()
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3",
        major=9,
        minor=0,
        total_memory=80 << 30,
        multi_processor_count=132,
    )
    for name, value in {
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "is_bf16_supported": lambda *args: True,
        "is_current_stream_capturing": lambda: False,
        "current_device": lambda: 0,
        "device_count": lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "get_device_properties": lambda *args: properties,
        "get_device_capability": lambda *args: (9, 0),
        "get_device_name": lambda *args: properties.name,
    }.items():
        setattr(torch.cuda, name, value)
    for owner, name in (
        (torch.Tensor, "record_stream"),
        (torch.optim.Optimizer, "_accelerator_graph_capture_health_check"),
        (torch.optim.Optimizer, "_cuda_graph_capture_health_check"),
    ):
        setattr(owner, name, lambda *args: None)
    _pretend_collectives()
    from torch.nn.attention import varlen

    setattr(varlen, "varlen_attn", _attention_double(varlen.varlen_attn))  # noqa: B010
    _Refusals().__enter__()
    _Names().__enter__()
    from post_training import platform

    platform.apply()
    from post_training.platform.cpu import rng

    # One generator: a GPU has its own.
    rng.apply()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from tests.helpers import cuda_double  # this file once, not a second time as __main__

    report, script, *flags = sys.argv[1:]
    sys.argv = [script, *flags]
    cuda_double.pretend()
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        found = {"waits": dict(cuda_double.waits), "kernel_calls": cuda_double.kernel_calls}
        Path(f"{report}.{os.environ['RANK']}").write_text(json.dumps(found))
