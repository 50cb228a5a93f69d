"""Training a small tokenizer of Gemma's kind on the texts of a data set.

Sources: byte-pair encoding arXiv:1508.07909; byte fallback arXiv:1808.06226 (SentencePiece), as in Gemma's tokenizer.
"""

import json
import re
from collections.abc import Iterable, Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from minivlm.tokenizer import BOS, EOS, LOC_TOKENS, MASK, PAD, SEG_TOKENS, UNK, add_paligemma_tokens


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a small tokenizer like Gemma's: byte-pair encoding, "▁" for a space, bytes for unknown characters.

    Ids: pad 0, eos 1, bos 2, unk 3, mask 4, newline 5, then 256 bytes, the learned tokens, and PaliGemma's 1153 tokens.
    ``vocab_size`` is an upper bound for all of them: training ends early once every word of the texts is one token. A
    word is learned with and without a space before it.

    Raises:
        ValueError: If ``vocab_size`` is below 1510.
    """
    fixed = [PAD, EOS, BOS, UNK, MASK, "\n"] + [f"<0x{byte:02X}>" for byte in range(256)]
    alphabet = [chr(code) for code in range(33, 127)] + ["▁"]
    max_learned = vocab_size - len(fixed) - len(LOC_TOKENS) - len(SEG_TOKENS) - 1
    if max_learned < len(alphabet):
        raise ValueError(f"vocab_size must be at least {vocab_size - max_learned + len(alphabet)}, not {vocab_size}.")
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    # Splits text into words and single other characters, each with the space before it, so no token spans two words.
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?\p{L}+|▁?[^▁\n]"), "isolated")
    trainer = trainers.BpeTrainer(vocab_size=max_learned, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(texts_and_words(texts), trainer)
    learned = json.loads(learner.to_str())["model"]
    tokens = sorted(learned["vocab"], key=learned["vocab"].get)
    vocab = {token: index for index, token in enumerate(fixed + [t for t in tokens if t not in fixed])}
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=UNK, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in (PAD, EOS, BOS, UNK, MASK)])
    add_paligemma_tokens(tokenizer)
    return tokenizer


def texts_and_words(texts: Iterable[str]) -> Iterator[str]:
    """Each text without its ``<loc…>`` and ``<seg…>``, then each of its words, without and with a space before it."""
    for text in texts:
        text = re.sub(r"<loc\d{4}>|<seg\d{3}>", "", text)
        yield text
        for word in text.split():
            yield word
            yield " " + word
