"""FID beside clean-fid and torch-fidelity, in one process: python eval/bench/fid.py

First the Frechet distance alone, from the same features, against clean-fid's own function; then two whole folders to a
number, decoding included, on the same files with the same weights: the public ones where they are found, fixed random
ones elsewhere (`--weights FILE` names others). clean-fid is timed twice, with its own Inception module and with this
package's, which leaves the network out of the comparison; torch-fidelity comes with its own. All of it runs on
`--device`, as each tool does by itself: this package in full float32 and, on a GPU, in bf16 as well. Every pair is
timed in turn and the medians are compared. Run it on an idle machine; `--counts 500 --images 0` is a short run.

Needs the extra `test`.
"""

from __future__ import annotations

import argparse
import inspect
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from stepdistill.data.image_archives import open_images
from stepdistill.errors import UserError
from stepdistill.features.inception import find_weights
from stepdistill.features.inception_network import Inception, random_state
from stepdistill.features.load import load_features
from stepdistill.features.network import Precision
from stepdistill.metrics.frechet import frechet_distance_between
from stepdistill.system.emoji import emoji_images
from stepdistill.system.prefetch import ahead
from stepdistill.system.provenance import provenance

GOALS = {500: 50.0, 5000: 5.0}
FOLDER_GOAL = 1.5
NAME = "pt_inception-2015-12-05-6726825d.pth"


def compare(
    title: str, ours: Callable[[], float], theirs: Callable[[], float], repeats: int, goal: float | None
) -> None:
    """Print both times, their ratio and how far the two numbers are apart."""
    times: tuple[list[float], list[float]] = ([], [])
    values = [0.0, 0.0]
    for _ in range(repeats):
        for index, call in enumerate((ours, theirs)):
            began = time.perf_counter()
            values[index] = call()
            times[index].append(time.perf_counter() - began)
    mine, other = (statistics.median(found) for found in times)
    apart = abs(values[0] - values[1]) / abs(values[1])
    wanted = f", goal {goal:g}x" if goal else ""
    print(
        f"{title}: {mine:.3f} s, theirs {other:.3f} s, ratio {other / mine:.1f}x{wanted}; apart {apart:.1e}"
    )


def features(count: int, dimension: int, seed: int) -> torch.Tensor:
    """Like those of Inception: after a rectifier, with a spectrum that falls; float32 [N, D]."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(dimension, dimension, generator=generator) * torch.logspace(0, -2, dimension)
    generator.manual_seed(seed)
    drawn = torch.randn(count, dimension, generator=generator) @ mixing / 20
    return ((1 + 0.1 * seed) * drawn + 0.1 * seed).relu()


def distances(counts: list[int], dimension: int, repeats: int, device: torch.device) -> None:
    from cleanfid import fid

    for count in counts:
        x, y = features(count, dimension, 0), features(count, dimension, 1)
        compare(
            f"distance of {count} x {dimension} features, clean-fid",
            lambda x=x, y=y: frechet_distance_between(x.to(device), y.to(device)),  # type: ignore[misc]
            lambda x=x, y=y: float(fid.fid_from_feats(x.numpy(), y.numpy())),  # type: ignore[misc]
            repeats,
            GOALS.get(count) if dimension == 2048 else None,
        )


def write_images(folder: Path, count: int, size: int, shift: int) -> Path:
    """Emoji, enlarged, with noise: PNG files."""
    folder.mkdir()
    noise, images = np.random.default_rng(shift), emoji_images()
    for i in range(count):
        picture = Image.fromarray(images[(shift + i) % len(images)]).resize((size, size))
        noisy = np.asarray(picture).astype(np.int64) + noise.integers(-9, 10, (size, size, 3))
        whole = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        whole.save(folder / f"{i:06}.png", compress_level=1)
    return folder


def to_number(
    a: Path,
    b: Path,
    weights: Path,
    mode: str,
    device: torch.device,
    precision: Precision,
    workers: int | None,
) -> float:
    """Two folders to a distance by this package."""
    network = load_features(f"inception:{weights}", resize=mode, precision=precision, device=device)
    batch = 32 if device.type == "cpu" else 256
    sides = []
    for folder in (a, b):
        numbered = open_images(folder, workers=workers).numbered(batch, pinned=device.type == "cuda")
        with closing(ahead(numbered, 2)) as read:
            sides.append(torch.cat([network.images(pixels) for _, pixels in read]))
    return frechet_distance_between(*sides)


def _with_disp() -> None:
    """Lets clean-fid run with a scipy whose root of a matrix no longer takes ``disp``."""
    from scipy import linalg

    root = linalg.sqrtm
    if "disp" not in inspect.signature(root).parameters:
        linalg.sqrtm = lambda matrix, disp: (root(matrix), 0.0)


def clean_fid(a: Path, b: Path, extract: Callable[[Any], Any], device: torch.device, workers: int) -> float:
    """The same by clean-fid with any network on images in [0, 255]."""
    from cleanfid import fid

    _with_disp()
    return float(
        fid.compute_fid(
            str(a),
            str(b),
            mode="clean",
            custom_feat_extractor=extract,
            device=device,
            num_workers=workers,
            batch_size=32 if device.type == "cpu" else 256,
            verbose=False,
        )
    )


def folders(
    root: Path, weights: Path, count: int, size: int, repeats: int, workers: int, device: torch.device
) -> None:
    import torch_fidelity
    from cleanfid import features as their_features

    a, b = (write_images(root / name, count, size, shift) for name, shift in (("a", 0), ("b", 700)))
    hub = root / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    (hub / NAME).symlink_to(weights.resolve())
    os.environ["TORCH_HOME"] = str(root)  # clean-fid's own module reads its weights there
    module = their_features.feature_extractor("pytorch_inception", device, use_dataparallel=False)
    own = Inception(torch.load(weights, map_location="cpu", weights_only=True)).to(device)

    def ours(mode: str, precision: Precision = "float32") -> float:
        return to_number(a, b, weights, mode, device, precision, None)

    def fidelity() -> float:
        found = torch_fidelity.calculate_metrics(
            input1=str(a),
            input2=str(b),
            fid=True,
            feature_extractor_weights_path=str(weights),
            cuda=device.type == "cuda",
            cache=False,
            verbose=False,
        )
        return float(found["frechet_inception_distance"])

    # Its module scales [0, 1] to [-1, 1]; the clean mode's own scaling is (x - 128) / 128.
    with_theirs = lambda x: module(255 * (1 + (x - 128) / 128) / 2)  # noqa: E731
    with_ours = lambda x: own((x - 128) / 128).features  # noqa: E731
    precisions: tuple[Precision, ...] = ("float32",) if device.type == "cpu" else ("float32", "bf16")
    warm = next(open_images(a, workers=0).batches(2))
    for mode in ("clean", "tf1"):
        load_features(f"inception:{weights}", resize=mode, device=device).images(warm)
    title = f"2 folders of {count} images of {size} pixels"
    for precision in precisions:
        for name, extract, goal in (
            ("clean-fid", with_theirs, FOLDER_GOAL),
            ("clean-fid with our module", with_ours, None),
        ):
            compare(
                f"{title} in {precision}, {name}",
                lambda precision=precision: ours("clean", precision),  # type: ignore[misc]
                lambda extract=extract: clean_fid(a, b, extract, device, workers),  # type: ignore[misc]
                repeats,
                goal,
            )
    compare(f"{title}, torch-fidelity", lambda: ours("tf1"), fidelity, repeats, FOLDER_GOAL)


def public_state() -> Path | None:
    """The public state dict, which all three tools read, where it is found."""
    try:
        found = find_weights()
    except UserError:
        return None
    return found if found.suffix == ".pth" else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--counts", type=int, nargs="*", default=[500, 5000], help="N of the distances")
    parser.add_argument("--dimension", type=int, default=2048)
    parser.add_argument(
        "--images", type=int, default=256, help="files in each folder; 0 leaves the folders out"
    )
    parser.add_argument("--size", type=int, default=256, help="of the files, in pixels")
    parser.add_argument("--weights", type=Path, help="a state dict named as the public one is")
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count(),
        help="clean-fid's loader processes; ours chooses its own",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    if chosen.weights and not chosen.weights.is_file():
        parser.error(f"no file {chosen.weights}")
    warnings.simplefilter("ignore")
    device = torch.device(chosen.device)
    print(
        f"{provenance(device)['hardware']}; torch threads {torch.get_num_threads()}; median of {chosen.repeats}"
    )
    distances(chosen.counts, chosen.dimension, chosen.repeats, device)
    if not chosen.images:
        return
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        weights = chosen.weights or public_state() or root / "random.pth"
        if not weights.is_file():
            torch.save(random_state(), weights)
            print("the public state dict is not here: fixed random weights, with which no distance is FID")
        folders(root, weights, chosen.images, chosen.size, chosen.repeats, chosen.workers, device)


if __name__ == "__main__":
    main()
