"""Learning rates of groups of weights: which groups there are, and what --group_lr gives them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from higgs_ds.options.train import TrainOptions

# Groups of the parts that are trained by options of their own; a group has its option's name.
AUDIO_SELF_ATTENTION, WHISPER = "audio_self_attention", "whisper_conditioning"


def trained_groups(options: TrainOptions) -> tuple[str, ...]:
    """Return the groups of weights that a run trains, each of which can have a learning rate of its own."""
    lora = options.lora
    groups = options.tune.train_groups if options.is_full_finetuning else (*lora.lora_targets, *lora.also_train)
    return (*groups, *(part for part in (AUDIO_SELF_ATTENTION, WHISPER) if getattr(options.model, part)))


def group_rates(values: Sequence[str] | None) -> dict[str, float]:
    """Return the learning rate of each group in the values of --group_lr, which must have been checked."""
    pairs = (value.partition("=") for value in values or ())
    return {group: float(rate) for group, _, rate in pairs}


def check_learning_rates(options: TrainOptions) -> list[str]:
    """Return the problems of --group_lr and --loraplus_lr_ratio; empty if there are none."""
    problems, named, trained = [], list[str](), trained_groups(options)
    for value in options.optim.group_lr or ():
        group, _, rate = value.partition("=")
        if not _is_rate(rate):
            problems.append(f"--group_lr {value}: must be GROUP=LR with an LR above 0, for instance audio_mlp=1e-4")
        elif group not in trained:
            problems.append(f"--group_lr {value}: this run does not train {group}; it trains {', '.join(trained)}")
        elif group in named:
            problems.append(f"--group_lr {value}: {group} is given twice; remove one of them")
        named.append(group)
    ratio = options.optim.loraplus_lr_ratio
    if ratio is not None and options.is_full_finetuning:
        problems.append("--loraplus_lr_ratio: only applies to adapters, and --finetune full trains none; remove it")
    elif ratio is not None and not 1 <= ratio < math.inf:
        problems.append(f"--loraplus_lr_ratio {ratio}: must be 1 or more")
    return problems


def _is_rate(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False
