"""PickScore: which of two images of a prompt people pick, as a CLIP model learnt it (Kirstain et al. 2023, 2305.01569).

    s(image, prompt) = exp(logit scale) cos(image, prompt)

The model is a CLIPModel (``yuvalkirstain/PickScore_v1``, of ViT-H/14), read as ``clip:FOLDER``; scores lie near 20, and
the chance that a is picked over b is the logistic function of s(a) - s(b).
"""

from __future__ import annotations

from torch import Tensor

from stepdistill.metrics.clip_score import cosines


def pick_scores(images: Tensor, texts: Tensor, scale: float) -> Tensor:
    """Row by row, [B] float64.

    Args:
        images: features [B, D] of images.
        texts: features [B, D] of their own prompts.
        scale: exp of the model's logit scale: ``logit_scale`` of its features, 100 for most CLIP models.
    """
    return scale * cosines(images, texts)
