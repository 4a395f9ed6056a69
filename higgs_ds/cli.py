"""The commands of launch/, which are also the subcommands of `higgs-ds`: parse options, import what is needed, run.

The options of a command are parsed before any import that takes seconds. Each function returns the exit code of the
command, so that it can be called several times in one process; `run_command` ends the process with it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from higgs_ds.common.console import quiet_libraries
from higgs_ds.common.errors import EXIT_BAD_INPUT, EXIT_OK, exit_code_of
from higgs_ds.common.process import quick_imports, run_command, run_ranks
from higgs_ds.options import command_line
from higgs_ds.options.parser import meant_option

PROGRAM = "higgs-ds"


def train(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Train LoRA adapters, or the model's own weights. With --dry_run, only plan its memory."""
    options, given = command_line.parse_train_options(argv, prog)
    quiet_libraries()
    if options.run.dry_run and options.data.train_manifest is None:
        with quick_imports():
            from higgs_ds.planning import dry_run

        return exit_code_of(lambda: dry_run.main(options, given))
    if options.run.dry_run:
        with quick_imports():
            from higgs_ds.training import plan_for_data

        return run_ranks(lambda: plan_for_data.main(options, given), together=False)
    with quick_imports():
        from higgs_ds.training import loop

    return run_ranks(lambda: loop.main(options, given))


def prepare(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Check manifests, and encode their audio into the cache."""
    options = command_line.parse_prepare_options(argv, prog)
    quiet_libraries()
    with quick_imports():
        from higgs_ds.training.prepare import main

    return run_ranks(lambda: main(*options), together=False)


def evaluate(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Generate the speech of held-out samples, and compare it with the recordings; --checkpoints: of a whole run."""
    options = command_line.parse_evaluate_options(argv, prog)
    quiet_libraries()
    if options.checkpoints is not None:
        with quick_imports():
            from higgs_ds.speech import checkpoints

        return run_ranks(lambda: checkpoints.main(options), together=False)
    with quick_imports():
        from higgs_ds.speech.evaluate import main

    return run_ranks(lambda: main(options), together=False)


def prefer(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Speak each text several times, and write pairs of a better and a worse rendering."""
    options = command_line.parse_prefer_options(argv, prog)
    quiet_libraries()
    with quick_imports():
        from higgs_ds.speech.prefer import main

    return run_ranks(lambda: main(options), together=False)


def generate(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Generate speech from text with a base model, an adapter or a merged model."""
    options = command_line.parse_generate_options(argv, prog)
    quiet_libraries()
    with quick_imports():
        from higgs_ds.speech.generate import main

    return exit_code_of(lambda: main(options))


def merge(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Merge a LoRA adapter into its base model."""
    options = command_line.parse_merge_options(argv, prog)
    quiet_libraries()
    with quick_imports():
        from higgs_ds.adapters.merge import main

    return exit_code_of(lambda: main(options))


def blend(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Blend LoRA adapters into one: the weighted sum of their changes."""
    options = command_line.parse_blend_options(argv, prog)
    quiet_libraries()
    with quick_imports():
        from higgs_ds.adapters.blend import main

    return exit_code_of(lambda: main(options))


def export(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Write a checkpoint of full fine-tuning as a complete model."""
    options = command_line.parse_export_options(argv, prog)
    quiet_libraries()
    with quick_imports():
        from higgs_ds.checkpoints.complete import main

    return exit_code_of(lambda: main(options))


def convert(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Convert a base model, a merged model or an adapter to the other layout."""
    options = command_line.parse_convert_options(argv, prog)
    quiet_libraries()
    with quick_imports():
        from higgs_ds.adapters.convert import main

    return exit_code_of(lambda: main(options))


def review(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Check the clips of a list by ear: a page to correct texts and drop clips."""
    options = command_line.parse_review_options(argv, prog)
    quiet_libraries()
    with quick_imports():
        from higgs_ds.reviewing.command import main

    return exit_code_of(lambda: main(options))


def find_lora_adapters(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """List the adapters below a folder."""
    options = command_line.parse_inspect_options("find_lora_adapters", argv, prog)
    quiet_libraries()
    with quick_imports():
        from higgs_ds.checkpoints.inspection import find_adapters

    return exit_code_of(lambda: find_adapters(options))


def validate_adapter(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Check an adapter."""
    options = command_line.parse_inspect_options("validate_adapter", argv, prog)
    quiet_libraries()
    with quick_imports():
        from higgs_ds.checkpoints import inspection

    return exit_code_of(lambda: inspection.validate_adapter(options))


def validate_checkpoint_dir(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Check a checkpoint-N folder."""
    options = command_line.parse_inspect_options("validate_checkpoint_dir", argv, prog)
    quiet_libraries()
    with quick_imports():
        from higgs_ds.checkpoints.inspection import validate_checkpoint

    return exit_code_of(lambda: validate_checkpoint(options))


def slice(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Cut long recordings into a folder of clips with their texts."""
    options = command_line.parse_slice_options(argv, prog)
    quiet_libraries()
    with quick_imports():
        from higgs_ds.slicing.command import main

    return exit_code_of(lambda: main(options))


COMMANDS: dict[str, Callable[[Sequence[str] | None, str | None], int]] = {
    command.__name__: command
    for command in (
        train, slice, review, prepare, merge, blend, generate, evaluate, prefer, export, convert,
        find_lora_adapters, validate_adapter, validate_checkpoint_dir,
    )
}  # fmt: skip


def main() -> NoReturn:
    """Run `higgs-ds COMMAND [options]`."""
    # `deepspeed --module higgs_ds COMMAND` puts this option first; ranks read LOCAL_RANK instead.
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")]
    name, *argv = arguments or ["--help"]
    run_command(lambda: _run(name, argv))


def _run(name: str, argv: list[str]) -> int:
    if name.replace("-", "_") in COMMANDS:
        return COMMANDS[name.replace("-", "_")](argv, f"{PROGRAM} {name}")
    if name in ("-h", "--help"):
        print(_help())
        return EXIT_OK
    print(f"error: {name}: unknown command{meant_option(name, list(COMMANDS))}\n{_help()}", file=sys.stderr)
    return EXIT_BAD_INPUT


def _help() -> str:
    lines = [f"  {name:<26}{(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(
        [f"usage: {PROGRAM} COMMAND [options]; {PROGRAM} COMMAND --help lists the options of a command", *lines]
    )
