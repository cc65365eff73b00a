"""Sections of a recipe: what the student is, what it learns from, and what is written and measured of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from stepdistill.recipes.section import NotNegative, Positive, Section


def _descends(times: Sequence[float]) -> bool:
    return all(later < earlier for earlier, later in pairwise(times))


class StudentOptions(Section):
    """What the student is.

    Attributes:
        steps: in how many network calls it draws, at the method's usual times. None takes the method's usual number.
        times: instead of steps, where it jumps from, descending in (0, 1]. A first time below 1 is for
            dmd, sid, sim, diff_instruct and f_distill on a discrete table: the network gets pure noise there.
        start: what it starts as, where that is not the teacher: a run, a diffusers folder or a Hub name, with a network
            of the teacher's class, such as a student of few steps, a smaller one, or a fine-tune. What it says (eps, v,
            x0) stays as it is there. Networks that follow the student start as the teacher. Not with ``lora_rank``.
        lora_rank: rank of the adapter that is trained; 0 trains the whole network. Networks that follow the student
            are then adapters, too, all on the teacher's one network (stepdistill/networks/roles.py).
        base: how the network under the adapters is held, the teacher's own: ``auto`` as the teacher is, in float32, or
            in bfloat16 with ``train.precision: bf16``, which ``bf16`` demands; ``int8`` (needs torchao) or ``nf4``
            (needs bitsandbytes), the linear layers that carry adapters in eight bits or four. The teacher is then the
            same rounded network, with adapters off. What is exported is merged into its unrounded weights.
        lora_alpha: the adapters' scale is alpha / rank; None means alpha = rank.
        freeze: what of its network stays as it starts: parts of names of parameters, or a level of its family:
            ``level-1`` is convolutions inside of blocks and what attention or a transformer's block ends with,
            ``level-2`` also queries, keys and values, ``level-3`` also skips (Zheng and Yang 2024, 2405.20750);
            ``all-but-prompts``, of a UNet, is all but the keys and values of attention to prompts (Kumari et al. 2022,
            2212.04488). Frozen weights have no gradient and no optimiser. Not with ``lora_rank``, which trains none.
        output: what its network says. ``teacher``: the same as the teacher's; ``v`` or ``x0``: that, after a short
            data-free stage that turns the teacher's network (stepdistill/training/output_matching.py); ``auto``: v
            where the teacher says eps and a one-step student is called near pure noise.
        output_samples: of the teacher, on which that stage works.
        output_updates: its updates.
        output_lr: its learning rate.
    """

    steps: Positive | None = None
    times: tuple[float, ...] | None = None
    start: Annotated[str, Field(min_length=1)] | None = None
    lora_rank: NotNegative = 0
    base: Literal["auto", "bf16", "int8", "nf4"] = "auto"
    lora_alpha: Annotated[float, Field(gt=0)] | None = None
    freeze: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    output: Literal["auto", "teacher", "v", "x0"] = "auto"
    output_samples: Positive = 1024
    output_updates: Positive = 1000
    output_lr: Annotated[float, Field(gt=0)] = 1e-4

    @model_validator(mode="after")
    def _check(self) -> StudentOptions:
        times = self.times
        if times is not None and self.steps is not None:
            raise ValueError(f"steps is {self.steps} and times is {list(times)}: set one of them")
        if times is not None and (times == () or times[0] > 1 or times[-1] <= 0 or not _descends(times)):
            raise ValueError(f"times must descend within (0, 1], such as [1.0, 0.5]; found {list(times)}")
        if self.lora_alpha is not None and self.lora_rank == 0:
            raise ValueError("lora_alpha does nothing without lora_rank")
        if self.freeze and self.lora_rank:
            raise ValueError(
                f"freeze is {list(self.freeze)} and lora_rank is {self.lora_rank}, but an adapter leaves all of the "
                "network's own weights as they are: set freeze to [], or lora_rank to 0"
            )
        if self.start is not None and self.lora_rank:
            raise ValueError(
                f"start is {self.start} and lora_rank is {self.lora_rank}, but adapters all lie on the teacher's own "
                "network: set lora_rank to 0"
            )
        if self.base != "auto" and self.lora_rank == 0:
            raise ValueError(
                f"base is {self.base}, but without adapters nothing lies on one: set lora_rank, such as 16, or base "
                "to auto"
            )
        return self


class DataOptions(Section):
    """What it learns from.

    Attributes:
        prompts: a text file with one prompt per line, or another kind of file that stepdistill.data.prompts reads; None
            takes the teacher's own captions.
        images: real images with captions, for methods that need them: a folder of them, a webdataset .tar, or a folder
            of such; None takes the teacher's own. For a teacher of videos: a folder of them, see
            data/training_videos.py.
        fps: frames a second at which videos of ``images`` are taken; None takes every frame.
        pairs: folder of cached (noise, teacher sample) pairs; None keeps them in the run folder.
        size: [height, width] in pixels, with a third number the frames of a video; None takes what the teacher's
            pipeline draws by itself.
        tiling: whether the teacher's VAE works in tiles, as large pictures and videos ask for: less memory, and colours
            may differ a little from tile to tile. Its student does so, too, which its card and its proof say.
        buckets: whether each image is cropped to the nearest of several aspect ratios, all of about the area of
            ``size``, and not to that of ``size`` itself; the images of a batch are then of one ratio.
        pairs_dtype: what pairs and their states are kept in: ``float32``, or half the bytes, ``bf16`` or ``float16``.
        rich: a .jsonl, .json, .csv or .tsv with a "prompt" and its "rich" caption in each row, for methods whose
            teacher is told more than the student (self_opd). A prompt that it has not is its own rich caption.
        placeholder_token: a word that the text encoders do not know and are to learn, such as ``<concept>``, for
            methods that train one (echo); captions of ``images`` have it, see networks/concept.py.
        initializer_token: a word that they know, as which it starts, such as ``dog``.
        partition: how the prompts are shared out to several students, each of which learns one part and is joined with
            the others by ``stepdistill join``: ``hash``, ``consecutive`` stretches, the Unicode ``groups`` of the
            embedded captions, or a file with a line for each prompt that names its key, see data/partition.py.
        part: which part the student learns, and of how many: ``1/4`` to ``4/4``; null is all prompts.
        part_pairs: the pairs that the student of a part learns from: the ``whole`` pool, as a few pairs more of other
            prompts keep a distribution wide, or its ``own`` prompts' alone, for methods that learn from pairs.
        route: of each of ``teachers`` a file with the prompts, of those to train on, that it teaches; all others are
            the teacher's own.
        damaged: what is done with a damaged file of a cache of prompts, latents or pairs: ``refuse``, naming it, or
            ``remake``.
    """

    prompts: str | None = None
    images: str | None = None
    fps: Annotated[float, Field(gt=0, le=240)] | None = None
    pairs: str | None = None
    size: tuple[Positive, Positive] | tuple[Positive, Positive, Positive] | None = None
    tiling: bool = False
    buckets: bool = False
    pairs_dtype: Literal["float32", "bf16", "float16"] = "float32"
    rich: str | None = None
    placeholder_token: Annotated[str, Field(min_length=1, pattern=r"^\S+$")] | None = None
    initializer_token: Annotated[str, Field(min_length=1)] | None = None
    route: dict[str, str] = Field(default_factory=dict)
    partition: str = "hash"
    part: Annotated[str, Field(pattern=r"^[1-9]\d*/[1-9]\d*$")] | None = None
    part_pairs: Literal["whole", "own"] = "whole"
    damaged: Literal["refuse", "remake"] = "refuse"


class AgainstTeacherOptions(Section):
    """What ``evaluate: true`` measures of a teacher of your own: the student against the teacher's own pictures of the
    same prompts and noises, drawn once and kept in the cache. See stepdistill/evaluation/against_teacher.py.

    Attributes:
        pictures: how many of each; None is 64, or 256 of 256 x 256 pixels or fewer, or 16 videos.
        steps: of the teacher's pictures.
        features: the network of the distances, such as ``clip:FOLDER``, ``dinov2:FOLDER`` or ``inception``; ``auto``
            takes a CLIP, DINOv2 or Inception that lies in the Hub's cache or where FID's tools keep theirs, or else the
            embedded network, which sees 32 x 32 pixels.
        texts: the network of the CLIP score, ``clip:FOLDER``; ``auto`` takes one that lies in the Hub's cache, and
            leaves the score out where there is none, as ``none`` does.
    """

    pictures: Annotated[int, Field(ge=4)] | None = None
    steps: Positive = 25
    features: str = "auto"
    texts: str = "auto"

    @field_validator("texts")
    @classmethod
    def _has_texts(cls, name: str) -> str:
        if name not in ("auto", "none", "emoji") and not name.startswith("clip:"):
            raise ValueError(f"{name} has no texts: give clip:FOLDER, auto or none")
        return name


class ExportOptions(Section):
    """What a student's folder holds.

    Attributes:
        what: of a LoRA student: ``merged``, a pipeline whose network has the adapter in its weights; ``adapter``, the
            adapter and the scheduler alone, for the teacher that is elsewhere; ``both``, the pipeline with the adapter
            beside it. A student of its own weights is a pipeline, whatever this is, but not ``adapter``.
        max_shard_size: of the files of its network, such as 5GB; None is as the teacher's are.
        kohya: whether the adapter is written once more under the names that kohya's scripts and ComfyUI know.
        comfyui: whether a workflow for ComfyUI is written that draws with the student, ``comfyui.json``.
    """

    what: Literal["adapter", "merged", "both"] = "both"
    max_shard_size: Annotated[str, Field(pattern=r"^[1-9]\d*(KB|MB|GB)$")] | None = None
    kohya: bool = False
    comfyui: bool = False
