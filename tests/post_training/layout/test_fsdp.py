import os

import pytest

from post_training.errors import SetupError
from post_training.layout import fsdp, sizes
from tests.post_training.layout.test_sizes import arguments

FSDP2 = {"use_torch_fsdp2": True, "world_size": 4}
BAD = [
    (
        {"tensor_model_parallel_size": 2},
        ["nearest that works", "--tensor-model-parallel-size 1"],
    ),
    ({"pipeline_model_parallel_size": 2}, ["--pipeline-model-parallel-size 2", "leave one"]),
    (
        {"tensor_model_parallel_size": 2, "context_parallel_size": 2},
        ["nearest that works on 4 processes", "--context-parallel-size 2"],
    ),
    ({"expert_model_parallel_size": 2, "num_experts": 4}, ["--expert-model-parallel-size 2"]),
    ({"use_distributed_optimizer": True}, ["--use-distributed-optimizer out"]),
    ({"overlap_grad_reduce": True}, ["--overlap-grad-reduce", "leave it out"]),
    ({"overlap_param_gather": True}, ["--overlap-param-gather", "leave it out"]),
    ({"fp16": True}, ["--fp16", "--bf16"]),
    ({"ckpt_format": "torch_dist"}, ["--ckpt-format torch_dist", "torch_dcp"]),
]


@pytest.mark.parametrize(("changes", "expected"), BAD)
def test_what_fsdp2_does_not_go_with_is_refused(changes, expected):
    sizes.check(arguments(**FSDP2))
    with pytest.raises(SetupError) as caught:
        sizes.check(arguments(**FSDP2, **changes))
    for text in ["--use-torch-fsdp2", *expected]:
        assert text in str(caught.value)


def test_context_parallelism_goes_with_it():
    sizes.check(arguments(**FSDP2, context_parallel_size=2))


def test_one_connection_is_refused_where_cuda_reads_it(monkeypatch):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.setattr(fsdp, "device_type", lambda: "cuda")
    with pytest.raises(SetupError, match="CUDA_DEVICE_MAX_CONNECTIONS is 1.*unset it"):
        sizes.check(arguments(**FSDP2))
    monkeypatch.setattr(fsdp, "device_type", lambda: "cpu")
    sizes.check(arguments(**FSDP2))
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in os.environ
