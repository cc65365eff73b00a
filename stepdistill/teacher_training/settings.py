"""What a teacher is made with: sizes and hyper-parameters of every stage, in one frozen object."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from stepdistill.errors import UserError
from stepdistill.system.files import written_whole
from stepdistill.system.parsing import parse_json


@dataclass(frozen=True)
class StageSettings:
    """How one network is trained: AdamW, linear warm-up, then cosine decay to zero.

    Attributes:
        steps: optimiser steps.
        batch: images a step.
        lr: peak learning rate.
        warmup: steps of linear warm-up.
        weight_decay: AdamW's decoupled weight decay.
        ema: decay of the exponential average of the weights that is kept, 0 for none. The first steps use
            the shorter average min(ema, (1 + step) / (10 + step)), so that a short run does not keep its
            initialisation.
    """

    steps: int
    batch: int
    lr: float
    warmup: int = 50
    weight_decay: float = 0.01
    ema: float = 0.0


@dataclass(frozen=True)
class TeacherSettings:
    """Everything that decides the weights, except device and thread count. Tuples are ascending in depth.

    Attributes:
        size: the preset's name.
        seed: seed of every draw and initialisation.
        images: how many of the images are used (the first ones), None for all.
        vocabulary: entries of the tokenizer at most.
        tokens: token positions, the tokenizer's model_max_length.
        latent_channels: channels of the VAE's 8x8 latents.
        vae_channels: AutoencoderKL block widths.
        text_width, text_layers: CLIP text tower.
        vision_width, vision_layers: CLIP image tower, patches of 4x4 pixels.
        projection: width of CLIP's common space, and so of the evaluation's features.
        unet_channels, unet_layers: UNet2DConditionModel block widths and layers a block.
        flow_width, flow_layers: SD3Transformer2DModel width and blocks.
        flow_shift: time shift of the flow teacher's scheduler and of the times it is trained at.
        parts: embedded teacher whose tokenizer, VAE and CLIP are taken as they are; None trains them, too.
        caption_dropout: share of captions replaced by the empty one (Ho and Salimans 2022, 2207.12598).
        judge_widths: channels of the judge's stem and of its blocks.
        vae, clip, unet, flow, judge: how each is trained.
    """

    size: str
    vae: StageSettings
    clip: StageSettings
    unet: StageSettings
    flow: StageSettings
    judge: StageSettings
    seed: int = 0
    images: int | None = None
    vocabulary: int = 2048
    tokens: int = 24
    latent_channels: int = 4
    vae_channels: tuple[int, ...] = (32, 48, 64)
    text_width: int = 96
    text_layers: int = 3
    vision_width: int = 128
    vision_layers: int = 4
    projection: int = 64
    unet_channels: tuple[int, ...] = (64, 96)
    unet_layers: int = 1
    flow_width: int = 112
    flow_layers: int = 6
    flow_shift: float = 3.0
    judge_widths: tuple[int, ...] = (32, 48, 96, 160)
    parts: str | None = None
    caption_dropout: float = 0.1
    checkpoint_every: int = field(default=200, metadata={"weights": False})

    def as_json(self) -> dict[str, object]:
        """The settings that decide the weights, as JSON would give them back."""
        entries: dict[str, object] = json.loads(json.dumps(asdict(self)))
        del entries["checkpoint_every"]
        return entries

    def with_stage(self, name: str, *, steps: int | None = None, batch: int | None = None) -> TeacherSettings:
        """The same settings with the steps or the batch of one stage changed.

        Raises:
            UserError: a number is below 1.
        """
        old: StageSettings = getattr(self, name)
        stage = replace(old, steps=old.steps if steps is None else steps, batch=batch or old.batch)
        if stage.steps < 1 or (batch is not None and batch < 1):
            raise UserError(f"{name}: steps and batch are at least 1, found {steps} and {batch}")
        stage = replace(stage, warmup=min(stage.warmup, max(stage.steps // 4, 1)))
        return replace(self, **{name: stage})  # type: ignore[arg-type]


SMALL = TeacherSettings(
    size="small",
    vae=StageSettings(3066, 32, 1e-3, ema=0.998),
    clip=StageSettings(356, 256, 1e-3, weight_decay=0.1),
    unet=StageSettings(5046, 64, 1.5e-3, warmup=100, ema=0.9992),
    flow=StageSettings(5046, 64, 1e-3, warmup=100, ema=0.9992),
    judge=StageSettings(4000, 64, 2e-3, warmup=100, weight_decay=0.05, ema=0.998),
)
"""The first embedded teacher: 2.5 M UNet parameters, about 70 minutes on two CPU cores."""

BASE = replace(
    SMALL,
    size="base",
    vae_channels=(32, 64, 96),
    text_width=128,
    vision_layers=6,
    unet_channels=(64, 128),
    flow_width=160,
    vae=StageSettings(12264, 64, 1e-3, warmup=100, ema=0.999),
    clip=StageSettings(1424, 512, 1e-3, warmup=100, weight_decay=0.1),
    unet=StageSettings(20184, 128, 1.5e-3, warmup=200, ema=0.9996),
    flow=StageSettings(20184, 128, 1e-3, warmup=200, ema=0.9996),
)
"""A better teacher for a GPU: wider networks, four times the steps."""

TINY = replace(
    SMALL,
    size="tiny",
    images=24,
    vocabulary=640,
    vae_channels=(16, 16, 16),
    text_width=32,
    text_layers=2,
    vision_width=32,
    vision_layers=1,
    projection=16,
    unet_channels=(16, 32),
    flow_width=32,
    flow_layers=2,
    vae=StageSettings(24, 8, 2e-3, warmup=4, ema=0.8),
    clip=StageSettings(24, 16, 2e-3, warmup=4),
    unet=StageSettings(24, 8, 2e-3, warmup=4, ema=0.8),
    flow=StageSettings(24, 8, 2e-3, warmup=4, ema=0.8),
    judge_widths=(8, 16),
    judge=StageSettings(24, 8, 2e-3, warmup=4, ema=0.8),
    checkpoint_every=7,
)
"""Seconds on one CPU core; it draws blots. For tests and for a first look at the folder."""

PRESETS = {settings.size: settings for settings in (SMALL, BASE, TINY)}


def _flat(entries: dict[str, object], prefix: str = "") -> dict[str, object]:
    rows: dict[str, object] = {}
    for key, value in entries.items():
        rows.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return rows


def claim_folder(folder: Path, settings: TeacherSettings) -> None:
    """Writes settings.json into a new folder; in an old one, checks that it was made with the same settings.

    Raises:
        UserError: the folder holds other settings (each difference is named) or no such run.
    """
    path = folder / "settings.json"
    wanted = settings.as_json()
    if not path.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(
                f"{folder} exists and is not a teacher in the making: choose a new --output folder"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with written_whole(path) as temporary:
                temporary.write_text(json.dumps(wanted, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}") from error
        return
    try:
        found, want = _flat(parse_json(path.read_text())), _flat(wanted)
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): choose a new --output folder") from error
    changed = [
        f"{k} is {found.get(k)} there, {want.get(k)} now"
        for k in sorted(found | want)
        if found.get(k) != want.get(k)
    ]
    if changed:
        what = "; ".join(changed)
        raise UserError(
            f"{folder} was made with other settings ({what}): repeat them or choose a new --output folder"
        )
