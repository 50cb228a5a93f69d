"""Functions in several processes, and peak memory: what chapter 02 uses to show the ring."""

import pytest
import torch
import torch.distributed as dist

from minivlm import losses
from minivlm.course import processes


def doubled(x):
    return 2 * x


def ring_and_sum(x, y, log_t, bias):
    loss = losses.ring_sigmoid_loss(x, y, log_t, bias)
    total = doubled(loss)
    dist.all_reduce(total)
    return {"rank": dist.get_rank(), "loss": loss, "sum": total}


def fail_in_one(x):
    if dist.get_rank() == 1:
        raise ZeroDivisionError("on purpose")
    dist.barrier()


def return_function(x):
    return doubled


@pytest.fixture
def started(monkeypatch):
    """The processes that a test starts."""
    found, start = [], processes.start
    monkeypatch.setattr(processes, "start", lambda *args: found.append(start(*args)) or found[-1])
    return found


def test_each_process_has_its_shard_and_all_of_them_talk(started):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 6, 4, generator=g)
    scalars = torch.tensor(1.0), torch.tensor(-2.0)
    shards = [(*pair, *scalars) for pair in zip(x.chunk(2), y.chunk(2), strict=True)]
    results = processes.run(ring_and_sum, shards, helpers=[doubled])
    assert [result["rank"] for result in results] == [0, 1]
    mean = sum(result["loss"] for result in results) / 2
    torch.testing.assert_close(mean, losses.sigmoid_loss(x, y, *scalars))
    torch.testing.assert_close([result["sum"] for result in results], [4 * mean] * 2)
    assert [process.returncode for process in started] == [0, 0]


def test_a_failing_process_ends_the_others_and_is_quoted(started):
    with pytest.raises(RuntimeError, match=r"Process 1 of 2 failed:[\s\S]*ZeroDivisionError: on purpose"):
        processes.run(fail_in_one, [(1,), (2,)])
    assert None not in [process.returncode for process in started]


def test_processes_that_take_too_long_are_stopped(started):
    with pytest.raises(TimeoutError, match=r"After 0.1 seconds, processes \[0, 1\] of 2 were still running"):
        processes.run(doubled, [(1,), (2,)], timeout=0.1)
    assert None not in [process.returncode for process in started]


def test_values_that_cannot_be_passed_are_named():
    with pytest.raises(RuntimeError, match="Only tensors, numbers, strings"):
        processes.run(return_function, [(1,)], helpers=[doubled])
    with pytest.raises(ValueError, match="Only tensors, numbers, strings"):
        processes.run(doubled, [(lambda: 1,)])
    with pytest.raises(ValueError, match="Only tensors, numbers, strings"):
        processes.run(doubled, [(doubled,)])  # can be pickled, but not read without running code


def test_what_cannot_be_run_is_said_at_once():
    with pytest.raises(ValueError, match="nothing to run"):
        processes.run(doubled, [])
    with pytest.raises(ValueError, match="source of <lambda> cannot be found. Define it with def"):
        processes.run(lambda x: x, [(1,)])
    with pytest.raises(ValueError, match="source of len cannot be found"):
        processes.run(len, [([1],)])


def test_peak_bytes_is_what_forward_and_backward_allocate():
    x = torch.randn(256, 256).requires_grad_()  # 256 KiB
    peak = processes.peak_bytes(lambda x: x.exp().sum(), x)  # exp(x) is saved; then its gradient and that of x
    assert 2 * x.nbytes <= peak <= 3 * x.nbytes + 4096
    assert processes.peak_bytes(lambda x: sum(row.sum() for row in x), x) < 3 * x.nbytes
