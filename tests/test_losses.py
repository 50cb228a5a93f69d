"""losses.py against independent definitions: torch's own losses, loops over pairs, finite differences."""

import gc
import json
import math
from pathlib import Path

import hypothesis.strategies as st
import jaxtyping
import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn  # noqa: F401  see ring_process
import torch.nn.functional as F
from hypothesis import given, settings
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from minivlm import losses

INF = math.inf
LOG_T, BIAS = math.log(10.0), -10.0


def embeddings(N, M=None, D=12, dtype=torch.float64, seed=0):
    """Random image and text embeddings, log temperature and bias, all requiring gradients."""
    g = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(N, D, generator=g, dtype=torch.float64)
    y = x[:M] + torch.randn(M or N, D, generator=g, dtype=torch.float64)
    scalars = torch.tensor(LOG_T), torch.tensor(BIAS)
    return [tensor.to(dtype).requires_grad_() for tensor in (x, y, *scalars)]


def value_and_gradients(loss, inputs):
    value = loss(*inputs)
    return [value.detach(), *torch.autograd.grad(3 * value, inputs)]  # 3: the upstream gradient must be used


def rows(lowest, highest, width):
    """Matrices of floats of this bit width within the range, with an occasional −inf."""
    number = st.one_of(st.floats(lowest, highest, width=width), st.just(-INF))
    return st.integers(1, 6).flatmap(
        lambda n: st.lists(st.lists(number, min_size=n, max_size=n), min_size=1, max_size=4)
    )


# --- softmax --------------------------------------------------------------------------------------------------------


def test_naive_softmax_is_correct_until_it_overflows():
    x = torch.tensor([[1.0, 2.0, 3.0], [0.0, 80.0, -80.0]])
    for dim in (0, 1, -1):
        torch.testing.assert_close(losses.softmax(x, dim), x.softmax(dim))
    assert losses.softmax(torch.tensor([100.0, 0.0])).isnan().any()
    assert losses.softmax(torch.tensor([12.0, 0.0], dtype=torch.float16)).isnan().any()


@settings(deadline=None, max_examples=100)
@given(rows(-(2.0**126), 2.0**126, 32))
def test_softmax_and_log_sum_exp_equal_torch_at_any_magnitude(table):
    x = torch.tensor(table)
    x64 = x.double()
    for dim in (0, 1):
        empty = (x == -INF).all(dim, keepdim=True)
        ours, theirs = losses.safe_softmax(x, dim), x64.softmax(dim).masked_fill(empty, 0).float()
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(losses.log_sum_exp(x, dim), x64.logsumexp(dim).float(), atol=1e-6, rtol=1e-5)
        total = ours.sum(dim, keepdim=True)
        torch.testing.assert_close(total, (~empty).float())


@settings(deadline=None, max_examples=100)
@given(rows(-60000, 60000, 16))
def test_half_precision_never_overflows(table):
    x = torch.tensor(table, dtype=torch.float16)
    ours = losses.safe_softmax(x)
    theirs = x.double().softmax(-1).nan_to_num(0).half()
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)
    torch.testing.assert_close(losses.log_sum_exp(x), x.double().logsumexp(-1).half(), atol=5e-3, rtol=2e-3)


@settings(deadline=None, max_examples=50)
@given(rows(-50, 50, 32), st.floats(-1e4, 1e4))
def test_a_shift_changes_nothing(table, shift):
    x = torch.tensor(table, dtype=torch.float64)
    torch.testing.assert_close(losses.safe_softmax(x + shift), losses.safe_softmax(x), atol=1e-10, rtol=0)
    torch.testing.assert_close(losses.log_sum_exp(x + shift), losses.log_sum_exp(x) + shift, atol=1e-10, rtol=0)


def test_a_row_of_minus_infinity():
    x = torch.full((2, 3), -INF)
    x[1, 0] = 5.0
    x.requires_grad_()
    assert losses.safe_softmax(x).tolist() == [[0, 0, 0], [1, 0, 0]]
    assert losses.log_sum_exp(x).tolist() == [-INF, 5]
    assert losses.log_sum_exp(torch.tensor([INF, 0.0])) == INF
    for loss in (losses.safe_softmax(x)[:, 0].sum(), losses.log_sum_exp(x).nan_to_num(neginf=0).sum()):
        assert torch.autograd.grad(loss, x)[0][0].tolist() == [0, 0, 0]


def test_nan_is_propagated():
    x = torch.tensor([[math.nan, 0.0], [INF, 0.0]])
    assert losses.safe_softmax(x)[:, 0].isnan().all()
    assert losses.log_sum_exp(x)[0].isnan()


def test_softmax_gradients():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for function in (losses.softmax, losses.safe_softmax, losses.log_sum_exp):
        for dim in (0, 1):
            assert torch.autograd.gradcheck(function, (x, dim))


@pytest.mark.parametrize("x", [torch.zeros(2, 0), torch.tensor(1.0)])
def test_softmax_of_an_empty_dimension(x):
    for function in (losses.safe_softmax, losses.log_sum_exp):
        with pytest.raises(ValueError, match="at least one value"):
            function(x, -1)


# --- normalize ------------------------------------------------------------------------------------------------------


def test_normalize():
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(losses.l2_normalize(x), F.normalize(x, dim=-1))
    assert torch.autograd.gradcheck(losses.l2_normalize, (x,))
    half = torch.full((4,), 60000.0, dtype=torch.float16)  # its norm overflows float16
    assert losses.l2_normalize(half).tolist() == [0.5] * 4
    assert losses.l2_normalize(torch.full((4,), 1e-7, dtype=torch.float16)).tolist() == [0.5] * 4


def test_normalizing_zeros():
    x = torch.zeros(2, 3, requires_grad=True)
    y = losses.l2_normalize(x)
    y.sum().backward()
    assert y.tolist() == [[0, 0, 0]] * 2 and x.grad.abs().max() <= 1


# --- CLIP -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("N", [1, 2, 7])
def test_clip_equals_two_cross_entropies(N):
    *inputs, _ = embeddings(N)

    def reference(x, y, log_t):
        logits = F.cosine_similarity(x[:, None], y[None], dim=-1) * log_t.exp()
        own = torch.arange(N)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    torch.testing.assert_close(
        value_and_gradients(losses.clip_loss, inputs), value_and_gradients(reference, inputs), rtol=1e-9, atol=1e-9
    )
    assert torch.autograd.gradcheck(losses.clip_loss, inputs)


def test_clip_by_hand():
    """Two images and two texts, orthogonal except for the pairs: each softmax compares e^t with 1."""
    x, log_t = torch.eye(2), torch.tensor(0.0)
    assert losses.clip_loss(x, x, log_t).item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert losses.clip_loss(x, x.flip(0), log_t).item() == pytest.approx(math.log(1 + math.exp(1)))
    same = torch.ones(5, 3)
    assert losses.clip_loss(same, same, log_t).item() == pytest.approx(math.log(5))


# --- sigmoid --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("N, M, given_labels", [(1, 1, False), (5, 5, False), (5, 5, True), (4, 3, True), (1, 6, True)])
def test_sigmoid_equals_a_loop_over_pairs(N, M, given_labels):
    inputs = embeddings(max(N, M), M)
    inputs[0] = inputs[0].detach()[:N].requires_grad_()
    labels = torch.rand(N, M, generator=torch.Generator().manual_seed(1)) < 0.4 if given_labels else None

    def loop(x, y, log_t, bias):
        total = 0.0
        for i in range(N):
            for j in range(M):
                z = 1 if (i == j if labels is None else labels[i, j]) else -1
                logit = log_t.exp() * (x[i] @ y[j]) / (x[i].norm() * y[j].norm()) + bias
                total = total - torch.log(1 / (1 + torch.exp(-z * logit)))
        return total / N

    def ours(x, y, log_t, bias):
        return losses.sigmoid_loss(x, y, log_t, bias, labels)

    torch.testing.assert_close(
        value_and_gradients(ours, inputs), value_and_gradients(loop, inputs), rtol=1e-8, atol=1e-8
    )
    assert torch.autograd.gradcheck(ours, inputs)


def test_sigmoid_is_finite_at_extremes():
    """With an extreme temperature and bias, the loss is large but not infinite."""
    x, y, *_ = embeddings(4, dtype=torch.float32)
    for bias in (-1e4, 1e4):
        for loss in (losses.sigmoid_loss, losses.chunked_sigmoid_loss):
            parts = value_and_gradients(
                loss, [x, y, torch.tensor(9.0, requires_grad=True), torch.tensor(bias, requires_grad=True)]
            )
            assert all(part.isfinite().all() for part in parts)


def test_half_precision_embeddings_are_computed_in_float32():
    x, y, log_t, bias = (tensor.detach() for tensor in embeddings(8, dtype=torch.float32))
    for dtype in (torch.float16, torch.bfloat16):
        low = x.to(dtype), y.to(dtype)
        wide = low[0].float(), low[1].float()
        for loss in (losses.sigmoid_loss, losses.chunked_sigmoid_loss):
            assert torch.equal(loss(*low, log_t, bias), loss(*wide, log_t, bias))
        assert torch.equal(losses.clip_loss(*low, log_t), losses.clip_loss(*wide, log_t))


@pytest.mark.parametrize("loss", ["clip_loss", "sigmoid_loss", "chunked_sigmoid_loss", "ring_sigmoid_loss"])
def test_scalars_of_shape_1_as_in_siglip_checkpoints(loss, tmp_path):
    """The same value, and gradients with the shapes of the parameters."""
    *pair, log_t, bias = embeddings(5)
    scalars = [log_t] if loss == "clip_loss" else [log_t, bias]
    vectors = [scalar.detach().reshape(1).requires_grad_() for scalar in scalars]
    if loss == "ring_sigmoid_loss":
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        expected = value_and_gradients(getattr(losses, loss), [*pair, *scalars])
        found = value_and_gradients(getattr(losses, loss), [*pair, *vectors])
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert [part.shape for part in found] == [(), (5, 12), (5, 12), *[(1,)] * len(vectors)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.reshape(theirs.shape), theirs)


# --- chunks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("N, chunk_size", [(1, 1), (7, 3), (8, 4), (37, 10), (37, 36), (37, 37), (37, 1000)])
def test_chunked_equals_dense(N, chunk_size):
    def chunked(*inputs):
        return losses.chunked_sigmoid_loss(*inputs, chunk_size)

    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-6)):
        inputs = embeddings(N, dtype=dtype)
        dense = value_and_gradients(losses.sigmoid_loss, inputs)
        for ours, theirs in zip(value_and_gradients(chunked, inputs), dense, strict=True):
            assert ours.dtype == theirs.dtype
            assert (ours - theirs).norm() <= tolerance * theirs.norm() + 1e-12
    if N < 10:
        assert torch.autograd.gradcheck(chunked, embeddings(N))


def test_chunked_under_autocast_and_with_a_frozen_tower():
    x, y, log_t, bias = embeddings(16, dtype=torch.float32)
    dense = value_and_gradients(losses.sigmoid_loss, [x, y, log_t, bias])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = value_and_gradients(lambda *inputs: losses.chunked_sigmoid_loss(*inputs, 5), [x, y, log_t, bias])
    for ours, theirs in zip(low, dense, strict=True):
        assert ours.isfinite().all() and (ours - theirs).norm() <= 0.03 * theirs.norm()
    losses.chunked_sigmoid_loss(x.detach(), y, log_t.detach(), bias, 5).backward()
    torch.testing.assert_close(3 * y.grad, dense[2])
    with torch.no_grad():
        torch.testing.assert_close(losses.chunked_sigmoid_loss(x, y, log_t, bias, 5), dense[0])


def peak_bytes(loss, inputs, path):
    """Peak memory that torch's allocator has in use during forward and backward, beyond what it had before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        loss(*inputs).backward()
    profile.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e["name"] == "[memory]"]
    now, peak = 0, 0
    for event in sorted(events, key=lambda e: e["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak


def test_chunks_reduce_peak_memory(tmp_path):
    N, chunk_size = 2048, 64  # 32 chunks, as with N = 32768 and chunk_size = 1024
    inputs = embeddings(N, D=48, dtype=torch.float32)  # and the same D / N
    dense = peak_bytes(losses.sigmoid_loss, inputs, tmp_path / "dense.json")
    chunked = peak_bytes(lambda *a: losses.chunked_sigmoid_loss(*a, chunk_size), inputs, tmp_path / "chunked.json")
    assert dense >= 3 * 4 * N * N  # the measurement itself works
    assert chunked <= dense / 16


# --- processes ------------------------------------------------------------------------------------------------------


class Towers(nn.Module):
    """Two linear towers with the two scalars of the loss."""

    def __init__(self, loss):
        super().__init__()
        self.loss = loss
        self.image, self.text = nn.Linear(6, 4), nn.Linear(5, 4)
        self.log_temperature, self.bias = nn.Parameter(torch.tensor(LOG_T)), nn.Parameter(torch.tensor(BIAS))

    def forward(self, images, texts):
        return self.loss(self.image(images), self.text(texts), self.log_temperature, self.bias)


def towers_and_data(loss, N):
    torch.manual_seed(0)
    return Towers(loss).double(), torch.randn(N, 6).double(), torch.randn(N, 5).double()


def ring_process(rank, world, store, pairs):
    """One process of the ring test, in DistributedDataParallel and in a group of two.

    The group's threads must end with the group: a thread still freeing tensors when the interpreter exits causes
    SIGABRT. So nothing may hold a reference to the group after destroy_process_group. The functions of
    torch.distributed.nn would hold one forever if DistributedDataParallel were the first to import that module.
    DistributedDataParallel itself is part of a reference cycle. If it is freed after the group, it waits for the
    threads while holding the lock that they wait for.
    """
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        check_data_parallel_ring(rank, world, pairs)
        check_group_ring(rank)
    finally:
        gc.collect()
        dist.destroy_process_group()
    threads = {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}  # empty except on Linux
    assert not any("gloo" in name for name in threads), threads


def check_data_parallel_ring(rank, world, pairs):
    """Compares DistributedDataParallel around the ring loss with the dense loss over all pairs."""
    dense, images, texts = towers_and_data(losses.sigmoid_loss, world * pairs)
    expected = dense(images, texts)
    expected.backward()

    mine = slice(rank * pairs, (rank + 1) * pairs)
    model = DistributedDataParallel(towers_and_data(losses.ring_sigmoid_loss, 1)[0])
    loss = model(images[mine], texts[mine])
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    torch.testing.assert_close(mean / world, expected.detach(), rtol=1e-10, atol=0)
    for ours, theirs in zip(model.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


def check_group_ring(rank, n=2):
    """In a ring of two, embedding gradients are those of the sum of both values: twice the dense ones."""
    group = dist.new_group([1, 2])  # ranks within a group differ from ranks in the world
    if rank == 0:
        return
    inputs = embeddings(2 * n)
    _, dense_x, dense_y, *_ = value_and_gradients(losses.sigmoid_loss, inputs)
    mine = slice((rank - 1) * n, rank * n)
    local = [inputs[0].detach()[mine].requires_grad_(), inputs[1].detach()[mine].requires_grad_(), *inputs[2:]]
    _, x, y, *_ = value_and_gradients(lambda *a: losses.ring_sigmoid_loss(*a, group=group), local)
    torch.testing.assert_close((x, y), (2 * dense_x[mine], 2 * dense_y[mine]), rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="one has 1, another 2"):
        losses.ring_sigmoid_loss(*embeddings(rank), group=group)


def test_ring_equals_dense(tmp_path):
    torch.multiprocessing.spawn(ring_process, (3, tmp_path / "store", 4), nprocs=3)


def test_ring_of_one(tmp_path):
    inputs = embeddings(5)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        ring = value_and_gradients(losses.ring_sigmoid_loss, inputs)
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(ring, value_and_gradients(losses.sigmoid_loss, inputs))


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def unchecked():
    """Turns the runtime type checker off, as for users of the package."""
    was = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", was)


@pytest.mark.parametrize(
    "x, y, message",
    [
        ((3, 4), (3, 5), "must be"),
        ((3,), (3, 5), "must be"),
        ((3, 4), (2, 3, 4), "must be"),
        ((0, 4), (0, 4), "at least 1"),
        ((3, 4), (2, 4), "3 images and 2 texts do not form pairs"),
    ],
)
def test_embeddings_that_do_not_form_pairs(unchecked, x, y, message):
    x, y, log_t, bias = torch.ones(x), torch.ones(y), torch.tensor(LOG_T), torch.tensor(BIAS)
    with pytest.raises(ValueError, match=message):
        losses.clip_loss(x, y, log_t)
    for loss in (losses.sigmoid_loss, losses.chunked_sigmoid_loss):
        with pytest.raises(ValueError, match=message):
            loss(x, y, log_t, bias)


@pytest.mark.parametrize("labels", [torch.ones(3, 2), torch.ones(2, 3, dtype=torch.bool)])
def test_labels_with_wrong_dtype_or_shape(unchecked, labels):
    with pytest.raises(ValueError, match="labels must be booleans of shape"):
        losses.sigmoid_loss(torch.ones(3, 4), torch.ones(2, 4), torch.tensor(LOG_T), torch.tensor(BIAS), labels)


def test_bad_chunk_size_and_missing_process_group():
    with pytest.raises(ValueError, match="chunk_size must be at least 1, not 0"):
        losses.chunked_sigmoid_loss(*embeddings(2), chunk_size=0)
    with pytest.raises(ValueError, match="init_process_group"):
        losses.ring_sigmoid_loss(*embeddings(2))
