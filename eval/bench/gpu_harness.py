"""The part of gpu.py that times the evaluation: features, distances, decoding, and folders to a number."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fid
import torch
from gpu_device import CUDA, DEVICE, Row
from torch import Tensor

from stepdistill.data.image_archives import open_images
from stepdistill.features.inception_network import Inception, random_state
from stepdistill.features.load import load_features
from stepdistill.features.network import DTYPES, Precision
from stepdistill.features.resize import resize
from stepdistill.metrics.frechet import Moments, frechet_distance, frechet_distance_between
from stepdistill.system.emoji import emoji_images
from stepdistill.system.float32 import full_float32

LAYOUTS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}
FORMS: tuple[tuple[Precision, str], ...] = (
    ("float32", "channels first"),
    ("float32", "channels last"),
    ("bf16", "channels last"),
)


def seconds(call: Callable[[], object], repeats: int = 3) -> float:
    """Median seconds of a call, after one that is not counted; 0 repeats count the first."""
    found = []
    for _ in range(repeats + 1):
        if CUDA:
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        if CUDA:
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:] or found)


def pictures(count: int, noise: float) -> Tensor:
    """Embedded images with normal noise, uint8 [N, 3, 32, 32]: the same at every call."""
    every = torch.from_numpy(emoji_images()[torch.arange(count) % len(emoji_images())])
    drawn = torch.randn(every.shape, generator=torch.Generator().manual_seed(0))
    return (every + noise * drawn).round().clamp(0, 255).to(torch.uint8).permute(0, 3, 1, 2)


def harness(_: str, tiny: bool) -> Iterator[Row]:
    yield from embedded_features(tiny)
    yield from inception_features(tiny)
    yield from distances(tiny)
    yield from folders(tiny)


def embedded_features(tiny: bool) -> Iterator[Row]:
    """FD-emoji of noisy images in both precisions, to the real ones in float32 and in the same."""
    real, noisy = pictures(200 if tiny else 3781, 0), pictures(200 if tiny else 2000, 20)
    found = {}
    for precision in DTYPES:
        network = load_features("emoji", precision=precision, device=DEVICE)
        parts = [torch.cat([network.images(x) for x in side.split(500)]) for side in (real, noisy)]
        found[precision] = [Moments.of(x) for x in parts]
    exact = 100 * frechet_distance(found["float32"][1], found["float32"][0])
    for precision, (own, drawn) in found.items():
        yield {
            "network": "emoji",
            "form": precision,
            "FD to float32": 100 * frechet_distance(own, found["float32"][0]),
            "FD": 100 * frechet_distance(drawn, own),
            "FD, real in float32": 100 * frechet_distance(drawn, found["float32"][0]),
            "exact": exact,
        }


def inception_features(tiny: bool) -> Iterator[Row]:
    """Images a second, largest error of a feature, FD of the same images' features, and FD to other images."""
    count, batch = (8, 4) if tiny else (2000, 250) if CUDA else (64, 16)
    file = fid.public_state()
    state = random_state() if file is None else torch.load(file, map_location="cpu", weights_only=True)
    sides = [pictures(count, noise) for noise in (0, 20)]
    exact: list[Tensor] = []
    for precision, layout in FORMS:
        network = Inception(state, DTYPES[precision], LAYOUTS[layout]).to(DEVICE)

        def pooled(x: Tensor, network: Inception = network) -> Tensor:
            return network((resize(x.to(DEVICE), 299, "clean") - 128) / 128).features

        with full_float32():
            found = [torch.cat([pooled(x) for x in side.split(batch)]) for side in sides]
            took = seconds(lambda: pooled(sides[0][:batch]))
        exact = exact or found
        yield {
            "network": "inception" if file else "inception, random weights",
            "form": f"{precision}, {layout}",
            "images a s": min(batch, count) / took,
            "largest error": float((found[0] - exact[0]).abs().max() / exact[0].abs().max()),
            "FD to float32": frechet_distance_between(found[0], exact[0]),
            "FD": frechet_distance_between(*found),
            "FD, real in float32": frechet_distance_between(exact[0], found[1]),
            "exact": frechet_distance_between(*exact),
        }


def distances(tiny: bool) -> Iterator[Row]:
    """Of moments, on the GPU and on the CPU: seconds to take in features, and to the distance of two sets."""
    count, dimension = (300, 64) if tiny else (20_000, 2048)
    x, y = (fid.features(count, dimension, seed) for seed in (0, 1))
    exact = None
    for device in dict.fromkeys((torch.device("cpu"), DEVICE)):
        a, b = x.to(device), y.to(device)
        added = seconds(lambda: Moments.of(a), 1)  # noqa: B023
        one, other = Moments.of(a), Moments.of(b)
        took = seconds(lambda: frechet_distance(one, other), 1)  # noqa: B023
        value = frechet_distance(one, other)
        exact = exact or value
        apart = abs(value / exact - 1)
        yield {
            "distance": f"{device.type}, {count} x {dimension}",
            "moments s": added,
            "s": took,
            "apart": apart,
        }


def folders(tiny: bool) -> Iterator[Row]:
    """Decoding alone, by threads and by processes; then two folders to a number, by clean-fid as well."""
    count, size = (4, 64) if tiny else (1000, 256) if CUDA else (128, 256)
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        a, b = (fid.write_images(root / x, count, size, shift) for x, shift in (("a", 0), ("b", 700)))
        for workers in dict.fromkeys((0, min(2, cores), max(1, cores - 2))):
            took = seconds(lambda: list(open_images(a, workers=workers).batches(250)), 1)  # noqa: B023
            yield {
                "decode": f"{count} of {size} pixels, {workers or 'no'} processes",
                "images a s": count / took,
            }
        weights = fid.public_state() or root / "random.pth"
        if not weights.is_file():
            torch.save(random_state(), weights)
        own = Inception(torch.load(weights, map_location="cpu", weights_only=True)).to(DEVICE)
        workers = max(1, cores - 2) if CUDA else 0

        def ours(precision: Precision) -> float:
            return fid.to_number(a, b, weights, "clean", DEVICE, precision, workers)

        def theirs() -> float:
            return fid.clean_fid(a, b, lambda x: own((x - 128) / 128).features, DEVICE, cores)

        ways: dict[str, Callable[[], float]] = {"ours, float32": lambda: ours("float32")}
        if CUDA:
            ways["ours, bf16"] = lambda: ours("bf16")
        if not tiny:  # its root of a matrix takes a minute on a slow core
            ways["clean-fid, our network"] = theirs
        for way, call in ways.items():
            row: Row = {"folders": f"2 x {count}, {way}"}
            try:
                row |= {"s": seconds(call, 1 if CUDA and call is not theirs else 0)}
            except Exception as error:  # not installed, or another scipy than it runs with
                row["failed"] = f"{type(error).__name__}: {error}"[:200]
            yield row


PARTS: dict[str, Callable[[str, bool], Iterator[Row]]] = {"harness": harness}
