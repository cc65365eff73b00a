"""The same image files through this package and through the established tools: features and distances equal to 1e-4.

The network has the layout of FID's Inception and fixed random weights, read at its first pool (64 features) where a
whole distance is computed, and at its end (2,048) where features are compared; STEPDISTILL_INCEPTION=FILE adds the
comparison with the public weights. The tools: clean-fid 0.1.35, torch-fidelity 0.4.0, torchmetrics 1.9.0.

Where numbers may differ, and why: clean-fid resizes with PIL, this package with torch, equal to 3e-3 of 255; both take
features in float32. clean-fid's root (scipy's) is good to about 1e-6 for singular covariances. torch-fidelity and
clean-fid average KID over random subsets: here the one subset is the whole set, which makes it this package's value.
"""

from __future__ import annotations

import importlib
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from stepdistill.data.image_archives import open_images
from stepdistill.features.inception import InceptionFeatures
from stepdistill.features.inception_network import Inception, random_state
from stepdistill.features.load import load_features
from stepdistill.features.own_module import ModuleFeatures
from stepdistill.metrics.frechet import frechet_distance_between
from stepdistill.metrics.inception_score import inception_score
from stepdistill.metrics.kid import kernel_distance
from stepdistill.metrics.prdc import Balls, precision, recall
from stepdistill.system.emoji import emoji_images

TOLERANCE = 1e-4
COUNT = 20
PUBLIC_NAME = "pt_inception-2015-12-05-6726825d.pth"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """20 drawn and 20 real images, 40 x 48 pixels: emoji with a margin, the drawn ones with noise."""
    images, root = emoji_images(), tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    found = []
    for name, first in (("drawn", 0), ("real", 500)):
        (root / name).mkdir()
        for i in range(COUNT):
            picture = np.pad(images[first + 7 * i], ((3, 5), (9, 7), (0, 0)), mode="reflect").astype(np.int64)
            if name == "drawn":
                picture += noise.integers(-25, 26, picture.shape)
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(root / name / f"{i:02}.png")
        found.append(root / name)
    return found[0], found[1]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(random_state(), file)
    return file


def network(weights: Path, mode: str) -> InceptionFeatures:
    found = load_features(f"inception:{weights}", resize=mode)
    assert isinstance(found, InceptionFeatures)
    return found


def early(features: InceptionFeatures, folder: Path) -> Tensor:
    """The 64 features of the first pool, of a folder's images."""
    batches = open_images(folder).batches(COUNT)
    return torch.cat([features.activations(pixels, "64").features for pixels in batches])


def tool(name: str) -> Any:
    """The module of an established tool; the test is skipped where it is missing or does not import."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch raises RuntimeError
        pytest.skip(f"{name} does not import here: {error}")


def same(ours: float, theirs: float) -> None:
    assert ours == pytest.approx(theirs, rel=TOLERANCE), (ours, theirs)


def same_features(ours: Tensor, theirs: Any) -> None:
    """Relative to the largest feature."""
    theirs = torch.as_tensor(theirs)
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) < TOLERANCE * float(theirs.abs().max())


def test_clean_equals_clean_fid(folders: tuple[Path, Path], weights: Path) -> None:
    fid = tool("cleanfid.fid")
    module = Inception(random_state())

    def extract(batch: Tensor) -> Tensor:  # float [B, 3, 299, 299] in 0..255, resized by clean-fid
        return module((batch - 128) / 128, "64").features

    options = {"device": torch.device("cpu"), "num_workers": 0, "mode": "clean", "verbose": False}
    theirs = [fid.get_folder_features(str(f), extract, batch_size=7, **options) for f in folders]
    ours = [early(network(weights, "clean"), folder) for folder in folders]
    for mine, other in zip(ours, theirs, strict=True):
        same_features(mine, other)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            distance = fid.fid_from_feats(*theirs)
    except TypeError:
        pytest.skip("this scipy has no sqrtm(disp=), which clean-fid 0.1.35 calls: features were compared")
    same(frechet_distance_between(*ours), distance)
    same(kernel_distance(*ours).value, fid.kernel_distance(*theirs, num_subsets=1, max_subset_size=COUNT))


def test_pytorch_equals_clean_fids_pytorch_fid(
    folders: tuple[Path, Path], weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """clean-fid's ``legacy_pytorch``: pytorch-fid's module, torchvision's layers patched, and its resize."""
    features, fid = tool("cleanfid.features"), tool("cleanfid.fid")
    hub = tmp_path / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    (hub / PUBLIC_NAME).symlink_to(weights)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = features.build_feature_extractor(
            "legacy_pytorch", torch.device("cpu"), use_dataparallel=False
        )
        theirs = fid.get_folder_features(
            str(folders[0]),
            model,
            num=2,
            num_workers=0,
            mode="legacy_pytorch",
            device=torch.device("cpu"),
            verbose=False,
        )
    pixels = next(open_images(folders[0]).batches(2))
    same_features(network(weights, "pytorch").images(pixels), theirs)


def test_inception_equals_torch_fidelitys_at_every_layer(folders: tuple[Path, Path], weights: Path) -> None:
    module = tool("torch_fidelity.feature_extractor_inceptionv3")
    names = ["64", "192", "768", "2048", "logits_unbiased"]
    theirs = module.FeatureExtractorInceptionV3("random", names, feature_extractor_weights_path=str(weights))
    spatial: list[Tensor] = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, out: spatial.append(out[:, :7]))
    pixels = next(open_images(folders[0]).batches(2))
    with torch.no_grad():
        expected = dict(zip(names, theirs(pixels), strict=True))
    ours = network(weights, "tf1")
    for name in ("64", "192", "768"):
        same_features(ours.activations(pixels, name).features, expected[name])  # type: ignore[arg-type]
    found = ours.activations(pixels)
    assert found.logits is not None and found.spatial is not None
    same_features(found.features, expected["2048"])
    same_features(found.logits, expected["logits_unbiased"])
    same_features(found.spatial, spatial[0].permute(0, 2, 3, 1).flatten(1))


@pytest.mark.slow
def test_the_inception_score_equals_torch_fidelitys_default(
    folders: tuple[Path, Path], weights: Path
) -> None:
    """Of the layer that it takes by itself, logits without bias; with bias the score is another."""
    theirs = tool("torch_fidelity").calculate_metrics(
        input1=str(folders[0]),
        isc=True,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        isc_splits=2,
        samples_shuffle=False,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    ours = network(weights, "tf1")
    logits = torch.cat([ours.activations(p).logits for p in open_images(folders[0]).batches(COUNT)])
    score = inception_score(logits, splits=2)
    same(score.value - 1, theirs["inception_score_mean"] - 1)  # of random weights it is near 1
    same(score.deviation, theirs["inception_score_std"])
    biased = inception_score(logits + random_state()["fc.bias"], splits=2).value
    assert abs(biased - score.value) > 10 * TOLERANCE * (score.value - 1)


def test_tf1_kid_precision_and_recall_equal_torch_fidelity(folders: tuple[Path, Path], weights: Path) -> None:
    theirs = tool("torch_fidelity").calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        fid=True,
        kid=True,
        prc=True,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        feature_layer_fid="64",
        feature_layer_kid="64",
        feature_layer_prc="64",
        kid_subsets=1,
        kid_subset_size=COUNT,
        samples_shuffle=False,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    drawn, real = (early(network(weights, "tf1"), folder) for folder in folders)
    same(frechet_distance_between(drawn, real), theirs["frechet_inception_distance"])
    same(kernel_distance(drawn, real).value, theirs["kernel_inception_distance_mean"])
    balls = Balls.between(real, drawn, 3)
    assert precision(balls) == pytest.approx(theirs["precision"], abs=1e-6)
    assert recall(balls) == pytest.approx(theirs["recall"], abs=1e-6)


class Small(nn.Module):
    """Two fixed random convolutions, 12 features."""

    num_features = 12

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first = nn.Parameter(torch.randn(8, 3, 3, 3, generator=generator) / 5)
        self.second = nn.Parameter(torch.randn(12, 8, 3, 3, generator=generator) / 8)

    def forward(self, pixels: Tensor) -> Tensor:
        x = nn.functional.conv2d(pixels.float() / 128 - 1, self.first, stride=2).relu()
        return nn.functional.conv2d(x, self.second, stride=2).relu().mean((2, 3))


def test_fid_and_kid_equal_torchmetrics_with_the_same_module(folders: tuple[Path, Path]) -> None:
    fid, kid = tool("torchmetrics.image.fid"), tool("torchmetrics.image.kid")
    drawn, real = (next(open_images(folder).batches(COUNT)) for folder in folders)  # [20, 3, 40, 48]
    drawn, real = drawn[..., :40].contiguous(), real[..., :40].contiguous()
    theirs = (
        fid.FrechetInceptionDistance(feature=Small()),
        kid.KernelInceptionDistance(feature=Small(), subsets=1, subset_size=COUNT),
    )
    for metric in theirs:
        metric.update(real, real=True)
        metric.update(drawn, real=False)
    ours = ModuleFeatures(Small(), name="small", dimension=12, size=40)
    x, y = ours.images(drawn), ours.images(real)
    same(frechet_distance_between(x, y), float(theirs[0].compute()))
    same(kernel_distance(x, y).value, float(theirs[1].compute()[0]))


def test_the_public_weights_give_torch_fidelitys_fid(folders: tuple[Path, Path]) -> None:
    file = os.environ.get("STEPDISTILL_INCEPTION")
    if not file:
        pytest.skip("STEPDISTILL_INCEPTION does not name pt_inception-2015-12-05-6726825d.pth")
    theirs = tool("torch_fidelity").calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        fid=True,
        feature_extractor_weights_path=file,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    ours = load_features(f"inception:{file}", resize="tf1")
    assert ours.fd_name == "FID (tf1)"
    drawn, real = (torch.cat([ours.images(p) for p in open_images(f).batches(COUNT)]) for f in folders)
    same(frechet_distance_between(drawn, real), theirs["frechet_inception_distance"])
