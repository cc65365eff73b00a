"""Prompts to train a reward of colours on, half of which name the colour of a thing.

    python train/examples/colours.py runs/colours.txt

Left out are the prompts that the suite emoji-colours measures: squares, diamonds and triangles, and books of colours
that no caption names. Every second line is one of the other captions that `colour` understands, in turn.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from stepdistill.metrics.colours import hue_of
from stepdistill.system.emoji import emoji_captions

HELD_OUT = ("square", "diamond", "triangle")


def training_prompts() -> list[str]:
    """Captions that name a hue and others, taking turns; without those of things that are held out."""
    coloured = [text for text in emoji_captions() if not math.isnan(hue_of(text))]
    seen = [text for text in coloured if not any(thing in text for thing in HELD_OUT)]
    others = [text for text in emoji_captions() if math.isnan(hue_of(text))]
    return [text for i, other in enumerate(others) for text in (other, seen[i % len(seen)])]


def main() -> None:
    """Writes the prompts, one a line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    file = parser.parse_args().file
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(prompts := training_prompts()) + "\n", "utf-8")
    print(f"{len(prompts):,} prompts: {file}")


if __name__ == "__main__":
    main()
