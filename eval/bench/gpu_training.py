"""Parts of gpu.py: short runs, plain and compiled, a DMD unit over its bare network passes, and a network compiled.
Each takes its argument and whether sizes are toys, and yields rows."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attention as bench
import torch
from gpu_device import CUDA, DEVICE, Row, alone

PEAK_FLOPS = 989e12
"""Of an H100 or H200 in bf16, dense, as its data sheet has it."""

ASKED = {
    "dmd": "options.warm_start=0 options.fake_warm_start=0",
    "lcm": "options.pairs=128 options.pair_steps=2",
    "scm": "options.pairs=128 options.pair_steps=2 options.warmup=0 options.derivative=exact",
    "meanflow": "options.pairs=128 options.pair_steps=2 options.warm_start=0 options.derivative=exact",
    "reflow": "options.pairs=128 options.pair_steps=2 options.reflow_steps=10 options.flow_steps=2",
}
SHORT = "student.output=teacher train.warmup=0 train.sheet_every=0 train.ema=0.9 evaluate=false"


def toolkit(method: str, tiny: bool) -> Iterator[Row]:
    for precision in ("float32", "bf16"):
        yield _short_run(method, tiny, {"precision": precision})


def ways(_: str, tiny: bool) -> Iterator[Row]:
    for way in ("none",) if tiny else ("none", "regional", "full", "graphs"):
        yield _short_run("dmd", tiny, {"precision": "bf16", "compile": way})


def _short_run(method: str, tiny: bool, train: dict[str, str]) -> Row:
    """A run at the embedded teacher, with keys of its recipe's ``train``; the second half of its steps is timed."""
    import stepdistill
    from stepdistill.training import loop

    plain = loop.train

    def timed(*told: Any, **named: Any) -> Any:
        with alone():
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            return plain(*told, **named)

    steps, batch = (4, 2) if tiny else (24 if "compile" in train else 20, 64)
    row: Row = {"method": method, **train}
    loop.train = timed
    with tempfile.TemporaryDirectory() as folder:
        sets = [*SHORT.split(), *ASKED[method].split(), f"train.steps={steps}", f"train.batch={batch}"]
        began = time.perf_counter()
        try:
            run = stepdistill.distill(
                "emoji",
                method,
                Path(folder) / "run",
                sets=[*sets, *(f"train.{key}={value}" for key, value in train.items())],
            )
            rows = [json.loads(x) for x in (run.folder / "stats.jsonl").read_text().splitlines()]
            half = len(rows) // 2
            row["ms a step"] = (rows[-1]["seconds"] - rows[half - 1]["seconds"]) / (len(rows) - half) * 1e3
            row["first loss"], row["loss"] = rows[0]["loss"], rows[-1]["loss"]
            assert run.report is not None
            row["peak MiB"] = (run.report.peak_memory_bytes or 0) / 2**20
            row["device"] = run.report.hardware
            row["verified"] = run.report.verification
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}"[:400]
        finally:
            loop.train = plain
        row["whole s"] = time.perf_counter() - began
    return row


def unit(_: str, tiny: bool) -> Iterator[Row]:
    for precision in ("float32", "bf16"):
        for batch in (2,) if tiny else (64, 512):
            try:
                yield _unit(_emoji(batch, precision), batch, {"teacher": "emoji", "precision": precision})
            except Exception as error:
                yield {
                    "precision": precision,
                    "batch": batch,
                    "failed": f"{type(error).__name__}: {error}"[:400],
                }


def _emoji(batch: int, precision: str) -> Any:
    return _assembled("emoji", None, batch, [f"train.precision={precision}"])


def _assembled(teacher: str, pipeline: Any, batch: int, sets: list[str]) -> Any:
    from accelerate import Accelerator
    from step import TIMED, WARM

    from stepdistill.recipes.recipe import load_recipe
    from stepdistill.training.assemble import assemble
    from stepdistill.training.identity import resolve

    own = [*SHORT.split(), *ASKED["dmd"].split(), "options.fake_steps=1", f"train.batch={batch}"]
    recipe = load_recipe(
        method="dmd", teacher=teacher, sets=[*own, f"train.steps={2 * (WARM + TIMED)}", *sets]
    )
    return assemble(resolve(recipe), Accelerator(cpu=not CUDA), pipeline)


def _unit(job: Any, batch: int, row: Row) -> Row:
    """Seconds of a unit of one student and one fake update, of its bare passes, its peak and what it waits for."""
    from step import TIMED, WARM, bare_seconds, trained_parameters, unit_seconds

    from stepdistill.training.run import Run

    Run.save = lambda self: None  # type: ignore[method-assign]  # nothing here is resumed
    trained = trained_parameters(job)
    with tempfile.TemporaryDirectory() as folder:
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        took = unit_seconds(job, job.accelerator, Path(folder), 1)
        row |= {"batch": batch, "unit ms": took * 1e3}
        if CUDA:
            row["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
        bare = [bare_seconds(job, trained, batch, 1) for _ in range(4)]
        row |= {"bare ms": statistics.median(bare[1:]) * 1e3, "ratio": took / statistics.median(bare[1:])}
        if CUDA:
            waits = _waits(job, lambda: unit_seconds(job, job.accelerator, Path(folder), 1))
            steps = 2 * (WARM + TIMED) - UNCOUNTED
            row["waits a step"] = sum(waits.values()) / steps
            row["where"] = "; ".join(f"{place} {count / steps:.1f}" for place, count in waits.most_common())
    return row


UNCOUNTED = 2
"""Steps at the start of a run, which also encode conditions and make the optimisers' state."""


def _waits(job: Any, call: Callable[[], Any]) -> Counter[str]:
    """How often the later steps of a run made the processor wait for the GPU, by the line of ours that did."""
    seen: Counter[str] = Counter()
    plain = job.objective.turn

    def turn(step: int) -> Any:
        if step == UNCOUNTED:
            seen.clear()
        return plain(step)

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "synchronizing" not in str(message):
            return
        frame = sys._getframe(1)
        while frame is not None and "/stepdistill/" not in frame.f_code.co_filename:
            frame = frame.f_back  # type: ignore[assignment]
        seen[f"{Path(frame.f_code.co_filename).stem}:{frame.f_lineno}" if frame else "elsewhere"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        job.objective.turn = turn
        try:
            call()
        finally:
            del job.objective.turn
            torch.cuda.set_sync_debug_mode("default")
    return seen


def sdxl(_: str, tiny: bool) -> Iterator[Row]:
    from stepdistill.training import assemble

    assemble.check_export = lambda *_: None  # nothing is drawn or exported
    size = 64 if tiny else 1024
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text("a red heart\na blue fish\n")
        for rank in (16, 0):
            row: Row = {"trained": f"LoRA {rank}" if rank else "all weights", "pixels": size}
            try:
                if not rank and CUDA and torch.cuda.get_device_properties(0).total_memory < 130e9:
                    yield {**row, "failed": "left out: needs more than this card has"}
                    continue
                sets = [f"data.prompts={prompts}", f"student.lora_rank={rank}", "train.precision=bf16"]
                sets += ["train.ema=0"]
                job = _assembled("random", sdxl_pipeline(tiny), 1, sets)
                row["parameters M"] = sum(p.numel() for p in job.teacher.denoiser.net.parameters()) / 1e6
                row = _unit(job, 1, row)
                flops = _flops(job)
                row |= {"TFLOP": flops / 1e12, "MFU": flops / (row["unit ms"] / 1e3) / PEAK_FLOPS}
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {error}"[:600]
            yield row
            job = None
            if CUDA:
                torch.cuda.empty_cache()


def _flops(job: Any) -> float:
    """Of the losses and gradients of a unit, counted operation by operation."""
    from step import trained_parameters
    from torch.utils.flop_counter import FlopCounterMode

    from stepdistill.training.arithmetic import autocast
    from stepdistill.training.assemble import training_data
    from stepdistill.training.parallel import take_turn

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


def compiled(_: str, tiny: bool) -> Iterator[Row]:
    net = sdxl_unet(tiny).to(torch.bfloat16).requires_grad_(False)
    net.add_embedding.requires_grad_(True)
    side, width, pooled = (8, 32, 16) if tiny else (128, 2048, 1280)
    x = torch.randn(1, 4, side, side, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    told = {
        "timestep": torch.tensor(500, device=DEVICE),
        "encoder_hidden_states": torch.randn(1, 77, width, device=DEVICE, dtype=torch.bfloat16),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(1, pooled, device=DEVICE, dtype=torch.bfloat16),
            "time_ids": torch.zeros(1, 6, device=DEVICE),
        },
    }

    def call() -> None:
        net(x, **told).sample.float().square().mean().backward()

    def timed(name: str) -> Row:
        began = time.perf_counter()
        call()
        if CUDA:
            torch.cuda.synchronize()
        first = time.perf_counter() - began
        with alone():
            call()
            seconds = statistics.median(bench._seconds(call, DEVICE) for _ in range(8))
        return {"network": name, "first s": first, "ms": seconds * 1e3}

    yield timed("eager, forward and backward")
    net.compile_repeated_blocks(fullgraph=True)
    yield timed("repeated blocks compiled")


PARTS: dict[str, Callable[[str, bool], Iterator[Row]]] = {
    "toolkit": toolkit,
    "unit": unit,
    "sdxl": sdxl,
    "compile": compiled,
    "ways": ways,
}
