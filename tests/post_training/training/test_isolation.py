"""That a run with a leak is stopped, whatever its layout, and that a right one is not touched."""

import json
import shutil
from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from post_training.training.isolation import (
    EARLIER,
    LATER,
    OTHERS,
    Verdict,
    perturbed,
    reason_not_to_check,
)
from tests.helpers import faults
from tests.helpers.launch import finetune
from tests.helpers.packs import make_pack, stacked
from tests.helpers.reference import Recipe

VOCABULARY = 391
RECIPE = Recipe(steps=3)


def packs_of(*lengths, trained=0.5):
    tokens = sum(lengths)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (tokens,), generator=generator)
    mask = (torch.rand(tokens, generator=generator) < trained).byte()
    return stacked([make_pack(ids, mask, lengths)])


def test_what_is_replaced_and_what_is_watched():
    lengths = [10, 12, 20, 6]
    packs = packs_of(*lengths)
    same, other = perturbed(packs, lengths, VOCABULARY)
    assert torch.equal(same["input_ids"], packs["input_ids"])
    assert all(torch.equal(same[name], other[name]) for name in ("loss_mask", "groups"))
    changed = torch.nonzero((same["input_ids"] != other["input_ids"]).flatten()).flatten().tolist()
    # The middle third of a document with neighbours on either side.
    assert changed == [*range(14, 18)]
    assert other["input_ids"].max() < VOCABULARY
    groups, mask = same["groups"].flatten().tolist(), same["loss_mask"].flatten().tolist()
    # In each of the other documents the first label, whose loss sees the fewest neighbours.
    assert all(mask[second] == 1 for second in (1, 23, 43))
    assert set(mask[:10]) == {0, 1}
    assert set(groups[:10] + groups[30:]) == {OTHERS}
    assert set(groups[10:14]) == {EARLIER} and mask[10:14] == [1] * 4
    assert mask[14:18] == [0] * 4
    assert set(groups[18:22]) == {LATER} and mask[18:22] == [1] * 4
    # About as many as are trained: the check takes no more memory than a step.
    assert sum(mask) <= int(packs["loss_mask"].sum()) * 1.5 + len(lengths) + 8


@pytest.mark.parametrize("lengths", [[3], [4], [2, 2], [1, 1, 5], [200], [3, 300]])
def test_odd_packs_do_no_harm(lengths):
    same, other = perturbed(packs_of(*lengths), lengths, VOCABULARY)
    assert same["loss_mask"].max() <= 1 and same["groups"].max() <= LATER
    assert (same["input_ids"] != other["input_ids"]).any()


def test_a_vocabulary_of_two_still_changes():
    packs = packs_of(9, 9)
    packs["input_ids"] %= 2
    same, other = perturbed(packs, [9, 9], 2)
    assert (same["input_ids"] != other["input_ids"]).any()
    assert other["input_ids"].max() <= 1


@pytest.mark.parametrize(
    ("moved", "change", "words"),
    [
        ([0, 0, 5], [0.0, 0.0, 0.1], None),
        ([1, 0, 5], [1e-9, 0.0, 0.1], "see each other"),
        ([0, 1, 5], [0.0, 1e-9, 0.1], "not causal"),
        ([0, 0, 0], [0.0, 0.0, 0.0], "sees nothing"),
        ([1, 0, 5], [float("inf"), 0.0, 0.1], "see each other"),
    ],
)
def test_verdict(moved, change, words):
    complaint = Verdict([10, 10, 10], moved, change).complaint()
    assert complaint is None if words is None else words in (complaint or "")


def test_a_model_whose_losses_are_no_numbers_is_the_steps_to_tell(words, hf_model, tmp_path):
    """It seems to see nothing, as every loss stays what it is."""
    folder = shutil.copytree(hf_model("qwen3"), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][:] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    run = finetune(tmp_path / "out", *words(), "--hf-model", str(folder))
    assert run.status == 1 and "Traceback" not in run.console
    assert "is not checked" in run.console and "sees nothing" not in run.console
    assert "error: step 1: the loss is nan" in run.console


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("moe_expert_capacity_factor", 1.0),
        ("moe_router_load_balancing_type", "sinkhorn"),
        ("moe_router_fusion", True),
        ("fp8", "e4m3"),
        ("cuda_graph_impl", "local"),
    ],
)
def test_where_documents_may_depend_on_each_other_it_says_so(flag, value):
    run = {
        "moe_expert_capacity_factor": None,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_router_fusion": False,
        "fp8": None,
        "fp4": None,
        "cuda_graph_impl": "none",
    }
    assert reason_not_to_check(Namespace(**run)) is None
    assert reason_not_to_check(Namespace(**run | {flag: value}))


@pytest.fixture(scope="module")
def words(hf_model, chat_data):
    def of(family="qwen3", **options):
        model = str(hf_model(family, **options))
        return [
            *("--hf-model", model, "--finetune-data-files", str(chat_data.file)),
            *(*RECIPE.flags(), "--no-save-optim"),
        ]

    return of


TP2 = ["--tensor-model-parallel-size", "2"]
CP2 = ["--context-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]
EP2 = ["--expert-model-parallel-size", "2"]
LAYOUTS = {
    "one": ([], 1),
    "dp2": ([], 2),
    "tp2-sp": ([*TP2, "--sequence-parallel"], 2),
    "cp2": (CP2, 2),
    "cp2-mbs2": ([*CP2, "--micro-batch-size", "2"], 2),
    "fsdp2": (["--use-torch-fsdp2"], 2),
    "pp2": (PP2, 2),
    "pp2-mbs2": ([*PP2, "--micro-batch-size", "2"], 2),
    "vpp2": ([*PP2, "--num-virtual-stages-per-pipeline-rank", "2"], 2),
    "ep2": (EP2, 2),
    "ep2-bf16": ([*EP2, "--bf16"], 2),
}
slow = {name: pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS}


@pytest.mark.parametrize(
    "layout", ["one", slow["dp2"], slow["tp2-sp"], slow["cp2"], slow["pp2"], slow["vpp2"]]
)
def test_a_leak_stops_the_run_before_its_first_step(words, tmp_path, layout):
    flags, world = LAYOUTS[layout]
    run = finetune(
        tmp_path / "out",
        *words(num_hidden_layers=4 if layout == "vpp2" else 2),
        *flags,
        world=world,
        inject=faults.leaky_attention,
    )
    assert run.statuses == [1] * world
    (line,) = [line for line in run.console.splitlines() if line.startswith("error")]
    assert "documents of a pack see each other" in line and "--no-isolation-check" in line
    assert "Traceback" not in run.console
    assert not (run.folder / "metrics.jsonl").exists()
    assert not any((run.folder / "checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "text"),
    [(faults.unlike_documents, "see each other"), (faults.blind_model, "sees nothing")],
)
def test_other_faults_are_seen(words, tmp_path, fault, text):
    run = finetune(tmp_path / "out", *words(), inject=fault)
    assert run.statuses == [1] and text in run.console


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", "ep2", "ep2-bf16"])
def test_with_experts_a_weak_leak_is_seen_too(words, tmp_path, layout):
    """A millionth of the pack's mean value (in bf16 a hundredth, which rounding leaves over)."""
    flags, world = LAYOUTS[layout]
    fault = faults.weak_leak_in_bf16 if "bf16" in layout else faults.weak_leak
    run = finetune(tmp_path / "out", *words("qwen3_moe"), *flags, world=world, inject=fault)
    assert run.statuses == [1] * world and "documents of a pack see each other" in run.console


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "layout"),
    [("qwen3", name) for name in ("one", "tp2-sp", "cp2-mbs2", "fsdp2", "vpp2")]
    + [("qwen3_moe", name) for name in ("fsdp2", "vpp2", "ep2", "ep2-bf16")],
)
def test_the_check_changes_nothing(words, tmp_path, family, layout):
    """Bit for bit, with dropout on, in a run that evaluates and in one that resumes."""
    flags, world = LAYOUTS[layout]
    options = {"num_hidden_layers": 4 if layout == "vpp2" else 2}
    if layout == "ep2":
        # So few tokens for each that one more rounds otherwise: routed freely, others' losses would move.
        options |= {"num_experts": 32, "num_experts_per_tok": 4}
    all_flags = [
        *words(family, **options),
        *("--hidden-dropout", "0.1", "--split-ratio", "0.8,0.2", "--eval-interval", "2"),
        *("--exit-interval", "2", *flags),
    ]
    all_flags.remove("--no-save-optim")
    kept = ("iteration", "lm_loss", "grad_norm", "trained_tokens", "split", "loss", "tokens")
    records = {}
    for check in ("--isolation-check", "--no-isolation-check"):
        for _ in range(2):
            run = finetune(tmp_path / check, *all_flags, check, world=world).ok()
            assert ("isolation checked in" in run.console) == (check == "--isolation-check")
        records[check] = [{k: v for k, v in r.items() if k in kept} for r in run.records]
    assert records["--isolation-check"] == records["--no-isolation-check"]
    assert len(records["--isolation-check"]) >= 4, json.dumps(records)


def test_tokens_of_pictures_are_neither_replaced_nor_put_in():
    image, vocabulary = 7, 16
    ids = torch.tensor([[1, 2, 3, 4, 1, *[image] * 12, 15, 15, 15, 15, 2, 5, 6, 1, 2]])
    packs = {
        "input_ids": ids,
        "loss_mask": torch.ones_like(ids, dtype=torch.uint8),
        "document_lengths": torch.tensor([[4, 18, 4]]),
    }
    before, after = perturbed(packs, [4, 18, 4], vocabulary, (image,))
    assert torch.equal(before["input_ids"], ids)
    moved = (ids != after["input_ids"]).flatten().nonzero().flatten().tolist()
    # Behind the picture; 15 would have become 7, and something of the document follows.
    assert moved == [17, 18] and after["input_ids"][0, 17] == 8
    later = (before["groups"] == 2) & (before["loss_mask"] == 1)
    assert later.any()
