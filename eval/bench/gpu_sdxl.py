"""Parts of gpu.py at the size of SDXL's UNet, with random weights: a DMD unit, and how near the bare network comes to
the GPU's peak. Each takes its argument and whether sizes are toys, and yields rows."""

from __future__ import annotations

import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attention as bench
import torch
from gpu_device import CUDA, DEVICE, PEAK_FLOPS, Row, alone
from gpu_training import assembled, unit_row

UNITS: tuple[tuple[int, int], ...] = ((16, 4), (0, 2), (16, 1), (0, 1))
"""Rank of the adapters (0 trains all weights), and samples."""


def sdxl(_: str, tiny: bool) -> Iterator[Row]:
    from stepdistill.training import assemble

    assemble.check_export = lambda *_: None  # nothing is drawn or exported
    size = 64 if tiny else 1024
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text("a red heart\na blue fish\n")
        for rank, batch in UNITS:
            row: Row = {"trained": f"LoRA {rank}" if rank else "all weights", "pixels": size}
            try:
                if not rank and CUDA and torch.cuda.get_device_properties(0).total_memory < 130e9:
                    yield {**row, "failed": "left out: needs more than this card has"}
                    continue
                sets = [f"data.prompts={prompts}", f"student.lora_rank={rank}", "train.precision=bf16"]
                job = assembled("random", sdxl_pipeline(tiny), batch, [*sets, "train.average=0"])
                row["parameters M"] = sum(p.numel() for p in job.teacher.denoiser.net.parameters()) / 1e6
                row = unit_row(job, batch, row, waits=batch == 1)
                flops = batch * flops_of_a_unit(job)
                row |= {"TFLOP": flops / 1e12, "MFU": flops / (row["unit ms"] / 1e3) / PEAK_FLOPS}
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {error}"[:600]
            yield row
            job = None
            if CUDA:
                torch.cuda.empty_cache()


def flops_of_a_unit(job: Any) -> float:
    """Of the losses and gradients of a unit of one sample, counted operation by operation."""
    from step import trained_parameters
    from torch.utils.flop_counter import FlopCounterMode

    from stepdistill.training.arithmetic import autocast
    from stepdistill.training.parallel import take_turn
    from stepdistill.training.training_data import training_data

    trained = trained_parameters(job)
    with tempfile.TemporaryDirectory() as folder, FlopCounterMode(display=False) as counter:
        data = training_data(job, Path(folder))
        for step in range(2):
            turn = job.objective.turn(step)
            take_turn(trained, turn.network)
            with autocast(job.recipe.train.precision, job.accelerator.device):
                loss = job.objective.loss(turn, data.batch(step, 0, 1, 1))[0]
            loss.backward()
            job.objective.zero_grad(set_to_none=True)
    return float(counter.get_total_flops())


def sdxl_unet(tiny: bool) -> Any:
    """Random weights in the shape of SDXL's UNet, or a toy of its kind."""
    from diffusers import UNet2DConditionModel

    widths = (32, 64, 64) if tiny else (320, 640, 1280)
    with torch.device(DEVICE):
        return UNet2DConditionModel(
            sample_size=8 if tiny else 128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=widths,
            layers_per_block=2,
            transformer_layers_per_block=(1, 1, 1) if tiny else (1, 2, 10),
            attention_head_dim=(2, 4, 4) if tiny else (5, 10, 20),
            cross_attention_dim=32 if tiny else 2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8 if tiny else 256,
            projection_class_embeddings_input_dim=16 + 6 * 8 if tiny else 1280 + 6 * 256,
        )


def sdxl_pipeline(tiny: bool) -> Any:
    """That network in a pipeline whose other parts are small."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from stepdistill.system.emoji import tokenizer_folder

    def config(width: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=2048,
            hidden_size=width,
            intermediate_size=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            projection_dim=width,
            bos_token_id=2046,
            eos_token_id=2047,
            pad_token_id=2047,
        )

    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder())
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            norm_num_groups=4,
            mid_block_add_attention=False,
            scaling_factor=0.13025,
        ),
        text_encoder=CLIPTextModel(config(16 if tiny else 768)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(config(16 if tiny else 1280)).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=sdxl_unet(tiny),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    )


CEILING: tuple[tuple[int, str, str, str], ...] = (
    (1, "first", "eager", "torch's choice"),
    (8, "first", "eager", "torch's choice"),
    (8, "first", "eager", "cudnn"),
    (8, "first", "regional", "torch's choice"),
    (16, "first", "eager", "torch's choice"),
    (8, "last", "full", "torch's choice"),
)
"""Samples, whether channels lie first or last in memory, what of the network is compiled, and who does attention."""

KERNELS = {
    "attention": "flash|fmha|attention|sdpa",
    "convolutions": "conv|fprop|dgrad|wgrad|winograd|implicit",
    "products": "gemm|nvjet|cutlass|cublas|splitk",
    "layouts": "nchw|nhwc|transpose|permute|tensortransform",
    "norms": "norm|moments|welford",
    "copies": "memcpy|memset|copy|cat",
}
"""Kinds of kernels by what their names have; the first that fits. The rest is other arithmetic by element."""


def kinds_of_kernels(call: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of the GPU in a call, by kind of kernel."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    took = dict.fromkeys((*KERNELS, "elements"), 0.0)
    for event in seen.key_averages():
        fits = (kind for kind, names in KERNELS.items() if re.search(names, event.key, re.IGNORECASE))
        took[next(fits, "elements")] += event.self_device_time_total / 1e3
    return took


def ceiling(_: str, tiny: bool) -> Iterator[Row]:
    """Forward and backward of the bare network in bf16, all weights with gradients."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    net = sdxl_unet(tiny).to(torch.bfloat16)
    side, width, pooled = (8, 32, 16) if tiny else (128, 2048, 1280)
    flops = 0.0
    for batch, layout, way, attention in CEILING[:2] if tiny else CEILING:
        row: Row = {"batch": batch, "channels": layout, "compile": way, "attention": attention}
        form = torch.channels_last if layout == "last" else torch.contiguous_format
        net.to(memory_format=form)
        x = torch.randn(batch, 4, side, side, device=DEVICE, dtype=torch.bfloat16).to(memory_format=form)
        told = {
            "timestep": torch.tensor(500, device=DEVICE),
            "encoder_hidden_states": torch.randn(batch, 77, width, device=DEVICE, dtype=torch.bfloat16),
            "added_cond_kwargs": {
                "text_embeds": torch.randn(batch, pooled, device=DEVICE, dtype=torch.bfloat16),
                "time_ids": torch.zeros(batch, 6, device=DEVICE),
            },
        }
        kernels = list(SDPBackend.__members__.values())[1:]
        if attention == "cudnn":
            kernels = [SDPBackend.CUDNN_ATTENTION]

        def call(x: Any = x, told: Any = told, kernels: Any = kernels) -> None:
            with sdpa_kernel(kernels):
                net(x, **told).sample.float().square().mean().backward()

        try:
            if not flops:
                with FlopCounterMode(display=False) as counter:
                    call()
                flops = counter.get_total_flops() / batch
            if way == "regional":
                net.compile_repeated_blocks(fullgraph=True, dynamic=False)
            elif way == "full":
                net.compile(dynamic=False)
            began = time.perf_counter()
            call()
            if CUDA:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            row["first s"] = time.perf_counter() - began
            call()
            with alone():
                seconds = statistics.median(bench._seconds(call, DEVICE) for _ in range(5))
            row |= {"ms": seconds * 1e3, "MFU": batch * flops / seconds / PEAK_FLOPS}
            if CUDA:
                row["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
                row |= {f"{kind} ms": took for kind, took in kinds_of_kernels(call).items()}
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}"[:400]
        finally:
            for module in net.modules():
                vars(module).pop("_compiled_call_impl", None)
        yield row


PARTS: dict[str, Callable[[str, bool], Iterator[Row]]] = {"sdxl": sdxl, "ceiling": ceiling}
