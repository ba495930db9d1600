import pytest
import torch

from post_training.batch.packed_documents import RoutedDocuments
from tests.helpers import megatron_model, reference
from tests.helpers.launch import finetune, run_ranks
from tests.helpers.models import VOCABULARY, load_model
from tests.helpers.packs import make_pack
from tests.helpers.reference import Recipe
from tests.helpers.rows import make_rows, write_rows

LENGTHS = (40, 12)


def random_pack(seed: int) -> dict[str, torch.Tensor]:
    """Two documents and padding, which has no label."""
    generator = torch.Generator().manual_seed(seed)
    real = sum(LENGTHS)
    mask = torch.zeros(64, dtype=torch.uint8)
    mask[:real] = torch.randint(0, 2, (real,), generator=generator)
    mask[LENGTHS[0] - 1] = mask[real - 1] = 1
    return make_pack(torch.randint(0, VOCABULARY, (64,), generator=generator), mask, LENGTHS)


@pytest.fixture(scope="module")
def case(hf_model):
    """A model, packs, and by a plain HuggingFace model: tokens by expert, and the auxiliary loss."""
    folder = hf_model("qwen3_moe", num_hidden_layers=4, mlp_only_layers=[1])
    packs = [random_pack(seed) for seed in range(4)]
    model = load_model(folder)
    tokens, balance, trained = torch.zeros(3, 4), 0.0, 0
    with torch.no_grad():
        for pack in packs:
            for begin, length in ((0, LENGTHS[0]), LENGTHS):
                ids, mask = (pack[k][begin : begin + length] for k in ("input_ids", "loss_mask"))
                losses, routing = reference.losses_and_routing(model, ids, mask)
                tokens += torch.stack([reference.choices(layer, 2) for layer in routing])
                layers = [reference.imbalance(layer, 2).item() for layer in routing]
                balance += len(losses) * sum(layers) / len(layers)
                trained += len(losses)
    assert tokens.sum() == len(packs) * sum(LENGTHS) * 2 * 3
    return folder, packs, tokens, balance / trained


TP2 = ["--tensor-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]
VPP2 = ["--num-virtual-stages-per-pipeline-rank", "2"]
EP2 = ["--expert-model-parallel-size", "2"]
CP2 = ["--context-parallel-size", "2"]
RECOMPUTE = [
    *("--recompute-granularity", "full", "--recompute-method", "uniform"),
    *("--recompute-num-layers", "1"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "world"),
    [
        ([], 1),
        (RECOMPUTE, 1),
        (["--recompute-granularity", "selective", "--recompute-modules", "moe"], 1),
        ([*EP2, "--micro-batch-size", "2"], 2),
        (CP2, 2),
        (PP2 + VPP2 + RECOMPUTE, 2),
        (EP2 + TP2, 4),
        (EP2 + TP2 + PP2 + ["--expert-tensor-parallel-size", "1"], 4),
        (EP2 + TP2 + CP2, 4),
    ],
    ids=["one", "recompute", "recompute-moe", "ep2-mbs2", "cp2", "pp2-vpp2-recompute"]
    + ["ep2-tp2-dp2", "ep2-tp2-pp2", "ep2-tp2-cp2"],
)
def test_each_token_is_counted_once(case, tmp_path, layout, world):
    folder, packs, tokens, balance = case
    argv = megatron_model.flags(
        str(folder),
        str(tmp_path / "out"),
        *("--global-batch-size", "4", "--moe-aux-loss-coeff", "0.01", *layout),
    )
    for totals in run_ranks(megatron_model.expert_totals, world, argv, packs):
        assert totals.tokens.tolist() == tokens.tolist()
        assert totals.auxiliary_loss == pytest.approx(balance, rel=1e-6)
        worst = float((tokens.amax(1) / tokens.mean(1)).max())
        assert float(totals.imbalance.max()) == pytest.approx(worst)


@pytest.mark.slow
def test_a_document_weighs_the_same_from_whatever_source(hf_model, tmp_path):
    """Rows in two files, which the loss mask tells apart, or the same rows in one."""
    rows = make_rows(40)
    files = [write_rows(tmp_path / f"{i}.jsonl", rows[20 * i : 20 * i + 20]) for i in range(2)]
    whole = write_rows(tmp_path / "all.jsonl", rows)
    flags = ["--hf-model", str(hf_model("qwen3_moe")), *Recipe(steps=3, balance=0.1).flags()]
    two, one = (
        finetune(tmp_path / name, *flags, "--no-save-optim", "--finetune-data-files", *map(str, of))
        .ok()
        .steps
        for name, of in (("two", files), ("one", [whole]))
    )
    assert "sources" in two[0] and "sources" not in one[0]
    for key in ("lm_loss", "grad_norm", "moe_aux_loss", "trained_tokens"):
        values = [[step[key] for step in steps] for steps in (two, one)]
        assert values[0] == pytest.approx(values[1], rel=1e-12), key


def _jitter(argv):
    """What the noise makes of ones, in training and in evaluation."""
    _, built = megatron_model.set_up([*argv, "--moe-input-jitter-eps", "0.1"])
    routers = [m for m in megatron_model.unwrapped(built).modules() if hasattr(m, "input_jitter")]
    ones = torch.ones(4, 1, 8)
    return [routers[0].train(training).apply_input_jitter(ones) for training in (True, False)]


def test_nothing_is_evaluated_with_noise(hf_model, tmp_path):
    argv = megatron_model.flags(str(hf_model("qwen3_moe")), str(tmp_path / "out"))
    ((training, evaluation),) = run_ranks(_jitter, 1, argv)
    assert (training - 1).abs().max() > 0.01
    assert torch.equal(evaluation, torch.ones_like(evaluation))


def test_documents_of_a_row():
    routed = RoutedDocuments.from_row([3, 1, 2], torch.tensor([0, 1, 1, 0, 1, 0]))
    assert routed.of_token.tolist() == [0, 0, 0, 1, 2, 2]
    assert routed.lengths.tolist() == [3, 1, 2]
    assert routed.trained.tolist() == [2, 0, 1]
    part = routed.part(torch.tensor([1, 5]))
    assert part.of_token.tolist() == [0, 2]
    assert part.lengths is routed.lengths
