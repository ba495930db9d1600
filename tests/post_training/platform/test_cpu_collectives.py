import inspect

from tests.helpers.launch import run_rank


def _mesh() -> tuple[str, str]:
    import torch
    from torch.distributed import DeviceMesh

    torch.distributed.init_process_group("gloo")
    group = torch.distributed.new_group([0])
    asked = DeviceMesh.from_group(group, "cuda").device_type
    return asked, DeviceMesh.from_group(group, device_type="cpu").device_type


def test_a_mesh_for_cuda_is_built_here():
    assert run_rank(_mesh) == ("cpu", "cpu")


def test_still_needed_upstream_names_the_device():
    from megatron.core.distributed import torch_fully_sharded_data_parallel as fsdp

    assert 'from_group(self.process_group, "cuda")' in inspect.getsource(fsdp)
