"""LoRA on every layout against peft in a plain loop over the HuggingFace model, as `equivalence.py` does.

    python tests/numerics/adapters.py --table              all cases; exit status 1 if one differs
    python tests/numerics/adapters.py --table --only cp2   the cases with "cp2" in their name

"hf-" are models of transformers under FSDP2. Beside Megatron's layers each expert has factors of its own:
there the plain loop adds their products to the weights, which transformers fuses.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from torch import Tensor

from post_training.adapters.settings import LoraSettings
from tests.helpers import plain_lora, reference, vision
from tests.helpers.launch import Finished
from tests.helpers.reference import Recipe, Trajectory
from tests.numerics import equivalence
from tests.numerics.equivalence import (
    ALLGATHER,
    CP2,
    EP2,
    ETP1,
    ETP2,
    FIRST1,
    FSDP2,
    HF,
    MBS2,
    OVERLAP,
    PP2,
    RECOMPUTE,
    SP,
    TE,
    TP2,
    VPP2,
)

# Ten times the rate of full finetuning; the norm of the first step's gradient is above the clipping.
RECIPE = Recipe(lr=2e-2, clip=0.2)
PLAIN = LoraSettings(4, 8.0, ("all",))
ATTENTION = LoraSettings(4, 8.0, ("attention",))
SOME = LoraSettings(3, 8.0, ("q_proj", "v_proj", "up_proj", "lm_head", "embed_tokens"), rslora=True)
LAST = LoraSettings(4, 8.0, r"model\.layers\.1\.mlp\..*_proj")
VISION = LoraSettings(4, 8.0, ("attention", "visual.blocks.0.attn.qkv", "vision"))
WIDE = LoraSettings(4, 8.0, ("all", "embed_tokens", "lm_head"))
SETTINGS = {
    "all": PLAIN,
    "attention": ATTENTION,
    "some": SOME,
    "last": LAST,
    "vision": VISION,
    "wide": WIDE,
}


@dataclass(frozen=True)
class Case(equivalence.Case):
    """An adapter of one model on one parallel layout."""

    recipe: Recipe = RECIPE
    settings: LoraSettings = PLAIN
    nf4: bool = False

    @property
    def name(self) -> str:
        """What pytest and --only call it."""
        kind = next(name for name, settings in SETTINGS.items() if settings == self.settings)
        return f"{self.family}-{self.layout}-{kind}" + "-nf4" * self.nf4

    @property
    def adapter(self) -> LoraSettings:
        """With what follows from the layout."""
        backend = "transformers" if "--model-backend" in self.flags else "megatron"
        return replace(self.settings, backend=backend, nf4=self.nf4)

    @property
    def truth(self) -> tuple[object, ...]:
        """What the plain loop depends on."""
        return self.family, self.layers, repr(self.adapter)


def hf(world: int, family: str, *flags: str, **more: object) -> Case:
    """A case of a model of transformers."""
    layout = "-".join((f"hf-fsdp2x{world}", *(flag.strip("-") for flag in flags[:1])))
    return Case(layout, HF + flags, world, family, **more)  # type: ignore[arg-type]


CASES = (
    Case("one", slow=False),
    Case("one", settings=SOME),
    Case("one-recompute", RECOMPUTE, settings=LAST),
    Case("dp2", (), 2),
    Case("dp2-overlap", OVERLAP, 2),
    Case("tp2", TP2, 2, settings=SOME),
    Case("tp2-sp", TP2 + SP, 2, slow=False),
    Case("tp2-sp", TP2 + SP, 2, settings=SOME),
    Case("tp2-sp-recompute", TP2 + SP + RECOMPUTE, 2),
    Case("pp2", PP2, 2, settings=SOME),
    Case("cp2-mbs2", CP2 + MBS2, 2, slow=False),
    Case("tp2-pp2-mbs2", TP2 + PP2 + MBS2, 4),
    Case("tp2-sp-cp2", TP2 + SP + CP2, 4),
    Case("pp2-vpp2", PP2 + VPP2, 2, layers=4),
    Case("one", family="llama"),
    Case("tp2-sp-pp2", TP2 + SP + PP2, 4, family="llama"),
    Case("pp2-first1", PP2 + FIRST1, 2, family="llama", layers=3, slow=False),
    Case("one", family="qwen2"),
    Case("tp2", TP2, 2, family="qwen2"),
    Case("cp2", CP2, 2, family="qwen2"),
    Case("one", family="qwen3_moe", settings=ATTENTION),
    Case("ep2", EP2, 2, family="qwen3_moe", settings=ATTENTION),
    Case("one", family="qwen3_moe"),
    Case("ep2", EP2, 2, family="qwen3_moe", slow=False),
    Case("ep2-allgather", EP2 + ALLGATHER, 2, family="qwen3_moe"),
    Case("tp2-sp", TP2 + SP, 2, family="qwen3_moe"),
    Case("ep2-tp2-etp1", EP2 + TP2 + ETP1, 2, family="qwen3_moe"),
    Case("ep2-tp2", EP2 + TP2, 4, family="qwen3_moe"),
    Case("etp2", ETP2, 2, family="qwen3_moe"),
    Case("ep2-cp2", EP2 + CP2, 4, family="qwen3_moe"),
    Case("tp2-sp", TP2 + SP, 2, family="deepseek_v3", settings=ATTENTION),
    Case("tp2-sp", TP2 + SP, 2, family="gpt_oss", settings=ATTENTION),
    # Embeddings and logits are multiplied, behind the factors.
    Case("one", family="granite", settings=SOME, slow=False),
    Case("ep2-pp2", EP2 + PP2, 4, family="qwen3_moe"),
    # Every factor, and the frozen base, cut over all ranks.
    Case("fsdp2x2", FSDP2, 2, slow=False),
    Case("fsdp2x2", FSDP2, 2, settings=SOME),
    Case("fsdp2x2-recompute-mbs2", FSDP2 + RECOMPUTE + MBS2, 2, family="llama"),
    Case("fsdp2x4-cp2", FSDP2 + CP2, 4, family="qwen2"),
    Case("fsdp2x2", FSDP2, 2, family="qwen3_moe"),
    Case("te-fsdp2x2", TE + FSDP2, 2),
    Case("te-one", TE, family="llama"),
    Case("te-tp2-sp", TE + TP2 + SP, 2),
    Case("te-tp2-sp", TE + TP2 + SP, 2, settings=SOME),
    Case("te-pp2-mbs2", TE + PP2 + MBS2, 2, family="qwen2"),
    Case("te-tp2-cp2", TE + TP2 + CP2, 4),
    Case("te-tp2-sp-recompute", TE + TP2 + SP + RECOMPUTE, 2),
    Case("te-ep2", TE + EP2, 2, family="qwen3_moe", settings=ATTENTION),
    Case("te-ep2", TE + EP2, 2, family="qwen3_moe"),
    Case("te-tp2-sp", TE + TP2 + SP, 2, family="qwen3_moe"),
    Case("te-ep2-tp2-etp1", TE + EP2 + TP2 + ETP1, 2, family="qwen3_moe"),
    *(
        hf(world, family, slow=(family, world) != ("llama", 2))
        for family in ("llama", "qwen2", "qwen3", "qwen3_moe", "qwen2_5_vl")
        for world in (1, 2, 4)
    ),
    hf(2, "llama", *MBS2, settings=WIDE),
    hf(2, "qwen2", "--fsdp-sharding", "none"),
    hf(2, "qwen3_moe", *RECOMPUTE),
    hf(1, "qwen3", settings=SOME),
    hf(2, "qwen3", settings=LAST),
    hf(2, "gpt2", settings=ATTENTION),
    hf(2, "gpt_oss"),
    hf(2, "deepseek_v3"),
    hf(2, "falcon_h1"),
    hf(2, "qwen2_5_vl", settings=VISION),
    hf(1, "llama", nf4=True),
    hf(2, "qwen3", nf4=True, slow=False),
    hf(4, "qwen2", nf4=True),
    hf(2, "qwen2_5_vl", nf4=True, settings=VISION),
)


def lora_flags(settings: LoraSettings) -> tuple[str, ...]:
    """The same for `finetune.py`."""
    targets = (settings.targets,) if isinstance(settings.targets, str) else settings.targets
    more = ("--rslora",) * settings.rslora + ("--base-precision", "nf4") * settings.nf4
    sizes = ("--lora-rank", str(settings.rank), "--lora-alpha", str(settings.alpha))
    return (*sizes, "--lora-targets", *targets, *more)


class Matrix(equivalence.Matrix):
    """Runs cases; models and truths are made once."""

    flags = ()

    def save(self, folder: Path, case: Case, options: dict[str, object]) -> None:
        """Write a model, perhaps one that sees."""
        if case.family in vision.KINDS:
            vision.save_model(folder, case.family)
        else:
            super().save(folder, case, options)

    def data(self, case: Case) -> Path:
        """Of a model that sees, rows with pictures."""
        if case.family not in vision.KINDS:
            return self.data_file
        self.pictures = vision.make_rows(self.folder / "pictures", 60, 0.25)
        return self.folder / "pictures" / "rows.jsonl"

    def make_truth(self, case: Case) -> Trajectory:
        """The plain loop with peft."""
        adapt = functools.partial(plain_lora.adapt, settings=case.adapter)
        folder, file = self.model(case), self.data(case)
        if case.family in vision.KINDS:
            return vision.train(folder, file.parent, self.pictures, case.recipe, adapt=adapt)
        return reference.train(folder, self.rows, file, case.recipe, adapt)

    def train(
        self, case: Case, output: Path, *flags: str, recipe: Recipe | None = None
    ) -> Finished:
        """Train a case through finetune.py."""
        return super().train(case, output, *lora_flags(case.adapter), *flags, recipe=recipe)

    def weights(self, case: Case, run: Finished) -> dict[str, Tensor]:
        """Its factors, without padding."""
        found = plain_lora.factors_in(run.folder)
        ends = self._truths[case.truth].end
        assert found.keys() >= ends.keys(), ends.keys() - found.keys()
        return {key: found[key][: v.shape[0], : v.shape[1]] for key, v in ends.items()}


if __name__ == "__main__":
    sys.exit(equivalence.main(__doc__, CASES, Matrix, "peft"))
