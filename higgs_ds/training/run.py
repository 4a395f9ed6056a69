"""What a training works with: its checked inputs, and the run itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from higgs_ds.adapters.save import AdapterFormat
from higgs_ds.adapters.starting_point import StartingPoint
from higgs_ds.bases.bundle import Bundle
from higgs_ds.checkpoints.state import TrainerState
from higgs_ds.checkpoints.trained_weights import FullFormat
from higgs_ds.common.folder_lock import FolderLock
from higgs_ds.data.dataset import Dataset
from higgs_ds.data.flags import Flagged
from higgs_ds.data.sampler import WindowSampler
from higgs_ds.model.config import fully_trained_parts
from higgs_ds.model.fully_trained import FullyTrained
from higgs_ds.model.lora import AdaptedLayer
from higgs_ds.model.parts import Parts
from higgs_ds.options.train import TrainOptions
from higgs_ds.planning.batches import SampleLengths
from higgs_ds.planning.zero_stages import Plan
from higgs_ds.reporting.report_page import Reporter
from higgs_ds.speech.prompts import Prompt
from higgs_ds.speech.scoring import Scorer
from higgs_ds.training.constant_codebooks import ConstantCodebooks
from higgs_ds.training.engine import Engine

GIB = 2**30


@dataclass(frozen=True)
class PlannedMemory:
    """The planned peak of a rank, as `peak_memory_gib` measures it: on a GPU without its context, which no allocator
    knows; else with the memory that Python and its libraries have at the start."""

    plan: Plan
    libraries: int  # in bytes; 0 on a GPU

    @property
    def gib(self) -> float:
        return (self.plan.total + self.libraries) / GIB

    def compared_with(self, measured_gib: float) -> str:
        return f"peak memory of rank 0: {measured_gib:.2f} GiB, planned {self.gib:.2f} GiB"


@dataclass(frozen=True)
class SpeechTest:
    """What the model speaks in evaluations during the run, and what measures it."""

    prompts: Sequence[Prompt]
    scorer: Scorer


@dataclass
class Run:
    """Everything that the training loop uses."""

    options: TrainOptions
    output_dir: Path
    bundle: Bundle
    train: Dataset
    val: Dataset
    sampler: WindowSampler
    engine: Engine
    form: AdapterFormat | FullFormat
    state: TrainerState
    lock: FolderLock
    reporter: Reporter
    codebooks: ConstantCodebooks
    memory: PlannedMemory | None  # on rank 0, unless --quiet
    speech_test: SpeechTest | None  # of --evaluate_steps


@dataclass(frozen=True)
class Inputs:
    """Everything that a run is built from; all audio is already encoded."""

    options: TrainOptions
    ds_settings: dict[str, Any]
    output_dir: Path
    bundle: Bundle
    train: Dataset
    val: Dataset
    too_long: list[str]  # one line for each sample that --max_seq_len leaves out
    summary: str  # of the data, several lines
    resume_from: Path | None
    lock: FolderLock  # of the output folder
    start: StartingPoint | None = None
    flagged: Sequence[Flagged] = ()  # of each manifest, on rank 0
    overruled: tuple[str, ...] = ()  # see `training.overruled`
    speech_test: SpeechTest | None = None

    @property
    def adapted(self) -> tuple[AdaptedLayer, ...]:
        """The layers of the adapter that the run starts from; empty if there is none."""
        return self.start.adapted if self.start else ()

    @property
    def full_parts(self) -> Parts:
        """Optional parts of the model that are fully fine-tuned."""
        return fully_trained_parts(self.options.model, self.bundle.config)

    @property
    def fully_trained(self) -> FullyTrained:
        """What is fully fine-tuned beside adapters; with --finetune full, only the optional parts."""
        return FullyTrained(self.full_parts, self.options.lora.also_train)

    @property
    def zero_stage(self) -> int:
        return int(self.ds_settings["zero_optimization"]["stage"])

    @property
    def longest(self) -> int:
        """Length of the longest sample, in tokens."""
        return max(self.train.longest, self.val.longest)

    @property
    def lengths(self) -> SampleLengths:
        """The lengths of all samples."""
        return SampleLengths.of([self.train.longest_lengths, self.val.longest_lengths], self.options)
