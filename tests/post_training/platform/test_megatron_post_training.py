import subprocess
import sys

import pytest
from megatron.training import checkpointing, training

from tests.helpers.launch import ROOT


def test_megatron_finds_what_it_looks_for():
    from megatron.post_training.checkpointing import load_kd_teacher_checkpoint
    from megatron.post_training.utils import maybe_enable_modelopt

    from post_training.platform import megatron_post_training

    assert load_kd_teacher_checkpoint is megatron_post_training.load_kd_teacher_checkpoint
    assert training.maybe_enable_modelopt is maybe_enable_modelopt
    assert training.has_nvidia_modelopt and checkpointing.has_nvidia_modelopt


@pytest.mark.slow
def test_modelopt_is_not_imported_before_it_is_needed():
    code = (
        "from post_training import platform; platform.apply(); import sys;"
        "from megatron.training import checkpointing; checkpointing.save_sharded_modelopt_state([]);"
        "print('modelopt.torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip().endswith("False"), done.stderr


def test_still_needed_upstream_forgets_modelopt(upstream):
    assert upstream["has modelopt"] == [False, False]
    assert not upstream["megatron.post_training"]
