"""Ten images of a domain whose truth is known: the embedded emoji by night.

    python train/night.py runs/night                # ten of them, with captions
    python train/night.py runs/all_night --count 3781

Lightness is inverted, hue and chroma are kept: rgb + 1 - max - min. White paper becomes a black sky, a red apple stays
red. It is for methods that take a domain from few images (train/recipes/uni_dad_emoji.yaml): what they ought to draw
is all 3,781 of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stepdistill.system.emoji import emoji_captions, emoji_images


def by_night(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An image [H, W, 3] with its lightness inverted; twice is once."""
    wide = image.astype(np.int16)
    night = wide + 255 - wide.max(2, keepdims=True) - wide.min(2, keepdims=True)
    return night.astype(np.uint8)


def main() -> None:
    """Writes the images, evenly spread over all, with a caption beside each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=10)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    images, captions = emoji_images(), emoji_captions()
    for number in (i * len(captions) // given.count for i in range(given.count)):
        Image.fromarray(by_night(np.asarray(images[number]))).save(given.folder / f"{number:04}.png")
        (given.folder / f"{number:04}.txt").write_text(captions[number] + "\n", "utf-8")
    print(f"{given.count} images by night: {given.folder}")


if __name__ == "__main__":
    main()
