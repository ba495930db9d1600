"""Builds every pipeline stage of a recipe's model at its real size, on tensors without memory.

    python -m tests.recipes.stages [FILE...]     a table of all recipes: stages, parameters, time

A stage is that of tensor parallel rank 0, in a process group that exchanges nothing; flags, layout and
model go through what a run checks before its first collective.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

FOLDER = Path(__file__).resolve().parent
CONF = Path(__file__).resolve().parents[2] / "scripts/conf"
RECIPES = [f for f in sorted(CONF.glob("*/*.yaml")) if f.parent.name != "vlm"]


def processes(recipe: Path) -> int:
    """GPUs of the layout that a recipe is for: `NAME.2x8.yaml` says two nodes of eight."""
    nodes = re.search(r"\.(\d+)x8\.yaml$", recipe.name)
    return 8 * int(nodes[1]) if nodes else 8


def facts(name: str) -> dict[str, Any]:
    """Architecture and parameters of a model of the hub, with their source."""
    file = FOLDER / f"{name.replace('/', '--')}.json"
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def parsed(recipe: Path, folder: Path) -> Any:
    """Arguments of a run by a recipe, whose model has a configuration and no weights."""
    from post_training.arguments.command_line import CommandLine
    from post_training.arguments.parser import parse_arguments

    name = CommandLine(["--config", str(recipe)]).recipe.settings["hf_model"]
    (folder / "config.json").write_text(json.dumps(facts(name)["config"]))
    words = ["--config", str(recipe), "--hf-model", str(folder)]
    return parse_arguments(
        [*words, "--output-dir", str(folder / "out"), "--finetune-data-files", "rows.jsonl"]
    )


def built(names: Sequence[str]) -> list[tuple[int, int, int]]:
    """`parameters` of some recipes of `scripts/conf`."""
    return [parameters(CONF / f"{name}.yaml") for name in names]


def parameters(recipe: Path) -> tuple[int, int, int]:
    """Those of the whole model counted from all stages, the matrices of its adapter, and the stages."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from model_provider import model_config
    from post_training.arguments.completion import complete_run, validate

    world = processes(recipe)
    os.environ["WORLD_SIZE"] = str(world)
    total, factors = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        args = parsed(recipe, Path(folder))
        args.random_weights = True  # there are no files
        complete_run(
            args, load=None, ckpt_step=None, finetune=False, by_modelopt=False, train_iters=1000
        )
        validate(args)
        config = model_config(args, None)
        config.transformer.init_model_with_meta_device = True  # tied weights are not exchanged
        stages = args.pipeline_model_parallel_size
        assert args.virtual_pipeline_model_parallel_size is None
        for stage in range(stages):
            rank = stage * (world // stages)
            torch.distributed.init_process_group(
                "fake", rank=rank, world_size=world, store=FakeStore()
            )
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=args.tensor_model_parallel_size,
                pipeline_model_parallel_size=stages,
                context_parallel_size=args.context_parallel_size,
                expert_model_parallel_size=args.expert_model_parallel_size,
                expert_tensor_parallel_size=args.expert_tensor_parallel_size,
                create_gloo_process_groups=False,
            )
            model_parallel_cuda_manual_seed(1)
            builder = config.get_builder_cls()(config)
            groups = ProcessGroupCollection.use_mpu_process_groups()
            with torch.device("meta"), mock.patch("torch.cuda.current_device", _no_memory):
                model = builder.build_model(groups, stage == 0, stage == stages - 1)
            for hook in config.pre_wrap_hooks:
                hook([model])
            for key, parameter in model.named_parameters():
                assert parameter.is_meta or parameter.requires_grad, key
                count = parameter.numel() * _ranks(parameter, args)
                if "word_embeddings" in key or "output_layer" in key:
                    count -= (args.padded_vocab_size - args.vocab_size) * args.hidden_size
                if args.lora is not None and parameter.requires_grad:
                    factors += 1
                elif stage == 0 or args.untie_embeddings_and_output_weights or not _is_tied(key):
                    total += count
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()
    return total, factors, stages


def _no_memory() -> torch.device:
    return torch.device("meta")


def _ranks(parameter: torch.nn.Parameter, args: Any) -> int:
    """How many different parts of a parameter's kind there are in its stage."""
    tp, expert = args.tensor_model_parallel_size, not getattr(parameter, "allreduce", True)
    if expert:
        tp = args.expert_tensor_parallel_size
    parts = tp if getattr(parameter, "tensor_model_parallel", False) else 1
    return parts * (args.expert_model_parallel_size if expert else 1)


def _is_tied(key: str) -> bool:
    return key == "output_layer.weight"


def show(recipes: Sequence[Path]) -> None:
    """Print a line for each recipe."""
    for recipe in recipes:
        began = time.monotonic()
        whole, factors, stages = parameters(recipe)
        name = recipe.relative_to(CONF)
        print(f"{name} {processes(name)} {whole} {factors} {stages}", file=sys.stderr, end="")
        print(f" {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    import finetune  # noqa: F401 - the platform layer must be in place before Megatron is imported

    os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), "0")
    show([Path(word).resolve() for word in sys.argv[1:]] or RECIPES)
