"""Everything that needs a GPU, in one command of five minutes: python eval/bench/gpu.py --output FOLDER

python eval/bench/gpu.py --output FOLDER --parts attention sdxl   # these alone
python eval/bench/gpu.py --output FOLDER --tiny                   # the same code in toy sizes, on a CPU too

Each part is a process of its own, so that one which fails leaves the others alone; FOLDER/gpu.json has their rows, or
the traceback, and gpu.txt the tables. The parts that time nothing, or only under a lock on the GPU, run side by side
first, since they mostly import and compile; the others follow one by one. What the time does not allow is left out.

errors     fused attention's output, gradients and tangents against float64
edges      two tiles that fused attention avoids: with 4 warps it is right, with 8 an illegal access
tiles      the kernels in other shapes, and float32 products by tensor cores (tf32x3) instead of in full (ieee)
draws      the GPU's random numbers beside the processor's
toolkit    20 steps of five methods at the embedded teacher, exported and proven, in float32 and bf16
attention  time and memory of math, sdpa and fused with and without a derivative
unit       a DMD unit over its bare network passes, and which lines wait for the GPU in a step once a run is under way
ceiling    forward and backward of SDXL's bare UNet, random weights at 1024 pixels: batches, layouts, compiled
sdxl       a DMD unit at that size
plan       peak memory and time of DMD units of SDXL, Stable Diffusion 3.5 and Flux.1, which plan.py predicts
ways       24 steps of dmd at the embedded teacher in bf16, under every value of train.compile
harness    features in float32 and bf16, the Frechet distance, decoding, and folders to a number beside clean-fid
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

METHODS = ("dmd", "lcm", "scm", "meanflow", "reflow")
TILES = ("16-64", "16-128", "32-64", "32-128")
SIDE_BY_SIDE = (
    *(f"errors-{dtype}-{half}" for dtype in ("float32", "bfloat16") for half in (1, 2)),
    *("edges-4", "edges-8"),
    *(f"tiles-{kind}" for kind in TILES),
    *(f"toolkit-{method}" for method in METHODS),
    "draws",
)
PLANNED = ("sdxl-lora", "sdxl-full", "sd35-medium-full", "flux-lora")
ONE_BY_ONE = (
    "attention",
    "unit",
    "ceiling",
    "sdxl",
    *(f"plan-{name}" for name in PLANNED),
    "harness",
    "ways",
)


def planned(name: str, tiny: bool) -> Iterator[dict[str, Any]]:
    import plan

    return plan.plan_rows((name,), tiny, predicts=False)


def run_part(name: str, folder: Path, tiny: bool) -> None:
    """In a process of its own: writes the part's rows, or its traceback."""
    import gpu_attention
    import gpu_harness
    import gpu_sdxl
    import gpu_training

    parts = {
        **gpu_attention.PARTS,
        **gpu_training.PARTS,
        **gpu_sdxl.PARTS,
        **gpu_harness.PARTS,
        "plan": planned,
    }
    began = time.perf_counter()
    kind, _, argument = name.partition("-")
    found: dict[str, Any] = {"rows": []}
    try:
        rows = found["rows"]
        for row in parts[kind](argument, tiny):
            rows.append(row)
            found["seconds"] = round(time.perf_counter() - began, 1)
            (folder / f"{name}.json").write_text(json.dumps(found))
    except BaseException:
        found["error"] = traceback.format_exc()
    found["seconds"] = round(time.perf_counter() - began, 1)
    (folder / f"{name}.json").write_text(json.dumps(found))


def start(name: str, folder: Path, tiny: bool) -> subprocess.Popen[str]:
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-W", "ignore", __file__, "--part", name, "--output", str(folder)]
    log = (folder / f"{name}.log").open("w")
    return subprocess.Popen(
        [*command, *(["--tiny"] if tiny else [])],
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "GPU_LOCK": str(folder / "lock"), "HF_HUB_OFFLINE": "1"},
    )


def collect(names: list[str], folder: Path, tiny: bool, deadline: float) -> dict[str, Any]:
    """Runs parts side by side until they end or the deadline comes."""
    running = {name: start(name, folder, tiny) for name in names}
    found = {}
    for name, process in running.items():
        late = ""
        try:
            process.wait(max(1.0, deadline - time.perf_counter()))
        except subprocess.TimeoutExpired:
            process.kill()
            late = "stopped: out of time"
        file = folder / f"{name}.json"
        found[name] = json.loads(file.read_text()) if file.is_file() else {"rows": []}
        if late or process.returncode or not file.is_file():
            tail = (folder / f"{name}.log").read_text(errors="replace")[-3000:]
            found[name].setdefault("error", f"{late or f'exit {process.returncode}'}\n{tail}")
    return found


def table(name: str, part: dict[str, Any]) -> str:
    """A part's rows in columns, and the last line of its error."""
    lines = [f"== {name} ({part.get('seconds', '?')} s)"]
    rows = [{k: _cell(v) for k, v in row.items()} for row in part["rows"]]
    heads = list(dict.fromkeys(key for row in rows for key in row))
    wide = {head: max(len(head), *(len(row.get(head, "")) for row in rows)) for head in heads}
    if rows:
        lines.append("  ".join(head.ljust(wide[head]) for head in heads))
        lines += ["  ".join(row.get(head, "").ljust(wide[head]) for head in heads).rstrip() for row in rows]
    if "error" in part:
        lines.append("FAILED: " + " | ".join(part["error"].strip().splitlines()[-3:])[-600:])
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-2 else f"{value:.4g}"
    return str(value)[:400]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", help="beginnings of names; default all")
    parser.add_argument("--seconds", type=float, default=330, help="after which nothing more is started")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.part:
        run_part(chosen.part, chosen.output, chosen.tiny)
        return
    began = time.perf_counter()
    chosen.output.mkdir(parents=True, exist_ok=True)
    wanted = tuple(chosen.parts or [""])
    waves = [[name for name in SIDE_BY_SIDE if name.startswith(wanted)]]
    if chosen.tiny:  # a machine with few cores
        waves = [[name] for name in waves[0]]
    waves += [[name] for name in ONE_BY_ONE if name.startswith(wanted)]
    found: dict[str, Any] = {}
    tables = []
    with tempfile.TemporaryDirectory() as folder:
        for wave in waves:
            if time.perf_counter() - began > chosen.seconds - 15 or not wave:
                found |= {name: {"rows": [], "error": "left out: no time"} for name in wave}
                continue
            # One part may not take the time of all that follow.
            share = time.perf_counter() + (150 if len(wave) > 1 else 300 if chosen.tiny else 170)
            new = collect(wave, Path(folder), chosen.tiny, min(began + chosen.seconds, share))
            found |= new
            for name, part in new.items():
                tables.append(table(name, part))
                print(tables[-1], flush=True)
            (chosen.output / "gpu.json").write_text(json.dumps(found, indent=1))
            (chosen.output / "gpu.txt").write_text("\n".join(tables) + "\n")
    failed = [
        name
        for name, part in found.items()
        if "error" in part or any("failed" in row and "ms" not in row for row in part["rows"])
    ]
    print(f"{len(found) - len(failed)} of {len(found)} parts; failed: {', '.join(failed) or 'none'}")
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
