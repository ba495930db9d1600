"""The equivalence matrix: what every parallel layout is compared with, and how far it may differ.

    python tests/numerics/equivalence.py --table              all cases; exit status 1 if one differs
    python tests/numerics/equivalence.py --table --only cp2   the cases with "cp2" in their name

The truth is a HuggingFace model in a plain PyTorch loop: fp32, one process, each document alone
(`tests/helpers/reference.py`). `tests/numerics/test_layouts.py` runs the same cases under pytest.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # In place of this folder, where tests/data would hide the package data.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import transformers
from torch import Tensor

from tests.helpers import megatron_model, reference
from tests.helpers.launch import Finished, finetune, finetune_on_double, run_rank
from tests.helpers.models import save_model
from tests.helpers.reference import Recipe, Trajectory
from tests.helpers.rows import make_rows, write_rows

STEP_BOUND = 1e-5
"""Largest relative difference of a step's loss and of its gradient norm."""
UPDATE_BOUNDS = {"adam": 1e-3, "sgd": 1e-5}
"""Largest relative L2 difference of final minus initial weights. Adam's first steps amplify rounding."""

ADAM, SGD, UNPACKED = Recipe(), Recipe(optimizer="sgd", lr=0.05), Recipe(packing="none")
BALANCED = Recipe(balance=0.1)
# Of one document a row one embedding weight of Llama (of Qwen3-MoE, too) has a gradient of nearly 0,
# whose rounding decides about Adam's step: it alone is the difference, on one process too.
UNPACKED_SGD = Recipe(packing="none", optimizer="sgd", lr=0.05)
TP2 = ("--tensor-model-parallel-size", "2")
PP2 = ("--pipeline-model-parallel-size", "2")
PP3 = ("--pipeline-model-parallel-size", "3")
PP4 = ("--pipeline-model-parallel-size", "4")
CP2 = ("--context-parallel-size", "2")
CP4 = ("--context-parallel-size", "4")
VPP2 = ("--num-virtual-stages-per-pipeline-rank", "2")
VPP1LAYER = ("--num-layers-per-virtual-pipeline-stage", "1")
EP2 = ("--expert-model-parallel-size", "2")
EP4 = ("--expert-model-parallel-size", "4")
ETP1 = ("--expert-tensor-parallel-size", "1")
ETP2 = ("--expert-tensor-parallel-size", "2")
ALLGATHER = ("--moe-token-dispatcher-type", "allgather")
SP = ("--sequence-parallel",)
FSDP2 = ("--use-torch-fsdp2",)
HF = ("--model-backend", "transformers")
# Layers of Transformer Engine, or of what stands for it (`tests/helpers/transformer_engine_double.py`).
TE = ("--transformer-impl", "transformer_engine")
FIRST1 = ("--decoder-first-pipeline-num-layers", "1")
LAST1 = ("--decoder-last-pipeline-num-layers", "1")
ONE_THEN_TWO = ("--pipeline-model-parallel-layout", "Et|ttL")
RECOMPUTE = (
    *("--recompute-granularity", "full", "--recompute-method", "uniform"),
    *("--recompute-num-layers", "1"),
)
SELECTIVE = ("--recompute-granularity", "selective")
OVERLAP = ("--overlap-grad-reduce", "--overlap-param-gather")
MBS2 = ("--micro-batch-size", "2")
MBS4 = ("--micro-batch-size", "4")


_GROWN = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
# Rows are shorter and longer than the original length, and than the windows.
VARIANTS: dict[str, dict[str, object]] = {
    "yarn": {"rope_parameters": {"rope_type": "yarn", **_GROWN}},
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope",
            **_GROWN,
            "short_factor": [1.0 + 0.1 * i for i in range(16)],
            "long_factor": [1.5 + i for i in range(16)],
        }
    },
    "window": {"sliding_window": 24},
    "windows": {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    # Queries from no latent vector, and experts in no groups.
    "moonlight": {
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    },
    # Nemotron-H 8B, which has no experts: tensor parallelism without sequence parallelism, too.
    "dense": {"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"]},
}


@dataclass(frozen=True)
class Case:
    """One model on one parallel layout."""

    layout: str
    """Its name in the table."""
    flags: tuple[str, ...] = ()
    world: int = 1
    family: str = "qwen3"
    layers: int = 2
    tied: bool = False
    dense: tuple[int, ...] = ()
    """Layers without experts, in a model that has some."""
    variant: str = ""
    """What of `VARIANTS` its configuration says."""
    recipe: Recipe = ADAM
    slow: bool = True

    @property
    def name(self) -> str:
        """What pytest and --only call it."""
        words = [self.family, *(["tied"] if self.tied else []), *(["mixed"] if self.dense else [])]
        words += [self.variant] if self.variant else []
        words += [self.layout]
        words += [self.recipe.optimizer] if self.recipe.optimizer != "adam" else []
        words += ["unpacked"] if self.recipe.packing == "none" else []
        words += ["balanced"] if self.recipe.balance else []
        return "-".join(words)

    @property
    def truth(self) -> tuple[object, ...]:
        """What the plain loop depends on; cases that share it have one truth."""
        return self.family, self.layers, self.tied, self.dense, self.variant, self.recipe


# Under their own class of transformers (`tests/helpers/architectures.py`), most have no other way here.
OTHERS = (
    *(
        "gpt2",
        "gemma2",
        "gemma3_text",
        "phi3",
        "olmo2",
        "opt",
        "deepseek_v3",
        "gpt_oss",
        "llama4_text",
    ),
    *("falcon_h1", "mamba", "mamba2", "qwen3_next", "nemotron_h", "lfm2", "granitemoehybrid"),
)
QUICK = {("gemma2", 2)}

CASES = (
    # One process, then each axis alone.
    Case("one", slow=False),
    Case("mbs2", MBS2),
    Case("mbs4", MBS4),
    Case("dp2", (), 2, slow=False),
    Case("tp2", TP2, 2),
    Case("tp2-sp", TP2 + SP, 2, slow=False),
    Case("pp2", PP2, 2, slow=False),
    Case("pp2-mbs2", PP2 + MBS2, 2),
    Case("cp2", CP2, 2, slow=False),
    Case("cp2-mbs2", CP2 + MBS2, 2),
    Case("pp3", PP3, 3, layers=6),
    Case("pp4", PP4, 4, layers=4),
    Case("cp4", CP4, 4),
    # Their products.
    Case("tp2-pp2", TP2 + PP2, 4),
    Case("tp2-sp-pp2-mbs2", TP2 + SP + PP2 + MBS2, 4),
    Case("tp2-dp2", TP2, 4),
    Case("tp2-cp2", TP2 + CP2, 4),
    Case("tp2-sp-cp2-mbs2", TP2 + SP + CP2 + MBS2, 4),
    Case("pp2-cp2-mbs2", PP2 + CP2 + MBS2, 4),
    Case("cp2-dp2", CP2, 4),
    Case("tp2-pp2-dp2", TP2 + PP2, 8),
    Case("tp2-pp2-cp2", TP2 + PP2 + CP2, 8),
    # Stages of unlike size.
    Case("pp2-first1", PP2 + FIRST1, 2, layers=3),
    Case("pp3-first1-last1-mbs2", PP3 + FIRST1 + LAST1 + MBS2, 3, layers=4),
    Case("pp2-layout", PP2 + ONE_THEN_TWO, 2, layers=3),
    # Activations computed twice, and messages during computation.
    Case("pp2-recompute", PP2 + RECOMPUTE, 2),
    Case("cp2-recompute-attention", CP2 + SELECTIVE, 2),
    Case("fsdp2x2-recompute", FSDP2 + RECOMPUTE, 2),
    Case("dp2-overlap", OVERLAP, 2),
    Case("pp2-vpp2-dp2-overlap", PP2 + VPP2 + OVERLAP, 4, layers=4),
    # Without packing, and with another optimizer, under which the update itself is as close as a loss.
    Case("one", recipe=UNPACKED),
    Case("tp2-cp2", TP2 + CP2, 4, recipe=UNPACKED),
    Case("pp2-mbs4", PP2 + MBS4, 2, recipe=UNPACKED),
    Case("tp2-sp-pp2-vpp2", TP2 + SP + PP2 + VPP2, 4, family="qwen2", layers=4, recipe=UNPACKED),
    Case("dp2-mbs2", MBS2, 2, family="llama", recipe=UNPACKED_SGD),
    Case("ep2", EP2, 2, family="qwen3_moe", recipe=UNPACKED_SGD),
    Case("one", recipe=SGD),
    Case("dp2", (), 2, recipe=SGD),
    Case("tp2-sp", TP2 + SP, 2, recipe=SGD),
    Case("pp2-cp2", PP2 + CP2, 4, recipe=SGD),
    # Families.
    Case("one", family="llama", slow=False),
    Case("tp2", TP2, 2, family="llama"),
    Case("pp2", PP2, 2, family="llama"),
    Case("cp2", CP2, 2, family="llama"),
    Case("one", family="mistral"),
    Case("tp2-sp", TP2 + SP, 2, family="mistral"),
    Case("pp2-mbs2", PP2 + MBS2, 2, family="mistral"),
    Case("one", family="qwen2"),
    Case("tp2-sp", TP2 + SP, 2, family="qwen2"),
    Case("cp2", CP2, 2, family="qwen2"),
    Case("pp2-dp2", PP2, 4, family="qwen2"),
    Case("tp2-pp2-mbs4", TP2 + PP2 + MBS4, 4, family="llama"),
    Case("one", family="ernie4_5"),
    Case("tp2-sp", TP2 + SP, 2, family="ernie4_5", tied=True),
    Case("one", family="seed_oss"),
    Case("tp2-sp", TP2 + SP, 2, family="seed_oss"),
    Case("one", family="smollm3"),
    Case("pp2", PP2, 2, family="smollm3", tied=True),
    Case("one", family="mixtral"),
    Case("tp2-sp", TP2 + SP, 2, family="mixtral"),
    Case("one", family="qwen3_moe"),
    Case("mbs4", MBS4, 1, family="qwen3_moe"),
    Case("dp2", (), 2, family="qwen3_moe"),
    Case("pp2", PP2, 2, family="qwen3_moe"),
    Case("tp2-sp", TP2 + SP, 2, family="qwen3_moe"),
    Case("cp2", CP2, 2, family="qwen3_moe"),
    Case("cp2", CP2, 2, variant="longrope"),
    Case("tp2-sp", TP2 + SP, 2, variant="yarn"),
    # Latent attention, a router of groups, a shared expert, a first layer without experts.
    Case("one", family="deepseek_v3", slow=False),
    *(
        Case(layout, flags, world, family="deepseek_v3")
        for layout, flags, world in (
            ("mbs4", MBS4, 1),
            ("dp2", (), 2),
            ("tp2-sp", TP2, 2),
            ("pp2-mbs2", PP2 + MBS2, 2),
            ("cp2", CP2, 2),
            ("ep2", EP2, 2),
            ("ep2-tp2", EP2 + TP2, 4),
            ("ep2-tp2-etp1", EP2 + TP2 + ETP1, 2),
            ("fsdp2x2", FSDP2, 2),
        )
    ),
    Case("one", family="deepseek_v3", recipe=UNPACKED_SGD),
    Case("one", family="deepseek_v3", variant="moonlight"),
    *(
        Case(layout, flags, world, family="deepseek_v3", variant="moonlight", recipe=recipe)
        for layout, flags, world, recipe in (
            ("dp2", (), 2, ADAM),
            ("tp2-sp", TP2, 2, ADAM),
            ("pp2", PP2, 2, ADAM),
            ("ep2", EP2, 2, ADAM),
            ("ep2-tp2", EP2 + TP2 + ETP1, 2, ADAM),
            ("one", (), 1, UNPACKED_SGD),
        )
    ),
    # Sinks, a window in every other layer, clamped experts with biases.
    Case("one", family="gpt_oss", slow=False),
    *(
        Case(layout, flags, world, family="gpt_oss")
        for layout, flags, world in (
            ("mbs4", MBS4, 1),
            ("dp2", (), 2),
            ("tp2-sp", TP2, 2),
            ("pp2-mbs2", PP2 + MBS2, 2),
            ("cp2", CP2, 2),
            ("ep2", EP2, 2),
            ("ep2-tp2", EP2 + TP2, 2),
            ("ep2-tp2-pp2", EP2 + TP2 + PP2, 4),
            ("fsdp2x2", FSDP2, 2),
        )
    ),
    Case("one", family="gpt_oss", recipe=UNPACKED_SGD),
    # A document a row where layers are cut, too.
    *(
        Case("ep2-tp2-etp1", EP2 + TP2 + ETP1, 2, family=family, layers=layers, recipe=UNPACKED_SGD)
        for family, layers in (("deepseek_v3", 2), ("gpt_oss", 2), ("nemotron_h", 4))
    ),
    *(
        Case("tp2-sp", TP2 + SP, 2, family=family, variant=variant, recipe=UNPACKED_SGD)
        for family, variant in (
            *(("glm4", ""), ("granite", ""), ("phi3", ""), ("mamba2", "")),
            ("mistral", "window"),
        )
    ),
    # Factors; norms behind the parts of a layer, biases of queries; one tensor of queries, keys and values.
    *(
        Case(
            layout,
            flags,
            world,
            family=family,
            recipe=recipe,
            tied=layout == "pp2",
            slow=(family, layout) not in {("granite", "tp2-sp"), ("glm4", "pp2"), ("phi3", "tp2")},
        )
        for family in ("granite", "glm4", "phi3")
        for layout, flags, world, recipe in (
            ("one", (), 1, ADAM),
            ("one", (), 1, UNPACKED_SGD),
            ("dp2", (), 2, ADAM),
            ("tp2", TP2, 2, ADAM),
            ("tp2-sp", TP2 + SP, 2, ADAM),
            ("pp2", PP2, 2, ADAM),
            ("cp2", CP2, 2, ADAM),
            ("fsdp2x2", FSDP2, 2, ADAM),
        )
        if family == "phi3" or layout not in ("cp2", "fsdp2x2")
    ),
    # State-space layers: with attention, feed-forward layers and experts, and alone.
    Case("one", family="nemotron_h", layers=4, slow=False),
    *(
        Case(layout, flags, world, family="nemotron_h", layers=4)
        for layout, flags, world in (
            ("mbs4", MBS4, 1),
            ("dp2", (), 2),
            ("tp2-sp", TP2, 2),
            ("pp2-mbs2", PP2 + MBS2, 2),
            ("ep2", EP2, 2),
            ("ep2-tp2", EP2 + TP2, 4),
            ("ep2-tp2-etp1", EP2 + TP2 + ETP1, 2),
        )
    ),
    Case("one", family="nemotron_h", layers=4, recipe=UNPACKED_SGD),
    *(
        Case(layout, flags, world, family="nemotron_h", layers=4, variant="dense", recipe=recipe)
        for layout, flags, world, recipe in (
            ("one", (), 1, ADAM),
            ("dp2", (), 2, ADAM),
            ("tp2", TP2, 2, ADAM),
            ("tp2-sp", TP2 + SP, 2, ADAM),
            ("pp2", PP2, 2, ADAM),
            ("tp2", TP2, 2, UNPACKED_SGD),
        )
    ),
    Case("pp2-recompute", PP2 + RECOMPUTE, 2, family="nemotron_h", layers=4, slow=False),
    Case("tp2-sp-recompute-some", TP2 + SP + SELECTIVE, 2, family="nemotron_h", layers=4),
    # With Adam's usual rate a rounding of the first step (1e-7) is 1e-5 of the gradient's norm at the last.
    Case("one", family="mamba2", recipe=Recipe(lr=1e-4)),
    *(
        Case(layout, flags, 2, family="mamba2", recipe=Recipe(lr=1e-4))
        for layout, flags in (("dp2", ()), ("tp2", TP2), ("tp2-sp", TP2 + SP), ("pp2", PP2))
    ),
    Case("one", family="mamba2", recipe=UNPACKED_SGD),
    Case("pp2", PP2, 2, family="mamba2", tied=True, recipe=Recipe(lr=1e-4)),
    # Sliding windows, in all layers and in some.
    Case("one", family="mistral", variant="window", slow=False),
    *(
        Case(layout, flags, 2, family="mistral", variant="window")
        for layout, flags in (
            ("dp2", ()),
            ("tp2", TP2),
            ("tp2-sp", TP2 + SP),
            ("pp2-mbs2", PP2 + MBS2),
            ("cp2", CP2),
            ("fsdp2x2", FSDP2),
        )
    ),
    Case("one", family="mistral", variant="window", recipe=UNPACKED),
    Case("tp2-sp", TP2 + SP, 2, family="mixtral", variant="window"),
    Case("ep2-tp2-etp1", EP2 + TP2 + ETP1, 2, family="qwen3_moe", variant="windows"),
    *(
        Case(layout, flags, 2, family="qwen3", variant="windows")
        for layout, flags in (("tp2-sp", TP2 + SP), ("pp2", PP2), ("cp2", CP2))
    ),
    Case("one", family="qwen3", variant="windows", recipe=UNPACKED),
    # Interleaved pipeline schedules: each rank holds several pieces of the model.
    Case("pp2-vpp2", PP2 + VPP2, 2, layers=4),
    Case("pp2-vpp2-mbs2", PP2 + VPP1LAYER + MBS2, 2, layers=4),
    Case("pp2-vpp3", PP2 + VPP1LAYER, 2, family="llama", layers=6, tied=True),
    Case("tp2-sp-pp2-vpp2-mbs2", TP2 + SP + PP2 + VPP2 + MBS2, 4, layers=4),
    Case("pp2-vpp2-cp2", PP2 + VPP2 + CP2, 4, layers=4),
    Case("pp2-vpp2-ep2", PP2 + VPP2 + EP2, 4, family="qwen3_moe", layers=4),
    # Experts over ranks that read different packs.
    Case("ep2", EP2, 2, family="qwen3_moe", slow=False),
    Case("ep2-mbs2", EP2 + MBS2, 2, family="qwen3_moe"),
    Case("ep2-allgather", EP2 + ALLGATHER, 2, family="qwen3_moe"),
    Case("ep2-dp2", EP2, 4, family="qwen3_moe"),
    Case("ep4", EP4, 4, family="qwen3_moe"),
    Case("ep2-tp2", EP2 + TP2, 4, family="qwen3_moe"),
    Case("ep2-tp2-allgather", EP2 + TP2 + ALLGATHER, 4, family="qwen3_moe"),
    Case("ep2-tp2-etp1", EP2 + TP2 + ETP1, 2, family="qwen3_moe"),
    Case("ep2-etp2", EP2 + ETP2, 4, family="qwen3_moe", layers=3, dense=(0,)),
    Case("ep2-pp2-mbs2", EP2 + PP2 + MBS2, 4, family="qwen3_moe"),
    Case("ep2-cp2", EP2 + CP2, 4, family="qwen3_moe"),
    Case("ep2-tp2-pp2", EP2 + TP2 + PP2, 8, family="qwen3_moe"),
    # Every weight, gradient and moment cut over all ranks.
    Case("fsdp2x2", FSDP2, 2),
    Case("fsdp2x1-mbs2", FSDP2 + MBS2, 1),
    Case("fsdp2x2-mbs2", FSDP2 + MBS2, 2),
    Case("fsdp2x4", FSDP2, 4),
    Case("fsdp2x2-cp2", FSDP2 + CP2, 2),
    Case("fsdp2x4-cp2-mbs2", FSDP2 + CP2 + MBS2, 4),
    Case("fsdp2x2", FSDP2, 2, recipe=UNPACKED),
    Case("fsdp2x2", FSDP2, 2, recipe=SGD),
    Case("fsdp2x2", FSDP2, 2, family="llama"),
    Case("fsdp2x2", FSDP2, 2, family="qwen2"),
    Case("fsdp2x2", FSDP2, 2, family="qwen3_moe"),
    Case("te-one", TE),
    Case("te-tp2-sp", TE + TP2 + SP, 2),
    Case("te-pp2-mbs2", TE + PP2 + MBS2, 2, family="qwen2"),
    Case("te-tp2-cp2", TE + TP2 + CP2, 4, family="llama"),
    # All experts of a rank in one call.
    Case("te-one", TE, family="qwen3_moe"),
    Case("te-ep2", TE + EP2, 2, family="qwen3_moe"),
    Case("te-tp2-sp", TE + TP2 + SP, 2, family="qwen3_moe"),
    Case("te-ep2-tp2-etp1", TE + EP2 + TP2 + ETP1, 2, family="qwen3_moe"),
    # With the load balancing loss.
    Case("one", family="qwen3_moe", recipe=BALANCED),
    Case("mbs4", MBS4, family="qwen3_moe", recipe=BALANCED),
    Case("dp2", (), 2, family="qwen3_moe", recipe=BALANCED),
    Case("cp2", CP2, 2, family="qwen3_moe", recipe=BALANCED),
    Case("pp2-mbs2", PP2 + MBS2, 2, family="qwen3_moe", recipe=BALANCED),
    Case("pp2-vpp2", PP2 + VPP2, 2, family="qwen3_moe", layers=4, recipe=BALANCED),
    Case("ep2-tp2", EP2 + TP2, 4, family="qwen3_moe", recipe=BALANCED),
    Case("ep2-tp2-cp2", EP2 + TP2 + CP2, 4, family="qwen3_moe", recipe=BALANCED),
    Case("fsdp2x2", FSDP2, 2, family="qwen3_moe", recipe=BALANCED),
    # Input and output embeddings that are one matrix, on one stage and on two.
    Case("one", family="qwen2", tied=True),
    Case("pp2", PP2, 2, family="qwen2", tied=True),
    Case("tp2", TP2, 2, family="llama", tied=True),
    Case("tp2-sp", TP2 + SP, 2, family="llama", tied=True),
    Case("pp2-mbs2", PP2 + MBS2, 2, family="llama", tied=True),
    Case("cp2", CP2, 2, family="llama", tied=True),
    Case("tp2-pp2", TP2 + PP2, 4, family="llama", tied=True),
    Case("fsdp2x2", FSDP2, 2, family="llama", tied=True),
    Case("fsdp2x1", FSDP2, 1, family="qwen2", tied=True),
    Case("fsdp2x4-cp2", FSDP2 + CP2, 4, family="qwen2", tied=True),
    # Their own classes of `transformers`: attention of three kinds, experts, state-space models.
    *(
        Case(
            f"hf-fsdp2x{world}",
            HF,
            world,
            family=family,
            # Its delta rule is so sensitive to weights that at 2e-3 the first step's rounding (4e-8 of a
            # gradient norm) is 1e-4 of it nine steps later.
            recipe=Recipe(lr=1e-4) if family == "qwen3_next" else ADAM,
            slow=(family, world) not in QUICK,
        )
        for family in OTHERS
        for world in (1, 2, 4)
    ),
    Case("hf-fsdp2x2", HF, 2, tied=True),
    Case("hf-fsdp2x2-mbs2", HF + MBS2, 2),
    Case("hf-fsdp2x2-recompute", HF + RECOMPUTE, 2, family="qwen2"),
    Case("hf-fsdp2x2-recompute-mbs2", RECOMPUTE + MBS2, 2, family="falcon_h1"),
)


@dataclass(frozen=True)
class Comparison:
    """How far a run is from the truth."""

    run: Finished
    truth: Trajectory
    loss: float
    """Largest relative difference of a step's loss."""
    grad_norm: float
    """Largest relative difference of a step's gradient norm."""
    update: float
    """Relative L2 difference of the whole update."""
    right: float
    """Largest difference of the number of tokens that a step got right, beyond those in doubt."""

    def holds(self, recipe: Recipe) -> bool:
        """Whether all differences are within their bounds."""
        steps = max(self.loss, self.grad_norm)
        near = steps < STEP_BOUND and self.update < UPDATE_BOUNDS[recipe.optimizer]
        return near and self.right < 0.5


class Matrix:
    """Runs cases; models and truths are made once."""

    flags: tuple[str, ...] = ("--no-save-optim",)

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = make_rows(60)
        self.data_file = write_rows(folder / "train.jsonl", self.rows)
        self._truths: dict[tuple[object, ...], Trajectory] = {}

    def model(self, case: Any) -> Path:
        """The folder of a case's model."""
        folder = (
            self.folder / f"{case.family}-{case.layers}-{case.tied}-{case.dense}-{case.variant}"
        )
        if not folder.exists():
            options: dict[str, object] = {"mlp_only_layers": list(case.dense)} if case.dense else {}
            options |= VARIANTS.get(case.variant, {})
            self.save(folder, case, options)
        return folder

    def save(self, folder: Path, case: Any, options: dict[str, object]) -> None:
        """Write it."""
        save_model(folder, case.family, tied=case.tied, num_hidden_layers=case.layers, **options)

    def data(self, case: Any) -> Path:
        """The rows that a case is trained on."""
        return self.data_file

    def make_truth(self, case: Any) -> Trajectory:
        """The plain loop of a case."""
        return reference.train(self.model(case), self.rows, self.data_file, case.recipe)

    def weights(self, case: Any, run: Finished) -> dict[str, Tensor]:
        """What a run has trained, read from its checkpoint, whatever wrote it, on one process."""
        return run_rank(megatron_model.exported_from_run, str(run.folder))

    def train(self, case: Any, output: Path, *flags: str, recipe: Recipe | None = None) -> Finished:
        """Train a case through finetune.py."""
        words = ["--hf-model", str(self.model(case)), "--finetune-data-files", str(self.data(case))]
        words += [*(recipe or case.recipe).flags(), *case.flags, *flags]
        if set(TE) <= set(words):
            double = "transformer_engine_double"
            return finetune_on_double(double, output, *words, world=case.world).ok()
        return finetune(output, *words, world=case.world).ok()

    def compare(self, case: Any, output: Path) -> Comparison:
        """Train a case and compare it."""
        if case.truth not in self._truths:
            self._truths[case.truth] = self.make_truth(case)
        truth = self._truths[case.truth]
        run = self.train(case, output, *self.flags)
        norms = [step["grad_norm"] for step in run.steps]
        return Comparison(
            run,
            truth,
            reference.relative(run.losses, truth.losses),
            reference.relative(norms, truth.grad_norms),
            reference.update_error(self.weights(case, run), truth),
            max(
                abs(step["token_accuracy"] * step["trained_tokens"] - right.tokens) - right.close
                for step, right in zip(run.steps, truth.right, strict=True)
            ),
        )


def print_table(cases: Sequence[Any], kind: type[Matrix], against: str) -> bool:
    """Run cases and print a line for each; returns whether all hold."""
    print(
        f"{'case':38} {'ranks':>5}  {'loss':>8}  {'grad norm':>9}  {'update':>8}  {'right':>5}",
        flush=True,
    )
    good = 0
    with tempfile.TemporaryDirectory() as folder:
        matrix = kind(Path(folder))
        for number, case in enumerate(cases):
            found = matrix.compare(case, Path(folder, f"run{number}"))
            holds = found.holds(case.recipe)
            good += holds
            print(
                f"{case.name:38} {case.world:5}  {found.loss:8.1e}  {found.grad_norm:9.1e}  "
                f"{found.update:8.1e}  {max(0, round(found.right)):5}  {'equal' if holds else 'DIFFERS'}",
                flush=True,
            )
    print(
        f"{good} of {len(cases)} cases equal {against} in a plain loop over {ADAM.steps} steps: loss and "
        f"grad norm within {STEP_BOUND:g} relative at each step, the same tokens right, the whole update "
        f"within {UPDATE_BOUNDS['adam']:g} (Adam) and {UPDATE_BOUNDS['sgd']:g} (SGD)"
    )
    return good == len(cases)


def main(
    about: str | None = __doc__,
    every: Sequence[Any] = CASES,
    kind: type[Matrix] = Matrix,
    against: str = "HuggingFace",
) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=str(about).partition("\n")[0])
    parser.add_argument(
        "--table", action="store_true", required=True, help="run and print all cases"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with TEXT in their name")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    cases = [case for case in every if options.only in case.name]
    if not cases:
        parser.error(f"--only {options.only}: no such case")
    return 0 if print_table(cases, kind, against) else 1


if __name__ == "__main__":
    sys.exit(main())
