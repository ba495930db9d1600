import torch


def test_functions_stay_what_they_are():
    def double(x):
        return 2 * x

    assert torch.compile(double) is double
    assert torch.compile(dynamic=True)(double) is double


def test_still_needed_upstream_compiles_its_fused_functions(upstream):
    assert upstream["jit fuser is torch.compile"] and upstream["compile wraps"]
