"""The keys of a suite that say which metrics it has, and by which networks."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stepdistill.errors import did_you_mean
from stepdistill.metrics.own import SHIPPED

WITH_TEXTS = ("emoji", "judge", "clip")
"""Kinds of networks that compare images with texts."""
AESTHETIC_NETWORK = "clip:openai/clip-vit-large-patch14"
"""The network that LAION's public aesthetic heads read."""
_SWITCHES = ("kid", "fid_infinity", "inception_score", "sfid", "clip_score")
"""Metrics that ``metrics`` turns on by their names."""
_WITH_VALUE = {
    "cmmd": "cmmd: clip:openai/clip-vit-large-patch14-336",
    "pick_score": "pick_score: clip:yuvalkirstain/PickScore_v1",
    "aesthetic": "aesthetic: FILE",
    "diversity": "diversity: 4",
    **dict.fromkeys(("precision", "recall", "density", "coverage"), "neighbours: 5"),
}
"""Metrics whose key says more than that they are wanted."""


class MetricKeys(BaseModel):
    """The metrics of a suite; the Frechet distance in ``features`` is always one of them.

    Attributes:
        metrics: your own metrics, each a Python file such as ``./my_metric.py``, looked for beside the suite's file
            (docs/extend/own_metric.md), or ``high_frequencies`` (of the images' spectrum) and ``colour_hits`` (images
            of the colour that their prompt names). They move no other score. kid, fid_infinity, inception_score, sfid
            and clip_score can be named here, too.
        kid: also compute the kernel distance (needs a reference with features).
        neighbours: k of precision, recall, density and coverage; 0 leaves them out. They are also left out where the
            reference has no features, or there are not more than k images.
        fid_infinity: also compute the Frechet distance at n without end.
        inception_score, sfid: also compute it. They read more layers of Inception, so ``features`` must be
            ``inception`` from a state dict, and sFID's reference must have spatial moments (ADM's npz, or
            ``stepdistill stats --spatial``).
        clip_score: also compute the image-text cosine.
        clip_network: its network, as ``clip:openai/clip-vit-base-patch32`` or ``clip:FOLDER``; None is ``features``.
        clip_prefix: put before every prompt of the CLIP score, such as ``"A photo depicts "``.
        cmmd: the CLIP network of CMMD, as ``clip:openai/clip-vit-large-patch14-336``; None leaves it out.
        cmmd_reference: its statistics file, of ``stepdistill stats --features clip:...``, with features. Not needed
            where ``cmmd`` is ``features``: then it is the reference.
        pick_score: the CLIP model of PickScore, as ``clip:yuvalkirstain/PickScore_v1``; None leaves it out.
        aesthetic: the file of the aesthetic head, as ``sac+logos+ava1-l14-linearMSE.pth``; None leaves it out.
        aesthetic_network: the CLIP network that the head reads.
        diversity: samples of one prompt whose pairwise diversity is measured as well; 0 leaves it out. They are drawn
            besides the n images and move no other score.
        diversity_prompts: how many of the first prompts that is done for.
        second_features: another network, whose Frechet distance is computed besides, from the same images: what was
            trained in sight of ``features`` is found out by one that was not. Where it has texts (``judge``, ``emoji``,
            ``clip:``) and there are prompts, also how well images fit theirs in its eyes. None leaves both out. It
            moves no other score.
        second_reference: its statistics of the real images, of ``stepdistill stats --features ...``.
        intervals: standard errors of Frechet distances also where they are expensive, of more than 256 features; the
            others always have them. It moves no score.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    metrics: tuple[str, ...] = ()
    kid: bool = True
    neighbours: int = Field(default=5, ge=0)
    fid_infinity: bool = False
    inception_score: bool = False
    sfid: bool = False
    clip_score: bool = True
    clip_network: str | None = None
    clip_prefix: str = ""
    cmmd: str | None = None
    cmmd_reference: str | None = None
    pick_score: str | None = None
    aesthetic: str | None = None
    aesthetic_network: str = AESTHETIC_NETWORK
    diversity: int = Field(default=0, ge=0)
    diversity_prompts: int = Field(default=100, ge=1)
    second_features: str | None = None
    second_reference: str | None = None
    intervals: bool = False

    @model_validator(mode="before")
    @classmethod
    def _named(cls, content: Any) -> Any:
        """Metrics that are shipped become their own keys, so that there is one way to say which a suite has."""
        if not isinstance(content, dict) or not isinstance(content.get("metrics"), (list, tuple)):
            return content
        content = dict(content)
        files = [name for name in content["metrics"] if str(name).endswith(".py") or name in SHIPPED]
        for name in [name for name in content["metrics"] if name not in files]:
            if name in _WITH_VALUE:
                raise ValueError(
                    f"metrics has {name}, which is a key with a value: write {_WITH_VALUE[name]}"
                )
            if name not in _SWITCHES:
                near = did_you_mean(str(name), [*_SWITCHES, *SHIPPED, *_WITH_VALUE])
                raise ValueError(f"metrics has {name} {near}; your own is a file, such as ./my_metric.py")
            if content.setdefault(name, True) is False:
                raise ValueError(f"metrics has {name}, and {name} is false: take one of them away")
            content[name] = True
        return {**content, "metrics": files}

    @property
    def reads_prompts(self) -> bool:
        """Whether a score compares images with their prompts."""
        return self.clip_score or self.pick_score is not None

    def networks(self) -> dict[str, str]:
        """The specifications of the networks besides ``features``, by the key that names them."""
        given = {
            "clip_network": self.clip_network,
            "cmmd": self.cmmd,
            "pick_score": self.pick_score,
            "aesthetic_network": self.aesthetic_network if self.aesthetic is not None else None,
        }
        return {key: spec for key, spec in given.items() if spec is not None}

    def asked(self, features: str) -> dict[str, str]:
        """The metrics, named as in ``Scores``, and the specification of the network that each reads.

        Args:
            features: of the suite.
        """
        wanted = {
            "fd": True,
            "kid": self.kid,
            "fid_infinity": self.fid_infinity,
            "sfid": self.sfid,
            "inception_score": self.inception_score,
            **dict.fromkeys(("precision", "recall", "density", "coverage"), self.neighbours > 0),
            "diversity": self.diversity > 0,
        }
        found = {name: features for name, asked in wanted.items() if asked}
        if self.clip_score:
            found["clip_score"] = self.clip_network or features
        if self.cmmd is not None:
            found["cmmd"] = self.cmmd
        if self.pick_score is not None:
            found["pick_score"] = self.pick_score
        if self.aesthetic is not None:
            found["aesthetic"] = self.aesthetic_network
        if self.second_features is not None:
            found["second_fd"] = self.second_features
        return found

    def check_metrics(self, features: str, prompts: str | None, n: int) -> None:
        """Whether the metrics fit together and to the rest of the suite.

        Raises:
            ValueError: they do not; pydantic makes it a suite's error.
        """
        for name, asked, off in (
            ("clip_score", self.clip_score, "set clip_score to false"),
            ("pick_score", self.pick_score is not None, "leave pick_score out"),
        ):
            if asked and prompts is None:
                raise ValueError(f"{name} needs prompts: give them, or {off}")
            if asked and n == 0:
                raise ValueError(f"{name} needs n, as image i belongs to prompt i: give n, or {off}")
        if self.diversity == 1 or (self.diversity and prompts is None):
            raise ValueError("diversity needs prompts, and 2 samples of each or more (0 leaves it out)")
        kind = features.partition(":")[0]
        if (self.inception_score or self.sfid) and kind != "inception":
            name = "inception_score" if self.inception_score else "sfid"
            raise ValueError(
                f"{name} reads layers of Inception: set features to inception, or {name} to false"
            )
        if not self.clip_score and (self.clip_network is not None or self.clip_prefix):
            raise ValueError("clip_network and clip_prefix are of the CLIP score: set clip_score to true")
        if (
            self.clip_score
            and self.clip_network is None
            and kind in ("inception", "dinov2", "judge", "module")
        ):
            raise ValueError(
                f"features {features} have no texts: give clip_network, or set clip_score to false"
            )
        for name, spec in self.networks().items():
            if spec != "emoji" and not spec.startswith("clip:"):
                raise ValueError(f"{name} is {spec}: it must be a CLIP network, clip:FOLDER or clip:HUB/NAME")
        self._check_second(features)
        if self.cmmd is None and self.cmmd_reference is not None:
            raise ValueError("cmmd_reference is of CMMD: give cmmd, its network")
        if self.cmmd not in (None, features) and self.cmmd_reference is None:
            raise ValueError(f"cmmd needs cmmd_reference, made by stepdistill stats --features {self.cmmd}")
        if self.aesthetic is None and self.aesthetic_network != AESTHETIC_NETWORK:
            raise ValueError("aesthetic_network is of the aesthetic score: give aesthetic, its head file")

    def _check_second(self, features: str) -> None:
        if self.second_features is None:
            if self.second_reference is not None:
                raise ValueError("second_reference is of second_features: give it, the network's name")
            return
        if self.second_features == features:
            raise ValueError(f"second_features is {features}, as features is: give another network")
        if self.second_reference is None:
            raise ValueError(
                "second_features needs second_reference, made by stepdistill stats --features "
                + self.second_features
            )
