"""A training step here against what a user would write: transformers' Trainer and PEFT on the native model.

    python benchmarks/train_step.py [--precision bf16|fp32] [--load_in_4bit] [--pairs 3] [--steps 3] [--json]

Same random weights, LoRA (rank 16 on all targets), data (2 samples of 512 positions, 300 frames of audio each) and
batch. The two take turns, each in a process of its own: two steps to warm up, then `--steps` timed ones. Memory is the
peak of what torch has allocated since the weights were loaded, in runs of their own: engine and optimizer count.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BATCH_SIZE, LENGTH, NUM_FRAMES, LORA_R, LR = 2, 512, 300, 16, 1e-4
OURS, TRAINER = "ours", "trainer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--load_in_4bit", action="store_true", help="NF4 in both")
    parser.add_argument("--pairs", type=int, default=3, help="how often each of the two runs")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each run")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--part", choices=(OURS, TRAINER), help=argparse.SUPPRESS)  # what a child process is to do
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps({OURS: run_ours, TRAINER: run_trainer}[args.part](args)))
        return
    result = compare(args)
    for name, value in result.items():
        print(f"{name:<36}{value:>12.3f}" if isinstance(value, float) else f"{name:<36}{value!s:>12}")
    if args.json:
        print(json.dumps(result))


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Medians over pairs: speeds, memory, and their ratios without and with activation checkpointing."""
    result: dict[str, Any] = {
        name: getattr(args, name) for name in ("precision", "load_in_4bit", "hidden", "layers", "vocab")
    }
    for suffix, checkpointing in (("", False), ("_checkpointing", True)):
        pairs = [[child(part, args, checkpointing)["step_s"] for part in (OURS, TRAINER)] for _ in range(args.pairs)]
        peaks = [child(part, args, checkpointing, memory=True)["peak_mib"] for part in (OURS, TRAINER)]
        for i, part in enumerate((OURS, TRAINER)):
            step_s = statistics.median(pair[i] for pair in pairs)
            result[f"{part}_tokens_per_s{suffix}"] = BATCH_SIZE * LENGTH / step_s
            result[f"{part}_peak_mib{suffix}"] = peaks[i]
        result[f"speed_ratio{suffix}"] = statistics.median(theirs / ours for ours, theirs in pairs)
        result[f"memory_ratio{suffix}"] = peaks[0] / peaks[1]
    return result


def child(part: str, args: argparse.Namespace, checkpointing: bool, memory: bool = False) -> dict[str, float]:
    options = [f"--{name}={getattr(args, name)}" for name in ("precision", "hidden", "layers", "vocab")]
    options += ["--load_in_4bit"] * args.load_in_4bit + ["--checkpointing"] * checkpointing + ["--memory"] * memory
    options.append(f"--steps={0 if memory else args.steps}")
    done = subprocess.run(
        [sys.executable, __file__, "--part", part, *options], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def make_base(args: argparse.Namespace, folder: Path) -> None:
    """A random native base on disk, which both load as they do."""
    import torch
    from safetensors.torch import save_file
    from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

    config = HiggsAudioV2Config(
        hidden_size=args.hidden, intermediate_size=args.hidden * 8 // 3 // 64 * 64, num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64, num_key_value_heads=max(1, args.hidden // 192), head_dim=64,
        vocab_size=args.vocab, num_codebooks=8, codebook_size=1026, audio_token_id=16, audio_delay_token_id=14,
        audio_bos_token_id=13, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    model = HiggsAudioV2ForConditionalGeneration(config, use_text_head=True).to(dtype)
    config.architectures, config.dtype = [type(model).__name__], dtype
    config.save_pretrained(folder)
    save_file(
        {name: t.contiguous() for name, t in model.state_dict().items()}, folder / "model.safetensors", {"format": "pt"}
    )


def samples() -> list[Any]:
    """Two samples of speech: a prompt, 300 frames, an end; what a user's own collator and ours are given."""
    import torch

    from higgs_ds.data.collate import EncodedSample
    from higgs_ds.data.delay_pattern import IGNORE_INDEX, AudioStream
    from higgs_ds.data.prompt import Prompt

    stream, draw = AudioStream(8, 1024, 1025), torch.Generator().manual_seed(1)
    rows = stream.num_rows(NUM_FRAMES)
    before = LENGTH - rows - 2
    made = []
    for _ in range(BATCH_SIZE):
        text = torch.randint(100, 1000, (before - 1,), generator=draw).tolist()
        ids = [*text, 13, *[16] * (NUM_FRAMES + 2), *[14] * 7, 12, 9]
        labels = [IGNORE_INDEX] * (before - 1) + [13] + [IGNORE_INDEX] * rows + [12, 9]
        codes = torch.randint(1024, (8, NUM_FRAMES), generator=draw)
        made.append(EncodedSample(Prompt(ids, labels, list(range(before, before + rows)), [True]), [codes]))
    return made


class Meter:
    """Seconds of each step after the first two; or, where memory is asked for, the peak of what torch allocates.

    Not both in one run: the profiler, which sees each allocation, takes time.
    """

    def __init__(self, memory: bool) -> None:
        from torch.profiler import ProfilerActivity, profile

        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True) if memory else None
        self.ends: list[float] = []
        if self.profile:
            self.profile.start()

    def tick(self) -> None:
        self.ends.append(time.perf_counter())

    def read(self) -> dict[str, float]:
        if self.profile is None:
            seconds = [end - start for start, end in zip(self.ends[1:], self.ends[2:], strict=False)]
            return {"step_s": statistics.median(seconds)}
        self.profile.stop()
        events = self.profile.profiler.kineto_results.events()
        sizes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
        alive = list(itertools.accumulate(size for _, size in sorted(sizes)))
        return {"peak_mib": max(alive) / 2**20}


def run_ours(args: argparse.Namespace) -> dict[str, float]:
    """This project's engine on one process, with ds_configs/zero2.json."""
    from higgs_ds.quiet import quiet_libraries

    quiet_libraries()
    from higgs_ds import distributed

    result: dict[str, float] = {}
    distributed.run_ranks(lambda: result.update(_ours(args)))
    return result


def _ours(args: argparse.Namespace) -> dict[str, float]:
    import torch

    from higgs_ds.config import parse_train_options
    from higgs_ds.data.collate import collate
    from higgs_ds.data.delay_pattern import AudioStream
    from higgs_ds.ds_config import read_ds_config, resolve
    from higgs_ds.engine import Engine
    from higgs_ds.export import adapter_parameters
    from higgs_ds.loss import LossWeights
    from higgs_ds.model.higgs import DualLossModel, load_base, load_base_in_4bit
    from higgs_ds.model.lora import add_lora

    argv = f"--precision {args.precision} --lr {LR} --lora_r {LORA_R} --lora_dropout 0 --grad_accum 1"
    options, given = parse_train_options(argv.split())
    settings, options = resolve(read_ds_config(options.run.deepspeed), options, given, 1)
    dtype, cpu = torch.bfloat16 if args.precision == "bf16" else torch.float32, torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        make_base(args, Path(folder))
        base = (
            load_base_in_4bit(Path(folder), dtype, cpu, cpu)[0] if args.load_in_4bit else load_base(Path(folder), dtype)
        )
        touch(base)
        meter = Meter(args.memory)
        if args.checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model = add_lora(base, options.lora, "", dtype)
        engine = Engine(
            DualLossModel(model), adapter_parameters(model), settings, options.optim, 100, LossWeights.of(1, 1, 8, None)
        )
        for _ in range(2 + args.steps):
            engine.train_step([collate(samples(), AudioStream(8, 1024, 1025), 1)])
            meter.tick()
    return meter.read()


def run_trainer(args: argparse.Namespace) -> dict[str, float]:
    """transformers' Trainer and PEFT with its defaults; labels as the native forward takes them."""
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

    from higgs_ds.config import LORA_TARGET_GROUPS
    from higgs_ds.model.lora import discover_targets

    transformers.utils.logging.disable_progress_bar()
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["audio_lm_head", "text_lm_head"],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        make_base(args, Path(folder) / "base")
        model = HiggsAudioV2ForConditionalGeneration.from_pretrained(
            Path(folder) / "base", use_text_head=True, dtype=dtype,
            **({"quantization_config": four_bit, "device_map": "cpu"} if args.load_in_4bit else {}),
        )  # fmt: skip
        touch(model)
        meter = Meter(args.memory)
        targets = discover_targets(model, LORA_TARGET_GROUPS)
        model = get_peft_model(model, LoraConfig(r=LORA_R, lora_alpha=32, target_modules=targets))
        model.enable_input_require_grads()

        class Tick(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                meter.tick()

        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=BATCH_SIZE, max_steps=2 + args.steps, learning_rate=LR,
            report_to=[], save_strategy="no", logging_strategy="no", use_cpu=True, remove_unused_columns=False,
            gradient_checkpointing=args.checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False},
            disable_tqdm=True, bf16=args.precision == "bf16",
        )  # fmt: skip
        inputs = native_samples()
        trainer = Trainer(
            model, arguments, train_dataset=inputs * arguments.max_steps, data_collator=stack, callbacks=[Tick()]
        )
        trainer.train()
    return meter.read()


def touch(model: Any) -> None:
    """Have all weights in memory, which a loader may have mapped from their files only."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def native_samples() -> list[dict[str, Any]]:
    """The same samples as the native forward takes them, labels unshifted."""
    import torch

    from higgs_ds.data.delay_pattern import AudioStream, apply_delay_pattern, delayed_labels

    stream = AudioStream(8, 1024, 1025)
    return [
        {
            "input_ids": torch.tensor(sample.prompt.input_ids),
            "labels": torch.tensor(sample.prompt.labels),
            "audio_input_ids": apply_delay_pattern(sample.codes[0], stream),
            "audio_labels": delayed_labels(sample.codes[0], stream),
            "audio_input_ids_mask": torch.ones(stream.num_rows(NUM_FRAMES), dtype=torch.bool),
        }
        for sample in samples()
    ]


def stack(rows: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


if __name__ == "__main__":
    main()
