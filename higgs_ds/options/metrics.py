"""The metrics of `metrics.jsonl` by which the checkpoints of a run can be compared."""

from __future__ import annotations

from dataclasses import dataclass

from higgs_ds.options.fields import DNSMOS, SIMILARITY

VAL_LOSS = "val/loss"
RECOGNIZER = "recognizer"


@dataclass(frozen=True)
class Metric:
    """A metric: its name in words, whether the highest value is the best, and the option that it is measured with."""

    words: str
    is_highest_best: bool = False
    needs: str | None = None  # "recognizer", or a value of --measures

    @property
    def best(self) -> str:
        return "highest" if self.is_highest_best else "lowest"


METRICS = {VAL_LOSS: Metric("validation loss")} | {
    f"eval/{name}": Metric(name.replace("_", " ").replace(" db", " in dB"), is_highest_best, needs)
    for names, is_highest_best, needs in (
        (("word_error_rate", "character_error_rate", "missing_words", "repeated_words"), False, RECOGNIZER),
        (("mel_distance_db",), False, None),
        (("stop_rate", "exact_first_codebook"), True, None),
        (("speaker_similarity", "similarity_to_speaker"), True, SIMILARITY),
        (("mos", "mos_voice", "mos_background", "mos_p808"), True, DNSMOS),
    )
    for name in names
}
