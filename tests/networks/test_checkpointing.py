"""Checkpointed networks: what is kept, what stays equal to the last bit, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from run_toy import HERE
from safetensors.torch import load_file
from tiny import tiny_pipeline, tiny_prompts
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stepdistill.errors import UserError
from stepdistill.networks import checkpointing
from stepdistill.networks.averages import Ema
from stepdistill.networks.checkpointing import check_checkpointing, checkpointed
from stepdistill.recipes.recipe import load_recipe
from stepdistill.training.assemble import Assembled, assemble
from stepdistill.training.checkpoint import checkpoints_in
from stepdistill.training.health import Seen
from stepdistill.training.identity import resolve
from stepdistill.training.loop import train
from stepdistill.training.previews import Previews
from stepdistill.training.training_data import training_data


def unet() -> Any:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        norm_num_groups=4,
        attention_head_dim=8,
    )


def dit() -> Any:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        num_layers=4,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_num_groups=4,
    )


def pass_of(net: Any) -> tuple[int, list[Tensor]]:
    """Bytes that the backward pass finds in memory, without the weights, and its gradients."""
    own = {value.untyped_storage().data_ptr() for value in (*net.parameters(), *net.buffers())}
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    config = net.config
    shape = (2, config.in_channels, config.sample_size, config.sample_size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    at: dict[str, Any] = {"timestep": torch.tensor([3, 500])}
    if "num_embeds_ada_norm" in config:
        at["class_labels"] = torch.tensor([1, 2])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        loss = net(x, return_dict=False, **at)[0].square().mean()
    return sum(kept.values()), list(torch.autograd.grad(loss, list(net.parameters())))


@pytest.mark.parametrize(("make", "most"), [(unet, 0.5), (dit, 0.1)])
def test_what_is_kept_for_the_backward_pass_is_a_part_and_gradients_are_equal(make: Any, most: float) -> None:
    torch.manual_seed(0)
    net = make().eval()
    before = [dict(vars(module)) for module in net.modules()]
    config = dict(net.config)
    plain, gradients = pass_of(net)
    with pytest.raises(ZeroDivisionError), checkpointed([net]):
        kept, recomputed = pass_of(net)
        assert dict(net.config) == config
        _ = 1 / 0
    assert kept <= most * plain
    assert all(torch.equal(one, other) for one, other in zip(gradients, recomputed, strict=True))
    assert [dict(vars(module)) for module in net.modules()] == before
    assert pass_of(net)[0] == plain


class Killed(Exception):
    pass


COMMON = ("student.output=teacher", "train.updates=4", "train.batch=2", "train.lr=1e-2", "train.average=0.5",
          "train.checkpoint_every=2", "train.preview_every=1", "evaluate=false", "student.times=[1.0,0.5]")  # fmt: skip
# Graphs that end at a discriminator's features, of the fake network and of the teacher; the same on one network; a
# derivative in forward mode.
DMD = (
    "options.fake_updates=1",
    "options.adversarial_weight=0.01",
    "terms.gan_weight=0.01",
    "options.guidance=2.0",
)
RUNS = {
    "copies": ("sd", "dmd", *DMD),
    "adapters": ("sd3", "dmd", *DMD, "student.lora_rank=2"),
    "derivative": ("sd3", "scm", "options.derivative=exact", "options.pairs=4", "options.pair_steps=2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_with_checkpointing_as_without(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor of the last checkpoint to the last bit; sheets between updates see the networks as they are."""
    pipeline, method, *more = RUNS[name]
    (tmp_path / "prompts.txt").write_text("\n".join(tiny_prompts(pipeline, 4)))
    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.new("RGB", (32, 32), (40 * i, 90, 200 - 30 * i)).save(tmp_path / "images" / f"{i}.png")
    calls: list[Any] = []

    def counted(block: Any, *args: Any, **options: Any) -> Any:
        calls.append(block)
        return checkpoint(block, *args, **options)

    monkeypatch.setattr(checkpointing, "checkpoint", counted)

    def run(folder: Path, on: bool, last: int = 4, resume: bool = False) -> Assembled:
        sets = [*COMMON, f"data.prompts={tmp_path}/prompts.txt", f"data.images={tmp_path}/images", *more]
        recipe = load_recipe(HERE / "empty.yaml", method=method, sets=[*sets, f"train.checkpointing={on}"])
        folder.mkdir(exist_ok=True)
        accelerator = Accelerator(cpu=True)
        job = assemble(resolve(recipe), accelerator, tiny_pipeline(pipeline))
        sheets = Previews(None, job.student, job.sampler, job.teacher, job.prompts[:2], 1.0, 2)
        plain = [dict(vars(module)) for net in job.method.roles.stored().values() for module in net.modules()]

        def preview(step: int, ema: Ema | None) -> Seen:
            if step > last:
                raise Killed
            before = len(calls)
            seen = sheets.look(step, ema)
            assert len(calls) == before
            return seen

        data = training_data(job, folder)
        train(job.objective, data, recipe, folder, accelerator, resume=resume, preview=preview)
        nets = job.method.roles.stored().values()
        assert plain == [dict(vars(module)) for net in nets for module in net.modules()]
        return job

    run(tmp_path / "whole", on=False)
    with pytest.raises(Killed):
        run(tmp_path / "parts", on=False, last=2)
    assert not calls
    run(tmp_path / "parts", on=True, resume=True)
    assert calls
    whole, parts = (kept_in(tmp_path / name) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)


def kept_in(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a run's last checkpoint."""
    files = sorted(checkpoints_in(folder / "work" / "checkpoints")[-1].glob("*.safetensors"))
    return {f"{file.stem}.{key}": value for file in files for key, value in load_file(file).items()}


def test_what_cannot_be_checkpointed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    net = unet()
    check_checkpointing(net)
    with pytest.raises(UserError, match="no gradient checkpointing for a Linear: set it to false"):
        check_checkpointing(nn.Linear(2, 2))
    monkeypatch.setattr(type(net), "_supports_gradient_checkpointing", False)
    recipe = load_recipe(HERE / "empty.yaml", method="dmd", sets=["train.checkpointing=true"])
    with pytest.raises(UserError, match=r"train\.checkpointing is true, but diffusers has no"):
        assemble(resolve(recipe), Accelerator(cpu=True), tiny_pipeline("unet-ddpm"))
    with pytest.raises(
        UserError, match="checkpointing is true and compile is full, which do not go together"
    ):
        load_recipe(
            HERE / "empty.yaml", method="dmd", sets=["train.checkpointing=true", "train.compile=full"]
        )
