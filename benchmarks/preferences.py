"""What preference tuning does for an adapter that has learned too little, beside more supervised steps.

    python benchmarks/preferences.py [--texts 200] [--held_out 100] [--without_sft] [--json] [--save]

The adapter is that of `make demo`, ended after a third of its steps. It speaks texts of its own, which pocketsphinx
compares with what it was to say; it learns to prefer the better renderings; and all is measured on texts that none of
this has seen. The recordings beside these texts say other texts: they only limit lengths, and have the voice's pitch.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import parser_of, report

PROJECT = Path(__file__).resolve().parent.parent
SAMPLES = PROJECT / "samples"
DIGITS = "zero one two three four five six seven eight nine".split()
COMMON = "--base_ckpt speaking-base --precision fp32 --val_split 0 --log_steps 50 --quiet --no_report"
SFT = (
    f"--train_manifest {SAMPLES / 'digits.jsonl'} --batch_size 8 --grad_accum 1 --lr 6e-3 --lora_targets audio_mlp "
    "--lora_r 64 --lora_alpha 128 --lora_dropout 0.1 --codebook_weights 4 2 1 .2 .2 .2 .2 .2"
)
FIRST_STEPS = 40
PREFER = "--recognizer pocketsphinx --temperature 0.5 --renderings 8 --batch_size 32"
DPO = "--objective dpo --batch_size 8 --grad_accum 1 --epochs 4 --lr 1e-3 --beta 0.05 --sft_weight 1 --ema_decay 0.97"
ADAPTERS = {"before": "lora_adapters", "dpo": "lora_adapters_ema", "sft": "lora_adapters"}
TIMES = {"prefer_s": "pairs", "dpo_s": "dpo", "sft_s": "sft"}
MEASURES = ("word_error_rate", "stop_rate", "median_pitch_hz", "reference_median_pitch_hz")


def texts(count: int, seed: int, seen: set[str]) -> list[str]:
    """Draw strings of five digits that are not in `seen`, and add them there."""
    draw, found = random.Random(seed), []
    while len(found) < count:
        text = " ".join(draw.choice(DIGITS) for _ in range(5))
        if text not in seen:
            seen.add(text)
            found.append(text)
    return found


def samples_in(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SAMPLES / name).read_text(encoding="utf-8").splitlines()]


def write_manifest(path: Path, spoken: list[str], recordings: list[dict[str, Any]]) -> None:
    """Write samples with these texts, and recordings in turns."""
    with path.open("w", encoding="utf-8") as file:
        for number, text in enumerate(spoken):
            sample = json.loads(json.dumps(recordings[number % len(recordings)]))
            sample["messages"][1]["content"] = text
            audio = sample["messages"][-1]["content"]
            audio["audio_url"] = str(SAMPLES / audio["audio_url"])
            file.write(json.dumps(sample) + "\n")


def run(folder: Path, name: str, options: str, ranks: int = 1) -> float:
    """Run a command of launch/, and return how many seconds it took."""
    started = time.monotonic()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *torchrun, str(PROJECT / "launch" / f"{name}.py"), *options.split()]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return time.monotonic() - started


def measure(folder: Path, num_texts: int, num_held_out: int, sft: bool) -> dict[str, Any]:
    """Train and evaluate the adapters `before`, `dpo` and, where it is wanted, `sft`, the last two from the first."""
    train, held_out = samples_in("digits.jsonl"), samples_in("digits_held_out.jsonl")
    seen = {sample["messages"][1]["content"] for sample in train + held_out}
    write_manifest(folder / "held_out.jsonl", texts(num_held_out, 1, seen), held_out)
    write_manifest(folder / "prompts.jsonl", texts(num_texts, 2, seen), train)
    first_s = run(folder, "train", f"{COMMON} {SFT} --max_steps {FIRST_STEPS} --output_dir before")
    ranks = len(os.sched_getaffinity(0))
    options = f"--manifest prompts.jsonl --lora_adapter_path before/lora_adapters {PREFER}"
    prefer_s = run(folder, "prefer", options, ranks)
    dpo_s = run(folder, "train", f"{COMMON} {DPO} --pairs preferences/pairs.jsonl --init_from before --output_dir dpo")
    pairs = (folder / "preferences" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    result: dict[str, Any] = {"texts": num_texts, "pairs": len(pairs), "held_out": num_held_out}
    result |= {"prefer_s": prefer_s, "dpo_s": dpo_s}
    if sft:
        # As many as the time of both would have been enough for at the pace of the first steps, the start included.
        steps = round(FIRST_STEPS * (prefer_s + dpo_s) / first_s)
        sft_s = run(folder, "train", f"{COMMON} {SFT} --init_from before --max_steps {steps} --output_dir sft")
        result |= {"sft_s": sft_s, "sft_steps": steps}
    for name, adapter in ADAPTERS.items():
        if name == "sft" and not sft:
            continue
        options = f"--test_manifest held_out.jsonl --recognizer pocketsphinx --batch_size 25 --output_dir {name}-said"
        run(folder, "evaluate", f"{options} --lora_adapter_path {name}/{adapter}")
        found = json.loads((folder / f"{name}-said" / "evaluation.json").read_text(encoding="utf-8"))
        result[name] = {measure: found[measure] for measure in MEASURES}
    return result


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--texts", type=int, default=200, help="of which pairs are made")
    parser.add_argument("--held_out", type=int, default=100)
    parser.add_argument("--without_sft", action="store_true", help="leave out the supervised steps beside it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), args.texts, args.held_out, not args.without_sft)
    print(f"{'':<8}" + "".join(f"{name:>28}" for name in MEASURES))
    for name in [name for name in ADAPTERS if name in result]:
        print(f"{name:<8}" + "".join(f"{result[name][measure]:>28.3g}" for measure in MEASURES))
    print(", ".join(f"{name} {result[key]:.0f} s" for key, name in TIMES.items() if key in result))
    report(args, "preferences", result)


if __name__ == "__main__":
    main()
