"""After the last step: where everything is, and the merge where it was asked for."""

from __future__ import annotations

import shutil
from pathlib import Path

from higgs_ds import distributed
from higgs_ds.checkpoint import checkpoint_folder
from higgs_ds.errors import HiggsError, MergeError
from higgs_ds.export import ADAPTER_FOLDER
from higgs_ds.files import replaced_folder
from higgs_ds.merge import MergeReport, merge
from higgs_ds.metrics import say, warn
from higgs_ds.publish import facts_of, upload, write_card
from higgs_ds.report import REPORT_FILE
from higgs_ds.startup import Run

FINAL_MODEL, ADAPTER_COPY, MERGED_MODEL = "final_model", "adapter", "merged_model"


def say_where(run: Run) -> None:
    """Tell where the adapters are and what to do with them."""
    adapters, state = run.output_dir / ADAPTER_FOLDER, run.state
    if not run.options.run.no_report:
        say(f"report: {run.output_dir / REPORT_FILE}")
    best = state.best_step
    if state.stopped_early:
        say(
            f"stopped early, at step {state.step} of {state.total_steps}: the lowest validation loss was at step {best}"
        )
    if best is not None and best != state.step and checkpoint_folder(run.output_dir, best).is_dir():
        of_best = checkpoint_folder(run.output_dir, best) / ADAPTER_FOLDER
        say(f"Lowest validation loss, {state.val_losses[str(best)]:.4g}: {of_best}")
    say(f"LoRA adapters: {adapters}")
    say(
        f"Merge them: python launch/merge.py --base_model_path {run.bundle.name} "
        f"--lora_adapter_path {adapters} --output_path MERGED"
    )
    say(f"Give the merger {adapters}, not a checkpoint-N directory: those are for --resume.")


def merge_into_folders(run: Run) -> None:
    """Make final_model/ and adapter/ (the adapter, ready to load) and merged_model/. Every rank must call this.

    Raises MergeError, on every rank, where that fails; training has ended well by then, and its adapter is in place.
    """

    def make() -> MergeReport:
        try:
            for name in (FINAL_MODEL, ADAPTER_COPY):
                _copy_adapter(run, run.output_dir / name)
            adapter, merged = run.output_dir / ADAPTER_FOLDER, run.output_dir / MERGED_MODEL
            report = merge(
                run.bundle.folder, adapter, merged, export_layout=run.options.run.export_layout, overwrite=True,
                codec_folder=run.bundle.codec.folder if run.options.model.codec_ckpt else None,
            )  # fmt: skip
            facts = facts_of(run.output_dir, run.bundle.name, run.adapter_format.in_full, run.options)
            write_card(merged, "merged", facts)
            return report
        except (HiggsError, OSError) as error:
            raise MergeError(
                f"training has ended well and its adapter is in {run.output_dir / ADAPTER_FOLDER}, but merging it "
                f"failed: {error}"
            ) from error

    for line in distributed.on_main(make).lines():
        (warn if line.startswith("warning:") else say)(line)
    say(f"Merged model: {run.output_dir / MERGED_MODEL}")


def write_cards(run: Run) -> None:
    """Write the adapter's model card, which tells of the whole run."""
    facts = facts_of(run.output_dir, run.bundle.name, run.adapter_format.in_full, run.options)
    write_card(run.output_dir / ADAPTER_FOLDER, "adapter", facts)


def publish(run: Run) -> None:
    """Upload what was asked for. Every rank must call this. Raises PublishError, on every rank."""
    options = run.options.run
    what = MERGED_MODEL if options.upload_merged_model else ADAPTER_FOLDER
    address = distributed.on_main(lambda: upload(run.output_dir / what, options))
    say(f"published: {address}")


def _copy_adapter(run: Run, folder: Path) -> None:
    with replaced_folder(folder) as temporary:
        shutil.copytree(run.output_dir / ADAPTER_FOLDER, temporary, dirs_exist_ok=True)
        run.bundle.tokenizer.save_pretrained(temporary)
