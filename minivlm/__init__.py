"""PaliGemma, small enough to read in an evening.

    model = minivlm.PaliGemma.from_pretrained()          # the embedded checkpoint; or a folder, or a hub id
    processor = minivlm.Processor.from_pretrained()
    minivlm.generate(model, processor, image, "caption en")

Every other module holds the idea of one chapter; ``paligemma`` puts them together.
"""

from importlib import import_module

__version__ = "0.1.0"
__all__ = ["PaliGemma", "PaliGemmaConfig", "Processor", "generate"]

_HOME = {
    "PaliGemma": "minivlm.paligemma",
    "PaliGemmaConfig": "minivlm.config",
    "Processor": "minivlm.processor",
    "generate": "minivlm.generation",
}


def __getattr__(name: str):
    """Looks up the four names above when they are first used, so that ``import minivlm`` need not wait for torch."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'minivlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
