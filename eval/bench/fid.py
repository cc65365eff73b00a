"""FID beside clean-fid and torch-fidelity, in one process: python eval/bench/fid.py

First the Frechet distance alone, from the same features, against clean-fid's own function; then two whole folders to a
number, decoding included, on the same files with the same weights: the public ones where they are found, fixed random
ones elsewhere (`--weights FILE` names others). clean-fid is timed twice, with its own Inception module and with this
package's, which leaves the network out of the comparison; torch-fidelity comes with its own. Every pair is timed in
turn and the medians are compared. Run it on an idle machine; `--counts 500 --images 0` is a short run.

Needs the extra `test`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
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
from stepdistill.metrics.frechet import frechet_distance_between
from stepdistill.system.emoji import emoji_images
from stepdistill.system.provenance import provenance

GOALS = {500: 50.0, 5000: 5.0}
FOLDER_GOAL = 1.5
CPU = torch.device("cpu")
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


def distances(counts: list[int], dimension: int, repeats: int) -> None:
    from cleanfid import fid

    for count in counts:
        x, y = features(count, dimension, 0), features(count, dimension, 1)
        compare(
            f"distance of {count} x {dimension} features, clean-fid",
            lambda x=x, y=y: frechet_distance_between(x, y),  # type: ignore[misc]
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
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i:06}.png")
    return folder


def folders(root: Path, weights: Path, count: int, size: int, repeats: int, workers: int) -> None:
    import torch_fidelity
    from cleanfid import features as their_features
    from cleanfid import fid

    a, b = (write_images(root / name, count, size, shift) for name, shift in (("a", 0), ("b", 700)))
    hub = root / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    (hub / NAME).symlink_to(weights.resolve())
    os.environ["TORCH_HOME"] = str(root)  # clean-fid's own module reads its weights there
    module = their_features.feature_extractor("pytorch_inception", CPU, use_dataparallel=False)
    own = Inception(torch.load(weights, map_location="cpu", weights_only=True))

    def ours(mode: str) -> float:
        network = load_features(f"inception:{weights}", resize=mode)
        sides = (torch.cat([network.images(p) for p in open_images(f).batches(32)]) for f in (a, b))
        return frechet_distance_between(*sides)

    def clean_fid(extract: Callable[[Any], Any]) -> float:
        return float(
            fid.compute_fid(
                str(a),
                str(b),
                mode="clean",
                custom_feat_extractor=extract,
                device=CPU,
                num_workers=workers,
                verbose=False,
            )
        )

    def fidelity() -> float:
        found = torch_fidelity.calculate_metrics(
            input1=str(a),
            input2=str(b),
            fid=True,
            feature_extractor_weights_path=str(weights),
            cuda=False,
            cache=False,
            verbose=False,
        )
        return float(found["frechet_inception_distance"])

    # Its module scales [0, 1] to [-1, 1]; the clean mode's own scaling is (x - 128) / 128.
    with_theirs = lambda x: module(255 * (1 + (x - 128) / 128) / 2)  # noqa: E731
    with_ours = lambda x: own((x - 128) / 128).features  # noqa: E731
    for mode in ("clean", "tf1"):
        next_batch = next(open_images(a).batches(2))
        load_features(f"inception:{weights}", resize=mode).images(next_batch)  # warm
    title = f"2 folders of {count} images of {size} pixels"
    compare(
        f"{title}, clean-fid", lambda: ours("clean"), lambda: clean_fid(with_theirs), repeats, FOLDER_GOAL
    )
    compare(
        f"{title}, clean-fid with our module",
        lambda: ours("clean"),
        lambda: clean_fid(with_ours),
        repeats,
        None,
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
    parser.add_argument("--workers", type=int, default=2, help="clean-fid's loader processes")
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    if chosen.weights and not chosen.weights.is_file():
        parser.error(f"no file {chosen.weights}")
    warnings.simplefilter("ignore")
    print(f"{provenance()['hardware']}; torch threads {torch.get_num_threads()}; median of {chosen.repeats}")
    distances(chosen.counts, chosen.dimension, chosen.repeats)
    if not chosen.images:
        return
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        weights = chosen.weights or public_state() or root / "random.pth"
        if not weights.is_file():
            torch.save(random_state(), weights)
            print("the public state dict is not here: fixed random weights, with which no distance is FID")
        folders(root, weights, chosen.images, chosen.size, chosen.repeats, chosen.workers)


if __name__ == "__main__":
    main()
