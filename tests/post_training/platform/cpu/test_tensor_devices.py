import pytest
import torch

from post_training.platform.cpu.tensor_devices import FACTORIES, NEW_FACTORIES, is_cuda_device

CALLS = {
    "arange": (3,),
    "as_tensor": ([1.0],),
    "empty": (2,),
    "empty_strided": ((2,), (1,)),
    "eye": (2,),
    "full": ((2,), 1.0),
    "full_like": (torch.ones(2), 1.0),
    "linspace": (0, 1, 3),
    "randint": (3, (2,)),
    "randperm": (3,),
    "tensor": ([1.0],),
}


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("device", ["cuda", "cuda:3", 0, torch.device("cuda", 1)])
def test_factories_make_their_tensors_here(name, device):
    args = CALLS.get(name, (torch.ones(2),) if name.endswith("_like") else (2,))
    made = getattr(torch, name)(*args, device=device)
    assert made.device.type == "cpu"


@pytest.mark.parametrize("name", NEW_FACTORIES)
def test_methods_make_their_tensors_here(name):
    args = {"new_full": ((2,), 1.0), "new_tensor": ([1.0],)}.get(name, (2,))
    assert getattr(torch.ones(1), name)(*args, device="cuda").device.type == "cpu"


def test_moving_to_cuda_is_staying():
    tensor, module = torch.ones(2), torch.nn.Linear(2, 2)
    assert tensor.cuda() is tensor and tensor.pin_memory() is tensor and module.cuda() is module
    assert tensor.to("cuda").device.type == tensor.to(device="cuda:0").device.type == "cpu"
    assert tensor.to("cuda", torch.float64).dtype == torch.float64
    assert tensor.to(torch.bfloat16).dtype == torch.bfloat16
    assert tensor.to(torch.ones(1, dtype=torch.int8)).dtype == torch.int8
    assert tensor.to("meta").is_meta


def test_type_names_are_what_megatrons_optimizers_compare_with():
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1).type(torch.float64).dtype == torch.float64


@pytest.mark.parametrize("other", ["cpu", "meta", None, True, torch.device("cpu")])
def test_other_devices_are_left_alone(other):
    assert not is_cuda_device(other)


def test_still_needed_upstream_names_the_device(upstream):
    from megatron.training import training

    assert "returned" not in upstream["tensor on cuda"]
    assert "returned" not in upstream["Tensor.cuda"]
    with open(training.__file__) as source:
        assert "device='cuda'" in source.read()
