"""What goes with an exported model: its card, the line that serves it, and the way to the hub."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from post_training.errors import SetupError
from post_training.files import config_of_run
from post_training.metrics.records import DATA_REPORT, STARTS, records_of

KINDS = {
    "hf": ("transformers", "a finetuned model"),
    "adapter": ("peft", "a LoRA adapter"),
    "draft": ("transformers", "a draft model for speculative decoding"),
}


def serve_line(folder: str | Path, kind: str, config: dict[str, Any]) -> str:
    """The command that serves an export with vLLM.

    Args:
        folder: of the export.
        kind: of `KINDS`.
        config: of the run.
    """
    if kind == "hf":
        return shlex.join(["vllm", "serve", str(folder)])
    words = ["vllm", "serve", str(config.get("hf_model"))]
    if kind == "adapter":
        rank = json.loads((Path(folder) / "adapter_config.json").read_text())["r"]
        words += ["--enable-lora", "--lora-modules", f"mine={folder}"]
        return shlex.join([*words, "--max-lora-rank", str(max(16, 2 ** (rank - 1).bit_length()))])
    draft = {"method": "eagle3", "model": str(folder), "num_speculative_tokens": 4}
    return shlex.join([*words, "--speculative-config", json.dumps(draft)])


def write_card(folder: Path, run: Path, iteration: int, kind: str) -> None:
    """Write README.md of an export: base, data, masks, steps, losses, versions and the command.

    Args:
        folder: of the export.
        run: output folder that it is of.
        iteration: of the checkpoint.
        kind: of `KINDS`.
    """
    config, starts = config_of_run(run), records_of(run, STARTS)
    library, what = KINDS[kind]
    base = str(config.get("hf_model") or "")
    records = [record for record in records_of(run) if record["iteration"] <= iteration]
    steps = [record for record in records if isinstance(record.get("lm_loss"), int | float)]
    head = {"library_name": library, "tags": ["sft", "megatron"]}
    if base.count("/") == 1 and not Path(base).exists():
        head["base_model"] = base  # the hub shows a name that is one of its own
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", ""]
    lines += [f"# {run.resolve().name}", "", f"This is {what}, step {iteration} of a finetuning."]
    facts: dict[str, Any] = {
        "base": f"`{base}`",
        "steps": f"{iteration} of {config.get('train_iters')}",
        "tokens a pack, packs a step": f"{config.get('seq_length')}, {config.get('global_batch_size')}",
        "learning rate": f"{config.get('lr')} ({config.get('lr_decay_style')})",
        "masks": _masks(config),
    }
    if steps:
        trained = steps[-1].get("total_trained_tokens")
        facts["trained tokens"] = f"{trained:,}" if isinstance(trained, int) else "unknown"
        facts["training loss"] = f"{steps[0]['lm_loss']:.4f} at step {steps[0]['iteration']}, " + (
            f"{steps[-1]['lm_loss']:.4f} at step {steps[-1]['iteration']}"
        )
    for split in ("valid", "test"):
        found = [
            r for r in records if r.get("split") == split and isinstance(r.get("loss"), int | float)
        ]
        if found:
            facts[f"{split} loss"] = f"{found[-1]['loss']:.4f} at step {found[-1]['iteration']}"
    if starts and isinstance(starts[-1].get("versions"), dict):
        facts["versions"] = ", ".join(f"{k} {v}" for k, v in starts[-1]["versions"].items())
    lines += ["", "| | |", "|---|---|", *(f"| {k} | {_cell(v)} |" for k, v in facts.items()), ""]
    data = run / DATA_REPORT
    if data.is_file():
        lines += ["## Data", "", *_fenced(data.read_text(encoding="utf-8", errors="replace")), ""]
    if starts:
        lines += ["## Command", "", *_fenced(str(starts[-1].get("command"))), ""]
    lines += ["## Use", "", *_fenced(serve_line(folder, kind, config)), ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _masks(config: dict[str, Any]) -> str:
    """Which tokens are trained."""
    chosen = [
        f"{name}: {config[name]}"
        for name in ("loss_on", "reasoning", "overlong", "on_bad_row", "separator")
        if config.get(name) is not None
    ]
    return "; ".join(["what the assistant wrote, with the token that ends it", *chosen])


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _fenced(text: str) -> list[str]:
    """A block of code, whatever it holds."""
    fence = "`" * max(3, *(len(ticks) + 1 for ticks in re.findall("`+", text) or [""]))
    return [fence, text.rstrip("\n"), fence]


def make_repository(name: str, *, private: bool) -> None:
    """Make a model repository on the hub, where there is none: before an export, not after its hours.

    Raises:
        SetupError: the hub refuses, or does not answer.
    """
    _on_the_hub(name, lambda api: api.create_repo(name, private=private, exist_ok=True))


def push(folder: Path, name: str) -> str:
    """Upload an export, and return its address.

    Raises:
        SetupError: the hub refuses, or does not answer.
    """
    return str(_on_the_hub(name, lambda api: api.upload_folder(repo_id=name, folder_path=folder)))


def _on_the_hub(name: str, action: Any) -> Any:
    from huggingface_hub import HfApi

    try:
        return action(HfApi())
    except Exception as error:  # its HTTP client's own kinds differ between releases
        reason = " ".join(str(error).split())[:300]
        raise SetupError(
            f"--push-to-hub {name}: {reason or type(error).__name__} (hf auth login, or HF_TOKEN)"
        ) from error
