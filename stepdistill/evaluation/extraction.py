"""What a suite's networks say of images, one row an image, from which every score is computed.

features        [B, D]     of the suite's own network
logits          [B, 1008]  of Inception, without bias, for the Inception score
spatial         [B, 2023]  of Inception, for sFID
clip_score      [B]        cosine of image and prompt
clip_embedding  [B, E]     for CMMD, where its network is not that of ``features``
pick_score      [B]
aesthetic       [B]
second_features [B, S]     of the suite's second network
second_fit      [B]        how well image and prompt fit in its eyes
images          [B, 3, H, W]  uint8, where one of your own metrics needs them
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepdistill.errors import MissingWeights, UserError
from stepdistill.evaluation.rows import Rows
from stepdistill.evaluation.suite import Suite
from stepdistill.features.clip import ClipFeatures
from stepdistill.features.inception import InceptionFeatures
from stepdistill.features.judge import Judge
from stepdistill.features.load import network_of
from stepdistill.features.network import FeatureNetwork
from stepdistill.metrics.aesthetic import AestheticHead, load_aesthetic_head
from stepdistill.metrics.clip_score import cosines
from stepdistill.metrics.pick_score import pick_scores
from stepdistill.pictures.given import words_of


class Extraction:
    """A suite's networks, each loaded once. Metrics whose weights are missing are left out, as long as one is left.

    Args:
        suite: the protocol.
        device: where the networks run.

    Attributes:
        suite: the protocol.
        network: of its Frechet distance; None where its weights are missing.
        second: of its second features; None where it has none or their weights are missing.
        not_computed: the metrics, named as in Scores, that cannot be computed, and why, each in one line.

    Raises:
        UserError: a network is unknown, its file is broken, or the weights of every metric are missing.
    """

    def __init__(self, suite: Suite, device: torch.device | str = "cpu") -> None:
        self.suite = suite
        self.not_computed: dict[str, str] = {}
        asked = suite.asked(suite.features)
        self._networks: dict[str, FeatureNetwork] = {}
        missing: list[MissingWeights] = []
        for spec in dict.fromkeys(asked.values()):
            try:
                resize = suite.resize if spec == suite.features else "clean"
                self._networks[spec] = network_of(spec, resize, device, suite.precision)
            except MissingWeights as error:
                missing.append(error)
                self._leave_out([name for name, needed in asked.items() if needed == spec], error)
        self.network = self._networks.get(suite.features)
        self.second = self._networks.get(suite.second_features or "")
        self._head: AestheticHead | None = None
        if suite.aesthetic is not None and "aesthetic" not in self.not_computed:
            try:
                self._head = load_aesthetic_head(suite.aesthetic_file())
            except MissingWeights as error:
                missing.append(error)
                self._leave_out(["aesthetic"], error)
        if isinstance(self.network, InceptionFeatures) and self.network.layers_missing is not None:
            inner = {"inception_score", "sfid"} & set(asked)
            self._leave_out(sorted(inner), self.network.layers_missing)
        if missing and set(asked) <= set(self.not_computed):
            raise missing[0]

    def network_of(self, metric: str) -> FeatureNetwork | None:
        """The network of a metric; None where the suite does not ask it or its weights are missing."""
        spec = self.suite.asked(self.suite.features).get(metric)
        return None if spec is None or metric in self.not_computed else self._networks.get(spec)

    def __call__(self, pixels: Tensor, prompts: Sequence[str] | None) -> Rows:
        """The rows of images, named as above.

        Args:
            pixels: uint8 [B, 3, H, W].
            prompts: one an image; None for a suite that reads none.

        Raises:
            UserError: other pixels, or a number of prompts that is not that of the images.
        """
        suite = self.suite
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
            nan = " with NaN" if pixels.is_floating_point() and pixels.isnan().any() else ""
            found = f"{pixels.dtype} {list(pixels.shape)}{nan}"
            raise UserError(f"images are {found}; give batches uint8 [B, 3, H, W] in 0..255")
        if suite.reads_prompts and len(prompts or []) != len(pixels):
            raise UserError(
                f"{len(prompts or [])} prompts for {len(pixels)} images; suite {suite.label} needs one an image"
            )
        texts = words_of(prompts or [])
        rows, seen = self._own_rows(pixels), dict[str, Tensor]()
        if "features" in rows:
            seen[suite.features] = rows["features"]

        def embedding(network: FeatureNetwork) -> Tensor:
            """Of the images, computed once for every metric of one network."""
            if network.name not in seen:
                seen[network.name] = network.images(pixels)
            return seen[network.name]

        if (network := self.network_of("clip_score")) is not None:
            read = network.texts([suite.clip_prefix + text for text in texts])
            rows["clip_score"] = cosines(embedding(network), read)
        if suite.cmmd != suite.features and (network := self.network_of("cmmd")) is not None:
            rows["clip_embedding"] = embedding(network)
        if isinstance(network := self.network_of("pick_score"), ClipFeatures):
            rows["pick_score"] = pick_scores(embedding(network), network.texts(texts), network.logit_scale)
        if self._head is not None and (network := self.network_of("aesthetic")) is not None:
            rows["aesthetic"] = self._head.scores(embedding(network))
        if self.second is not None:
            rows["second_features"] = embedding(self.second)
        if (network := self.network_of("second_fit")) is not None:
            rows["second_fit"] = _fits(network, embedding(network), texts)
        if any("images" in metric.needs for metric in suite.own_metrics()):
            rows["images"] = pixels
        return rows

    def _own_rows(self, pixels: Tensor) -> Rows:
        """Of the suite's own network, in one pass."""
        network, suite = self.network, self.suite
        if network is None:
            return {}
        inner = suite.inception_score or suite.sfid
        if inner and isinstance(network, InceptionFeatures) and network.layers_missing is None:
            found = network.activations(pixels)
            rows = {"features": found.features}
            if suite.inception_score and found.logits is not None:
                rows["logits"] = found.logits
            if suite.sfid and found.spatial is not None:
                rows["spatial"] = found.spatial
            return rows
        return {"features": network.images(pixels)}

    def _leave_out(self, metrics: Sequence[str], why: object) -> None:
        self.not_computed |= {metric: " ".join(str(why).split()) for metric in metrics}


def _fits(network: FeatureNetwork, features: Tensor, texts: Sequence[str]) -> Tensor:
    """How well images, known by their features [B, D], fit their own prompts, [B]: see the network."""
    if isinstance(network, Judge):
        return network.fit_of(features, texts)
    return cosines(features, network.texts(texts))
