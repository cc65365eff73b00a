"""The section ``train`` of a recipe: how long, how fast, in what arithmetic, and on how many processes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stepdistill.recipes.section import NotNegative, Positive, Section


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

    updates: Positive = 1000
    budget_seconds: Annotated[float, Field(ge=0)] = 0.0
    batch: Positive = 64
    accumulate: Positive = 1
    group: Positive = 1
    lr: Annotated[float, Field(gt=0)] = 1e-4
    lr_of: Literal["weights", "x0"] = "weights"
    warmup: NotNegative = 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    optimizer: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Annotated[float, Field(ge=0)] = 1.0
    average: Annotated[float, Field(ge=0, lt=1)] = 0.0
    average_power: Annotated[float, Field(ge=0)] = 0.0
    average_device: Literal["same", "cpu"] = "same"
    seed: NotNegative = 0
    weights: Literal["float32", "bf16", "master"] = "float32"
    precision: Literal["float32", "bf16"] = "float32"
    teacher_precision: Literal["float32", "bf16"] | None = None
    attention: str = "auto"
    compile: Literal["none", "regional", "full", "graphs"] = "none"
    checkpointing: bool = False
    checkpoint_every: Positive = 200
    keep: Positive = 2
    preview_every: NotNegative = 100
    log_every: Positive | None = None
    parallel: Literal["auto", "replicated", "sharded"] = "auto"
    context_parallel: Positive = 1
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
