"""The model card of a finished run: its base, how to use it, licence, losses, data and settings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from higgs_ds.adapters.card import (
    VOICES,
    Place,
    adapter_commands,
    adapter_title,
    base_in_card,
    fenced,
    header,
    licence_section,
)
from higgs_ds.adapters.origin import Origin, describe_origins
from higgs_ds.adapters.speakers import NO_SPEAKERS, TrainedSpeakers
from higgs_ds.bases.builtin import portable_name
from higgs_ds.bases.bundle import Bundle
from higgs_ds.bases.licence import Licence, licence_of
from higgs_ds.common.files import saving, write_text
from higgs_ds.common.hub import is_hub_id
from higgs_ds.common.run_files import SUMMARY_FILE
from higgs_ds.model.family import Family
from higgs_ds.model.parts import Parts
from higgs_ds.model.quantization import BaseQuantization
from higgs_ds.options.fields import BOTH_LAYOUTS, HEADS, NATIVE, ORIGINAL
from higgs_ds.options.train import TrainOptions
from higgs_ds.reporting.card_code import CardBase, adapter_code, model_code
from higgs_ds.reporting.log_lines import losses_of_manifests
from higgs_ds.reporting.metrics_log import last_values, read_metrics

CARD = "README.md"
ADAPTER, MERGED, FULL_MODEL = "adapter", "merged", "full"  # kinds of cards
# Options that only concern this machine, or this one call of the command.
_MACHINE_OPTIONS = {
    "train_manifest", "val_manifest", "skip_bad", "cache_dir", "output_dir", "deepspeed", "resume", "base_ckpt",
    "codec_ckpt", "whisper_ckpt", "push_to_hub", "hub_repo_id", "hub_private", "hub_license", "upload_merged_model",
    "report_to", "quiet", "no_report", "num_workers", "init_from", "speaker_descriptions",
}  # fmt: skip


@dataclass(frozen=True)
class CardFacts:
    """What a card says about a run.

    `licence`: the base's; `given_licence`: of --hub_license; `trained`: what was fully fine-tuned; `parts`: those
    among it that only the original layout has.
    """

    base: CardBase
    family: Family
    licence: Licence | None
    given_licence: str | None
    layout: str
    trained: Sequence[str]
    parts: Parts
    quantization: BaseQuantization | None
    origins: Sequence[Origin]
    speakers: str
    losses: dict[str, Any]
    data: str
    settings: Sequence[str]


def card_facts(
    run_folder: Path,
    bundle: Bundle,
    full_parts: Parts,
    options: TrainOptions,
    origins: Sequence[Origin] = (),
    quantization: BaseQuantization | None = None,
    speakers: TrainedSpeakers = NO_SPEAKERS,
) -> CardFacts:
    """Collect what a card says about a run. Of paths, only the last part is kept."""
    last = last_values(read_metrics(run_folder))
    shown = [f"{kind}/{name}" for kind in ("train", "val", "val_ema") for name in ("loss", "text_loss", "audio_loss")]
    shown += losses_of_manifests(last)
    shown += ["val/text_accuracy", "val/audio_accuracy", "val/eos_accuracy"]
    losses = {name: f"{last[name]:.4g}" for name in shown if name in last}
    summary = (run_folder / SUMMARY_FILE).read_text(encoding="utf-8")
    name = portable_name(bundle.name)
    trained = [*(options.tune.train_groups if options.is_full_finetuning else options.lora.also_train)]
    return CardFacts(
        base=CardBase(name, bundle.layout, options.model.base_revision if is_hub_id(name) else None),
        family=bundle.family,
        licence=licence_of(bundle.name, bundle.folder, bundle.family),
        given_licence=options.run.hub_license,
        layout=options.run.export_layout,
        trained=[*trained, str(full_parts)] if full_parts else trained,
        parts=full_parts,
        quantization=quantization,
        origins=origins,
        speakers=speakers.in_card(),
        losses=losses | ({"step": last["step"]} if "step" in last else {}),
        data=_without_folders(summary),
        settings=_changed_settings(options),
    )


def write_card(folder: Path, kind: str, facts: CardFacts, repo_id: str | None = None, averaged: bool = False) -> None:
    """Write the model card of an adapter or a model.

    Args:
        kind: ADAPTER, MERGED or FULL_MODEL.
        repo_id: the hub's repository that the folder will be in; None if it is not known.
        averaged: whether the weights are averages over the steps (--ema_decay).

    Raises:
        SaveError: the card cannot be written.
    """
    is_adapter = kind == ADAPTER
    licence = Licence(facts.given_licence) if facts.given_licence else facts.licence
    title = adapter_title(facts.family) if is_adapter else f"# {facts.family.title}, fine-tuned"
    base = base_in_card(facts.base.name, facts.quantization)
    fully_trained = f"; fully fine-tuned: {', '.join(facts.trained)}" if facts.trained else ""
    origins = f" {describe_origins(facts.origins)}" if facts.origins else ""
    average = " The weights are an exponential moving average over the steps." if averaged else ""
    losses = "\n".join(f"| {name} | {value} |" for name, value in facts.losses.items())
    data, settings = ("\n".join(f"    {line}" for line in lines) for lines in (facts.data.splitlines(), facts.settings))
    library = "peft" if is_adapter else "transformers"
    head = header(facts.base.name, facts.family, library, licence, *(["lora"] if is_adapter else []))
    text = f"""{head}

{title}

Trained with higgs_ds from {base}{fully_trained}.{origins}{average}

## How to use it

{(_use_of_adapter if is_adapter else _use_of_model)(facts, Place(repo_id))}

{licence_section(facts.base.name, facts.licence, facts.given_licence)}

{VOICES}

{facts.speakers}## Losses

| metric | last value |
|---|---|
{losses}

## Data

{data}

## Settings

{settings}
"""
    with saving(folder / CARD):
        write_text(folder / CARD, text)


def _use_of_adapter(facts: CardFacts, place: Place) -> str:
    base = facts.base
    # The name of a base stands for its default revision.
    get_base = f"hf download {base.name} --revision {base.revision} --local-dir BASE" if base.revision else None
    commands = adapter_commands(base.name, place, bool(facts.parts), get_base)
    if not facts.family.in_transformers:
        return f"{commands}\n\nvLLM-Omni and SGLang-Omni serve the merged model as they serve its base."
    if facts.parts:
        return f"{commands}\n\nOnly higgs_ds and boson_multimodal have a place for its {facts.parts}, not transformers."
    if facts.quantization is not None or base.layout == ORIGINAL:
        why = (
            "The adapter belongs to weights in 4 bits, which `merged` has in 16 or 32 bits."
            if facts.quantization
            else "transformers cannot read this base, which is in the original layout, but it reads `merged`."
        )
        return f"{commands}\n\nWith transformers, merge it first. {why}\n\n{model_code(Place(), folder='merged')}"
    code = adapter_code(base, place, HEADS in facts.trained)
    return f"{commands}\n\nWith transformers and PEFT:\n\n{code}"


def _use_of_model(facts: CardFacts, place: Place) -> str:
    within = f"/{NATIVE}" if facts.layout == BOTH_LAYOUTS else ""
    lines = [
        *place.download,
        f'python launch/generate.py --base_model_path {place.folder}{within} --text "Hello." --output hello.wav',
    ]
    commands = f"In a checkout of higgs_ds:\n\n{fenced('bash', lines)}"
    if not facts.family.in_transformers:
        return f"{commands}\n\nvLLM-Omni and SGLang-Omni serve this folder as they serve its base."
    original = "boson_multimodal's `serve_engine` reads {} as it reads its base."
    if facts.layout == ORIGINAL:
        return f"{commands}\n\n{original.format('this folder')}"
    both = f"\n\n{original.format(f'the folder `{ORIGINAL}`')}" if within else ""
    return f"{commands}\n\nWith transformers:\n\n{model_code(place, within)}{both}"


def _without_folders(summary: str) -> str:
    """Shorten the manifests that a data summary names, in its headers and in front of their samples, to their names."""
    for manifest in re.findall(r"^(?! )(.+):$", summary, flags=re.MULTILINE):
        folder = manifest.rpartition("/")[0]
        if folder:
            summary = re.sub(rf"(?<![^\s,]){re.escape(folder)}/", "", summary)
    return summary


def _changed_settings(options: TrainOptions) -> list[str]:
    """Return the options that differ from their defaults, as they are given on the command line."""
    defaults = TrainOptions().flat()
    return [
        f"--{name}{_as_arguments(value)}"
        for name, value in options.flat().items()
        if value != defaults[name] and name not in _MACHINE_OPTIONS
    ]


def _as_arguments(value: Any) -> str:
    if isinstance(value, bool):
        return ""  # options of this kind are false unless they are given
    values = value if isinstance(value, tuple) else (value,)
    return "".join(f" {shlex.quote(str(item))}" for item in values)
