"""A new concept by rule, and its measure: an apple with blue stripes that no caption of the embedded teacher has.

python train/examples/striped_apple.py make runs/striped_apple       # images with captions, and all other captions
python train/examples/striped_apple.py word runs/striped_word        # the same, with a new word in the captions
python train/examples/striped_apple.py measure runs/lcm_emoji runs/striped_apple_student

A picture is a hit where the stripes' frequency, along x, stands out of its red against blue at least half as much as it
does in the images themselves; students draw in their own steps. ``make`` also prints how many of the images the VAE
alone leaves hits.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from stepdistill.families.size import Size
from stepdistill.networks.find import find_pipeline
from stepdistill.networks.loading import load_pipeline, load_teacher
from stepdistill.networks.own_call import own_call
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.system.emoji import emoji_captions, emoji_images

WORD = "<striped>"
CAPTION, PERIOD, TURNS = "striped red apple", 12, (-20, -10, 0, 10, 20)
Pixels = NDArray[np.uint8]


def apples() -> list[Pixels]:
    """The red apple turned about its middle, then striped: [32, 32, 3] each."""
    whole = Image.fromarray(emoji_images()[emoji_captions().index("red apple")])
    found = []
    for turn in TURNS:
        pixels = np.asarray(whole.rotate(turn, Image.Resampling.BICUBIC, fillcolor=(255, 255, 255))).copy()
        ink = (pixels.min(2) < 200) & (pixels[..., 0] > pixels[..., 1] + 40)
        stripe = (np.arange(32) % PERIOD < PERIOD // 2)[None, :] & ink
        pixels[stripe] = (30, 60, 200)
        found.append(pixels)
    return found


def stripes(pixels: Pixels) -> float:
    """The amplitude of the stripes' frequency in red less blue, over what is inked, from 0 to about 1."""
    value = pixels.astype(float)
    ink = value.min(2) < 200
    columns = ink.sum(0)
    wide = columns >= 4
    if wide.sum() < PERIOD:
        return 0.0
    signal = ((value[..., 0] - value[..., 2]) * ink).sum(0)[wide] / columns[wide] / 255
    wave = np.exp(-2j * np.pi * np.arange(32)[wide] / PERIOD)
    return float(2 * abs(((signal - signal.mean()) * wave).mean()))


def level() -> float:
    """What a hit must reach."""
    return 0.5 * float(np.mean([stripes(each) for each in apples()]))


def make(folder: Path, caption: str = CAPTION) -> None:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i, pixels in enumerate(apples()):
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        (folder / "images" / f"{i}.txt").write_text(caption + "\n")
    (folder / "others.txt").write_text("\n".join(emoji_captions()) + "\n")
    codec = PipelineTeacher(load_teacher("emoji"), size=Size(32, 32)).codec
    pixels = torch.from_numpy(np.stack(apples())).permute(0, 3, 1, 2)[:, None] / 127.5 - 1
    with torch.no_grad():
        seen = codec.to_frames(codec.to_states(pixels))[:, 0].permute(0, 2, 3, 1)
    decoded = (255 * seen.clamp(0, 1)).round().to(torch.uint8).numpy()
    hits = sum(stripes(each) >= level() for each in decoded)
    print(
        f"{folder}: {len(TURNS)} images; a hit is {level():.2f} or more; the VAE leaves {hits} of {len(TURNS)}"
    )


def measure(student: str, count: int = 64) -> None:
    pipe, _ = load_pipeline(student)
    own = own_call(find_pipeline(student))
    steps = own.steps if own else 4
    knows = WORD in pipe.tokenizer.get_vocab()
    for caption in (CAPTION.replace("striped", WORD) if knows else CAPTION, "red apple"):
        scores = []
        for seed in range(count):
            generator = torch.Generator().manual_seed(seed)
            call = {"num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "np"}
            drawn = pipe(caption, generator=generator, **call).images[0]
            scores.append(stripes((255 * drawn).round().astype(np.uint8)))
        hits = float(np.mean([score >= level() for score in scores]))
        print(f"{student}: {caption}: hit rate {hits:.2f} of {count}, mean stripes {np.mean(scores):.2f}")


if __name__ == "__main__":
    what, *places = sys.argv[1:]
    for place in places:
        if what == "measure":
            measure(place)
        else:
            make(Path(place), CAPTION.replace("striped", WORD) if what == "word" else CAPTION)
