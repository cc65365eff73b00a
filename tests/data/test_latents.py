"""Images from folders and tars: decoded once, kept as latents, in batches of one size."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tiny import tiny_pipeline, tiny_teacher

import stepdistill
from stepdistill.data import latents as latents_module
from stepdistill.data.batches import Data
from stepdistill.data.buckets import bucket_sizes, turn
from stepdistill.data.latents import Latents
from stepdistill.data.training_images import find_images
from stepdistill.errors import UserError
from stepdistill.families.size import Size
from stepdistill.losses.batch import Batch
from stepdistill.losses.contract import Loss, Turn
from stepdistill.pictures.decoding import Nearest
from stepdistill.recipes.recipe import load_recipe
from stepdistill.training.assemble import assemble
from stepdistill.training.identity import resolve
from stepdistill.training.loop import train
from stepdistill.training.training_data import training_data

SIZES = [(32, 32)] * 7 + [(40, 24)] * 5 + [(30, 70)] * 3  # height, width
SQUARE = [Size(16, 16)]


def picture(number: int, height: int, width: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """15 images of three aspect ratios, and a broken one."""
    place: Path = tmp_path_factory.mktemp("images") / "pictures"
    place.mkdir()
    for i, size in enumerate(SIZES):
        (place / f"{i:02d}.png").write_bytes(picture(i, *size))
        (place / f"{i:02d}.txt").write_text(f"noise {i}")
    (place / "08b.png").write_bytes(b"no image")
    (place / "08b.txt").write_text("broken")
    return place


def tar_of(folder: Path, file: Path, first: int, last: int) -> None:
    with tarfile.open(file, "w") as archive:
        for path in sorted(folder.iterdir(), reverse=True):
            if first <= int(path.name[:2]) < last:
                archive.add(path, path.name)
        if first == 0:
            content = json.dumps({"caption": "from json"}).encode()
            for name, data in (
                ("zz.json", content),
                ("zz.png", picture(99, 8, 8)),
                ("zz.seg.png", b"another field"),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def pixels(x: torch.Tensor) -> torch.Tensor:
    return x


def every(latents: Latents, size: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return latents.take(size, torch.arange(latents.counts[size]))


def test_tars_hold_the_same_images_as_the_folder(folder: Path, tmp_path: Path) -> None:
    """Of one, or of a folder of them; read where they lie, whatever their order in it."""
    tar_of(folder, tmp_path / "a-1.tar", 0, 9)
    tar_of(folder, tmp_path / "a-10.tar", 9, 99)
    plain, packed = find_images(folder), find_images(tmp_path)
    there = [*packed.captions[:10], *packed.captions[11:]]
    assert there == list(plain.captions) and packed.captions[10] == "from json"
    found = [every(Latents(each, pixels, (3, 16, 16), SQUARE, Path).make()) for each in (plain, packed)]
    if Path("/proc/self/fd").is_dir():  # of thousands of tars not all can be open
        assert not any(str(tmp_path) in str(held.resolve()) for held in Path("/proc/self/fd").iterdir())
    keep = found[1][1] != 10
    assert torch.equal(found[0][0], found[1][0][keep]) and len(found[0][0]) == 15
    one = find_images(tmp_path / "a-10.tar")
    assert list(one.captions) == list(plain.captions)[10:] and one.sha256() != packed.sha256()
    assert packed.remarks() == ["data.images: 17 images with their captions, in 2 tar files"]
    with pytest.raises(UserError, match=r"b.tar.gz is compressed, and images are read where they lie"):
        with tarfile.open(tmp_path / "b.tar.gz", "w:gz"):
            pass
        find_images(tmp_path / "b.tar.gz")
    with tarfile.open(tmp_path / "c.tar", "w") as archive:
        archive.add(folder / "01.png", "01.png")
    with pytest.raises(UserError, match=r"c.tar: sample 01 has neither 01.txt nor 01.json"):
        find_images(tmp_path / "c.tar")


def test_latents_on_the_disk_are_those_in_memory_and_go_on_where_they_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image is decoded when its shard is made, and never again."""
    monkeypatch.setattr(latents_module, "SHARD", 4)
    sizes, images = [Size(16, 16), Size(24, 16), Size(8, 24)], find_images(folder)
    kept = Latents(images, pixels, (3, 16, 16), sizes, Path).make()
    assert (kept.counts, kept.on_disk) == ([7, 5, 3], False)
    monkeypatch.setattr(latents_module, "MEMORY_BYTES", 0)
    calls: list[int] = []

    def failing(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return x

    with pytest.raises(KeyboardInterrupt):
        Latents(images, failing, (3, 16, 16), sizes, lambda: tmp_path).make()
    assert len(list(tmp_path.glob("latents-*.safetensors"))) == 2
    calls = [9] * 9
    on_disk = Latents(images, failing, (3, 16, 16), sizes, lambda: tmp_path).make()
    assert sum(calls[9:]) == 15 - 8 and on_disk.on_disk
    for size in range(3):
        assert all(torch.equal(*both) for both in zip(every(kept, size), every(on_disk, size), strict=True))
    assert on_disk.skipped == kept.skipped and on_disk.skipped[0].name == "08b.png"
    assert (
        on_disk.converted
        == kept.converted
        == {
            "cropped and resized to 16x16 (Lanczos)": 7,
            "cropped and resized to 16x24 (Lanczos)": 5,
            "cropped and resized to 24x8 (Lanczos)": 3,
        }
    )
    made = len(calls)
    again = Latents(images, failing, (3, 16, 16), sizes, lambda: tmp_path).make()
    assert len(calls) == made and again.counts == kept.counts


def test_latents_of_a_vae_that_works_in_tiles_lie_in_a_folder_of_their_own(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their seams are in the latents."""
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path))
    monkeypatch.setattr(latents_module, "MEMORY_BYTES", 0)
    teacher, images = tiny_teacher("sd"), find_images(folder)

    def place() -> Path:
        latents = Data(teacher, ["a"], 0, images=images).images
        wanted = None if latents is None else latents.wanted()
        assert wanted is not None
        return wanted.folder

    whole = place()
    assert place() == whole
    teacher.pipe.vae.enable_tiling()
    assert place() != whole


def test_buckets_have_the_area_of_the_size_and_the_units_of_the_pipeline() -> None:
    """SDXL's at 1024: sides in steps of 64, ratios up to 2, areas within a twentieth; an image goes to the nearest."""
    family = tiny_teacher("sdxl").family

    class Pipe:
        vae_scale_factor = 8

    sizes = bucket_sizes(family, Pipe, Size(1024, 1024))
    assert sizes[0] == Size(1024, 1024) and {Size(832, 1280), Size(1280, 832)} < {*sizes}
    for size in sizes:
        assert size.height % 64 == 0 == size.width % 64 and 0.5 <= size.height / size.width <= 2
        assert abs(size.height * size.width / 1024**2 - 1) < 0.05
    assert len(sizes) == len({size.height / size.width for size in sizes}) > 9
    nearest = Nearest(tuple((size.height, size.width) for size in sizes))
    assert nearest.of(3000, 3100) == (1024, 1024) and nearest.of(1000, 9000) == min(nearest.sizes)
    assert nearest.of(1280, 832) == (1280, 832) and nearest.of(4000, 6000) == (832, 1280)


def test_a_batch_is_of_one_bucket_and_each_has_its_turns() -> None:
    """A function of seed and step: in a round each bucket has as many batches as it fills, its images in turn."""
    counts, batch = [80, 0, 33, 3], 8
    rounds = 10 + 4 + 1
    seen = [turn(counts, step, batch, 5) for step in range(3 * rounds)]
    for start in range(0, 3 * rounds, rounds):
        buckets = [bucket for bucket, _ in seen[start : start + rounds]]
        assert [buckets.count(i) for i in range(4)] == [10, 0, 4, 1]
    for bucket, each in ((0, 10), (2, 4), (3, 1)):
        places = torch.cat([place for own, place in seen if own == bucket]).sort().values
        assert torch.equal(places, torch.arange(3 * each * batch))
    assert [bucket for bucket, _ in seen[:rounds]] != [bucket for bucket, _ in seen[rounds : 2 * rounds]]
    assert turn(counts, 20, batch, 6) != seen[20] and turn(counts, 20, batch, 5)[0] == seen[20][0]


def test_batches_of_buckets_say_their_size_and_do_not_depend_on_the_split(folder: Path) -> None:
    """SDXL's time_ids are those of the bucket, also where guidance starts from."""
    teacher = tiny_teacher("sdxl")
    sizes = bucket_sizes(teacher.family, teacher.pipe, teacher.size)
    data = Data(teacher, ["a fish", "a star"], 3, images=find_images(folder), buckets=sizes)
    assert data.images is not None and [count for count in data.images.counts if count] == [7, 3, 5]
    shapes = set()
    for step in range(8):
        whole = data.batch(step, 0, 4, 4)
        assert whole.images is not None
        x0, height, width = (
            whole.images.x0,
            *(teacher.family.pixels(teacher.pipe) * side for side in whole.shape[1:]),
        )
        shapes.add(whole.shape)
        assert whole.noise.shape == x0.shape and tuple(x0.shape[1:]) == whole.shape
        ids = torch.tensor([[height, width, 0, 0, height, width]]).expand(4, -1).float()
        assert torch.equal(whole.cond["time_ids"], ids) and torch.equal(whole.images.cond["time_ids"], ids)
        assert Size(height, width) in sizes
        parts = [data.batch(step, 0, 1, 4), data.batch(step, 1, 3, 4)]
        assert torch.equal(torch.cat([part.images.x0 for part in parts if part.images]), x0)
        assert torch.equal(torch.cat([part.noise for part in parts]), whole.noise)
    assert len(shapes) == 3
    t = torch.full((4,), 0.5)
    null = teacher.family.unguided(teacher.null, whole.cond)
    assert torch.equal(null["time_ids"], ids[:1])
    weak, strong = (teacher.denoiser.raw(x0, t, cond) for cond in (null.repeat(4), whole.cond))
    wanted = teacher.path.read(weak + 3 * (strong - weak), teacher.denoiser.output, x0, t).x0
    torch.testing.assert_close(
        teacher.predict(x0, t, whole.cond, guidance=3.0).x0, wanted, atol=1e-4, rtol=1e-4
    )


IMAGES = [
    "options.source=images",
    "options.grid=10",
    "train.updates=3",
    "train.batch=2",
    "train.preview_every=0",
]


def test_a_run_learns_from_buckets(folder: Path, tmp_path: Path) -> None:
    """The shape is that of the update's bucket."""
    (tmp_path / "p.txt").write_text("a fish\na star\n")
    sets = [*IMAGES, f"data.prompts={tmp_path / 'p.txt'}", f"data.images={folder}", "data.buckets=true"]
    recipe = load_recipe(None, method="lcm", sets=[*sets, "train.updates=6", "options.guidance=3"])
    job = assemble(resolve(recipe), accelerator := Accelerator(cpu=True), tiny_pipeline("sdxl"))
    data, shapes = training_data(job, tmp_path), list[tuple[int, ...]]()
    loss = job.method.loss

    def seen(turn: Turn, batch: Batch) -> Loss:
        shapes.append(batch.shape)
        return loss(turn, batch)

    job.method.loss = seen  # type: ignore[method-assign]
    done = train(job.objective, data, job.recipe, tmp_path, accelerator)
    assert done.step == 6 and len(shapes) == 6 and len(set(shapes)) > 1
    assert set(shapes) < {(4, size.height // 4, size.width // 4) for size in job.buckets or ()}


@pytest.mark.parametrize(
    ("name", "method", "more", "says"),
    [
        ("sd", "lcm", ["options.source=pairs"], "learns from no images of data.images: set it to false"),
        ("sd", "dmd", ["terms.gan_weight=0.1"], r"a discriminator's head is made for one size: leave the GAN out"),
        ("sd", "lcm", ["terms.regression_weight=0.1"], "learns from pairs, which have one size"),
        ("sd", "lcm", ["train.compile=regional"], "compiles a network for one size"),
        ("unet-ddpm", "consistency", ["options.source=images"], "DDPMPipeline draws no other size than 8x8"),
        ("flux", "lcm", ["data.size=[64, 64]"], r"times of FluxPipeline shift with the size, .* options.shift=1\.\d+"),
        ("sd3", "lcm", ["data.size=[128, 128]"], r"SD3Transformer2DModel takes no \d+x\d+ \("),
    ],
)  # fmt: skip
def test_buckets_that_would_not_work_are_refused(
    folder: Path, tmp_path: Path, name: str, method: str, more: list[str], says: str
) -> None:
    (tmp_path / "p.txt").write_text("a fish\na star\n")
    own = [] if method == "dmd" else IMAGES if method == "lcm" else IMAGES[2:]
    sets = [*own, f"data.images={folder}", "data.buckets=true", "student.output=teacher", *more]
    sets += [f"data.prompts={tmp_path / 'p.txt'}"] if name != "unet-ddpm" else []
    with pytest.raises(UserError, match=says) as caught:
        stepdistill.distill(tiny_pipeline(name), method, tmp_path / "run", sets=sets)
    assert "\n" not in str(caught.value)
