"""Tokenizers of the Gemma family, and the tokens that PaliGemma adds to them.

PaliGemma's tokenizer is Gemma's with 1,024 location tokens, 128 segmentation tokens and ``<image>`` appended.
Source: big_vision, configs/proj/paligemma; ids as in the hub's tokenizer.json.
"""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer

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
