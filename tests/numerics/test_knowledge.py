"""A taught student on every layout against two transformers models in a plain loop, document by document.

Faults of other trainers that these tests fail on: in fp32 Megatron's cross-entropy overwrites the logits
that are compared (a flat teacher); a mean of micro batches' means; a balancer that depends on the micro
batch; the mask one token too wide; documents of a pack that see each other.
"""

import math

import pytest
import torch
import yaml
from torch.distributed.checkpoint import FileSystemReader
from torch.nn import functional

from tests.helpers import reference
from tests.helpers.launch import finetune
from tests.helpers.models import VOCABULARY, load_model, make_tokenizer, save_model
from tests.helpers.reference import Recipe
from tests.helpers.rows import make_rows, tokens_and_mask, write_rows
from tests.numerics.test_features import extracted

RECIPE = Recipe()
ROWS = make_rows(60)
TP2 = ("--tensor-model-parallel-size", "2")
SP = ("--sequence-parallel",)
PP2 = ("--pipeline-model-parallel-size", "2")
CP2 = ("--context-parallel-size", "2")
MBS2 = ("--micro-batch-size", "2")

# With a teacher that is deeper and wider.
BOTH = {"skip_lm_loss": False, "kd_loss_scale": 0.7, "logit_kl_temperature": 2.0}
# And one of the same width.
HIDDEN = {
    "logit_kl_topk": 20,
    "intermediate_layer_pairs": [
        ["decoder.final_layernorm", "decoder.final_layernorm", "mse"],
        ["decoder.layers.0", "decoder.layers.1"],
    ],
    "intermediate_loss_scale": 0.4,
}
SETTINGS = {"both": (BOTH, 96), "hidden": (HIDDEN, 64)}


def document_parts(student, teacher, ids, mask, settings):
    """Sums over the trained tokens of a document: cross-entropy, divergence, distance of hidden states."""
    chosen = torch.nonzero(mask[1:]).flatten()
    outputs = []
    for model in (student, teacher):
        with torch.set_grad_enabled(model is student):
            out = model(input_ids=ids.unsqueeze(0), use_cache=False, output_hidden_states=True)
        logits = out.logits[0, :-1][chosen]
        outputs.append((logits, [state[0, :-1][chosen] for state in out.hidden_states]))
    (own, mine), (theirs, its) = outputs
    lm = functional.cross_entropy(own, ids[1:][chosen], reduction="sum")
    t = settings.get("logit_kl_temperature", 1.0)
    q, p = functional.softmax(own / t, -1), functional.softmax(theirs / t, -1)
    if k := settings.get("logit_kl_topk"):
        top = p.topk(k).indices
        q, p = (
            torch.cat([x.gather(-1, top), 1 - x.gather(-1, top).sum(-1, True)], -1) for x in (q, p)
        )
    divergence = t**2 * (p * (p.log() - q.log())).sum()
    hidden = torch.zeros(())
    if "intermediate_layer_pairs" in settings:
        # hidden_states: the embedding's, of each layer; the last one is behind the final norm.
        mse = (mine[-1] - its[-1]).square().mean(-1).sum()
        cosine = (1 - functional.cosine_similarity(mine[1], its[2], dim=-1)).sum()
        hidden = (mse + cosine) / 2
    return lm, divergence, hidden


def objective(lm, divergence, hidden, settings):
    taught = divergence + settings.get("intermediate_loss_scale", 1.0) * hidden
    return (
        taught
        if settings.get("skip_lm_loss", True)
        else lm + settings.get("kd_loss_scale", 1.0) * taught
    )


def plain_loop(student, teacher, settings, data_file):
    """Of each step the means of cross-entropy, divergence, hidden and total, and the gradient norm."""
    tokenizer = make_tokenizer()
    examples = [tokens_and_mask(row, tokenizer) for row in ROWS]
    optimizer = RECIPE.make_optimizer(student.parameters())
    steps = []
    for step, batch in enumerate(reference.batches(ROWS, data_file, RECIPE)):
        tokens = sum(int(examples[row][1][1:].sum()) for row in batch)
        sums = torch.zeros(4, dtype=torch.float64)
        for row in batch:
            parts = document_parts(student, teacher, *examples[row], settings)
            lm, divergence, hidden = parts
            total = objective(lm, divergence, hidden, settings)
            (total / tokens).backward()
            sums += torch.stack([part.detach().double() for part in (*parts, total)])
        gradients = [p.grad for p in student.parameters() if p.grad is not None]
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
        for gradient in gradients:
            gradient.mul_(min(1.0, RECIPE.clip / (norm + 1e-6)))
        for group in optimizer.param_groups:
            group["lr"] = RECIPE.learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        steps.append([*(sums / tokens).tolist(), norm])
    return steps


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Student, teachers, data and the truth of each setting."""
    folder = tmp_path_factory.mktemp("knowledge")
    save_model(folder / "student", "qwen3")
    data_file = write_rows(folder / "train.jsonl", ROWS)
    truths = {}
    for name, (settings, width) in SETTINGS.items():
        save_model(folder / name, "qwen3", num_hidden_layers=4, hidden_size=width)
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
        models = (load_model(folder / "student"), load_model(folder / name))
        truths[name] = plain_loop(*models, settings, data_file)
    return folder, data_file, truths


def taught(case, output, name, *flags, world=1, teacher=None):
    folder, data_file, _ = case
    return finetune(
        output,
        *("--hf-model", str(folder / "student"), "--finetune-data-files", str(data_file)),
        *("--export-kd-teacher-load", str(teacher or folder / name)),
        *("--export-kd-cfg", str(folder / f"{name}.yaml")),
        *(*RECIPE.flags(), *flags),
        world=world,
    )


def parts_of(run):
    names = ("lm_loss", "kd_logits_loss", "kd_hidden_loss", "kd_total_loss", "grad_norm")
    return [[step.get(name, 0.0) for name in names] for step in run.steps]


@pytest.mark.parametrize(
    ("name", "flags", "world"),
    [
        pytest.param("both", (), 1, id="one"),
        pytest.param("both", PP2 + MBS2, 2, id="pp2-mbs2"),
        pytest.param("hidden", TP2 + SP, 2, id="hidden-tp2-sp", marks=pytest.mark.slow),
        pytest.param("both", TP2, 2, id="tp2", marks=pytest.mark.slow),
        pytest.param("both", TP2 + SP, 2, id="tp2-sp", marks=pytest.mark.slow),
        pytest.param("both", (), 2, id="dp2", marks=pytest.mark.slow),
        pytest.param("both", CP2 + MBS2, 2, id="cp2-mbs2", marks=pytest.mark.slow),
        pytest.param("both", TP2 + SP + PP2, 4, id="tp2-sp-pp2", marks=pytest.mark.slow),
        pytest.param("hidden", (), 1, id="hidden-one", marks=pytest.mark.slow),
    ],
)
def test_a_taught_student_equals_a_plain_loop(case, tmp_path, name, flags, world):
    run = taught(case, tmp_path / "out", name, *flags, "--no-save-optim", world=world).ok()
    for found, expected in zip(parts_of(run), case[2][name], strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def learned(output, model, *flags, world=1):
    """A student of what is stored, or of a teacher, without a temperature."""
    return finetune(output, "--hf-model", str(model), *RECIPE.flags(), *flags, world=world)


@pytest.mark.parametrize(
    ("flags", "world"),
    [
        pytest.param(CP2 + MBS2, 2, id="cp2-mbs2"),
        pytest.param(TP2 + SP + PP2, 4, id="tp2-sp-pp2", marks=pytest.mark.slow),
    ],
)
def test_all_tokens_stored_teach_what_the_teacher_does(case, tmp_path, flags, world):
    """Offline with k = vocabulary, on a layout that cuts rows, equals online in one process."""
    folder, data_file, _ = case
    (tmp_path / "kd.yaml").write_text("skip_lm_loss: false\nkd_loss_scale: 0.7\n")
    settings = ("--export-kd-cfg", str(tmp_path / "kd.yaml"), "--no-save-optim")
    all_tokens = ("--no-hidden-states", "--top-k", str(VOCABULARY))
    extracted(folder / "both", data_file, tmp_path / "features", more=all_tokens)
    stored = ("--offline-distillation-data", str(tmp_path / "features"))
    online = learned(
        tmp_path / "online",
        folder / "student",
        *("--finetune-data-files", str(data_file)),
        *("--export-kd-teacher-load", str(folder / "both"), *settings),
    ).ok()
    offline = learned(
        tmp_path / "offline", folder / "student", *stored, *settings, *flags, world=world
    ).ok()
    for found, expected in zip(parts_of(offline), parts_of(online), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_resumed_student_is_the_uninterrupted_one_without_its_teacher(case, tmp_path):
    """Bit for bit; its checkpoint and export are a student's, whose weights the teacher is no part of."""
    flags = ("both", *TP2, "--save-hf")
    straight = taught(case, tmp_path / "straight", *flags, world=2).ok()
    taught(case, tmp_path / "out", *flags, "--exit-interval", "4", world=2).ok()
    resumed = taught(case, tmp_path / "out", *flags, world=2).ok()
    assert parts_of(resumed) == parts_of(straight)
    other = taught(case, tmp_path / "out", "hidden", *TP2, "--save-hf", world=2)
    assert other.status == 2 and "taught otherwise: " in other.console
    assert "teacher is " in other.console and "pairs is " in other.console
    folder, data_file, _ = case
    alone = learned(
        tmp_path / "alone",
        folder / "student",
        *("--finetune-data-files", str(data_file), *TP2),
        world=2,
    ).ok()
    keys = [
        set(
            FileSystemReader(run.folder / "checkpoints/iter_0000010")
            .read_metadata()
            .state_dict_metadata
        )
        for run in (resumed, alone)
    ]
    assert keys[0] == keys[1]
    assert len(load_model(resumed.folder / "hf").model.layers) == 2


@pytest.mark.slow
def test_a_teacher_is_a_run_or_one_of_its_checkpoints(case, tmp_path):
    """Read on another layout than it was trained on; the same losses as of its export."""
    folder, data_file, _ = case
    teacher = learned(
        tmp_path / "teacher",
        folder / "both",
        *("--finetune-data-files", str(data_file), "--save-hf", "--save-interval", "5"),
    ).ok()
    expected = taught(case, tmp_path / "of-hf", "both", teacher=teacher.folder / "hf").ok()
    checkpoints = teacher.folder / "checkpoints"
    for name, source in (
        ("run", teacher.folder),
        ("folder", checkpoints),
        ("one", checkpoints / "iter_0000010"),
    ):
        run = taught(case, tmp_path / name, "both", *TP2, world=2, teacher=source).ok()
        for found, wanted in zip(parts_of(run), parts_of(expected), strict=True):
            assert found == pytest.approx(wanted, rel=1e-5), name
    earlier = taught(case, tmp_path / "earlier", "both", teacher=checkpoints / "iter_0000005").ok()
    assert parts_of(earlier) != parts_of(expected)


@pytest.mark.slow
def test_a_student_with_experts_has_a_dense_teacher(case, hf_model, tmp_path):
    """Experts over ranks that read different packs: the same losses as in one process."""
    folder, data_file, _ = case
    flags = (
        *(
            "--finetune-data-files",
            str(data_file),
            "--export-kd-teacher-load",
            str(folder / "both"),
        ),
        "--no-save-optim",
    )
    student = hf_model("qwen3_moe")
    one = learned(tmp_path / "one", student, *flags).ok()
    ep2 = learned(
        tmp_path / "ep2", student, *flags, "--expert-model-parallel-size", "2", world=2
    ).ok()
    for found, expected in zip(parts_of(ep2), parts_of(one), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    assert one.steps[-1]["kd_logits_loss"] < one.steps[0]["kd_logits_loss"]
