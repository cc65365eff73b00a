"""From images and captions to a teacher folder: tokenizer, VAE, CLIP, denoiser, each made once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from stepdistill.attention.repeated_token import T5_TOKENS, RepeatedLastToken
from stepdistill.errors import UserError
from stepdistill.features.judge import WEIGHTS, Judge
from stepdistill.system.emoji import (
    emoji_captions,
    emoji_groups,
    emoji_images,
    features_folder,
    teacher_folder,
    tokenizer_folder,
)
from stepdistill.system.files import written_whole
from stepdistill.teacher_training import networks, stages
from stepdistill.teacher_training.folder import (
    Result,
    card,
    draw_picture,
    flow_pipeline,
    judge_card,
    save_half,
    save_pipeline,
    sd_pipeline,
    write_folder,
)
from stepdistill.teacher_training.judge import (
    Lessons,
    build_judge,
    judge_loss,
    judge_measures,
    save_judge,
)
from stepdistill.teacher_training.settings import StageSettings, TeacherSettings, claim_folder
from stepdistill.teacher_training.stage import History, Loss, Network, OnStep, seeded, train_stage
from stepdistill.teacher_training.tokenizer import train_tokenizer


def resolve_device(name: str) -> torch.device:
    """``auto`` is the GPU where torch sees one.

    Raises:
        UserError: a GPU is asked for where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    return torch.device(name)


def make_teacher(
    settings: TeacherSettings,
    folder: Path,
    *,
    pipeline: str = "sd",
    device: str = "auto",
    command: str = "",
    on_step: OnStep | None = None,
) -> Path:
    """Trains what is not there yet and returns the finished pipeline folder.

    Writes ``settings.json``, ``work/`` (checkpoints of every stage; may be deleted when done), ``features/``
    (the CLIPModel and its tokenizer) and ``teacher/`` or, for the flow pipeline, ``teacher-flow/``. Both
    pipelines may be made in one folder: they share tokenizer, VAE and CLIP.

    Args:
        settings: what to train.
        folder: where.
        pipeline: ``sd`` (StableDiffusionPipeline, eps) or ``sd3`` (StableDiffusion3Pipeline, flow).
        device: ``auto``, ``cpu`` or ``cuda``.
        command: for the model card.
        on_step: called after every optimiser step; may raise to stop.

    Raises:
        UserError: bad settings, a folder made with other settings, a damaged checkpoint.
    """
    with torch.random.fork_rng(devices=[]):  # building a network draws from the global generator
        return _make(_Run(settings, folder, resolve_device(device), on_step), pipeline, command)


def make_judge(
    settings: TeacherSettings,
    folder: Path,
    *,
    device: str = "auto",
    command: str = "",
    on_step: OnStep | None = None,
) -> Path:
    """Trains the judge of the evaluation, where it is not there yet, and returns its folder, ``judge/``. It shares
    nothing but the images with what :func:`make_teacher` trains, and may be made in the same folder.

    Args, Raises: as :func:`make_teacher`.
    """
    with torch.random.fork_rng(devices=[]):
        run = _Run(settings, folder, resolve_device(device), on_step)
        claim_folder(folder, settings)
        target = folder / "judge"
        if target.is_dir():
            return target
        lessons = Lessons(run.captions, emoji_groups()[: len(run.captions)])
        widths = settings.judge_widths
        network, result = run.train(
            "judge",
            lambda s: build_judge(widths, lessons),
            lambda n, s: judge_loss(n, run.images, lessons, s.batch),
        )

        def write(to: Path) -> None:
            save_judge(network, widths, lessons, to)
            measured = judge_measures(Judge(to / WEIGHTS, device=run.device), run.images, lessons)
            (to / "README.md").write_text(judge_card(result, measured, len(run.images), run.device, command))

        write_folder(target, write)
        return target


def _make(run: _Run, pipeline: str, command: str) -> Path:
    settings, folder = run.settings, run.folder
    target = folder / ("teacher" if pipeline == "sd" else "teacher-flow")
    claim_folder(folder, settings)
    if target.is_dir() and (settings.parts or (folder / "features").is_dir()):
        return target

    parts = _embedded_parts(run) if settings.parts else _trained_parts(run)
    vae, clip, tokenizer = parts.vae, parts.clip, parts.tokenizer
    ids = stages.token_ids(tokenizer, [*run.captions, ""]).to(run.device)
    measured: dict[str, float] = {}
    if not settings.parts:  # else they were not trained here, and which images they have seen is not known
        measured = {
            "psnr": run.measured("psnr", lambda: stages.vae_psnr(vae, run.images)),
            "retrieval": run.measured("retrieval", lambda: stages.clip_retrieval(clip, run.images, ids[:-1])),
        }
    latents = (run.latents(vae) * vae.config["scaling_factor"]).to(run.device)
    dropout = settings.caption_dropout
    if pipeline == "sd":
        captions = encode(clip, ids)
        unet, result = run.train(
            "unet",
            networks.build_unet,
            lambda n, s: stages.noise_loss(n, latents, captions, s.batch, dropout),
        )
        made: StableDiffusionPipeline | StableDiffusion3Pipeline = sd_pipeline(unet, vae, clip, tokenizer)
    else:
        captions = encode_for_flow(clip, ids)
        flow, result = run.train(
            "flow",
            build_flow_network,
            lambda n, s: stages.velocity_loss(n, latents, captions, s.batch, dropout, settings.flow_shift),
        )
        silent = networks.silent_t5(settings, tokenizer)
        made = flow_pipeline(restore_attention(flow), vae, clip, tokenizer, silent, settings.flow_shift)

    results = [*parts.results, result]
    text = card(type(made).__name__, settings, results, measured, len(run.images), run.device, command)

    def write(to: Path) -> None:
        save_pipeline(made, to)
        (to / "README.md").write_text(text)
        draw_picture(made.to(run.device), run.images, run.captions, settings.seed).save(to / "steps.png")

    write_folder(target, write)
    return target


@dataclass(frozen=True)
class _Parts:
    """What a denoiser is trained beside, and how it came to be."""

    tokenizer: CLIPTokenizer
    vae: AutoencoderKL
    clip: CLIPModel
    results: list[Result]


def _embedded_parts(run: _Run) -> _Parts:
    """Tokenizer, VAE and CLIP of an embedded teacher."""
    folder = teacher_folder(str(run.settings.parts))
    assert folder is not None
    frozen: tuple[AutoencoderKL, CLIPModel] = (
        AutoencoderKL.from_pretrained(folder / "vae"),
        CLIPModel.from_pretrained(features_folder()),
    )
    for network in frozen:
        network.to(run.device).eval().requires_grad_(False)  # type: ignore[arg-type]
    return _Parts(CLIPTokenizer.from_pretrained(tokenizer_folder()), *frozen, [])


def _trained_parts(run: _Run) -> _Parts:
    """Tokenizer, VAE and CLIP trained here; the features folder is written on the way."""
    tokenizer = run.tokenizer()
    vae, vae_result = run.train(
        "vae", networks.build_vae, lambda n, s: stages.vae_loss(n, run.images, s.batch)
    )
    ids = stages.token_ids(tokenizer, run.captions).to(run.device)
    clip, clip_result = run.train(
        "clip",
        lambda s: networks.build_clip(s, tokenizer),
        lambda n, s: stages.clip_loss(n, run.images, ids, s.batch),
    )
    vae.register_to_config(scaling_factor=float(1 / run.latents(vae).std()))
    if not (run.folder / "features").is_dir():
        write_folder(run.folder / "features", lambda to: _save_features(clip, tokenizer, to))
    return _Parts(tokenizer, vae, clip, [vae_result, clip_result])


def _save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    tokenizer.save_pretrained(folder)


def _save_features(clip: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    save_half(clip, folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def encode(clip: CLIPModel, ids: Tensor) -> stages.Captions:
    """What StableDiffusionPipeline.encode_prompt gives for token ids [N, L]: last hidden states [N, L, W]."""
    return stages.Captions(
        torch.cat([clip.text_model(input_ids=i).last_hidden_state for i in stages.parts(ids)])
    )


@torch.no_grad()
def encode_for_flow(clip: CLIPModel, ids: Tensor) -> stages.Captions:
    """What StableDiffusion3Pipeline.encode_prompt gives for token ids [N, L] with one encoder in both
    places, except that a single zero token stands for the 256 of the absent T5: [N, L + 1, 2 W] and pooled
    [N, 2 P]."""
    states, pooled = [], []
    for part in stages.parts(ids):
        out = clip.text_model(input_ids=part, output_hidden_states=True)
        states.append(nn.functional.pad(out.hidden_states[-2].repeat(1, 1, 2), (0, 0, 0, 1)))
        pooled.append(clip.text_projection(out.pooler_output).repeat(1, 2))
    return stages.Captions(torch.cat(states), torch.cat(pooled))


def build_flow_network(settings: TeacherSettings) -> SD3Transformer2DModel:
    """The flow denoiser as it is trained: its last context token stands for the absent T5's."""
    network = networks.build_transformer(settings)
    network.set_attn_processor(RepeatedLastToken(T5_TOKENS))  # type: ignore[arg-type]  # a closed list of classes
    return network


def restore_attention(network: SD3Transformer2DModel) -> SD3Transformer2DModel:
    """The same network with diffusers' own attention, as a pipeline calls it."""
    plain: SD3Transformer2DModel = SD3Transformer2DModel.from_config(network.config)
    plain.load_state_dict(network.state_dict())
    plain.to(network.device).eval().requires_grad_(False)  # type: ignore[arg-type]
    return plain


class _Run:
    """The data, folder and device of one training."""

    def __init__(
        self, settings: TeacherSettings, folder: Path, device: torch.device, on_step: OnStep | None
    ) -> None:
        self.settings, self.device, self.on_step = settings, device, on_step
        self.folder, self.work = folder, folder / "work"
        self.captions = emoji_captions()[: settings.images]
        pixels = torch.from_numpy(emoji_images()[: len(self.captions)].copy())  # [N, 32, 32, 3]
        self.images = (pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous().to(device)
        trained = len(self.images) - len(self.images) // stages.HELD_OUT
        for name in ("vae", "clip", "unet", "flow", "judge"):
            stage = self.stage(name)
            most = trained if name in ("clip", "judge") else len(self.images)
            if not 1 <= stage.batch <= most or stage.steps < 1:
                raise UserError(
                    f"{name}: {stage.steps} steps of {stage.batch} images;"
                    f" allowed are 1 step or more of 1 to {most} images"
                )

    def stage(self, name: str) -> StageSettings:
        found: StageSettings = getattr(self.settings, name)
        return found

    def tokenizer(self) -> CLIPTokenizer:
        folder = self.work / "tokenizer"
        if not folder.is_dir():
            made = train_tokenizer(self.captions, self.settings.vocabulary, self.settings.tokens)
            write_folder(folder, lambda to: _save_tokenizer(made, to))
        found: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
        return found

    def train(
        self,
        name: str,
        build: Callable[[TeacherSettings], Network],
        loss: Callable[[Network, StageSettings], Loss],
    ) -> tuple[Network, Result]:
        """The stage's network with its final weights, trained as far as it was not yet."""
        seed, stage = self.settings.seed, self.stage(name)
        network = seeded(lambda: build(self.settings), seed, name, "weights").to(self.device)
        history: History = train_stage(
            name,
            network,
            loss(network, stage),
            stage,
            self.work / name,
            seed=seed,
            checkpoint_every=self.settings.checkpoint_every,
            on_step=self.on_step,
        )
        return network, Result(name, stage, sum(p.numel() for p in network.parameters()), history)

    def measured(self, name: str, measure: Callable[[], float]) -> float:
        """A number that is slow to measure, kept beside the checkpoints."""
        path = self.work / "measured.json"
        known: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
        if name not in known:
            known[name] = measure()
            self.work.mkdir(parents=True, exist_ok=True)
            with written_whole(path) as temporary:
                temporary.write_text(json.dumps(known))
        return known[name]

    def latents(self, vae: AutoencoderKL) -> Tensor:
        """Unscaled latents [N, 5, C, 8, 8] on the CPU, kept beside the checkpoints."""
        folder = self.work / "latents"
        if not folder.is_dir():
            made = stages.shifted_latents(vae, self.images).cpu().contiguous()
            write_folder(folder, lambda to: save_file({"latents": made}, to / "latents.safetensors"))
        return load_file(folder / "latents.safetensors")["latents"]
