"""From scores to a loss: a softmax that does not overflow, and the contrastive losses of CLIP and SigLIP.

    N images · M texts · D embedding size · W processes · n pairs per process (N = n · W)

Both losses score every image against every text by the cosine of their embeddings: logit = temperature · x·y.
CLIP asks of each image "which of these texts?" and of each text "which of these images?": a softmax over each row and
one over each column. SigLIP adds a bias and asks of each pair "do these two match?": a sigmoid. Its sum over pairs can
be split anywhere, into chunks that fit in memory or blocks on other machines. A softmax is not as easy to split.

All losses normalize the embeddings themselves, as the pseudocode in both papers does, take the *logarithm* of the
temperature, and compute in float32 (float64 for float64 inputs) unless autocast decides otherwise.

Sources: CLIP arXiv:2103.00020, figure 3; SigLIP arXiv:2303.15343, Algorithm 1 and figure 1.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

Scalar = Float[Tensor, ""] | Float[Tensor, "1"]  # SigLIP checkpoints store temperature and bias with shape [1]


def softmax(x: Float[Tensor, "*S"], dim: int = -1) -> Float[Tensor, "*S"]:
    """exp(x) / Σ exp(x), straight from the definition. NaN once exp overflows: above 88 in float32, 11 in float16."""
    e = x.exp()
    return e / e.sum(dim, keepdim=True)


def safe_softmax(x: Float[Tensor, "*S"], dim: int = -1) -> Float[Tensor, "*S"]:
    """The same values from x − max(x): the largest exponent is 0, so nothing overflows and the sum is at least 1.

    A row that is all −inf (every choice masked) becomes zeros with zero gradient, where the quotient would be 0/0.
    A +inf or NaN in a row shows up as NaN.
    """
    e = (x - _finite_max(x, dim)).exp()
    total = e.sum(dim, keepdim=True)
    return e / torch.where(total == 0, 1, total)


def log_sum_exp(x: Float[Tensor, "*S"], dim: int = -1) -> Float[Tensor, "*R"]:
    """log Σ exp(x), reduced over ``dim``, computed as max + log Σ exp(x − max). Its gradient is ``safe_softmax``.

    A row that is all −inf becomes −inf (the log of an empty sum) with zero gradient. A row with +inf becomes +inf.
    """
    total = (x - _finite_max(x, dim)).exp().sum(dim)
    return x.detach().amax(dim) + torch.where(total == 0, 1, total).log()


def _finite_max(x: Float[Tensor, "*S"], dim: int) -> Float[Tensor, "*R"]:
    """The maximum over ``dim`` (keepdim), or 0 where it is infinite, because ∞ − ∞ is NaN.

    Detached: the shift cancels out of the result, so it cancels out of the gradient too.
    """
    if x.ndim == 0 or x.shape[dim] == 0:
        raise ValueError(f"softmax needs at least one value along dim {dim}, but the shape is {tuple(x.shape)}.")
    top = x.detach().amax(dim, keepdim=True)
    return torch.where(top.isfinite(), top, 0)


def l2_normalize(x: Float[Tensor, "*B D"], eps: float = 1e-12) -> Float[Tensor, "*B D"]:
    """x / ‖x‖ over the last dimension, computed in float32 or wider and cast back.

    A vector whose norm is at most ``eps`` is returned unchanged, so zeros stay zeros, with a finite gradient.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide / torch.where(norm > eps, norm, 1)).type_as(x)


def clip_loss(
    image_embeddings: Float[Tensor, "N D"],
    text_embeddings: Float[Tensor, "N D"],
    log_temperature: Scalar,
) -> Float[Tensor, ""]:
    """The mean over rows and columns of −log softmax(exp(log_temperature) · x·yᵀ) at the matching entry, in nats.

    Row i is image i choosing among the texts, column j is text j choosing among the images. Pair i is at (i, i).
    Guessing costs log N. CLIP initializes log_temperature to log(1/0.07) and clips it at log 100.

    Raises:
        ValueError: If the embeddings are not N ≥ 1 pairs of the same size.
    """
    x, y = _unit_pairs(image_embeddings, text_embeddings, paired=True)
    logits = log_temperature.exp() * (x @ y.T)
    matching = logits.diagonal()
    image_loss = (log_sum_exp(logits, dim=1) - matching).mean()
    text_loss = (log_sum_exp(logits, dim=0) - matching).mean()
    return (image_loss + text_loss) / 2


def sigmoid_loss(
    image_embeddings: Float[Tensor, "N D"],
    text_embeddings: Float[Tensor, "M D"],
    log_temperature: Scalar,
    bias: Scalar,
    labels: Bool[Tensor, "N M"] | None = None,
) -> Float[Tensor, ""]:
    """−1/N Σ log sigmoid(z · (exp(log_temperature) · x·y + bias)) over all N·M pairs, in nats per image.

    z is +1 where image and text match and −1 elsewhere. SigLIP initializes log_temperature to log 10 and bias to −10,
    because nearly every pair is a mismatch.

    Args:
        labels: True where image i and text j match; a row can have any number of matches. If ``None``, M = N and the
            matches are the pairs (i, i).

    Raises:
        ValueError: If the shapes do not agree, there are no images or no texts, or ``labels`` is not boolean.
    """
    x, y = _unit_pairs(image_embeddings, text_embeddings, paired=labels is None)
    N, M = len(x), len(y)
    if labels is None:
        labels = torch.eye(N, dtype=torch.bool, device=x.device)
    if labels.dtype != torch.bool or labels.shape != (N, M):
        raise ValueError(f"labels must be booleans of shape {(N, M)}, but got {labels.dtype} {tuple(labels.shape)}.")
    logits = log_temperature.exp() * (x @ y.T) + bias
    return -F.logsigmoid(torch.where(labels, logits, -logits)).sum() / N


def _unit_pairs(images: Tensor, texts: Tensor, paired: bool) -> tuple[Tensor, Tensor]:
    """Both sets of embeddings, checked and scaled to length 1, in float32 or wider."""
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1] or not len(images) or not len(texts):
        shapes = f"{[*images.shape]} and {[*texts.shape]}"
        raise ValueError(f"Embeddings must be [N, D] and [M, D], with N and M at least 1, but got {shapes}.")
    if paired and len(images) != len(texts):
        raise ValueError(f"{len(images)} images and {len(texts)} texts do not form pairs: pass one text per image.")
    wide = torch.promote_types(torch.promote_types(images.dtype, texts.dtype), torch.float32)
    return l2_normalize(images.to(wide)), l2_normalize(texts.to(wide))


def chunked_sigmoid_loss(
    image_embeddings: Float[Tensor, "N D"],
    text_embeddings: Float[Tensor, "N D"],
    log_temperature: Scalar,
    bias: Scalar,
    chunk_size: int = 1024,
) -> Float[Tensor, ""]:
    """``sigmoid_loss`` with at most N × ``chunk_size`` logits in memory at a time, in forward and backward.

    The gradient is always computed in the forward pass, even if it is not needed. It cannot be differentiated again.

    Raises:
        ValueError: As for ``sigmoid_loss``, or if ``chunk_size`` is below 1.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}.")
    x, y = _unit_pairs(image_embeddings, text_embeddings, paired=True)
    scalars = log_temperature.reshape(()), bias.reshape(())
    return _BlockwiseSigmoidLoss.apply(_chunked_loss_and_grads, chunk_size, x, y, *scalars)


def ring_sigmoid_loss(
    image_embeddings: Float[Tensor, "n D"],
    text_embeddings: Float[Tensor, "n D"],
    log_temperature: Scalar,
    bias: Scalar,
    group: "dist.ProcessGroup | None" = None,
) -> Float[Tensor, ""]:
    """The loss of this process's n images against the texts of all W processes, which arrive one shard at a time.

    The value is the sum over n × N logits, divided by n. Its mean over processes is ``sigmoid_loss`` of all N pairs.
    The gradients with respect to this process's embeddings are those of the *sum* of all processes' values. Averaging
    parameter gradients over processes, as DistributedDataParallel does, therefore gives the gradient of
    ``sigmoid_loss``. Every process must scale its loss by the same factor before ``backward``. At most n × n logits
    are in memory at a time.

    Args:
        group: The processes of the ring, all of which must call this function. If ``None``, all processes.

    Raises:
        ValueError: As for ``sigmoid_loss``, or if torch.distributed is not initialized or n differs between processes.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("ring_sigmoid_loss needs torch.distributed: call init_process_group first.")
    x, y = _unit_pairs(image_embeddings, text_embeddings, paired=True)
    largest_and_smallest = torch.tensor([len(x), -len(x)], device=x.device)
    dist.all_reduce(largest_and_smallest, dist.ReduceOp.MAX, group)
    largest, smallest = largest_and_smallest.abs().tolist()
    if largest != smallest:
        raise ValueError(f"All processes must have equally many pairs, but one has {smallest}, another {largest}.")
    return _BlockwiseSigmoidLoss.apply(_ring_loss_and_grads, group, x, y, log_temperature.reshape(()), bias.reshape(()))


class _BlockwiseSigmoidLoss(torch.autograd.Function):
    """Computes loss and gradients together in the forward pass, block by block; backward only scales the gradients.

    The loss is a scalar, so a block's gradient is known, up to that scale, once its logits are. No logits are saved.
    """

    @staticmethod
    def forward(ctx, loss_and_grads, option, x, y, log_t, bias):
        loss, grad_x, grad_y, grad_bias = loss_and_grads(option, x, y, log_t, bias)
        grad_log_t = (grad_x * x).sum()  # dlogit/dx · x and dlogit/dlog_t are the same: t · x·y
        ctx.num_images = len(x)
        ctx.save_for_backward(grad_x, grad_y, grad_log_t, grad_bias)
        return loss / ctx.num_images

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return None, None, *(upstream / ctx.num_images * grad for grad in ctx.saved_tensors)


def _block_loss_and_grads(x: Tensor, y: Tensor, log_t: Tensor, bias: Tensor, offset: int) -> tuple[Tensor, ...]:
    """The summed loss over one block of logits, and its gradients with respect to x, y and bias.

    The matching pairs are the entries (i, i + offset) inside the block. The loss of a logit is softplus(−z · logit).
    Its derivative, −z · sigmoid(−z · logit), is the predicted probability of a match, minus 1 if there is one.
    """
    t = log_t.exp()
    logits = (x @ y.T).mul_(t).add_(bias)
    logits.diagonal(offset).neg_()  # now −z · logit
    loss = F.softplus(logits).sum()
    grad = logits.sigmoid_()
    grad.diagonal(offset).neg_()  # now −z · sigmoid(−z · logit)
    return loss, (grad @ y).mul_(t), (grad.T @ x).mul_(t), grad.sum()


def _chunked_loss_and_grads(chunk_size: int, x: Tensor, y: Tensor, log_t: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    loss, grad_x, grad_y, grad_bias = 0, torch.zeros_like(x), torch.zeros_like(y), 0
    for start in range(0, len(y), chunk_size):
        chunk = slice(start, start + chunk_size)
        block_loss, block_x, grad_y[chunk], block_bias = _block_loss_and_grads(x, y[chunk], log_t, bias, offset=-start)
        loss, grad_bias = loss + block_loss, grad_bias + block_bias
        grad_x += block_x
    return loss, grad_x, grad_y, grad_bias


def _ring_loss_and_grads(group, x: Tensor, y: Tensor, log_t: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """Each shard of texts travels once around the ring, together with the gradient accumulated for it so far."""
    rank, W, n = dist.get_rank(group), dist.get_world_size(group), len(x)
    loss, grad_x, grad_bias = 0, torch.zeros_like(x), 0
    shard = torch.stack((y, torch.zeros_like(y)))
    for step in range(W):
        offset = step * n  # step 0 has this process's own texts; later, the diagonal is outside the block: no matches
        block_loss, block_x, block_y, block_bias = _block_loss_and_grads(x, shard[0], log_t, bias, offset)
        loss, grad_bias = loss + block_loss, grad_bias + block_bias
        grad_x += block_x
        shard[1] += block_y
        shard = ring_shift(shard, rank, W, group)
    return loss, grad_x, shard[1], grad_bias


def ring_shift(shard: Float[Tensor, "2 n D"], rank: int, W: int, group) -> Float[Tensor, "2 n D"]:
    """Sends a shard, texts and their gradient, to the next process and returns the one from the previous process."""
    if W == 1:
        return shard
    received = torch.empty_like(shard)
    send = dist.P2POp(dist.isend, shard, group=group, group_peer=(rank + 1) % W)
    receive = dist.P2POp(dist.irecv, received, group=group, group_peer=(rank - 1) % W)
    for work in dist.batch_isend_irecv([send, receive]):
        work.wait()
    return received
