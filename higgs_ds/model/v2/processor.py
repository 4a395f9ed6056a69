"""The processor files of a native base, which bases in the original layout do not have."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from higgs_ds.model.v2.prompt import AUDIO_DELAY, AUDIO_EOS, AUDIO_OUT, AUDIO_OUT_BOS

SAMPLE_RATE = 24000  # Hz


def processor_files(native: Mapping[str, Any], codec: str) -> dict[str, dict[str, Any] | str]:
    """Return transformers' processor_config.json and the chat template, by their names.

    Args:
        native: the values of a native config.json.
        codec: the codec's path or hub id.
    """
    from transformers import DacFeatureExtractor

    extractor = DacFeatureExtractor(sampling_rate=SAMPLE_RATE, hop_length=1)  # the codec itself pads clips
    values = {
        "processor_class": "HiggsAudioV2Processor",
        "feature_extractor": extractor.to_dict(),
        "audio_tokenizer": {
            "audio_tokenizer_class": "HiggsAudioV2TokenizerModel",
            "audio_tokenizer_name_or_path": codec,
        },
        "audio_token": AUDIO_OUT,
        "audio_bos_token": AUDIO_OUT_BOS,
        "audio_eos_token": AUDIO_EOS,
        "audio_delay_token": AUDIO_DELAY,
        "audio_stream_bos_id": native["audio_stream_bos_id"],
        "audio_stream_eos_id": native["audio_stream_eos_id"],
    }
    template = files("higgs_ds.bases").joinpath("assets/chat_template.jinja").read_text(encoding="utf-8")
    return {"processor_config.json": values, "chat_template.jinja": template}
