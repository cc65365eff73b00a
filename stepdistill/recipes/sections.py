"""The sections of a recipe: what the student is, what it learns from, what is added to its loss, how it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from stepdistill.recipes.rewards import reward_kind

_Positive = Annotated[int, Field(ge=1)]
_NotNegative = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """Frozen, and closed against keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _descends(times: Sequence[float]) -> bool:
    return all(later < earlier for earlier, later in pairwise(times))


class StudentOptions(Section):
    """What the student is.

    Attributes:
        steps: in how many network calls it draws, at the method's usual times. None takes the method's usual number.
        times: instead of steps, where it jumps from, descending in (0, 1]. A first time below 1 is for
            dmd, sid, sim, diff_instruct and f_distill on a discrete table: the network gets pure noise there.
        lora_rank: rank of the adapter that is trained; 0 trains the whole network. Networks that follow the student
            are then adapters, too, all on the teacher's one network (stepdistill/networks/roles.py).
        base: how the network under the adapters is held, the teacher's own: ``auto`` as the teacher is, in float32, or
            in bfloat16 with ``train.precision: bf16``, which ``bf16`` demands; ``int8`` (needs torchao) or ``nf4``
            (needs bitsandbytes), the linear layers that carry adapters in eight bits or four. The teacher is then the
            same rounded network, with adapters off. What is exported is merged into its unrounded weights.
        lora_alpha: the adapters' scale is alpha / rank; None means alpha = rank.
        freeze: what of its network stays as it starts: parts of names of parameters, or a level of its family:
            ``level-1`` is convolutions inside of blocks and what attention or a transformer's block ends with,
            ``level-2`` also queries, keys and values, ``level-3`` also skips (Zheng and Yang 2024, 2405.20750). Frozen
            weights have no gradient and no optimiser. Not with ``lora_rank``, which trains none of them.
        output: what its network says. ``teacher``: the same as the teacher's; ``v`` or ``x0``: that, after a short
            data-free stage that turns the teacher's network (stepdistill/training/output_matching.py); ``auto``: v
            where the teacher says eps and a one-step student is called near pure noise.
        output_samples: of the teacher, on which that stage works.
        output_updates: its updates.
        output_lr: its learning rate.
    """

    steps: _Positive | None = None
    times: tuple[float, ...] | None = None
    lora_rank: _NotNegative = 0
    base: Literal["auto", "bf16", "int8", "nf4"] = "auto"
    lora_alpha: Annotated[float, Field(gt=0)] | None = None
    freeze: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    output: Literal["auto", "teacher", "v", "x0"] = "auto"
    output_samples: _Positive = 1024
    output_updates: _Positive = 1000
    output_lr: Annotated[float, Field(gt=0)] = 1e-4

    @model_validator(mode="after")
    def _check(self) -> StudentOptions:
        times = self.times
        if times is not None and self.steps is not None:
            raise ValueError(f"steps is {self.steps} and times is {list(times)}: set one of them")
        if times is not None and (times == () or times[0] > 1 or times[-1] <= 0 or not _descends(times)):
            raise ValueError(f"times must descend within (0, 1], such as [1.0, 0.5]; found {list(times)}")
        if self.lora_alpha is not None and self.lora_rank == 0:
            raise ValueError("lora_alpha does nothing without lora_rank")
        if self.freeze and self.lora_rank:
            raise ValueError(
                f"freeze is {list(self.freeze)} and lora_rank is {self.lora_rank}, but an adapter leaves all of the "
                "network's own weights as they are: set freeze to [], or lora_rank to 0"
            )
        if self.base != "auto" and self.lora_rank == 0:
            raise ValueError(
                f"base is {self.base}, but without adapters nothing lies on one: set lora_rank, such as 16, or base "
                "to auto"
            )
        return self


class DataOptions(Section):
    """What it learns from.

    Attributes:
        prompts: a text file with one prompt per line, or another kind of file that stepdistill.data.prompts reads; None
            takes the teacher's own captions.
        images: real images with captions, for methods that need them: a folder of them, a webdataset .tar, or a folder
            of such; None takes the teacher's own.
        pairs: folder of cached (noise, teacher sample) pairs; None keeps them in the run folder.
        size: [height, width] in pixels, with a third number the frames of a video; None takes what the teacher's
            pipeline draws by itself.
        buckets: whether each image is cropped to the nearest of several aspect ratios, all of about the area of
            ``size``, and not to that of ``size`` itself; the images of a batch are then of one ratio.
        pairs_dtype: what pairs and their states are kept in: ``float32``, or half the bytes, ``bf16`` or ``float16``.
        rich: a .jsonl, .json, .csv or .tsv with a "prompt" and its "rich" caption in each row, for methods whose
            teacher is told more than the student (self_opd). A prompt that it has not is its own rich caption.
        partition: how the prompts are shared out to several students, each of which learns one part and is joined with
            the others by ``stepdistill join``: ``hash``, ``consecutive`` stretches, the Unicode ``groups`` of the
            embedded captions, or a file with a line for each prompt that names its key, see data/partition.py.
        part: which part the student learns, and of how many: ``1/4`` to ``4/4``; null is all prompts.
        part_pairs: the pairs that the student of a part learns from: the ``whole`` pool, as a few pairs more of other
            prompts keep a distribution wide, or its ``own`` prompts' alone, for methods that learn from pairs.
        route: of each of ``teachers`` a file with the prompts, of those to train on, that it teaches; all others are
            the teacher's own.
        damaged: what is done with a damaged file of a cache of prompts, latents or pairs: ``refuse``, naming it, or
            ``remake``.
    """

    prompts: str | None = None
    images: str | None = None
    pairs: str | None = None
    size: tuple[_Positive, _Positive] | tuple[_Positive, _Positive, _Positive] | None = None
    buckets: bool = False
    pairs_dtype: Literal["float32", "bf16", "float16"] = "float32"
    rich: str | None = None
    route: dict[str, str] = Field(default_factory=dict)
    partition: str = "hash"
    part: Annotated[str, Field(pattern=r"^[1-9]\d*/[1-9]\d*$")] | None = None
    part_pairs: Literal["whole", "own"] = "whole"
    damaged: Literal["refuse", "remake"] = "refuse"


class TrainOptions(Section):
    """How it is trained.

    Attributes:
        updates: how many, over all networks.
        budget_seconds: training time after which the run ends as if its updates were done, exported and measured, the
            rate where its schedule had it; 0 sets no limit.
        batch: samples per update, over all processes and accumulation.
        accumulate: parts a process works through one after the other to make one update.
        group: consecutive samples of a batch that are of one prompt, each with noise of its own: methods that compare a
            prompt's samples need several. A batch then has batch / group prompts.
        lr: learning rate of the student; a method scales it for its other networks.
        lr_of: what an update of that rate moves: ``weights``, or ``x0``: the student's rate is then divided by how far
            its clean sample moves with its output, as root mean square over its times, so that a rate means the same
            for every output kind (14.6 times as much for one step of eps on Stable Diffusion's table as for v).
        warmup: updates over which the rate rises from 0.
        schedule: the rate after the warm-up: constant, or falling to 0 as a cosine or a line.
        optimizer: AdamW, AdamW with moments of eight bits, or Adafactor. ``adamw8bit`` holds two bytes a weight (needs
            bitsandbytes), ``adafactor`` next to nothing for linear layers and two thirds of a number a weight for
            convolutions of 3x3. Neither of them with ``parallel: sharded``. See stepdistill/training/optimizers.py.
        betas: of AdamW.
        weight_decay: of the optimiser.
        clip: largest gradient norm of a network; 0 leaves gradients as they are.
        average: decay of the averaged weights per update of the student, in (0, 1); 0 exports the last weights.
        average_power: instead of one decay, that of a power-function average: after n updates (1 - 1 / n)^(power + 1)
            (Karras et al. 2024, 2312.02696, eq. 127), which forgets the start at the pace at which the run gets longer.
            16.97 and 6.94 are averages of relative width 0.05 and 0.1; 0 takes ``average``.
        average_device: where the average lies: ``same`` as the weights, or ``cpu``, which spares a GPU four bytes a
            trained weight, and each update of the student then waits for them to be sent there.
        seed: of every random number of the run.
        weights: how what is trained is held: ``float32``; ``bf16``, matrices and their gradients in bfloat16, rounded
            stochastically at each update; ``master``, the same with a float32 weight beside each, which is what is
            updated, averaged and exported: the numbers of float32 without autocast's casts. Both need ``precision:
            bf16``, and are for whole networks: an adapter is small and float32, and what it lies on is held as the
            teacher is. Over ``accumulate`` parts gradients are then summed in bfloat16. Bytes a weight, with gradient
            and AdamW: 16, 12 and 16; see stepdistill/training/weights.py.
        precision: number format of the networks' arithmetic. Optimiser and average stay float32, and trained weights
            but for ``weights``; the VAE computes in it, and what is exported was never rounded; of the frozen teacher,
            matrices alone are held in bf16. Differences for derivatives (scm, meanflow, flow_map) are taken in float32
            all the same. Consistency methods with short steps may want ``teacher_precision: float32``: near pure noise
            bf16 moves an eps network's x0 by as much as such a step does.
        teacher_precision: of the teacher's arithmetic where it should differ; float32 then holds it in float32.
        attention: sdpa (torch's fused kernels), triton (our own; cuda alone), xformers, math (the plain product), or a
            backend of diffusers' dispatcher, such as _native_flash or flash, for networks that ask it (Flux, Wan, but
            no UNet, DiT or Stable Diffusion 3). ``auto`` is sdpa. Whatever it is, exact derivatives of continuous-time
            methods take our own where it pays: Triton's on cuda, on a CPU tiles where logits are many. What runs here
            says ``stepdistill doctor``.
        compile: torch.compile of the networks while they are trained. ``regional``, the blocks that repeat in them;
            ``full``, each as a whole; ``graphs``, as a whole and replayed as CUDA graphs, for small networks on cuda.
            Needs a C++ compiler; the first updates take long. See stepdistill/networks/compiled.py.
        checkpointing: gradient checkpointing: less memory for one more forward pass. Networks keep the inputs of their
            blocks alone and run the blocks once more in the backward pass, with the same numbers to the last bit, so
            that a run may be resumed with or without it. Student, followers and teacher; not with ``compile``.
        checkpoint_every: updates between checkpoints.
        keep: newest checkpoints that stay on the disk.
        preview_every: updates between previews (pictures of the same prompts and seeds); 0 draws none.
        log_every: updates whose numbers are read from the device together, written to stats.jsonl and checked; they are
            read before every preview and checkpoint, too. Each read waits for a GPU; null is 10 there, and 1 on a
            CPU.
        parallel: how several processes hold the networks: ``replicated``, each all of them; ``sharded``, each a part of
            every one, the frozen teacher too, which is gathered at each call; ``auto`` is replicated.
        context_parallel: processes that share each sample's tokens, for states too long for one GPU; they stand side by
            side in rank, and others hold other samples. For Wan, Flux, Flux.2 and Qwen-Image, whose tokens
            and heads it must divide; each process holds all networks. Not for discriminators on a network's features,
            exact derivatives, ``compile`` or ``parallel: sharded``. See stepdistill/networks/shared_tokens.py.
        warm_starts: folder in which warm starts are kept, and looked for: runs that begin by the same regression on the
            same pairs then make it once. ``compare --methods`` gives its runs one; null keeps none.
        tracker: an experiment tracker that accelerate knows, such as tensorboard or wandb.
    """

    updates: _Positive = 1000
    budget_seconds: Annotated[float, Field(ge=0)] = 0.0
    batch: _Positive = 64
    accumulate: _Positive = 1
    group: _Positive = 1
    lr: Annotated[float, Field(gt=0)] = 1e-4
    lr_of: Literal["weights", "x0"] = "weights"
    warmup: _NotNegative = 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    optimizer: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Annotated[float, Field(ge=0)] = 1.0
    average: Annotated[float, Field(ge=0, lt=1)] = 0.0
    average_power: Annotated[float, Field(ge=0)] = 0.0
    average_device: Literal["same", "cpu"] = "same"
    seed: _NotNegative = 0
    weights: Literal["float32", "bf16", "master"] = "float32"
    precision: Literal["float32", "bf16"] = "float32"
    teacher_precision: Literal["float32", "bf16"] | None = None
    attention: str = "auto"
    compile: Literal["none", "regional", "full", "graphs"] = "none"
    checkpointing: bool = False
    checkpoint_every: _Positive = 200
    keep: _Positive = 2
    preview_every: _NotNegative = 100
    log_every: _Positive | None = None
    parallel: Literal["auto", "replicated", "sharded"] = "auto"
    context_parallel: _Positive = 1
    warm_starts: str | None = None
    tracker: str | None = None

    @model_validator(mode="after")
    def _check(self) -> TrainOptions:
        if self.batch % self.accumulate:
            raise ValueError(f"batch ({self.batch}) must be a multiple of accumulate ({self.accumulate})")
        if self.batch // self.accumulate % self.group:
            raise ValueError(
                f"batch over accumulate ({self.batch // self.accumulate}) must be a multiple of group ({self.group}), "
                "as a prompt's samples stay together"
            )
        if self.average and self.average_power:
            raise ValueError("average and average_power are two kinds of one average: set one of them to 0")
        if self.average_device == "cpu" and self.parallel == "sharded":
            raise ValueError(
                "average_device is cpu and parallel is sharded, whose parts lie beside their weights: set "
                "average_device to same, or parallel to replicated"
            )
        if self.optimizer != "adamw" and self.parallel == "sharded":
            raise ValueError(
                f"optimizer is {self.optimizer} and parallel is sharded, whose parts it cannot take: set optimizer to "
                "adamw, or parallel to replicated"
            )
        if self.weights != "float32" and self.precision != "bf16":
            raise ValueError(
                f"weights is {self.weights} and precision is {self.precision}, but bfloat16 weights compute in it: "
                "set precision to bf16, or weights to float32"
            )
        if self.weights != "float32" and self.parallel == "sharded":
            raise ValueError(
                f"weights is {self.weights} and parallel is sharded, whose parts are float32: set weights to float32, "
                "or parallel to replicated"
            )
        if self.context_parallel > 1 and (self.parallel == "sharded" or self.compile != "none"):
            raise ValueError(
                f"context_parallel is {self.context_parallel}, which goes neither with parallel=sharded nor with "
                "compile: set it to 1, or parallel to replicated and compile to none"
            )
        if self.checkpointing and self.compile != "none":
            raise ValueError(
                f"checkpointing is true and compile is {self.compile}, which do not go together: set checkpointing to "
                "false, or compile to none"
            )
        return self


class TermOptions(Section):
    """Terms beside any method's own loss of its student; at weight 0 they are absent. See stepdistill/losses/terms.py.

    Attributes:
        regression_weight: of the regression on cached pairs.
        regression: its distance.
        perceptual_weight: of the same regression in the features of an image network.
        perceptual: that network: ``emoji`` or ``clip:FOLDER``.
        gan_weight: of the GAN loss of the student's samples against real images.
        gan_lr_ratio: learning rate of its discriminator over train.lr.
        reward_weight: of how good the student's samples are, decoded, which is to rise. Measure by another network.
        reward: what judges them, by one name or several, whose numbers are added: ``clip:emoji`` or ``clip:FOLDER``,
            the cosine with their own prompts (PickScore and HPSv2 are such networks); ``judge``, the second embedded
            network; ``colour`` and ``ink``, rules; ``module:PACKAGE.MODULE:FUNCTION`` or ``./FILE.py:FUNCTION``, your
            own. See docs/guides/rewards.md.
        reward_of: ``sample``, as it is drawn, or ``prediction``, the one that the method's own loss is of (RG-LCD).
        reward_share: share of the samples that are decoded, one over a whole number: decoding is what it costs.
        reward_after: the method's steps before it acts.
        reward_last_call: whether the gradient reaches the last call of a drawing alone, or all of them.
        reward_below: of predictions, the greatest time of those it is of: from nearly pure noise they are a blur.
        reward_bounded: whether its gradient on each sample is no larger than that of the method's own loss there.
        reward_target: what is enough: relu(target - reward) is to fall then (Hyper-SD). None has no end.
        reward_proxy: whether a small network of latents learns the reward, and is what the student climbs (RG-LCD).
        reward_temperature: of the differences that it learns.
        reward_lr_ratio: its learning rate over train.lr.
    """

    regression_weight: Annotated[float, Field(ge=0)] = 0.0
    regression: Literal["l2", "l1", "huber"] = "l2"
    perceptual_weight: Annotated[float, Field(ge=0)] = 0.0
    perceptual: str = "emoji"
    gan_weight: Annotated[float, Field(ge=0)] = 0.0
    gan_lr_ratio: Annotated[float, Field(gt=0)] = 1.0
    reward_weight: Annotated[float, Field(ge=0)] = 0.0
    reward: str | tuple[str, ...] = "clip:emoji"
    reward_of: Literal["sample", "prediction"] = "sample"
    reward_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    reward_after: _NotNegative = 0
    reward_last_call: bool = True
    reward_below: Annotated[float, Field(gt=0, le=1)] = 1.0
    reward_bounded: bool = False
    reward_target: float | None = None
    reward_proxy: bool = False
    reward_temperature: Annotated[float, Field(gt=0)] = 1.0
    reward_lr_ratio: Annotated[float, Field(gt=0)] = 1.0

    @field_validator("reward")
    @classmethod
    def _known(cls, names: str | tuple[str, ...]) -> str | tuple[str, ...]:
        kinds = [reward_kind(name) for name in ((names,) if isinstance(names, str) else names)]
        if not kinds or kinds.count("file") > 1:
            raise ValueError("give one reward or more, of them one file at most, as a run keeps a copy of it")
        return names

    @field_validator("reward_share")
    @classmethod
    def _one_over(cls, share: float) -> float:
        if abs(1 / share - round(1 / share)) > 0.01:
            raise ValueError(f"reward_share must be one over a whole number, such as 0.25; found {share:g}")
        return share

    @model_validator(mode="after")
    def _check(self) -> TermOptions:
        if self.reward_of == "sample" and (self.reward_below < 1 or self.reward_proxy):
            said = "reward_proxy is true" if self.reward_proxy else f"reward_below is {self.reward_below:g}"
            raise ValueError(
                f"{said}, which is for predictions: set reward_of to prediction, or leave it out"
            )
        if not self.reward_last_call and (self.reward_of == "prediction" or self.reward_bounded):
            raise ValueError(
                "reward_last_call is false, which is for samples drawn for the reward alone: leave reward_of and "
                "reward_bounded out, or set it to true"
            )
        return self

    @property
    def rewards(self) -> tuple[str, ...]:
        """The names of the rewards."""
        return (self.reward,) if isinstance(self.reward, str) else self.reward

    @field_validator("perceptual")
    @classmethod
    def _has_a_graph(cls, name: str) -> str:
        if name != "emoji" and not name.startswith("clip:"):
            raise ValueError("a loss needs a network with a graph: give emoji or clip:FOLDER")
        return name

    def networks(self, rewarded: bool = False) -> dict[str, str]:
        """The feature networks that the terms look through, and the keys that say so.

        Args:
            rewarded: whether the method reads the rewards for itself, whatever the term's weight.
        """
        found: dict[str, str] = {}
        for key, looks, names in (
            ("perceptual", self.perceptual_weight, (self.perceptual,)),
            ("reward", self.reward_weight or rewarded, self.rewards),
        ):
            for name in names if looks else ():
                network = "emoji" if name == "clip:emoji" else name
                if network in ("emoji", "judge") or network.startswith("clip:"):  # the others are no networks
                    found[network] = ", ".join(filter(None, (found.get(network), f"terms.{key}")))
        return found

    @property
    def needs(self) -> frozenset[str]:
        """What the terms ask of the data."""
        pairs = {"pairs", "states"} if self.regression_weight or self.perceptual_weight else set()
        return frozenset(pairs | ({"images"} if self.gan_weight else set()))


SignName = Literal[
    "not_finite",
    "rate",
    "gradients",
    "loss",
    "still",
    "lag",
    "away",
    "denoising",
    "teacher",
    "collapse",
    "oversaturation",
    "guidance",
    "spectrum",
    "drift",
    "average",
    "data",
]
"""What a run is watched for, see stepdistill/training/signs.py."""
Action = Literal["say", "slow_down", "roll_back", "stop"]
"""What is done about it."""


class HealthOptions(Section):
    """How a run is watched, and what is done where it is found unwell. See stepdistill/training/monitor.py.

    Attributes:
        every: updates between two looks at a few samples of the student, undecoded, beside what the teacher and
            followers say of them; 0 looks never, and watches what each update tells alone.
        on_trouble: what is done: ``say`` it; ``slow_down``, the rate times ``slow_down``; ``roll_back``, to the last
            checkpoint after which a look found nothing, and slow down from there; ``stop``. Numbers that are not
            finite are no state to go on from: there the first two stop, too.
        actions: another action for a sign of its own, by name, such as ``{collapse: stop, lag: slow_down}``.
        slow_down: what the rate is multiplied by, of the network that a sign names, or else of the student.
        most: how often a run may be slowed down or rolled back; the next time it stops.
    """

    every: _NotNegative = 40
    on_trouble: Action = "say"
    actions: dict[SignName, Action] = Field(default_factory=dict)
    slow_down: Annotated[float, Field(gt=0, lt=1)] = 0.5
    most: _NotNegative = 3

    def action(self, sign: SignName) -> Action:
        """What is done about a sign."""
        return self.actions.get(sign, self.on_trouble)


class AgainstTeacherOptions(Section):
    """What ``evaluate: true`` measures of a teacher of your own: the student against the teacher's own pictures of the
    same prompts and noises, drawn once and kept in the cache. See stepdistill/evaluation/against_teacher.py.

    Attributes:
        pictures: how many of each; None is 64, or 256 of 256 x 256 pixels or fewer, or 16 videos.
        steps: of the teacher's pictures.
        features: the network of the distances, such as ``clip:FOLDER``, ``dinov2:FOLDER`` or ``inception``; ``auto``
            takes a CLIP, DINOv2 or Inception that lies in the Hub's cache or where FID's tools keep theirs, or else the
            embedded network, which sees 32 x 32 pixels.
        texts: the network of the CLIP score, ``clip:FOLDER``; ``auto`` takes one that lies in the Hub's cache, and
            leaves the score out where there is none, as ``none`` does.
    """

    pictures: Annotated[int, Field(ge=4)] | None = None
    steps: _Positive = 25
    features: str = "auto"
    texts: str = "auto"

    @field_validator("texts")
    @classmethod
    def _has_texts(cls, name: str) -> str:
        if name not in ("auto", "none", "emoji") and not name.startswith("clip:"):
            raise ValueError(f"{name} has no texts: give clip:FOLDER, auto or none")
        return name


class ExportOptions(Section):
    """What a student's folder holds.

    Attributes:
        what: of a LoRA student: ``merged``, a pipeline whose network has the adapter in its weights; ``adapter``, the
            adapter and the scheduler alone, for the teacher that is elsewhere; ``both``, the pipeline with the adapter
            beside it. A student of its own weights is a pipeline, whatever this is, but not ``adapter``.
        max_shard_size: of the files of its network, such as 5GB; None is as the teacher's are.
        kohya: whether the adapter is written once more under the names that kohya's scripts and ComfyUI know.
        comfyui: whether a workflow for ComfyUI is written that draws with the student, ``comfyui.json``.
    """

    what: Literal["adapter", "merged", "both"] = "both"
    max_shard_size: Annotated[str, Field(pattern=r"^[1-9]\d*(KB|MB|GB)$")] | None = None
    kohya: bool = False
    comfyui: bool = False
