"""--samples: what the model in training speaks for fixed prompts, as WAV files beside the references."""

from __future__ import annotations

import torch

from higgs_ds.common import distributed
from higgs_ds.common.files import write_json
from higgs_ds.common.run_files import PROMPTS_FILE, REFERENCE_FOLDER, SAMPLES_FOLDER
from higgs_ds.data.audio import write_audio
from higgs_ds.data.codec import Codec
from higgs_ds.reporting.optional import OptionalOutput
from higgs_ds.reporting.trackers import Sound
from higgs_ds.speech.generate import Speech, generation_settings, speak
from higgs_ds.speech.prompts import Prompt, prompts_of
from higgs_ds.training.intervals import is_due
from higgs_ds.training.run import Run

SEED = 7


class SampleWriter:
    """Generates the samples of a run, from the same prompts each time. Every rank must call its methods."""

    def __init__(self, run: Run) -> None:
        """Take the prompts from the validation samples, or from the training samples if there are none."""
        self.run, self.every = run, run.options.run.sample_steps
        self.folder = run.output_dir / SAMPLES_FOLDER
        self.written: list[Sound] = []  # by the last `write_samples`, on rank 0
        self.output = OptionalOutput("generating samples", "they are tried again when they are next due")
        data = run.val if len(run.val) else run.train
        # At stage 3 the ranks share the weights, and all of them generate: each layer's are gathered when it runs.
        self.together = run.engine.stage == 3
        generates = self.every is not None and (self.together or distributed.is_main())
        self.prompts = prompts_of(data, run.options.run.num_samples) if generates else []

    def is_due(self, last: bool) -> bool:
        return self.every is not None and (last or is_due(self.run.state.step, self.every))

    def is_due_at_start(self) -> bool:
        """Whether to write what the model says before the first step, to compare later samples with."""
        return self.every is not None and self.run.state.step == 0

    def write_samples(self) -> dict[str, float]:
        """Write what the model generates now.

        Returns:
            The share of samples in which the model stopped on its own, and the mean ratio of their lengths to the
            references'. Nothing if rank 0 fails, which is reported once, and does not end the run.
        """
        with distributed.kept_generators():  # loading a model draws from them, too
            # A rank cannot ignore an error where all generate: the others wait for it in the next layer.
            together = self._generate_all() if self.together else None

            def write() -> dict[str, float]:
                return self._write_all(self._generate_all() if together is None else together)

            return distributed.on_main(lambda: self.output.attempt(write)) or {}

    def _generate_all(self) -> list[Speech]:
        spoken = []
        with self.run.engine.generation_mode(self.run.bundle.folder) as model:
            for prompt in self.prompts:
                torch.manual_seed(SEED)
                spoken.append(self._generate(model, prompt))
        return spoken

    def _write_all(self, spoken: list[Speech]) -> dict[str, float]:
        self.written = []
        codec = Codec(self.run.bundle.codec.folder, torch.device("cpu"))
        if not (self.folder / PROMPTS_FILE).is_file():
            self._write_references(codec)
        for number, speech in enumerate(spoken):
            speech.check()
            self._write(codec, f"step-{self.run.state.step}", number, speech.codes)
        if not spoken:
            return {}
        lengths = [s.codes.shape[1] / p.target.shape[1] for s, p in zip(spoken, self.prompts, strict=True)]
        return {
            "sample/stop_rate": sum(speech.stopped for speech in spoken) / len(spoken),
            "sample/length_ratio": sum(lengths) / len(lengths),
        }

    def _generate(self, model: torch.nn.Module, prompt: Prompt) -> Speech:
        settings = generation_settings(self.run.options.run.sample_temperature)
        settings["max_new_tokens"] = prompt.max_new_tokens
        if self.together:
            settings["synced_gpus"] = True  # a rank that has finished continues until all have
        return speak(model, self.run.bundle, prompt.before, prompt.given, settings)

    def _write_references(self, codec: Codec) -> None:
        for number, prompt in enumerate(self.prompts):
            self._write(codec, REFERENCE_FOLDER, number, prompt.target)
        write_json(self.folder / PROMPTS_FILE, [prompt.words for prompt in self.prompts])

    def _write(self, codec: Codec, name: str, number: int, codes: torch.Tensor) -> None:
        """Write codes (C, F) as a WAV file. Without any frame the file would be empty, and none is written."""
        path = self.folder / name / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        if codes.shape[1]:
            # An untrained model may generate the stream's special tokens between the codes.
            waveform = codec.decode(codes.clamp(max=self.run.bundle.stream.bos_id - 1))
            write_audio(path, waveform, codec.sample_rate)
            kind = REFERENCE_FOLDER if name == REFERENCE_FOLDER else "sample"
            self.written.append(Sound(f"{kind}/{number}", path, self.prompts[number].words))
