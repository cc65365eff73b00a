"""Aesthetic score: how much people would like an image, from 1 to 10, by LAION's predictor (Schuhmann et al. 2022,
2210.08402, sec. 5) on CLIP ViT-L/14 embeddings.

Both public heads are read, ``sac+logos+ava1-l14-linearMSE.pth`` (five linear layers with nothing between them) and
``sa_0_4_vit_l_14_linear.pth`` (one). A chain of linear layers is one, so a head is a vector and a number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from stepdistill.errors import MissingWeights, UserError
from stepdistill.metrics.float64 import wide
from stepdistill.system.files import sha256_of
from stepdistill.system.tensor_files import read_tensors


@dataclass(frozen=True)
class AestheticHead:
    """score = weight . embedding + bias.

    Attributes:
        weight: [D] float64.
        bias: one number.
        sha256: of the file.
    """

    weight: Tensor
    bias: float
    sha256: str

    def scores(self, images: Tensor) -> Tensor:
        """Of CLIP embeddings [B, D], which are normalised here; [B] float64.

        Raises:
            UserError: the embeddings are of another CLIP model.
        """
        if images.shape[1] != len(self.weight):
            raise UserError(
                f"the aesthetic head reads {len(self.weight)} features, the images have {images.shape[1]}: take CLIP "
                "ViT-L/14 (768), as clip:openai/clip-vit-large-patch14"
            )
        embeddings = F.normalize(wide(images), dim=1)
        return embeddings @ self.weight.to(embeddings.device) + self.bias


def load_aesthetic_head(file: Path) -> AestheticHead:
    """From a state dict (``.pth``) or safetensors file of linear layers.

    Raises:
        UserError: the file is missing, damaged, or no chain of linear layers to one number.
    """
    if not file.is_file():
        raise MissingWeights(f"no file {file}; the aesthetic score needs sac+logos+ava1-l14-linearMSE.pth")
    state = read_tensors(file, "an aesthetic head: sac+logos+ava1-l14-linearMSE.pth or its like")
    prefixes = [name.removesuffix("weight") for name in state if re.fullmatch(r"(.*\.)?weight", name)]
    prefixes.sort(key=lambda prefix: [int(part) for part in re.findall(r"\d+", prefix)])
    weight, bias = torch.zeros(0, 0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    try:
        for index, prefix in enumerate(prefixes):
            layer, shift = state[f"{prefix}weight"].double(), state[f"{prefix}bias"].double()
            weight, bias = (layer @ weight, layer @ bias + shift) if index else (layer, shift)
        (row,), (number,) = weight, bias.tolist()
    except (KeyError, RuntimeError, ValueError):
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in state.items())
        raise UserError(
            f"{file} is no chain of linear layers to one number: it holds {shapes[:200]}"
        ) from None
    return AestheticHead(row, float(number), sha256_of(file))
