"""The losses of the four stages, as functions of a step's generator, and what is measured after each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from stepdistill.diffusion.path import FlowPath, TablePath, per_sample
from stepdistill.teacher_training.networks import build_scheduler
from stepdistill.teacher_training.stage import Loss

SHIFTS = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))
"""The one-pixel shifts (down, right) whose latents the denoisers are trained on."""

HELD_OUT = 20
"""Every 20th image is kept from CLIP's training, for its retrieval score."""


def draw_rows(generator: torch.Generator, count: int, batch: int) -> Tensor:
    """``batch`` different rows out of ``count``, int64 [batch]."""
    return torch.randperm(count, generator=generator)[:batch]


def draw_dropped(generator: torch.Generator, batch: int, probability: float) -> Tensor:
    """Which captions are replaced by the empty one, bool [batch]."""
    return torch.rand(batch, generator=generator) < probability


def shifted(images: Tensor, offsets: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] moved by (down, right) pixels [B, 2], white (1) coming in."""
    reach = int(offsets.abs().max())
    height, width = images.shape[2:]
    padded = F.pad(images, (reach,) * 4, value=1.0).permute(0, 2, 3, 1)
    offsets = offsets.to(images.device)
    rows = reach - offsets[:, 0, None] + torch.arange(height, device=images.device)  # [B, H]
    columns = reach - offsets[:, 1, None] + torch.arange(width, device=images.device)  # [B, W]
    index = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _random_shift(images: Tensor, reach: int, generator: torch.Generator) -> Tensor:
    return shifted(images, torch.randint(-reach, reach + 1, (len(images), 2), generator=generator))


def parts(rows: Tensor, size: int = 256) -> Iterator[Tensor]:
    """Consecutive parts of at most ``size`` rows."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU, nothing on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def _edges(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of the finite differences of two images [B, C, H, W]."""
    error = a - b
    return error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()


def vae_loss(vae: AutoencoderKL, images: Tensor, batch: int) -> Loss:
    """L1 + L2 + L1 of the gradients at full and half size, and a KL term of weight 1e-4 a latent number."""

    def loss(generator: torch.Generator) -> Tensor:
        rows = draw_rows(generator, len(images), batch).to(images.device)
        x = _random_shift(images[rows], 2, generator)
        with autocast(images.device):
            latent = vae.encode(x).latent_dist
            noise = torch.randn(latent.mean.shape, generator=generator).to(images.device)
            y = vae.decode(latent.mean + latent.std * noise).sample
        y = y.float()
        mean, logvar = latent.mean.float(), latent.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        edges = _edges(y, x) + _edges(F.avg_pool2d(y, 2), F.avg_pool2d(x, 2))
        total: Tensor = F.l1_loss(y, x) + F.mse_loss(y, x) + edges + 1e-4 * kl
        return total

    return loss


@torch.no_grad()
def vae_psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images [N, 3, 32, 32] decoded from their latent means."""
    total = 0.0
    for x in parts(images):
        y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        total += float(((y - x) / 2).square().double().sum())
    return float(-10 * torch.tensor(total / images.numel()).log10())


@torch.no_grad()
def shifted_latents(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Latent means of every image at every one of SHIFTS, unscaled: [N, 5, C, 8, 8]."""
    rows = []
    for x in parts(images):
        moved = [shifted(x, torch.tensor([offset]).expand(len(x), 2)) for offset in SHIFTS]
        rows.append(torch.stack([vae.encode(m).latent_dist.mean for m in moved], dim=1))
    return torch.cat(rows)


def token_ids(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Token ids [N, tokens] as diffusers' pipelines make them: padded with the end token, no mask."""
    batch = tokenizer(
        list(captions),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    ids: Tensor = batch.input_ids
    return ids


def clip_loss(clip: CLIPModel, images: Tensor, ids: Tensor, batch: int) -> Loss:
    """Symmetric InfoNCE over a batch (Radford et al. 2021, 2103.00020); images move by up to two pixels. A
    pair of different images with one and the same caption is no contrast: such pairs are left out of the
    sums."""
    train = torch.tensor([i for i in range(len(images)) if i % HELD_OUT != HELD_OUT - 1])

    def loss(generator: torch.Generator) -> Tensor:
        rows = train[draw_rows(generator, len(train), batch)].to(images.device)
        x = _random_shift(images[rows], 2, generator)
        x = x + 0.02 * torch.randn(x.shape, generator=generator).to(x.device)
        with autocast(images.device):
            out = clip(input_ids=ids[rows], pixel_values=x)
        text, image = out.text_embeds.float(), out.image_embeds.float()  # unit vectors [B, P]
        logits = clip.logit_scale.float().clamp(max=4.6052).exp() * text @ image.T
        same = (ids[rows][:, None] == ids[rows][None]).all(-1)
        same.fill_diagonal_(False)
        logits = logits.masked_fill(same, float("-inf"))
        target = torch.arange(len(rows), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    return loss


@torch.no_grad()
def clip_retrieval(clip: CLIPModel, images: Tensor, ids: Tensor, top: int = 5) -> float:
    """Share of the held-out images whose caption is among the ``top`` nearest of all the captions."""
    text = torch.cat([clip.get_text_features(input_ids=i).pooler_output for i in parts(ids)])
    held = torch.arange(HELD_OUT - 1, len(images), HELD_OUT, device=images.device)
    image = torch.cat([clip.get_image_features(pixel_values=x).pooler_output for x in parts(images[held])])
    score = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T  # [H, N]
    own = score.gather(1, held[:, None])
    return float(((score > own).sum(1) < top).float().mean())


@dataclass(frozen=True)
class Captions:
    """Encoded captions; the last row of each tensor is the empty caption.

    Attributes:
        states: hidden states [N + 1, tokens, width].
        pooled: pooled projections [N + 1, P], for the flow teacher alone.
    """

    states: Tensor
    pooled: Tensor | None = None

    def rows(self, index: Tensor, dropped: Tensor) -> Tensor:
        """Row numbers with the empty caption where ``dropped``."""
        return torch.where(dropped, len(self.states) - 1, index)


def noise_loss(
    unet: UNet2DConditionModel, latents: Tensor, captions: Captions, batch: int, dropout: float
) -> Loss:
    """Mean squared error of the predicted noise (Ho et al. 2020, 2006.11239), timesteps uniform in 0 .. 999.

    Args:
        latents: scaled latents [N, 5, C, 8, 8].
    """
    path = TablePath.from_alphas_cumprod(build_scheduler().alphas_cumprod)
    device = latents.device

    def loss(generator: torch.Generator) -> Tensor:
        index, dropped, x0, noise = draw_examples(latents, batch, dropout, generator)
        timestep = torch.randint(path.steps, (batch,), generator=generator)
        alpha, sigma = path.alpha_sigma((timestep.float() + 1) / path.steps)
        x_t = per_sample(alpha.to(device), x0) * x0 + per_sample(sigma.to(device), x0) * noise
        states = captions.states[captions.rows(index, dropped).to(device)]
        with autocast(device):
            out = unet(x_t, timestep.to(device), encoder_hidden_states=states).sample
        return F.mse_loss(out.float(), noise)

    return loss


def draw_examples(
    latents: Tensor, batch: int, dropout: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Image numbers [B], dropped [B] (CPU), clean latents and noise [B, C, 8, 8] (on the latents' device)."""
    index = draw_rows(generator, len(latents), batch)
    shift = torch.randint(latents.shape[1], (batch,), generator=generator)
    dropped = draw_dropped(generator, batch, dropout)
    x0 = latents[index.to(latents.device), shift.to(latents.device)]
    noise = torch.randn(x0.shape, generator=generator).to(latents.device)
    return index, dropped, x0, noise


def velocity_loss(
    transformer: SD3Transformer2DModel,
    latents: Tensor,
    captions: Captions,
    batch: int,
    dropout: float,
    shift: float,
) -> Loss:
    """Flow matching (Lipman et al. 2022, 2210.02747) at logit-normal times, shifted (Esser et al. 2024, 2403.03206,
    section 5.3.2, eq. 23).

    Args:
        latents: scaled latents [N, 5, C, 8, 8].
        shift: s of t = s u / (1 + (s - 1) u).
    """
    path, device, pooled = FlowPath(), latents.device, captions.pooled
    if pooled is None:
        raise ValueError("the flow teacher needs pooled projections")

    def loss(generator: torch.Generator) -> Tensor:
        index, dropped, x0, noise = draw_examples(latents, batch, dropout, generator)
        u = torch.randn(batch, generator=generator).sigmoid().to(device)
        t = shift * u / (1 + (shift - 1) * u)
        rows = captions.rows(index, dropped).to(device)
        with autocast(device):
            out = transformer(
                path.noised(x0, noise, t),
                encoder_hidden_states=captions.states[rows],
                pooled_projections=pooled[rows],
                timestep=1000 * t,
            ).sample
        return F.mse_loss(out.float(), noise - x0)

    return loss
