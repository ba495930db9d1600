"""Compares a GPU's losses with the CPU's, and measures 1B- and 8B-shaped models on it.

    python scripts/gpu_check.py                                   both parts; needs CUDA
    python scripts/gpu_check.py --sizes                           losses only
    python scripts/gpu_check.py --families --sizes 8b --gpus 8    speed of one size only
    python scripts/gpu_check.py --device cpu                      tests this script without a GPU

Losses: a tiny model of each family is finetuned for some steps by finetune.py on the CPU in fp32, then
on the GPU in fp32 and in bf16, from the same weights and rows. Speed: models of random weights train on
packs of 4096 tokens; the micro batch is the largest that fits. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from scripts.quickstart_task import VOCAB_SIZE, make_rows, make_tokenizer, write_jsonl

ROOT = Path(__file__).resolve().parent.parent
NO_CUDA = 3
SPEED_SEQ_LENGTH = 4096
# Largest relative difference of a loss that rounding explains.
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2}
# The launcher's variables and this process's choice of device are not for the runs.
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_")

Row = dict[str, Any]


class CheckError(Exception):
    """A run that did not end as it should; the message holds the end of its output."""


# --- models and data ------------------------------------------------------------------------------

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"rope_parameters": _LLAMA3_ROPE}),
    "mistral": (MistralConfig, {"head_dim": 32, "sliding_window": None}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
        },
    ),
}


@dataclass(frozen=True)
class Size:
    """Shape of a Llama model whose speed is measured."""

    hidden: int
    feed_forward: int
    layers: int
    heads: int
    groups: int
    vocabulary: int
    tied: bool

    def config(self) -> LlamaConfig:
        """The HuggingFace configuration."""
        return LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.feed_forward,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
            max_position_embeddings=SPEED_SEQ_LENGTH,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            tie_word_embeddings=self.tied,
        )

    @property
    def parameters(self) -> int:
        """Parameters, without those of the norms."""
        head_dim = self.hidden // self.heads
        attention = 2 * self.hidden * head_dim * (self.heads + self.groups)
        layer = attention + 3 * self.hidden * self.feed_forward
        return self.layers * layer + (1 if self.tied else 2) * self.vocabulary * self.hidden


# The shapes of Llama 3.2 1B and Llama 3.1 8B, from their published config.json; "tiny" is for --device cpu.
SIZES = {
    "tiny": Size(64, 192, 2, 4, 2, VOCAB_SIZE, True),
    "1b": Size(2048, 8192, 16, 32, 8, 128256, True),
    "8b": Size(4096, 14336, 32, 32, 8, 128256, False),
}


def make_family(family: str, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a tiny model of a family, in which no two parameters are alike, and its tokenizer."""
    config_class, options = FAMILIES[family]
    values: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **options,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**values), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.05)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def long_rows(rows: Sequence[Row], number: int) -> Iterator[Row]:
    """Conversations of some hundred to some thousand tokens, put together from short ones."""
    rng = random.Random(0)
    for _ in range(number):
        # Lengths spread over a factor of about 20, as those of chat data do.
        turns = round(10 * math.exp(rng.uniform(0.0, 3.0)))
        messages: list[Any] = []
        while len(messages) < turns:
            messages += [m for m in rng.choice(rows)["messages"] if m["role"] != "system"]
        yield {"messages": messages}


# --- runs -----------------------------------------------------------------------------------------


@dataclass
class Run:
    """One start of finetune.py and what it leaves behind."""

    folder: Path
    flags: list[str]
    device: str
    gpus: int = 1

    def start(self) -> subprocess.Popen[bytes]:
        """Start it; its output goes to files of the folder."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER)}
        environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if self.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        launcher = [sys.executable]
        if self.gpus > 1:
            launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(self.gpus)]
            launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
        output = ["--output-dir", str(self.folder), "--no-progress"]
        self.folder.mkdir(parents=True)
        with (self.folder / "console.txt").open("wb") as console:
            return subprocess.Popen(
                [*launcher, str(ROOT / "finetune.py"), *self.flags, *output],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
            )

    def steps(self) -> list[dict[str, Any]]:
        """Records of the steps that are complete in metrics.jsonl."""
        file = self.folder / "metrics.jsonl"
        lines = file.read_text().split("\n")[:-1] if file.is_file() else []
        return [record for record in map(json.loads, lines) if "lm_loss" in record]

    def output(self, characters: int | None = None) -> str:
        """The end of what it printed; all of it without a number."""
        texts = [
            file.read_text(errors="replace")
            for file in (self.folder / "train.log", self.folder / "console.txt")
            if file.is_file()
        ]
        return "\n".join(text[-characters:] if characters else text for text in texts)

    def peak_memory(self) -> float:
        """Most memory that torch allocated on one device, in GiB, from Megatron's log lines."""
        peaks = [
            float(line.split("max allocated: ")[1].split(" ")[0])
            for line in self.output().splitlines()
            if "max allocated: " in line
        ]
        return max(peaks, default=math.nan) / 1024

    def losses(self, timeout: float) -> list[float]:
        """Run to the end.

        Raises:
            CheckError: it failed, or took too long.
        """
        process = self.start()
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise CheckError(f"not done after {timeout:.0f} s\n{self.output(1500)}") from None
        finally:
            end(process)
        if status:
            raise CheckError(f"exit status {status}\n{self.output(1500)}")
        return [step["lm_loss"] for step in self.steps()]

    def first_steps(self, number: int, timeout: float) -> list[dict[str, Any]]:
        """Run `number` steps, then end it at once: the checkpoint would say nothing.

        Raises:
            CheckError: it failed, or took too long.
        """
        process = self.start()
        deadline = time.monotonic() + timeout
        try:
            while len(self.steps()) < number:
                if process.poll() is not None:
                    raise CheckError(f"exit status {process.returncode}\n{self.output(1500)}")
                if time.monotonic() > deadline:
                    raise CheckError(f"not done after {timeout:.0f} s\n{self.output(1500)}")
                time.sleep(0.2)
        finally:
            end(process)
        return self.steps()[:number]


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a run with all processes that it started; torchrun's workers leave its process group."""
    if process.poll() is None:
        family = [psutil.Process(process.pid)]
        family += family[0].children(recursive=True)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait()


# --- losses ---------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """The losses of one run beside the CPU's."""

    family: str
    run: str
    first: float
    last: float
    difference: float
    """Largest of all steps, relative to the CPU's loss."""
    allowed: float

    @property
    def good(self) -> bool:
        """Whether every loss is near enough; NaN is not."""
        return self.difference <= self.allowed


def has_transformer_engine() -> bool:
    """Whether Megatron would use Transformer Engine on this machine's GPU."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE)


def variants(device: str) -> dict[str, list[str]]:
    """Flags of the runs that are compared with the CPU's, by precision and attention."""
    if device == "cpu":
        return {"fp32": [], "bf16": ["--bf16"]}
    local = ["--transformer-impl", "local"]
    runs = {"fp32": ["--fp32", *local], "bf16": ["--bf16", *local]}
    if has_transformer_engine():
        runs["bf16 with TE"] = ["--bf16", "--transformer-impl", "transformer_engine"]
    return runs


def compare_losses(
    options: argparse.Namespace, folder: Path, rows: Sequence[Row], tokenizer: Any
) -> tuple[list[Comparison], int]:
    """Train every family on the CPU and on the device.

    Returns:
        The comparisons, and how many runs failed.
    """
    data = folder / "short.jsonl"
    write_jsonl(data, rows[:400])
    found, failures = [], 0
    print(
        f"{'family':<11}{'run':<18}{'first loss':>11}{'last loss':>11}{'difference':>12}{'allowed':>9}"
    )
    for family in options.families:
        model = folder / "models" / family
        make_family(family, model, tokenizer)
        flags = ["--hf-model", str(model), "--finetune-data-files", str(data)]
        flags += [
            "--data-cache-dir",
            str(folder / "cache"),
            "--no-save-optim",
            "--data-workers",
            "0",
        ]
        flags += ["--seq-length", "256", "--micro-batch-size", "2", "--global-batch-size", "4"]
        flags += [
            "--train-iters",
            str(options.steps),
            "--lr",
            "1e-3",
            "--lr-decay-style",
            "constant",
        ]
        try:
            truth = Run(folder / "runs" / family / "truth", flags, "cpu").losses(options.timeout)
        except CheckError as error:
            print(f"{family:<11}{'CPU fp32':<18}FAILED: {error}")
            failures += 1
            continue
        print(f"{family:<11}{'CPU fp32':<18}{truth[0]:>11.5f}{truth[-1]:>11.5f}", flush=True)
        for name, extra in variants(options.device).items():
            label = f"{options.device.upper()} {name}"
            run = Run(
                folder / "runs" / family / name.replace(" ", "_"), [*flags, *extra], options.device
            )
            try:
                losses = run.losses(options.timeout)
            except CheckError as error:
                print(f"{family:<11}{label:<18}FAILED: {error}")
                failures += 1
                continue
            one = Comparison(
                family,
                label,
                losses[0],
                losses[-1],
                difference(losses, truth),
                TOLERANCES[name[:4]],
            )
            found.append(one)
            verdict = "" if one.good else "  TOO LARGE"
            print(
                f"{'':<11}{label:<18}{one.first:>11.5f}{one.last:>11.5f}{one.difference:>12.1e}"
                f"{one.allowed:>9.0e}{verdict}",
                flush=True,
            )
    return found, failures


def difference(losses: Sequence[float], truth: Sequence[float]) -> float:
    """Largest relative difference of two loss curves; NaN when one is cut short or not finite."""
    if len(losses) != len(truth) or not all(map(math.isfinite, [*losses, *truth])):
        return math.nan
    return max(abs(a - b) / abs(b) for a, b in zip(losses, truth, strict=True))


# --- speed ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """One way to fit a model into memory."""

    micro_batch: int
    recompute: bool = False
    bf16_gradients: bool = False

    def bytes_needed(self, size: Size, gpus: int) -> float:
        """An estimate, in bytes a device: it only spares starts that are bound to fail."""
        # bf16 weights and gradients whole; fp32 weights and two Adam moments in shards.
        static = size.parameters * (2 + (2 if self.bf16_gradients else 4) + 12 / gpus)
        tokens = self.micro_batch * SPEED_SEQ_LENGTH
        if self.recompute:
            activations = 2 * tokens * size.layers * size.hidden
        else:
            activations = 2 * tokens * size.layers * (8 * size.hidden + 4 * size.feed_forward)
        return static + activations + 6 * tokens * size.vocabulary

    def flags(self) -> list[str]:
        """Megatron's flags for it."""
        flags = ["--micro-batch-size", str(self.micro_batch)]
        if self.recompute:
            flags += ["--recompute-granularity", "full", "--recompute-method", "uniform"]
            flags += ["--recompute-num-layers", "1"]
        if self.bf16_gradients:
            flags.append("--grad-reduce-in-bf16")
        return flags

    def __str__(self) -> str:
        """Says it in a table."""
        extras = ["recompute"] * self.recompute + ["bf16 gradients"] * self.bf16_gradients
        return ", ".join([f"micro batch {self.micro_batch}", *extras])


ATTEMPTS = (
    Attempt(4),
    Attempt(2),
    Attempt(1),
    Attempt(1, recompute=True),
    Attempt(1, recompute=True, bf16_gradients=True),
)


@dataclass
class Speed:
    """What one size reached."""

    size: str
    parameters: int
    attempt: str
    tokens_per_s: float
    mfu: float | None
    """None where the device's peak is not known."""
    peak_memory_gib: float


def measure_size(
    name: str, options: argparse.Namespace, folder: Path, data: Path, tokenizer: Any
) -> Speed | None:
    """Train one size with the first attempt that fits, or say why none does.

    Raises:
        CheckError: a run failed for another reason than memory, or its loss is not a number.
    """
    size = SIZES[name]
    model = folder / "models" / name
    size.config().save_pretrained(model)
    tokenizer.save_pretrained(model)
    memory = math.inf
    if options.device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
    for number, attempt in enumerate(ATTEMPTS):
        if attempt.bytes_needed(size, options.gpus) > memory:
            continue
        flags = ["--hf-model", str(model), "--random-weights", "--finetune-data-files", str(data)]
        flags += ["--data-cache-dir", str(folder / "cache"), "--no-save-optim", *attempt.flags()]
        flags += ["--seq-length", str(SPEED_SEQ_LENGTH), "--log-memory-interval", "1"]
        flags += [
            "--global-batch-size",
            str(options.gpus * options.micro_batches * attempt.micro_batch),
        ]
        # Never reached: the run is ended after the steps that are measured.
        flags += ["--train-iters", str(10 * options.steps), "--lr-decay-style", "constant"]
        run = Run(folder / "runs" / f"{name}-{number}", flags, options.device, options.gpus)
        try:
            steps = run.first_steps(options.steps, options.timeout)
        except CheckError:
            if "out of memory" not in run.output():
                raise
            print(f"{name}: {attempt} does not fit", flush=True)
            continue
        if not all(step["lm_loss"] is not None for step in steps):
            raise CheckError(f"{name}: the loss is not a number")
        # The first steps load kernels and make the optimizer's state.
        warm = steps[min(3, options.steps - 1) :]
        mfu = [step["mfu"] for step in warm if step.get("mfu") is not None]
        return Speed(
            name,
            size.parameters,
            str(attempt),
            statistics.median(step["tokens_per_s"] for step in warm),
            statistics.median(mfu) if mfu else None,
            run.peak_memory(),
        )
    least = min(attempt.bytes_needed(size, options.gpus) for attempt in ATTEMPTS)
    print(
        f"{name}: skipped, it does not fit into {memory / 2**30:.0f} GiB a device; about "
        f"{least / 2**30:.0f} GiB are needed with {options.gpus} (more: --gpus N)",
        flush=True,
    )
    return None


def measure_speeds(
    options: argparse.Namespace, folder: Path, rows: Sequence[Row], tokenizer: Any
) -> tuple[list[Speed], int]:
    """Measure every size.

    Returns:
        What the sizes that fit reached, and how many runs failed.
    """
    data = folder / "long.jsonl"
    write_jsonl(data, list(long_rows(rows, 1000)))
    found, failures = [], 0
    for name in options.sizes:
        try:
            speed = measure_size(name, options, folder, data, tokenizer)
        except CheckError as error:
            print(f"{name}: FAILED: {error}", flush=True)
            failures += 1
            continue
        if speed is not None:
            found.append(speed)
            mfu = "unknown" if speed.mfu is None else f"{speed.mfu:.1%}"
            print(
                f"{name}: {speed.parameters / 1e9:.2f} billion parameters, {speed.attempt}: "
                f"{speed.tokens_per_s:,.0f} tokens/s, MFU {mfu}, "
                f"peak memory {speed.peak_memory_gib:.1f} GiB",
                flush=True,
            )
    return found, failures


# --- command line ---------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; on the CPU the defaults are what a self-test of this script needs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tests this script")
    add("--families", nargs="*", choices=list(FAMILIES), default=list(FAMILIES),
        help="whose losses are compared; none: no comparison")  # fmt: skip
    add("--sizes", nargs="*", choices=list(SIZES), default=None,
        help="whose speed is measured (default: 1b 8b); none: no measurement")  # fmt: skip
    add("--steps", type=int, default=10, help="steps of each run")
    add("--gpus", type=int, default=1, help="data parallel processes of the speed runs")
    add(
        "--micro-batches",
        type=int,
        default=None,
        help="of a step of the speed runs, for each GPU (default: 8)",
    )
    add("--timeout", type=float, default=1800.0, help="seconds a run may take")
    add("--json", type=Path, help="write the results to a file")
    options = parser.parse_args(argv)
    if options.sizes is None:
        options.sizes = ["1b", "8b"] if options.device == "cuda" else ["tiny"]
    if options.micro_batches is None:
        options.micro_batches = 8 if options.device == "cuda" else 1
    if options.steps < 1 or options.gpus < 1 or options.micro_batches < 1:
        parser.error("--steps, --gpus and --micro-batches must be at least 1")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = parse(argv)
    if options.device == "cuda":
        if not torch.cuda.is_available():
            print("no CUDA device here: nothing to check (--device cpu tests the check itself)")
            return NO_CUDA
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        print(
            f"{torch.cuda.device_count()} x {', '.join(sorted(names))}, torch {torch.__version__}"
        )
        if options.gpus > torch.cuda.device_count():
            print(f"error: --gpus {options.gpus}: this machine has {torch.cuda.device_count()}")
            return 2
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        folder = Path(name)
        rows, _ = make_rows(0)
        tokenizer = make_tokenizer(rows)
        comparisons: list[Comparison] = []
        failures = 0
        if options.families:
            comparisons, failures = compare_losses(options, folder, rows, tokenizer)
        speeds, failed = (
            measure_speeds(options, folder, rows, tokenizer) if options.sizes else ([], 0)
        )
    failures += failed + sum(not comparison.good for comparison in comparisons)
    if options.json:
        result = {
            "losses": [asdict(comparison) for comparison in comparisons],
            "speeds": [asdict(speed) for speed in speeds],
            "failures": failures,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print("all good" if not failures else f"{failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
