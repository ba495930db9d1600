"""A damaged checkpoint is named in one line on every number of ranks, and the one before it is taken."""

import functools
import json
import shutil

import pytest

from tests.helpers.checkpoint import same_tensors
from tests.helpers.launch import finetune, run_rank
from tests.helpers.reference import Recipe
from tests.numerics.equivalence import FSDP2, TP2
from tests.runs.resume import Layout, numbers

RECIPE = Recipe(steps=6)
SAVES = ("--save-interval", "2")
TP2_, X2 = Layout("tp2", TP2, 2), Layout("x2", FSDP2, 2)
VERIFIED = Layout("dp2-verified", ("--verify-integrity",), 2)


class Runs:
    """A run in each layout, stopped after two checkpoints, and the same to its end."""

    def __init__(self, folder, words):
        self.folder, self.words = folder, words
        self.made = functools.cache(self._made)

    def run(self, folder, layout, *flags):
        return finetune(folder, *self.words, *SAVES, *layout.flags, *flags, world=layout.world)

    def _made(self, layout, *flags):
        return self.run(self.folder / "-".join((layout.name, *flags)), layout, *flags).ok()

    def stopped(self, folder, layout):
        shutil.copytree(self.made(layout, "--exit-interval", "4").folder, folder)
        return folder


@pytest.fixture(scope="module")
def runs(hf_model, chat_data, tmp_path_factory):
    model = str(hf_model("qwen3"))
    words = ["--hf-model", model, "--finetune-data-files", str(chat_data.file), *RECIPE.flags()]
    return Runs(tmp_path_factory.mktemp("damage"), words)


def shard_of(checkpoint):
    """The last rank's largest file."""
    rank = max(path.name.split("_")[2] for path in checkpoint.glob("*.distcp"))
    return max(checkpoint.glob(f"__{rank}_*.distcp"), key=lambda path: path.stat().st_size)


def _flip(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 0x55
    file.write_bytes(content)


def _forget_sums(checkpoint):
    """Make its manifest one of a version that wrote no check sums."""
    file = checkpoint / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["crc32"], manifest["manifest_crc32"]
    file.write_text(json.dumps(manifest))


def no_manifest(checkpoint):
    (checkpoint / "manifest.json").unlink()
    return "it has no manifest.json"


def flipped_metadata(checkpoint):
    _flip(checkpoint / ".metadata", 100)
    return ".metadata does not hold what was saved"


def broken_metadata_json(checkpoint):
    file = checkpoint / "metadata.json"
    file.write_bytes(b"{" * file.stat().st_size)
    return "metadata.json does not hold what was saved"


def cut_shard(checkpoint):
    file = shard_of(checkpoint)
    file.write_bytes(file.read_bytes()[:-1])
    return f"{file.name} has {file.stat().st_size} of {file.stat().st_size + 1} bytes"


def zeroed_shard(checkpoint):
    file = shard_of(checkpoint)
    file.write_bytes(bytes(file.stat().st_size))
    return f"{file.name} does not hold what was saved"


def old_zeroed_shard(checkpoint):
    _forget_sums(checkpoint)
    zeroed_shard(checkpoint)
    return "cannot read it ("


def old_flipped_metadata(checkpoint):
    _forget_sums(checkpoint)
    _flip(checkpoint / ".metadata", 0)
    return ".metadata cannot be read ("


def old_flipped_tensor(checkpoint):
    _forget_sums(checkpoint)
    file = shard_of(checkpoint)
    _flip(file, file.stat().st_size // 2)
    return f"{file.name}: hash mismatch"


def check_falls_back(runs, tmp_path, layout, damage):
    straight = runs.made(layout)
    folder = runs.stopped(tmp_path / "out", layout)
    checkpoint = folder / "checkpoints/iter_0000004"
    told = damage(checkpoint)
    run = runs.run(folder, layout).ok()
    (line,) = [line for line in run.console.splitlines() if "iter_0000004" in line]
    assert line.startswith(f"warning: {checkpoint}: ") and told in line
    assert line.endswith(f"; continuing from {folder}/checkpoints/iter_0000002")
    assert "Traceback" not in run.console
    assert numbers(run) == numbers(straight)
    ends = [r.folder / "checkpoints/iter_0000006" for r in (run, straight)]
    assert run_rank(same_tensors, *ends), "weights and optimizer too"
    return line


def test_found_before_the_process_group(runs, tmp_path):
    check_falls_back(runs, tmp_path, Layout("one"), zeroed_shard)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "damage"),
    [(TP2_, old_zeroed_shard), (X2, old_zeroed_shard), (VERIFIED, old_flipped_tensor)],
    ids=["tp2", "fsdp2", "verify-integrity"],
)
def test_found_while_it_is_loaded(runs, tmp_path, layout, damage):
    """By one rank alone where each reads its own; nothing has been trained yet."""
    check_falls_back(runs, tmp_path, layout, damage)


@pytest.mark.slow
def test_asked_to_verify_what_was_saved_without_it(runs, tmp_path):
    """Whole checkpoints stay whole: the newest goes on."""
    one = Layout("one")
    folder = runs.stopped(tmp_path / "out", one)
    run = runs.run(folder, one, "--verify-integrity").ok()
    assert "warning" not in run.console and [step["iteration"] for step in run.steps] == [
        *range(1, 7)
    ]
    assert run.losses == runs.made(one).losses
