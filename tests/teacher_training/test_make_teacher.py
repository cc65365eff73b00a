"""``train/make_teacher.py`` at a tiny size: the folder it makes, resuming bit for bit, its draws."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPModel

from stepdistill.attention.repeated_token import T5_TOKENS
from stepdistill.diffusion.draws import generator_for
from stepdistill.errors import UserError
from stepdistill.features.judge import Judge
from stepdistill.system.emoji import emoji_captions
from stepdistill.teacher_training import make, networks, stages
from stepdistill.teacher_training.judge import varied
from stepdistill.teacher_training.settings import TINY, StageSettings, claim_folder
from stepdistill.teacher_training.stage import learning_rate, seeded, train_stage
from stepdistill.teacher_training.tokenizer import learn_merges, train_tokenizer

pytestmark = pytest.mark.slow  # nearly all need the two teachers that are made here
SCRIPT = Path(__file__).parents[2] / "train" / "make_teacher.py"


class Stop(Exception):
    """Stands for the power cut: raised between two steps, so that nothing is written on the way out."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both teachers, made without a stop; the global generator is left alone."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    before = torch.get_rng_state()
    assert make.make_teacher(TINY, folder, device="cpu", command="a command") == folder / "teacher"
    assert make.make_teacher(TINY, folder, device="cpu", pipeline="sd3") == folder / "teacher-flow"
    assert torch.equal(before, torch.get_rng_state())
    return folder


def _state(folder: Path, stage: str) -> dict[str, list[float]]:
    (path,) = (folder / "work" / stage).glob("step-*/state.json")
    return json.loads(path.read_text())


def _script() -> object:
    spec = importlib.util.spec_from_file_location("make_teacher_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plain_diffusers_loads_the_teacher_and_draws(made: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(made / "teacher")
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline) is StableDiffusionPipeline
    assert pipeline.tokenizer.model_max_length == 24
    for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert network.dtype == torch.float32
    pipeline.scheduler.set_timesteps(4)
    assert pipeline.scheduler.timesteps.tolist() == [999, 749, 499, 249]
    generator = torch.Generator().manual_seed(0)
    images = pipeline("red heart", num_inference_steps=4, generator=generator, output_type="pt").images
    assert images.shape == (1, 3, 32, 32) and images.isfinite().all() and images.std() > 0
    # Stored in half precision, and latents of unit deviation under the stored scale.
    stored = load_file(made / "teacher/unet/diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    latents = load_file(made / "work/latents/latents.safetensors")["latents"]
    assert float(latents.std() * pipeline.vae.config.scaling_factor) == pytest.approx(1, abs=1e-4)


def test_plain_diffusers_loads_the_flow_teacher_and_draws(made: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(made / "teacher-flow")
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline) is StableDiffusion3Pipeline
    images = pipeline("red heart", num_inference_steps=2, guidance_scale=2.0, output_type="pt").images
    assert images.shape == (1, 3, 32, 32) and images.isfinite().all()


def test_text_encoder_is_the_text_tower_of_the_features(made: Path) -> None:
    features = CLIPModel.from_pretrained(made / "features")
    assert features.dtype == torch.float32
    encoder = StableDiffusionPipeline.from_pretrained(made / "teacher").text_encoder
    tower = features.text_model.state_dict()
    assert tower.keys() == encoder.state_dict().keys()
    assert all(torch.equal(value, tower[name]) for name, value in encoder.state_dict().items())


def test_training_sees_the_conditions_of_encode_prompt(made: Path) -> None:
    """The precomputed conditions are what the pipelines compute, the zeros of the absent T5 counted once."""
    clip = CLIPModel.from_pretrained(made / "features").eval()
    prompts = ["red heart", ""]
    sd = StableDiffusionPipeline.from_pretrained(made / "teacher")
    ids = stages.token_ids(sd.tokenizer, prompts)
    with torch.no_grad():
        expected, _ = sd.encode_prompt(prompts, "cpu", 1, False)
        torch.testing.assert_close(make.encode(clip, ids).states, expected)
        flow = StableDiffusion3Pipeline.from_pretrained(made / "teacher-flow")
        expected, _, pooled, _ = flow.encode_prompt(
            prompts, prompts, prompts, do_classifier_free_guidance=False
        )
    ours = make.encode_for_flow(clip, ids)
    torch.testing.assert_close(ours.states[:, :24], expected[:, :24])
    assert expected.shape[1] == 24 + T5_TOKENS
    assert not expected[:, 24:].any() and not ours.states[:, 24:].any()
    torch.testing.assert_close(ours.pooled, pooled)


def test_one_weighted_token_equals_256_equal_ones() -> None:
    trained = seeded(lambda: make.build_flow_network(TINY), 0, "weights").eval()
    plain = make.restore_attention(trained)
    x, states = torch.randn(2, 4, 8, 8), torch.randn(2, 24, 2 * TINY.text_width)
    rest = {
        "pooled_projections": torch.randn(2, 2 * TINY.projection),
        "timestep": torch.tensor([10.0, 700.0]),
    }
    one = nn.functional.pad(states, (0, 0, 0, 1))
    many = nn.functional.pad(states, (0, 0, 0, T5_TOKENS))
    with torch.no_grad():
        for block in trained.transformer_blocks:  # modulation starts near zero: make the blocks matter
            block.norm1.linear.weight.mul_(20)
        plain.load_state_dict(trained.state_dict())
        weighted = trained(x, encoder_hidden_states=one, **rest).sample
        expected = plain(x, encoder_hidden_states=many, **rest).sample
        without = plain(x, encoder_hidden_states=one, **rest).sample
    torch.testing.assert_close(weighted, expected, atol=1e-5, rtol=1e-4)
    assert (without - expected).abs().max() > 1e-3


def test_stopped_run_continues_bit_for_bit(made: Path, tmp_path: Path) -> None:
    for stage, last in (("vae", 10), ("clip", 24), ("unet", 6), ("unet", 17)):

        def stop(at: str, step: int, stage: str = stage, last: int = last) -> None:
            if (at, step) == (stage, last):
                raise Stop

        with pytest.raises(Stop):
            make.make_teacher(TINY, tmp_path, device="cpu", on_step=stop)
        # What is left of a checkpoint whose writing was cut off.
        for name in (".step-000099.part", "step-000099.tmp"):  # now, and by an earlier version
            cut = tmp_path / "work" / stage / name
            cut.mkdir(parents=True, exist_ok=True)
            (cut / "state.safetensors").write_bytes(b"half a file")
    seen: list[tuple[str, int]] = []
    make.make_teacher(TINY, tmp_path, device="cpu", on_step=lambda at, step: seen.append((at, step)))
    assert seen == [
        ("unet", step) for step in range(15, 25)
    ]  # finished stages are skipped, the last one goes on at 14
    for part in ("unet", "vae", "text_encoder"):
        (path,) = (made / "teacher" / part).glob("*.safetensors")
        assert path.read_bytes() == (tmp_path / "teacher" / part / path.name).read_bytes()
    for stage in ("vae", "clip", "unet"):
        assert _state(made, stage)["losses"] == _state(tmp_path, stage)["losses"]
    assert (made / "teacher/steps.png").read_bytes() == (tmp_path / "teacher/steps.png").read_bytes()


@pytest.mark.parametrize("stage", ["vae", "clip", "unet", "flow"])
def test_losses_decrease(made: Path, stage: str) -> None:
    losses = _state(made, stage)["losses"]
    assert len(losses) == 24
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])


def test_card_and_picture(made: Path) -> None:
    card = (made / "teacher/README.md").read_text()
    for words in ("a command", "Noto Emoji, Apache License 2.0", "dB PSNR", "| unet | 0.25 M | 24 | 8 |"):
        assert words in card
    # 24 tiles a row; a row each of real images and of 25, 4 and 1 steps.
    assert Image.open(made / "teacher/steps.png").size == (24 * 32, 4 * 32)


def test_other_settings_are_refused_by_name(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"seed is 0 there, 1 now"):
        make.make_teacher(replace(TINY, seed=1), made)
    with pytest.raises(UserError, match=r"unet\.lr is 0\.002 there, 0\.1 now"):
        claim_folder(made, replace(TINY, unet=replace(TINY.unet, lr=0.1)))
    claim_folder(made, replace(TINY, checkpoint_every=1))  # does not decide the weights
    status = _script().main(["--output", str(made), "--size", "tiny", "--clip-steps", "5"])
    error = capsys.readouterr().err
    assert status == 2 and "clip.steps is 24 there, 5 now" in error and error.count("\n") == 1


def test_foreign_folders_and_bad_counts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="choose a new --output"):
        make.make_teacher(TINY, tmp_path)
    with pytest.raises(
        UserError, match=r"clip: 24 steps of 24 images; allowed are 1 step or more of 1 to 23"
    ):
        make.make_teacher(TINY.with_stage("clip", batch=24), tmp_path / "new")
    with pytest.raises(UserError, match="at least 1"):
        TINY.with_stage("vae", steps=0)


def test_damaged_checkpoint_and_nan_are_named(tmp_path: Path) -> None:
    settings = StageSettings(4, 1, 1e-3)
    keys = {"seed": 0, "checkpoint_every": 2}
    net = seeded(lambda: nn.Linear(3, 3), "net")
    with pytest.raises(
        UserError, match=r"toy: the loss is not finite at or before step 2 \(no checkpoint yet\)"
    ):
        train_stage("toy", net, lambda g: net(torch.full((1, 3), math.nan)).sum(), settings, tmp_path, **keys)
    net = seeded(lambda: nn.Linear(3, 3), "net")
    train_stage("toy", net, lambda g: net(torch.randn(1, 3, generator=g)).sum(), settings, tmp_path, **keys)
    path = tmp_path / "step-000004" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"step-000004 is damaged"):
        train_stage(
            "toy", net, lambda g: net(torch.randn(1, 3, generator=g)).sum(), settings, tmp_path, **keys
        )


def test_one_caption_in_ten_is_dropped() -> None:
    """Over the masks that 400 training steps of 64 draw: within four standard errors of 10 %."""
    latents, steps, batch = torch.zeros(80, 5, 1, 1, 1), 400, 64
    masks = torch.cat(
        [
            stages.draw_examples(latents, batch, 0.1, generator_for(0, "unet", step))[1]
            for step in range(steps)
        ]
    )
    error = math.sqrt(0.1 * 0.9 / (steps * batch))
    assert abs(float(masks.float().mean()) - 0.1) < 4 * error
    captions = stages.Captions(torch.zeros(81, 2, 2))
    assert captions.rows(torch.tensor([3, 7]), torch.tensor([True, False])).tolist() == [80, 7]


def test_shift_moves_down_and_right_and_lets_white_in() -> None:
    images = torch.rand(2, 3, 5, 5)
    moved = stages.shifted(images, torch.tensor([[1, 0], [0, -2]]))
    assert torch.equal(moved[0, :, 1:], images[0, :, :-1]) and (moved[0, :, 0] == 1).all()
    assert torch.equal(moved[1, :, :, :-2], images[1, :, :, 2:]) and (moved[1, :, :, -2:] == 1).all()


def test_clip_loss_leaves_out_equal_captions() -> None:
    """With all captions equal there is no contrast left, and the loss is 0."""
    tokenizer = train_tokenizer(["red heart"], 600, 24)
    clip = seeded(lambda: networks.build_clip(TINY, tokenizer), 0)
    ids = stages.token_ids(tokenizer, ["red heart"] * 8)
    images = torch.rand(8, 3, 32, 32)
    assert stages.clip_loss(clip, images, ids, 8)(torch.Generator()).item() == 0
    other = stages.token_ids(tokenizer, ["heart"] * 4 + ["red"] * 4)
    assert stages.clip_loss(clip, images, other, 8)(torch.Generator()).item() > 0


def test_learning_rate_warms_up_and_decays_to_zero() -> None:
    settings = StageSettings(steps=100, batch=1, lr=2.0, warmup=10)
    assert learning_rate(settings, 0) == pytest.approx(0.2)
    assert learning_rate(settings, 10) == 2.0
    assert learning_rate(settings, 55) == pytest.approx(1.0)
    assert learning_rate(settings, 99) < 0.001


def test_merges_in_order_of_frequency_then_of_spelling() -> None:
    words = Counter({"low": 5, "lower": 2, "newest": 6, "widest": 3})
    # The example of Sennrich et al. (2016), section 3.2; (e, s) and (s, t</w>) both occur 9 times.
    assert learn_merges(words, 3) == [("e", "s"), ("es", "t</w>"), ("l", "o")]
    backwards = Counter(dict(reversed(words.items())))
    assert learn_merges(backwards, 100) == learn_merges(words, 100)


def test_tokenizer_covers_captions_and_any_text() -> None:
    captions = emoji_captions()
    tokenizer = train_tokenizer(captions, 2048, 24)
    assert len(tokenizer) == 2048
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (2046, 2047)
    assert max(len(ids) for ids in tokenizer(captions).input_ids) <= 24
    strange = tokenizer("π ☃ Ünïcode").input_ids
    assert strange[0] == 2046 and strange[-1] == 2047 and tokenizer.unk_token_id not in strange[1:-1]
    assert tokenizer.tokenize("Red heart") == ["red</w>", "heart</w>"]


def test_the_judge_is_made_beside_a_teacher_and_loads(made: Path) -> None:
    """From the images alone, the same bits each time; the global generator is left alone."""
    before = torch.get_rng_state()
    folder = make.make_judge(TINY, made, device="cpu", command="a command")
    assert torch.equal(before, torch.get_rng_state()) and folder == made / "judge"
    judge = Judge(folder / "model.safetensors")
    assert "negative" in judge.words and "a command" in (folder / "README.md").read_text()
    features = judge.images(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
    assert features.shape == (2, 64) and torch.allclose(features.norm(dim=1), torch.ones(2))
    stored = load_file(folder / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    shutil.rmtree(folder)
    again = load_file(
        make.make_judge(TINY, made, device="cpu") / "model.safetensors"
    )  # from its last checkpoint
    assert all(torch.equal(stored[name], value) for name, value in again.items())


def test_the_judges_pictures_are_varied_and_stay_pictures_on_white() -> None:
    white = torch.ones(64, 3, 32, 32)
    drawn = varied(white, torch.Generator().manual_seed(0))
    covered = (drawn < 1).any(1).flatten(1).sum(1)  # pixels of each picture
    assert 20 < int((covered > 0).sum()) < 44 and int(covered.max()) <= 13**2
    assert torch.equal(drawn, varied(white, torch.Generator().manual_seed(0)))
    assert drawn.min() >= -1 and drawn.max() <= 1
