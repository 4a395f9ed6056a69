"""Write docs/benchmarks.md and docs/benchmarks.svg from the newest files in results/: python benchmarks/summary.py

No figure there is typed by hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from record import RESULTS

DOCS = RESULTS.parent.parent / "docs"
PAGE, PICTURE = DOCS / "benchmarks.md", DOCS / "benchmarks.svg"
SIDES = {"ours": ("higgs_ds", "#1f6f8b"), "trainer": ("Trainer + PEFT", "#c9c9c9")}
RECOMPUTED = {"": "kept", "_checkpointing": "recomputed in every layer"}


def main() -> None:
    PAGE.write_text("\n".join(page()) + "\n", encoding="utf-8")
    draw()


def newest(name: str) -> tuple[dict[str, Any], str]:
    """The last record of a benchmark, and a line on where it comes from."""
    path = max(RESULTS.glob(f"????-??-??-{name}.json"))
    record = json.loads(path.read_text(encoding="utf-8"))
    versions = ", ".join(f"{library} {version}" for library, version in record["versions"].items())
    return record["result"], (
        f"`{record['command']}`, {record['date']}, {record['hardware']}; {versions}; "
        f"[the figures](../benchmarks/results/{path.name})."
    )


def page() -> Iterator[str]:
    """The lines of docs/benchmarks.md."""
    yield from ("# Benchmarks", "", "Written by `python benchmarks/summary.py` from the files in `benchmarks/results`.")
    yield "With `--json`, a command's last line is one JSON object; `--save` writes such a file. What is compared, each"
    yield "script says at its top. Nothing was measured on a GPU yet; at the released geometry with random weights:"
    yield ""
    yield "    python benchmarks/step_grid.py --base_ckpt benchmarks/3b --lengths 512 2048 --batches 1 8 \\"
    yield "      --precisions bf16 nf4 --checkpointing none every_layer --trainer --name gpu --json --save"
    for section in (step, epoch, growth, merge, prepare, loading, manifest, padding, long_run):
        yield ""
        yield from section()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield ""
    for row in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(row)} |"
    yield ""


def step() -> Iterator[str]:
    yield "## A training step"
    yield ""
    yield "Against transformers' Trainer with PEFT on the native model. Width 512, 8 layers, vocabulary 128,256; 2"
    yield "samples of 512 positions with 300 frames each; rank 16 on all targets."
    sources, speeds, memory = [], [], []
    for kind, names in {
        "float32": ["train_step-fp32"],
        "bf16": ["train_step-bf16-speed-none", "train_step-bf16-memory-none", "train_step-bf16-memory-every_layer"],
        "NF4, float32": ["train_step-nf4-fp32-speed-memory-none"],
    }.items():
        found = [newest(name) for name in names]
        sources += [source for _, source in found]
        values = {key: value for result, _ in found for key, value in result.items()}
        for suffix, activations in RECOMPUTED.items():
            label = f"{kind}, activations {activations}"
            if f"speed_ratio{suffix}" in values:
                each = (f"{values[f'{side}_tokens_per_s{suffix}']:,.3g}" for side in SIDES)
                speeds.append([label, *each, f"{values[f'speed_ratio{suffix}']:.2f}"])
            if f"memory_ratio{suffix}" in values:
                each = (f"{values[f'{side}_peak_mib{suffix}']:,.0f} MiB" for side in SIDES)
                ratio = values[f"memory_ratio{suffix}"]
                memory.append([label, *each, f"{ratio:.3f} (1/{1 / ratio:.1f})"])
    yield from table(("tokens/s", "here", "Trainer", "times as fast"), speeds)
    yield from table(("peak above the weights", "here", "Trainer", "ratio"), memory)
    yield "This CPU has no instructions for bf16. Without them, torch took over a hundred times as long as in float32"
    yield "to multiply a gradient by a weight (docs/log.md): these speeds in bf16 say little about other processors."
    yield ""
    yield from (f"- {source}" for source in sources)


def epoch() -> Iterator[str]:
    result, source = newest("epoch-fp32")
    yield "## An epoch"
    yield ""
    yield f"{result['clips']} clips of speech-like lengths (log-normal, 1 to 20 s, {result['audio_s']:.0f} s in all),"
    yield f"codes cached for both, batches of {result['batch_size']}, the model as above, {result['precision']}."
    each = (f"{result[f'{side}_samples_per_s']:.2f}" for side in SIDES)
    yield from table(("", "here", "Trainer", "times as fast"), [["clips/s", *each, f"{result['speed_ratio']:.2f}"]])
    yield source


def growth() -> Iterator[str]:
    yield "## How a step grows"
    yield ""
    yield "The same model, unless it is said otherwise; of each sample all but 64 positions are audio."
    columns = ("length", "batch", "vocab", "precision", "checkpointing", "ranks")
    for title, name in (
        ("vocabulary", "grid-vocabulary"),
        ("length and batch", "grid-length"),
        ("ranks", "grid-ranks"),
    ):
        result, source = newest(name)
        rows = [
            [
                *(f"{cell[column]:,}" if isinstance(cell[column], int) else cell[column] for column in columns),
                f"{cell['tokens_per_s']:,.0f}", f"{cell['step_s']:.3f}", f"{cell['peak_mib']:,.0f}",
                f"{cell['matmul_share']:.0%}",
            ]
            for cell in result["cells"]
        ]  # fmt: skip
        yield ""
        yield f"### By {title}"
        yield from table((*columns, "tokens/s", "s a step", "peak MiB above the weights", "of the matmul peak"), rows)
        yield source


def merge() -> Iterator[str]:
    result, source = newest("merge")
    yield "## Merging"
    yield ""
    yield f"An adapter of rank 16 on all targets into a base of {result['base_gib']:.2f} GiB. The largest difference"
    yield f"between what is made here and by PEFT is {result['largest_difference']:.3g}."
    names = {
        "ours": "here, with its self-check",
        "ours_unverified": "here, without",
        "ours_dequantized": "here, into what 4 bits hold, with its self-check",
        "peft": "PEFT's `merge_and_unload`",
    }
    rows = [
        [text, f"{result[f'{part}_seconds']:.1f} s", f"{result[f'{part}_peak_gib']:.2f} GiB"]
        for part, text in names.items()
    ]
    yield from table(("", "time", "peak resident memory"), rows)
    yield f"Of each peak {result['ours_libraries_gib']:.2f} GiB are the libraries."
    yield ""
    yield source


def prepare() -> Iterator[str]:
    result, source = newest("prepare-released")
    yield "## Encoding audio"
    yield ""
    yield f"{result['clips']} clips, {result['audio_s']:.0f} s, a codec of the released geometry with random weights."
    rows = [
        [
            "ahead (`launch/prepare.py`, its start included)",
            f"{result['ahead_s']:.1f} s",
            f"{result['ahead_clips_per_s']:.2f}",
        ],
        ["ahead, again, nothing new", f"{result['again_s']:.1f} s", ""],
        ["in the loop, an epoch", f"{result['loop_epoch_s']:.1f} s", f"{result['loop_clips_per_s']:.2f}"],
        ["from the cache, an epoch", f"{result['cached_epoch_s']:.3f} s", ""],
    ]
    yield from table(("", "time", "clips/s"), rows)
    yield f"Over {result['epochs']} epochs, encoding in the loop takes {result['time_ratio']:.2f} times as long. Ahead,"
    yield "a clip is encoded on one thread of a CPU, so that its codes do not depend on the number of processes;"
    yield "there is one of these for each 60 s of audio. In the loop it is encoded on all threads."
    yield ""
    yield source


def loading() -> Iterator[str]:
    result, source = newest("base_in_4bit")
    yield "## A base in 4 bits"
    yield ""
    yield f"A base of {result['base_gib']:.2f} GiB in {result['shards']} files; in 4 bits {result['nf4_gib']:.2f} GiB."
    names = {"libraries": "libraries alone", "load": "loading it in 4 bits", "merge": "merging into what 4 bits hold"}
    rows = [[text, f"{result[part]['peak_gib']:.2f} GiB"] for part, text in names.items()]
    yield from table(("", "peak resident memory"), rows)
    yield source


def manifest() -> Iterator[str]:
    result, source = newest("manifest")
    yield "## A large manifest"
    yield ""
    rows = [
        ["checked and indexed", f"{result['first_s']:.0f} s", f"{result['first_peak_gib']:.2f} GiB"],
        ["again, nothing new", f"{result['again_s']:.0f} s", f"{result['again_peak_gib']:.2f} GiB"],
        ["the start alone", f"{result['startup_s']:.0f} s", f"{result['startup_peak_gib']:.2f} GiB"],
    ]
    yield f"{result['lines']:,} lines, {result['manifest_mib']:.0f} MiB."
    yield from table(("", "time", "peak resident memory"), rows)
    yield source


def long_run() -> Iterator[str]:
    result, source = newest("long_run")
    yield "## A long run"
    yield ""
    yield f"Resident memory over {result['steps']:,} steps of the random base in float32, with a validation and a"
    yield f"checkpoint every 250; from step {result['settled']} on {result['lowest_mib']:,.0f} to"
    yield f"{result['highest_mib']:,.0f} MiB, the last tenth {result['last_over_first_tenth']:.3f} times the first."
    steps, resident = result["resident_mib"].keys(), result["resident_mib"].values()
    yield from table(["step", *(f"{int(step):,}" for step in steps)], [["MiB", *(f"{mib:,}" for mib in resident)]])
    times = result["step_time_s"]
    yield f"A step took {times['first_third']} s in the first third and {times['last_third']} s in the last (medians)."
    yield ""
    yield source


def padding() -> Iterator[str]:
    result, source = newest("padding")
    yield "## Padding"
    yield ""
    yield f"Share of the positions that are padding, {result['samples']:,} samples of speech-like lengths."
    rows = [[name, *(f"{share:.1%}" for share in shares.values())] for name, shares in result["padding"].items()]
    yield from table(("micro-batch", "shuffled", "by length"), rows)
    yield source


def draw() -> None:
    """Three pairs of bars."""
    import matplotlib
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "higgs_ds"  # the same figures give the same file
    (step_values, _), (epoch_values, _) = newest("train_step-fp32"), newest("epoch-fp32")
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.2))
    by_step = {text.replace(" in", "\nin"): suffix for suffix, text in RECOMPUTED.items()}
    for ax, title, values, quantity, groups in (
        (axes[0], "a step in float32: tokens/s", step_values, "tokens_per_s", by_step),
        (axes[1], "its peak above the weights, MiB", step_values, "peak_mib", by_step),
        (axes[2], "an epoch: clips/s", epoch_values, "samples_per_s", {"clips of 1 to 20 s": ""}),
    ):
        for j, (side, (name, color)) in enumerate(SIDES.items()):
            heights = [values[f"{side}_{quantity}{suffix}"] for suffix in groups.values()]
            drawn = ax.bar([i + 0.38 * j - 0.19 for i in range(len(groups))], heights, 0.36, color=color, label=name)
            ax.bar_label(drawn, fmt="{:,.2f}" if max(heights) < 10 else "{:,.0f}", fontsize=8)
        ax.set_xticks(range(len(groups)), list(groups), fontsize=8)
        ax.set_title(title, fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(axis="y", labelsize=8)
        ax.margins(y=0.12)
    axes[2].set_xlim(-1, 1)
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
