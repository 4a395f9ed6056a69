"""One rank of `launcher.train_runs`: the trainings of a JSON list of command lines, in one process group."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from higgs_ds.quiet import quiet_libraries

quiet_libraries()

import torch.nn.functional as F  # noqa: E402
from conftest import native_inputs  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from higgs_ds import distributed  # noqa: E402
from higgs_ds.config import parse_train_options  # noqa: E402
from higgs_ds.startup import Run, start  # noqa: E402
from higgs_ds.train import main, train  # noqa: E402


def dump_logits(run: Run, path: Path) -> None:
    """What the heads of the trained model give for the first samples, with what went in, as transformers takes it."""
    batch = run.train.batch(range(6))
    caught = {}
    higgs = run.engine.engine.module.higgs
    for name in ("text", "audio"):
        head = getattr(higgs, f"{name}_lm_head")
        head.register_forward_pre_hook(
            lambda head, args, name=name: caught.update({f"{name}_logits": F.linear(args[0], head.weight).detach()})
        )
    run.engine.evaluate([batch])
    if distributed.is_main():
        where = {f"{name}_positions": batch.positions[getattr(batch, f"{name}_places")] for name in ("text", "audio")}
        inputs = native_inputs(batch, higgs.config.audio_token_id)
        save_file(inputs | where | {name: logits.contiguous() for name, logits in caught.items()}, path)


def train_all() -> None:
    for argv in json.loads(sys.argv[1]):
        if "--dump_logits" in argv:
            at = argv.index("--dump_logits")
            run = start(*parse_train_options(argv[:at] + argv[at + 2 :]))
            train(run)
            dump_logits(run, Path(argv[at + 1]))
        else:
            main(*parse_train_options(argv))


if __name__ == "__main__":
    distributed.leave(distributed.run_ranks(train_all))
