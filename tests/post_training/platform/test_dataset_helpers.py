from megatron.core.datasets import utils


def test_nothing_is_compiled():
    assert utils.compile_helpers() is None


def test_still_needed_upstream_ends_the_process(upstream):
    assert upstream["compile_helpers"] == "SystemExit: 1"
