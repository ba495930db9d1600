import random

import numpy as np
import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from data.errors import RowError
from data.images.layout import ImageLayout
from tests.helpers import vision


def test_grids_are_those_of_the_processor():
    rng = random.Random(0)
    for _ in range(5000):
        patch, merge = rng.choice([(14, 2), (16, 2), (8, 1)])
        low, high = rng.choice([1, 3136, 65536]), rng.choice([65536, 200000, 16777216])
        height, width = (int(10 ** rng.uniform(0, 3.7)) for _ in range(2))
        layout = ImageLayout("x", patch, merge, low, high, 0)
        if max(height, width) > 200 * min(height, width):
            with pytest.raises(RowError, match="at most 200 to 1"):
                layout.grid(height, width)
            continue
        expected = smart_resize(height, width, patch * merge, low, high)
        assert layout.grid(height, width) == tuple(side // patch for side in expected)


@pytest.mark.parametrize("kind", vision.KINDS)
@pytest.mark.parametrize("grids", [[], [(2, 4)], [(6, 2), (4, 4)], [(2, 2), (2, 8), (4, 2)]])
def test_positions_are_those_of_the_model(kind, grids):
    model = vision.make_model(kind)
    layout = ImageLayout("x", 8, 2, 1, 1 << 20, model.config.image_token_id)
    ids = [5, 6, *(t for g in grids for t in (7, *[layout.image_id] * layout.tokens(g), 8)), 9, 9]
    row = torch.tensor([ids])
    expected, _ = model.model.get_rope_index(
        row,
        mm_token_type_ids=(row == layout.image_id).int(),
        image_grid_thw=torch.tensor([(1, *grid) for grid in grids]) if grids else None,
    )
    found = layout.positions(np.array(ids), grids)
    assert torch.equal(torch.from_numpy(found).T, expected[:, 0])


def test_pictures_and_their_tokens_have_to_fit():
    layout = ImageLayout("x", 8, 2, 1, 1 << 20, 3, (4,))
    ids = np.array([1, 3, 2], np.int32)
    assert layout.repeats(ids, [(4, 6)]).tolist() == [1, 6, 1]
    for wrong, grids in (([1, 3, 3], [(2, 2)]), ([1, 2], [(2, 2)]), ([3, 1], []), ([4, 1], [])):
        with pytest.raises(RowError, match="token"):
            layout.repeats(np.array(wrong, np.int32), grids)
