"""How the layers of a model are dealt to pipeline stages and virtual stages."""

from __future__ import annotations

import argparse
import math

from post_training.errors import SetupError


def virtual_stages(args: argparse.Namespace) -> int:
    """Model chunks on each pipeline rank; 1 without the interleaved schedule."""
    pp = args.pipeline_model_parallel_size
    if args.pipeline_model_parallel_layout is not None:
        return max(1, _stages_of(args.pipeline_model_parallel_layout) // pp)
    if args.num_virtual_stages_per_pipeline_rank is not None:
        return int(args.num_virtual_stages_per_pipeline_rank)
    if args.num_layers_per_virtual_pipeline_stage is not None:
        return max(1, args.num_layers // pp // args.num_layers_per_virtual_pipeline_stage)
    return 1


def _stages_of(layout: str) -> int:
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    try:
        return int(PipelineParallelLayerLayout.get_num_stages_from_str(layout))
    except AssertionError as error:
        raise SetupError(f"--pipeline-model-parallel-layout {layout}: {error}") from error


def divide_layers(args: argparse.Namespace) -> list[list[int]]:
    """The layers of each pipeline stage, counted from 0, where `check_layers` has nothing against it."""
    pp, chunks = args.pipeline_model_parallel_size, virtual_stages(args)
    stages: list[list[int]] = [[] for _ in range(pp)]
    if args.pipeline_model_parallel_layout is not None:
        from megatron.core.transformer.enums import LayerType
        from megatron.core.transformer.pipeline_parallel_layer_layout import (
            PipelineParallelLayerLayout,
        )

        layout = PipelineParallelLayerLayout(args.pipeline_model_parallel_layout, pp).layout
        counts = [[part.count(LayerType.decoder) for part in stage] for stage in layout]
    else:
        first, last = args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers
        ends = [count for count in (first, last) if count is not None]
        middle = (args.num_layers - sum(ends)) // max(1, pp - len(ends))
        of_stage = [middle] * pp
        if first is not None:
            of_stage[0] = first
        if last is not None:
            of_stage[-1] = last
        counts = [[count // chunks] * chunks for count in of_stage]
    begin = 0
    for chunk in range(chunks):
        for stage in range(pp):
            count = counts[stage][chunk]
            stages[stage] += range(begin, begin + count)
            begin += count
    return stages


def check_layers(args: argparse.Namespace) -> None:
    """Refuse layers that the pipeline stages cannot share out.

    Raises:
        SetupError: naming the flag and what would work.
    """
    layers, pp = args.num_layers, args.pipeline_model_parallel_size
    if args.pipeline_model_parallel_layout is not None:
        stages = _stages_of(args.pipeline_model_parallel_layout)
        if stages % pp:
            raise SetupError(
                f"--pipeline-model-parallel-layout: {stages} stages cannot be divided by "
                f"--pipeline-model-parallel-size {pp}; sizes that work: {divisors(stages, 64)}"
            )
        _check_layout_layers(args)
        return
    if not layers:
        return
    ends = {
        f"--decoder-{end}-pipeline-num-layers": getattr(args, f"decoder_{end}_pipeline_num_layers")
        for end in ("first", "last")
    }
    ends = {flag: count for flag, count in ends.items() if count is not None}
    if not ends and layers % pp:
        raise SetupError(
            f"--pipeline-model-parallel-size {pp}: the model's {layers} layers cannot be divided by it; "
            f"sizes that work: {divisors(layers, 64)} (or give --decoder-first-pipeline-num-layers "
            f"or --decoder-last-pipeline-num-layers)"
        )
    if ends:
        given = " and ".join(f"{flag} {count}" for flag, count in ends.items())
        middle_layers, middle_stages = layers - sum(ends.values()), pp - len(ends)
        works = (
            pp > 1
            and min(ends.values()) > 0
            and (
                middle_layers == 0
                if middle_stages == 0
                else middle_layers > 0 and middle_layers % middle_stages == 0
            )
        )
        if not works:
            raise SetupError(
                f"{given}: {middle_layers} of the model's {layers} layers are left for "
                f"{middle_stages} other pipeline stages, which must take equal shares of at least one "
                f"layer"
            )


def _check_layout_layers(args: argparse.Namespace) -> None:
    """`--pipeline-model-parallel-layout` names each layer once: E (embedding), t (layer), L (loss)."""
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    text, layers = args.pipeline_model_parallel_layout, args.num_layers
    try:
        parsed = PipelineParallelLayerLayout(text, args.pipeline_model_parallel_size)
        found = parsed.flatten_layout.count(LayerType.decoder)
        if found != layers:
            raise SetupError(
                f"--pipeline-model-parallel-layout {text}: has {found} layers (t), the model has {layers}"
            )
        parsed.validate_layer_layout(layers, None)
    except AssertionError as error:
        raise SetupError(f"--pipeline-model-parallel-layout {text}: {error}") from error


def check_virtual_stages(args: argparse.Namespace) -> None:
    """Refuse virtual stages that the layers of a stage cannot be cut into.

    Raises:
        SetupError: naming the flag and what would work.
    """
    pp, layers = args.pipeline_model_parallel_size, args.num_layers
    per_chunk = args.num_layers_per_virtual_pipeline_stage
    chunks = args.num_virtual_stages_per_pipeline_rank
    group = args.microbatch_group_size_per_vp_stage
    if group is not None and virtual_stages(args) == 1:
        raise SetupError(
            f"--microbatch-group-size-per-virtual-pipeline-stage {group}: there are no virtual stages, so "
            f"it does nothing; leave it out, or give --num-virtual-stages-per-pipeline-rank"
        )
    if per_chunk is None and chunks is None:
        return
    if None not in (per_chunk, chunks) or args.pipeline_model_parallel_layout is not None:
        raise SetupError(
            "--num-layers-per-virtual-pipeline-stage, --num-virtual-stages-per-pipeline-rank and "
            "--pipeline-model-parallel-layout: give one of them"
        )
    ends = [args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers]
    ends = [count for count in ends if count is not None]
    if per_chunk is not None:
        flag = f"--num-layers-per-virtual-pipeline-stage {per_chunk}"
        if ends:
            raise SetupError(
                f"{flag}: with --decoder-first-pipeline-num-layers or --decoder-last-pipeline-num-layers "
                f"give --num-virtual-stages-per-pipeline-rank in its place"
            )
        if per_chunk < 1 or (layers // pp) % per_chunk:
            raise SetupError(
                f"{flag}: the {layers // pp} layers of a pipeline stage cannot be cut into pieces of it; "
                f"numbers that work: {divisors(layers // pp, 64)}"
            )
        chunks = layers // pp // per_chunk
    else:
        flag = f"--num-virtual-stages-per-pipeline-rank {chunks}"
        counts = [*ends]
        if pp > len(ends):
            counts.append((layers - sum(ends)) // (pp - len(ends)))
        for count in counts:
            if chunks < 1 or count % chunks:
                raise SetupError(
                    f"{flag}: the {count} layers of a pipeline stage cannot be cut into {chunks} pieces; "
                    f"numbers that work: {divisors(math.gcd(*counts), 64)}"
                )
    least = 2 if args.overlap_p2p_comm else 3
    if chunks > 1 and pp < least:
        raise SetupError(
            f"{flag} with --pipeline-model-parallel-size {pp}: the interleaved schedule needs {least} "
            f"pipeline ranks or more" + (" (2 with overlapped communication)" if least == 3 else "")
        )


def divisors(number: int, limit: int) -> str:
    """The divisors of `number` up to `limit`, for a message."""
    return ", ".join(str(d) for d in range(1, min(number, limit) + 1) if number % d == 0)
