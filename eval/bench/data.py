"""What data at size takes: memory, disk and time of prompts and images that are encoded once.

python eval/bench/data.py
python eval/bench/data.py --prompts 100000 --images

Every row is a process of its own, with the embedded teacher on the CPU and an empty cache. ``over`` is what its peak of
resident memory is above that of the same process with one batch encoded. Prompts: the last count is then encoded once
more by a process that is killed when half of the shards are there, and by one that goes on; then one bit of a shard is
turned, first refused and then, with ``data.damaged=remake``, made again. Shards are compared byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS, BATCH = 200, 64
"""Batches that are read in the end, and their size."""


def peak() -> float:
    """Most resident memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def prompts_row(file: Path, images: Path | None, remake: bool) -> dict[str, float]:
    """Encodes and reads in this process."""
    import torch

    from stepdistill.data.batches import Data
    from stepdistill.data.prompts import open_prompts
    from stepdistill.data.training_images import find_images
    from stepdistill.networks.loading import load_teacher
    from stepdistill.networks.teacher import PipelineTeacher

    teacher = PipelineTeacher(load_teacher("emoji"))
    teacher.codec.encode([f"photograph number {i}" for i in range(64)])
    if images:
        teacher.codec.to_states(torch.zeros(64, 1, 3, 32, 32))
    before, began = peak(), time.perf_counter()
    texts = open_prompts(file)
    data = Data(teacher, texts, 0, find_images(images) if images else None, remake=remake)
    made, seconds = peak(), time.perf_counter() - began
    began = time.perf_counter()
    for step in range(STEPS):
        data.batch(step, 0, BATCH, BATCH)
    read = (time.perf_counter() - began) / STEPS
    return {"making": made - before, "reading": peak() - before, "seconds": seconds, "batch_ms": 1000 * read}


def index_row(file: Path) -> dict[str, float]:
    """Looks through a file of prompts, and draws the order of one pass over it, in this process."""
    from stepdistill.data.buckets import permutation
    from stepdistill.data.prompts import open_prompts

    before, began = peak(), time.perf_counter()
    texts = open_prompts(file)
    row = {"making": peak() - before, "seconds": time.perf_counter() - began}
    permutation(64, 0, "prompts", 0)
    began = time.perf_counter()
    permutation(len(texts), 0, "prompts", 1)
    return {**row, "order_ms": 1000 * (time.perf_counter() - began)}


def started(cache: Path, *arguments: str) -> subprocess.Popen[str]:
    """A row in a process of its own."""
    command = [sys.executable, __file__, *arguments]
    settings = {**os.environ, "STEPDISTILL_CACHE": str(cache)}
    return subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def told(process: subprocess.Popen[str]) -> dict[str, float]:
    """What it measured."""
    out, error = process.communicate()
    if process.returncode:
        raise SystemExit(error)
    found: dict[str, float] = json.loads(out.splitlines()[-1])
    return found


def shards(cache: Path) -> dict[str, str]:
    """SHA-256 of every shard."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in cache.rglob("*.safetensors")}


def written(file: Path, count: int) -> Path:
    """So many prompts, each another."""
    with file.open("w") as stream:
        stream.writelines(
            f"photograph number {i} of a red apple beside a smiling cat\n" for i in range(count)
        )
    return file


def pictures(folder: Path, count: int) -> Path:
    """So many images of 40 x 32 pixels."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    noise = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(noise.integers(0, 256, (32, 40, 3), np.uint8)).save(folder / f"picture_{i}.png")
    return folder


def size_of(cache: Path) -> float:
    """Of its shards, MiB."""
    return sum(file.stat().st_size for file in cache.rglob("*.safetensors")) / 2**20


def interrupted(folder: Path, file: Path, whole: dict[str, str]) -> None:
    """Killed, resumed, damaged."""
    cache = folder / "killed"
    process = started(cache, "--row", str(file))
    while len(list(cache.rglob("*.safetensors"))) < len(whole) // 2 and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    left = len(shards(cache))
    told(started(cache, "--row", str(file)))
    print(
        f"\nkilled with {left} of {len(whole)} shards; resumed: {'' if shards(cache) == whole else 'not '}bit-equal"
    )
    shard = sorted(cache.rglob("*.safetensors"))[len(whole) // 3]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    refused = started(cache, "--row", str(file))
    _, error = refused.communicate()
    print(
        f"one bit turned: {error.strip().splitlines()[-1].partition(': ')[2].replace(f'{shard.parent}/', '')}"
    )
    told(started(cache, "--row", str(file), "--remake"))
    print(f"with data.damaged=remake: {'' if shards(cache) == whole else 'not '}bit-equal")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, nargs="*", default=[5000, 20000])
    parser.add_argument("--index", type=int, nargs="*", default=[1000000])
    parser.add_argument("--images", type=int, nargs="*", default=[5000, 10000])
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--only-index", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--remake", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row:
        row = index_row(given.row) if given.only_index else prompts_row(given.row, given.folder, given.remake)
        print(json.dumps(row))
        return
    with tempfile.TemporaryDirectory() as place:
        folder, whole, file = Path(place), dict[str, str](), Path()
        print(
            "| rows | disk MiB | over MiB, made | and read | seconds | ms a batch of 64 |\n|---|---|---|---|---|---|"
        )
        for kind, count in [*(("prompts", n) for n in given.prompts), *(("images", n) for n in given.images)]:
            cache = folder / f"{kind}-{count}"
            if kind == "prompts":
                file = written(folder / f"{count}.txt", count)
                row = told(started(cache, "--row", str(file)))
                whole = shards(cache)
            else:
                few = written(folder / "few.txt", 8)
                images = pictures(folder / f"images-{count}", count)
                row = told(started(cache, "--row", str(few), "--folder", str(images)))
            numbers = (
                f"{row['making']:.0f} | {row['reading']:.0f} | {row['seconds']:.0f} | {row['batch_ms']:.1f}"
            )
            print(f"| {count:,} {kind} | {size_of(cache):.0f} | {numbers} |", flush=True)
        for count in given.index:
            row = told(started(folder, "--row", str(written(folder / "index.txt", count)), "--only-index"))
            print(
                f"\nindex of {count:,} prompts: {row['making']:.0f} MiB, {row['seconds']:.1f} s; "
                f"the order of a pass: {row['order_ms']:.0f} ms"
            )
        if given.prompts:
            interrupted(folder, file, whole)


if __name__ == "__main__":
    main()
