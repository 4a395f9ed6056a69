"""`--init_from`: the adapter that a run starts from, and whether it fits the run's options and its base."""

from __future__ import annotations

import os
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from higgs_ds.adapters.load import Adapter, check_fit, read_adapter
from higgs_ds.adapters.origin import Origin
from higgs_ds.adapters.save import ADAPTER_CONFIG
from higgs_ds.bases.builtin import BUILT_IN
from higgs_ds.bases.bundle import Bundle
from higgs_ds.common.errors import InputError
from higgs_ds.common.hub import PINNED, is_hub_id
from higgs_ds.common.resources import command
from higgs_ds.common.run_files import ADAPTER_COPY, ADAPTER_FOLDER, FINAL_MODEL
from higgs_ds.common.tensor_files import sampled_digest, weight_files
from higgs_ds.model.config import fully_trained_parts
from higgs_ds.model.families import MODEL_TYPES, read_json_config
from higgs_ds.model.loading import empty_model
from higgs_ds.model.lora import AdaptedLayer, groups_of_layer
from higgs_ds.model.quantization import BaseQuantization
from higgs_ds.options.fields import LORA_TARGET_GROUPS, NATIVE
from higgs_ds.options.train import TrainOptions


@dataclass(frozen=True)
class StartingPoint:
    """An adapter that a run starts from, or, of a resumed run, the one in its checkpoint.

    `folder`: as given; `origins`: of the run, beginning with this adapter; `comparison`: see `compare_bases`.
    """

    folder: Path
    adapter: Adapter
    origins: tuple[Origin, ...]
    comparison: str = ""

    @property
    def adapted(self) -> tuple[AdaptedLayer, ...]:
        """The layers with an adapter."""
        adapter = self.adapter
        return tuple(
            AdaptedLayer(name.removesuffix(".weight"), len(factors.a), adapter.values.alpha(adapter.layers[name]))
            for name, factors in adapter.factors.items()
        )

    def error(self, *problems: str) -> InputError:
        return InputError([f"--init_from {self.folder}: {problem}" for problem in problems])


def starting_point(
    options: TrainOptions, given: Set[str], output_dir: Path | None = None, resume_from: Path | None = None
) -> tuple[StartingPoint | None, TrainOptions]:
    """Return the adapter of --init_from, and the options with its values; without it, None and the same options.

    Args:
        given: names of the options that the user has set, which must not contradict the adapter.
        output_dir: the run's folder, in which an adapter would be overwritten.
        resume_from: a checkpoint, from which the adapter's values are taken instead. The adapter need not exist then.

    Raises:
        InputError: with all problems that do not depend on the base.
    """
    folder = options.lora.init_from
    if folder is None:
        return None, options
    start = _of_new_run(folder) if resume_from is None else _of_resumed_run(folder, resume_from)
    resolved, problems = _with_values_of(start, options, given)
    problems += _not_trainable(start) + _wrong_precision(start, options)
    written = [] if output_dir is None else [output_dir / name for name in (ADAPTER_FOLDER, ADAPTER_COPY, FINAL_MODEL)]
    if os.path.realpath(adapter_in(folder)) in map(os.path.realpath, written):
        problems.append("this run would replace it; choose another --output_dir")
    if problems:
        raise start.error(*problems)
    return start, resolved


def adapter_in(folder: Path) -> Path:
    """Return the folder of the adapter in a run or checkpoint, or the same folder."""
    inside = folder / ADAPTER_FOLDER
    return inside if (inside / ADAPTER_CONFIG).is_file() and not (folder / ADAPTER_CONFIG).is_file() else folder


def _read(folder: Path) -> Adapter:
    try:
        return read_adapter(adapter_in(folder))
    except InputError as error:
        raise InputError([f"--init_from {problem}" for problem in error.problems]) from error


def _of_new_run(folder: Path) -> StartingPoint:
    adapter = _read(folder)
    origin = Origin.of(adapter_in(folder), adapter.record.sha256)
    return StartingPoint(folder, adapter, (origin, *adapter.record.origins))


def _of_resumed_run(folder: Path, checkpoint: Path) -> StartingPoint:
    adapter = _read(checkpoint)
    origins = adapter.record.origins
    if not origins:
        raise InputError(
            f"--init_from {folder}: the run of {checkpoint} did not start from an adapter; omit this option"
        )
    if (adapter_in(folder) / ADAPTER_CONFIG).is_file() and _read(folder).record.sha256 != origins[0].sha256:
        raise InputError(
            f"--init_from {folder}: is not, or no longer, the adapter {origins[0].name} (SHA-256 "
            f"{origins[0].sha256[:12]}) that the run of {checkpoint} started from"
        )
    return StartingPoint(folder, adapter, origins)


def _with_values_of(start: StartingPoint, options: TrainOptions, given: Set[str]) -> tuple[TrainOptions, list[str]]:
    """Return the options with the adapter's values, and which of the given values differ from them."""
    values = start.adapter.values
    groups = {group for layer in start.adapted for group in groups_of_layer(layer.name)}
    found = {
        "lora_r": values.r,
        "lora_alpha": int(values.lora_alpha) if values.lora_alpha == int(values.lora_alpha) else values.lora_alpha,
        "lora_targets": tuple(group for group in LORA_TARGET_GROUPS if group in groups),
        "use_rslora": values.use_rslora,
        "use_dora": values.use_dora,
        "lora_bias": values.lora_bias,
    }
    differing = {"lora_r": values.rank_pattern, "lora_alpha": values.alpha_pattern}
    flat, problems = options.flat(), []
    for name, value in found.items():
        asked = flat[name]
        if name in given and (set(asked) != set(value) if isinstance(value, tuple) else asked != value):
            shown, wanted = (" ".join(map(str, v)) if isinstance(v, tuple) else v for v in (value, asked))
            note = ", and other values in some layers" if differing.get(name) else ""
            problems.append(f"has {name} {shown}{note}, but --{name} {wanted} is given; omit that option")
    held, asked = start.adapter.full.groups, options.lora.also_train
    if not set(held) <= set(asked) and "also_train" in given:
        problems.append(
            f"holds trained {' and '.join(held)}, but --also_train {' '.join(asked)} is given; name them, too"
        )
    return options.replace(**found, also_train=tuple(dict.fromkeys((*held, *asked)))), problems


def _not_trainable(start: StartingPoint) -> list[str]:
    others = [layer.name for layer in start.adapted if not groups_of_layer(layer.name)]
    if not others:
        return []
    return [
        f"adapts {', '.join(others[:3])}{' and others' if len(others) > 3 else ''}, but only the linear layers of the "
        f"decoder get adapters here; merge it ({command('merge')}), and give the merged model as --base_ckpt"
    ]


def _wrong_precision(start: StartingPoint, options: TrainOptions) -> list[str]:
    """Return that an adapter of a 4-bit base would be trained on other weights, or the reverse, if it is recorded."""
    of_4bit = start.adapter.quantization is not None
    if of_4bit == options.model.load_in_4bit or not (of_4bit or start.adapter.record.is_ours):
        return []
    bases = ("a base in 4 bits", "a base that is not in 4 bits")
    was, remedy = (bases[0], "give --load_in_4bit") if of_4bit else (bases[1], "omit --load_in_4bit")
    return [
        f"was trained on {was}, whose weights are others; {remedy}, or merge it ({command('merge')}) and start a new "
        "adapter on the merged model"
    ]


def check_geometry(start: StartingPoint, options: TrainOptions, config: Any, base: str) -> None:
    """Raise InputError unless a base of this configuration, with the parts that the options add, fits the adapter."""
    held, trained = start.adapter.full.parts, fully_trained_parts(options.model, config)
    problems = []
    for option, of_adapter, of_run in (
        ("audio_self_attention", held.audio_self_attention, trained.audio_self_attention),
        ("whisper_conditioning", held.audio_tower, trained.audio_tower),
    ):
        if of_adapter and not of_run:
            problems.append(f"was trained with --{option}, and holds that part; give the option, too")
        elif of_run and not of_adapter:
            problems.append(f"does not hold the part that --{option} trains; omit the option, or merge the adapter")
        elif of_adapter != of_run:
            problems.append(f"its Whisper tower is {of_adapter}, but here it is {of_run}; give the same --whisper_ckpt")
    if problems:
        raise start.error(*problems)
    shapes = {name: tuple(tensor.shape) for name, tensor in empty_model(config, torch.float32).state_dict().items()}
    try:
        check_fit(start.adapter, shapes, start.folder, Path(base))
    except InputError as error:
        raise InputError([f"--init_from {problem}" for problem in error.problems]) from error


def compare_bases(start: StartingPoint, bundle: Bundle) -> str:
    """Return what is known about the adapter's base, in a few words. Raises InputError if it is another one."""
    record = start.adapter.record
    digest = record.base_weights or _digest_of(record.base)
    another = f"was trained on {record.base}, but --base_ckpt {bundle.name} is another base"
    if digest is not None:
        if digest != bundle.weights_digest:
            raise start.error(f"{another}: its weights are others")
        return "trained on this base"
    trained_on, here = _known_as(record.base), _known_as(bundle.name)
    if trained_on is None or here is None:
        named = record.base or "a base that it does not name"
        return f"trained on {named}, which could not be compared with this base; its layers fit"
    if trained_on != here:
        raise start.error(
            f"{another}; if it is the same one, correct base_model_name_or_path in the adapter's {ADAPTER_CONFIG}"
        )
    return "trained on a base of this name"


def _digest_of(base: str | None) -> str | None:
    """Return the digest of a base that an adapter names, if it is a folder of a native model."""
    if base is None or not Path(base).is_dir():
        return None
    try:
        layout = MODEL_TYPES[read_json_config(Path(base), "")["model_type"]]
        return sampled_digest(weight_files(Path(base))) if layout == NATIVE else None
    except InputError:  # something else is in its place now; the run says that it could not compare
        return None


def _known_as(base: str | None) -> str | None:
    """Return which base a name stands for on every machine: a hub's, or a built-in one; None for other folders."""
    if base and is_hub_id(base) and not Path(base).exists():
        return PINNED.get(base, base)
    name = Path(base or "").name
    return name if name in BUILT_IN else None


def compare_quantization(start: StartingPoint, quantization: BaseQuantization) -> str | None:
    """Return a warning if the base's weights quantize differently here than in the adapter's training.

    Raises:
        InputError: nothing else than another base can be the reason.
    """
    trained = start.adapter.quantization
    if trained is None:
        return None
    differing = [name for name, digest in trained.digests.items() if quantization.digests.get(name) != digest]
    if not differing:
        return None
    ways = [(way.bitsandbytes, way.device, way.compute_dtype) for way in (trained, quantization)]
    if ways[0] == ways[1] and start.adapter.record.base_weights is None:
        raise start.error(
            f"was trained on {start.adapter.record.base}, but this is another base: {len(differing)} of its weights "
            f"have other values in 4 bits, for instance {differing[0]}"
        )
    return (
        f"warning: --init_from {start.folder}: {len(differing)} of {len(trained.digests)} weights quantize differently "
        f"here than in its training (by bitsandbytes {ways[0][0]}, on {ways[0][1]}, for {ways[0][2]}), so that its "
        "losses may differ slightly"
    )
