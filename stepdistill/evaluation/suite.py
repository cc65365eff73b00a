"""Suites: versioned evaluation protocols. A score means something only with its prompts, seeds, count, features,
resize and reference; a suite fixes them all, and its version changes when any of them does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from stepdistill.data.prompts import FORMS, read_prompts
from stepdistill.diffusion.draws import generator_for
from stepdistill.errors import UserError, did_you_mean
from stepdistill.evaluation.scores import StepScores
from stepdistill.evaluation.suite_files import SuiteFiles
from stepdistill.evaluation.suite_metrics import WITH_TEXTS, MetricKeys
from stepdistill.features.load import network_of
from stepdistill.features.network import FeatureNetwork, Precision
from stepdistill.metrics.own import OwnMetric, load_metric, metric_file
from stepdistill.system.emoji import emoji_captions
from stepdistill.system.parsing import Unreadable
from stepdistill.system.parsing_yaml import parse_yaml
from stepdistill.system.seeds import LARGEST_SEED
from stepdistill.system.shipped import suite_file


class ReferenceProtocol(BaseModel):
    """What made a reference file that does not say so itself, as its makers give it.

    Attributes:
        features: the kind of network: ``emoji``, ``clip``, ``inception``, as in the suite's ``features``.
        resize: the resize mode, as in the suite's ``resize``.
        resolution: of the real images; 0 where each had its own size.
        features_sha256: of the network's weights, where it is known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    features: str | None = None
    resize: str | None = None
    resolution: int | None = None
    features_sha256: str | None = None


class Suite(MetricKeys):
    """One protocol, as ``eval/suites/*.yaml`` writes it. Which metrics it has, MetricKeys says.

    Attributes:
        name: its name; scores are reported as ``name@version``.
        version: raised with every change that moves a score, or adds one.
        adds_to: the version whose every score this one has bit for bit, beside those that it adds: results of both
            compare in what both have. None where there is none.
        n: number of images drawn; 0 leaves it open, for images that are there already: all of them.
        prompts: ``emoji`` (the embedded captions), a file, or None for pipelines that take none. A file is read as
            :mod:`stepdistill.data.prompts` says; its name is looked for as that of the reference is.
        selection: ``first`` n prompts in order, or ``shuffled``: the first n of torch.randperm over all prompts with
            the generator ``generator_for("suite", "prompts")``, so smaller suites are the beginning of larger ones.
            Fewer prompts than n are repeated in order.
        first_seed: image i is drawn with torch.Generator("cpu").manual_seed(first_seed + i).
        labels: of class-conditional pipelines: ``balanced``, image i is of class i mod the number of classes; or
            ``uniform``, torch.randint over the classes with the generator ``generator_for("suite", "labels")``.
        resolution: images are drawn and compared at resolution x resolution pixels; 0 is each image's own size, for
            images that are there already.
        draw_resolution: images are drawn at this size instead, or at the pipeline's ``own``, and brought to
            ``resolution`` as images that are there already are: central square, PIL's Lanczos filter. 0: as
            ``resolution``, and another size is an error.
        features: ``emoji``, ``clip:FOLDER`` or ``inception:FILE``.
        resize: ``clean``, or for Inception also ``tf1`` or ``pytorch``.
        precision: of the networks that look at images: ``float32``, or ``bf16``, faster on a GPU and a protocol of its
            own. The reference is of the same, or of float32.
        reference: file of statistics of the real images. It is safetensors made by ``stepdistill stats``, npz of
            clean-fid, EDM or ADM, or EDM2's pkl: a path, or a name that is looked for beside the suite's file, in
            eval/reference and in reference/ of the user's cache.
        reference_protocol: what made the reference, for files that do not say it themselves (npz, pkl).
        images: what the reference is made of: ``emoji``, or a folder or an archive of images.
        source: where prompts and reference come from, for the message that they are missing. Not part of the protocol.
        teacher_steps: the step count at which a teacher counts as full.
        folder: where the file lay; relative paths start there. Not part of the protocol.
        derived: in what the suite differs from the one of its name, see :meth:`derive`.
    """

    name: str
    version: int = Field(ge=1)
    adds_to: int | None = Field(default=None, ge=1)
    n: int = Field(ge=0)
    prompts: str | None = None
    selection: Literal["first", "shuffled"] = "first"
    first_seed: int = Field(default=0, ge=0, le=LARGEST_SEED)
    labels: Literal["balanced", "uniform"] = "balanced"
    resolution: int = Field(ge=0)
    draw_resolution: Annotated[int, Field(ge=0)] | Literal["own"] = 0
    features: str = "emoji"
    resize: Literal["clean", "tf1", "pytorch"] = "clean"
    precision: Precision = "float32"
    reference: str
    reference_protocol: ReferenceProtocol | None = None
    images: str = "emoji"
    source: str = ""
    teacher_steps: int = Field(ge=1)
    folder: Path = Field(default=Path(), exclude=True, repr=False)
    derived: tuple[str, ...] = Field(default=(), exclude=True)

    @field_validator("n")
    @classmethod
    def _enough(cls, n: int) -> int:
        if 0 < n < 3:
            raise ValueError("a distance needs at least 3 images (0 leaves their number open)")
        return n

    @model_validator(mode="after")
    def _metrics_fit(self) -> Suite:
        self.check_metrics(self.features, self.prompts, self.n)
        self._check_own_metrics()
        if self.adds_to is not None and self.adds_to >= self.version:
            raise ValueError(f"adds_to is {self.adds_to}: it is a version before {self.version}")
        return self

    def _check_own_metrics(self) -> None:
        metrics = self.own_metrics()
        names = [metric.name for metric in metrics]
        for metric in metrics:
            if metric.name in _SCORES or names.count(metric.name) > 1:
                raise ValueError(f"two metrics are called {metric.name}: rename that of {metric.file.name}")
            if "prompts" in metric.needs and (self.prompts is None or self.n == 0):
                raise ValueError(
                    f"{metric.name} needs prompts: give prompts and n, or leave {metric.file.name} out"
                )
            if "images" in metric.needs and self.resolution == 0:
                raise ValueError(f"{metric.name} needs images of one size: give resolution")

    def own_metrics(self) -> list[OwnMetric]:
        """The metrics of the files that ``metrics`` names, in that order. Their files are run.

        Raises:
            UserError: one of them is not there, or not a metric.
        """
        return [load_metric(metric_file(name, self.folder)) for name in self.metrics]

    @property
    def reads_prompts(self) -> bool:
        """Whether a score needs the prompts of the images."""
        return (
            super().reads_prompts
            or self._fits
            or any("prompts" in metric.needs for metric in self.own_metrics())
        )

    @property
    def _fits(self) -> bool:
        """Whether the second features compare images with their prompts."""
        kind = (self.second_features or "").partition(":")[0]
        return kind in WITH_TEXTS and self.prompts is not None and self.n > 0

    def asked(self, features: str) -> dict[str, str]:
        """The metrics, named as in ``Scores``, and the specification of the network that each reads."""
        found = super().asked(features)
        if self._fits and self.second_features is not None:
            found["second_fit"] = self.second_features
        return found

    @property
    def label(self) -> str:
        """``name@version``; of a derived suite also in what it differs: ``name@version+n=500``."""
        return "+".join((f"{self.name}@{self.version}", *self.derived))

    def with_diversity(self, samples: int) -> Suite:
        """The same suite that measures the diversity of so many samples of a prompt as well.

        Raises:
            UserError: fewer than 2, or a suite without prompts.
        """
        if samples < 2 or self.prompts is None:
            raise UserError(
                f"diversity is {samples}: give 2 samples of a prompt or more, and a suite that has prompts"
            )
        return self.model_copy(update={"diversity": samples})

    def changed(self, changes: Mapping[str, Any]) -> Suite:
        """A copy with other values, checked as those of a file are.

        Raises:
            UserError: a key or value that a suite does not allow.
        """
        try:
            return Suite.model_validate(
                {**self.model_dump(), "folder": self.folder, "derived": self.derived, **changes}
            )
        except ValidationError as error:
            raise UserError(f"suite {self.label}: {_first_problem(error)}") from None

    def derive(
        self, *, n: int | None = None, prompts: Path | None = None, precision: Precision | None = None
    ) -> Suite:
        """The protocol with another number of images, other prompts or features of another precision, as a suite of its
        own: its label says so, and its scores do not compare with those of the whole one.

        Raises:
            UserError: the prompt file does not exist, or a suite with CLIP score is left without n.
        """
        changes: dict[str, Any] = {}
        derived = list(self.derived)
        if prompts is not None:
            if not prompts.is_file():
                raise UserError(f"--prompts {prompts} not found: give {FORMS}")
            changes["prompts"] = str(prompts.absolute())
            derived.append(f"prompts={prompts.name}")
        if n is not None and n != self.n:
            changes["n"] = n
            derived.append(f"n={n}")
        if precision is not None and precision != self.precision:
            changes["precision"] = precision
            derived.append(precision)
        return self.changed({**changes, "derived": tuple(derived)})

    def before(self) -> Suite | None:
        """The suite at the version that it adds to; None where there is none."""
        if self.adds_to is None:
            return None
        left_out = {"second_features": None, "second_reference": None}
        return self.changed({"version": self.adds_to, "adds_to": None, **left_out})

    def seed(self, index: int) -> int:
        """The seed of image ``index``."""
        return self.first_seed + index

    def prompt_list(self) -> list[str] | None:
        """The n prompts in order, or None for a suite without prompts.

        Raises:
            UserError: the prompt file is missing or empty.
        """
        if self.prompts is None:
            return None
        if self.prompts == "emoji":
            lines = emoji_captions()
        else:
            file = self._files.found("prompt file", self.prompts, "prompts", "give --prompts FILE")
            lines = read_prompts(file, f"suite {self.label}")
        if self.selection == "shuffled":
            order = torch.randperm(len(lines), generator=generator_for("suite", "prompts"))
            lines = [lines[i] for i in order.tolist()]
        return [lines[i % len(lines)] for i in range(self.n)]

    def network(self, device: torch.device | str = "cpu") -> FeatureNetwork:
        """The suite's feature network.

        Raises:
            UserError: its file is missing, or it has no such resize.
        """
        return network_of(self.features, self.resize, device, self.precision)

    def second_network(self, device: torch.device | str = "cpu") -> FeatureNetwork | None:
        """The suite's second feature network; None where it names none.

        Raises:
            UserError: its file is missing.
        """
        if self.second_features is None:
            return None
        return network_of(self.second_features, "clean", device, self.precision)

    def aesthetic_file(self) -> Path:
        """Where the aesthetic head lies, or would lie: absolute, or beside the suite's file."""
        given = Path(self.aesthetic or "").expanduser()
        return self._files.find(str(given), "reference") or self.folder / given

    def cmmd_reference_file(self) -> Path | None:
        """Where CMMD's statistics lie; None where they are those of the reference.

        Raises:
            UserError: there is no such file.
        """
        return self._statistics(self.cmmd_reference, self.cmmd)

    def second_reference_file(self) -> Path | None:
        """Where the statistics of the second features lie; None where the suite names none.

        Raises:
            UserError: there is no such file.
        """
        return self._statistics(self.second_reference, self.second_features)

    def _statistics(self, name: str | None, features: str | None) -> Path | None:
        advice = f"make it with `stepdistill stats --features {features}`"
        return None if name is None else self._files.found("statistics", name, "reference", advice)

    def reference_file(self) -> Path:
        """Where the reference statistics lie.

        Raises:
            UserError: there is no such file.
        """
        if not self.reference:
            raise UserError(
                f"suite {self.label} has no reference: give --reference FILE, as `stepdistill stats` makes it"
            )
        advice = "make them with `stepdistill stats`, or give --reference FILE"
        return self._files.found("reference statistics", self.reference, "reference", advice)

    @property
    def _files(self) -> SuiteFiles:
        return SuiteFiles(self.label, self.folder, self.source)


def load_suite(name_or_path: str | Path | Suite) -> Suite:
    """The suite of a name (a file of eval/suites) or of a YAML file's path; a Suite is given back as it is.

    Raises:
        UserError: no such suite, or a key it does not allow.
    """
    if isinstance(name_or_path, Suite):
        return name_or_path
    file = suite_file(name_or_path)
    try:
        content = parse_yaml(file.read_text("utf-8"))
    except (Unreadable, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not YAML: {error}") from None
    if not isinstance(content, dict) or content.keys() & _OWN:
        raise UserError(f"{file}: a suite is a table of {', '.join(_keys())}")
    try:
        return Suite.model_validate({**content, "folder": file.resolve().parent})
    except ValidationError as error:
        raise UserError(f"{file}: {_first_problem(error)}") from None


_SCORES = frozenset(field.name for field in fields(StepScores))
_OWN = frozenset({"folder", "derived"})
"""Fields of a Suite that are not keys of its file."""


def _keys() -> list[str]:
    return [key for key in Suite.model_fields if key not in _OWN]


def _first_problem(error: ValidationError) -> str:
    problem = min(
        error.errors(), key=lambda found: found["type"] != "extra_forbidden"
    )  # a misspelt key comes first
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{key} is not a key of a suite {did_you_mean(key, _keys())}"
    if problem["type"] == "missing":
        return f"{key} is missing"
    said = str(problem["msg"]).removeprefix("Value error, ")
    return f"{key}: {said} (found {problem['input']!r})" if key else said
