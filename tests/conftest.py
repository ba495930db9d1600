"""Fixtures common to all tests."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A shell starts what runs in its background with Ctrl-C ignored, which every process below inherits: those
# that a test interrupts would never hear of it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Other work on the machine must not fail a test.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of real tokenizers and conversations, from $SFT_TEST_DATA; skips without one."""
    value = os.environ.get("SFT_TEST_DATA")
    if not value:
        pytest.skip("SFT_TEST_DATA is not set: it names the folder of real test data")
    folder = Path(value)
    if not folder.is_dir():
        pytest.skip(f"SFT_TEST_DATA={value} is not a folder")
    return folder


@pytest.fixture(scope="session")
def hf_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes the HuggingFace folder of a family, once for each set of options; not to be changed."""
    made: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("hf")

    def make(family: str, **options: object) -> Path:
        from transformers import AutoConfig

        from post_training.errors import SetupError
        from post_training.hf.config import check_version
        from tests.helpers.models import save_model

        key = f"{family}-{sorted(options.items())}"
        if key not in made:
            made[key] = save_model(root / f"{len(made)}-{family}", family, **options)  # type: ignore[arg-type]
        try:
            check_version(AutoConfig.from_pretrained(made[key]), family)
        except SetupError as error:
            pytest.skip(str(error))
        return made[key]

    return make


@dataclass
class ChatData:
    """Chat rows, and the file that holds them."""

    rows: list[dict[str, object]]
    file: Path


@pytest.fixture(scope="session")
def chat_data(tmp_path_factory: pytest.TempPathFactory) -> ChatData:
    """Sixty chat rows of varied length."""
    from tests.helpers.rows import make_rows, write_rows

    rows = make_rows(60)
    return ChatData(rows, write_rows(tmp_path_factory.mktemp("rows") / "train.jsonl", rows))
