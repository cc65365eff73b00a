"""Suites: versioned evaluation protocols. A score means something only with its prompts, seeds, count, features,
resize and reference; a suite fixes them all, and its version changes when any of them does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from stepdistill.content import content_folder, suite_files
from stepdistill.draws import generator_for
from stepdistill.embedded import emoji_captions
from stepdistill.errors import UserError, did_you_mean
from stepdistill.features import FeatureNetwork, features_sha256, sha256_of_file
from stepdistill.reference import load_reference, make_reference, network_of
from stepdistill.reference_files import Reference

__all__ = ["Reference", "ReferenceProtocol", "Suite", "load_reference", "load_suite", "make_reference"]


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


class Suite(BaseModel):
    """One protocol, as ``eval/suites/*.yaml`` writes it.

    Attributes:
        name: its name; scores are reported as ``name@version``.
        version: raised with every change that moves a score.
        n: number of images drawn; 0 leaves it open, for images that are there already: all of them.
        prompts: ``emoji`` (the embedded captions), a text file with a prompt a line (absolute, or beside the suite's
            file), or None for pipelines that take none.
        selection: ``first`` n prompts in order, or ``shuffled``: the first n of torch.randperm over all prompts with
            the generator ``generator_for("suite", "prompts")``, so smaller suites are the beginning of larger ones.
            Fewer prompts than n are repeated in order.
        first_seed: image i is drawn with torch.Generator("cpu").manual_seed(first_seed + i).
        resolution: images are drawn and compared at resolution x resolution pixels; 0 is each image's own size, for
            images that are there already.
        features: ``emoji``, ``clip:FOLDER`` or ``inception:FILE``.
        resize: ``clean``, or for Inception also ``tf1`` or ``pytorch``.
        reference: statistics of the real images: a file in eval/reference, or a path (safetensors made by
            ``stepdistill stats``, npz of clean-fid, EDM or ADM, or EDM2's pkl).
        reference_protocol: what made the reference, for files that do not say it themselves (npz, pkl).
        images: what the reference is made of: ``emoji``, or a folder or an archive of images.
        kid: also compute the kernel distance (needs a reference with features).
        clip_score: also compute the image-text cosine.
        neighbours: k of precision, recall, density and coverage; 0 leaves them out. They are also left out where the
            reference has no features, or there are not more than k images.
        diversity: samples of one prompt whose pairwise diversity is measured as well; 0 leaves it out. They are drawn
            besides the n images and move no other score.
        diversity_prompts: how many of the first prompts that is done for.
        teacher_steps: the step count at which a teacher counts as full.
        folder: where the file lay; relative paths start there. Not part of the protocol.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    version: int = Field(ge=1)
    n: int = Field(ge=0)
    prompts: str | None = None
    selection: Literal["first", "shuffled"] = "first"
    first_seed: int = Field(default=0, ge=0)
    resolution: int = Field(ge=0)
    features: str = "emoji"
    resize: Literal["clean", "tf1", "pytorch"] = "clean"
    reference: str
    reference_protocol: ReferenceProtocol | None = None
    images: str = "emoji"
    kid: bool = True
    clip_score: bool = True
    neighbours: int = Field(default=5, ge=0)
    diversity: int = Field(default=0, ge=0)
    diversity_prompts: int = Field(default=100, ge=1)
    teacher_steps: int = Field(ge=1)
    folder: Path = Field(default=Path(), exclude=True, repr=False)

    @field_validator("n")
    @classmethod
    def _more_than_one(cls, n: int) -> int:
        if n == 1:
            raise ValueError("a distance needs at least 2 images (0 leaves their number open)")
        return n

    @model_validator(mode="after")
    def _texts_need_prompts(self) -> Suite:
        if self.clip_score and self.prompts is None:
            raise ValueError("clip_score needs prompts: give them, or set clip_score to false")
        if self.clip_score and self.n == 0:
            raise ValueError(
                "clip_score needs n, as image i belongs to prompt i: give n, or set clip_score to false"
            )
        if self.diversity == 1 or (self.diversity and self.prompts is None):
            raise ValueError("diversity needs prompts, and 2 samples of each or more (0 leaves it out)")
        return self

    @property
    def label(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"

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
            return Suite.model_validate({**self.model_dump(), "folder": self.folder, **changes})
        except ValidationError as error:
            raise UserError(f"suite {self.label}: {_first_problem(error)}") from None

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
            file = self._find(self.prompts, "prompts")
            if file is None:
                raise UserError(
                    f"suite {self.label}: no prompt file {self.prompts} (a text file with one prompt a line)"
                )
            lines = [line.strip() for line in file.read_text("utf-8").splitlines() if line.strip()]
        if not lines:
            raise UserError(
                f"suite {self.label}: the prompt file {self.prompts} holds no prompt; write one a line"
            )
        if self.selection == "shuffled":
            order = torch.randperm(len(lines), generator=generator_for("suite", "prompts"))
            lines = [lines[i] for i in order.tolist()]
        return [lines[i % len(lines)] for i in range(self.n)]

    def network(self, device: torch.device | str = "cpu") -> FeatureNetwork:
        """The suite's feature network.

        Raises:
            UserError: its file is missing, or it has no such resize.
        """
        return network_of(self.features, self.resize, device)

    def reference_file(self) -> Path:
        """Where the reference statistics lie.

        Raises:
            UserError: there is no such file.
        """
        if not self.reference:
            raise UserError(
                f"suite {self.label} has no reference: give --reference FILE, as `stepdistill stats` makes it"
            )
        file = self._find(self.reference, "reference")
        if file is None:
            raise UserError(
                f"suite {self.label}: no reference statistics {self.reference}; make them with `stepdistill stats`, "
                f"or give the path of an npz with mu and sigma"
            )
        return file

    def protocol(self, network: FeatureNetwork) -> dict[str, str]:
        """What a report states of the suite, besides its numbers: two scores compare only where all of it is equal."""
        return {
            "resize": network.resize,
            "features": network.name,
            "features_sha256": network.sha256,
            "reference_sha256": sha256_of_file(self.reference_file()),
            "suite_sha256": self.sha256(),
            "neighbours": str(self.neighbours),
        }

    def sha256(self) -> str:
        """Of everything that moves a score: the protocol (keys at their defaults left out, so that a new key does not
        change old suites), the prompts, the network's weights and the reference file. What only adds a score of its
        own, diversity, is not part of it."""
        apart = {"images", "teacher_steps", "diversity", "diversity_prompts"}
        protocol = self.model_dump(mode="json", exclude_defaults=True, exclude=apart)
        content = {
            "suite": protocol,
            "prompts": self.prompt_list(),
            "features": features_sha256(self.features),
            "reference": sha256_of_file(self.reference_file()),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _find(self, name: str, kind: str) -> Path | None:
        given = Path(name).expanduser()
        places = (
            [given] if given.is_absolute() else [self.folder / given, content_folder("eval") / kind / given]
        )
        return next((place for place in places if place.is_file()), None)


def load_suite(name_or_path: str | Path | Suite) -> Suite:
    """The suite of a name (a file of eval/suites) or of a YAML file's path; a Suite is given back as it is.

    Raises:
        UserError: no such suite, or a key it does not allow.
    """
    if isinstance(name_or_path, Suite):
        return name_or_path
    name, shipped = str(name_or_path), suite_files()
    file = shipped.get(name, Path(name).expanduser())
    if file.suffix not in (".yaml", ".yml"):
        raise UserError(f"no suite {name!r} {did_you_mean(name, shipped)}; or give a YAML file")
    if not file.is_file():
        raise UserError(f"no suite file {file}; give a YAML file as in eval/suites, or the name of one")
    try:
        content = yaml.safe_load(file.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or "folder" in content:
        raise UserError(f"{file}: a suite is a table of {', '.join(_keys())}")
    try:
        return Suite.model_validate({**content, "folder": file.resolve().parent})
    except ValidationError as error:
        raise UserError(f"{file}: {_first_problem(error)}") from None


def _keys() -> list[str]:
    return [key for key in Suite.model_fields if key != "folder"]


def _first_problem(error: ValidationError) -> str:
    problem = min(
        error.errors(), key=lambda found: found["type"] != "extra_forbidden"
    )  # a misspelt key comes first
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{key} is not a key of a suite {did_you_mean(key, _keys())}"
    if problem["type"] == "missing":
        return f"{key} is missing"
    return (
        f"{key + ': ' if key else ''}{problem['msg']} (found {problem['input']!r})"
        if key
        else str(problem["msg"])
    )
