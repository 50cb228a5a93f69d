"""The same work done by transformers. Does not import minivlm, so that a fresh process pays for transformers only."""

from pathlib import Path

import torch
import transformers
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

EMBEDDED = Path(__file__).resolve().parents[1] / "data" / "checkpoints" / "paligemma-emoji-112"

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def load(path: str | Path = EMBEDDED, **options) -> torch.nn.Module:
    """The model in a folder."""
    return transformers.PaliGemmaForConditionalGeneration.from_pretrained(path, **options).eval()


def processor() -> transformers.PaliGemmaProcessor:
    """The embedded checkpoint's processor, with the image processor that does not need torchvision."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(EMBEDDED)
    return transformers.PaliGemmaProcessor(SiglipImageProcessorPil.from_pretrained(EMBEDDED), tokenizer)


def answers(model, batch: dict, tokens: int, end: int | None, **options) -> torch.Tensor:
    """Greedy decoding: only the new tokens, up to ``end``; exactly ``tokens`` of them if that is None."""
    model.generation_config.eos_token_id = end
    with torch.inference_mode():
        whole = model.generate(**batch, max_new_tokens=tokens, do_sample=False, pad_token_id=0, **options)
    return whole[:, batch["input_ids"].shape[1] :]


def captions(model, processor, images: list) -> list[str]:
    """From images to captions as text."""
    batch = processor(text=["<image>caption en"] * len(images), images=images, return_tensors="pt", padding=True)
    ids = answers(model, batch, 32, model.config.eos_token_id or processor.tokenizer.eos_token_id)
    return processor.batch_decode(ids, skip_special_tokens=True)


class Loss(torch.nn.Module):
    """The loss of one of minivlm's batches. transformers needs one image per row, so images are repeated."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, labels, **text):
        images = pixel_values.repeat_interleave(len(labels) // len(pixel_values), dim=0)
        return self.model(pixel_values=images, labels=labels, **text).loss
