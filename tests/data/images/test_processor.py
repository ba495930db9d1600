import json
from typing import Any

import pytest

from data.errors import DataError
from data.images import processor
from scripts.quickstart import vision as quickstart
from tests.helpers import vision

open_processor: Any = processor.open_processor


@pytest.fixture
def tokenizer(tmp_path):
    found = vision.make_tokenizer()
    found.save_pretrained(tmp_path)
    found.name_or_path = str(tmp_path)
    return found


def test_layout_and_bounds_are_the_processors(tokenizer, tmp_path):
    assert "reads text alone" in open_processor(tokenizer, tmp_path)
    quickstart.save_processor(tmp_path)
    own = open_processor(tokenizer, tmp_path).layout
    assert (own.patch, own.merge, own.min_pixels) == (8, 2, 256)
    assert own.image_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    found = open_processor(tokenizer, tmp_path, max_pixels=4096).layout
    assert found.max_pixels == 4096 and found.grid(200, 200) == (8, 8)
    for low, high in ((5000, 4096), (None, 100), (-1, None)):
        with pytest.raises(DataError, match="--min-pixels"):
            open_processor(tokenizer, tmp_path, low, high)


def test_a_processor_of_another_layout_is_refused_by_name(tokenizer, tmp_path):
    settings = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 224}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert "CLIPImageProcessor" in open_processor(tokenizer, tmp_path)
    settings["image_processor_type"] = "Glm4vImageProcessor"
    settings["size"] = {"shortest_edge": 12544, "longest_edge": 200704}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert "Glm4v" in open_processor(tokenizer, tmp_path)
