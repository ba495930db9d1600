from megatron.training import training


def test_pretrain_may_start_without_cuda():
    assert training.initialize_megatron.keywords == {"allow_no_cuda": True}
    assert training.set_jit_fusion_options(tp_size=1) is None


def test_still_needed_upstream_refuses_to_start(upstream):
    assert "CUDA" in upstream["initialize"] and "returned" not in upstream["initialize"]
