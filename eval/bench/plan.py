"""What ``stepdistill plan`` predicts beside what is measured: python eval/bench/plan.py [NAME ...] [--tiny]

Each row is a unit of DMD, an update of the fake network and one of the student, of a network with random weights in the
shape of a real one, and with --tiny in a toy's of its kind. ``predicted`` is from configs alone, ``measured`` the most
that torch allocated on a GPU in those two updates, or by how much a process of its own grew on a CPU; ``ms`` is the
time of both updates. On a GPU all rows take about four minutes and 75 GiB.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

LORA = ("student.lora_rank=64", "train.precision=bf16", "train.checkpointing=true")
WHOLE = ("train.precision=bf16", "train.weights=bf16", "train.checkpointing=true")

ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "sdxl-lora": ("sdxl", ("options.guidance=8", *LORA)),
    "sdxl-full": ("sdxl", ("options.guidance=8", *WHOLE)),
    "sd35-medium-full": ("sd35-medium", ("options.guidance=4", *WHOLE)),
    "flux-lora": ("flux-dev", ("options.guidance=3.5", *LORA)),
}
"""By name the teacher, as its configs ship, and what is set."""

SMALLER = {
    "UNet2DConditionModel": {
        "sample_size": 32,
        "block_out_channels": [128, 256, 256],
        "transformer_layers_per_block": [1, 1, 1],
        "attention_head_dim": [4, 8, 8],
        "cross_attention_dim": 256,
        "addition_time_embed_dim": 32,
        "projection_class_embeddings_input_dim": 256 + 6 * 32,
        "layers_per_block": 1,
    },
    "SD3Transformer2DModel": {
        "sample_size": 64,
        "num_layers": 3,
        "num_attention_heads": 6,
        "caption_projection_dim": 384,
        "joint_attention_dim": 256,
        "pooled_projection_dim": 256,
        "dual_attention_layers": [0, 1],
        "pos_embed_max_size": 96,
    },
    "FluxTransformer2DModel": {
        "num_layers": 2,
        "num_single_layers": 2,
        "num_attention_heads": 3,
        "joint_attention_dim": 256,
        "pooled_projection_dim": 256,
    },
    "AutoencoderKL": {"block_out_channels": [16, 16, 16, 16], "norm_num_groups": 4, "layers_per_block": 1},
}
"""What is changed in the configs with --tiny, by the network's class."""


def plan_rows(
    names: Sequence[str] = (), tiny: bool = False, predicts: bool = True
) -> Iterator[dict[str, Any]]:
    """Rows of ROWS: GiB as predicted and as measured, and milliseconds of a unit.

    Args:
        names: of ROWS; all where there are none.
        tiny: in a toy's shape.
        predicts: whether to predict; no GPU is needed for that, and it takes a minute or more of a processor.
    """
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in names or ROWS:
        teacher, sets = ROWS[name]
        row: dict[str, Any] = {"name": name}
        with tempfile.TemporaryDirectory() as folder:
            given = smaller(teacher, Path(folder)) if tiny else teacher
            try:
                own = [*sets, "train.batch=2"] if tiny else [*sets, "train.batch=1"]
                if device.type == "cpu":
                    own = [each for each in own if "bf16" not in each]
                row |= row_of(given, "dmd", own, device, predicts)
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {error}"[:600]
        yield row


def smaller(teacher: str, folder: Path) -> str:
    """A file with a shipped teacher's configs in small."""
    from stepdistill.planning.from_configs import TEACHERS

    said = json.loads((TEACHERS / f"{teacher}.json").read_text("utf-8"))
    for kind, config in said["components"].values():
        config |= SMALLER.get(kind, {})
    said["conditions"] = {
        key: [*shape[:-1], 256] if len(shape) > 1 or shape[0] > 200 else shape
        for key, shape in said["conditions"].items()
    }
    said["encoders"] = 0
    file = folder / f"{teacher}-small.json"
    file.write_text(json.dumps(said))
    return str(file)


def row_of(
    teacher: str, method: str, sets: Sequence[str], device: Any, predicts: bool = True
) -> dict[str, Any]:
    """Measurement and prediction of one recipe."""
    row: dict[str, Any] = (
        measured(teacher, method, sets, device)
        if device.type == "cuda"
        else in_own_process(teacher, method, sets)
    )
    if not predicts:
        return row
    from stepdistill.planning.trace import trace

    began = time.perf_counter()
    found = trace(_recipe(teacher, method, sets), device.type)
    row |= {
        "parameters M": found.parameters["teacher"] / 1e6,
        "predicted GiB": max(each.peak.total for each in found.updates) / 2**30,
        "plan s": time.perf_counter() - began,
    }
    row["ratio"] = row["predicted GiB"] / row["measured GiB"]
    flops = sum(each.flops for each in found.updates)
    return row | {"TFLOP": flops / 1e12, "TFLOP/s": flops / 1e9 / row["ms"]}


def _recipe(teacher: str, method: str, sets: Sequence[str]) -> Any:
    from stepdistill.recipes.recipe import load_recipe

    plain = ("evaluate=false", "train.average=0", "train.warmup=0", "data.prompts=prompts.txt")
    return load_recipe(teacher=teacher, method=method, sets=[*plain, *sets])


def measured(teacher: str, method: str, sets: Sequence[str], device: Any) -> dict[str, Any]:
    """GiB at the peak of the second unit of a recipe's real code with random weights, and its milliseconds."""
    import torch

    from stepdistill.planning.from_configs import pipeline_of
    from stepdistill.planning.unit import unit_of
    from stepdistill.training import roles
    from stepdistill.training.update import update

    cuda = device.type == "cuda"
    recipe = _recipe(teacher, method, sets)
    torch.manual_seed(0)
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
    low = cuda and recipe.train.precision == "bf16" and bool(recipe.student.lora_rank)
    before = _resident()
    torch.set_default_dtype(torch.bfloat16 if low else torch.float32)
    try:
        planned = pipeline_of(teacher, device)
    finally:
        torch.set_default_dtype(torch.float32)
    held, family, pipe = roles.held_for_adapters, planned.family, [planned.pipe]
    del planned

    def ready(own: Any, train: Any, base: Any = "auto") -> Any:
        """A network that was made in bfloat16 is as a run holds it; there is no exact state to keep."""
        if not low:
            return held(own, train, base)
        for module in own.denoiser.net.modules():
            if not isinstance(module, torch.nn.Linear | torch.nn.modules.conv._ConvNd):
                for value in module._parameters.values():
                    if value is not None:
                        value.data = value.data.float()
        own.denoiser.compute = torch.bfloat16
        return None

    with patch.object(roles, "held_for_adapters", ready):
        unit = unit_of(recipe, pipe.pop(), family, device)
    run, batch = unit.run(), unit.batch()
    turns = [turn for turn, _ in unit.turns()]
    with unit.training(recipe.train.attention):
        for turn in turns if cuda else ():
            update(run, turn, batch, 1e-6)
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        for turn in turns:
            update(run, turn, batch, 1e-6)
        if cuda:
            torch.cuda.synchronize()
        took = time.perf_counter() - began
    if cuda:
        most = torch.cuda.max_memory_allocated()
    else:
        most = _peak_resident() - before
    return {"measured GiB": most / 2**30, "ms": took * 1e3}


def _resident() -> int:
    """Bytes that this process holds now; freed memory goes back first, here and from here on at once."""
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.malloc_trim(0)
        library.mallopt(-3, 1 << 16)  # blocks of 64 KiB and more are mapped, and unmapped when they are freed
    if not Path("/proc/self/statm").is_file():
        return _peak_resident()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _peak_resident() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def in_own_process(teacher: str, method: str, sets: Sequence[str]) -> dict[str, Any]:
    """:func:`measured` on the CPU, in a process that does nothing else."""
    told = json.dumps([teacher, method, list(sets)])
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--measure", told],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=[[], *ROWS], help="default all")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    import torch

    if options.measure:
        teacher, method, sets = json.loads(options.measure)
        small = [each for each in sets if not each.startswith("train.batch")]
        measured("emoji", method, [*small, "train.batch=1"], torch.device("cpu"))  # loads all code
        print(json.dumps(measured(teacher, method, sets, torch.device("cpu"))))
        return
    for row in plan_rows(options.names, options.tiny):
        print(
            "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()),
            flush=True,
        )


if __name__ == "__main__":
    main()
