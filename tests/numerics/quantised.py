"""Quantised models on every layout: the same scales, the same losses before and after quantisation.

    python tests/numerics/quantised.py [FAMILY]      all cases; exit status 1 if one differs

Scales are compared, not losses of training: one number that rounds the other way is amplified (1e-7 of
noise on the weights moves logits by 1.6 % in INT8).
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from torch import Tensor

from tests.helpers.checkpoint import tensors
from tests.helpers.launch import Finished, finetune
from tests.helpers.models import save_model
from tests.helpers.rows import make_rows, write_rows
from tests.numerics.equivalence import EP2, ETP1, MBS2, PP2, SP, TP2

BLOCKS = """
quant_cfg:
  - {quantizer_name: "*", enable: false}
  - {quantizer_name: "*weight_quantizer", cfg: {num_bits: 4, block_sizes: {-1: 8, type: static}}}
  - {quantizer_name: "*output_layer*", enable: false}
  - {quantizer_name: "*router*", enable: false}
algorithm: max
"""
FORMATS = {
    "qwen3": ("INT8_DEFAULT_CFG", "FP8_DEFAULT_CFG", "blocks.yaml"),
    "qwen3_moe": ("INT8_WEIGHT_ONLY_CFG", "blocks.yaml"),
    "deepseek_v3": ("blocks.yaml",),
    "gpt_oss": ("INT8_WEIGHT_ONLY_CFG",),
    **dict.fromkeys(("glm4", "granite", "phi3"), ("INT8_DEFAULT_CFG", "blocks.yaml")),
}
BOUND = 1e-5


@dataclass(frozen=True)
class Case:
    """A model on one parallel layout."""

    layout: str
    flags: tuple[str, ...] = ()
    world: int = 1
    family: str = "qwen3"
    taught: bool = False
    """By the weights themselves, of full precision; scales are those without a teacher."""


CASES = (
    Case("tp2", TP2, 2),
    Case("tp2-sp", TP2 + SP, 2),
    Case("pp2", PP2, 2),
    Case("dp2-mbs2", MBS2, 2),
    Case("tp2-pp2", TP2 + PP2, 4),
    Case("taught-tp2-sp", TP2 + SP, 2, taught=True),
    Case("taught-pp2-mbs2", PP2 + MBS2, 2, taught=True),
    Case("taught-dp2", (), 2, taught=True),
    Case("ep2", EP2, 2, "qwen3_moe"),
    Case("tp2-sp", TP2 + SP, 2, "qwen3_moe"),
    Case("tp2-etp1", TP2 + ETP1, 2, "qwen3_moe"),
    Case("ep2-tp2-etp1", EP2 + TP2 + ETP1, 2, "qwen3_moe"),
    Case("ep2-tp2", EP2 + TP2, 4, "qwen3_moe"),
    Case("ep2-pp2", EP2 + PP2, 4, "qwen3_moe"),
    *(
        Case(layout, flags, 2, family)
        for family in ("deepseek_v3", "gpt_oss")
        for layout, flags in (
            ("ep2-tp2-etp1", EP2 + TP2 + ETP1),
            ("tp2-sp", TP2 + SP + ETP1),
            ("pp2", PP2),
        )
    ),
    *(
        Case(layout, flags, 2, family)
        for family in ("glm4", "granite", "phi3")
        for layout, flags in (("tp2-sp", TP2 + SP), ("pp2", PP2), ("dp2-mbs2", MBS2))
    ),
)


def scales(checkpoint: Path) -> dict[str, Tensor]:
    """Largest values of weights and inputs, by name."""
    return {name: value for name, value in tensors(checkpoint).items() if "_amax" in name}


class Matrix:
    """Runs cases; models are made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data_file = write_rows(folder / "train.jsonl", make_rows(60))
        (folder / "blocks.yaml").write_text(BLOCKS)

    def train(self, case: Case, form: str, output: Path, *flags: str) -> Finished:
        """Quantise and train a step."""
        model = self.folder / case.family
        if not model.exists():
            save_model(model, case.family)
        teacher = ("--export-kd-teacher-load", str(model)) if case.taught else ()
        file = str(self.folder / form) if form.endswith(".yaml") else form
        return finetune(
            output,
            *("--hf-model", str(model), "--finetune-data-files", str(self.data_file)),
            *("--seq-length", "128", "--global-batch-size", "4", "--lr", "1e-3"),
            *("--export-quant-cfg", file, "--calib-size", "20", "--train-iters", "1"),
            *(*case.flags, *teacher),
            *flags,
            world=case.world,
        ).ok()

    def differences(self, run: Finished, truth: Finished) -> tuple[float, float]:
        """Of scales and of the losses before and after quantisation, relative to those of `truth`."""
        found, expected = (scales(r.folder / "checkpoints/iter_0000001") for r in (run, truth))
        assert found.keys() == expected.keys() and len(found) > 4, found.keys() ^ expected.keys()
        worst = max(
            float((found[name] - value).abs().max() / value.abs().max())
            for name, value in expected.items()
        )
        ours, theirs = (
            json.loads((r.folder / "quantisation.json").read_text()) for r in (run, truth)
        )
        losses = max(abs(ours[key] / theirs[key] - 1) for key in ("before", "quantised"))
        assert theirs["quantised"] != theirs["before"], "it was quantised"
        return worst, losses


def main() -> int:
    """Run all cases; the status is 1 if one differs."""
    good = True
    with tempfile.TemporaryDirectory() as name:
        matrix = Matrix(Path(name))
        runs = (Path(name, f"run{number}") for number in itertools.count())
        chosen = sys.argv[1:] or FORMATS
        for family, form in [(key, form) for key in chosen for form in FORMATS[key]]:
            truth = matrix.train(Case("one", family=family), form, next(runs))
            for case in CASES:
                if case.family != family:
                    continue
                scale, loss = matrix.differences(matrix.train(case, form, next(runs)), truth)
                good = good and scale < BOUND
                print(
                    f"{family:10} {form:18} {case.layout:14} scales {scale:.1e}  losses {loss:.1e}",
                    flush=True,
                )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
