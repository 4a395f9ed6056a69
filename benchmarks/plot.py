"""Draw docs/benchmarks.svg from the newest files in results/: python benchmarks/plot.py"""

from __future__ import annotations

import json
from typing import Any

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes
from record import RESULTS

PICTURE = RESULTS.parent.parent / "docs" / "benchmarks.svg"
COLORS = {"ours": "#1f6f8b", "trainer": "#c9c9c9"}
NAMES = {"ours": "higgs_ds", "trainer": "Trainer + PEFT"}


def main() -> None:
    matplotlib.rcParams["svg.hashsalt"] = "higgs_ds"  # the same figures give the same file
    step, epoch = newest("train_step-fp32"), newest("epoch-fp32")
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.2))
    groups = {"activations\nkept": "", "recomputed\nin every layer": "_checkpointing"}
    for ax, quantity, title in (
        (axes[0], "tokens_per_s", "a step: tokens/s"),
        (axes[1], "peak_mib", "a step: peak above the weights, MiB"),
    ):
        values = {
            group: {side: step[f"{side}_{quantity}{suffix}"] for side in NAMES} for group, suffix in groups.items()
        }
        bars(ax, title, values)
    bars(axes[2], "an epoch: clips/s", {"clips of 1 to 20 s": {side: epoch[f"{side}_samples_per_s"] for side in NAMES}})
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})


def newest(name: str) -> dict[str, Any]:
    """The last result of a benchmark."""
    path = max(RESULTS.glob(f"????-??-??-{name}.json"))
    return json.loads(path.read_text(encoding="utf-8"))["result"]


def bars(ax: Axes, title: str, groups: dict[str, dict[str, float]]) -> None:
    """Two bars beside each other in each group, with their numbers."""
    for i, values in enumerate(groups.values()):
        for j, (side, value) in enumerate(values.items()):
            drawn = ax.bar(i + 0.38 * j - 0.19, value, 0.36, color=COLORS[side], label=NAMES[side] if i == 0 else None)
            ax.bar_label(drawn, fmt="{:,.0f}" if value >= 10 else "{:.2f}", fontsize=8)
    ax.set_xticks(range(len(groups)), list(groups), fontsize=8)
    ax.set_title(title, fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(axis="y", labelsize=8)
    ax.set_ylim(0, 1.12 * max(value for values in groups.values() for value in values.values()))


if __name__ == "__main__":
    main()
