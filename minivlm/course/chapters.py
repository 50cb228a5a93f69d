"""The chapters and labs of the course, declared once. Labs are electives; their numbers start with L.

Headings, cards, progress, grades and the teacher's tables all read a chapter's facts here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chapter:
    """What the course says about a chapter.

    Attributes:
        number: Two digits, "05", or "L0" for a lab. The names of its source and notebooks start with it.
        title: As in running text, such as "the prefix-LM mask".
        question: What the reader can answer at the end.
        minutes: Working time, exercises included.
        modules: Files of the package that the chapter explains.
    """

    number: str
    title: str
    question: str
    minutes: int
    modules: tuple[str, ...]


CHAPTERS: dict[str, Chapter] = {
    chapter.number: chapter
    for chapter in (
        Chapter("00", "start here", "What is a VLM, and what will I build?", 35, ()),
        Chapter("01", "CLIP loss", "How do images and text come to share one embedding space?", 85, ("losses.py",)),
        Chapter(
            "02",
            "safe softmax and the sigmoid loss",
            "Why did SigLIP replace softmax with a sigmoid?",
            90,
            ("losses.py",),
        ),
        Chapter("03", "patch embedding", "How does an image become a sequence?", 100, ("siglip.py",)),
        Chapter("04", "the processor", "What does the model actually receive?", 80, ("processor.py", "tokenizer.py")),
        Chapter("05", "the prefix-LM mask", "Which token attends to which?", 80, ("masks.py",)),
        Chapter(
            "06",
            "the Gemma decoder",
            "How does the decoder turn embeddings into the next token?",
            120,
            ("gemma.py",),
        ),
        Chapter("07", "the KV cache", "Why is the second token cheap?", 100, ("cache.py",)),
        Chapter(
            "08",
            "full PaliGemma inference",
            "How does it all answer a question about an image?",
            100,
            ("paligemma.py", "generation.py", "locations.py"),
        ),
        Chapter(
            "L0", "masks as tokens", "How does a language model write the outline of an object?", 55, ("vqvae.py",)
        ),
        Chapter("L7", "does it look?", "Does the model look at the image, or guess from the question?", 110, ()),
        Chapter("L10", "the empty file", "Can I write PaliGemma from nothing but its facts?", 480, ("checkpoint.py",)),
    )
}
