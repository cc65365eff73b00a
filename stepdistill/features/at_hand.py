"""Which feature network is taken where nobody names one: what lies on this machine; nothing is downloaded for it."""

from __future__ import annotations

from stepdistill.errors import MissingWeights
from stepdistill.features.inception import find_weights

TEXTS = (
    "clip:openai/clip-vit-large-patch14",
    "clip:openai/clip-vit-base-patch32",
    "clip:openai/clip-vit-base-patch16",
)
"""Networks that compare images with texts, the first that is here is taken."""
IMAGES = (*TEXTS, "dinov2:facebook/dinov2-large", "dinov2:facebook/dinov2-base", "inception", "emoji")
"""Networks for a distance between some hundred pictures or fewer, the first that is here is taken. CLIP and DINOv2
come first: their 512 to 1,024 features say what is in a picture, where FID's 2,048 need thousands of pictures.
``emoji`` is always here; it sees pictures at 32 x 32 pixels: layout and colours, no detail."""


def images_at_hand() -> str:
    """The specification of a network of IMAGES."""
    return next(spec for spec in IMAGES if is_here(spec))


def texts_at_hand() -> str | None:
    """The specification of a network of TEXTS; None where none is here."""
    return next((spec for spec in TEXTS if is_here(spec)), None)


def is_here(spec: str) -> bool:
    """Whether a network of these lists lies on this machine, in the Hub's cache or where FID's tools keep theirs."""
    kind, _, name = spec.partition(":")
    if kind == "emoji":
        return True
    if kind == "inception":
        try:
            find_weights()
        except MissingWeights:
            return False
        return True
    from huggingface_hub import try_to_load_from_cache

    files = ("config.json", "model.safetensors")
    return all(isinstance(try_to_load_from_cache(name, file), str) for file in files)
