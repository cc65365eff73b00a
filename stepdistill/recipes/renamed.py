"""Names that recipes do not have and people write: those of earlier versions, and those that other trainers use."""

from __future__ import annotations

RENAMED = {
    "train.steps": "train.updates",
    "train.sheet_every": "train.preview_every",
    "train.ema": "train.average",
    "train.ema_power": "train.average_power",
    "train.ema_device": "train.average_device",
    "student.output_steps": "student.output_updates",
    "options.ema": "options.target_decay",
    "options.regression": "options.pair_distance",
    "options.regression_weight": "options.pair_weight",
    "options.gan_weight": "options.adversarial_weight",
    "options.gan_fake_weight": "options.discriminator_weight",
    "options.warmup": "options.tangent_warmup",
    "options.fake_steps": "options.fake_updates",
    "options.reflow_steps": "options.reflow_updates",
    "options.l2_steps": "options.l2_updates",
}
"""Key of an earlier version -> what it is called."""

SCHEDULES = {"consistency": "options.curriculum", "slimflow": "options.anneal_schedule"}
"""Method -> what its ``options.schedule`` is called."""

ELSEWHERE = {
    "batch_size": "train.batch",
    "train_batch_size": "train.batch",
    "global_batch_size": "train.batch",
    "gradient_accumulation_steps": "train.accumulate",
    "accumulation_steps": "train.accumulate",
    "grad_accum": "train.accumulate",
    "max_grad_norm": "train.clip",
    "gradient_clipping": "train.clip",
    "grad_clip": "train.clip",
    "learning_rate": "train.lr",
    "lr_scheduler": "train.schedule",
    "lr_warmup_steps": "train.warmup",
    "warmup_steps": "train.warmup",
    "gradient_checkpointing": "train.checkpointing",
    "max_train_steps": "train.updates",
    "num_train_steps": "train.updates",
    "max_steps": "train.updates",
    "iterations": "train.updates",
    "mixed_precision": "train.precision",
    "fp16": "train.precision=bf16",
    "bf16": "train.precision=bf16",
    "dtype": "train.precision",
    "torch_dtype": "train.precision",
    "adam_weight_decay": "train.weight_decay",
    "optimizer_type": "train.optimizer",
    "use_8bit_adam": "train.optimizer=adamw8bit",
    "use_ema": "train.average",
    "ema": "train.average",
    "ema_decay": "train.average",
    "checkpointing_steps": "train.checkpoint_every",
    "save_every": "train.checkpoint_every",
    "save_steps": "train.checkpoint_every",
    "checkpoints_total_limit": "train.keep",
    "validation_steps": "train.preview_every",
    "logging_steps": "train.log_every",
    "report_to": "train.tracker",
    "log_with": "train.tracker",
    "resolution": "data.size=[HEIGHT, WIDTH]",
    "image_size": "data.size=[HEIGHT, WIDTH]",
    "width": "data.size=[HEIGHT, WIDTH]",
    "height": "data.size=[HEIGHT, WIDTH]",
    "num_frames": "data.size=[HEIGHT, WIDTH, FRAMES]",
    "rank": "student.lora_rank",
    "lora": "student.lora_rank",
    "alpha": "student.lora_alpha",
    "network_dim": "student.lora_rank",
    "network_alpha": "student.lora_alpha",
    "num_inference_steps": "student.steps",
    "inference_steps": "student.steps",
    "guidance_scale": "options.guidance",
    "cfg_scale": "options.guidance",
    "cfg": "options.guidance",
    "pretrained_model_name_or_path": "teacher",
    "model": "teacher",
    "base_model": "teacher",
    "output_dir": "output",
    "train_data_dir": "data.images",
    "dataset_name": "data.images",
    "dataset": "data.images",
    "instance_data_dir": "data.images",
    "captions": "data.prompts",
    "prompt_file": "data.prompts",
    "seed": "train.seed",
}
"""Another trainer's name -> the key that does it here, wherever it was written."""

EPOCHS = ("epochs", "num_epochs", "num_train_epochs", "max_train_epochs")

VALUES = {
    "fp32": "float32",
    "float": "float32",
    "no": "float32",
    "bfloat16": "bf16",
    "fp16": "bf16",
    "float16": "bf16",
    "half": "bf16",
}
"""Another trainer's word for a number format -> the nearest that is taken here."""


def todays_name(path: str, owner: str) -> str | None:
    """What to say of a key that is not there but has a known equivalent; None where it has none.

    Args:
        path: the key, dotted.
        owner: the method's name for a key of ``options``, else anything.
    """
    new = SCHEDULES.get(owner) if path == "options.schedule" else RENAMED.get(path)
    if new is not None:
        return f"{path} is called {new}"
    last = path.rpartition(".")[2]
    if last in EPOCHS:
        return f"{path}: there are no epochs, length is said in updates: set train.updates"
    if (key := ELSEWHERE.get(last)) is not None and key != path:
        return f"{path} is not a key here: set {key}"
    return None


def old_names(section: str) -> dict[str, str]:
    """Keys of a section in earlier versions, and what they are called: for a name that is misspelt besides."""
    pairs = [(old.rpartition("."), new.rpartition(".")[2]) for old, new in RENAMED.items()]
    return {key: new for (parent, _, key), new in pairs if parent == section}


def todays_value(value: object, message: str) -> str | None:
    """The nearest word for a number format, where ``message`` says that it is allowed."""
    near = VALUES.get(value.lower()) if isinstance(value, str) else None
    if near is None or f"'{near}'" not in message:
        return None
    if near == "bf16" and str(value).lower() not in ("bfloat16",):
        return f"(float16 is not offered; the 16-bit format is {near})"
    return f"(write {near})"
