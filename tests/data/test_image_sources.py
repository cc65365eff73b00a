"""One set of images through every container is one set of pixels; what is not used is named; damage is one line."""

from __future__ import annotations

import errno
import io
import os
import pickle
import shutil
import signal
import struct
import sys
import tarfile
import tracemalloc
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stepdistill.data import image_workers
from stepdistill.data.image_archives import is_source, open_images
from stepdistill.data.image_names import natural
from stepdistill.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve files, written last to first, two of them nested."""
    place = tmp_path / "images"
    (place / "sub").mkdir(parents=True)
    for i in reversed(range(12)):
        Image.fromarray(PIXELS[i]).save(place / ("sub" if i > 9 else ".") / f"s{i}.png")
    return place


def test_every_container_gives_the_same_pixels_in_the_order_of_the_names(
    folder: Path, tmp_path: Path
) -> None:
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*.png")}
    shuffled = sorted(files, reverse=True)
    with (
        zipfile.ZipFile(tmp_path / "x.zip", "w") as archive,
        tarfile.open(tmp_path / "x.tar", "w") as shard,
    ):
        for name in shuffled:
            archive.write(files[name], name)
            shard.add(files[name], name)
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as shard:
        for name in sorted(files, key=natural):
            shard.add(files[name], name)
    np.savez(tmp_path / "plain.npz", arr_0=PIXELS)
    np.savez_compressed(tmp_path / "small.npz", arr_0=PIXELS)
    paths = [folder, *(tmp_path / name for name in "x.zip x.tar x.tar.gz plain.npz small.npz".split())]
    given: list[Any] = [*paths, PIXELS, (Image.fromarray(image) for image in PIXELS)]
    hashes = set()
    for images in given:
        source = open_images(images)
        batches = list(source.batches(5))
        assert [len(batch) for batch in batches] == [5, 5, 2]
        found = np.concatenate([batch.permute(0, 2, 3, 1).numpy() for batch in batches])
        np.testing.assert_array_equal(found, PIXELS)
        assert source.used == 12 and not source.skipped and not source.converted
        hashes.add(source.pixels_sha256())
    assert len(hashes) == 1
    assert all(is_source(path) for path in paths) and not is_source(folder / "s0.png")
    assert [name for name, _ in open_images(folder)][9:] == ["s9.png", "sub/s10.png", "sub/s11.png"]


def deep_png(pixels: np.ndarray[Any, Any]) -> bytes:
    """A PNG of 16 bits a channel."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def test_unusual_files_are_converted_or_refused_by_name(tmp_path: Path) -> None:
    rgb, gray = Image.fromarray(PIXELS[0]), Image.fromarray(PIXELS[0, :, :, 0])
    rgb.save(tmp_path / "a_rgb.png")
    gray.save(tmp_path / "b_gray.png")
    rgb.convert("P").save(tmp_path / "c_palette.png")
    rgb.convert("CMYK").save(tmp_path / "d_cmyk.tif")
    rgb.convert("RGBA").save(tmp_path / "e_opaque.png")
    (tmp_path / "f_ppm.ppm").write_bytes(b"P6\n8 8\n255\n" + PIXELS[0].tobytes())
    holed = rgb.convert("RGBA")
    holed.putpixel((0, 0), (1, 2, 3, 0))
    holed.save(tmp_path / "transparent.png")
    for ending in ("gif", "png", "webp"):
        rgb.save(tmp_path / f"animated.{ending}", save_all=True, append_images=[Image.fromarray(PIXELS[1])])
    Image.fromarray(PIXELS[0, :, :, 0].astype(np.uint16) * 257).save(tmp_path / "deep_gray.png")
    (tmp_path / "deep_rgb.png").write_bytes(deep_png(PIXELS[0].astype(np.uint16) * 257))
    (tmp_path / "deep.ppm").write_bytes(b"P6\n8 8\n65535\n" + (PIXELS[0].astype(">u2") * 257).tobytes())
    Image.fromarray(PIXELS[0, :, :, 0] / np.float32(255)).save(tmp_path / "float.tif")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a_rgb.png").read_bytes()[:90])
    (tmp_path / "program.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")  # would run gs
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("not an image")
    source = open_images(tmp_path)
    found = dict(source)
    assert sorted(found) == "a_rgb.png b_gray.png c_palette.png d_cmyk.tif e_opaque.png f_ppm.ppm".split()
    for name in ("a_rgb.png", "d_cmyk.tif", "e_opaque.png", "f_ppm.ppm"):
        np.testing.assert_array_equal(found[name], PIXELS[0])
    np.testing.assert_array_equal(found["b_gray.png"], PIXELS[0, :, :, :1].repeat(3, 2))
    assert dict(source.converted) == {
        "grayscale to RGB": 1,
        "palette to RGB": 1,
        "CMYK to RGB": 1,
        "opaque alpha dropped": 1,
    }
    reasons = dict(source.skipped)
    assert sorted(reasons) == sorted(
        "animated.gif animated.png animated.webp cut.png deep.ppm deep_gray.png deep_rgb.png empty.jpg float.tif "
        "notes.txt program.png transparent.png".split()
    )
    for name, reason in reasons.items():
        expected = {
            "animated": "animated",
            "deep": "not 8-bit",
            "float": "not 8-bit",
            "notes": "not an image",
        }
        expected["transparent"] = "transparent pixels"
        assert expected.get(name.split(".")[0].split("_")[0], "cannot be read") in reason
    assert len(source.skipped) == len(source.account()["skipped"]) == 12
    assert any("transparent.png: has transparent" in line for line in source.remarks(20))
    assert source.remarks(3)[-1] == "  and 9 more"


def test_processes_give_what_threads_give(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what is refused, in place; a zip and a tar are opened by each process, and by a spawned one, too."""
    (folder / "s5.png").write_bytes((folder / "s4.png").read_bytes()[:90])
    Image.new("L", (12, 16), 7).save(folder / "s7.png")
    with (
        zipfile.ZipFile(tmp_path / "x.zip", "w") as archive,
        tarfile.open(tmp_path / "x.tar", "w") as shard,
    ):
        for file in folder.rglob("*.png"):
            archive.write(file, file.relative_to(folder))
            shard.add(file, file.relative_to(folder))
    monkeypatch.setattr(image_workers, "CHUNK", 8)  # two files a chunk
    drawn = torch.random.get_rng_state()
    for place in (folder, tmp_path / "x.zip", tmp_path / "x.tar"):
        plain, source = (open_images(place, workers=workers) for workers in (0, 2))
        again = [pickle.loads(pickle.dumps(entry)) for entry in source._open.args[0]]  # type: ignore[attr-defined]
        assert [entry.read() for entry in again] == [entry.read() for entry in plain._open.args[0]]  # type: ignore[attr-defined]
        for ours, theirs in zip(source.numbered(5), plain.numbered(5), strict=True):
            assert ours[0] == theirs[0] and torch.equal(ours[1], theirs[1])
        assert source.account() == plain.account() and source.used == 11
        assert [skipped.name for skipped in source.skipped] == ["s5.png"]
    assert torch.equal(torch.random.get_rng_state(), drawn)


def test_a_decoder_that_was_ended_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_workers, "decode", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match=r"^a process that decodes images ended .*: give --workers 0"):
        list(open_images(folder, workers=1))


@pytest.mark.parametrize("workers", [0, 1])
def test_what_the_system_cannot_read_now_is_no_skipped_image(
    folder: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache would lack it for good."""

    def failing(path: Path) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(UserError, match=r"^\S+ cannot be read now: Too many open files$"):
        list(open_images(folder, workers=workers))


def test_processes_decode_where_there_are_many_images_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16), raising=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1 << 40}))
    assert image_workers.usual_workers(1000) == 14 and image_workers.usual_workers(999) == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # of two processes on the machine each has half of it
    assert image_workers.usual_workers(1000) == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 64 << 20}))
    assert image_workers.usual_workers(1000) == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    assert image_workers.usual_workers(10**6) == 0


def test_other_sizes_are_given_at_the_resolution_or_each_at_its_own(tmp_path: Path) -> None:
    for i, size in enumerate([(8, 8), (8, 8), (12, 8), (16, 16)]):
        Image.new("RGB", size, (i, 2 * i, 3 * i)).save(tmp_path / f"{i}.png")
    own = open_images(tmp_path)
    assert [tuple(batch.shape) for batch in own.batches(10)] == [(2, 3, 8, 8), (1, 3, 8, 12), (1, 3, 16, 16)]
    for i in range(4, 12):  # sizes that alternate
        Image.new("RGB", (8 + 8 * (i % 2), 8), (i, 2 * i, 3 * i)).save(tmp_path / f"{i}.png")
    assert len(list(open_images(tmp_path).batches(10))) == 11
    collected = list(open_images(tmp_path).batches(4, ordered=False))
    assert sorted(len(batch) for batch in collected) == [1, 1, 2, 4, 4]
    whole = sorted(int(value) for batch in collected for value in batch[:, 0, 0, 0])
    assert whole == list(range(12))
    for i in range(4, 12):
        (tmp_path / f"{i}.png").unlink()
    same = open_images(tmp_path, resolution=8)
    (batch,) = same.batches(10)
    assert tuple(batch.shape) == (4, 3, 8, 8) and batch[:, :, 4, 4].tolist() == [
        [i, 2 * i, 3 * i] for i in range(4)
    ]
    assert dict(same.converted) == {"cropped and resized to 8x8 (Lanczos)": 2}
    assert same.pixels_sha256() != own.pixels_sha256()


def test_a_webdataset_shard_counts_the_other_fields_of_its_samples(tmp_path: Path) -> None:
    def add(shard: tarfile.TarFile, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        shard.addfile(info, io.BytesIO(data))

    stream = io.BytesIO()
    Image.fromarray(PIXELS[0]).save(stream, "PNG")
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        for key in ("b/001", "b/000"):
            add(shard, f"{key}.png", stream.getvalue())
            add(shard, f"{key}.seg.png", stream.getvalue())
            add(shard, f"{key}.txt", b"a caption")
        add(shard, "b/002.cls", b"7")
    source = open_images(tmp_path / "shard.tar")
    assert [name for name, _ in source] == ["b/000.png", "b/001.png"] and source.found == 2
    assert dict(source.companions) == {"txt": 2}
    assert [skipped.name for skipped in source.skipped] == ["b/000.seg.png", "b/001.seg.png", "b/002.cls"]


def test_damage_is_one_line(folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "whole.npz", arr_0=PIXELS)
    np.savez(tmp_path / "float.npz", arr_0=PIXELS / np.float32(255))
    np.savez(tmp_path / "objects.npz", arr_0=np.array([{}], dtype=object))
    np.savez(tmp_path / "moments.npz", mu=PIXELS)
    whole = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:700])
    (tmp_path / "flipped.npz").write_bytes(whole[:700] + bytes([whole[700] ^ 1]) + whole[701:])
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive:  # a whole zip around a shortened array
        archive.writestr("arr_0.npy", zipfile.ZipFile(tmp_path / "whole.npz").read("arr_0.npy")[:-5])
    with tarfile.open(tmp_path / "backwards.tar.gz", "w:gz") as shard:
        for name in ("s1.png", "s0.png"):
            shard.add(folder / name, name)
    with tarfile.open(tmp_path / "whole.tar", "w") as shard:
        shard.add(folder / "s0.png", "s0.png")
    (tmp_path / "cut.tar").write_bytes((tmp_path / "whole.tar").read_bytes()[:600])
    (tmp_path / "text.zip").write_text("no zip")
    (tmp_path / "empty").mkdir()
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "model.bin").write_bytes(b"x")
    says: dict[Any, str] = {
        "cut.npz": "cut.npz is damaged, cut off",
        "flipped.npz": "flipped.npz is damaged",
        "short.npz": "arr_0 ends in image 11 of 12",
        "float.npz": "arr_0 is float32",
        "objects.npz": "arr_0 is object",
        "moments.npz": "holds mu; images are arr_0",
        "backwards.tar.gz": "not in the order of their names",
        "cut.tar": "is damaged, cut off",
        "text.zip": "is damaged, cut off",
        "empty": "holds no images: it is empty",
        "others": "only 1 other files (model.bin, ...)",
        "nowhere": "do not exist",
        "images/s0.png": "is one file",
    }
    for name, text in says.items():
        with pytest.raises(UserError) as caught:
            list(open_images(tmp_path / name))
        assert text in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"image 1 is float64 \[8, 8, 3\] with NaN"):
        list(open_images([PIXELS[0], np.full((8, 8, 3), np.nan)]))
    with pytest.raises(UserError, match="image 0 is a str"):
        list(open_images(["a.png"]))
    with zipfile.ZipFile(tmp_path / "one_bad.zip", "w") as archive:
        for i in range(3):
            archive.write(folder / f"s{i}.png", f"{i}.png")
        offset = archive.getinfo("1.png").header_offset + 90
    data = bytearray((tmp_path / "one_bad.zip").read_bytes())
    data[offset] ^= 1
    (tmp_path / "one_bad.zip").write_bytes(data)
    source = open_images(tmp_path / "one_bad.zip")
    assert [name for name, _ in source] == ["0.png", "2.png"] and source.skipped[0].name == "1.png"
    with pytest.raises(UserError, match="were read already"):
        list(source)


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    """Of 100 and of 400 images of 48 KiB each, in an npz and in a zip, a few dozen are held."""

    def peak(path: Path) -> int:
        tracemalloc.start()
        for _ in open_images(path).batches(8):
            pass
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    stream = io.BytesIO()
    Image.new("RGB", (128, 128)).save(stream, "BMP")
    for n in (100, 400):
        np.savez(tmp_path / f"{n}.npz", arr_0=np.zeros((n, 128, 128, 3), np.uint8))
        with zipfile.ZipFile(tmp_path / f"{n}.zip", "w") as archive:
            for i in range(n):
                archive.writestr(f"{i}.bmp", stream.getvalue())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in ("npz", "zip"):
            few, many = peak(tmp_path / f"100.{kind}"), peak(tmp_path / f"400.{kind}")
            assert many < 1.3 * few + 500_000 and many < 100 * 128 * 128 * 3
