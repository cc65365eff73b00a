"""Suites: versioned evaluation protocols. A score means something only with its prompts, seeds, count, features,
resize and reference; a suite fixes them all, and its version changes when any of them does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from stepdistill.content import content_folder, suite_files
from stepdistill.draws import generator_for
from stepdistill.embedded import emoji_captions, emoji_images
from stepdistill.errors import UserError, did_you_mean
from stepdistill.features import FeatureNetwork, features_sha256, load_features, sha256_of_file
from stepdistill.metrics.frechet import Moments


class Suite(BaseModel):
    """One protocol, as ``eval/suites/*.yaml`` writes it.

    Attributes:
        name: its name; scores are reported as ``name@version``.
        version: raised with every change that moves a score.
        n: number of images drawn.
        prompts: ``emoji`` (the embedded captions), a text file with a prompt a line (absolute, or beside the suite's
            file), or None for pipelines that take none.
        selection: ``first`` n prompts in order, or ``shuffled``: the first n of torch.randperm over all prompts with
            the generator ``generator_for("suite", "prompts")``, so smaller suites are the beginning of larger ones.
            Fewer prompts than n are repeated in order.
        first_seed: image i is drawn with torch.Generator("cpu").manual_seed(first_seed + i).
        resolution: images are drawn and compared at resolution x resolution pixels.
        features: ``emoji``, ``clip:FOLDER`` or ``inception:FILE``.
        resize: ``clean`` or ``tf1``.
        reference: statistics of the real images: a file in eval/reference, or a path (safetensors made by
            ``eval/evaluate.py reference``, or npz with ``mu`` and ``sigma``).
        images: what the reference is made of: ``emoji`` or a folder of images.
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
    n: int = Field(ge=2)
    prompts: str | None = None
    selection: Literal["first", "shuffled"] = "first"
    first_seed: int = Field(default=0, ge=0)
    resolution: int = Field(ge=1)
    features: str = "emoji"
    resize: Literal["clean", "tf1"] = "clean"
    reference: str
    images: str = "emoji"
    kid: bool = True
    clip_score: bool = True
    neighbours: int = Field(default=5, ge=0)
    diversity: int = Field(default=0, ge=0)
    diversity_prompts: int = Field(default=100, ge=1)
    teacher_steps: int = Field(ge=1)
    folder: Path = Field(default=Path(), exclude=True, repr=False)

    @model_validator(mode="after")
    def _texts_need_prompts(self) -> Suite:
        if self.clip_score and self.prompts is None:
            raise ValueError("clip_score needs prompts: give them, or set clip_score to false")
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
        """The suite's feature network."""
        return load_features(self.features, resize=self.resize, device=device)

    def reference_file(self) -> Path:
        """Where the reference statistics lie.

        Raises:
            UserError: there is no such file.
        """
        file = self._find(self.reference, "reference")
        if file is None:
            raise UserError(
                f"suite {self.label}: no reference statistics {self.reference}; make them with "
                f"`python eval/evaluate.py reference SUITE`, or give the path of an npz with mu and sigma"
            )
        return file

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


@dataclass(frozen=True)
class Reference:
    """Statistics of the real images.

    Attributes:
        moments: mean and covariance of their features.
        features: the features themselves [N, D] float32, where the file has them (the kernel distance needs them).
        protocol: what the file says of itself; empty for npz files, which say nothing.
        sha256: of the file.
    """

    moments: Moments
    features: Tensor | None
    protocol: Mapping[str, Any]
    sha256: str


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


def load_reference(suite: Suite, network: FeatureNetwork) -> Reference:
    """The suite's reference statistics, checked against the network that will be compared with them.

    Raises:
        UserError: the file is missing, of another network or resize, of another dimension, or without the features
            that the kernel distance needs.
    """
    file = suite.reference_file()
    if file.suffix == ".npz":
        reference = _read_npz(file)
    else:
        reference = _read_safetensors(file)
    dimension = len(reference.moments.total)
    if dimension != network.dimension:
        raise UserError(
            f"{file} has {dimension} features, {network.name} has {network.dimension}: another network made it"
        )
    for key, mine in (("features_sha256", network.sha256), ("resize", network.resize)):
        theirs = reference.protocol.get(key, mine)
        if theirs != mine:
            raise UserError(
                f"{file} was made with {key} {theirs}, the suite has {mine}: remake it with eval/evaluate.py reference"
            )
    if suite.kid and reference.features is None:
        raise UserError(
            f"{file} holds no features, which kid needs: remake it with eval/evaluate.py reference, or set kid to false"
        )
    return reference


def make_reference(
    suite: Suite, output: Path, *, device: torch.device | str = "cpu", batch: int = 256
) -> None:
    """Write the statistics of the suite's real images to a safetensors file, with the protocol in its header.

    Tensors: mean [D] and covariance [D, D] in float64; with ``kid`` or ``neighbours``, features [N, D] in float16
    (their rounding moves the kernel distance by less than 1e-6 on the emoji).
    """
    from safetensors.torch import save_file

    network = suite.network(device)
    features = torch.cat([network.images(pixels) for pixels in _real_images(suite, batch)])  # [N, D]
    moments = Moments.of(features)
    tensors = {"mean": moments.mean, "covariance": moments.covariance}
    if suite.kid or suite.neighbours:
        tensors["features"] = features.half()
    protocol = {
        "images": suite.images,
        "n": moments.count,
        "resolution": suite.resolution,
        "features": network.name,
        "features_sha256": network.sha256,
        "resize": network.resize,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    # One key, so that the header has one order and equal statistics are equal files.
    save_file(tensors, output, metadata={"protocol": json.dumps(protocol, sort_keys=True)})
    output.chmod(0o644)


def _real_images(suite: Suite, batch: int) -> Iterable[Tensor]:
    """The real images in order, uint8 [B, 3, H, W]; files of a folder are cropped to the central square and resized
    to the suite's resolution with PIL's Lanczos filter."""
    if suite.images == "emoji":
        yield from torch.split(torch.from_numpy(emoji_images()).permute(0, 3, 1, 2), batch)
        return
    import numpy as np
    from PIL import Image, ImageOps

    folder = Path(suite.images).expanduser()
    endings = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in endings) if folder.is_dir() else []
    if not files:
        allowed = f"emoji, or a folder that holds {', '.join(sorted(endings))} files"
        raise UserError(f"suite {suite.label}: images is {suite.images}; it must be {allowed}")
    size = (suite.resolution, suite.resolution)
    for start in range(0, len(files), batch):
        rows = []
        for file in files[start : start + batch]:
            try:
                with Image.open(file) as image:
                    fitted = ImageOps.fit(image.convert("RGB"), size, Image.Resampling.LANCZOS)
                    rows.append(np.asarray(fitted))
            except OSError as error:
                raise UserError(
                    f"{file} is not a readable image ({error}); remove it from the reference folder"
                ) from None
        yield torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2)


def _read_safetensors(file: Path) -> Reference:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as content:
            protocol: dict[str, Any] = json.loads((content.metadata() or {}).get("protocol", "{}"))
            tensors: dict[str, Any] = {key: content.get_tensor(key) for key in sorted(content.keys())}
    except SafetensorError as error:
        raise UserError(
            f"{file} is not a safetensors file ({error}); remake it with eval/evaluate.py reference"
        ) from None
    moments = Moments.from_statistics(tensors["mean"], tensors["covariance"], protocol["n"])
    features = tensors["features"].float() if "features" in tensors else None
    return Reference(moments, features, protocol, sha256_of_file(file))


def _read_npz(file: Path) -> Reference:
    import numpy as np

    with np.load(file, allow_pickle=False) as content:
        if not {"mu", "sigma"} <= set(content.files):
            raise UserError(f"{file} holds {', '.join(content.files)}; reference statistics are mu and sigma")
        mean, covariance = torch.from_numpy(content["mu"]), torch.from_numpy(content["sigma"])
    # The count of such files is not stated; it does not enter the distance.
    return Reference(Moments.from_statistics(mean, covariance, 1_000_000), None, {}, sha256_of_file(file))


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
