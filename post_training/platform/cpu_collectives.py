"""Where gloo and Megatron's collectives disagree.

Upstream: megatron-core 0.19.2 builds FSDP's mesh for the device type "cuda" whatever the backend is
(`core/distributed/torch_fully_sharded_data_parallel.py`).
"""

from __future__ import annotations

from typing import Any

from torch.distributed import DeviceMesh


def apply() -> None:
    """Let a device mesh asked for on "cuda" be built on "cpu"."""
    from_group = DeviceMesh.from_group

    def on_cpu(group: Any, device_type: str, *args: Any, **kwargs: Any) -> DeviceMesh:
        return from_group(group, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    setattr(DeviceMesh, "from_group", staticmethod(on_cpu))  # noqa: B010
