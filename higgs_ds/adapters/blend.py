"""launch/blend.py: one adapter whose change of each weight is the weighted sum of other adapters' changes.

The sum over adapters i of w_i s_i B_i A_i, with weight w_i and scaling s_i, is one product: that of
[w_1 s_1 B_1, w_2 s_2 B_2, ...] and [A_1; A_2; ...]. Its rank is the sum of the ranks, and its scaling is 1.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from higgs_ds.adapters.card import adapter_card, base_in_card
from higgs_ds.adapters.files import PEFT_PREFIX, Factors
from higgs_ds.adapters.load import Adapter, read_adapter
from higgs_ds.adapters.low_rank import Loss, total, truncate, weighted_sum
from higgs_ds.adapters.save import (
    ADAPTER_CARD,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_KEY,
    DIGEST_KEY,
    QUANTIZATION_KEY,
    digest,
)
from higgs_ds.bases.model_folder import sole_writer
from higgs_ds.common.errors import InputError, SaveError, collect_problems
from higgs_ds.common.files import check_folders, new_folder, saving, write_json, write_text
from higgs_ds.common.resources import command
from higgs_ds.model.families import family_of_weight
from higgs_ds.options.commands import BlendOptions, parse_parts
from higgs_ds.options.fields import NATIVE, ORIGINAL


@dataclass(frozen=True)
class Part:
    """An adapter to blend. `config`: the content of its adapter_config.json."""

    folder: Path
    weight: float
    adapter: Adapter
    config: dict[str, Any]

    @property
    def layout(self) -> str:
        return ORIGINAL if self.adapter.in_original_names else NATIVE

    @property
    def name(self) -> str:
        """The part in a few words, without the folders above it, for a card that may be published."""
        return f"{self.weight:g} x {'/'.join(self.folder.absolute().parts[-2:])}"


@dataclass(frozen=True)
class Blend:
    """A blended adapter: its factors in float32 by the names of the weights, and what a truncation lost of each."""

    parts: list[Part]
    base: str | None
    layout: str
    factors: dict[str, Factors]
    losses: dict[str, Loss]

    @property
    def layers(self) -> dict[str, str]:
        """The layers' names in the blend's layout, by the names of the weights."""
        names = {
            name: str(family_of_weight(name).original_name(name)) if self.layout == ORIGINAL else name
            for name in self.factors
        }
        return {name: renamed.removesuffix(".weight") for name, renamed in names.items()}

    def how_it_was_made(self) -> list[str]:
        """Return the parts, the ranks and the error, as lines."""
        ranks = sorted({len(factors.a) for factors in self.factors.values()})
        rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        lines = [f"Sum of changes: {' + '.join(part.name for part in self.parts)}"]
        lines.append(f"Rank: {rank}, in {len(self.factors)} layers")
        if not self.losses:
            return [*lines, "Error: none but rounding to float32"]
        worst = max(self.losses, key=lambda name: self.losses[name].relative)
        return [
            *lines,
            f"Error of the truncated SVD (Frobenius norm, relative): {total(self.losses.values()).relative:.2g} of all "
            f"changes together, at most {self.losses[worst].relative:.2g} of one ({worst})",
        ]


def main(options: BlendOptions) -> None:
    """Blend as the options say, and print what was made and how to use it."""
    made, target = blend(options), options.output_path
    print("\n".join([*made.how_it_was_made(), f"Blended adapter: {target}"]))
    print(f'Generate: {command("generate")} --lora_adapter_path {target} --text "Hello." --output hello.wav')
    base = made.base or "BASE"
    print(f"Merge: {command('merge')} --base_model_path {base} --lora_adapter_path {target} --output_path MERGED")


def blend(options: BlendOptions) -> Blend:
    """Write the blend of the adapters that the options name to a new folder.

    Raises:
        InputError: an adapter cannot be read or added to the others, or the output already exists.
        SaveError: writing fails; nothing is left on disk.
    """
    problems = check_folders(output_path=options.output_path) + _occupied(options.output_path)
    if options.rank is not None and options.rank < 1:
        problems.append(f"--rank {options.rank}: must be 1 or more")
    pairs, wrong = parse_parts(options.parts)
    problems += wrong
    read = [collect_problems(problems, partial(_read_part, folder, weight)) for folder, weight in pairs]
    parts = [part for part in read if part is not None]
    problems += _why_not_together(parts, options.base_model_path)
    if not wrong and not any(weight for _, weight in pairs):
        problems.append("all weights are 0: the blend would change nothing; use the base model alone")
    if problems:
        raise InputError(problems)
    with sole_writer(options.output_path):
        if _occupied(options.output_path):  # another process may have just finished
            raise InputError(_occupied(options.output_path))
        made = _sum(parts, options)
        _write(made, options.output_path)
    return made


def _occupied(target: Path) -> list[str]:
    occupied = target.is_dir() and any(target.iterdir())
    return [f"--output_path {target}: already exists; choose a new folder"] if occupied else []


def _read_part(folder: Path, weight: float) -> Part:
    """Read an adapter. Raises InputError if its change is not a sum of products B A."""
    adapter = read_adapter(folder)
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    problems = []
    if config.get("use_dora"):
        problems.append("use_dora is True, and DoRA also sets the norms of rows, so that its changes cannot be added")
    if config.get("lora_bias"):
        problems.append("lora_bias is True, and the other adapters' layers may have no bias to add to")
    if adapter.full:
        problems.append(f"{adapter.full} was fully trained with it, which is no change of the base to be added")
    problems += [
        f"{name} has factors that do not fit: {tuple(factors.b.shape)} and {tuple(factors.a.shape)}"
        for name, factors in adapter.factors.items()
        if factors.b.shape[1] != len(factors.a)
    ]
    if problems:
        raise InputError([f"{folder}: cannot be blended: {problem}" for problem in problems])
    return Part(folder, weight, adapter, config)


def _why_not_together(parts: list[Part], base: str | None) -> list[str]:
    """Return why the changes of adapters cannot be added: they belong to different weights.

    Args:
        base: the base's name, if it is not to be taken from the adapters.
    """
    shapes: dict[str, dict[Path, tuple[int, int]]] = {}
    for part in parts:
        for name, factors in part.adapter.factors.items():
            shapes.setdefault(name, {})[part.folder] = (factors.b.shape[0], factors.a.shape[1])
    return (
        _different_weights(parts)
        + (_different_names(parts) if base is None else [])
        + _different_quantization(parts)
        + [
            f"{name} has different shapes: {_listed(of_layer)}"
            for name, of_layer in shapes.items()
            if len(set(of_layer.values())) > 1
        ]
    )


def _different_weights(parts: list[Part]) -> list[str]:
    recorded = {part.folder: part.adapter.record.base_weights for part in parts}
    if len({weights for weights in recorded.values() if weights}) < 2:
        return []
    known = {folder: weights[:12] for folder, weights in recorded.items() if weights}
    return [f"the adapters were trained on bases with different weights (digests {_listed(known)})"]


def _different_names(parts: list[Part]) -> list[str]:
    """Return that the names of bases differ, or are missing, unless it is known that the bases are the same."""
    if len({part.adapter.record.base_weights or part.folder for part in parts}) == 1:
        return []
    named = {part.folder: part.config.get("base_model_name_or_path") for part in parts}
    problems = [
        f"{folder}: names no base model; name it with --base_model_path" for folder, name in named.items() if not name
    ]
    if len({name for name in named.values() if name}) > 1:
        problems.append(
            f"the adapters belong to different base models: {_listed(named)}. If these are the same model, name it "
            "with --base_model_path"
        )
    return problems


def _different_quantization(parts: list[Part]) -> list[str]:
    problems = []
    bits = {part.folder: "of the base" if part.adapter.quantization is None else "in 4 bits" for part in parts}
    if len(set(bits.values())) > 1:
        problems.append(
            f"the adapters were trained on different weights: {_listed(bits)}. Merge one of those in 4 bits into the "
            f"base ({command('merge')}, with its weight as --lora_scale), and use the others on the result"
        )
    records = [part.adapter.quantization for part in parts if part.adapter.quantization]
    if any((r.compute_dtype, r.digests) != (records[0].compute_dtype, records[0].digests) for r in records):
        problems.append("the adapters were trained on bases that were quantized to different 4-bit weights")
    return problems


def _listed(values: Mapping[Path, object]) -> str:
    return ", ".join(f"{folder}: {value}" for folder, value in values.items())


def _sum(parts: list[Part], options: BlendOptions) -> Blend:
    """Sum adapters. Those of weight 0 add nothing, not even their ranks."""
    factors, losses = {}, {}
    used = [part for part in parts if part.weight]
    for name in sorted({name for part in used for name in part.adapter.factors}):
        adapters = [(part.weight, part.adapter) for part in used if name in part.adapter.factors]
        summed = weighted_sum([(weight * adapter.scaling[name], adapter.factors[name]) for weight, adapter in adapters])
        if options.rank is not None:
            summed, losses[name] = truncate(summed, options.rank)
        factors[name] = Factors(summed.a.float(), summed.b.float())
    too_large = [name for name, f in factors.items() if not (f.a.isfinite().all() and f.b.isfinite().all())]
    if too_large:
        raise InputError(f"the weights are too large: the sum for {too_large[0]} is not finite in float32")
    layouts = {part.layout for part in parts}
    layout = options.to or (layouts.pop() if len(layouts) == 1 else NATIVE)
    base = options.base_model_path or parts[0].config.get("base_model_name_or_path")
    return Blend(parts, base, layout, factors, losses)


def _write(made: Blend, target: Path) -> None:
    tensors = {}
    for name, layer in made.layers.items():
        tensors[f"{PEFT_PREFIX}{layer}.lora_A.weight"] = made.factors[name].a
        tensors[f"{PEFT_PREFIX}{layer}.lora_B.weight"] = made.factors[name].b
    config, quantization = _config(made), made.parts[0].adapter.quantization
    record = quantization.to_json() if quantization else None
    metadata = {"format": "pt", DIGEST_KEY: digest(tensors, config, record)}
    metadata |= {QUANTIZATION_KEY: record} if record else {}
    weights, *others = {part.adapter.record.base_weights for part in made.parts}
    metadata |= {BASE_KEY: weights} if weights and not others else {}
    lines = "\n".join(f"- {line}" for line in made.how_it_was_made())
    card = f"Blended with higgs_ds from adapters for {base_in_card(made.base, quantization)}, float32:\n\n{lines}\n"
    family = family_of_weight(next(iter(made.factors)))
    with saving(target), new_folder(target) as folder:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / ADAPTER_WEIGHTS, metadata)
        write_json(folder / ADAPTER_CONFIG, config)
        write_text(folder / ADAPTER_CARD, adapter_card(made.base, family, card))
        try:
            read_adapter(folder)  # compares with the digest
        except InputError as error:
            raise SaveError(f"{target}: does not read back: {error}") from error


def _config(made: Blend) -> dict[str, Any]:
    """Return the content of adapter_config.json. Alphas equal ranks, so that the scaling is 1."""
    ranks = {made.layers[name]: len(factors.a) for name, factors in made.factors.items()}
    most = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{re.escape(layer)}": rank for layer, rank in ranks.items() if rank != most}
    values: dict[str, Any] = {"peft_type": "LORA", "base_model_name_or_path": made.base, "inference_mode": True}
    values |= {"bias": "none", "r": most, "lora_alpha": most, "rank_pattern": others, "alpha_pattern": others}
    return dict(sorted((values | _targets(made)).items()))


def _targets(made: Blend) -> dict[str, Any]:
    """Return how PEFT finds the layers: by the lists of the adapters, if these say the same together; else by name."""
    configs = [part.config for part in made.parts if part.weight]
    lists = [config.get("target_modules") for config in configs]
    excluded = [config.get("exclude_modules") for config in configs]
    if (
        {part.layout for part in made.parts} == {made.layout}
        and all(isinstance(targets, list) for targets in lists)
        and all(value == excluded[0] for value in excluded)
        and not any(config.get("layers_to_transform") is not None for config in configs)
    ):
        targets = sorted({target for targets in lists for target in targets or ()})
        return {"target_modules": targets, "exclude_modules": excluded[0]}
    return {"target_modules": sorted(made.layers.values())}
