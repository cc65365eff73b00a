"""The judge: a second feature network of the embedded emoji, of another kind than the embedded CLIP.

The CLIP is FD-emoji's network, the teacher's text encoder, and what perceptual and reward terms learn from: a student
that is good in its eyes alone is found out by a network that none of them saw. How it was made, what it knows and how
far the two agree: stepdistill/assets/emoji/judge/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from stepdistill.features.judge_network import JudgeNetwork, words_of
from stepdistill.features.network import DTYPES, Precision, titled
from stepdistill.features.resize import resize_clean
from stepdistill.system.emoji import judge_folder
from stepdistill.system.files import sha256_of
from stepdistill.system.float32 import full_float32
from stepdistill.system.memory import sent
from stepdistill.system.parsing import parse_json

SIZE = 32
WEIGHTS = "model.safetensors"


class Judge:
    """A FeatureNetwork (see :mod:`stepdistill.features.network`) that also says how well a picture fits a caption.

    Args:
        file: safetensors, whose header has the widths, the groups, and the words with the share of each.
        precision: of the network that looks at images.
        device: where it runs.
    """

    name = "judge"
    fd_scale = 100.0
    clip_name = None
    fit_name = "judge fit"
    kernel_scale = 1.0  # unit vectors: the kernel is (cosine + 1)^3
    resize = f"clean (bicubic, antialiased, float) to {SIZE}"

    def __init__(
        self, file: Path, *, precision: Precision = "float32", device: torch.device | str = "cpu"
    ) -> None:
        with safe_open(file, "pt") as content:
            config = parse_json(content.metadata()["config"])
            state = {name: content.get_tensor(name).float() for name in content.keys()}  # noqa: SIM118
        self.words: dict[str, int] = {word: i for i, word in enumerate(config["words"])}
        self.groups: list[str] = config["groups"]
        self.device = torch.device(device)
        self.dimension, self.precision = int(config["dimension"]), precision
        self.fd_name = titled("FD-judge", precision)
        self.sha256 = sha256_of(file)
        self._shares = torch.tensor(list(config["words"].values()), device=self.device).log()  # [W]
        network = JudgeNetwork(config["widths"], self.dimension, len(self.words), len(self.groups))
        network.load_state_dict(state)
        self._network = network.eval().requires_grad_(False).to(self.device)
        self._dtype = DTYPES[precision]
        for part in (network.stem, network.stem_norm, network.blocks, network.projection):
            part.to(self._dtype)

    def features(self, images: Tensor) -> Tensor:
        """Unit features [B, 64] of images [B, 3, H, W] in [0, 1], with a graph."""
        wide = resize_clean(255 * sent(images, self.device), SIZE) / 127.5 - 1
        found: Tensor = self._network(wide.to(self._dtype)).float()
        return F.normalize(found, dim=1)

    def words_of(self, features: Tensor) -> Tensor:
        """Log-probability [B, W] of each word in the sight of features [B, 64]."""
        return self._network.named(features)[0]

    def groups_of(self, features: Tensor) -> Tensor:
        """Log-probability [B, 9] of each Unicode group in the sight of features [B, 64]."""
        return self._network.named(features)[1]

    def fit(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """How well each picture [B, 3, H, W] in [0, 1] fits its own caption, [B], with a graph into the images.

        The mean over the caption's words w of log p(w | picture) - log p(w), in nats: 0 where the picture says nothing
        of the caption, and where the judge knows none of its words.
        """
        return self.fit_of(self.features(images), captions)

    def fit_of(self, features: Tensor, captions: Sequence[str]) -> Tensor:
        """:meth:`fit` of pictures whose features [B, 64] are known."""
        told = self.words_of(features) - self._shares  # [B, W]
        return (told * self._parts(captions)).sum(1)

    def fits(self, features: Tensor, captions: Sequence[str]) -> Tensor:
        """The fit of each picture, known by its features [B, 64], to each caption: [B, C]."""
        return (self.words_of(features) - self._shares) @ self._parts(captions).T

    def _parts(self, captions: Sequence[str]) -> Tensor:
        """Equal shares [C, W] of a caption's words that the judge knows; zeros where it knows none."""
        parts = torch.zeros(len(captions), len(self.words))
        for row, caption in zip(parts, captions, strict=True):
            known = [self.words[word] for word in words_of(caption) if word in self.words]
            row[known] = 1 / max(len(known), 1)
        return parts.to(self.device)

    @torch.no_grad()
    @full_float32()
    def images(self, pixels: Tensor) -> Tensor:
        return self.features(sent(pixels, self.device).float() / 255)

    def texts(self, prompts: Sequence[str]) -> Tensor:
        raise NotImplementedError("the judge compares pictures with words: see Judge.fit")


def load_judge(device: torch.device | str = "cpu") -> Judge:
    """The embedded judge."""
    return Judge(judge_folder() / WEIGHTS, device=device)
