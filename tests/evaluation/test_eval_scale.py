"""An evaluation in parts: one number whatever the batches, the processes, the order of files, and a kill in between."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from stepdistill.errors import OtherProcessError, UserError
from stepdistill.evaluation import shards as shards_module
from stepdistill.evaluation.draw_shards import draw_shards
from stepdistill.evaluation.drawing import Drawing
from stepdistill.evaluation.evaluate import evaluate
from stepdistill.evaluation.extraction import Extraction
from stepdistill.evaluation.gallery import best, load_galleries, load_gallery, make_gallery, small, worst
from stepdistill.evaluation.given_images import evaluate_images, score_images
from stepdistill.evaluation.measure import measure
from stepdistill.evaluation.parts import Work
from stepdistill.evaluation.reference import load_reference
from stepdistill.evaluation.shards import Cost, Shards, ShardWriter, claim
from stepdistill.evaluation.suite import Suite, load_suite
from stepdistill.networks.loading import load_pipeline
from stepdistill.system.emoji import emoji_images, teacher_folder
from stepdistill.system.prefetch import ahead
from stepdistill.system.processes import Processes

ROOT = Path(__file__).resolve().parents[2]
TIMES = {"seconds_per_image", "images_per_second", "peak_memory_bytes"}


@pytest.fixture(scope="module")
def teacher() -> Any:
    return load_pipeline(teacher_folder("emoji"), "cpu")[0]


def tiny(**changes: Any) -> Suite:
    return load_suite("emoji-quick").model_copy(update={"n": 22, **changes})


def numbers(scores: Any) -> dict[str, Any]:
    return {name: value for name, value in asdict(scores).items() if name not in TIMES}


# Ahead.


def test_items_come_in_order_and_an_error_after_those_before_it() -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise KeyError("the sixth")

    for depth in (0, 1, 3):
        seen: list[int] = []
        with pytest.raises(KeyError, match="the sixth"):
            for item in ahead(items(), depth):
                seen.append(item)
        assert seen == list(range(5))


def test_the_next_item_is_made_while_the_present_one_is_used_and_no_more_than_the_depth() -> None:
    made: list[int] = []
    third = threading.Event()

    def items() -> Iterator[int]:
        for item in range(100):
            made.append(item)
            if item == 2:
                third.set()
            yield item

    found = ahead(items(), depth=1)
    assert next(found) == 0
    assert third.wait(10)  # while the first is in use, the second waits and the third is made
    threading.Event().wait(0.05)
    assert made == [0, 1, 2]
    found.close()


def test_stopping_early_closes_the_iterator_and_ends_the_thread() -> None:
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            closed.set()

    before = threading.active_count()
    found = ahead(items())
    assert next(found) == 0
    found.close()
    assert closed.is_set() and threading.active_count() == before


# Shards.


def rows_of_real_images(count: int) -> dict[str, Tensor]:
    network = load_suite("emoji").network()
    pixels = torch.from_numpy(emoji_images()[:count]).permute(0, 3, 1, 2)
    return {"features": network.images(pixels), "clip_score": torch.linspace(0.1, 0.9, count)}


def test_scores_of_equal_rows_do_not_depend_on_batches_or_on_the_order_they_come_in(tmp_path: Path) -> None:
    suite, rows = tiny(), rows_of_real_images(61)
    network = suite.network()
    reference = load_reference(suite, network)
    found = []
    for batch, size, shuffled in ((61, 500, False), (7, 16, False), (3, 7, True)):
        writer = ShardWriter(tmp_path / f"{batch}-{size}", size)
        parts = list(torch.arange(61).split(batch))
        if shuffled:
            parts = [parts[i] for i in torch.randperm(len(parts), generator=torch.Generator().manual_seed(0))]
        for part in parts:
            writer.add({name: value[part] for name, value in rows.items()}, part.tolist())
        table = writer.table()
        assert table.count == 61 and torch.equal(table.whole("features"), rows["features"])
        assert "clip_score" in table and "logits" not in table
        scores = measure(table, suite, network, reference).values()
        found.append({name: value for name, value in scores.items() if value is not None})
    assert {"fd", "fd_se", "kid", "clip_score", "recall", "coverage"} <= set(found[0])
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-10, abs=1e-10)


def drawn_by(
    ranks: int, folder: Path, pipe: Any, suite: Suite, extraction: Extraction
) -> tuple[Shards, list[int]]:
    shards, drawn = Shards(folder, suite.n, size=5), []
    for rank in range(ranks):
        own = list(range(len(shards.ranges)))[rank::ranks]
        drawing = Drawing(pipe, suite, suite.prompt_list(), None, False)
        draw_shards(
            shards,
            own,
            drawing,
            extraction,
            suite.prompt_list(),
            steps=1,
            batch=3,
            side=16,
            device=torch.device("cpu"),
            processes=ranks,
        )
        drawn.append(len(own))
    return shards, drawn


def test_one_two_and_three_processes_with_uneven_shards_give_one_number_and_one_gallery(
    teacher: Any, tmp_path: Path
) -> None:
    suite = tiny()  # shards of 5, 5, 5, 5 and 2
    extraction = Extraction(suite)
    reference = load_reference(suite, extraction.network)
    scores, galleries, shares = [], [], []
    for ranks in (1, 2, 3):
        shards, drawn = drawn_by(ranks, tmp_path / str(ranks), teacher, suite, extraction)
        shares.append(drawn)
        assert shards.missing() == [] and shards.cost().passes == 22
        scores.append(measure(shards, suite, extraction.network, reference).values())
        galleries.append(make_gallery(shards, shards.pictures(), suite.prompt_list()))
    assert shares == [[5], [3, 2], [2, 2, 1]]
    assert scores[1] == scores[0] and scores[2] == scores[0]
    one = galleries[0]
    assert one.pixels.shape == (22, 3, 16, 16) and one.prompts == tuple(suite.prompt_list() or [])
    clip = dict(enumerate(shards.whole("clip_score").tolist()))
    assert [picture.index for picture in one.best] == best(clip)
    assert [picture.index for picture in one.worst] == worst(clip)
    for picture in (*one.best, *one.worst):
        assert torch.equal(picture.pixels, one.pixels[picture.index])
        assert picture.prompt == (suite.prompt_list() or [])[picture.index]
    for other in galleries[1:]:
        assert torch.equal(other.pixels, one.pixels) and torch.equal(other.features, one.features)
        assert [(p.index, p.score) for p in other.worst] == [(p.index, p.score) for p in one.worst]
    one.save(tmp_path / "gallery.safetensors")
    back = load_gallery(tmp_path / "gallery.safetensors")
    assert torch.equal(back.pixels, one.pixels) and back.prompts == one.prompts
    assert [(p.index, p.prompt, p.score) for p in back.best] == [
        (p.index, p.prompt, p.score) for p in one.best
    ]


def test_of_more_processes_than_shards_only_those_that_draw_count(
    teacher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "SIZE", 5)
    work = Work(teacher, tiny(), "cpu", None, False, None)
    parts = [work.parts(tmp_path, [1], Processes(rank, 8), keyed=False)[0] for rank in range(8)]
    assert [list(part.own_images) for part in parts] == [[0], [1], [2], [3], [4], [], [], []]
    assert {part.at_once for part in parts} == {5}  # images per second are of these


def test_a_gallery_keeps_squares_of_one_size() -> None:
    wide = torch.zeros(1, 3, 10, 30, dtype=torch.uint8)
    wide[..., 10:20] = 200
    assert torch.equal(small(wide, 10), torch.full((1, 3, 10, 10), 200, dtype=torch.uint8))
    assert small(wide, 5).unique().tolist() == [200] and small(wide, 20).shape == (1, 3, 20, 20)


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_from_its_shards(
    teacher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "SIZE", 5)
    suite, passes = tiny(diversity=2, diversity_prompts=3), list[int]()

    def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        passes.append(len(args[0]))
        if not whole and sum(passes) > 12:
            raise MemoryError("killed")

    whole = False
    hook = teacher.unet.register_forward_pre_hook(count, with_kwargs=True)
    try:
        with pytest.raises(MemoryError):
            evaluate(teacher, suite, steps=1, batch=3, progress=False, output=tmp_path / "cut")
        assert len(list((tmp_path / "cut").rglob("images_*.safetensors"))) == 2
        assert not list((tmp_path / "cut").glob("report*"))
        whole = True
        passes.clear()
        cut = evaluate(teacher, suite, steps=1, batch=3, progress=False, output=tmp_path / "cut")
        assert sum(passes) == 12 + 6  # two shards of five were there; the samples of diversity were not
        passes.clear()
        again = evaluate(teacher, suite, steps=1, batch=3, progress=False, output=tmp_path / "cut")
        assert passes == [] and again.scores == cut.scores  # also what drawing cost is kept
        plain = evaluate(teacher, suite, steps=1, batch=3, progress=False)
    finally:
        hook.remove()
    assert numbers(cut.scores[1]) == numbers(plain.scores[1])
    scores = cut.scores[1]
    assert scores.network_evaluations == 1 and scores.seconds_per_image > 0
    assert scores.images_per_second == pytest.approx(1 / scores.seconds_per_image)
    assert scores.peak_memory_bytes is not None and scores.peak_memory_bytes > 1 << 26
    made = {file.name for file in (tmp_path / "cut").iterdir()}
    assert made == {"report.json", "report.md", "report.html", "steps_1"}
    assert json.loads((tmp_path / "cut" / "report.json").read_text())["scores"]["1"]["fd"] == scores.fd
    gallery = load_galleries(tmp_path / "cut")[1]
    assert gallery.pixels.shape == (22, 3, 32, 32) and gallery.features.shape == (22, 64)
    shard = tmp_path / "cut" / "steps_1" / "images_000005.safetensors"
    with pytest.raises(UserError, match=r"of other guidance \(1\.0 there, 2\.0 here\)"):
        evaluate(teacher, suite, steps=1, guidance=2.0, progress=False, output=tmp_path / "cut")
    report = (tmp_path / "cut" / "report.json").read_text()
    with pytest.raises(UserError, match=r"steps_1 holds the rows of another evaluation, of other guidance"):
        evaluate(teacher, suite, steps=2, guidance=2.0, progress=False, output=tmp_path / "cut")
    assert (tmp_path / "cut" / "report.json").read_text() == report
    kept = shard.read_bytes()
    for damage in (kept[:-9], kept[:-1] + bytes([kept[-1] ^ 1]), b"", b"no header at all"):
        shard.write_bytes(damage)
        with pytest.raises(UserError, match=r"images_000005\.safetensors is damaged .*: remove it"):
            evaluate(teacher, suite, steps=1, progress=False, output=tmp_path / "cut")
        assert shard.read_bytes() == damage  # nothing was redrawn


def test_a_shard_of_other_images_and_shards_without_a_manifest_are_refused(tmp_path: Path) -> None:
    shards = Shards(tmp_path, 10, size=5)
    for shard in (0, 1):
        shards.write(shard, {"features": torch.zeros(5, 2)}, Cost())
    shards.check()
    shutil.copy(shards.file(1), shards.file(0))
    with pytest.raises(
        UserError, match=r"images_000000\.safetensors is damaged \(not the rows of images 0 to 4\)"
    ):
        shards.check()
    with pytest.raises(UserError, match=r"holds shards without manifest\.json"):
        claim(tmp_path, {"n": 10})
    with pytest.raises(FileNotFoundError):  # a temporary folder that the main process has removed
        Shards(tmp_path / "gone" / "steps_1", 5).write(0, {"features": torch.zeros(5, 2)}, Cost())
    assert not (tmp_path / "gone").exists()
    claim(tmp_path / "own", {"n": 10})
    claim(tmp_path / "own", {"n": 10})
    with pytest.raises(UserError, match=r"other n \(10 there, 11 here\), eta \(null there, 0\.5 here\)"):
        claim(tmp_path / "own", {"n": 11, "eta": 0.5})
    (tmp_path / "own" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        claim(tmp_path / "own", {"n": 10})


# Images that are there.


def save_images(folder: Path, order: list[int], sizes: tuple[int, ...] = (32,)) -> None:
    folder.mkdir()
    images = emoji_images()
    for name, index in enumerate(order):
        size = sizes[index % len(sizes)]
        Image.fromarray(images[index]).resize((size, size)).save(folder / f"{name}.png")


def test_the_order_of_files_and_the_batch_move_no_score(tmp_path: Path) -> None:
    suite = tiny(n=0, prompts=None, clip_score=False)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1)).tolist()
    save_images(tmp_path / "a", list(range(40)))
    save_images(tmp_path / "b", order)
    one = evaluate_images(tmp_path / "a", suite, batch=40, progress=False, output=tmp_path / "out").scores[0]
    other = evaluate_images(tmp_path / "b", suite, batch=40, progress=False).scores[0]
    for name in ("fd", "kid", "kid_se", "precision", "recall", "density", "coverage"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-7, abs=1e-10), name
    gallery = load_galleries(tmp_path / "out")[0]
    pixels = torch.from_numpy(emoji_images()[:40]).permute(0, 3, 1, 2)
    assert torch.equal(gallery.pixels, pixels) and gallery.prompts is None
    assert (tmp_path / "out" / "report.html").is_file()
    alone = score_images(pixels.split(40), None, suite)
    assert asdict(alone) == {name: getattr(one, name) for name in asdict(alone)}
    (tmp_path / "drawn" / "steps_4").mkdir(parents=True)
    (tmp_path / "drawn" / "steps_4" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="holds the evaluation of a pipeline"):
        evaluate_images(tmp_path / "a", suite, progress=False, output=tmp_path / "drawn")


def test_images_of_alternating_sizes_keep_their_order(tmp_path: Path) -> None:
    from stepdistill.data.image_archives import open_images

    save_images(tmp_path / "a", list(range(30)), sizes=(32, 24, 32, 16, 32))
    for batch in (1, 2, 4):
        places, behind = list[int](), 0
        for some, pixels in open_images(tmp_path / "a").numbered(batch, ordered=False):
            assert len(some) == len(pixels) <= batch
            behind = max([behind, *(max(places, default=0) - place for place in some)])
            places += some
        assert sorted(places) == list(range(30)) and behind <= 5 * batch


# Processes.


def test_what_fails_in_one_process_ends_the_others_with_one_message(tmp_path: Path) -> None:
    first, second, third = (Processes(rank, 3) for rank in range(3))
    first.go_on(tmp_path)
    with pytest.raises(UserError, match="no such thing"), second.sharing(tmp_path):
        raise UserError("no such thing")
    with pytest.raises(OtherProcessError, match="process 1 ended: no such thing"):
        first.wait_until(lambda: False, tmp_path)
    with pytest.raises(OtherProcessError, match="process 1 ended"), third.sharing(tmp_path):
        raise UserError("no such thing either")
    with pytest.raises(OtherProcessError, match="another process ended"):
        first.go_on(tmp_path / "gone")


LAUNCHED = """
import json, sys, torch
from pathlib import Path
from stepdistill.evaluation import shards
shards.SIZE = 5
from stepdistill.cli import main
from stepdistill.evaluation.evaluate import evaluate
from stepdistill.system.processes import PATIENCE, launched
processes = launched()
group = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
assert group.options._timeout == PATIENCE, group.options._timeout
out = Path(sys.argv[1])
sys.argv = ["stepdistill", "eval", "emoji", "--suite", sys.argv[2], "--steps", "1", "--output", str(out)]
processes.gather(None)  # all are here
if processes.main:  # as a training does at its end: the others are elsewhere
    alone = evaluate("emoji", sys.argv[4], steps=1, progress=False, device="cpu")
    (out.parent / "alone.json").write_text(json.dumps(alone.to_dict()))
main()
"""


@pytest.mark.slow
def test_two_launched_processes_give_the_number_of_one(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(LAUNCHED)
    suite = ROOT / "eval" / "suites" / "emoji-quick.yaml"
    shorter = tmp_path / "short.yaml"
    shorter.write_text(suite.read_text().replace("n: 200", "n: 12"))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": str(ROOT),
    }
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    launch += [str(ROOT / "train" / "distributed" / "cpus.yaml"), "--main_process_port", "0"]
    arguments = [str(tmp_path / "script.py"), str(tmp_path / "out"), str(shorter)]
    done = subprocess.run(
        [*launch, *arguments], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| pipeline |") == 1  # the main process alone says it
    together = json.loads((tmp_path / "out" / "report.json").read_text())
    alone = json.loads((tmp_path / "alone.json").read_text())
    for name, value in alone["scores"]["1"].items():
        assert name in TIMES or together["scores"]["1"][name] == value, name
    assert len(list((tmp_path / "out" / "steps_1").glob("images_*"))) == 3
