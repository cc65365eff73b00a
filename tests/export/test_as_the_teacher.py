"""A student's folder is in the types and shards of its teacher's, whose other parts it has byte for byte."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import load_file, save_file
from student_toy import SAMPLERS, assert_same, drawn, kept
from tiny import SIZES, shaken, tiny_pipeline, tiny_prompts
from torch.distributed._tools.mem_tracker import MemTracker

from stepdistill.errors import UserError
from stepdistill.export.adapters import KOHYA
from stepdistill.export.card import PLAIN, STOCK
from stepdistill.export.kohya import published_name
from stepdistill.export.original import Original
from stepdistill.export.schedulers import on_stock_grid
from stepdistill.export.student_folder import DEFAULT, _save_pipeline, export
from stepdistill.export.verify import verify
from stepdistill.networks.loading import load_pipeline, load_teacher
from stepdistill.networks.lora import lora_layers
from stepdistill.networks.pipeline_files import ADAPTER, LORA, tensor_types
from stepdistill.networks.roles import Adapters, Copies
from stepdistill.networks.sampler import Sampler
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.recipes.sections import ExportOptions
from stepdistill.system.files import give_usual_modes, sha256_of
from stepdistill.training.distil import distill

BF16 = torch.bfloat16
CARD = f"```python\nfrom diffusers import DiffusionPipeline\n{PLAIN}\n```\n{STOCK}\n"


def saved(name: str, folder: Path, dtype: torch.dtype = BF16, **more: Any) -> Path:
    tiny_pipeline(name).to(dtype).save_pretrained(folder, **more)
    return folder


def exported(
    name: str, source: Any, folder: Path, options: ExportOptions = DEFAULT, lora_rank: int = 0, **more: Any
) -> Path:
    """The folder of a student with shaken weights."""
    pipe = load_teacher(str(source)) if isinstance(source, Path) else source
    teacher = PipelineTeacher(pipe, size=SIZES.get(name), **more)
    roles = Adapters(teacher, lora_rank, 3.0 * lora_rank) if lora_rank else Copies(teacher)
    shaken(torch.nn.ParameterList(roles.parameters("student")), amount=1.0 if lora_rank else 0.2)
    teacher = roles.teacher  # type: ignore[assignment]
    passes, scheduler = teacher.family.passes, teacher.pipe.scheduler
    sampler = on_stock_grid(SAMPLERS[name], teacher.path, scheduler, passes=passes)
    prompts = tiny_prompts(name, 2)
    export(roles.student, sampler, teacher, folder, prompts, CARD, (0, 1), source=source, options=options)
    return folder


@pytest.mark.slow
def test_types_and_shards_are_the_teachers_and_all_other_parts_its_files(tmp_path: Path) -> None:
    """Weights are the same file, texts are copies; what is not loaded is left; the proof holds in a fresh process."""
    teacher = saved("sd3", tmp_path / "t", max_shard_size="10KB")
    strays = ("vae/diffusion_pytorch_model.fp16.safetensors", "text_encoder/pytorch_model.bin", "vae/a.py")
    for stray in strays:
        shutil.copyfile(next((teacher / "vae").glob("*.safetensors")), teacher / stray)
    place = "transformer"
    state = {name: "F32" if "norm" in name else kind for name, kind in tensor_types(teacher / place).items()}
    assert set(state.values()) == {"F32", "BF16"}
    for file in (teacher / place).glob("*.safetensors"):
        tensors = {k: v.float() if state[k] == "F32" else v for k, v in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    give_usual_modes(teacher)
    closed = next((teacher / "vae").glob("diffusion_pytorch_model*.safetensors"))
    closed.chmod(0o600)  # its owner's alone: a link would be, too
    student = exported("sd3", teacher, tmp_path / "s")
    assert tensor_types(student / place) == state
    counts = [len(list((folder / place).glob("*-of-*.safetensors"))) for folder in (teacher, student)]
    assert counts[0] > 4 and abs(counts[0] - counts[1]) <= 2
    for file in teacher.rglob("*"):
        name = file.relative_to(teacher)
        if not file.is_file() or name.parts[0] in (place, "scheduler", "model_index.json"):
            continue
        if name.as_posix() in strays:
            assert not (student / name).exists()
            continue
        assert (student / name).read_bytes() == file.read_bytes()
        linked = file.suffix == ".safetensors" and file != closed
        assert ((student / name).stat().st_ino == file.stat().st_ino) == linked
        assert (student / name).stat().st_mode & 0o777 == (
            teacher / "vae" / "config.json"
        ).stat().st_mode & 0o777
    assert verify(student).worst <= 1
    text = (student / "README.md").read_text()
    assert "import torch\n" in text and "torch_dtype=torch.bfloat16)" in text
    loaded, _ = load_pipeline(student, "cpu")
    assert_same(drawn(loaded, student), kept(student))
    exported("sd3", teacher, tmp_path / "s", ExportOptions(max_shard_size="1GB"))
    assert [file.name for file in (student / place).glob("*.safetensors")] == [
        "diffusion_pytorch_model.safetensors"
    ]


@pytest.mark.parametrize("name", ["unet-classes", "sdxl"])
def test_an_object_in_bfloat16_is_saved_as_it_was_handed_in(name: str, tmp_path: Path) -> None:
    pipe = tiny_pipeline(name).to(BF16)
    student = exported(name, pipe, tmp_path / "s")
    networks = {part: net for part, net in pipe.components.items() if isinstance(net, torch.nn.Module)}
    for part, network in networks.items():
        assert set(tensor_types(student / part).values()) == {"BF16"}
        assert {value.dtype for value in network.parameters()} == {BF16}
    assert_same(drawn(load_pipeline(student, "cpu")[0], student), kept(student))


def test_one_network_at_most_is_made(tmp_path: Path) -> None:
    """What is held while the adapter of a bfloat16 teacher is merged and written: the network that both share, the
    adapters, and one network more."""
    teacher = PipelineTeacher(load_teacher(str(saved("sd", tmp_path / "t"))))
    roles = Adapters(teacher, 2)
    base = sum(value.nbytes for value in teacher.denoiser.net.parameters())
    adapters = sum(value.nbytes for value in roles.parameters("student"))
    original, tracker = Original(tmp_path / "t"), MemTracker()
    with tracker:
        _save_pipeline(roles.student, Sampler((1.0,), True), teacher, original, DEFAULT, tmp_path)
    (kinds,) = tracker.get_tracker_snapshot("peak").values()
    more = int(kinds["Total"]) - base - adapters
    assert 0.9 * base < more < 1.2 * base


# --- an adapter alone --------------------------------------------------------------------------------------------

ALONE = ExportOptions(what="adapter")


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_an_adapter_alone_is_proven_with_its_teacher(name: str, tmp_path: Path) -> None:
    """Flux's network takes guidance as an input: it is told the teacher's scale. The teacher's weights are bfloat16."""
    teacher = saved(name, tmp_path / "t")
    more = {"guidance": 2.5} if name == "flux" else {}
    student = exported(name, teacher, tmp_path / "s", ALONE, lora_rank=2, **more)
    assert {path.name for path in student.iterdir()} == {
        *("README.md", "scheduler", "verification"),
        *(LORA, ADAPTER),
    }
    assert verify(student).worst <= 1
    pipe, _ = load_pipeline(student, "cpu")
    assert_same(drawn(pipe, student), kept(student))
    call = json.loads((student / "verification" / "manifest.json").read_text())["call"]
    assert call["guidance_scale"] == (2.5 if name == "flux" else 0)
    plain = load_pipeline(teacher, "cpu")[0]
    plain.scheduler = pipe.scheduler
    assert (drawn(plain, student).float() - kept(student).float()).abs().mean() > 1  # the adapter matters
    text = (student / "README.md").read_text()
    assert (
        'from_pretrained("path/to/t")' in text and str(tmp_path) not in text and "load_lora_weights(" in text
    )
    assert sha256_of(student / LORA) and not list(student.rglob("diffusion_pytorch_model*"))
    config = teacher / "vae" / "config.json"
    config.write_text(config.read_text().replace('"scaling_factor": 0.5', '"scaling_factor": 0.6'))
    with pytest.raises(UserError, match="which was altered since export"):
        verify(student)
    with pytest.raises(UserError, match="adapter alone: export it again with --what merged"):
        load_teacher(str(student))


def test_an_adapter_alone_may_carry_its_scheduler(tmp_path: Path) -> None:
    teacher = saved("sd3", tmp_path / "t", torch.float32)
    taken = PipelineTeacher(load_teacher(str(teacher)))
    roles = Adapters(taken, 2, 6.0)
    shaken(torch.nn.ParameterList(roles.parameters("student")), amount=1.0)
    export(
        roles.student, Sampler((1.0, 0.5), True), taken, tmp_path / "s", tiny_prompts("sd3", 2), CARD, (0, 1),
        source=teacher, options=ALONE,
    )  # fmt: skip
    assert (tmp_path / "s" / "scheduler" / "flow_consistency.py").is_file()
    assert verify(tmp_path / "s").worst <= 1
    assert_same(drawn(load_pipeline(tmp_path / "s", "cpu")[0], tmp_path / "s"), kept(tmp_path / "s"))
    assert "from flow_consistency import" in (tmp_path / "s" / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "rank", "options", "says"),
    [
        ("dit", 2, ALONE, "export.what is adapter, but DiTPipeline has no load_lora_weights"),
        ("sd", 0, ALONE, "its student trains weights of its own"),
        ("sd", 2, ALONE, "the teacher is an object"),
        (
            "sd",
            2,
            ExportOptions(what="merged", kohya=True),
            "export.kohya is true, but export.what is merged",
        ),
    ],
)
def test_what_cannot_be_exported_so_is_refused(
    name: str, rank: int, options: ExportOptions, says: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says):
        exported(name, tiny_pipeline(name), tmp_path / "s", options, rank)
    assert not list(tmp_path.iterdir())


def test_merged_is_without_the_adapter(tmp_path: Path) -> None:
    exported("sd", tiny_pipeline("sd"), tmp_path / "s", ExportOptions(what="merged"), 2)
    assert (tmp_path / "s" / "model_index.json").is_file() and not (tmp_path / "s" / LORA).exists()


def test_a_recipe_says_it_before_it_trains(tmp_path: Path) -> None:
    """Before the network's output is matched, which takes minutes."""
    sets = ["student.lora_rank=2", "export.what=adapter", "student.output=v"]
    with pytest.raises(UserError, match="DiTPipeline has no load_lora_weights"):
        distill(saved("dit", tmp_path / "t", torch.float32), "dmd", tmp_path / "run", sets=sets)


# --- kohya's names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_file_with_kohyas_names_says_the_same(name: str, tmp_path: Path) -> None:
    """diffusers reads its names back into the very adapter, alpha with them, and draws the trainer's pictures."""
    teacher = saved(name, tmp_path / "t", torch.float32)
    options = ExportOptions(what="adapter", kohya=True)
    student = exported(name, teacher, tmp_path / "s", options, lora_rank=2)
    theirs, ours = load_file(student / KOHYA), load_file(student / LORA)
    assert all(re.fullmatch(r"lora_unet_\w+\.(lora_down\.weight|lora_up\.weight|alpha)", k) for k in theirs)
    assert 3 * len(ours) == 2 * len(theirs) and {float(v) for k, v in theirs.items() if "alpha" in k} == {6.0}
    if name == "sd":
        converted = convert_state_dict_to_kohya(ours)
        assert converted.keys() == theirs.keys()
        assert all(torch.equal(converted[k], v) for k, v in theirs.items() if "alpha" not in k)
    else:
        assert not any("down_blocks" in key or "up_blocks" in key for key in theirs)
    pipe = load_pipeline(teacher, "cpu")[0]
    state, alphas = pipe.lora_state_dict(student, weight_name=KOHYA, unet_config=pipe.unet.config)[:2]
    assert len(state) == len(ours) and len(alphas) == len(ours) // 2
    pipe.load_lora_weights(student, weight_name=KOHYA)
    pipe.scheduler = load_pipeline(student, "cpu")[0].scheduler
    assert len(lora_layers(pipe.unet)) == len(ours) // 2
    assert_same(drawn(pipe, student), kept(student))


def test_sdxls_layers_have_their_published_names() -> None:
    """Its three blocks of two layers: the attention of its second block is in the fourth and fifth input block."""
    config = {
        "layers_per_block": 2,
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    }
    names = {
        "down_blocks.1.attentions.0.proj_in": "input_blocks.4.1.proj_in",
        "down_blocks.1.attentions.1.proj_out": "input_blocks.5.1.proj_out",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "down_blocks.2.resnets.1.conv1": "input_blocks.8.0.in_layers.2",
        "mid_block.attentions.0.transformer_blocks.9.attn1.to_q": "middle_block.1.transformer_blocks.9.attn1.to_q",
        "mid_block.resnets.1.time_emb_proj": "middle_block.2.emb_layers.1",
        "up_blocks.0.attentions.2.transformer_blocks.0.ff.net.2": "output_blocks.2.1.transformer_blocks.0.ff.net.2",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
        "up_blocks.2.resnets.2.conv_shortcut": "output_blocks.8.0.skip_connection",
    }
    assert {layer: published_name(layer, config) for layer in names} == names
