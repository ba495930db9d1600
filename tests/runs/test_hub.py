"""Models and datasets by their names on the hub: downloaded, and the same as from a folder."""

import pytest

from tests.helpers import hub
from tests.helpers.launch import Finished, finetune, run_script
from tests.helpers.reference import Recipe

RECIPE = Recipe(steps=2).flags()


@pytest.mark.slow
def test_a_model_and_a_dataset_of_the_hub_train_as_their_files_do(hf_model, chat_data, tmp_path):
    model = hf_model("qwen3")
    here = ["--hf-model", str(model), "--finetune-data-files", str(chat_data.file)]
    local = finetune(tmp_path / "local", *here, *RECIPE).ok()
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "train.jsonl").write_bytes(chat_data.file.read_bytes())
    named = ["--hf-model", "org/tiny", "--finetune-hf-dataset", "org/rows"]
    cache = ["--data-cache-dir", str(tmp_path / "cache"), "--output-dir", str(tmp_path / "out")]
    with hub.serve({"models/org/tiny": model, "datasets/org/rows": rows}) as server:
        environment = server.environment(tmp_path / "home")
        done = run_script("finetune.py", *named, *cache, *RECIPE, environment=environment)
        served = set(server.served)
        again = run_script(
            "scripts/preview.py", "--tokenizer", "org/tiny", "--finetune-hf-dataset", "org/other",
            environment=environment,
        )  # fmt: skip
    run = Finished(done.returncode, [done.returncode], done.stderr, tmp_path / "out").ok()
    assert run.losses == local.losses
    wanted = {"models/org/tiny/model.safetensors", "datasets/org/rows/train.jsonl"}
    assert served >= wanted | {"models/org/tiny/tokenizer.json", "models/org/tiny/config.json"}
    assert (
        f"org/rows[train]: format messages, masks by marks; {len(chat_data.rows)} rows"
        in done.stderr
    )
    # A name that the hub does not know.
    assert again.returncode == 2
    assert "--finetune-hf-dataset org/other: cannot be loaded" in again.stderr
    assert "Traceback" not in again.stderr
