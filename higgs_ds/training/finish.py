"""After the last step: report where the outputs are, and write the merged or complete model."""

from __future__ import annotations

import shutil
from pathlib import Path

from higgs_ds.adapters.merge import MergeReport, merge
from higgs_ds.adapters.save import AdapterFormat
from higgs_ds.checkpoints.complete import complete_model
from higgs_ds.checkpoints.folder import checkpoint_folder
from higgs_ds.common import distributed
from higgs_ds.common.console import say, warn
from higgs_ds.common.errors import HiggsError, MergeError
from higgs_ds.common.files import replaced_folder
from higgs_ds.common.resources import command
from higgs_ds.common.run_files import ADAPTER_FOLDER, AVERAGED_ADAPTER_FOLDER, FINAL_MODEL, MERGED_MODEL
from higgs_ds.reporting.metrics_log import peak_memory_gib
from higgs_ds.reporting.model_card import ADAPTER, FULL_MODEL, MERGED, card_facts, write_card
from higgs_ds.reporting.publish import adapter_to_publish, upload
from higgs_ds.training.run import Run


def finish(run: Run) -> None:
    """Report where the outputs are; write and publish the requested models. Every rank must call this.

    Raises:
        MergeError, PublishError: on every rank.
    """
    _report_outcome(run)
    if run.options.is_full_finetuning:
        make_complete_model(run)
    else:
        distributed.on_main(lambda: _write_adapter_cards(run))
        _report_adapters(run)
        if run.options.run.merge_adapter_with_base:
            merge_into_folders(run)
    if run.options.run.push_to_hub:
        publish(run)


def _report_outcome(run: Run) -> None:
    state, best, metric = run.state, run.state.best_step, run.state.compared_by
    if run.memory is not None:
        not_planned = "; evaluations are not planned for" if run.speech_test else ""
        say(run.memory.compared_with(peak_memory_gib()) + not_planned)
    run.reporter.report_path()
    if state.stopped_early:
        known = f"the {metric.best} {metric.words} was at step {best}"
        why = f"the {metric.words} could not be measured" if best is None else known
        say(f"stopped early, at step {state.step} of {state.total_steps}: {why}")
    if best is not None and best != state.step and checkpoint_folder(run.output_dir, best).is_dir():
        folder = checkpoint_folder(run.output_dir, best) / ("" if run.options.is_full_finetuning else ADAPTER_FOLDER)
        say(f"{metric.best.capitalize()} {metric.words}, {state.best_value:.4g}: {folder}")
    if (start := state.better_start) is not None:
        warn(
            f"warning: before the first step, the {metric.words} was {start:.4g}; the best checkpoint has "
            f"{state.best_value:.4g}, which is worse"
        )


def _report_adapters(run: Run) -> None:
    adapters = run.output_dir / ADAPTER_FOLDER
    say(f"LoRA adapters: {adapters}")
    if run.engine.keeps_average:
        say(f"LoRA adapters of the averaged weights: {run.output_dir / AVERAGED_ADAPTER_FOLDER}")
    # The adapter names its base without the revision.
    base = f"--base_model_path {run.bundle.folder} " if run.options.model.base_revision else ""
    say(f"Merge them: {command('merge')} {base}--lora_adapter_path {adapters} --output_path MERGED")
    say(f"Give the merge command {adapters}, not a checkpoint-N directory: checkpoints are for --resume.")


def make_complete_model(run: Run) -> None:
    """Write final_model/ from the last checkpoint, and print how to export another. Every rank must call this.

    Raises:
        MergeError: on every rank, if the export fails; training has finished by then.
    """
    checkpoint, final = checkpoint_folder(run.output_dir, run.state.step), run.output_dir / FINAL_MODEL
    export_command = (
        f"{command('export')} --base_model_path {run.bundle.name} --checkpoint_path {run.output_dir}/checkpoint-N "
        f"--output_path MODEL --export_layout {run.options.run.export_layout}"
    )

    def export() -> None:
        try:
            layout = run.options.run.export_layout
            complete_model(checkpoint, run.bundle.folder, final, layout, overwrite=True, codec_folder=_given_codec(run))
            _write_card(run, FINAL_MODEL, FULL_MODEL)
        except (HiggsError, OSError) as error:
            raise MergeError(
                f"training has finished and its weights are in {checkpoint}, but writing the complete model failed: "
                f"{error}\nTry again: {export_command}"
            ) from error

    distributed.on_main(export)
    run.reporter.write(at_end=True)  # the page now lists final_model/
    say(f"Complete model: {final}")
    averages = "; add --ema for its averaged weights" if run.engine.keeps_average else ""
    say(f"Export another checkpoint: {export_command}{averages}")


def merge_into_folders(run: Run) -> None:
    """Write final_model/ (the adapter and its tokenizer) and merged_model/. Every rank must call this.

    Raises:
        MergeError: on every rank, if the merge fails; training has finished by then, and its adapter is saved.
    """

    def copy_and_merge() -> MergeReport:
        try:
            _copy_adapter(run, run.output_dir / FINAL_MODEL)
            adapter, merged = run.output_dir / ADAPTER_FOLDER, run.output_dir / MERGED_MODEL
            report = merge(
                run.bundle.folder, adapter, merged, export_layout=run.options.run.export_layout, overwrite=True,
                codec_folder=_given_codec(run),
            )  # fmt: skip
            _write_card(run, MERGED_MODEL, MERGED)
            return report
        except (HiggsError, OSError) as error:
            raise MergeError(
                f"training has finished and its adapter is in {run.output_dir / ADAPTER_FOLDER}, but merging it "
                f"failed: {error}"
            ) from error

    for line in distributed.on_main(copy_and_merge).lines():
        (warn if line.startswith("warning:") else say)(line)
    say(f"Merged model: {run.output_dir / MERGED_MODEL}")


def _given_codec(run: Run) -> Path | None:
    """Return the folder of the codec given by --codec_ckpt, which replaces the base's; None without the option."""
    return run.bundle.codec.folder if run.options.model.codec_ckpt else None


def _write_card(run: Run, folder: str, kind: str, averaged: bool = False) -> None:
    """Write a model card, which describes the whole run."""
    form = run.form
    origins, quantization = (form.origins, form.quantization) if isinstance(form, AdapterFormat) else ((), None)
    facts = card_facts(run.output_dir, run.bundle, form.full_parts, run.options, origins, quantization, form.speakers)
    repo_id = run.options.run.hub_repo_id if folder == _published_folder(run) else None
    write_card(run.output_dir / folder, kind, facts, repo_id, averaged)


def _published_folder(run: Run) -> str:
    if run.options.is_full_finetuning:
        return FINAL_MODEL
    return MERGED_MODEL if run.options.run.upload_merged_model else ADAPTER_FOLDER


def _write_adapter_cards(run: Run) -> None:
    _write_card(run, ADAPTER_FOLDER, ADAPTER)
    if run.engine.keeps_average:
        _write_card(run, AVERAGED_ADAPTER_FOLDER, ADAPTER, averaged=True)


def publish(run: Run) -> None:
    """Upload the adapter, merged or complete model. Every rank must call this. Raises PublishError on every rank."""
    say(f"published: {distributed.on_main(lambda: _upload(run))}")


def _upload(run: Run) -> str:
    folder = run.output_dir / _published_folder(run)
    copy = adapter_to_publish(folder) if folder.name == ADAPTER_FOLDER else folder
    address = upload(copy, run.options.run)
    if copy != folder:
        shutil.rmtree(copy)
    return address


def _copy_adapter(run: Run, folder: Path) -> None:
    with replaced_folder(folder) as temporary:
        shutil.copytree(run.output_dir / ADAPTER_FOLDER, temporary, dirs_exist_ok=True)
        run.bundle.tokenizer.save_pretrained(temporary)
