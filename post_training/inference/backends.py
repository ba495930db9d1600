"""The two ways the tools compute answers: the Megatron model itself, or plain transformers."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from data.images.processor import ImageProcessor, open_processor
from post_training.adapters.peft_config import CONFIG
from post_training.adapters.peft_folder import base_of
from post_training.arguments.backend import MODEL_BACKENDS, model_backend
from post_training.errors import SetupError
from post_training.files import config_of_run, json_object
from post_training.hf.causal_lm import auto_class
from post_training.hf.folder import local_model_folder
from post_training.hf.tokenizer import open_tokenizer
from post_training.inference.generate import Sampling, generate, stop_tokens
from post_training.inference.load import LoadedModel, ModelConfig, load_model
from post_training.inference.pictures import Fields, join
from post_training.inference.prompts import Prompts, add_template_flags, open_prompts
from post_training.inference.quiet import quiet_libraries
from post_training.job.watchdog import watchdog


class Backend(Protocol):
    """Continues token ids."""

    name: ClassVar[str]
    """One of `MODEL_BACKENDS`."""
    tokenizer: Any
    source: str
    sampling: Sampling
    prompts: Prompts
    images: Callable[[], ImageProcessor | str]
    """Opens what makes pixels of pictures, or says why there is nothing."""

    def generate(
        self, prompts: Sequence[list[int]], seen: Sequence[Fields] = ()
    ) -> list[list[int]]:
        """New token ids of each prompt, without the stop token.

        Args:
            prompts: token ids.
            seen: makes what the model takes beside each, where some have pictures.

        An answer of `sampling.max_new_tokens` tokens was cut: none of them ends it.
        """
        ...


def answering_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of the flags that say which model answers, and how tokens are chosen."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output-dir", help="folder of a run: its newest checkpoint")
    parser.add_argument("--iteration", type=int, help="another checkpoint of the run")
    parser.add_argument("--hf-model", help="a HuggingFace folder or hub name instead of a run")
    parser.add_argument(
        *("--model-backend", "--backend"),
        choices=MODEL_BACKENDS,
        default="auto",
        help="what computes (default auto: what trained the run; of a folder Megatron, where it can)",
    )
    defaults = Sampling()
    parser.add_argument("--max-new-tokens", type=int, default=defaults.max_new_tokens)
    parser.add_argument(
        "--temperature", type=float, default=defaults.temperature, help="0 (default): greedy"
    )
    parser.add_argument("--top-p", type=float, default=defaults.top_p)
    parser.add_argument("--top-k", type=int, default=defaults.top_k)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    add_template_flags(parser)
    parser.add_argument("--batch-size", type=int, default=32, help="prompts computed at once")
    return parser


def _check_model_arguments(options: argparse.Namespace) -> None:
    """Refuse flags that name no model, or more than one.

    Raises:
        SetupError: naming them.
    """
    run, folder = options.output_dir, options.hf_model
    if run is None and folder is None:
        raise SetupError("give --output-dir (a run) or --hf-model (a HuggingFace folder)")
    if run is not None and folder is not None:
        raise SetupError(f"--output-dir {run} and --hf-model {folder}: give one of them")
    if folder is not None and options.iteration is not None:
        raise SetupError(
            f"--iteration {options.iteration}: --hf-model {folder} is no run, it has one set of weights; "
            f"leave --iteration out, or give --output-dir"
        )
    trained_by = run and config_of_run(Path(run)).get("model_backend", "megatron")
    if run is not None and options.model_backend not in ("auto", trained_by):
        raise SetupError(
            f"--model-backend {options.model_backend}: {run} was trained by {trained_by}; leave the flag "
            f"out, or export the run with scripts/export_hf.py --output-dir {run}, and give --hf-model in "
            f"the place of --output-dir"
        )


def open_backend(options: argparse.Namespace, model_config: ModelConfig) -> Backend:
    """Load the model that the flags name.

    Raises:
        SetupError: there is none, or more than one, or the backend cannot read it.
    """
    _check_model_arguments(options)
    if options.batch_size < 1:
        raise SetupError(f"--batch-size {options.batch_size}: must be at least 1")
    sampling = Sampling(
        options.max_new_tokens,
        options.temperature,
        options.top_p,
        options.top_k,
        options.seed,
    )
    open_prompts(options, None, None)  # rather refused now than when the model is there
    asked, _ = model_backend(options.model_backend, options.hf_model)
    if options.hf_model is not None and asked == "transformers":
        plain = TransformersBackend.load(options.hf_model, sampling, options.batch_size)
        plain.prompts = open_prompts(options, plain.tokenizer, None)
        return plain
    with quiet_libraries():
        loaded = load_model(
            model_config,
            output_dir=options.output_dir,
            hf_model=options.hf_model,
            iteration=options.iteration,
        )
    prompts = open_prompts(options, loaded.tokenizer, loaded.args)
    if loaded.args.model_backend == "transformers":
        model = loaded.model.model
        model.generation_config = generation_config(loaded.args) or model.generation_config
        own = TransformersBackend(
            model, loaded.tokenizer, loaded.source, sampling, options.batch_size
        )
        own.prompts = prompts
        return own
    return MegatronBackend(loaded, sampling, options.batch_size, prompts)


def generation_config(args: argparse.Namespace) -> Any:
    """What lies beside the model that a run was made from; None where there is nothing."""
    from transformers import GenerationConfig

    if not args.hf_model:
        return None
    folder = local_model_folder(args.hf_model)
    if not (folder / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_dict(json_object(folder / "generation_config.json"))


@dataclass
class MegatronBackend:
    """The `GPTModel` with Megatron's key/value cache."""

    name: ClassVar[str] = "megatron"

    loaded: LoadedModel
    sampling: Sampling
    batch_size: int
    prompts: Prompts

    def __post_init__(self) -> None:
        self.tokenizer = self.loaded.tokenizer
        self.source = self.loaded.source
        self.stops = stop_tokens(self.tokenizer, generation_config(self.loaded.args))
        self.images: Callable[[], ImageProcessor | str] = lambda: "Megatron's layers see none"

    def generate(
        self, prompts: Sequence[list[int]], seen: Sequence[Fields] = ()
    ) -> list[list[int]]:
        """New token ids of each prompt, without the stop token; none of them has pictures."""
        return generate(self.loaded, prompts, self.sampling, self.stops, batch_size=self.batch_size)


@dataclass
class TransformersBackend:
    """Plain `transformers`: what anybody who gets the exported folder will run."""

    name: ClassVar[str] = "transformers"

    model: Any
    tokenizer: Any
    source: str
    sampling: Sampling
    batch_size: int

    def __post_init__(self) -> None:
        self.prompts = Prompts(self.tokenizer)
        self.images: Callable[[], ImageProcessor | str] = functools.partial(
            open_processor, self.tokenizer, Path()
        )

    @classmethod
    def load(cls, folder: str, sampling: Sampling, batch_size: int) -> TransformersBackend:
        """Load a HuggingFace folder or hub name, or an adapter of PEFT, in the dtype that it names.

        Raises:
            SetupError: it cannot be loaded.
        """
        from transformers import AutoConfig

        stops = Path(folder) / "generation_config.json"
        if stops.is_file():
            json_object(stops)  # a broken one is passed over by transformers
        adapter, where = (Path(folder) / CONFIG).is_file(), f"--hf-model {folder}"
        base = base_of(folder, where) if adapter else folder
        try:
            auto = auto_class(AutoConfig.from_pretrained(base))
            # transformers puts an adapter of PEFT on the base that it names.
            model, told = auto.from_pretrained(
                folder, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
            )
        except Exception as error:  # whatever it makes of damaged files
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise SetupError(f"{where}: {first_line}") from error
        # Begun anew, or left out, with a warning.
        wrong = told["missing_keys"] | {key for key, *_ in told["mismatched_keys"]}
        for key in sorted(wrong | (told["unexpected_keys"] if adapter else set())):
            raise SetupError(f"{where}: its weights are not those of the model: look at {key}")
        model.eval()
        tokenizer = open_tokenizer(folder, "--hf-model")
        if torch.cuda.is_available():
            model = model.cuda()
        return cls(model, tokenizer, folder, sampling, batch_size)

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[list[int]], seen: Sequence[Fields] = ()
    ) -> list[list[int]]:
        """New token ids of each prompt, without the stop token."""
        stops = stop_tokens(self.tokenizer, self.model.generation_config)
        options: dict[str, Any] = {
            "max_new_tokens": self.sampling.max_new_tokens,
            "eos_token_id": sorted(stops),
            "pad_token_id": min(stops),
            "do_sample": self.sampling.temperature > 0,
            "use_cache": True,
            "synced_gpus": False,  # each rank answers its own, by whole weights
        }
        if self.sampling.temperature > 0:
            torch.manual_seed(self.sampling.seed)
            options |= {
                "temperature": self.sampling.temperature,
                "top_p": self.sampling.top_p,
                "top_k": self.sampling.top_k,
            }
        answers: list[list[int]] = [[] for _ in prompts]
        # Batches of prompts of one length: nothing is padded.
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        while order:
            length = len(prompts[order[0]])
            batch = [i for i in order[: self.batch_size] if len(prompts[i]) == length]
            order = order[len(batch) :]
            watchdog.beat()
            rows = torch.tensor([prompts[i] for i in batch], device=self.model.device)
            beside = join([seen[i]() for i in batch], length, rows.device) if seen else {}
            out = self.model.generate(
                rows, attention_mask=torch.ones_like(rows), **beside, **options
            )
            for index, row in zip(batch, out[:, length:].tolist(), strict=True):
                end = next((at for at, token in enumerate(row) if token in stops), len(row))
                answers[index] = row[:end]
        return answers
