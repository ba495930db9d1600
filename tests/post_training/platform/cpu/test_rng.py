import torch
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker, get_cuda_rng_tracker


def test_tracker_forks_the_cpu_generator():
    tracker = CudaRNGStatesTracker()
    torch.manual_seed(5)
    plain = torch.rand(3)
    torch.manual_seed(5)
    tracker.add("tensor parallel", 7)
    with tracker.fork("tensor parallel"):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), plain), "the fork leaves the state outside alone"
    with tracker.fork("tensor parallel"):
        later = torch.rand(3)
    assert not torch.equal(inside, later), "the fork goes on where it ended"
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), inside)


def test_states_are_read_and_written():
    state = torch.cuda.get_rng_state()
    first = torch.rand(2)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(2), first)
    assert get_cuda_rng_tracker() is not None


def test_still_needed_upstream_reads_the_cuda_generator(upstream):
    assert "returned" not in upstream["rng state"]
