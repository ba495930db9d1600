import torch

from post_training.platform.cpu.cuda_runtime import HostStream


def test_the_truth_about_cuda_is_still_told():
    assert torch.cuda.is_available() is False


def test_the_current_device_is_here():
    assert torch.empty(1, device=torch.cuda.current_device()).device.type == "cpu"
    assert torch.cuda.device_count() == 1


def test_streams_and_events_run_in_program_order():
    stream = torch.cuda.Stream()
    assert isinstance(stream, HostStream) and stream.query()
    with torch.cuda.stream(stream), stream:
        begin = torch.cuda.Event(enable_timing=True)
        begin.record()
        end = torch.cuda.current_stream().record_event()
    stream.wait_stream(torch.cuda.default_stream())
    stream.wait_event(begin)
    assert isinstance(end, HostStream) and begin.elapsed_time(end) >= 0
    torch.cuda.synchronize()


def test_memory_is_reported_as_nothing():
    assert torch.cuda.memory_allocated() == torch.cuda.max_memory_reserved() == 0
    assert torch.cuda.memory_stats()["anything"] == 0
    assert torch.cuda.mem_get_info() == (0, 0)


def test_still_needed_torch_cuda_fails_without_a_device(upstream):
    assert "returned" not in upstream["current device"]
