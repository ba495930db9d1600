"""Command line, `--config` file and HuggingFace model folder, resolved into one Megatron namespace.

Megatron's own parser is the source of truth: this module adds flags to it and sets defaults in it.
What a user writes wins over what is derived; what contradicts the model is refused.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from data.arguments import add_data_arguments
from post_training.adapters.flags import add_lora_arguments
from post_training.arguments.backend import MODEL_BACKENDS, model_backend
from post_training.arguments.command_line import CommandLine
from post_training.arguments.completion import complete_flags
from post_training.arguments.config_file import apply_settings
from post_training.arguments.defaults import fsdp2_defaults, platform_defaults, sft_defaults
from post_training.arguments.distillation import add_distillation_arguments
from post_training.arguments.ranges import apply_ranges
from post_training.arguments.refused import REFUSED, MegatronFlags
from post_training.arguments.usage import shorten_help
from post_training.errors import SetupError
from post_training.hf.config import NO_MODEL, load_hf_config, megatron_flags, plain_flags
from post_training.hf.families import family_of
from post_training.machine.kernels import (
    has_packed_kernel,
    has_transformer_engine,
)
from post_training.quantisation.formats import add_quantisation_arguments
from post_training.recipes.other_names import hint_for


def add_finetune_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add this project's flags to Megatron's parser."""
    group = parser.add_argument_group("supervised finetuning")
    group.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="flags from a recipe, or ROLL's or RLinf's file (docs/recipes.md); the command line wins",
    )
    group.add_argument(
        "--config-path",
        metavar="DIR",
        help="the folder of --config-name (default: the current one)",
    )
    group.add_argument(
        "--config-name",
        metavar="NAME",
        help="DIR/NAME.yaml in the place of --config; key=value may follow, dotted keys too",
    )
    group.add_argument(
        "--output-dir", metavar="DIR", help="where everything of this run is written"
    )
    group.add_argument(
        "--hf-model",
        metavar="PATH_OR_NAME",
        help="HuggingFace folder or hub name: architecture, tokenizer and weights come from it",
    )
    group.add_argument(
        "--model-backend",
        choices=MODEL_BACKENDS,
        default="auto",
        help="what computes --hf-model: Megatron's layers in any parallel layout, or its own class of "
        "transformers under --use-torch-fsdp2 (default auto: Megatron where it has the architecture)",
    )
    group.add_argument(
        "--freeze",
        choices=("vision",),
        help="leave the part of the model that sees, with its merger of patches, as it is",
    )
    group.add_argument(
        "--fsdp-sharding",
        choices=("full", "none"),
        default="full",
        help="none: every process of --use-torch-fsdp2 holds the whole model; gradients are summed",
    )
    group.add_argument(
        "--hf-tokenizer",
        metavar="PATH_OR_NAME",
        help="another tokenizer than the model's (or the only one, with Megatron flags)",
    )
    group.add_argument(
        "--random-weights",
        action="store_true",
        help="take only architecture and tokenizer from --hf-model and start from random weights",
    )
    group.add_argument(
        "--num-epochs",
        type=int,
        metavar="N",
        help="train for N passes over the data instead of --train-iters",
    )
    group.add_argument(
        "--save-hf",
        action="store_true",
        help="write OUTPUT_DIR/hf, a HuggingFace folder, when training ends",
    )
    group.add_argument(
        "--eval-only",
        action="store_true",
        help="evaluate the validation and test data and leave: no training, no optimizer",
    )
    group.add_argument(
        "--answer-tokens",
        type=int,
        metavar="N",
        help="let the model, computed by its own class of transformers, answer each row that is "
        "evaluated, in N tokens at most: eval_accuracy, also of each kind, and OUTPUT_DIR/answers",
    )
    group.add_argument(
        "--eval-at-start",
        action="store_true",
        help="evaluate the validation data before the first step too",
    )
    group.add_argument(
        "--mlflow-experiment",
        metavar="NAME",
        help="log to MLflow too: to MLFLOW_TRACKING_URI, or into the output folder",
    )
    group.add_argument(
        "--isolation-check",
        action="store_true",
        default=True,
        help="before the first step, see that a changed document moves no other's loss (default)",
    )
    group.add_argument(
        "--no-isolation-check", dest="isolation_check", action="store_false", help="do not look"
    )
    group.add_argument(
        "--hang-timeout",
        type=float,
        metavar="SECONDS",
        help="end the job when a rank makes no progress for so long, six times as long in set-up, the "
        "first step and saving (default: --distributed-timeout-minutes; 0: never)",
    )
    group.add_argument(
        "--keep-checkpoints",
        type=int,
        metavar="N",
        help="keep the newest N complete checkpoints and remove older ones (default: keep all)",
    )
    group.add_argument(
        "--restart-data",
        action="store_true",
        help="where the checkpoint was saved in other data: keep its weights, optimizer and step, and "
        "begin this data at its beginning",
    )
    group.add_argument(
        "--task",
        metavar="FILE.py:CLASS",
        help="train a task of your own: a class with build_dataloader, get_train_model_output and "
        "get_eval_model_output (docs/your_own_task.md)",
    )
    group.add_argument(
        "--early-stop-metric",
        metavar="NAME",
        help="keep the checkpoint of the evaluation on the validation data that is best by this number "
        "of metrics.jsonl: loss, token_accuracy, eval_accuracy ...",
    )
    group.add_argument(
        "--early-stop-patience",
        type=int,
        metavar="N",
        help="end after N evaluations that are no better than the best (default: never)",
    )
    group.add_argument(
        "--only",
        choices=("check", "prepare"),
        help="check the flags, or prepare the data too, and leave; WORLD_SIZE says for how many processes, "
        "SFT_DEVICE=cuda that these will have GPUs",
    )
    group.add_argument("--fp32", action="store_true", help="train in fp32 on a GPU (default: bf16)")
    group.add_argument(
        "--no-progress", action="store_true", help="no progress bar, a line every --log-interval"
    )
    add_distillation_arguments(parser)
    add_lora_arguments(parser)
    add_quantisation_arguments(parser)
    add_data_arguments(parser)
    return parser


def parse_arguments(
    command: CommandLine | Sequence[str] | None = None, *, settings: Mapping[str, Any] | None = None
) -> argparse.Namespace:
    """Resolve and check all arguments; no process group is needed and none is started.

    Args:
        command: the command line, or its words without the program's name; `sys.argv[1:]` by default.
        settings: in the place of a `--config` file, what one would say.

    Returns:
        The namespace that goes into Megatron's `validate_args`. Besides Megatron's own names it holds
        this project's flags, `hf_config` (or None) and `derived` (flags that nobody wrote).

    Raises:
        SetupError: an unknown key, a missing or contradictory flag, a layout that cannot work.
    """
    from megatron.training.arguments import parse_args

    if not isinstance(command, CommandLine):
        command = CommandLine(sys.argv[1:] if command is None else command, settings)

    for word in command.argv:
        # Of "--lr=--" argparse makes an empty list.
        if word.startswith("--") and word.endswith("=--"):
            raise SetupError(f"{word[:-3]}: expected one argument")
    derived: dict[str, Any] = {}
    hf_config: Any = None
    backend, backend_reason = "megatron", None
    megatron: MegatronFlags
    architecture: dict[str, Any] = {}

    def prepare(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        nonlocal hf_config, megatron, backend, backend_reason
        megatron = MegatronFlags(parser)
        add_finetune_arguments(parser)
        apply_ranges(parser)
        shorten_help(parser)
        for action in parser._actions:
            # One of Megatron's help texts has a bare percent sign, on which argparse stumbles.
            if action.dest == "moe_paged_stash_buffer_size_factor_cuda" and action.help:
                action.help = action.help.replace("%)", "%%)").replace("%%%)", "%%)")
        setattr(parser, "error", functools.partial(refuse, parser))  # noqa: B010
        written = apply_settings(parser, command.recipe)
        if command.value("yaml_cfg", written):
            # Megatron would read it in the place of all flags.
            raise SetupError(f"--yaml-cfg is not supported: {REFUSED['yaml_cfg']}")
        name = command.value("hf_model", written)
        transformer_impl = command.value("transformer_impl", written)
        use_te = has_transformer_engine()
        if transformer_impl == "transformer_engine" and not use_te:
            raise SetupError(
                "--transformer-impl transformer_engine: Transformer Engine needs a CUDA device and "
                "its package (pip install '.[te]'); leave the flag out to use the local attention"
            )
        if use_te and transformer_impl is None:
            use_te = has_packed_kernel(fp32=bool(command.value("fp32", written)))
        derived.update(sft_defaults())
        derived.update(platform_defaults(use_te and transformer_impl != "local"))
        task = command.value("task", written)
        backend, backend_reason = model_backend(command.value("model_backend", written), name, task)
        if backend == "transformers":
            derived["use_torch_fsdp2"] = True
        if command.value("use_torch_fsdp2", written) or backend == "transformers":
            derived.update(fsdp2_defaults())
        if task and not name:
            derived.update(NO_MODEL)
        if name:
            trust = bool(command.value("trust_remote_code", written))
            hf_config = load_hf_config(name, trust_remote_code=trust, backend=backend)
            flags = plain_flags if backend == "transformers" else megatron_flags
            try:
                architecture.update(flags(hf_config))
            except (AttributeError, ArithmeticError, LookupError, TypeError, ValueError) as error:
                raise SetupError(
                    f"--hf-model {name}: config.json cannot be used ({error})"
                ) from error
            derived.update(architecture)
            if backend == "megatron" and family_of(hf_config).local:
                if transformer_impl == "transformer_engine":
                    raise SetupError(
                        f"--transformer-impl transformer_engine: {hf_config.architectures[0]} is "
                        f"computed by the local layers only; leave the flag out"
                    )
                derived.update(platform_defaults(False))
            if derived["transformer_impl"] == "transformer_engine" and "num_experts" in derived:
                # Where the GPU can, and no factors are in the way.
                derived["moe_grouped_gemm"] = None
        unknown = derived.keys() - {action.dest for action in parser._actions}
        assert not unknown, f"not flags of this Megatron: {sorted(unknown)}"
        parser.set_defaults(**{key: v for key, v in derived.items() if key not in written})
        return parser

    previous = sys.argv
    sys.argv = [previous[0], *command.argv]
    try:
        args = parse_args(prepare)
    except RuntimeError as error:  # a package that --enable-msc needs
        raise SetupError(str(error)) from error
    finally:
        sys.argv = previous

    megatron.check(args, derived, architecture)
    args.derived = sorted(key for key, value in derived.items() if getattr(args, key) == value)
    args.hf_config = hf_config
    args.model_backend, args.backend_reason = backend, backend_reason
    complete_flags(args)
    return args


def refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """Say in one line what argparse would say below hundreds of lines of usage."""
    unknown = message.removeprefix("unrecognized arguments: ")
    if unknown == message:
        raise SetupError(message.removeprefix("argument "))
    flag = unknown.split()[0] if unknown.split() else repr(unknown)
    known = [option for action in parser._actions for option in action.option_strings]
    raise SetupError(f"{flag}: no such flag{hint_for(flag.partition('=')[0], known)}")
