"""The suites of the literature: they load, say what they need, and draw end to end; labels, sizes and prompt files."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_pipeline

from stepdistill.data.image_archives import open_images
from stepdistill.data.prompts import read_prompts
from stepdistill.diffusion.draws import generator_for
from stepdistill.errors import UserError
from stepdistill.evaluation.drawing import Drawing
from stepdistill.evaluation.evaluate import evaluate
from stepdistill.evaluation.reference import load_reference
from stepdistill.evaluation.statistics import make_statistics
from stepdistill.evaluation.suite import Suite, load_suite
from stepdistill.evaluation.suite_identity import suite_sha256
from stepdistill.features.inception_network import random_state
from stepdistill.features.load import load_features
from stepdistill.system.emoji import emoji_images, features_folder
from stepdistill.system.shipped import header, suite_files

CLASSES = ("cifar10-50k", "imagenet64-50k", "imagenet64-adm-50k", "imagenet256-50k")
LITERATURE = (*CLASSES, "ffhq64-50k", "coco30k", "mjhq30k")
SIZE = 16


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    made = {name: tiny_pipeline(name) for name in ("unet-ddpm", "unet-classes", "dit", "sd")}
    made["dit"].transformer.eval()  # as a loaded one is: in training it drops labels
    return made


def mine(**changes: Any) -> Suite:
    changes = {"prompts": None, "clip_score": False, "n": 7, "resolution": 32, **changes}
    return load_suite("emoji").changed(changes)


def test_every_shipped_suite_says_its_protocol_and_what_it_needs() -> None:
    assert set(suite_files()) == {
        "emoji",
        "emoji-quick",
        "emoji-rewards",
        "emoji-colours",
        "folder",
        *LITERATURE,
    }
    for name, file in suite_files().items():
        suite = load_suite(name)
        changed = ("emoji", "emoji-quick", "cifar10-50k", "imagenet64-adm-50k", "imagenet256-50k")
        assert (suite.name, suite.version) == (name, 2 if name in changed else 1)
        assert header(file).startswith("stepdistill eval ") and f"--suite {name}" in header(file)
        assert "Needs " in header(file)
        if name in LITERATURE:
            assert suite.features == "inception" and suite.source and "Protocol" in header(file).title()
            for given in (suite.reference, suite.prompts or "x"):
                assert Path(given).name == given, "a name, not a path of some machine"


def test_the_protocols_are_those_of_the_papers() -> None:
    table = {
        "cifar10-50k": (50_000, 32, "tf1", "uniform", 0, "cifar10-32x32.npz"),
        "ffhq64-50k": (50_000, 64, "tf1", "balanced", 0, "ffhq-64x64.npz"),
        "imagenet64-50k": (50_000, 64, "tf1", "uniform", 0, "imagenet-64x64.npz"),
        "imagenet64-adm-50k": (50_000, 64, "tf1", "uniform", 3, "VIRTUAL_imagenet64_labeled.npz"),
        "imagenet256-50k": (50_000, 256, "tf1", "uniform", 3, "VIRTUAL_imagenet256_labeled.npz"),
        "coco30k": (30_000, 256, "clean", "balanced", 0, "coco30k.safetensors"),
        "mjhq30k": (30_000, 1024, "clean", "balanced", 0, "mjhq30k.safetensors"),
    }
    for name, expected in table.items():
        s = load_suite(name)
        assert (s.n, s.resolution, s.resize, s.labels, s.neighbours, s.reference) == expected
        stated = s.reference_protocol
        if s.reference.endswith("npz"):
            assert stated is not None and (stated.resize, stated.resolution) == (s.resize, s.resolution)
    coco = load_suite("coco30k")
    assert (coco.draw_resolution, coco.clip_prefix) == ("own", "A photo depicts ")
    assert load_suite("imagenet256-50k").sfid and load_suite("imagenet256-50k").inception_score


@pytest.mark.parametrize("name", LITERATURE)
def test_every_suite_of_the_literature_draws_end_to_end(
    name: str, pipes: dict[str, Any], tmp_path: Path
) -> None:
    """At a smaller size and number, in the embedded network's features, against statistics that are made here."""
    suite = load_suite(name)
    real = tmp_path / "cache" / "reference" / "made.safetensors"
    network, texts = load_features("emoji"), suite.prompts is not None
    make_statistics(open_images(emoji_images()[:40], resolution=SIZE), network, real, resolution=SIZE)
    swapped: dict[str, Any] = {
        "features": "emoji",
        "resize": "clean",
        "inception_score": False,
        "sfid": False,
    }
    swapped |= {"reference": real.name, "reference_protocol": None, "n": 7, "resolution": SIZE}
    swapped |= {"draw_resolution": suite.draw_resolution or 32, "clip_network": None}
    if texts:
        prompts = tmp_path / "cache" / "prompts" / str(suite.prompts)
        prompts.parent.mkdir()
        rows = {str(i): {"category": "animals", "prompt": f"cat {i}"} for i in range(7)}
        lines = "\n".join(row["prompt"] for row in rows.values())
        prompts.write_text(json.dumps(rows) if prompts.suffix == ".json" else lines)
    pipe = pipes["sd" if texts else "unet-ddpm" if name.startswith("ffhq") else "dit"]
    report = evaluate(pipe, suite.changed(swapped), steps=1, batch=4, progress=False)
    scores = report.scores[1]
    assert report.suite == suite.label == f"{name}@{suite.version}" and scores.n == 7 and scores.fd > 0
    assert (scores.clip_score is not None) == suite.clip_score
    assert (scores.recall is not None) == (suite.neighbours > 0)


def test_labels_are_balanced_or_uniform_and_a_shorter_suite_begins_a_longer_one(
    pipes: dict[str, Any],
) -> None:
    for name, classes in (("dit", 1000), ("unet-classes", 10)):
        pipe, asked = pipes[name], list[int]()
        network = pipe.transformer if name == "dit" else pipe.unet

        def note(module: Any, args: Any, kwargs: Any, asked: list[int] = asked) -> None:
            asked.extend(kwargs["class_labels"].tolist())

        hook = network.register_forward_pre_hook(note, with_kwargs=True)
        sizes = {"resolution": 32 if name == "dit" else 8}
        uniform = torch.randint(classes, (20,), generator=generator_for("suite", "labels")).tolist()
        for labels, expected in (("balanced", [i % classes for i in range(12)]), ("uniform", uniform[:12])):
            asked.clear()
            drawing = Drawing(pipe, mine(labels=labels, n=12, **sizes), None, None, False)
            drawn = torch.cat(list(drawing.batches(1, 5)))
            assert asked == expected
            some = torch.cat(list(drawing.batches(1, 2, rows=[7, 3, 4])))
            assert (some.int() - drawn[[7, 3, 4]].int()).abs().max() <= 1
        hook.remove()
    assert (
        suite_sha256(mine(labels="uniform")) != suite_sha256(mine()) == suite_sha256(mine(labels="balanced"))
    )


def test_images_are_drawn_at_one_size_and_compared_at_another(pipes: dict[str, Any]) -> None:
    """By the function that fits images that are there already."""
    from PIL import ImageOps

    pipe = pipes["sd"]
    prompts = ["a cat"] * 3

    def drawn(**changes: Any) -> torch.Tensor:
        suite = mine(n=3, prompts="emoji", **changes)
        return torch.cat(list(Drawing(pipe, suite, prompts, None, False).batches(1, 3)))

    large = drawn(resolution=32)
    for own in ("own", 32):
        small = drawn(resolution=12, draw_resolution=own)
        for i in range(3):
            image = Image.fromarray(large[i].permute(1, 2, 0).numpy())
            fitted = np.asarray(ImageOps.fit(image, (12, 12), Image.Resampling.LANCZOS))
            np.testing.assert_array_equal(small[i].permute(1, 2, 0).numpy(), fitted)
    assert drawn(resolution=0, draw_resolution="own").shape == (3, 3, 32, 32)
    assert drawn(resolution=32, draw_resolution=16).shape == (3, 3, 32, 32)
    with pytest.raises(UserError, match="drew 8x8 pixels, suite emoji@2 compares 32x32"):
        list(Drawing(pipes["unet-ddpm"], mine(), None, None, False).batches(1, 3))
    with pytest.raises(UserError, match="draw_resolution"):
        mine(draw_resolution="large")


def test_a_pipeline_that_does_not_fit_its_suite_is_one_line_before_anything_is_drawn(
    pipes: dict[str, Any],
) -> None:
    from diffusers import DDPMPipeline

    with_prompts = mine(prompts="emoji")
    captions = with_prompts.prompt_list()
    for name, says in (("dit", "draws from 1000 class labels"), ("unet-ddpm", "draws without a condition")):
        for suite in (with_prompts, with_prompts.changed({"clip_score": True})):
            with pytest.raises(UserError, match=f"takes no prompts .it {says}.*suite emoji@2 has them"):
                Drawing(pipes[name], suite, captions, None, False)
    with pytest.raises(UserError, match=r"draws from prompts, suite emoji@2 has none.*--prompts"):
        Drawing(pipes["sd"], mine(), None, None, False)
    blind = DDPMPipeline(pipes["unet-classes"].unet, pipes["unet-classes"].scheduler)
    with pytest.raises(UserError, match="DDPMPipeline has 10 classes, which DDPMPipeline does not pass on"):
        Drawing(blind, mine(), None, None, False)


def test_a_missing_file_says_where_it_was_looked_for_and_where_it_comes_from(tmp_path: Path) -> None:
    for name in LITERATURE:
        suite = load_suite(name)
        calls = [suite.reference_file, *([suite.prompt_list] if suite.prompts else [])]
        for call, wanted in zip(calls, (suite.reference, suite.prompts), strict=False):
            with pytest.raises(UserError) as caught:
                call()
            text = str(caught.value)
            assert f"suite {suite.label}: no " in text and f" {wanted} in " in text and suite.source in text
            assert str(tmp_path / "cache") in text and "\n" not in text
    shelf = tmp_path / "cache" / "reference"
    shelf.mkdir(parents=True)
    (shelf / "cifar10-32x32.npz").write_bytes(b"x")
    assert load_suite("cifar10-50k").reference_file() == shelf / "cifar10-32x32.npz"
    with pytest.raises(UserError, match=r"no reference statistics /nowhere\.npz; make"):
        mine(reference="/nowhere.npz").reference_file()


def test_a_derived_suite_says_in_its_label_what_differs(tmp_path: Path) -> None:
    whole, file = load_suite("emoji"), tmp_path / "mine.txt"
    file.write_text("a cat\na dog\n")
    few = whole.derive(n=500)
    assert few.label == "emoji@2+n=500" and suite_sha256(few) != suite_sha256(whole)
    assert (
        suite_sha256(few) == suite_sha256(whole.changed({"n": 500}))
        and few.changed({"kid": False}).label == few.label
    )
    other = whole.derive(n=3, prompts=file)
    assert other.label == "emoji@2+prompts=mine.txt+n=3" and set(other.prompt_list() or []) == {
        "a cat",
        "a dog",
    }
    assert whole.derive(n=2000) == whole == whole.derive()
    (tmp_path / "elsewhere").mkdir()
    copy = tmp_path / "elsewhere" / "mine.txt"
    copy.write_bytes(file.read_bytes())
    assert suite_sha256(whole.derive(prompts=copy)) == suite_sha256(
        whole.derive(prompts=file)
    )  # the content counts
    for place in ("a", "b"):
        shutil.copytree(features_folder(), tmp_path / place)
    by_place = [suite_sha256(whole.changed({"features": f"clip:{tmp_path / place}"})) for place in ("a", "b")]
    assert by_place[0] == by_place[1] != suite_sha256(whole)
    with pytest.raises(UserError, match=r"--prompts gone\.txt not found"):
        whole.derive(prompts=Path("gone.txt"))
    with pytest.raises(UserError, match="clip_score needs n"):
        whole.derive(n=0)
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: x\nderived: [n=1]\n")
    with pytest.raises(UserError, match="a suite is a table of"):
        load_suite(bad)


PROMPTS = ["a cat", "two, dogs", 'a "red" kite', "ein Bär"]


def write(folder: Path, name: str) -> Path:
    """PROMPTS as a file of that ending."""
    file = folder / name
    if name.endswith(".tar"):
        members: list[tuple[str, bytes]] = []
        for i in (2, 10, 0, 1):  # 10 stands for 3: numbers count as numbers
            text = PROMPTS[min(i, 3)]
            member, data = (f"s/{i}.json", json.dumps({"caption": text})) if i % 2 else (f"s/{i}.txt", text)
            members += [(member, data.encode()), (f"s/{i}.jpg", b"no matter")]
        shard(file, *members)
        return file
    quoted = ['"' + prompt.replace('"', '""') + '"' for prompt in PROMPTS]
    content = {
        "p.txt": "\n\n".join(PROMPTS),
        "p.jsonl": "\n".join(json.dumps({"tag": "x", "prompt": prompt}) for prompt in PROMPTS),
        "p.json": json.dumps([*PROMPTS[:2], {"text": PROMPTS[2]}, {"caption": PROMPTS[3]}]),
        "p.csv": "id,caption\n" + "".join(f"{i},{text}\n" for i, text in enumerate(quoted)),
        "p.tsv": "prompt\tid\n" + "".join(f"{text}\t{i}\n" for i, text in enumerate(quoted)),
    }
    file.write_text(content[name], encoding="utf-8")
    return file


def shard(file: Path, *members: tuple[str, bytes]) -> Path:
    """A tar of these files in this order."""
    with tarfile.open(file, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file


def test_the_text_of_a_sample_counts_before_its_table_and_files_of_macos_do_not(tmp_path: Path) -> None:
    """Whatever the order in the archive, as names are in order in one and shuffled in another."""
    table, text = ("0.json", b'{"url": "u", "width": 512}'), ("0.txt", b"\xef\xbb\xbfred")
    for members in ((table, text), (text, table), (("._0.jpg", b"x"), ("__MACOSX/0.jpg", b"x"), text)):
        assert read_prompts(shard(tmp_path / "s.tar", ("0.jpg", b"x"), *members)) == ["red"]
    with pytest.raises(UserError, match=r"0\.json has no text under .*it has url, width"):
        read_prompts(shard(tmp_path / "s.tar", table))
    with pytest.raises(UserError, match=r"s\.tar: 0\.txt is not UTF-8 text .*byte 3"):
        read_prompts(shard(tmp_path / "s.tar", ("0.txt", b"caf\xe9")))


def test_names_of_columns_and_keys_count_without_case(tmp_path: Path) -> None:
    """As PartiPrompts.tsv has them."""
    (tmp_path / "parti.tsv").write_text("Prompt\tCategory\nbond\tAbstract\n")
    (tmp_path / "a.csv").write_text("id, TEXT\n0,bond\n")
    (tmp_path / "b.jsonl").write_text('{"Caption": "bond"}\n')
    assert all(read_prompts(tmp_path / name) == ["bond"] for name in ("parti.tsv", "a.csv", "b.jsonl"))


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.json", "p.csv", "p.tsv", "p.tar"])
def test_prompts_are_read_from_every_kind_of_file(name: str, tmp_path: Path) -> None:
    file = write(tmp_path, name)
    assert read_prompts(file) == PROMPTS
    assert mine(prompts=str(file), selection="first", n=5).prompt_list() == [*PROMPTS, PROMPTS[0]]


def test_a_prompt_file_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    broken = {
        "a.jsonl": ('{"prompt": "x"}\n{"prompt"', "line 2 is not JSON"),
        "b.jsonl": (
            '{"prompt": "x"}\n{"tag": 1}',
            r"line 2 has no text under prompt, caption, text \(it has tag",
        ),
        "c.json": ('{"7": {"prompt": 3}}', "entry 7: prompt is 3, not a text"),
        "d.json": ("[", "cannot be read"),
        "e.csv": ("id,name\n1,x\n", "line 2 has no text .*it has id, name"),
        "f.csv": ("prompt\n", "holds no prompt"),
        "g.txt": ("\n \n", "holds no prompt"),
        "h.tar": ("no archive", "cannot be read"),
        "i.json": ("3", "is neither a list nor a table"),
        "k.jsonl": ('{"caption": ["a", "b"]}', "line 1: caption is a list of 2: give each text a row"),
        "l.jsonl": ('{"caption": null}', "line 1: caption is empty, not a text"),
        "m.txt": ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run git lfs pull"),
    }
    for name, (text, says) in broken.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=f"^data.prompts: .*{name}.*{says}") as caught:
            read_prompts(tmp_path / name)
        assert "\n" not in str(caught.value)
    with tarfile.open(tmp_path / "j.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("s/0.jpg"), io.BytesIO())
    with pytest.raises(UserError, match=r"sample s/0 has neither s/0\.txt nor s/0\.json"):
        read_prompts(tmp_path / "j.tar")


@pytest.mark.slow
def test_imagenet256_computes_all_that_it_names_from_a_file_as_adm_makes_it(
    pipes: dict[str, Any], tmp_path: Path
) -> None:
    """Inception of fixed random weights; five images as ``arr_0`` and moments of both layers, in ADM's names."""
    weights, shelf = tmp_path / "random.pth", tmp_path / "cache" / "reference"
    torch.save(random_state(), weights)
    shelf.mkdir(parents=True)
    suite = load_suite("imagenet256-50k")
    np.savez(
        shelf / suite.reference,
        arr_0=emoji_images()[:5],
        mu=np.zeros(2048),
        sigma=np.eye(2048),
        mu_s=np.zeros(2023),
        sigma_s=np.eye(2023),
    )
    stated = {"features": "inception", "resize": "tf1", "resolution": 32}
    small = suite.changed(
        {"features": f"inception:{weights}", "resolution": 32, "n": 10, "reference_protocol": stated}
    )
    report = evaluate(pipes["dit"], small, steps=1, progress=False)
    found = report.scores[1]
    numbers = (found.fd, found.sfid, found.inception_score, found.precision, found.recall)
    assert all(number is not None and np.isfinite(number) for number in numbers)
    assert found.fd > 0 and (found.sfid or 0) > 0 and (found.inception_score or 0) >= 1
    assert found.kid is None and found.clip_score is None
    with pytest.raises(UserError, match="was made with resolution 256, the suite has 32"):
        load_reference(suite.changed({"features": small.features, "resolution": 32}), small.network())
