import pytest

from tests.helpers.launch import run_rank


def _layer(patched: bool) -> tuple[bool, str]:
    """Whether an expert's bias is marked as one of sequence parallelism, and what adding it in place comes
    to."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import layers

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    if not patched:
        setattr(layers.RowParallelLinear, "__init__", layers.RowParallelLinear.__init__.__wrapped__)  # noqa: B010
    built = [
        layers.RowParallelLinear(
            8,
            8,
            config=ModelParallelConfig(
                tensor_model_parallel_size=2,
                expert_tensor_parallel_size=1,
                sequence_parallel=sequence_parallel,
                perform_initialization=False,
                params_dtype=torch.float32,
            ),
            init_method=torch.nn.init.zeros_,
            bias=True,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=True,
            tp_group=parallel_state.get_expert_tensor_parallel_group(),
        )
        for sequence_parallel in (True, False)
    ]
    output, bias = built[1](torch.zeros(3, 8, requires_grad=True))
    try:
        output += bias
        told = "added"
    except RuntimeError as error:
        told = str(error)
    return built[0].bias.sequence_parallel, told


def test_a_bias_is_of_one_expert_and_is_added():
    assert run_rank(_layer, True) == (False, "added")


@pytest.mark.slow
def test_still_needed_upstream_adds_up_biases_of_different_experts_and_gives_a_view():
    marked, told = run_rank(_layer, False)
    assert marked and "is a view and is being modified inplace" in told


def test_still_needed_upstream_lets_stacked_biases_decay():
    import torch
    from megatron.core.optimizer.optimizer_config import OptimizerConfig
    from megatron.training import training

    ours = training.get_standard_config_overrides
    biases = torch.nn.Parameter(torch.zeros(4, 8))
    for overrides, kept in ((ours, True), (ours.__wrapped__, False)):
        keys = overrides(config=OptimizerConfig())
        assert any(key.matches(biases, "experts.gate_up_proj_bias") for key in keys) == kept
        assert not any(key.matches(biases, "experts.gate_up_proj") for key in keys)
