"""MAGiC: a language model that is steered by an image while it writes, with no training on pairs at all.

    B images · P patches · k candidates · t tokens so far · D hidden size · V vocabulary size

Of the k most likely next tokens, take the one with the highest

    (1 − α) · p(v | text)  −  α · max_j cos(h_v, h_j)  +  β · softmax_v(similarity(image, text v))

The second term, of contrastive search, punishes a candidate whose hidden state h_v repeats that of an earlier token.
The third, the "magic score", prefers what an image-text model finds in the image. A name that is not among the k
candidates cannot be chosen, however clearly the image shows it.

Everything is frozen: a language model that has read text only, and two parts trained to match, which CLIP is in the
paper. Here they are PaliGemma's tower and token embeddings, aligned by the sigmoid loss; the similarity of a text is
the sum over its tokens of that of the patch that fits best. Sources: "Language Models Can See" (arXiv:2205.02655),
sections 3.2 and 3.3; yxuansu/MAGIC, ``language_model/utlis.py``, where the language model was first adapted to
captions as text, as ours was. It feeds the candidates as rows of a batch; here they share a row under a mask in which
no candidate sees another.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minivlm.cache import GrowingCache
from minivlm.gemma import GemmaForCausalLM
from minivlm.losses import l2_normalize
from minivlm.paligemma import PaliGemma
from minivlm.processor import Processor

SHARPNESS = 20.0  # of the softmax over cosines; CLIP's is 100, on cosines that differ less


def magic_scores(
    probabilities: Float[Tensor, "B k"],
    repetition: Float[Tensor, "B k"],
    similarity: Float[Tensor, "B k"],
    alpha: float,
    beta: float,
) -> Float[Tensor, "B k"]:
    """The score of each candidate: confidence, minus repetition, plus the image's softmax over the candidates."""
    return (1 - alpha) * probabilities - alpha * repetition + beta * similarity.softmax(-1)


def repetition_penalty(candidates: Float[Tensor, "B k D"], earlier: Float[Tensor, "B t D"]) -> Float[Tensor, "B k"]:
    """The largest cosine between a candidate's hidden state and those of the tokens before it."""
    return (l2_normalize(candidates) @ l2_normalize(earlier).mT).amax(-1)


def token_similarity(model: PaliGemma, pixel_values: Float[Tensor, "B C H W"]) -> Float[Tensor, "B V"]:
    """How well each token of the vocabulary fits the patch that it fits best, as a cosine."""
    patches = l2_normalize(model.encode_image(pixel_values))
    return (patches @ l2_normalize(model.language_model.model.embed_tokens.weight).mT).amax(1)


def try_candidates(
    decoder: GemmaForCausalLM, candidates: Int[Tensor, "B k"], cache: GrowingCache
) -> tuple[Float[Tensor, "B k D"], GrowingCache]:
    """Hidden states of k alternative next tokens, and a cache with all of them. Each attends to the text and itself."""
    (B, k), t = candidates.shape, cache.length
    tried = GrowingCache()
    tried.layers = list(cache.layers)
    text = torch.ones(k, t, dtype=torch.bool)
    mask = torch.cat((text, torch.eye(k, dtype=torch.bool)), dim=1).expand(B, k, t + k)
    positions = torch.full((B, k), t + 1)
    return decoder.model.run_layers(decoder.model.embed(candidates), positions, mask, mask, tried), tried


def keep_candidate(tried: GrowingCache, t: int, chosen: Int[Tensor, " B"]) -> GrowingCache:
    """The cache with the first t tokens and, of the candidates after them, only the chosen one of each row."""
    kept, rows = GrowingCache(), torch.arange(len(chosen))
    for pair in tried.layers:
        kept.layers.append(tuple(torch.cat((x[:, :, :t], x[rows, :, t + chosen][:, :, None]), dim=2) for x in pair))
    return kept


@torch.inference_mode()
def caption(
    decoder: GemmaForCausalLM,
    model: PaliGemma,
    processor: Processor,
    pixel_values: Float[Tensor, "B C H W"],
    k: int = 120,
    alpha: float = 0.1,
    beta: float = 2.0,
    max_new_tokens: int = 24,
) -> list[str]:
    """Captions by ``decoder``, which has read text only, for images that only ``model`` has seen.

    Args:
        model: Its tower and its token embeddings say what fits the image. Its decoder is not used.
        k: How many candidates per step.
        alpha: Weight of the repetition penalty, 0 to 1.
        beta: Weight of the image. With 0 the images do not matter.
    """
    fits = SHARPNESS * token_similarity(model, pixel_values)
    rows, cache = torch.arange(len(pixel_values)), GrowingCache()
    ids = torch.full((len(rows), 1), processor.bos_token_id)
    hidden = decoder.model.run_layers(decoder.model.embed(ids), torch.ones_like(ids), None, None, cache)
    finished = torch.zeros(len(rows), dtype=torch.bool)
    for _ in range(max_new_tokens):
        probabilities, candidates = decoder.logits(hidden[:, -1]).softmax(-1).topk(k)
        states, tried = try_candidates(decoder, candidates, cache)
        scores = magic_scores(
            probabilities, repetition_penalty(states, hidden), fits.gather(1, candidates), alpha, beta
        )
        best = scores.argmax(1)
        token = candidates[rows, best].masked_fill(finished, processor.eos_token_id)
        finished |= token == processor.eos_token_id
        ids = torch.cat((ids, token[:, None]), dim=1)
        if finished.all():
            break
        cache = keep_candidate(tried, cache.length, best)
        hidden = torch.cat((hidden, states[rows, best][:, None]), dim=1)
    return processor.batch_decode(ids[:, 1:])
