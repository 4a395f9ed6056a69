"""One rank of `launcher.train_runs`: the trainings of a JSON list of command lines, in one process group."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from higgs_ds.quiet import quiet_libraries

quiet_libraries()

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from higgs_ds import distributed  # noqa: E402
from higgs_ds.config import parse_train_options  # noqa: E402
from higgs_ds.startup import Run, start  # noqa: E402
from higgs_ds.train import main, train  # noqa: E402


def dump_logits(run: Run, path: Path) -> None:
    """What the heads of the trained model give for the first samples, with what went in."""
    batch = run.train.batch(range(6))
    caught = {}
    higgs = run.engine.engine.module.higgs
    for name in ("text", "audio"):
        head = getattr(higgs, f"{name}_lm_head")
        head.register_forward_hook(lambda _, __, output, name=name: caught.update({f"{name}_logits": output.detach()}))
    run.engine.evaluate([batch])
    if distributed.is_main():
        save_file(batch.tensors(torch.device("cpu")) | {k: v.contiguous() for k, v in caught.items()}, path)


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
