"""What every flag of a number may be, in one table by destination name; and no flag may be empty.

Megatron's parser takes any number: -1, nan and 10^30 would be met where they are used, after all processes
have started, or never. Here each such flag has a range, and argparse and `--config` read it through that.
Flags that are refused anyway (`refused.py`) have none. A test looks for flags that have been forgotten.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

NEVER = 2**31 - 1
"""The largest step, and so an interval that never comes."""
SIZE = 2**24
"""Of batches, packs and parallel groups: more cannot be held."""
FP32 = 1e38


@dataclass(frozen=True)
class Number:
    """Reads a number from `low` to `high`, for argparse and `--config`."""

    kind: type[int] | type[float]
    low: float
    high: float
    above: bool = False
    """Above `low`, not at it."""
    below: bool = False
    """Below `high`, not at it."""
    off: dict[int, int | None] = field(default_factory=dict, hash=False)
    """Numbers outside the range that turn the flag off, and what stands for that."""
    hint: str = ""

    def __call__(self, given: object) -> int | float | None:
        """The number of a word, or of a value of YAML.

        Raises:
            argparse.ArgumentTypeError: it is none, or out of range.
        """
        what = "an integer" if self.kind is int else "a number"
        try:
            if isinstance(given, bool) or not isinstance(given, (str, int, float)):
                raise ValueError
            number = self.kind(str(given))
        except ValueError:
            found = "nothing" if given == "" else repr(given)
            raise argparse.ArgumentTypeError(f"expects {what}, found {found}") from None
        if number in self.off:
            return self.off[int(number)]
        low = number > self.low if self.above else number >= self.low
        high = number < self.high if self.below else number <= self.high
        if not (low and high) or math.isnan(number):
            shown = str(given) if len(str(given)) < 30 else f"{str(given)[:12]}..."
            raise argparse.ArgumentTypeError(f"{shown} is out of range: must be {self}")
        return number

    def __str__(self) -> str:
        """The range in words."""
        low = f"{'above' if self.above else 'at least'} {self.low:.15g}"
        high = f"{'below' if self.below else 'at most'} {self.high:.15g}"
        off = f", or {' or '.join(map(str, self.off))}: off" if self.off else ""
        return f"{low} and {high}{off}" + (f" ({self.hint})" if self.hint else "")


@dataclass(frozen=True)
class Text:
    """Reads a word that is not empty, as an unset variable of a shell leaves one."""

    may_be_empty: bool = False
    """As it is by default."""

    def __call__(self, given: object) -> str:
        """The word.

        Raises:
            argparse.ArgumentTypeError: it is empty, YAML reads it as something else, or it holds what no
                log, table or configuration can, as a path of other bytes.
        """
        if not isinstance(given, str):
            what = "a mapping" if isinstance(given, dict) else repr(given)
            raise argparse.ArgumentTypeError(f"expects text, found {what}; quote what is meant so")
        if any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in given):
            raise argparse.ArgumentTypeError(f"{given!r} is no text in UTF-8; rename what it names")
        if not given.strip() and not self.may_be_empty:
            raise argparse.ArgumentTypeError("is empty; give a value, or leave it out")
        return given


@dataclass(frozen=True)
class Other:
    """Reads what Megatron has a converter of its own for, such as a name of an enumeration or a pattern."""

    kind: Callable[[str], Any]

    def __call__(self, given: str) -> Any:
        """What the converter makes of a word.

        Raises:
            argparse.ArgumentTypeError: whatever it raised: argparse passes on most of that.
        """
        try:
            return self.kind(given)
        except Exception as error:
            if isinstance(error, argparse.ArgumentTypeError):
                raise  # it says what is expected
            raise argparse.ArgumentTypeError(f"{given!r} is not valid ({error!r})") from error


def _integer(low: int, high: int = NEVER, **more: Any) -> Number:
    return Number(int, low, high, **more)


def _real(low: float, high: float, **more: Any) -> Number:
    return Number(float, low, high, **more)


_TABLE: tuple[tuple[Number, str], ...] = (
    # Sizes.
    (
        _integer(1, SIZE),
        "tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size "
        "expert_model_parallel_size expert_tensor_parallel_size model_parallel_size "
        "micro_batch_size global_batch_size eval_micro_batch_size eval_global_batch_size batch_size "
        "microbatch_group_size_per_vp_stage num_layers_per_virtual_pipeline_stage "
        "num_virtual_stages_per_pipeline_rank decoder_first_pipeline_num_layers "
        "decoder_last_pipeline_num_layers seq_length max_position_embeddings "
        "make_vocab_size_divisible_by padded_vocab_size recompute_num_layers mlp_chunks_for_training "
        "inprocess_active_world_size replication_factor replication_jump dist_ckpt_workers "
        "tensorboard_queue_size straggler_minmax_count",
    ),
    # The shape of a model that flags describe.
    (
        _integer(1, SIZE),
        "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels "
        "vocab_size num_experts moe_ffn_hidden_size moe_router_topk "
        "moe_shared_expert_intermediate_size",
    ),
    (_integer(1, NEVER), "rotary_base"),
    (_real(0, 1, above=True), "rotary_percent layernorm_epsilon"),
    # Steps.
    (_integer(0), "train_iters"),
    (_integer(1), "num_epochs early_stop_patience answer_tokens lr_decay_iters lr_wsd_decay_iters"),
    (_integer(1, 2**62), "ddp_num_buckets ddp_bucket_size"),
    (
        _integer(0),
        "lr_warmup_iters warmup start_eval_at_iter profile_step_start profile_step_end profile_ranks "
        "ckpt_step override_ckpt_iteration iterations_to_skip local_rank "
        "moe_routing_trace_max_training_iters ft_num_warmup_iters cuda_graph_warmup_steps",
    ),
    (_integer(0, hint="0: no evaluation; leave it out to evaluate whole splits"), "eval_iters"),
    (
        _integer(1, off={-1: NEVER}),
        "log_interval tensorboard_log_interval save_interval eval_interval",
    ),
    (
        _integer(1, off={-1: None, 0: None}),
        "exit_interval exit_duration_in_mins train_sync_interval log_memory_interval "
        "check_weight_hash_across_dp_replicas_interval gpu_sniff_test_interval save_params_interval "
        "save_activations_interval save_tokens_per_expert_interval save_wgrads_interval "
        "save_dgrads_interval non_persistent_save_interval",
    ),
    (_integer(1, off={-1: None}), "save_retain_interval keep_checkpoints"),
    (_integer(1, SIZE), "draft_vocab_size"),
    (_integer(-1, SIZE), "aux_layers"),
    (_integer(1, 64), "draft_ttt_steps"),
    (_integer(1, SIZE), "lora_rank calib_size"),
    (_real(0, SIZE, above=True), "lora_alpha"),
    (_real(0, 1), "draft_loss_decay"),
    (_integer(1, off={-1: 0, 0: 0}), "manual_gc_interval"),
    # The optimizer and its schedule.
    (
        _real(0, 1000),
        "lr min_lr lr_warmup_init decoupled_lr decoupled_min_lr weight_decay start_weight_decay "
        "end_weight_decay moe_aux_loss_coeff init_method_std embedding_init_method_std",
    ),
    (
        _real(0, 1, below=True),
        "adam_beta1 adam_beta2 sgd_momentum hidden_dropout attention_dropout lr_warmup_fraction "
        "moe_input_jitter_eps lora_dropout",
    ),
    (_real(0, 1, above=True), "adam_eps"),
    (_real(0, FP32, hint="0: no clipping"), "clip_grad"),
    (
        _real(0, 2.0**64, above=True, hint="leave it out for a scale that follows the gradients"),
        "loss_scale",
    ),
    (_real(0, 2.0**64, above=True), "initial_loss_scale min_loss_scale qk_clip_threshold"),
    (_real(1, NEVER), "loss_scale_window"),
    (_integer(1), "hysteresis"),
    # numpy takes 32 bits, and each pipeline stage adds a hundred; Megatron refuses 0.
    (_integer(1, 4_000_000_000), "seed"),
    (_integer(0, 4_000_000_000), "fault_injector_seed"),
    # Seconds, minutes, processes.
    (_integer(1, 1_000_000), "distributed_timeout_minutes"),
    (_integer(1, 60_000_000), "distributed_timeout_seconds_after_init"),
    (_real(0, 1e9, hint="seconds; 0: never"), "hang_timeout"),
    (_integer(1), "max_rows min_pixels max_pixels max_prompt_length"),
    (_integer(0, 4096), "data_workers"),
    (_integer(0, 4096), "num_workers"),
    (_integer(-20, 19), "async_ckpt_cpu_priority"),
    (_integer(0, 3), "async_ckpt_io_priority"),
    (_integer(1, 65535), "straggler_ctrlr_port"),
    (_integer(0, 100), "logging_level"),
    (_integer(0, NEVER), "flight_recorder_trace_buffer_size error_injection_rate"),
    (_integer(1, SIZE), "fault_injector_num_ranks"),
    (_integer(0), "fault_injector_delay_start_iteration"),
    (
        _real(0, 1e9),
        "fault_injector_fault_delay fault_injector_mtti_seconds fault_injector_offset_seconds",
    ),
    # Kernels, offloading, low precision.
    (
        _integer(0, SIZE),
        "wgrad_deferral_limit cpu_offloading_num_layers num_layers_at_start_in_bf16 fp8_margin "
        "num_layers_at_end_in_bf16 fine_grained_offloading_max_inflight_offloads",
    ),
    (_integer(0, 2**62), "min_offloaded_tensor_size delta_offload_bytes_across_pp_ranks"),
    (_real(0, 1), "activation_offload_fraction optimizer_offload_fraction qk_clip_alpha"),
    (
        _integer(1, SIZE),
        "fp8_interval fp8_amax_history_len moe_paged_stash_page_size moe_flex_dispatcher_num_sms "
        "moe_deepep_num_sms moe_hybridep_num_sms moe_hybridep_num_blocks_permute "
        "moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms_preprocessing",
    ),
    (
        _real(0, 1000),
        "moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_buffer_size_factor_cpu",
    ),
    # These are lists of what may be given.
    (_integer(0, 100), "flash_attention_version empty_unused_memory_level timing_log_level"),
)
RANGES: dict[str, Number] = {name: number for number, names in _TABLE for name in names.split()}
# Flags of the tools under scripts/; where Megatron's parser has one of that name, it is another.
TOOL_RANGES: dict[str, Number] = {
    "rows": _integer(0),
    "iteration": _integer(1),
    "max_new_tokens": _integer(1),
    "limit": _integer(1),
    "num_speculative_tokens": _integer(1, 64),
    "temperature": _real(0, 1000, hint="0: the most probable token"),
    "top_p": _real(0, 1, above=True),
    "top_k": _integer(0, hint="0: all tokens"),
}


# Of what is sampled: no training, whose seed grows with each pipeline stage.
SEED = _integer(0, 2**63 - 1)


def apply_ranges(parser: argparse.ArgumentParser, **own: Number) -> None:
    """Let the parser read each flag of the tables by its range, and take no empty word for any flag.

    Args:
        parser: all of its flags are there.
        own: ranges that hold for this parser alone, by destination name.
    """
    ranges = RANGES | own
    for action in parser._actions:
        if action.nargs == 0:
            continue
        if action.type in (int, float) and action.dest in ranges:
            action.type = ranges[action.dest]
        elif action.type in (None, str):
            action.type = Text(action.default == "")
        elif callable(action.type) and action.type not in (int, float):
            action.type = Other(action.type)


def read_options(
    parser: argparse.ArgumentParser, words: Sequence[str] | None = None, **own: Number
) -> argparse.Namespace:
    """The command line of a tool: numbers in their ranges, and what is wrong told in one line, status 2.

    Args:
        parser: all of its flags are there.
        words: without the program's name; `sys.argv[1:]` by default.
        own: as for `apply_ranges`.
    """

    def error(message: str) -> NoReturn:
        print(f"error: {message.removeprefix('argument ')}", file=sys.stderr)
        raise SystemExit(2)

    apply_ranges(parser, **(TOOL_RANGES | own))
    setattr(parser, "error", error)  # noqa: B010
    return parser.parse_args(words)
