"""The options of launch/train.py for the run: its outputs, logs, checkpoints, samples, and the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from higgs_ds.common.resources import DEFAULT_DS_CONFIG
from higgs_ds.options.fields import BOTH_LAYOUTS, EXPORT_HELP, LAYOUTS, NATIVE, RESUME_NEVER, TENSORBOARD, WANDB, option


@dataclass(frozen=True)
class RunOptions:
    """Run"""

    output_dir: Path | None = option(None, "folder for the results (default: outputs/DATE-TIME)", metavar="DIR")
    log_steps: int | None = option(None, "optimizer steps between log lines (default: a tenth of the run, up to 10)")
    report_to: tuple[str, ...] = option(
        (), "where to log metrics besides metrics.jsonl: tensorboard, wandb", (TENSORBOARD, WANDB), "WHERE"
    )
    no_report: bool = option(False, "do not write report.html")
    quiet: bool = option(False, "print only errors and warnings")
    val_steps: int | None = option(None, "optimizer steps between validations (default: a tenth of the run, up to 100)")
    samples: bool = option(
        False,
        "write samples: speech for fixed validation prompts, as WAV files, before the first step and about ten times",
    )
    sample_steps: int | None = option(
        None, "optimizer steps between samples; implies --samples (default: a tenth of the run, up to 1000)"
    )
    num_samples: int = option(2, "number of validation prompts for --samples")
    sample_temperature: float = option(0.0, "temperature for --samples: 0 for greedy decoding, above 0 for sampling")
    save_steps: int | None = option(
        None,
        "optimizer steps between checkpoints (default: a tenth of the run, or half of it with --finetune full, up to "
        "1000)",
    )
    keep_checkpoints: int | None = option(
        None, "keep the newest N checkpoints, and the best one by --metric_for_best_model (default: all)"
    )
    early_stopping_patience: int | None = option(
        None,
        "stop after N validations in a row without a new lowest validation loss, or N evaluations without a better "
        "--metric_for_best_model; each new best saves a checkpoint",
    )
    early_stopping_min_delta: float = option(0.0, "minimum improvement of the metric to count as better")
    resume: str = option(
        RESUME_NEVER, "what to resume from: never, auto (the newest checkpoint in --output_dir), or a checkpoint folder"
    )
    merge_adapter_with_base: bool = option(
        False,
        "merge the adapter into the base model at the end, and write merged_model/, and final_model/ with the adapter "
        "and its tokenizer (with --finetune full, final_model/ is the complete model anyway)",
    )
    export_layout: str = option(NATIVE, EXPORT_HELP, (*LAYOUTS, BOTH_LAYOUTS))
    push_to_hub: bool = option(
        False,
        "upload the adapter, or the complete model, to the Hugging Face Hub at the end (run `hf auth login` first)",
    )
    hub_repo_id: str | None = option(
        None, "hub repository to upload to, created if it does not exist", metavar="OWNER/NAME"
    )
    hub_private: bool = option(False, "create the hub repository as private")
    hub_license: str | None = option(
        None,
        "licence to publish under, as the hub names it, for instance apache-2.0 (default: that of the base, where it "
        "is known; otherwise this is needed)",
        metavar="ID",
    )
    upload_merged_model: bool = option(
        False, "upload the merged model instead of the adapter (needs --merge_adapter_with_base)"
    )
    dry_run: bool = option(
        False,
        "only print the planned memory of each part, for the longest sample of --train_manifest; of the base model, "
        "only configuration and tokenizer are read",
    )
    require_fit: bool = option(False, "exit with code 1 if the plan of --dry_run does not fit the GPU's memory")
    device_memory_gib: float | None = option(
        None, "GPU memory that --dry_run plans for, in GiB (default: that of this machine's GPU)"
    )
    plan_ranks: int | None = option(None, "number of ranks that --dry_run plans for (default: those started)")
    deepspeed: Path = option(DEFAULT_DS_CONFIG, "DeepSpeed JSON file", metavar="FILE")
