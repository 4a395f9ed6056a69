"""--push_to_hub: upload the adapter, merged or complete model with Hugging Face's own client; no token is printed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import httpx

from higgs_ds.adapters.origin import Origin, describe_origins
from higgs_ds.adapters.save import how_to_use_adapter
from higgs_ds.common.errors import InputError, PublishError
from higgs_ds.common.files import saving, write_text
from higgs_ds.common.hub import is_hub_id
from higgs_ds.common.run_files import SUMMARY_FILE
from higgs_ds.model.parts import Parts
from higgs_ds.options.run import RunOptions
from higgs_ds.options.train import TrainOptions
from higgs_ds.reporting.metrics_log import last_values, losses_of_manifests, read_metrics

CARD = "README.md"
# Options that only concern this machine, or this one call of the command.
_MACHINE_OPTIONS = {
    "train_manifest", "val_manifest", "skip_bad", "cache_dir", "output_dir", "deepspeed", "resume", "base_ckpt",
    "codec_ckpt", "whisper_ckpt", "push_to_hub", "hub_repo_id", "hub_private", "upload_merged_model", "report_to",
    "quiet", "no_report", "num_workers", "init_from",
}  # fmt: skip
NOT_UPLOADED = ["**/.*"]


def check_login(options: RunOptions) -> None:
    """Raise InputError if publishing would fail: no token, one that the hub rejects, or no connection to the hub."""
    if not options.push_to_hub:
        return
    if get_token() is None:
        raise InputError("--push_to_hub: you are not logged in; run `hf auth login`, or set HF_TOKEN")
    try:
        HfApi().whoami()
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise InputError(f"--push_to_hub: the hub rejects your token ({_reason(error)}); log in again") from error
        raise InputError(
            f"--push_to_hub: the hub cannot be reached ({_reason(error)}); leave the option out, and publish later "
            "with `hf upload`"
        ) from error


def upload(folder: Path, options: RunOptions) -> str:
    """Upload a folder as a repository, which is created if it does not exist; return its address.

    Raises:
        PublishError: the upload failed; the message has the command to try again, and the folder is unchanged.
    """
    repo_id = options.hub_repo_id
    assert repo_id is not None
    try:
        api = HfApi()
        address = api.create_repo(repo_id, private=options.hub_private, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id,
            folder_path=folder,
            commit_message="Trained with higgs_ds",
            ignore_patterns=NOT_UPLOADED,
        )
    except (HfHubHTTPError, HFValidationError, httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
        # hf_xet, which transfers large files, reports failures as RuntimeError.
        private = " --private" if options.hub_private else ""
        raise PublishError(
            f"training has finished and the folder to publish is {folder}, but uploading it to {repo_id} failed: "
            f"{_reason(error)}\nTry again: hf upload {repo_id} {folder} .{private}"
        ) from error
    return str(address)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def write_card(folder: Path, kind: str, facts: dict[str, Any], averaged: bool = False) -> None:
    """Write the model card of an adapter or a model: its base, how to use it, losses, data, settings.

    Args:
        kind: "adapter", "merged" or "full".
        facts: what `card_facts` returns.
        averaged: whether the weights are averages over the steps (--ema_decay).

    Raises:
        SaveError: the card cannot be written.
    """
    base = facts["base"]
    header = ModelCardData(
        base_model=base if is_hub_id(base) else None,
        library_name="peft" if kind == "adapter" else "transformers",
        pipeline_tag="text-to-speech",
        tags=["higgs-audio-v2", "text-to-speech", *(["lora"] if kind == "adapter" else [])],
    )
    title = "LoRA adapter for Higgs Audio v2" if kind == "adapter" else "Higgs Audio v2, fine-tuned"
    average = " The weights are an exponential moving average over the steps." if averaged else ""
    losses = "\n".join(f"| {name} | {value} |" for name, value in facts["losses"].items())
    settings = "\n".join(f"    --{name} {value}" for name, value in facts["settings"].items())
    data = "\n".join(f"    {line}" for line in facts["data"].splitlines())
    text = f"""---
{header.to_yaml()}
---

# {title}

Trained with higgs_ds from `{base}`{facts["fully_trained"]}.{facts["origins"]}{average}

## How to use it

{_use(kind, facts)}

## Losses

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


def _use(kind: str, facts: dict[str, Any]) -> str:
    if kind == "adapter":
        return how_to_use_adapter(facts["base"])
    if facts["layout"] == "original":
        return "Load it with boson_multimodal's `serve_engine`, like its base."
    return """    import contextlib
    from transformers import AutoProcessor, HiggsAudioV2ForConditionalGeneration
    model = HiggsAudioV2ForConditionalGeneration.from_pretrained("THIS_FOLDER")
    with contextlib.chdir("THIS_FOLDER"):  # a codec in this folder has a path relative to it
        processor = AutoProcessor.from_pretrained(".")"""


def _without_folders(summary: str) -> str:
    """Shorten the manifests that a data summary names, in its headers and in front of their samples, to their names."""
    for manifest in re.findall(r"^(?! )(.+):$", summary, flags=re.MULTILINE):
        folder = manifest.rpartition("/")[0]
        if folder:
            summary = re.sub(rf"(?<![^\s,]){re.escape(folder)}/", "", summary)
    return summary


def card_facts(
    run_folder: Path, base: str, full_parts: Parts, options: TrainOptions, origins: Sequence[Origin] = ()
) -> dict[str, Any]:
    """Return what a card says about a run. Of the base's path, only the folder's name is kept; others are left out."""
    last = last_values(read_metrics(run_folder))
    shown = [f"{kind}/{name}" for kind in ("train", "val", "val_ema") for name in ("loss", "text_loss", "audio_loss")]
    shown += losses_of_manifests(last)
    shown += ["val/text_accuracy", "val/audio_accuracy", "val/eos_accuracy"]
    losses = {name: f"{last[name]:.4g}" for name in shown if name in last}
    defaults = TrainOptions().flat()
    changed = {
        name: " ".join(map(str, value)) if isinstance(value, tuple) else value
        for name, value in options.flat().items()
        if value != defaults[name] and name not in _MACHINE_OPTIONS
    }
    summary = (run_folder / SUMMARY_FILE).read_text(encoding="utf-8")
    trained = [*(options.tune.train_groups if options.is_full_finetuning else options.lora.also_train)]
    trained += [str(full_parts)] if full_parts else []
    return {
        "base": base if is_hub_id(base) else Path(base).name,
        "fully_trained": f"; fully fine-tuned: {', '.join(trained)}" if trained else "",
        "origins": f" {describe_origins(origins)}" if origins else "",
        "layout": options.run.export_layout,
        "settings": changed,
        "data": _without_folders(summary),
        "losses": losses | ({"step": last["step"]} if "step" in last else {}),
    }
