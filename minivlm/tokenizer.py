"""Tokenizers of the Gemma family: the tokens that PaliGemma adds, and training a small one of the same kind.

PaliGemma's tokenizer is Gemma's with 1,024 location tokens, 128 segmentation tokens and ``<image>`` appended.
Source: big_vision, configs/proj/paligemma; ids as in the hub's tokenizer.json.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from minivlm.hub import printable, remedy
from minivlm.locations import BINS, CODES

PAD, EOS, BOS, UNK, MASK, IMAGE = "<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<image>"
LOC_TOKENS = [f"<loc{i:04d}>" for i in range(BINS)]  # coordinates along a side of the image
SEG_TOKENS = [f"<seg{i:03d}>" for i in range(CODES)]  # codes of the mask VQ-VAE


def read_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise ValueError(f"There is no tokenizer.json in {str(path.parent)!r}: pass a folder that has one.")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises a bare Exception
        raise ValueError(f"The file {str(path)!r} is not a tokenizer ({printable(error)}): {remedy(path)}.") from error


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that must exist."""
    index = tokenizer.token_to_id(token)
    if index is None:
        raise ValueError(f"The tokenizer has no token {token}, so it is not from the Gemma family.")
    return index


def add_paligemma_tokens(tokenizer: Tokenizer, image_token: str = IMAGE) -> None:
    """Adds the missing ones of PaliGemma's tokens: all ``<loc…>``, all ``<seg…>`` and ``<image>``, in this order.

    With the plain Gemma tokenizer of 256000 entries, ``<image>`` gets the id 257152. Location tokens and codes are part
    of an answer. Only ``<image>`` is special, which means that decoding skips it.
    """
    tokenizer.add_tokens([token for token in LOC_TOKENS + SEG_TOKENS if tokenizer.token_to_id(token) is None])
    if tokenizer.token_to_id(image_token) is None:
        tokenizer.add_special_tokens([AddedToken(image_token, normalized=False, special=True)])


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
