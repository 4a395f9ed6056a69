"""One rank of tests/planning/test_plan_against_ranks.py. Rank 0 writes the tensor bytes of real runs by part, as JSON.

Arguments: a JSON list of command lines and the output file.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from higgs_ds.common.console import quiet_libraries

quiet_libraries()

import torch  # noqa: E402
from allow_fp16 import allow_fp16  # noqa: E402
from conftest import speech_batch  # noqa: E402

from higgs_ds.adapters.save import trained_parameters  # noqa: E402
from higgs_ds.bases.builtin import RANDOM_BASE, builtin_base  # noqa: E402
from higgs_ds.common import distributed  # noqa: E402
from higgs_ds.common.precision import torch_dtype  # noqa: E402
from higgs_ds.common.process import run_command, run_ranks  # noqa: E402
from higgs_ds.common.resources import default_cache_dir  # noqa: E402
from higgs_ds.data.collate import Batch  # noqa: E402
from higgs_ds.model.families import family_of  # noqa: E402
from higgs_ds.model.full import make_trainable  # noqa: E402
from higgs_ds.model.loading import load_base, load_base_in_4bit  # noqa: E402
from higgs_ds.model.loss import LossWeights  # noqa: E402
from higgs_ds.model.v2.loss_model import DualLossModel  # noqa: E402
from higgs_ds.options.command_line import parse_train_options  # noqa: E402
from higgs_ds.options.ds_config import read_ds_config, resolve  # noqa: E402
from higgs_ds.training.engine import Engine  # noqa: E402


def storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Return the bytes of each storage."""
    found = {}
    for tensor in tensors:
        if tensor.device.type != "meta":
            found[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    return found


def all_tensors() -> list[torch.Tensor]:
    """Return all tensors that Python knows and all gradients, except 4-bit weights: ZeRO-3 gathers some temporarily."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and o.dtype != torch.uint8]
        return found + [o.grad for o in found if o.is_leaf and o.grad is not None]


def in_model(model: torch.nn.Module) -> dict[str, list[torch.Tensor]]:
    """Return the model's tensors on this rank: its parameters or their partitions, and scales of 4-bit weights."""
    parts: dict[str, list[torch.Tensor]] = {"frozen": [], "trained": [], "quantization": [], "host": []}
    for parameter in model.parameters():
        part = getattr(parameter, "ds_tensor", parameter)
        parts["trained" if parameter.requires_grad else "frozen"].append(part)
    for module in model.modules():
        state = getattr(module, "quant_state", None)
        if state is not None:
            parts["quantization"] += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        if "on_host" in vars(module):
            parts["host"] += vars(module)["on_host"].parameters()
    return parts


def optimizer_tensors(engine: Engine) -> list[torch.Tensor]:
    """Return the float32 masters and Adam's state."""
    states = [
        t for state in engine.state.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)
    ]
    return states + engine.state.masters()


def bucket_tensors(engine: Engine) -> list[torch.Tensor]:
    buffers: list[Any] = [bucket.buffer for bucket in getattr(engine.engine.optimizer, "ipg_buckets", {}).values()]
    return [t for held in buffers if held is not None for t in (held if isinstance(held, list) else [held])]


def count(argv: list[str]) -> dict[str, int]:
    """Count the bytes by part in a run of one optimizer step with two micro-batches."""
    options, given = parse_train_options(argv)
    settings, options = resolve(read_ds_config(options.run.deepspeed), options, given, distributed.world_size())
    # Stage 3 must release every gathered weight as soon as its layer is done.
    settings["zero_optimization"] |= {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
    earlier_packed = all_packed()  # of earlier runs; kept, so that no new storage gets the id of an old one
    folder = builtin_base(RANDOM_BASE, default_cache_dir())
    here, dtype = torch.device("cpu"), torch_dtype(options.model.precision)
    four_bit = options.model.load_in_4bit
    higgs = load_base_in_4bit(folder, dtype, here, here)[0] if four_bit else load_base(folder, dtype)
    if options.model.offload_embeddings:
        family_of(higgs.config.model_type).offload_embeddings(higgs)
    adapted = make_trainable(higgs, options.tune, options.lora, "", dtype)
    batch = speech_batch(1, 16, 8, higgs.config.num_codebooks, 1024)
    earlier = all_tensors()
    engine = Engine(
        DualLossModel(adapted), trained_parameters(adapted), settings, options.optim, 10, LossWeights.of(1, 1, 8, None)
    )
    parts = {name: storages(tensors) for name, tensors in in_model(engine.engine.module).items()}
    gradients = []
    step = engine.engine.step

    def counted_step() -> None:
        others = storages([*earlier, *optimizer_tensors(engine), *bucket_tensors(engine)])
        others |= {key: size for sizes in parts.values() for key, size in sizes.items()}
        counts = []
        for _ in range(4):  # a thread of gloo may release the tensor of its last collective a little later
            counts.append(sum(size for key, size in storages(all_tensors()).items() if key not in others))
            time.sleep(0.1)
        gradients.append(min(counts))
        step()

    engine.engine.step = counted_step
    engine.train_step([batch, batch])
    own = {key: size for key, size in storages(optimizer_tensors(engine)).items() if key not in parts["trained"]}
    return {
        **{name: sum(sizes.values()) for name, sizes in parts.items()},
        "gradients": max(gradients),
        "optimizer": sum(own.values()),
        **whole_after_forward(engine, batch, earlier_packed),
    }


def whole_after_forward(engine: Engine, batch: Batch, earlier: list[torch.Tensor]) -> dict[str, int]:
    """Bytes of 4-bit weights on this rank: its partitions, and others while the graph of a forward pass exists."""
    packed = [p for p in engine.engine.module.parameters() if p.dtype == torch.uint8]
    own = storages(getattr(p, "ds_tensor", p) for p in packed)
    known = own | storages([*in_model(engine.engine.module)["quantization"], *earlier])
    losses, *_ = engine.engine(**batch.tensors(torch.device("cpu")), target_weights=torch.ones(9))
    others = sum(size for key, size in storages(all_packed()).items() if key not in known)
    return {"own_packed": sum(own.values()), "other_packed": others if losses.requires_grad else -1}


def all_packed() -> list[torch.Tensor]:
    """Return all packed weights; the states of random generators are bytes, too."""
    gc.collect()
    found = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and o.dtype == torch.uint8]
    return [tensor for tensor in found if tensor.shape != torch.get_rng_state().shape]


def main() -> None:
    allow_fp16()
    gc.freeze()  # objects of the imports need not be scanned each time
    counted = [count(argv) for argv in json.loads(sys.argv[1])]
    if distributed.is_main():
        Path(sys.argv[2]).write_text(json.dumps(counted))


if __name__ == "__main__":
    run_command(lambda: run_ranks(main))
