"""From scores to a loss: softmax that does not overflow, and the two losses that teach pictures and texts to meet.

    N pictures · M texts · D width · C texts of one chunk · W processes · n pairs of one process (N = n · W)

Both losses score every picture against every text by the cosine of their embeddings: logit = temperature · x·y.
CLIP asks "which of these texts?" of each picture, and the reverse: a softmax over a row, a softmax over a column.
SigLIP adds a bias and asks "do these two match?" of each pair on its own: a sigmoid. So its sum over pairs may be cut
anywhere, into chunks that fit in memory or blocks on other machines, which a softmax does not allow as simply.

All losses normalize the embeddings themselves, as both papers' listings do, take the *logarithm* of the temperature,
and compute in float32 (float64 for float64 inputs) unless autocast decides otherwise.

Sources: CLIP arXiv:2103.00020, figure 3; SigLIP arXiv:2303.15343, Algorithm 1 and figure 1.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def softmax(x: Float[Tensor, "*S"], dim: int = -1) -> Float[Tensor, "*S"]:
    """exp(x) / Σ exp(x), as the definition says. NaN once exp overflows: beyond 88 in float32, 11 in float16."""
    e = x.exp()
    return e / e.sum(dim, keepdim=True)


def safe_softmax(x: Float[Tensor, "*S"], dim: int = -1) -> Float[Tensor, "*S"]:
    """The same number from x − max(x): the largest exponent is then 0, so nothing overflows and the sum is at least 1.

    A row of nothing but −inf (every choice forbidden) gives zeros, with zero gradient, where the quotient would be 0/0.
    A +inf or NaN in a row makes the row NaN.
    """
    e = (x - _finite_max(x, dim)).exp()
    total = e.sum(dim, keepdim=True)
    return e / torch.where(total == 0, 1, total)


def log_sum_exp(x: Float[Tensor, "*S"], dim: int = -1) -> Float[Tensor, "*R"]:
    """log Σ exp(x) along ``dim``, which disappears: max + log Σ exp(x − max). Its gradient is ``safe_softmax``.

    A row of nothing but −inf gives −inf (the logarithm of an empty sum), with zero gradient; one with +inf gives +inf.
    """
    total = (x - _finite_max(x, dim)).exp().sum(dim)
    return x.detach().amax(dim) + torch.where(total == 0, 1, total).log()


def _finite_max(x: Float[Tensor, "*S"], dim: int) -> Float[Tensor, "*R"]:
    """The maximum along ``dim``, kept as a dimension of 1, and 0 where it is infinite, for ∞ − ∞ is no number.

    Detached: the shift cancels out of the result, and so out of the gradient.
    """
    if x.ndim == 0 or x.shape[dim] == 0:
        raise ValueError(f"softmax needs at least one number along dimension {dim}; the shape is {tuple(x.shape)}.")
    top = x.detach().amax(dim, keepdim=True)
    return torch.where(top.isfinite(), top, 0)


def l2_normalize(x: Float[Tensor, "*B D"], eps: float = 1e-12) -> Float[Tensor, "*B D"]:
    """x / ‖x‖ over the last dimension, computed in float32 or wider and cast back.

    A vector no longer than ``eps`` has no direction and stays as it is: zeros remain zeros, with a finite gradient.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide / torch.where(length > eps, length, 1)).type_as(x)


def clip_loss(
    image_embeddings: Float[Tensor, "N D"],
    text_embeddings: Float[Tensor, "N D"],
    log_temperature: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Mean over rows and over columns of −log softmax(exp(log_temperature) · x·yᵀ) at the pair's own entry, in nats.

    Row i is picture i choosing among the texts, column j is text j choosing among the pictures; pair i is at (i, i).
    Guessing costs log N. CLIP starts log_temperature at log(1/0.07) and keeps it at most log 100.

    Raises:
        ValueError: the embeddings are not N pairs of one width, N ≥ 1.
    """
    x, y = _directions(image_embeddings, text_embeddings, pairs=True)
    logits = log_temperature.exp() * (x @ y.T)
    own = logits.diagonal()
    pictures = (log_sum_exp(logits, dim=1) - own).mean()
    texts = (log_sum_exp(logits, dim=0) - own).mean()
    return (pictures + texts) / 2


def sigmoid_loss(
    image_embeddings: Float[Tensor, "N D"],
    text_embeddings: Float[Tensor, "M D"],
    log_temperature: Float[Tensor, ""],
    bias: Float[Tensor, ""],
    labels: Bool[Tensor, "N M"] | None = None,
) -> Float[Tensor, ""]:
    """−1/N Σ log sigmoid(z · (exp(log_temperature) · x·y + bias)) over all N·M pairs, in nats per picture.

    z is +1 where picture and text match, −1 elsewhere. SigLIP starts log_temperature at log 10 and bias at −10, since
    nearly every pair is a mismatch.

    Args:
        labels: True where picture i and text j match, any number to a row. ``None``: pair i stands at (i, i), M = N.

    Raises:
        ValueError: the shapes do not agree, there is no picture or no text, or ``labels`` are not booleans.
    """
    x, y = _directions(image_embeddings, text_embeddings, pairs=labels is None)
    N, M = len(x), len(y)
    if labels is None:
        labels = torch.eye(N, dtype=torch.bool, device=x.device)
    if labels.dtype != torch.bool or labels.shape != (N, M):
        raise ValueError(f"labels must be booleans of shape {(N, M)}, not {labels.dtype} {tuple(labels.shape)}.")
    logits = log_temperature.exp() * (x @ y.T) + bias
    return -F.logsigmoid(torch.where(labels, logits, -logits)).sum() / N


def _directions(images: Tensor, texts: Tensor, pairs: bool) -> tuple[Tensor, Tensor]:
    """Both sides checked, in float32 or wider, and of length 1."""
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1] or not len(images) or not len(texts):
        raise ValueError(
            f"the embeddings must be [N, D] and [M, D], N and M at least 1, not {[*images.shape]} and {[*texts.shape]}."
        )
    if pairs and len(images) != len(texts):
        raise ValueError(f"{len(images)} images and {len(texts)} texts do not make pairs.")
    wide = torch.promote_types(torch.promote_types(images.dtype, texts.dtype), torch.float32)
    return l2_normalize(images.to(wide)), l2_normalize(texts.to(wide))


def chunked_sigmoid_loss(
    image_embeddings: Float[Tensor, "N D"],
    text_embeddings: Float[Tensor, "N D"],
    log_temperature: Float[Tensor, ""],
    bias: Float[Tensor, ""],
    chunk_size: int = 1024,
) -> Float[Tensor, ""]:
    """``sigmoid_loss`` with no more than N × ``chunk_size`` logits in memory at a time, forward and backward alike.

    The gradient is made in the forward pass, whether asked for or not, and cannot be differentiated again.

    Raises:
        ValueError: as ``sigmoid_loss``, or ``chunk_size`` is below 1.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}.")
    x, y = _directions(image_embeddings, text_embeddings, pairs=True)
    return _BlockByBlock.apply(_walk_chunks, chunk_size, x, y, log_temperature, bias)


def ring_sigmoid_loss(
    image_embeddings: Float[Tensor, "n D"],
    text_embeddings: Float[Tensor, "n D"],
    log_temperature: Float[Tensor, ""],
    bias: Float[Tensor, ""],
    group: "dist.ProcessGroup | None" = None,
) -> Float[Tensor, ""]:
    """This process's n pictures against the texts of all W processes, whose texts pass by one shard at a time.

    The value is the sum over n × N logits, divided by n; its mean over processes is ``sigmoid_loss`` of all N pairs.
    The gradients are those of the *sum* of all processes' values, in the embeddings of this process, so that averaging
    parameter gradients over processes, as DistributedDataParallel does, gives the gradient of ``sigmoid_loss``. Every
    process must scale its loss alike before ``backward``. No more than n × n logits are in memory at a time.

    Args:
        group: the processes of the ring, all of which must call; ``None``: all there are.

    Raises:
        ValueError: as ``sigmoid_loss``, torch.distributed is not initialized, or n differs between the processes.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("ring_sigmoid_loss needs torch.distributed.init_process_group to have been called.")
    x, y = _directions(image_embeddings, text_embeddings, pairs=True)
    most_and_least = torch.tensor([len(x), -len(x)], device=x.device)
    dist.all_reduce(most_and_least, dist.ReduceOp.MAX, group)
    most, least = most_and_least.abs().tolist()
    if most != least:
        raise ValueError(f"every process must hold equally many pairs; one holds {least}, another {most}.")
    return _BlockByBlock.apply(_walk_ring, group, x, y, log_temperature, bias)


class _BlockByBlock(torch.autograd.Function):
    """A walk over the blocks of the table, returning loss and gradients at once; backward has only to scale them.

    The loss being one number, a block's gradient is known, up to that scale, as soon as the block is: none is kept.
    """

    @staticmethod
    def forward(ctx, walk, how, x, y, log_t, bias):
        loss, grad_x, grad_y, grad_bias = walk(how, x, y, log_t, bias)
        grad_log_t = (grad_x * x).sum()  # a logit's slope in x, times x, is its slope in log t: both are t · x·y
        ctx.pictures = len(x)
        ctx.save_for_backward(grad_x, grad_y, grad_log_t, grad_bias)
        return loss / ctx.pictures

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return None, None, *(upstream / ctx.pictures * gradient for gradient in ctx.saved_tensors)


def _block(x: Tensor, y: Tensor, log_t: Tensor, bias: Tensor, offset: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum of the losses of the table x·yᵀ, and that sum's gradient for x, y and bias.

    The pairs are the entries (i, i + offset), as far as the table holds them. A logit's loss is softplus(−z · logit),
    and its slope −z · sigmoid(−z · logit): how likely the model finds a match, less 1 if there is one.
    """
    t = log_t.exp()
    table = (x @ y.T).mul_(t).add_(bias)
    table.diagonal(offset).neg_()  # now −z · logit
    loss = F.softplus(table).sum()
    slope = table.sigmoid_()
    slope.diagonal(offset).neg_()
    return loss, (slope @ y).mul_(t), (slope.T @ x).mul_(t), slope.sum()


def _walk_chunks(chunk_size: int, x: Tensor, y: Tensor, log_t: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    loss, grad_x, grad_y, grad_bias = 0, torch.zeros_like(x), torch.zeros_like(y), 0
    for first in range(0, len(y), chunk_size):
        chunk = slice(first, first + chunk_size)
        more_loss, more_x, grad_y[chunk], more_bias = _block(x, y[chunk], log_t, bias, offset=-first)
        loss, grad_bias = loss + more_loss, grad_bias + more_bias
        grad_x += more_x
    return loss, grad_x, grad_y, grad_bias


def _walk_ring(group, x: Tensor, y: Tensor, log_t: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """Each shard of texts travels once around, and the gradient that the processes have for it travels along."""
    rank, W, n = dist.get_rank(group), dist.get_world_size(group), len(x)
    loss, grad_x, grad_bias = 0, torch.zeros_like(x), 0
    parcel = torch.stack((y, torch.zeros_like(y)))
    for step in range(W):
        offset = step * n  # 0 at first, when the texts are one's own; then beyond the table, which holds no pair
        more_loss, more_x, more_y, more_bias = _block(x, parcel[0], log_t, bias, offset)
        loss, grad_bias = loss + more_loss, grad_bias + more_bias
        grad_x += more_x
        parcel[1] += more_y
        parcel = pass_on(parcel, rank, W, group)
    return loss, grad_x, parcel[1], grad_bias


def pass_on(parcel: Float[Tensor, "2 n D"], rank: int, W: int, group) -> Float[Tensor, "2 n D"]:
    """Hands the parcel to the next process of the ring and returns the one from the process before."""
    if W == 1:
        return parcel
    received = torch.empty_like(parcel)
    send = dist.P2POp(dist.isend, parcel, group=group, group_peer=(rank + 1) % W)
    receive = dist.P2POp(dist.irecv, received, group=group, group_peer=(rank - 1) % W)
    for work in dist.batch_isend_irecv([send, receive]):
        work.wait()
    return received
