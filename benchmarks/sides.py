"""Both sides of a comparison: this project's engine, and what a user would write with transformers' Trainer and PEFT.

Both get the same random weights, LoRA (rank 16 on all targets, dropout 0.05), samples, precision and batches.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from random_base import (
    AUDIO,
    AUDIO_BOS,
    AUDIO_DELAY,
    AUDIO_EOS,
    CODEBOOK_SIZE,
    NUM_CODEBOOKS,
    PAD_ID,
    TURN_END,
    torch_dtype,
)

LORA_R, LORA_ALPHA, LORA_DROPOUT, LR = 16, 32, 0.05, 1e-4
OURS, TRAINER = "ours", "trainer"


def add_geometry(parser: argparse.ArgumentParser) -> None:
    """Add the options for the geometry of the random base."""
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=128256)


def geometry(args: argparse.Namespace) -> dict[str, Any]:
    """Return the configuration of a base with heads of 64 and an FFN of 8/3 of the hidden size."""
    return {
        "hidden_size": args.hidden, "intermediate_size": args.hidden * 8 // 3 // 64 * 64,
        "num_hidden_layers": args.layers, "num_attention_heads": args.hidden // 64,
        "num_key_value_heads": max(1, args.hidden // 192), "head_dim": 64, "vocab_size": args.vocab,
    }  # fmt: skip


def speech(num_text: int, num_frames: int, seed: int) -> Any:
    """Return an encoded sample: a prompt of `num_text` tokens, `num_frames` frames of codes, and the end tokens."""
    import torch

    from higgs_ds.data.collate import EncodedSample
    from higgs_ds.model.labels import IGNORE_INDEX
    from higgs_ds.model.prompt import Prompt

    draw = torch.Generator().manual_seed(seed)
    rows = stream().num_rows(num_frames)
    text = torch.randint(100, 1000, (num_text,), generator=draw).tolist()
    delayed = NUM_CODEBOOKS - 1
    ids = [*text, AUDIO_BOS, *[AUDIO] * (rows - delayed), *[AUDIO_DELAY] * delayed, AUDIO_EOS, TURN_END]
    labels = [IGNORE_INDEX] * num_text + [AUDIO_BOS] + [IGNORE_INDEX] * rows + [AUDIO_EOS, TURN_END]
    codes = torch.randint(CODEBOOK_SIZE - 2, (NUM_CODEBOOKS, num_frames), generator=draw)
    return EncodedSample(Prompt(ids, labels, list(range(num_text + 1, num_text + 1 + rows)), [True]), [codes])


def stream() -> Any:
    from higgs_ds.model.v2.stream import FramedStream

    return FramedStream(NUM_CODEBOOKS, CODEBOOK_SIZE - 2, CODEBOOK_SIZE - 1)


def our_engine(folder: Path, precision: str, four_bit: bool, every: int | None, batch_size: int, meter: Meter) -> Any:
    """Load a base and build this project's engine around it, as launch/train.py does.

    With `every`, each `every`-th layer is recomputed.
    """
    from higgs_ds.common.distributed import device
    from higgs_ds.model.loading import load_base, load_base_in_4bit
    from higgs_ds.model.recomputation import checkpoint_layers

    dtype = torch_dtype(precision)
    base = load_base_in_4bit(folder, dtype, device(), device())[0] if four_bit else load_base(folder, dtype)
    base.to(device())
    touch(base)
    if every:
        checkpoint_layers(base, every)
    meter.weights_are_there()
    return engine_around(base, *our_options(precision, batch_size))


def our_options(precision: str, batch_size: int) -> tuple[Any, dict[str, Any]]:
    """Return the options of a run, and its DeepSpeed settings from ds_configs/zero2.json."""
    from higgs_ds.common.distributed import world_size
    from higgs_ds.options.command_line import parse_train_options
    from higgs_ds.options.ds_config import read_ds_config, resolve

    argv = f"--precision {precision} --lr {LR} --lora_r {LORA_R} --lora_alpha {LORA_ALPHA}"
    argv += f" --lora_dropout {LORA_DROPOUT}"
    options, given = parse_train_options([*argv.split(), "--grad_accum=1", f"--batch_size={batch_size}"])
    settings, options = resolve(read_ds_config(options.run.deepspeed), options, given, world_size())
    return options, settings


def engine_around(base: Any, options: Any, settings: dict[str, Any]) -> Any:
    """Add adapters to a base, and start the engine."""
    from higgs_ds.adapters.save import trained_parameters
    from higgs_ds.model.lora import add_lora
    from higgs_ds.model.loss import LossWeights
    from higgs_ds.model.v2.loss_model import DualLossModel
    from higgs_ds.training.engine import Engine

    model = DualLossModel(add_lora(base, options.lora, "", torch_dtype(options.model.precision)))
    weights = LossWeights.of(1, 1, NUM_CODEBOOKS, None)
    return Engine(model, trained_parameters(model.adapted), settings, options.optim, 1000, weights)


def native_trainer(
    folder: Path, output: Path, precision: str, four_bit: bool, checkpointing: bool, meter: Meter, **arguments: Any
) -> Any:
    """Build transformers' Trainer with PEFT and its defaults on the native model; `train_dataset` is required."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model
    from transformers import (
        BitsAndBytesConfig,
        HiggsAudioV2ForConditionalGeneration,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from higgs_ds.model.lora import discover_targets
    from higgs_ds.options.fields import LORA_TARGET_GROUPS

    transformers.utils.logging.disable_progress_bar()
    dtype, cpu = torch_dtype(precision), not torch.cuda.is_available()
    quantized: dict[str, Any] = {}
    if four_bit:
        quantized["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["audio_lm_head", "text_lm_head"],
        )  # fmt: skip
    model = HiggsAudioV2ForConditionalGeneration.from_pretrained(
        folder, use_text_head=True, dtype=dtype, device_map="cpu" if cpu else "cuda:0", **quantized
    )
    touch(model)
    meter.weights_are_there()
    targets = discover_targets(model, LORA_TARGET_GROUPS)
    lora = LoraConfig(r=LORA_R, lora_alpha=LORA_ALPHA, lora_dropout=LORA_DROPOUT, target_modules=targets)
    model = get_peft_model(model, lora)
    model.enable_input_require_grads()

    class Tick(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            meter.step_begins()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.step_ends()

    samples = arguments.pop("train_dataset")
    training = TrainingArguments(
        output_dir=str(output), learning_rate=LR, report_to=[], save_strategy="no", logging_strategy="no", use_cpu=cpu,
        bf16=precision == "bf16", remove_unused_columns=False, gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False}, disable_tqdm=True, **arguments,
    )  # fmt: skip
    return Trainer(model, training, train_dataset=samples, data_collator=pad, callbacks=[Tick()])


def touch(model: Any) -> None:
    """Copy all weights into memory; a loader may only have mapped them from their files."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def native_sample(sample: Any) -> dict[str, Any]:
    """Return an encoded sample as inputs of the native forward, with unshifted labels."""
    import torch

    codes = stream().delay(sample.codes[0])
    return {
        "input_ids": torch.tensor(sample.prompt.input_ids),
        "attention_mask": torch.ones(len(sample.prompt.input_ids), dtype=torch.long),
        "labels": torch.tensor(sample.prompt.labels),
        "audio_input_ids": codes,
        "audio_labels": stream().labels(sample.codes[0]),
        "audio_input_ids_mask": torch.ones(len(codes), dtype=torch.bool),
    }


PADDING = {"input_ids": PAD_ID, "labels": -100, "audio_labels": -100}


def pad(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Collate native samples; each tensor is padded on the right to the longest."""
    from torch.nn.utils.rnn import pad_sequence

    return {
        name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=PADDING.get(name, 0))
        for name in rows[0]
    }


class Meter:
    """Measure the seconds of each step after the warmup or, with `memory`, the peak above the weights.

    On CPUs, one run cannot measure both: the profiler, which records each of torch's allocations, takes time. Resident
    memory would say little, because the C library keeps small freed blocks.
    """

    def __init__(self, memory: bool, warmup: int) -> None:
        self.memory, self.warmup = memory, warmup
        self.begun, self.seconds = 0.0, list[float]()
        self.profile: Any = None
        self.weights = 0

    def weights_are_there(self) -> None:
        """Mark the moment when the base is loaded and nothing else."""
        import torch
        from torch.profiler import ProfilerActivity, profile

        if torch.cuda.is_available():
            self.weights = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        elif self.memory:
            self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
            self.profile.start()

    def step_begins(self) -> None:
        self.begun = now()

    def step_ends(self) -> None:
        self.seconds.append(now() - self.begun)

    def read(self) -> dict[str, float]:
        """Return what was measured: `step_s`, the median step time, and `peak_mib`."""
        import torch

        result = {}
        if torch.cuda.is_available():
            result["peak_mib"] = (torch.cuda.max_memory_allocated() - self.weights) / 2**20
        elif self.profile is not None:
            self.profile.stop()
            events = self.profile.profiler.kineto_results.events()
            sizes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
            result["peak_mib"] = max(itertools.accumulate(size for _, size in sorted(sizes))) / 2**20
        if len(self.seconds) > self.warmup:
            result["step_s"] = statistics.median(self.seconds[self.warmup :])
        return result


def now() -> float:
    """Return the time in seconds after the GPU, if there is one, has done what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def child(script: str, options: Sequence[str], ranks: int = 1) -> dict[str, float]:
    """Run a script in its own process, or in one per rank, and return its last line of output, parsed as JSON."""
    command = [sys.executable, script]
    if ranks > 1:
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", script]
    done = subprocess.run([*command, *options], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def matmul_peak(precision: str, size: int) -> float:
    """Return the operations per second of a square matmul on this device, the best of several runs."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    a, b = (torch.randn(size, size, device=device).to(torch_dtype(precision)) for _ in range(2))
    best = math.inf
    for _ in range(10):
        started = now()
        a @ b.T
        best = min(best, now() - started)
    return 2 * size**3 / best
