"""Writes a run's checkpoint, of any parallel layout, as a HuggingFace folder; with --draft only its draft.

python scripts/export_hf.py --output-dir runs/first --to runs/first/hf
python scripts/export_hf.py --output-dir runs/lora --adapter

Of a run with --lora-rank the whole model with its factors merged, or with --adapter these alone, as PEFT
stores them.

One process on the CPU; the result is reloaded with transformers and its logits are compared with the
Megatron model's before it is moved into place. A draft's base is run for that, and must be there.
"""

# ruff: noqa: E402 - the device must be chosen before torch is imported

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# The whole model must fit: host memory is the larger one, and the GPUs may be training.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from post_training import platform

platform.apply()

from model_provider import model_config
from post_training.arguments.ranges import read_options
from post_training.errors import SetupError
from post_training.export.adapter import check_peft, export_adapter, merge
from post_training.export.card import make_repository, push, serve_line, write_card
from post_training.export.draft import export_draft
from post_training.export.hf import DTYPES, export_hf, shard_size
from post_training.files import config_of_run
from post_training.hf.check import check_hf_weights
from post_training.hf.config import load_hf_config
from post_training.hf.folder import check_export, local_model_folder
from post_training.inference.load import load_model
from post_training.inference.quiet import hush, quiet_libraries


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output-dir", required=True, help="folder of the run")
    parser.add_argument("--to", help="folder to write (default: OUTPUT_DIR/hf, /draft or /adapter)")
    parser.add_argument("--iteration", type=int, help="checkpoint to export (default: the newest)")
    parser.add_argument(
        "--checkpoints",
        help="folder it lies in (default: OUTPUT_DIR/checkpoints, else what --save was)",
    )
    parser.add_argument(
        "--max-shard-size", type=shard_size, default="5GB", help="largest safetensors file"
    )
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="of the weights (default: the run's precision)"
    )
    parser.add_argument(
        "--base", help="of a draft: where its base lies now (default: the run's --hf-model)"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--adapter", action="store_true", help="the factors of --lora-rank, for PEFT")
    what.add_argument(
        "--merge", action="store_true", help="a whole model with the factors merged (default)"
    )
    parser.add_argument(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="upload the export to this repository of the hub",
    )
    parser.add_argument("--public", action="store_true", help="make that repository for everybody")
    options = read_options(parser)
    hush()
    run = Path(options.output_dir)
    config = config_of_run(run)
    name = "draft" if config.get("draft") else "adapter" if options.adapter else "hf"
    target = options.to or str(run / name)
    try:
        check_export(Path(target), run, name)
        for flag in ("adapter", "merge"):
            if getattr(options, flag) and not (
                config.get("lora_rank") or config.get("lora_adapter")
            ):
                raise SetupError(f"--{flag}: {run} was trained without --lora-rank, as a whole")
        if options.adapter:
            check_peft()
        if options.base and not config.get("draft"):
            raise SetupError(f"--base: {run} trained no draft")
        if config.get("draft"):
            try:
                base = local_model_folder(options.base or config["hf_model"])
            except SetupError as error:
                raise SetupError(
                    f"{error}; --base FOLDER says where the draft's base lies"
                ) from error
            check_hf_weights(base, load_hf_config(str(base)))
        if options.public and not options.push_to_hub:
            raise SetupError("--public does nothing without --push-to-hub; add it")
        if options.push_to_hub:
            make_repository(options.push_to_hub, private=not options.public)
        with quiet_libraries():
            loaded = load_model(
                model_config,
                output_dir=options.output_dir,
                iteration=options.iteration,
                checkpoints=options.checkpoints,
            )
        args = loaded.args
        dtype = DTYPES.get(options.dtype)
        chunks, loaded.model = [loaded.model], None
        if name == "draft":
            how = f"behind {base} as a server runs it, logits of all steps agree"
            difference = export_draft(
                *(chunks.pop(), args, loaded.tokenizer, target),
                base=base,
                model_config=model_config,
                dtype=dtype,
            )
        elif name == "adapter":
            how = f"put on {args.hf_model} by peft, logits agree"
            dropout = config.get("lora_dropout") or 0.0
            difference = export_adapter(
                chunks, args, loaded.tokenizer, target, dropout=dropout, dtype=dtype
            )
        else:
            how = "reloaded with transformers, logits agree"
            merge(chunks[0], rounded=dtype is None)
            difference = export_hf(
                chunks,
                args.hf_config,
                loaded.tokenizer,
                target,
                hf_model=args.hf_model,
                hf_tokenizer=args.hf_tokenizer,
                trust_remote_code=args.trust_remote_code,
                dtype=dtype,
                max_shard_size=options.max_shard_size,
            )
        step = int(Path(loaded.source).name.removeprefix("iter_"))
        write_card(Path(target), run, step, name)
        print(
            f"{loaded.source} -> {target}: {how} within {difference:.1e} of the largest one\n"
            f"{serve_line(target, name, config)}"
        )
        if options.push_to_hub:
            print(push(Path(target), options.push_to_hub))
    except (SetupError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
