"""Drafts in whole runs: the same losses on every layout, from stored features, and after a resume."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.launch import finetune, run_ranks
from tests.helpers.reference import Recipe
from tests.numerics.equivalence import MBS2, SP, STEP_BOUND, TP2
from tests.numerics.test_features import extracted

ONLINE = ("--draft", "eagle3")
CUT = ("--draft-vocab-size", "128")


def run(model, folder, *flags, world=1):
    return finetune(folder, "--hf-model", str(model), *Recipe().flags(), *flags, world=world)


def compare(found, expected, bound=STEP_BOUND):
    """Losses, norms and the parts of each step."""
    assert len(found.steps) == len(expected.steps) == 10
    for one, other in zip(found.steps, expected.steps, strict=True):
        for name in ("lm_loss", "grad_norm", *(n for n in other if n.startswith("draft_loss"))):
            assert one[name] == pytest.approx(other[name], rel=bound), name


@pytest.fixture(scope="module")
def base(hf_model):
    return hf_model("qwen3", tied=True, num_hidden_layers=3)


@pytest.fixture(scope="module")
def alone(base, chat_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "out"
    return run(base, folder, *ONLINE, *CUT, "--finetune-data-files", str(chat_data.file)).ok()


def test_a_draft_learns_and_says_of_each_step_how_much(alone):
    first, last = alone.steps[0], alone.steps[-1]
    for step in range(1, 5):
        assert 0 < last[f"draft_loss_{step}"] < first[f"draft_loss_{step}"]
        assert 0 <= last[f"draft_accuracy_{step}"] <= 1
    weights = [0.9**step for step in range(4)]
    parts = [last[f"draft_loss_{step}"] for step in range(1, 5)]
    # Tokens at a document's begin are drafted by fewer steps; here none of them is trained.
    total = sum(weight * part for weight, part in zip(weights, parts, strict=True))
    assert last["lm_loss"] == pytest.approx(total, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "world"),
    [(MBS2, 1), ((), 2), (TP2, 2), (TP2 + SP, 2), (TP2 + SP + MBS2, 4)],
    ids=["mbs2", "dp2", "tp2", "tp2-sp", "tp2-sp-dp2-mbs2"],
)
def test_layouts(alone, base, chat_data, tmp_path, layout, world):
    data = ("--finetune-data-files", str(chat_data.file))
    compare(run(base, tmp_path / "out", *ONLINE, *CUT, *data, *layout, world=world).ok(), alone)


@pytest.mark.slow
def test_stored_features_teach_what_the_base_does(alone, base, chat_data, tmp_path):
    extracted(base, chat_data.file, tmp_path / "fp32")
    extracted(base, chat_data.file, tmp_path / "bf16", more=("--features-dtype", "bf16"))
    offline = ("--export-offline-model", *CUT)
    for dtype, layout, world, bound in (
        ("fp32", (), 1, STEP_BOUND),
        ("fp32", TP2 + SP, 2, STEP_BOUND),
        ("bf16", (), 2, 1e-3),
    ):
        data = ("--offline-distillation-data", str(tmp_path / dtype))
        name = f"{dtype}-{world}-{len(layout)}"
        compare(
            run(base, tmp_path / name, *offline, *data, *layout, world=world).ok(), alone, bound
        )
    for fault, status in (("miscounted", 2), (None, 0)):  # the base comes from its folder
        assert run_ranks(_export_run, 1, str(tmp_path / "fp32-1-0"), fault) == [status]
    # The same documents without their features: the base is run.
    data = ("--offline-distillation-data", str(tmp_path / "bf16"))
    compare(run(base, tmp_path / "online", *ONLINE, *CUT, *data).ok(), alone, 0)


@pytest.mark.slow
def test_a_mixture_of_stored_features_is_the_mixture_of_their_rows(base, chat_data, tmp_path):
    rows = chat_data.file.read_text().splitlines(keepends=True)
    online, stored = [], []
    for name, own, weight in (("a", rows[:20], 3), ("b", rows[20:], 1)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(own))
        extracted(base, file, tmp_path / name)
        online.append(f"{file}={weight}")
        stored.append(f"{tmp_path / name}={weight}")
    offline = ("--export-offline-model", "--offline-distillation-data", *stored)
    expected = run(base, tmp_path / "online", *ONLINE, "--finetune-data-files", *online).ok()
    found = run(base, tmp_path / "offline", *offline, world=2).ok()
    compare(found, expected)
    for one, other in zip(found.steps, expected.steps, strict=True):
        by_folder, by_file = (list(each["sources"].values()) for each in (one, other))
        assert (
            len(by_folder) == len(by_file) == 2 and one["sources"].keys() != other["sources"].keys()
        )
        for here, there in zip(by_folder, by_file, strict=True):
            assert here["tokens"] == there["tokens"]
            assert (here["loss"] or 0.0) == pytest.approx(there["loss"] or 0.0, rel=STEP_BOUND)
    for wrong, said in ((stored[0], "twice"), (str(tmp_path / "b"), "every folder a weight")):
        refused = run(base, tmp_path / "no", *offline[:2], stored[0], wrong)
        assert refused.status == 2 and said in refused.console


@pytest.mark.slow
@pytest.mark.parametrize("offline", [False, True], ids=["online", "offline"])
def test_a_resumed_run_is_the_uninterrupted_one(alone, base, chat_data, tmp_path, offline):
    flags: tuple[str, ...] = (*ONLINE, *CUT, "--finetune-data-files", str(chat_data.file))
    if offline:
        extracted(base, chat_data.file, tmp_path / "F")
        flags = ("--export-offline-model", *CUT, "--offline-distillation-data", str(tmp_path / "F"))
    run(base, tmp_path / "out", *flags, "--exit-interval", "4").ok()
    resumed = run(base, tmp_path / "out", *flags).ok()
    if not offline:
        compare(resumed, alone, 0)
    straight = run(base, tmp_path / "straight", *flags).ok() if offline else alone
    compare(resumed, straight, 0)
    other = run(base, tmp_path / "out", *flags, "--draft-vocab-size", "64")
    assert other.status == 2 and "its draft is" in other.console
    other = run(base, tmp_path / "out", *flags, "--draft-loss-decay", "0.5")
    assert other.status == 2 and "draft_loss_decay is 0.9 there and 0.5 here" in other.console


def _evaluated(output_dir, base, file, *flags):
    """The answers that scripts/evaluate_draft.py gives."""
    from scripts import evaluate_draft

    out = f"{output_dir}/draft.json"
    sys.argv = ["evaluate_draft.py", "--hf-model", base, "--draft", f"{output_dir}/draft"]
    sys.argv += ["--data", file, "--limit", "5", "--max-new-tokens", "8", "--json", out, *flags]
    sys.argv += ["--num-speculative-tokens", "3"]
    assert evaluate_draft.main() == 0
    return json.loads(Path(out).read_text())["answers"]


def _export_run(output_dir, fault=None):
    """Export a run's draft; with a fault that only its answers tell of: the exit status."""
    from post_training.export import draft as draft_export
    from scripts import export_hf

    names = draft_export.__dict__
    save, config = names["save_file"], names["draft_config"]

    def permuted(
        tensors, *args, **more
    ):  # drafted tokens in another order, which `t2d` does not show
        rows = torch.arange(len(tensors["d2t"]))
        save({**tensors, "d2t": (tensors["d2t"] + rows).roll(1) - rows}, *args, **more)

    def miscounted(base, shape, layers, dtype):  # a layer that the base has, too
        return config(base, shape, (layers[0], layers[1] - 1, layers[2]), dtype)

    if fault == "permuted":
        names["save_file"] = permuted
    if fault == "miscounted":
        names["draft_config"] = miscounted
    sys.argv = ["export_hf.py", "--output-dir", output_dir]
    return export_hf.main()


def _export(output_dir, base, rows, file):
    """Export the run's draft, and let it draft for its base."""
    from transformers import AutoModelForCausalLM

    from post_training.distillation.served_draft import ServedDraft
    from post_training.distillation.speculation import Acceptance, Verifier, greedy, speculate
    from scripts import export_hf

    sys.argv = ["export_hf.py", "--output-dir", output_dir]
    assert export_hf.main() == 0
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    draft = ServedDraft(f"{output_dir}/draft", model.get_input_embeddings().weight.detach())
    verifier = Verifier(model, draft.input_layers)
    found = Acceptance(3)
    for row in rows:
        plain = greedy(verifier, row, 12, {2})
        assert speculate(verifier, draft, row, 12, {2}, found) == plain
    loud = Path(shutil.copytree(base, f"{output_dir}/loud"))
    template = loud / "chat_template.jinja"
    template.write_text("{% if loud %}LOUD {% endif %}" + template.read_text())
    plain = _evaluated(output_dir, base, file)
    assert _evaluated(output_dir, str(loud), file) == plain
    words = '{"loud": true}'
    assert _evaluated(output_dir, str(loud), file, "--chat-template-variables", words) != plain
    return found.drafts, found.accepted, found.length


@pytest.mark.slow
def test_an_exported_draft_drafts_for_its_base(alone, base, chat_data):
    """Greedy answers stay what they are; and servers' names and keys are there."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 391, (n,), generator=generator).tolist() for n in (7, 12, 30)]
    for fault in ("permuted", "miscounted"):
        assert run_ranks(_export_run, 1, str(alone.folder), fault) == [2], fault
    assert (alone.folder / "draft.partial").exists() and not (alone.folder / "draft").exists()
    ((drafts, accepted, length),) = run_ranks(
        _export, 1, str(alone.folder), str(base), rows, str(chat_data.file)
    )
    assert drafts > 0 and accepted == sorted(accepted, reverse=True) and length >= 1
    config = json.loads((alone.folder / "draft/config.json").read_text())
    assert config["eagle_aux_hidden_state_layer_ids"] == [0, 2, 3]
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [-1, 1, 2]
    assert config["draft_vocab_size"] == 128 and config["vocab_size"] == 391
