"""Fixtures common to all tests."""

import os
from pathlib import Path

import pytest


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
