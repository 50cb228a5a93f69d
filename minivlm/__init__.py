"""PaliGemma, small enough to read in an evening.

    model = minivlm.PaliGemma.from_pretrained()  # the embedded checkpoint, or pass a folder or a hub id
    processor = minivlm.Processor.from_pretrained()
    minivlm.generate(model, processor, image, "caption en")

Each module of the model covers one chapter of the course, and ``paligemma`` puts them together.
"""

from importlib import import_module

__version__ = "0.1.0"
__all__ = ["PaliGemma", "PaliGemmaConfig", "Processor", "generate"]

_MODULES = {
    "PaliGemma": "minivlm.paligemma",
    "PaliGemmaConfig": "minivlm.config",
    "Processor": "minivlm.processor",
    "generate": "minivlm.generation",
}


def __getattr__(name: str):
    """Import the four names above on first use, so that ``import minivlm`` does not wait for torch."""
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'minivlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
