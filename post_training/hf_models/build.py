"""Builds the model of a run from its own class of `transformers`, in the place of Megatron's builder.

    from_config on the meta device ─ HFModel ─ FullyShardedModel ─ memory for this rank's shards ─ weights

No process ever holds more of the model on the host than one parameter.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from megatron.core.utils import unwrap_model
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.base import ModelBuilder
from megatron.training.models.dist_utils import unimodal_build_distributed_models
from megatron.training.models.gpt import GPTModelConfig
from torch.distributed.checkpoint import FileSystemReader

from post_training.adapters.injected import fill_factors, inject
from post_training.adapters.layers import save_factors_only
from post_training.adapters.settings import LoraSettings
from post_training.checkpoint.store import Checkpoint
from post_training.checkpoint.torch_dcp import MODEL_PREFIX
from post_training.errors import SetupError
from post_training.hf.causal_lm import (
    build_model,
    check_weights,
    complete,
    fill_from_folder,
    state_names,
)
from post_training.hf.folder import local_model_folder
from post_training.hf_models.model import HFModel
from post_training.hf_models.vision import freeze
from post_training.machine.device import current_device


@dataclass
class HFModelConfig(GPTModelConfig):
    """What `pretrain()` builds a `transformers` model from; all but the size is in `hf_config`."""

    builder: ClassVar[str] = "post_training.hf_models.build.HFModelBuilder"
    hf_config: Any = None
    trust_remote_code: bool = False
    weights: Path | None = None
    """The folder that fills the model; None: a checkpoint will, or `seed` has."""
    seed: int | None = None
    """Of random weights."""
    frozen: str | None = None
    """A part that is not trained, as `--freeze` names it."""
    lora: LoraSettings | None = None
    """The factors that alone are trained."""
    lora_dropout: float = 0.0
    lora_seed: int = 0
    lora_adapter: str | None = None
    """An adapter of PEFT that they begin with."""
    say: Callable[[str], None] | None = None
    """Tells the user what was found, on rank 0."""


def hf_model_config(
    args: argparse.Namespace,
    checkpoint: Checkpoint | None,
    say: Callable[[str], None] | None = None,
) -> HFModelConfig:
    """The configuration of a run's model.

    Args:
        args: validated arguments.
        checkpoint: what will be loaded, if anything.
        say: tells the user how documents are kept apart.
    """
    plain = gpt_config_from_args(args)
    known = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
    if args.fsdp_compute_dtype is not None:
        plain.transformer.autocast_dtype = args.fsdp_compute_dtype
    plain.transformer.fsdp_sharding = args.fsdp_sharding
    anew = checkpoint is None and args.hf_config is not None
    of_folder = anew and not args.random_weights
    return HFModelConfig(
        **known,
        hf_config=args.hf_config,
        trust_remote_code=args.trust_remote_code,
        weights=local_model_folder(args.hf_model) if of_folder or args.lora is not None else None,
        seed=args.seed if anew and args.random_weights else None,
        frozen=args.freeze,
        lora=args.lora,
        lora_dropout=args.lora_dropout or 0.0,
        lora_seed=args.seed,
        lora_adapter=args.lora_adapter if checkpoint is None else None,
        say=say,
    )


class HFModelBuilder(ModelBuilder[HFModel, HFModelConfig]):
    """Builds what an `HFModelConfig` describes."""

    _model_config: HFModelConfig

    def build_model(
        self,
        pg_collection: Any,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> HFModel:
        """The whole model, without memory unless its weights are random."""
        config = self._model_config
        transformer: Any = config.transformer
        if config.seed is not None:
            torch.manual_seed(config.seed)
        model = build_model(
            config.hf_config,
            # A frozen base is kept as it is computed; factors are of fp32 whatever it is.
            dtype=transformer.params_dtype if config.lora is None else transformer.autocast_dtype,
            device="meta" if config.seed is None else "cpu",
            trust_remote_code=config.trust_remote_code,
        )
        if transformer.recompute_granularity == "full":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        freeze(model, config.frozen)
        if config.lora is None:
            return self.wrapped(model, pg_collection)
        inject(model, config.hf_config, config.lora, config.lora_dropout)
        wrapper = self.wrapped(model, pg_collection)
        save_factors_only(wrapper)
        return wrapper

    def wrapped(self, model: Any, pg_collection: Any) -> Any:
        """The model as Megatron's schedule takes it."""
        config = self._model_config
        return HFModel(config.transformer, model, pg_collection, config.say)

    def build_distributed_models(
        self,
        pg_collection: Any,
        ddp_config: Any = None,
        overlap_param_gather_with_optimizer_step: bool = False,
        use_megatron_fsdp: bool = False,
        use_torch_fsdp2: bool = False,
        wrap_with_ddp: bool = True,
        data_parallel_random_init: bool = True,
        mixed_precision_wrapper: Any = None,
        model_type: Any = None,
    ) -> list[Any]:
        """Shard it, and give each rank its part of the weights."""
        config = self._model_config
        chunks = unimodal_build_distributed_models(
            self.build_model,
            config.transformer,
            pg_collection,
            ddp_config,
            use_torch_fsdp2=True,
            # Not only to be trained: `--eval-only` may be of a model that no process can hold.
            wrap_with_ddp=wrap_with_ddp or use_torch_fsdp2,
            mixed_precision_wrapper=None,
        )
        (wrapped,) = unwrap_model(chunks)
        if config.seed is not None:
            wrapped.to(current_device())
            return chunks
        wrapped.to_empty(device=current_device())
        complete(wrapped.model, config.hf_config, trust_remote_code=config.trust_remote_code)
        if config.weights is not None:
            fill_from_folder(wrapped.model, config.weights)
        if config.lora is not None:
            begin = config.lora, config.lora_seed, config.lora_adapter
            fill_factors(wrapped.model, config.hf_config, *begin)
        return chunks


def check_model(args: argparse.Namespace, checkpoint: Checkpoint | None) -> None:
    """Look at the weights, or at the checkpoint in their place, before any process group starts.

    Raises:
        SetupError: they are not those of the model that config.json describes.
    """
    trust = args.trust_remote_code
    try:
        model = build_model(args.hf_config, trust_remote_code=trust)
    except Exception as error:  # whatever its class makes of values that it cannot compute
        reason = " ".join(str(error).split()) or "no reason given"
        raise SetupError(
            f"--hf-model {args.hf_model}: config.json cannot be built ({type(error).__name__}: {reason})"
        ) from error
    if args.recompute_granularity and not model.supports_gradient_checkpointing:
        raise SetupError(
            f"--recompute-granularity full: {type(model).__name__} has no gradient checkpointing"
        )
    if args.task is None:  # whose rows are of any length
        _check_length(model, args.seq_length)
    if (checkpoint is None and not args.random_weights) or args.lora is not None:
        check_weights(local_model_folder(args.hf_model), args.hf_config, model)
    if args.lora is not None:
        inject(model, args.hf_config, args.lora, args.lora_dropout or 0.0)
    if checkpoint is None:
        return
    inside = f"{MODEL_PREFIX}model."
    metadata = FileSystemReader(checkpoint.path).read_metadata().state_dict_metadata
    there = {
        key.removeprefix(inside): tuple(getattr(value, "size", ()))
        for key, value in metadata.items()
        if key.startswith(inside)
    }
    held = state_names(model)
    if args.lora is not None:
        held = {name: p for name, p in model.named_parameters() if p.requires_grad}
    here = {name: tuple(tensor.shape) for name, tensor in held.items()}
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            raise SetupError(
                f"{checkpoint.path} is another model's checkpoint: {name} is "
                f"{there.get(name, 'not there')}, config.json says {here.get(name, 'not there')}"
            )


def _check_length(model: Any, seq_length: int) -> None:
    """Refuse documents that the positions of a model do not reach, or that change each other's.

    Raises:
        SetupError: naming the longest.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    tables = [
        module.num_embeddings
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding) and module is not model.get_input_embeddings()
    ]
    # Some have a row or two more.
    if limit is not None and seq_length > limit and any(0 <= n - limit <= 2 for n in tables):
        raise SetupError(
            f"--seq-length {seq_length}: {type(model).__name__} has learned {limit} positions; use "
            f"--seq-length {limit} or less"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    for each in [rope, *(part for part in rope.values() if isinstance(part, dict))]:
        original = each.get("original_max_position_embeddings") or limit
        if each.get("rope_type") in ("dynamic", "longrope") and seq_length > (
            original or seq_length
        ):
            raise SetupError(
                f"--seq-length {seq_length}: rope type {each['rope_type']} has other frequencies for all "
                f"documents of a row where one is longer than {original}; use --seq-length "
                f"{original} or less"
            )
