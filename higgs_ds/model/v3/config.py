"""The configuration of Higgs Audio v3, as an object of transformers' classes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig, Qwen3Config

from higgs_ds.model.v3.layout import BOC_ID, EOC_ID, MODEL_TYPE, with_rope_theta


@strict
class HiggsQwen3Config(PreTrainedConfig):
    """A trunk of Qwen3 with a table of audio codes, which is also the head if they are tied.

    text_config: of the trunk. audio_encoder_config: `num_codebooks`, `vocab_size` (codes of a codebook, BOC and EOC
    included) and `tie_word_embeddings`.
    """

    model_type = MODEL_TYPE
    sub_configs = {"text_config": Qwen3Config}

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    audio_encoder_config: dict[str, Any] | None = None
    audio_token_id: int = -100

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = Qwen3Config(**with_rope_theta(self.text_config or {}))
        self.audio_encoder_config = dict(self.audio_encoder_config or {})
        super().__post_init__(**kwargs)

    @property
    def trunk(self) -> Any:
        """The configuration of the trunk."""
        return self.text_config

    @property
    def num_hidden_layers(self) -> int:
        return self.trunk.num_hidden_layers

    @property
    def hidden_size(self) -> int:
        return self.trunk.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.trunk.vocab_size

    @property
    def attention_bias(self) -> bool:
        return self.trunk.attention_bias

    mlp_bias = False
    audio_stream_bos_id = BOC_ID
    audio_stream_eos_id = EOC_ID

    @property
    def num_codebooks(self) -> int:
        assert self.audio_encoder_config is not None
        return self.audio_encoder_config["num_codebooks"]

    @property
    def codebook_size(self) -> int:
        assert self.audio_encoder_config is not None
        return self.audio_encoder_config["vocab_size"]

    @property
    def is_tied(self) -> bool:
        """Whether the table of audio codes is the head, too."""
        assert self.audio_encoder_config is not None
        return self.audio_encoder_config.get("tie_word_embeddings", True)


AutoConfig.register(MODEL_TYPE, HiggsQwen3Config)  # AutoTokenizer looks it up


def config_of(values: Mapping[str, Any]) -> HiggsQwen3Config:
    """Return the configuration for the values of a config.json."""
    trunk = values.get("text_config") or {}
    named = [kept[name] for kept in (values, trunk) for name in ("dtype", "torch_dtype") if kept.get(name)]
    return HiggsQwen3Config.from_dict(copy.deepcopy(dict(values)) | {"dtype": named[0] if named else "bfloat16"})
