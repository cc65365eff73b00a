"""Batches that follow from the step alone, images that are skipped and named, and the cache of pairs."""

from __future__ import annotations

import json
import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stepdistill.data.batches import Data
from stepdistill.data.image_archives import open_images
from stepdistill.data.latents import Latents
from stepdistill.data.pairs import PairCache
from stepdistill.data.prompts import read_prompts
from stepdistill.data.sizes import pairs_size
from stepdistill.data.training_images import EmbeddedImages, ImageFolder, find_images
from stepdistill.diffusion.draws import generator_for
from stepdistill.errors import UserError
from stepdistill.families.size import Size
from stepdistill.losses.contract import PairOptions
from stepdistill.networks.loading import load_teacher
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.pictures.decoding import Nearest
from stepdistill.recipes.recipe import load_recipe
from stepdistill.system.processes import Processes
from stepdistill.training.preflight import check_recipe

PROMPTS = ["red apple", "dog", "cat face", "sun", "waving hand"]


@pytest.fixture(scope="module")
def teacher():
    return PipelineTeacher(load_teacher("emoji"))


def options(**more):
    return PairOptions(**{"pairs": 12, "pair_steps": 2, "guidance": 2.0, **more})


def test_a_batch_is_the_same_whole_or_in_parts_and_an_epoch_sees_every_prompt(teacher):
    data = Data(teacher, PROMPTS, seed=1)
    whole = data.batch(4, 0, 4, 4)
    parts = [data.batch(4, 0, 2, 4), data.batch(4, 2, 2, 4)]
    assert torch.equal(whole.noise, torch.cat([part.noise for part in parts]))
    key = "encoder_hidden_states"
    assert torch.equal(whole.cond.tensors[key], torch.cat([part.cond.tensors[key] for part in parts]))
    epoch = torch.cat([data.batch(step, 0, 1, 1).cond.tensors[key] for step in range(5)])
    assert len({tuple(row.flatten()[-96:].tolist()) for row in epoch}) == 5
    orders = [torch.randperm(5, generator=generator_for(1, "order", "prompts", i)) for i in range(5)]
    for step in (0, 1):  # from the end of one pass over two whole ones into a fourth; within one
        for size in (12, 2):
            expected = torch.cat(orders)[step * size : (step + 1) * size]
            assert torch.equal(data.batch(step, 0, size, size).prompt, expected)


def test_a_group_is_of_one_prompt_with_noises_of_its_own_wherever_the_batch_is_cut(teacher):
    """Two processes that each work through two parts see whole groups; a pass still sees every prompt once."""
    data = Data(teacher, PROMPTS, seed=1, group=3)
    whole = data.batch(4, 0, 12, 12)
    parts = [part for first in (0, 6) for part in data.batch(4, first, 6, 12).split(2)]
    assert whole.group == 3 and all(part.group == 3 and len(set(part.prompt.tolist())) == 1 for part in parts)
    assert torch.equal(torch.cat([part.prompt for part in parts]), whole.prompt)
    assert torch.equal(torch.cat([part.noise for part in parts]), whole.noise)
    assert len({tuple(row.flatten().tolist()) for row in whole.noise}) == 12
    key = "encoder_hidden_states"
    assert all(torch.equal(row, whole.cond[key][3 * (i // 3)]) for i, row in enumerate(whole.cond[key]))
    plain = Data(teacher, PROMPTS, seed=1).batch(4, 0, 4, 4)
    assert torch.equal(whole.prompt[::3], plain.prompt)
    with pytest.raises(ValueError, match="parts of 2 samples would tear groups of 3"):
        whole.split(6)


def test_batches_of_rows_on_the_disk_are_made_ahead_and_are_the_same(teacher, tmp_path, monkeypatch):
    """By a thread that ends with them, and whose error comes at its own step; rows in memory need none."""
    plain = Data(teacher, PROMPTS, seed=1)
    monkeypatch.setattr("stepdistill.data.row_cache.PROBED", 1)
    monkeypatch.setattr("stepdistill.data.row_cache.MEMORY_BYTES", 0)
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path))
    data, key = Data(teacher, PROMPTS, seed=1), "encoder_hidden_states"
    made = []

    def batch(step, *of, plain=data.batch):
        made.append(threading.current_thread())
        if step == 5:
            raise OSError("the disk is gone")
        return plain(step, *of)

    monkeypatch.setattr(data, "batch", batch)
    batches = data.batches(range(2, 9), 1, 2, 4)
    for step in (2, 3, 4):
        ours, wanted = next(batches), plain.batch(step, 1, 2, 4)
        assert torch.equal(ours.noise, wanted.noise) and torch.equal(ours.prompt, wanted.prompt)
        torch.testing.assert_close(ours.cond[key], wanted.cond[key])
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert threading.main_thread() not in made and len(made) == 4
    early = data.batches(range(6, 9), 0, 2, 4)
    next(early)
    early.close()
    assert not any(thread.is_alive() for thread in made)
    seen = threading.active_count()
    assert torch.equal(next(plain.batches(range(2, 9), 1, 2, 4)).noise, plain.batch(2, 1, 2, 4).noise)
    assert threading.active_count() == seen


def test_encoded_prompts_are_those_of_the_pipeline(teacher):
    data = Data(teacher, PROMPTS, seed=1)
    direct = teacher.pipe.encode_prompt([PROMPTS[2]], "cpu", 1, False)[0]
    found = data.condition(torch.tensor([2])).tensors["encoder_hidden_states"]
    torch.testing.assert_close(found, direct, atol=1e-5, rtol=1e-5)


def test_pairs_are_the_teachers_own_samples(teacher, tmp_path):
    """Two DDIM steps at the cache's guidance from the cache's own noise give the stored clean end."""
    cache = PairCache(tmp_path, teacher, PROMPTS, options(pair_solver="ddim"), seed=5)
    data = Data(teacher, PROMPTS, 5, pairs=cache)
    cache.make(data.condition)
    index = torch.tensor([0, 7, 11])
    x, cond = cache.noise(index), data.condition(cache.prompt_index[index])
    for t, s in ((1.0, 0.5), (0.5, 0.0)):
        x = teacher.predict(x, torch.full((3,), t), cond, guidance=2.0).at(torch.full((3,), s))
    torch.testing.assert_close(cache.clean(index), x, atol=1e-4, rtol=1e-4)


def test_pairs_go_on_where_they_stopped_and_ranks_share_the_work(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("stepdistill.data.pairs.SHARD", 4)
    caches = {
        name: PairCache(tmp_path / name, teacher, PROMPTS, options(), seed=5) for name in ("one", "two")
    }
    data = Data(teacher, PROMPTS, 5)
    caches["one"].make(data.condition)
    caches["two"].make(data.condition, Processes(0, 2))
    missing = tmp_path / "two" / "pairs-00001.safetensors"
    assert not missing.exists()
    before = (tmp_path / "two" / "pairs-00000.safetensors").stat().st_mtime_ns
    caches["two"].make(data.condition)
    assert missing.exists()
    assert (tmp_path / "two" / "pairs-00000.safetensors").stat().st_mtime_ns == before
    everything = torch.arange(12)
    assert torch.equal(caches["one"].clean(everything), caches["two"].clean(everything))


@pytest.mark.parametrize(
    ("change", "named"),
    [({"guidance": 3.0}, "guidance"), ({"pair_steps": 3}, "steps"), ({"pair_solver": "heun"}, "solver"),
     ({"pairs": 13}, "pairs"), ("prompts", "prompts"), ("seed", "seed"), ("teacher", "teacher"),
     ("older", "generator")],
)  # fmt: skip
def test_pairs_of_anything_else_are_refused_by_name(teacher, tmp_path, change, named):
    PairCache(tmp_path, teacher, PROMPTS, options(), seed=5)
    prompts = PROMPTS[:-1] if change == "prompts" else PROMPTS
    other = teacher
    if change == "teacher":
        other = PipelineTeacher(load_teacher("emoji"))
        with torch.no_grad():
            other.denoiser.net.conv_out.bias[0] += 1e-3
    if change == "older":  # whose manifest does not name it
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        assert manifest.pop("generator") == "philox4x32-10"
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    wanted = options(**change) if isinstance(change, dict) else options()
    with pytest.raises(UserError, match=rf"were made with another {named} \("):
        PairCache(tmp_path, other, prompts, wanted, seed=6 if change == "seed" else 5)


def test_a_run_may_take_the_first_pairs_of_a_larger_cache_and_some_of_its_states(teacher, tmp_path):
    wide = options(pair_steps=4, pair_solver="ddim")
    whole = PairCache(tmp_path, teacher, PROMPTS, wide, 5, times=(0.75, 0.5, 0.25))
    fewer = wide.model_copy(update={"pairs": 7})
    part = PairCache(tmp_path, teacher, PROMPTS, fewer, 5, times=(0.5,))
    part.make(
        Data(teacher, PROMPTS, 5, pairs=part).condition
    )  # leaves a shard that is whole for the larger one
    index = torch.tensor([0, 6])
    assert (part.count, part.states(index).shape[1]) == (7, 1)
    torch.testing.assert_close(part.states(index)[:, 0], whole.states(index)[:, 1], atol=0, rtol=0)
    assert whole.clean(torch.tensor([11])).shape == (1, *teacher.codec.shape)
    bare = PairCache(tmp_path / "bare", teacher, PROMPTS, wide, 5)
    with pytest.raises(UserError, match=r"another states \(\[\], this run has \[0.5\]\)"):
        PairCache(bare.folder, teacher, PROMPTS, wide, 5, times=(0.5,))


def test_pairs_in_half_precision_take_half_the_bytes_and_are_the_same_rounded(teacher, tmp_path):
    """Noise is drawn anew, so only the clean end and the kept states are rounded; the size was said before."""
    wide, index = options(pair_steps=4, pair_solver="ddim"), torch.tensor([0, 11])
    files = {}
    for dtype, kept in (("float32", torch.float32), ("bf16", torch.bfloat16), ("float16", torch.float16)):
        cache = PairCache(tmp_path / dtype, teacher, PROMPTS, wide, 5, times=(0.5,), dtype=dtype)
        cache.make(Data(teacher, PROMPTS, 5).condition)
        assert cache.size == pairs_size(12, teacher.codec.shape, 1, dtype) and cache.wanted().bytes == 0
        files[dtype] = (tmp_path / dtype / "pairs-00000.safetensors").stat().st_size
        assert 0 < files[dtype] - cache.size.bytes < 1200
        if dtype == "float32":
            clean, states = cache.clean(index), cache.states(index)
        assert torch.equal(cache.clean(index), clean.to(kept).float())
        assert torch.equal(cache.states(index), states.to(kept).float())
    with pytest.raises(UserError, match=r"another dtype \(bf16, this run has float32\)"):
        PairCache(tmp_path / "bf16", teacher, PROMPTS, wide, 5, times=(0.5,))
    assert cache.size.line(tmp_path) == f"pairs: 12 x 1.0 KiB = 12.0 KiB in {tmp_path}"


def test_a_damaged_shard_of_pairs_is_named_and_made_again_when_asked(teacher, tmp_path):
    cache = PairCache(tmp_path, teacher, PROMPTS, options(), 5)
    condition = Data(teacher, PROMPTS, 5).condition
    cache.make(condition)
    clean, file = cache.clean(torch.arange(12)), tmp_path / "pairs-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"pairs-00000.safetensors is damaged .*data.damaged=remake"):
        PairCache(tmp_path, teacher, PROMPTS, options(), 5).make(condition)
    again = PairCache(tmp_path, teacher, PROMPTS, options(), 5, remake=True)
    again.make(condition)
    assert torch.equal(again.clean(torch.arange(12)), clean)


def picture(file, size=(40, 32), mode="RGB"):
    colour = (200, 30, 60) if mode == "RGB" else 7
    Image.new(mode, size, colour).save(file)


def loaded(found, numbers, size):
    """Those images at a size, float [B, 3, H, W] in [-1, 1]."""
    rows = [torch.tensor(pixels) for _, pixels, _ in found.decoded(numbers, Nearest((size,)))]
    return torch.stack(rows).permute(0, 3, 1, 2).float() / 127.5 - 1


def latents_of(found, size=(32, 40)):
    """Latents that are the pixels."""
    return Latents(found, lambda pixels: pixels, (3, *size), [Size(*size)], Path).make()


def test_corrupt_images_are_skipped_counted_and_named(tmp_path):
    picture(tmp_path / "red_apple.png")
    picture(tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("a dog\n")
    (tmp_path / "broken.png").write_bytes((tmp_path / "b.png").read_bytes()[:60])
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "notes.md").write_text("left alone")
    found = ImageFolder.read(tmp_path)
    assert list(found.files.names) == ["b.png", "broken.png", "red_apple.png", "text.jpg"]
    latents = latents_of(found, (16, 16))
    assert [skipped.name for skipped in latents.skipped] == ["broken.png", "text.jpg"]
    assert all("cannot be read" in skipped.reason for skipped in latents.skipped)
    pixels, numbers = latents.take(0, torch.tensor([1, 0]))
    assert latents.counts == [2] and pixels.shape == (2, 3, 16, 16)
    assert [found.captions[i] for i in numbers] == ["red apple", "a dog"]
    torch.testing.assert_close(pixels[0, :, 5, 5], torch.tensor([200, 30, 60]) / 127.5 - 1)


def test_captions_come_from_metadata_first(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "a red field"}) + "\n")
    assert list(ImageFolder.read(tmp_path).captions) == ["a red field"]


def test_what_has_no_one_way_to_8_bits_is_skipped_by_the_rules_of_evaluation(tmp_path):
    """16 bits, transparency, several frames, a bomb, a Git LFS pointer; of the rest both readers give one set of
    pixels."""
    picture(tmp_path / "a.png")
    picture(tmp_path / "gray.png", mode="L")
    ramp = np.linspace(0, 65535, 1024).reshape(32, 32).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    Image.new("RGBA", (32, 32), (255, 0, 255, 0)).save(tmp_path / "clear.png")
    frame = Image.new("RGB", (8, 8), "red")
    frame.save(tmp_path / "moving.webp", save_all=True, append_images=[Image.new("RGB", (8, 8), "blue")])
    Image.new("1", (14000, 14000)).save(tmp_path / "bomb.png")
    (tmp_path / "pointer.jpg").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    (tmp_path / "._a.png").write_text("of macOS")
    os.rename(tmp_path / "gray.png", os.fsencode(tmp_path) + b"/gr\xe4y.png")
    picture(tmp_path / "gray.png", mode="L")
    found = ImageFolder.read(tmp_path)
    latents = latents_of(found)
    reasons = dict(latents.skipped) | dict(found.files.nameless)
    used = [found.files.names[i] for i in latents.take(0, torch.arange(2))[1]]
    assert used == ["a.png", "gray.png"] and latents.counts == [2]
    assert reasons.keys() == {
        "deep.png",
        "clear.png",
        "moving.webp",
        "bomb.png",
        "pointer.jpg",
        "gr\\xe4y.png",
    }
    for name, word in (("deep.png", "8-bit"), ("clear.png", "transparent"), ("moving.webp", "animated"),
                       ("bomb.png", "exceeds limit"), ("pointer.jpg", "git lfs pull"),
                       ("gr\\xe4y.png", "not UTF-8")):  # fmt: skip
        assert word in reasons[name]
    scored = dict(open_images(tmp_path))
    for i, name in enumerate(used):
        pixels = (latents.take(0, torch.tensor([i]))[0][0] + 1) * 127.5
        assert torch.equal(pixels.permute(1, 2, 0).round().byte(), torch.tensor(scored[name]))
    assert found.remarks() == [
        "data.images: 7 images, captions: 7 from their file names",
        "data.images: gr\\xe4y.png left out: its name is not UTF-8, and there is no other caption",
    ]
    assert latents.remarks()[0] == "data.images: 1 images: grayscale to RGB"
    assert latents.remarks()[1].startswith("data.images: 5 files skipped: bomb.png: cannot be read")


@pytest.mark.parametrize("turn", range(1, 9))
def test_photographs_are_turned_upright(tmp_path, turn):
    """An upright picture, stored as a camera in each of EXIF's eight positions stores it, is trained on upright."""
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8] = 255
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
              5: upright.transpose(1, 0, 2), 6: upright.transpose(1, 0, 2)[::-1],
              7: upright.transpose(1, 0, 2)[::-1, ::-1], 8: upright.transpose(1, 0, 2)[:, ::-1]}[turn]  # fmt: skip
    image = Image.fromarray(np.ascontiguousarray(stored))
    exif = image.getexif()
    exif[0x0112] = turn
    image.save(tmp_path / "photo.png", exif=exif)
    found = ImageFolder.read(tmp_path)
    pixels = loaded(found, [0], (16, 24))[0]
    assert torch.equal(pixels.permute(1, 2, 0), torch.tensor(upright).float() / 127.5 - 1)
    assert latents_of(found, (16, 24)).converted == (
        {} if turn == 1 else {"turned upright (EXIF orientation)": 1}
    )


def test_captions_come_from_the_nearest_metadata_under_any_of_the_names(tmp_path):
    """jsonl or csv, of the folder or one above; then a text beside the image; then its name."""
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    for name in ("a", "b", "c", "sub/n", "sub/deep/m", "sub/o_p"):
        picture(tmp_path / f"{name}.png")
    rows = [{"file_name": "a.png", "Caption": " of a "}, {"file_name": "sub/n.png", "text": "from above"},
            {"file_name": "./sub/deep/m.png", "text": "line\u2028end"}]  # fmt: skip
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "metadata.jsonl").write_text("\ufeff" + text, "utf-8")
    (tmp_path / "metadata.csv").write_text('file_name,id,text\nb.png,1,"of b, too"\n')
    (tmp_path / "sub" / "metadata.jsonl").write_text(json.dumps({"file_name": "n.png", "prompt": "nested"}))
    (tmp_path / "c.txt").write_text("\ufeffof c\n", "utf-8")
    (tmp_path / "a.txt").write_text("not this")
    found = ImageFolder.read(tmp_path)
    assert dict(zip(found.files.names, found.captions, strict=True)) == {
        "a.png": "of a", "b.png": "of b, too", "c.png": "of c",
        "sub/n.png": "nested", "sub/deep/m.png": "line\u2028end", "sub/o_p.png": "o p",
    }  # fmt: skip
    assert found.files.sources == {"metadata.jsonl": 2, "metadata.csv": 1, "sub/metadata.jsonl": 1,
                             "texts beside them": 1, "their file names": 1}  # fmt: skip


def test_a_list_of_images_is_known_by_names_sizes_and_captions(tmp_path):
    for name in ("a", "b"):
        picture(tmp_path / f"{name}.png")
    hashes = [ImageFolder.read(tmp_path).sha256(), ImageFolder.read(tmp_path).sha256()]
    (tmp_path / "a.txt").write_text("another caption")
    hashes.append(ImageFolder.read(tmp_path).sha256())
    picture(tmp_path / "b.png", size=(400, 320))
    hashes.append(ImageFolder.read(tmp_path).sha256())
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    hashes.append(ImageFolder.read(tmp_path).sha256())
    assert hashes[0] == hashes[1] and len(set(hashes)) == 4


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("metadata.jsonl", b'{"image": "a.png", "text": "x"}', "line 1 has no file_name"),
        ("metadata.jsonl", b'\n{"file_name": "a.png", "text": null}', "line 2: text is empty, not a text"),
        (
            "metadata.jsonl",
            b'{"file_name": "a.png", "alt": "x"}',
            "line 1 has no text under prompt, caption, text",
        ),
        ("metadata.jsonl", b'{"file_name": "a.png"', "line 1 is not JSON"),
        ("metadata.jsonl", b'["a.png", "x"]', "line 1 has no file_name"),
        ("metadata.csv", b"file_name,text\na.png,caf\xe9\n", r"is not UTF-8 text .*byte 24\)"),
        ("metadata.csv", b"file_name,text\na.png\n", "line 2: text is empty"),
        ("metadata.csv", b"version https://git-lfs.github.com/spec/v1\n", "run git lfs pull"),
        ("a.txt", b"caf\xe9", r"is not UTF-8 text .*byte 3\)"),
    ],
)
def test_captions_that_cannot_be_read_are_one_line(tmp_path, file, content, says):
    picture(tmp_path / "a.png")
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=rf"data.images: .*{re.escape(file)}: .*{says}") as caught:
        ImageFolder.read(tmp_path)
    assert "\n" not in str(caught.value)
    if file != "a.txt":  # said before torch is loaded
        recipe = load_recipe(None, method="dmd", sets=[f"data.images={tmp_path}", "terms.gan_weight=0.1"])
        with pytest.raises(UserError, match=says):
            check_recipe(recipe)


@pytest.mark.parametrize("content", [None, "empty", "broken"])
def test_a_folder_without_images_is_an_error(tmp_path, content):
    folder = tmp_path / "images"
    if content:
        folder.mkdir()
    if content == "broken":
        (folder / "a.png").write_text("no")
    with pytest.raises(UserError, match=r"data.images.*image"):
        latents_of(find_images(folder))


def test_images_reach_the_batch_as_latents_of_the_teachers_scale(teacher):
    """The embedded images, encoded: near unit deviation, and decoded again within the VAE's error."""
    images = EmbeddedImages.read()
    few = EmbeddedImages(images.pixels[:40], images.captions[:40])
    batch = Data(teacher, PROMPTS, 0, images=few).batch(0, 0, 8, 8)
    x0 = batch.images.x0
    assert x0.shape == (8, 4, 8, 8)
    assert 0.5 < float(x0.std()) < 2.0
    index = torch.randperm(40, generator=generator_for(0, "order", "images", 0))[:8]
    real = loaded(few, index.tolist(), (32, 32)) / 2 + 0.5
    error = float((teacher.codec.to_frames(x0)[:, 0] - real).square().mean())
    assert -10 * np.log10(error) > 22  # decibels


def test_prompts_are_read_by_line_and_refused_when_there_are_none(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("  a cat \n\n a dog\n")
    assert read_prompts(file) == ["a cat", "a dog"]
    file.write_bytes("a\u2028cat\r\na\x0cdog\n".encode())  # line ends to str.splitlines
    assert read_prompts(file) == ["a\u2028cat", "a\x0cdog"]
    file.write_text("\n \n")
    with pytest.raises(UserError, match="holds no prompt"):
        read_prompts(file)
    with pytest.raises(UserError, match="not found"):
        read_prompts(tmp_path / "none.txt")
    file.write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="not UTF-8"):
        read_prompts(file)


def test_kept_states_lie_on_the_pairs_own_trajectories(teacher, tmp_path):
    """From a kept state the rest of the solver's steps end in the pair's clean end; other times are refused."""
    cache = PairCache(
        tmp_path, teacher, PROMPTS, options(pair_steps=4, pair_solver="ddim"), 5, times=(0.75, 0.25)
    )
    data = Data(teacher, PROMPTS, 5, pairs=cache)
    cache.make(data.condition)
    index = torch.tensor([1, 10])
    states, cond = cache.states(index), data.condition(cache.prompt_index[index])
    assert states.shape == (2, 2, *teacher.codec.shape)
    x = teacher.predict(states[:, 1], torch.full((2,), 0.25), cond, guidance=2.0).x0
    torch.testing.assert_close(cache.clean(index), x, atol=1e-4, rtol=1e-4)
    x = teacher.predict(cache.noise(index), torch.ones(2), cond, guidance=2.0).at(torch.full((2,), 0.75))
    torch.testing.assert_close(states[:, 0], x, atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="not among the 4 steps"):
        PairCache(tmp_path / "other", teacher, PROMPTS, options(pair_steps=4), 5, times=(0.6,))
