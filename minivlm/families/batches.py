"""What each family learns from: batches of captioned scenes, in the form that its objective takes.

    B rows · T tokens of text · I images per document

Item ``i`` is the batch of step ``i``, as for all batches of emoji scenes (emoji/batches.py).
"""

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from minivlm import emoji
from minivlm.emoji.batches import SceneBatches
from minivlm.families.base import encode_texts
from minivlm.families.cm3 import cut_spans
from minivlm.processor import IGNORE_INDEX, Processor

MASKED, KEPT = 0.15, 0.1  # of the words, for VisualBERT; of the masked ones, how many stay, and how many are random


def caption_of(scene: emoji.Scene) -> str:
    """What a family learns to write about a scene: the answer to ``caption en``."""
    return scene.captions["caption"][0]


class ImageBatches(SceneBatches):
    """Scenes without a word: ``pixel_values``."""

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixel_values(self.scenes(step))}


class CaptionBatches(SceneBatches):
    """Scenes with their captions: ``pixel_values``, ``input_ids``, ``attention_mask``."""

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        scenes = self.scenes(step)
        captions = [caption_of(scene) for scene in scenes]
        return {"pixel_values": self.pixel_values(scenes)} | encode_texts(self.processor, captions)


class TextBatches:
    """Documents of captions that nothing shows, for a language model that reads text only: ``input_ids``,
    ``attention_mask``. Half of them are about two things with made-up names (``InterleavedBatches``).
    """

    def __init__(self, processor: Processor, batch_size: int, *, images: int = 3, seed: int = 0):
        self.processor, self.batch_size, self.images, self.seed = processor, batch_size, images, seed

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((self.seed, 8, step))
        return encode_texts(self.processor, ["\n".join(self.document(rng)) for _ in range(self.batch_size)])

    def document(self, rng: np.random.Generator) -> list[str]:
        """The captions of a document, in order."""
        if rng.random() < 0.5:
            names = made_up_names(rng)
            return [f"a {names[which]}" for which in two_things(rng, self.images)]
        seeds = rng.integers(2**31, size=self.images).tolist()
        return [emoji.count_caption(emoji.planned_names(seed)) for seed in seeds]


class InterleavedBatches(SceneBatches):
    """For Flamingo: documents of images, each followed by its caption, one caption per line. An image comes just
    before ``<bos>`` or the newline that starts its line, so these predict the caption's first word.

    Half of them show two kinds of objects, one at a time, under names made up for this document. The first two images
    introduce both; every later one has to be named by what they said.

    Args:
        batch_size: Documents per step.
        images: Per document.
    """

    def __init__(self, processor: Processor, batch_size: int, *, images: int = 3, split: str = "train", **options):
        super().__init__(processor, batch_size, **options)
        self.images, self.split, self.alone = images, split, emoji.World(self.world.size, 1)
        self.seeds_of: dict[str, list[int]] = {}
        for seed in range(200 * self.world.size):
            self.seeds_of.setdefault(emoji.planned_names(seed, split, self.alone)[0], []).append(seed)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((self.seed, 9, step, self.rank))
        documents = [self.document(rng) for _ in range(self.batch_size // self.world_size)]
        return self.assemble([scenes for scenes, _ in documents], [captions for _, captions in documents])

    def document(self, rng: np.random.Generator) -> tuple[list[emoji.Scene], list[str]]:
        """Scenes and their captions."""
        if rng.random() < 0.5:
            return self.naming_document(rng)
        seeds = rng.integers(2**31, size=self.images).tolist()
        scenes = [self.scene(seed, self.world) for seed in seeds]
        return scenes, [caption_of(scene) for scene in scenes]

    def naming_document(self, rng: np.random.Generator) -> tuple[list[emoji.Scene], list[str]]:
        """Two kinds of objects under made-up names."""
        kinds = rng.choice(list(self.seeds_of), size=2, replace=False).tolist()
        names, order = made_up_names(rng), two_things(rng, self.images)
        scenes = [self.scene(int(rng.choice(self.seeds_of[kinds[which]])), self.alone) for which in order]
        return scenes, [f"a {names[which]}" for which in order]

    def scene(self, seed: int, world: emoji.World) -> emoji.Scene:
        return emoji.make_scene(seed, self.split, self.processor.image_size, world, self.augment)

    def assemble(self, scenes: list[list[emoji.Scene]], captions: list[list[str]]) -> dict[str, Tensor]:
        """``pixel_values`` of all documents' images, one after the other, the texts, and how many images came before
        each token.
        """
        batch = encode_texts(self.processor, ["\n".join(lines) for lines in captions])
        (newline,) = self.processor.encode(["\n"])[0]
        return batch | {
            "pixel_values": self.pixel_values([scene for document in scenes for scene in document]),
            "images_before": 1 + (batch["input_ids"] == newline).long().cumsum(1),
        }


def two_things(rng: np.random.Generator, count: int) -> list[int]:
    """0 and 1, one each, then any of them."""
    return [*rng.permutation(2).tolist(), *rng.integers(2, size=count - 2).tolist()]


def made_up_names(rng: np.random.Generator) -> list[str]:
    """Two names that no object has, such as "zoba" and "kiru", without a syllable in common."""
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    a, b, c, d = rng.choice(syllables, size=4, replace=False).tolist()
    return [a + b, c + d]


class PrefixBatches(SceneBatches):
    """Captioned scenes, then texts about other scenes without their images; half of all rows keep a longer prefix.

    Args:
        texts: What the texts without images are drawn from, such as ``list(emoji.texts(range(10_000)))``.
        text_rows: How many of them per step.
    """

    def __init__(self, processor: Processor, batch_size: int, *, texts: list[str], text_rows: int, **options):
        super().__init__(processor, batch_size, **options)
        self.texts, self.text_rows = texts, text_rows

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        scenes, rng = self.scenes(step), np.random.default_rng((self.seed, 5, step, self.rank))
        captions = [caption_of(scene) for scene in scenes]
        chosen = rng.integers(len(self.texts), size=self.text_rows)
        batch = encode_texts(self.processor, [*captions, *(self.texts[i] for i in chosen)])
        longest = batch["attention_mask"].sum(1).numpy() - 1  # at least <eos> is left to predict
        drawn = rng.integers(1, longest + 1)
        lengths = torch.from_numpy(np.where(rng.random(len(drawn)) < 0.5, drawn, 1))
        return {"pixel_values": self.pixel_values(scenes), "prefix_lengths": lengths} | batch


class DocumentBatches(SceneBatches):
    """Captioned scenes as documents: a third whole, a third without the caption, a third without some other span."""

    def __init__(self, processor: Processor, batch_size: int, *, side: int, begin: int, sentinel: int, **options):
        super().__init__(processor, batch_size, **options)
        self.side, self.begin, self.sentinel = side, begin, sentinel

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        scenes, rng = self.scenes(step), np.random.default_rng((self.seed, 6, step, self.rank))
        captions = self.processor.encode([caption_of(scene) for scene in scenes])
        rows = [torch.tensor(self.document(ids, rng)) for ids in captions]
        pad = nn.utils.rnn.pad_sequence
        return {
            "pixel_values": self.pixel_values(scenes),
            "slots": pad(rows, batch_first=True, padding_value=self.processor.pad_token_id),
            "is_token": pad([torch.ones_like(row) for row in rows], batch_first=True),
        }

    def document(self, caption: list[int], rng: np.random.Generator) -> list[int]:
        """One document, whole or with a span cut out, and ``<eos>``."""
        codes = [-1 - i for i in range(self.side**2)]
        ids = [self.processor.bos_token_id, *caption, self.begin, *codes, self.processor.eos_token_id]
        kind, end = rng.integers(3), self.processor.eos_token_id
        if kind == 0:
            return ids
        start, stop = (1, 1 + len(caption)) if kind == 1 else sorted(rng.integers(1, len(ids) - 1, size=2))
        return [*cut_spans(ids, [(int(start), int(stop))], [self.sentinel]), end]


class BlankBatches(SceneBatches):
    """Scenes with two captions each, some words masked, and the second caption wrong half of the time.

    Args:
        vocab_size: Size of the tokenizer's vocabulary. The id after it is the mask's.
    """

    def __init__(self, processor: Processor, batch_size: int, *, vocab_size: int, **options):
        super().__init__(processor, batch_size, **options)
        self.vocab_size, self.mask_id = vocab_size, vocab_size

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        scenes, rng = self.scenes(step), np.random.default_rng((self.seed, 7, step, self.rank))
        own = [list(scene.captions.values())[-1][0] for scene in scenes]  # the second caption, of the last kind
        others = [own[-1], *own[:-1]]
        is_other = (rng.random(len(scenes)) < 0.5) & np.array([a != b for a, b in zip(own, others, strict=True)])
        seconds = np.where(is_other, others, own).tolist()
        rows = [torch.tensor(self.pair(*both)) for both in zip(map(caption_of, scenes), seconds, strict=True)]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.processor.pad_token_id)
        is_token = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        special = torch.tensor([self.processor.bos_token_id, self.processor.eos_token_id])
        masked, labels = mask_words(ids, is_token & ~torch.isin(ids, special), self.vocab_size, self.mask_id, rng)
        return {
            "pixel_values": self.pixel_values(scenes),
            "input_ids": masked,
            "attention_mask": is_token.long(),
            "labels": labels,
            "is_other": torch.from_numpy(is_other).long(),
        }

    def pair(self, first: str, second: str) -> list[int]:
        """``<bos>`` first ``<eos>`` second ``<eos>``, which stand for BERT's [CLS] and [SEP]."""
        one, two = self.processor.encode([first, second])
        return [self.processor.bos_token_id, *one, self.processor.eos_token_id, *two, self.processor.eos_token_id]


def mask_words(
    ids: Int[Tensor, "B T"], is_word: Bool[Tensor, "B T"], vocab_size: int, mask_id: int, rng: np.random.Generator
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Hide 15% of the words, at least one per batch. Of them, 80% become the mask, 10% a random word, 10% stay.

    Returns:
        The ids, and the labels: the hidden words, -100 elsewhere.
    """
    chosen = torch.from_numpy(rng.random(ids.shape) < MASKED) & is_word
    if not chosen.any():
        chosen[tuple(is_word.nonzero()[rng.integers(int(is_word.sum()))])] = True
    how = torch.from_numpy(rng.random(ids.shape))
    random = torch.from_numpy(rng.integers(vocab_size, size=ids.shape))
    hidden = torch.where(how < KEPT, ids, torch.where(how < 2 * KEPT, random, mask_id))
    return torch.where(chosen, hidden, ids), ids.masked_fill(~chosen, IGNORE_INDEX)
