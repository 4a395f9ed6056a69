"""The options of the optimization: micro-batches, steps, learning rate, weights of the losses."""

from __future__ import annotations

from dataclasses import dataclass

from higgs_ds.options.fields import OPTIMIZERS, option


@dataclass(frozen=True)
class OptimOptions:
    """Optimization"""

    batch_size: int = option(2, "micro-batch size: samples, or pairs with --objective dpo, per rank and forward pass")
    max_tokens_per_batch: int | None = option(
        None, "fill each micro-batch with samples up to this many tokens, padding included, instead of --batch_size"
    )
    bucket_size: int = option(
        1024, "number of samples sorted by length together, to reduce padding; 1 turns sorting off"
    )
    grad_accum: int = option(8, "gradient accumulation steps: micro-batches per rank and optimizer step")
    epochs: int = option(2, "passes over the training samples")
    max_steps: int | None = option(None, "stop after this many optimizer steps; replaces --epochs")
    optim: str = option(
        "adamw",
        "AdamW with its state in float32 or in 8 bits; a paged state may move to host memory when the GPU is full",
        OPTIMIZERS,
    )  # fmt: skip
    lr: float = option(2e-4, "peak learning rate of AdamW; fully fine-tuned weights usually need a much lower one")
    group_lr: tuple[str, ...] | None = option(
        None,
        "peak learning rates of groups, those of --lora_targets, --also_train or --train_groups, audio_self_attention "
        "or whisper_conditioning; the others have --lr",
        metavar="GROUP=LR",
    )
    loraplus_lr_ratio: float | None = option(
        None, "LoRA+: the learning rate of the adapters' B factors is this many times that of their A factors"
    )
    lr_scheduler_type: str = option(
        "cosine", "learning rate schedule after the warm-up; warmup_stable_decay decays only at the end of training",
        ("cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "warmup_stable_decay"),
    )  # fmt: skip
    lr_cycles: int = option(2, "number of cycles of cosine_with_restarts")
    lr_decay_ratio: float = option(
        0.1, "fraction of the steps in which warmup_stable_decay decays to 0, above 0, up to 1"
    )
    warmup_ratio: float = option(0.03, "fraction of the steps in which the learning rate rises from 0, 0 to below 1")
    weight_decay: float = option(0.0, "weight decay of AdamW")
    max_grad_norm: float = option(
        1.0, "maximum gradient norm; larger gradients are scaled down to it; 0 turns clipping off"
    )
    text_loss_weight: float = option(1.0, "weight of the mean text loss in the total loss")
    audio_loss_weight: float = option(1.0, "weight of the mean audio loss in the total loss")
    codebook_weights: tuple[float, ...] | None = option(
        None, "weight of each codebook in the audio loss, scaled to a sum of 1 (default: equal weights)"
    )
    ema_decay: float | None = option(
        None,
        "also keep an exponential moving average of the trained weights with this decay, for instance 0.999; it is "
        "saved beside them, and validated too (default: none)",
    )
    on_nonfinite: str = option(
        "stop", "at a NaN or infinite loss or gradient: stop, or skip the step (up to 10 steps, or 1 in 100)",
        ("stop", "skip"),
    )  # fmt: skip
    seed: int = option(42, "random seed of the validation split, the sample order, the initial adapters and dropout")
