"""Suites, drawing, scores and the teacher cache, on the embedded teacher and on tiny pipelines of other kinds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from stepdistill.errors import UserError
from stepdistill.evaluation import teacher_scores as teacher_cache
from stepdistill.evaluation.drawing import Drawing, trailing
from stepdistill.evaluation.evaluate import evaluate
from stepdistill.evaluation.given_images import score_images
from stepdistill.evaluation.reference import load_reference
from stepdistill.evaluation.scores import Scores
from stepdistill.evaluation.statistics import make_reference
from stepdistill.evaluation.suite import Suite, load_suite
from stepdistill.evaluation.suite_identity import protocol_of, suite_sha256
from stepdistill.evaluation.teacher_scores import gap_closed, teacher_scores
from stepdistill.features.load import features_sha256, load_features
from stepdistill.networks.find import find_pipeline
from stepdistill.networks.fingerprint import weights_hash
from stepdistill.networks.loading import load_pipeline
from stepdistill.system.emoji import (
    emoji_captions,
    emoji_images,
    features_folder,
    teacher_folder,
    tokenizer_folder,
)


@pytest.fixture(scope="module")
def teacher() -> Any:
    return load_pipeline(teacher_folder("emoji"), "cpu")[0]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))


def tiny(**changes: Any) -> Suite:
    return load_suite("emoji-quick").model_copy(update={"n": 7, **changes})


def test_shipped_suites_parse_and_their_prompts_are_pinned() -> None:
    emoji, quick = load_suite("emoji"), load_suite("emoji-quick")
    assert (emoji.label, emoji.n, emoji.resolution, emoji.teacher_steps) == ("emoji@2", 2000, 32, 25)
    prompts = emoji.prompt_list()
    assert prompts is not None and len(prompts) == 2000 and prompts[:200] == quick.prompt_list()
    assert len(set(prompts)) > 1990 and set(prompts) <= set(emoji_captions())
    assert prompts[:3] == PINNED, "another torch.randperm: raise the suite's version"


PINNED = ["white medium star", "notebook", "circus tent"]


def test_suite_hash_moves_with_the_protocol_and_not_with_the_place(tmp_path: Path) -> None:
    suite = load_suite("emoji")
    copy = tmp_path / "emoji.yaml"
    shutil.copy(suite.folder / "emoji.yaml", copy)
    assert suite_sha256(load_suite(copy)) == suite_sha256(suite)
    for change in ({"first_seed": 1}, {"n": 1999}, {"adds_to": None}, {"prompts": str(copy)}, {"kid": False}):
        assert suite_sha256(suite.model_copy(update=change)) != suite_sha256(suite)


def test_features_of_bf16_are_near_and_a_protocol_of_their_own() -> None:
    suite = load_suite("emoji")
    rounded = suite.derive(precision="bf16")
    assert rounded.label == "emoji@2+bf16" and suite_sha256(rounded) != suite_sha256(suite)
    pixels = torch.from_numpy(emoji_images()[:50]).permute(0, 3, 1, 2)
    whole, network = suite.network(), rounded.network()
    apart = (network.images(pixels) - whole.images(pixels)).norm(dim=1)  # of unit vectors
    assert 1e-3 < apart.mean() < 3e-2 and torch.equal(network.texts(PINNED), whole.texts(PINNED))
    assert (network.fd_name, network.clip_name) == ("FD-emoji, bf16", "CLIP-emoji, bf16")
    stated = protocol_of(rounded, network), protocol_of(suite, whole)
    assert [one["precision"] for one in stated] == ["bf16", "float32"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nmae: x", "nmae is not a key of a suite (did you mean name"),
        ("name: x\nversion: 1\nn: 5\nreference: r\nresolution: 32", "teacher_steps is missing"),
        ("name: x\nversion: 1\nn: 1\nreference: r\nresolution: 32\nteacher_steps: 2\nprompts: emoji", "n: "),
        (
            "name: x\nversion: 1\nn: 5\nreference: r\nresolution: 32\nteacher_steps: 2",
            "clip_score needs prompts",
        ),
        (
            "name: x\nversion: 1\nn: 5\nreference: r\nresolution: 32\nteacher_steps: 2\nprompts: emoji\ndiversity: 1",
            "diversity needs prompts, and 2 samples",
        ),
        ("- 1", "a suite is a table"),
        ("a: [", "not YAML"),
    ],
)
def test_a_bad_suite_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_suite(file)
    assert says in str(caught.value) and "\n" not in str(caught.value) and str(file) in str(caught.value)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean emoji"):
        load_suite("emojy")
    with pytest.raises(UserError, match="no prompt file"):
        tiny(prompts="nowhere.txt").prompt_list()
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    with pytest.raises(UserError, match="holds no prompt"):
        tiny(prompts=str(empty)).prompt_list()
    with pytest.raises(UserError, match="no reference statistics"):
        tiny(reference="nowhere.npz").reference_file()
    with pytest.raises(UserError, match=r"inception-2015-12-05\.pt"):
        load_features("inception:/nowhere.pt")
    with pytest.raises(UserError, match="not known"):
        load_features("vgg")
    with pytest.raises(UserError, match="is not a diffusers pipeline"):
        load_pipeline(tmp_path)


@pytest.mark.slow
def test_the_shipped_reference_is_what_the_command_makes(tmp_path: Path) -> None:
    suite = load_suite("emoji")
    network = suite.network()
    shipped = load_reference(suite, network)
    make_reference(suite, tmp_path / "again.safetensors")
    again = load_reference(
        suite.model_copy(update={"reference": str(tmp_path / "again.safetensors")}), network
    )
    assert shipped.protocol == again.protocol and shipped.moments.count == 3781
    torch.testing.assert_close(again.moments.mean, shipped.moments.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(again.moments.covariance, shipped.moments.covariance, rtol=0, atol=1e-6)
    assert again.features is not None and shipped.features is not None
    torch.testing.assert_close(again.features, shipped.features, rtol=0, atol=2e-3)


def test_an_npz_reference_gives_the_same_distance_and_a_foreign_one_is_refused(tmp_path: Path) -> None:
    import numpy as np

    suite = load_suite("emoji")
    moments = load_reference(suite, suite.network()).moments
    np.savez(tmp_path / "stats.npz", mu=moments.mean.numpy(), sigma=moments.covariance.numpy())
    pixels = torch.from_numpy(emoji_images()[:300]).permute(0, 3, 1, 2)
    captions = emoji_captions()[:300]
    ours = score_images(torch.split(pixels, 128), captions, suite)
    stated = {"features": "emoji", "resize": "clean", "resolution": 32}
    plain = suite.changed(
        {"reference": str(tmp_path / "stats.npz"), "kid": False, "reference_protocol": stated}
    )
    theirs = score_images(torch.split(pixels, 100), captions, plain)
    assert theirs.fd == pytest.approx(ours.fd, abs=1e-6)
    assert theirs.clip_score == pytest.approx(ours.clip_score, abs=1e-6) and theirs.kid is None
    np.savez(tmp_path / "wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(UserError, match="2048 features, emoji has 64"):
        score_images(
            torch.split(pixels, 100),
            captions,
            plain.model_copy(update={"reference": str(tmp_path / "wide.npz")}),
        )


@pytest.mark.slow
def test_the_bias_of_the_distance_of_real_images_falls_as_one_over_n() -> None:
    # n images drawn without replacement from the N of the reference: the bias goes as 1/n - 1/N.
    order = torch.randperm(3781, generator=torch.Generator().manual_seed(0))
    pixels = torch.from_numpy(emoji_images()).permute(0, 3, 1, 2)
    captions = emoji_captions()

    def scores(rows: list[int]) -> Scores:
        return score_images(torch.split(pixels[rows], 300), [captions[i] for i in rows], "emoji")

    large, parts = (
        scores(order[:1200].tolist()),
        [scores(part.tolist()) for part in torch.split(order[:1200], 400)],
    )
    mean = sum(part.fd for part in parts) / 3
    assert mean / large.fd == pytest.approx((1 / 400 - 1 / 3781) / (1 / 1200 - 1 / 3781), rel=0.15)
    assert large.n == 1200 and 0 < large.fd < 0.3  # the teacher's best is five times that
    assert large.clip_score == pytest.approx(0.903, abs=0.01)
    assert sum(part.clip_score or 0 for part in parts) / 3 == pytest.approx(large.clip_score, abs=1e-6)


def test_scores_do_not_depend_on_the_batch_and_images_can_be_redrawn_by_hand(teacher: Any) -> None:
    suite = tiny()
    network = suite.network()
    drawn = []
    for batch in (7, 3, 1):
        drawing = Drawing(teacher, suite, suite.prompt_list(), 2.5, False)
        drawn.append(torch.cat(list(drawing.batches(2, batch))))
        assert drawing.passes == 2 * 2 * 7  # a guided step is two passes
    # Convolutions of other batch sizes round differently in the last bit, which moves a pixel that lies between two
    # levels by one: a few in ten thousand.
    for other in drawn[1:]:
        difference = (other.int() - drawn[0].int()).abs()
        assert difference.max() <= 1 and difference.float().mean() < 1e-3
        torch.testing.assert_close(network.images(other), network.images(drawn[0]), rtol=0, atol=1e-3)
    prompts = suite.prompt_list()
    assert prompts is not None
    generator = torch.Generator().manual_seed(suite.first_seed + 4)
    by_hand = teacher(
        prompts[4], num_inference_steps=2, guidance_scale=2.5, generator=generator, output_type="np"
    )
    pixels = torch.from_numpy(by_hand.images * 255).round().to(torch.uint8).permute(0, 3, 1, 2)
    assert (pixels[0].int() - drawn[0][4].int()).abs().max() <= 1


def test_report_says_where_its_numbers_come_from(teacher: Any, tmp_path: Path) -> None:
    report = evaluate(teacher, tiny(), steps=[1, 2], progress=False)
    report.save(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["suite"] == "emoji-quick@2" and content["n"] == 7 and list(content["scores"]) == ["1", "2"]
    judged = {"second_fd": "FD-judge", "second_fit": "judge fit"}
    assert content["metrics"] == {"fd": "FD-emoji", "clip_score": "CLIP-emoji", **judged}
    assert content["guidance"] == 1.0 and content["scores"]["2"]["network_evaluations"] == 2
    assert set(content["protocol"]) >= {
        "resize",
        "features_sha256",
        "reference_sha256",
        "suite_sha256",
        "seeds",
    }
    near = [content["scores"]["2"][key] for key in ("precision", "recall", "density", "coverage")]
    assert all(0 <= value <= 6 for value in near) and content["scores"]["2"]["diversity"] is None
    assert content["versions"]["torch"] and content["hardware"] and content["command"]
    assert len(report.markdown().splitlines()) == 4 and "FD-emoji" in report.markdown()


def test_diversity_is_of_samples_of_one_prompt_from_seeds_of_their_own(teacher: Any) -> None:
    """It equals the mean over pairs of pictures drawn by hand, moves no other score and no hash."""
    suite = tiny(diversity=3, diversity_prompts=2)
    plain = evaluate(teacher, tiny(), steps=1, progress=False).scores[1]
    found = evaluate(teacher, suite, steps=1, progress=False).scores[1]
    assert (found.fd, found.recall, plain.diversity) == (plain.fd, plain.recall, None)
    assert suite_sha256(suite) == suite_sha256(tiny())
    assert teacher_cache.key("w", suite, 1, 1.0) != teacher_cache.key("w", tiny(), 1, 1.0)
    prompts = suite.prompt_list()
    assert prompts is not None
    network, each = suite.network(), []
    for p in range(2):
        seeds = [torch.Generator().manual_seed(suite.first_seed + 7 + 3 * p + i) for i in range(3)]
        images = teacher(
            [prompts[p]] * 3, num_inference_steps=1, guidance_scale=1.0, generator=seeds, output_type="np"
        )
        pixels = torch.from_numpy(images.images * 255).round().to(torch.uint8).permute(0, 3, 1, 2)
        x = network.images(pixels).double()
        each += [1 - float(x[i] @ x[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert found.diversity == pytest.approx(sum(each) / 6, abs=1e-3)


def test_a_suite_without_neighbours_or_without_features_has_no_recall(teacher: Any) -> None:
    own = evaluate(teacher, tiny(neighbours=0, teacher_steps=2), progress=False).scores
    assert list(own) == [2] and own[2].recall is None  # the suite's count for a teacher
    assert (
        evaluate(teacher, tiny(n=5), steps=1, progress=False).scores[1].recall is None
    )  # not more than k images


def test_an_image_that_is_not_finite_names_its_prompt() -> None:
    pipe = load_pipeline(teacher_folder("emoji"), "cpu")[0]
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(float("nan"))
    suite = tiny()
    prompts = suite.prompt_list()
    assert prompts is not None
    with pytest.raises(UserError, match="NaN or Inf for prompt") as caught:
        evaluate(pipe, suite, steps=1, progress=False)
    assert repr(prompts[0]) in str(caught.value)


def test_pipelines_without_prompts_are_drawn_too() -> None:
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        DDPMPipeline,
        DiTPipeline,
        DiTTransformer2DModel,
        UNet2DModel,
    )

    suite = tiny(prompts=None, clip_score=False)
    unet = UNet2DModel(
        sample_size=32,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    report = evaluate(DDPMPipeline(unet, DDIMScheduler()), suite, steps=2, batch=4, progress=False)
    assert report.guidance is None and report.scores[2].clip_score is None
    assert report.scores[2].network_evaluations == 2
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        sample_size=16,
        patch_size=4,
        num_embeds_ada_norm=5,
        norm_num_groups=2,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    pipe = DiTPipeline(transformer, vae, DDIMScheduler())
    assert evaluate(pipe, suite, steps=1, batch=4, progress=False).scores[1].network_evaluations == 1
    with pytest.raises(UserError, match="takes no prompts"):
        evaluate(pipe, tiny(), steps=1, progress=False)


def test_trailing_grids_start_at_the_noisiest_time() -> None:
    from diffusers import (
        DDIMScheduler,
        EulerDiscreteScheduler,
        FlowMatchEulerDiscreteScheduler,
        PNDMScheduler,
    )

    for kind in (DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler):
        scheduler, given = trailing(kind(), 4, frozenset())
        scheduler.set_timesteps(4)
        assert scheduler.timesteps.tolist() == [999, 749, 499, 249] and given == {}
    scheduler, given = trailing(FlowMatchEulerDiscreteScheduler(shift=3.0), 4, frozenset({"sigmas"}))
    scheduler.set_timesteps(**given)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1, 0.9, 0.75, 0.5, 0]))


def test_trailing_leaves_the_pipeline_its_own_scheduler(teacher: Any) -> None:
    before = teacher.scheduler
    evaluate(teacher, tiny(n=3, kid=False), steps=1, trailing=True, progress=False)
    assert teacher.scheduler is before


@pytest.mark.slow
def test_teacher_scores_come_back_from_the_cache(teacher: Any, tmp_path: Path) -> None:
    folder = teacher_folder("emoji")
    first = teacher_scores(folder, tiny(), steps=[1, 2], guidance=1.0, progress=False)
    again = teacher_scores(folder, tiny(), steps=[2, 1], guidance=1.0, progress=False)
    assert first[1].cached is None and again[1].cached == "user" and list(again) == [2, 1]
    assert first[1].fd == again[1].fd and first[2].clip_score == again[2].clip_score
    other = teacher_scores(folder, tiny(), steps=1, guidance=2.5, progress=False)
    assert other[1].cached is None and other[1].fd != first[1].fd
    for file in (tmp_path / "cache" / "teachers").iterdir():
        old = json.loads(file.read_text())
        new = {key: old["scores"].pop(key) for key in ("fd_se", "sfid", "cmmd_se", "aesthetic")}
        file.write_text(json.dumps(old))
        assert new["fd_se"] > 0
    # From before the errors, and metrics that this suite does not ask, were there: found all the same.
    found = teacher_scores(folder, tiny(), steps=2, guidance=1.0, progress=False)[2]
    assert (found.cached, found.fd, found.fd_se) == ("user", first[2].fd, None)
    errors = tiny(intervals=True)
    assert teacher_cache.key("w", errors, 1, 1.0) != teacher_cache.key("w", tiny(), 1, 1.0)
    for file in (tmp_path / "cache" / "teachers").iterdir():
        old = json.loads(file.read_text())
        del old["scores"]["coverage"]  # from before the metric was there: counts as none
        file.write_text(json.dumps(old))
    assert teacher_scores(folder, tiny(), steps=2, guidance=1.0, progress=False)[2].cached is None
    for file in (tmp_path / "cache" / "teachers").iterdir():
        file.write_text("{")  # a damaged cache counts as none
    assert teacher_scores(folder, tiny(), steps=1, guidance=1.0, progress=False)[1].cached is None


@pytest.mark.slow
def test_the_shipped_scores_of_the_embedded_teacher_are_reproduced() -> None:
    folder = teacher_folder("emoji")
    shipped = teacher_scores(folder, "emoji-quick", steps=1, guidance=2.5)[1]
    assert shipped.cached == "shipped"
    now = teacher_scores(folder, "emoji-quick", steps=1, guidance=2.5, progress=False, refresh=True)[1]
    assert now.fd == pytest.approx(shipped.fd, abs=0.02) and now.network_evaluations == 2
    assert now.clip_score == pytest.approx(shipped.clip_score, abs=1e-3)
    assert now.kid == pytest.approx(shipped.kid, abs=1e-3)


def test_the_shipped_table_is_whole_and_ordered() -> None:
    folder = teacher_folder("emoji")
    guided = teacher_scores(folder, "emoji", steps=[1, 2, 4, 8, 25], guidance=2.5)
    plain = teacher_scores(folder, "emoji", steps=[1, 25], guidance=1.0)
    assert {s.cached for s in [*guided.values(), *plain.values()]} == {"shipped"}
    distances = [s.fd for s in guided.values()]
    assert distances == sorted(distances, reverse=True)
    assert plain[1].fd < guided[1].fd and guided[25].fd < plain[25].fd


def test_weights_hash_sees_content_and_not_the_place(tmp_path: Path) -> None:
    folder = teacher_folder("emoji")
    assert folder is not None
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert weights_hash(copy) == weights_hash(folder)
    (copy / "README.md").write_text("another text")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "_diffusers_version": "9"}))
    assert weights_hash(copy) == weights_hash(folder)
    file = copy / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace("trailing", "leading"))
    assert weights_hash(copy) != weights_hash(folder)
    shutil.copy(folder / "scheduler" / file.name, file)
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert weights_hash(copy) != weights_hash(folder)


def test_a_pipeline_is_found_by_name_by_folder_and_in_a_run(tmp_path: Path) -> None:
    folder = teacher_folder("emoji")
    assert folder is not None and find_pipeline("emoji") == find_pipeline(folder) == folder
    shutil.copytree(folder, tmp_path / "run" / "student")
    assert find_pipeline(tmp_path / "run") == tmp_path / "run" / "student"
    assert teacher_folder("no such") is None


def test_weights_hash_of_an_object_sees_one_changed_weight() -> None:
    pipe = load_pipeline(teacher_folder("emoji"), "cpu")[0]
    before = weights_hash(pipe)
    assert weights_hash(load_pipeline(teacher_folder("emoji"), "cpu")[0]) == before
    with torch.no_grad():
        pipe.unet.conv_out.bias[0] += 1e-3
    assert weights_hash(pipe) != before


def test_a_cache_that_cannot_be_written_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPDISTILL_CACHE", "/dev/null/cache")  # no folder can be made there
    teacher_cache.store("x", {"scores": {}})
    assert teacher_cache.find("x") is None


def test_gap_closed() -> None:
    assert gap_closed(6.0, 6.0, 2.0) == 0
    assert gap_closed(2.0, 6.0, 2.0) == 1
    assert gap_closed(3.0, 6.0, 2.0) == 0.75
    with pytest.raises(UserError, match="no gap"):
        gap_closed(1.0, 2.0, 2.0)


def test_a_clip_folder_of_ones_own_gives_the_features_of_its_weights(tmp_path: Path) -> None:
    shutil.copytree(features_folder(), tmp_path, dirs_exist_ok=True)
    shutil.copytree(tokenizer_folder(), tmp_path, dirs_exist_ok=True)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    )
    mine, shipped = load_features(f"clip:{tmp_path}"), load_features("emoji")
    assert mine.fd_name != shipped.fd_name and mine.fd_scale == 1
    assert mine.sha256 == features_sha256(f"clip:{tmp_path}")
    assert mine.sha256 != shipped.sha256  # these are not the pixels that CLIP is used to
    (tmp_path / "preprocessor_config.json").rename(tmp_path / "elsewhere.json")
    assert features_sha256(f"clip:{tmp_path}") == shipped.sha256
    pixels = torch.from_numpy(emoji_images()[:20]).permute(0, 3, 1, 2)
    torch.testing.assert_close(mine.images(pixels), shipped.images(pixels))
    torch.testing.assert_close(mine.texts(emoji_captions()[:5]), shipped.texts(emoji_captions()[:5]))
