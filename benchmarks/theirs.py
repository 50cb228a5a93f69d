"""The same work done by transformers. Imports nothing of minivlm: a fresh process is to pay for transformers alone."""

from pathlib import Path

import torch
import transformers
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

EMBEDDED = Path(__file__).resolve().parents[1] / "data" / "checkpoints" / "paligemma-emoji-112"

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def load(path: str | Path = EMBEDDED, **options) -> torch.nn.Module:
    """The model of a folder."""
    return transformers.PaliGemmaForConditionalGeneration.from_pretrained(path, **options).eval()


def processor() -> transformers.PaliGemmaProcessor:
    """The embedded checkpoint's; of the picture's part the kind that needs no torchvision."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(EMBEDDED)
    return transformers.PaliGemmaProcessor(SiglipImageProcessorPil.from_pretrained(EMBEDDED), tokenizer)


def answers(model, batch: dict, tokens: int, end: int | None, **options) -> torch.Tensor:
    """Greedy, the new tokens alone, up to ``end``; ``tokens`` of them where that is None."""
    model.generation_config.eos_token_id = end
    with torch.inference_mode():
        whole = model.generate(**batch, max_new_tokens=tokens, do_sample=False, pad_token_id=0, **options)
    return whole[:, batch["input_ids"].shape[1] :]


def captions(model, processor, images: list) -> list[str]:
    """From pictures to captions as text."""
    batch = processor(text=["<image>caption en"] * len(images), images=images, return_tensors="pt", padding=True)
    ids = answers(model, batch, 32, model.config.eos_token_id or processor.tokenizer.eos_token_id)
    return processor.batch_decode(ids, skip_special_tokens=True)


class Loss(torch.nn.Module):
    """The loss of a batch of minivlm's. transformers wants a picture a row: each is given as often as it has rows."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, labels, **text):
        pictures = pixel_values.repeat_interleave(len(labels) // len(pixel_values), dim=0)
        return self.model(pixel_values=pictures, labels=labels, **text).loss
