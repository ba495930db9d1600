"""Flags of Megatron that contradict the model, or that a run would pass over, are refused."""

import argparse
import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import megatron.core as megatron_core
import pytest
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.arguments import add_megatron_arguments
from megatron.training.models.gpt import GPTModelConfig

from post_training.arguments.defaults import platform_defaults, sft_defaults
from post_training.arguments.parser import parse_arguments
from post_training.arguments.refused import (
    ALREADY_SO,
    ARCHITECTURE,
    KEPT,
    NEEDS_TRANSFORMER_ENGINE,
    PART_OF,
    REFUSED,
    REFUSED_GROUPS,
    VALUES,
    MegatronFlags,
)
from post_training.errors import SetupError
from post_training.hf.config import load_hf_config, megatron_flags

# Fields of Megatron's model configuration that say how a model is computed or trained, not which it is.
HOW = set(
    """
    account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split activation_offload_fraction
    apply_rope_fusion attention_dropout attention_softmax_in_fp32 barrier_with_L1_time batch_invariant_mode
    bf16 bias_dropout_fusion calculate_per_token_loss clone_scatter_output_in_embedding config_logger_dir
    context_parallel_size cp_comm_type cpu_offloading_retain_pinned_cpu_buffers cross_entropy_fusion_impl
    cross_entropy_loss_fusion cuda_graph_impl cuda_graph_modules cuda_graph_warmup_steps
    delay_offload_until_cuda_graph delay_wgrad_compute
    delta_offload_bytes_across_pp_ranks deterministic_mode disable_bf16_reduced_precision_matmul
    distribute_saved_activations embedding_init_method_std enable_cuda_graph
    ep_overlap_early_attn_memory_release expert_model_parallel_size expert_tensor_parallel_size
    external_cuda_graph fine_grained_activation_offloading fine_grained_offloading_max_inflight_offloads
    first_last_layers_bf16 fp16 fp4_quantizer_factory fp4_recipe
    fp8_amax_compute_algo fp8_amax_history_len fp8_interval fp8_margin fp8_output_proj
    fp8_quantizer_factory fp8_recipe fp8_wgrad fused_residual_rmsnorm gradient_accumulation_fusion
    hidden_dropout inference_rng_tracker high_priority_a2a_comm_stream init_method_std
    kitchen_attention_backend
    make_vocab_size_divisible_by masked_softmax_fusion microbatch_group_size_per_vp_stage
    min_offloaded_tensor_size mlp_chunks_for_training moe_aux_loss_coeff
    moe_deepep_num_sms moe_enable_deepep moe_enable_routing_replay moe_flex_dispatcher_backend
    moe_flex_dispatcher_num_sms moe_grouped_gemm moe_hybridep_num_blocks_permute
    moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms moe_hybridep_num_sms_preprocessing
    moe_hybridep_pad_uneven_dispatch_inputs moe_input_jitter_eps moe_layer_recompute
    moe_ncclep_static_shape moe_ncclep_zero_copy moe_pad_expert_input_to_capacity moe_paged_stash
    moe_paged_stash_buffer_size_factor_cpu moe_paged_stash_buffer_size_factor_cuda
    moe_paged_stash_page_size moe_per_layer_logging moe_permute_fusion moe_permute_fusion_into_hybridep
    moe_router_dtype moe_router_fusion moe_router_load_balancing_type moe_router_padding_for_fp8
    moe_router_padding_for_quantization moe_shared_expert_overlap moe_single_grouped_bias
    moe_single_grouped_weight moe_token_dispatcher_type moe_token_drop_policy
    num_layers_at_end_in_bf16 num_layers_at_start_in_bf16 offload_modules
    overlap_dispatch_backward_with_experts_wgrad overlap_moe_expert_parallel_comm overlap_p2p_comm
    overlap_p2p_comm_warmup_flush perform_initialization pipeline_model_parallel_comm_backend
    pipeline_model_parallel_layout pipeline_model_parallel_size qk_clip_alpha qk_clip_threshold
    recompute_granularity recompute_method recompute_modules recompute_num_layers seq_length
    sequence_parallel symmetric_ar_type tensor_model_parallel_size test_mode tp_comm_bootstrap_backend
    tp_comm_bulk_dgrad tp_comm_bulk_wgrad tp_comm_overlap_ag tp_comm_overlap_cfg
    tp_comm_overlap_rs tp_comm_overlap_rs_dgrad
    tp_comm_split_ag tp_comm_split_rs transformer_impl use_cpu_initialization
    use_fused_weighted_squared_relu use_grouped_gemm_for_dense_mlp use_grouped_gemm_for_shared_expert
    use_kitchen_attention use_ring_exchange_p2p wgrad_deferral_limit
    """.split()
)


@pytest.fixture(scope="module")
def megatron():
    """Megatron's parser, what it says of each flag, and arguments in which nothing is given."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    flags = MegatronFlags(parser)
    args = argparse.Namespace(**{**flags.defaults, "hf_model": "here", "transformer_impl": "local"})
    return SimpleNamespace(parser=parser, flags=flags, args=args)


@pytest.fixture
def words(hf_model, tmp_path, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)

    def words(family):
        model = str(hf_model(family))
        return ["--hf-model", model, "--output-dir", str(tmp_path / "out"), "--train-iters", "3"]

    return words


@pytest.fixture(scope="module")
def check(megatron, hf_model):
    """Parses flags of Megatron and checks them against a model, without building a parser each time."""

    def check(family, flags):
        parser = megatron.parser
        config = megatron_flags(load_hf_config(str(hf_model(family))))
        derived = sft_defaults() | platform_defaults(False) | config
        before = {action: action.default for action in parser._actions}
        parser.set_defaults(**derived)
        args = parser.parse_args(flags.split(), argparse.Namespace(hf_model="here"))
        for action, default in before.items():
            action.default = default
        megatron.flags.check(args, derived, config)

    return check


def changed(args, **changes):
    return argparse.Namespace(**(vars(args) | changes))


def test_the_tables_name_flags_of_this_megatron(megatron):
    named = {*ARCHITECTURE, *REFUSED, *KEPT, *VALUES, *NEEDS_TRANSFORMER_ENGINE}
    named |= {*ALREADY_SO, *PART_OF, *PART_OF.values()}
    assert named <= megatron.flags.defaults.keys()
    assert REFUSED_GROUPS.keys() <= {group.title for group in megatron.parser._action_groups}
    from_config_json_only = set(
        "window_size window_attn_skip_freq softmax_type multi_latent_attention q_lora_rank "
        "kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim rope_type rotary_scaling_factor "
        "mscale_all_dim moe_router_enable_expert_bias moe_router_bias_update_rate "
        "hybrid_layer_pattern mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads".split()
    )
    assert set(ARCHITECTURE) & megatron.flags.refused.keys() == from_config_json_only


def test_every_field_of_the_models_configuration_is_spoken_for(megatron):
    """A version of Megatron that brings a new one fails here: does it make a model, and is it heeded?"""
    fields = {
        field.name
        for cls in (TransformerConfig, GPTModelConfig)
        for field in dataclasses.fields(cls)
    }
    known = {*ARCHITECTURE, *megatron.flags.refused, *NEEDS_TRANSFORMER_ENGINE}
    assert not known & HOW
    assert (fields & megatron.flags.defaults.keys()) - known - HOW == set()


# Parts of Megatron that a run does not come through, by their paths below `megatron/`.
UNUSED = re.compile(
    r"rl/|core/(datasets|export|inference|quantization|resharding|tokenizers)/|core/distributed/fsdp/"
    r"|core/models/(T5|bert|mamba|mimo|multimodal|retro|vision)/"
    r"|core/transformer/(dot_product_attention|multi_latent_attention|multi_token_prediction)\.py"
    r"|core/transformer/experimental_attention_variant/"
    r"|training/(datasets|tokenizer)/|training/(inprocess_restart|yaml_arguments)\.py"
)
NOT_READERS = {
    "arguments.py",
    "architecture.py",
    "defaults.py",
    "parser.py",
    "ranges.py",
    "refused.py",
}
READ = re.compile(r"\.(\w+)\b(?!\s*=[^=])")
"""An attribute that is not set here."""
NAMED = re.compile(r"[\"'](\w+)[\"']")
"""What `getattr` may be given, at once or by way of a list. The parser itself names every flag so."""


def test_every_flag_that_is_taken_has_a_reader(megatron):
    """In code that a run comes through; else it would be passed over without a word."""
    root = Path(megatron_core.__file__).parents[1]
    project = Path(__file__).resolve().parents[3]
    files = [path for path in root.rglob("*.py") if not UNUSED.match(str(path.relative_to(root)))]
    files += [project / "finetune.py", project / "model_provider.py"]
    files += [*(project / "post_training").rglob("*.py"), *(project / "data").rglob("*.py")]
    read: set[str] = set()
    for path in files:
        source = path.read_text()
        read.update(READ.findall(source))
        if path.name not in NOT_READERS:
            read.update(NAMED.findall(source))
    read.discard("num_workers")  # of a task's DataLoader
    taken = megatron.flags.defaults.keys() - megatron.flags.refused.keys()
    assert taken - read == ALREADY_SO.keys()


def test_no_default_is_refused_on_another_number_of_processes(megatron, monkeypatch):
    """What `config.yaml` of a run has in it, though nobody wrote it, is taken by a run of another size."""
    monkeypatch.setenv("WORLD_SIZE", "64")
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    there = MegatronFlags(parser).defaults
    megatron.flags.check(changed(megatron.args, **there), {}, {})
    assert there != megatron.flags.defaults, "some do differ"


def test_what_says_more_about_another_flag_needs_it(megatron):
    for key, other in PART_OF.items():
        args = changed(megatron.args, **{key: "given"})
        with pytest.raises(SetupError, match="given does nothing without --wandb-project; add it"):
            megatron.flags.check(args, {}, {})
        megatron.flags.check(changed(args, **{other: "mine"}), {}, {})


def test_nothing_given_is_nothing_refused(megatron):
    megatron.flags.check(megatron.args, {}, {})


@pytest.mark.parametrize("key", ARCHITECTURE)
def test_what_makes_a_model_is_not_changed(megatron, key):
    args = changed(megatron.args, **{key: 3.5})
    with pytest.raises(SetupError, match=rf"{key}|--.*--hf-model here says .*; leave the flag out"):
        megatron.flags.check(args, {}, {})
    megatron.flags.check(args, {key: 3.5}, {})  # the configuration says the same
    if key not in NEEDS_TRANSFORMER_ENGINE and key not in megatron.flags.refused:
        args.hf_model = None  # described by flags
        megatron.flags.check(args, {}, {})


def test_what_is_refused_is_refused_with_its_reason(megatron):
    assert len(megatron.flags.refused) > 250
    for key, reason in megatron.flags.refused.items():
        args = changed(megatron.args, **{key: "given", "hf_model": None})
        with pytest.raises(SetupError) as caught:
            megatron.flags.check(args, {}, {})
        assert str(caught.value).endswith(f" is not supported: {reason}"), key


@pytest.mark.parametrize("key", NEEDS_TRANSFORMER_ENGINE)
def test_what_needs_transformer_engine_is_refused_without(megatron, key):
    args = changed(megatron.args, **{key: "given", "hf_model": None})
    with pytest.raises(SetupError, match="needs Transformer Engine; leave it out"):
        megatron.flags.check(args, {}, {})
    args.transformer_impl = "transformer_engine"
    megatron.flags.check(args, {}, {})


@pytest.mark.parametrize(
    ("family", "flags", "told"),
    [
        ("qwen3", "--rotary-interleaved", "--rotary-interleaved: --hf-model"),
        ("qwen3", "--rotary-percent 0.5", "--rotary-percent 0.5: --hf-model"),
        ("qwen3", "--use-rope-scaling", "--use-rope-scaling: --hf-model"),
        ("qwen3", "--no-rope-freq 2", "--no-rope-freq 2: --hf-model"),
        ("qwen3", "--activation-func-clamp-value 0.01", "clamp-value 0.01: --hf-model"),
        ("qwen3", "--apply-layernorm-1p", "--apply-layernorm-1p: --hf-model"),
        ("qwen3", "--num-experts 4", "--num-experts 4: --hf-model"),
        ("qwen3_moe", "--moe-router-score-function sigmoid", "sigmoid: --hf-model"),
        ("qwen3_moe", "--moe-router-topk-scaling-factor 2.5", "factor 2.5: --hf-model"),
        ("qwen3", "--qk-l2-norm", "--qk-l2-norm is not supported: attention"),
        ("qwen3", "--window-size 16,0", "--hf-model here says None; leave the flag out"),
        ("qwen3", "--apply-residual-connection-post-layernorm", "no code of Megatron reads it"),
        ("qwen3", "--use-flash-attn", "--use-flash-attn is not supported: no code of Megatron"),
        ("qwen3", "--no-pad-vocab-size", "--no-pad-vocab-size is not supported: the embedding is"),
        ("qwen3", "--wandb-entity me", "--wandb-entity me does nothing without --wandb-project"),
        ("qwen3", "--rampup-batch-size 2 2 4", "every step takes --global-batch-size packs"),
        ("qwen3", "--decrease-batch-size-if-needed", "every step takes --global-batch-size packs"),
        ("qwen3", "--reset-position-ids", "documents of a pack never see each other"),
        ("qwen3", "--reset-attention-mask", "documents of a pack never see each other"),
        ("qwen3", "--eod-mask-loss", "the loss is taken on what the assistant wrote"),
        ("qwen3", "--dataloader-type cyclic", "packs are made before training"),
        ("qwen3", "--full-validation", "every evaluation covers the whole split"),
        ("qwen3", "--mtp-num-layers 1", "multi-token prediction"),
        ("qwen3", "--optimizer lion", "--optimizer lion is not supported: only adam and sgd"),
        ("qwen3", "--optimizer muon", "--optimizer muon is not supported: only adam and sgd"),
        ("qwen3", "--sgd-momentum 0.5", "--sgd-momentum 0.5 does nothing without --optimizer sgd"),
        ("qwen3", "--optimizer sgd --adam-eps 0.1", "does nothing without --optimizer adam"),
        (
            "qwen3",
            "--dist-ckpt-format zarr",
            "--dist-ckpt-format zarr is not supported: use --ckpt",
        ),
        ("qwen3", "--ddp-average-in-collective", "divided by the trained tokens of all ranks"),
        ("qwen3", "--num-distributed-optimizer-instances 2", "sharded over all data parallel"),
        ("qwen3", "--defer-embedding-wgrad-compute", "compute needs Transformer Engine"),
        ("qwen3", "--adlr-autoresume", "it goes on from the newest checkpoint"),
        ("qwen3", "--check-for-spiky-loss", "the loss function is not Megatron's"),
        ("qwen3", "--use-megatron-fsdp", "use --use-torch-fsdp2"),
        ("qwen3", "--data-path corpus", "--finetune-data-files"),
        ("qwen3", "--tokenizer-type HuggingFaceTokenizer", "--hf-tokenizer"),
        ("qwen3", "--attention-backend flash", "--attention-backend flash needs"),
        ("qwen3", "--cuda-graph-impl local", "--cuda-graph-impl local needs CUDA"),
        ("qwen3", "--record-memory-history", "--record-memory-history needs CUDA"),
        ("qwen3", "--log-energy", "--log-energy needs CUDA"),
        ("qwen3", "--use-precision-aware-optimizer", "optimizer needs Transformer Engine"),
        ("qwen3", "--fp8-format hybrid", "--fp8-format hybrid needs Transformer Engine"),
    ],
)
def test_a_command_line_that_would_train_something_else_is_refused(check, family, flags, told):
    with pytest.raises(SetupError) as caught:
        check(family, flags)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("rotary_interleaved: true", "--rotary-interleaved: --hf-model"),
        ("yaml_cfg: absent.yaml", "--yaml-cfg is not supported"),
    ],
)
def test_a_config_file_is_refused_alike(words, tmp_path, line, told):
    file = tmp_path / "config.yaml"
    file.write_text(line + "\n")
    with pytest.raises(SetupError, match=told):
        parse_arguments([*words("qwen3"), "--config", str(file)])


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("qwen3", "--lr 1e-5 --min-lr 1e-6 --lr-decay-style WSD --lr-wsd-decay-iters 1"),
        ("qwen3", "--lr-decay-iters 3 --lr-warmup-fraction 0.1 --clip-grad 0.5 --seed 7"),
        ("qwen3", "--weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.99 --adam-eps 1e-6"),
        ("qwen3", "--optimizer sgd --sgd-momentum 0.5"),
        ("qwen3", "--attention-dropout 0.1 --hidden-dropout 0.1 --bf16 --grad-reduce-in-bf16"),
        ("qwen3", "--fp16 --initial-loss-scale 65536 --loss-scale-window 500 --hysteresis 4"),
        (
            "qwen3",
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        ),
        ("qwen3", "--recompute-activations --accumulate-allreduce-grads-in-fp32"),
        ("qwen3", "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
        ("qwen3", "--init-method-std 0.01 --no-initialization --init-method-xavier-uniform"),
        ("qwen3", "--embedding-init-method-std 0.1 --data-parallel-random-init"),
        (
            "qwen3",
            "--log-throughput --log-params-norm --log-num-zeros-in-grad --timing-log-level 1",
        ),
        (
            "qwen3",
            "--log-memory-to-tensorboard --log-validation-ppl-to-tensorboard --log-interval 5",
        ),
        ("qwen3", "--profile --profile-step-start 1 --profile-step-end 2 --use-pytorch-profiler"),
        ("qwen3", "--exit-interval 2 --exit-duration-in-mins 5 --exit-signal-handler --manual-gc"),
        (
            "qwen3",
            "--distributed-timeout-minutes 5 --num-workers 2 --eval-interval 2 --eval-iters 1",
        ),
        # What scripts for pretraining say of such a model anyway.
        ("qwen3", "--swiglu --normalization RMSNorm --disable-bias-linear --qk-layernorm"),
        ("qwen3", "--use-rotary-position-embeddings --no-position-embedding --rotary-percent 1.0"),
        ("qwen3", "--position-embedding-type rope --group-query-attention --use-mcore-models"),
        ("qwen3", "--max-position-embeddings 64 --make-vocab-size-divisible-by 64"),
        (
            "qwen3",
            "--attention-softmax-in-fp32 --no-masked-softmax-fusion --attention-backend auto",
        ),
        ("qwen3", "--no-create-attention-mask-in-dataloader --ckpt-format torch_dist"),
        ("qwen3_moe", "--moe-aux-loss-coeff 0.001 --moe-router-load-balancing-type seq_aux_loss"),
        ("qwen3_moe", "--moe-token-dispatcher-type allgather --moe-router-dtype fp32"),
        ("qwen3_moe", "--moe-token-dispatcher-type alltoall --moe-permute-fusion"),
        ("qwen3_moe", "--moe-router-score-function softmax --moe-layer-recompute"),
    ],
)
def test_what_others_give_goes_on_working(check, family, flags):
    check(family, flags)
