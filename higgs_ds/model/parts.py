"""Optional parts of the model, as subclasses beside transformers' native one: audio self-attention, a Whisper tower.

Both are the original's (boson_multimodal), which the released base goes without. Audio self-attention: in each layer,
audio positions first attend to those before them alone. The tower: Whisper's encoder hears clips of system and user
turns, and what it makes of them stands in front of their codes, as text does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    AutoConfig,
    DynamicCache,
    HiggsAudioV2Config,
    HiggsAudioV2ForConditionalGeneration,
    WhisperConfig,
)
from transformers.models.higgs_audio_v2.modeling_higgs_audio_v2 import (
    HiggsAudioV2Attention,
    HiggsAudioV2DecoderLayer,
    HiggsAudioV2Model,
    HiggsAudioV2RMSNorm,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer

from higgs_ds.config import ModelOptions
from higgs_ds.errors import InputError
from higgs_ds.hub import read_tensor, weight_places
from higgs_ds.model.layout import TOWER_GEOMETRY

# The modules of each part, by the end of their names.
ATTENTION_MODULES = ("audio_attn", "audio_post_audio_attn_layer_norm")
TOWER_MODULES = ("audio_tower", "audio_encoder_proj")
_ENCODER_PREFIXES = ("model.encoder.", "encoder.")  # of a Whisper checkpoint, with and without its text head


@strict
class ExtendedConfig(HiggsAudioV2Config):
    """A native configuration with optional parts.

    audio_self_attention: whether layers attend among audio positions; audio_tower: geometry of Whisper's encoder;
    audio_in_token_id: the text token at whose places its features stand.
    """

    model_type = "higgs_audio_v2_extended"

    audio_self_attention: bool = False
    audio_tower: dict[str, Any] | None = None
    audio_in_token_id: int | None = None


AutoConfig.register(ExtendedConfig.model_type, ExtendedConfig)  # which AutoTokenizer asks


@dataclass(frozen=True)
class Parts:
    """Which optional parts a model has, or which of them are trained in full."""

    audio_self_attention: bool = False
    audio_tower: dict[str, Any] | None = None

    def __hash__(self) -> int:
        return hash(self.to_json())

    def __bool__(self) -> bool:
        return self.audio_self_attention or self.audio_tower is not None

    @property
    def modules(self) -> list[str]:
        """The ends of the names of their modules."""
        attention = ATTENTION_MODULES if self.audio_self_attention else ()
        return sorted([*attention, *(TOWER_MODULES if self.audio_tower is not None else ())])

    def has(self, name: str) -> bool:
        """Whether a parameter belongs to one of them."""
        return not set(self.modules).isdisjoint(name.split("."))

    def without(self, others: Parts) -> Parts:
        """Those that are not among the others."""
        tower = self.audio_tower if others.audio_tower is None else None
        return Parts(self.audio_self_attention and not others.audio_self_attention, tower)

    def __str__(self) -> str:
        names = {"audio self-attention": self.audio_self_attention, "Whisper tower": self.audio_tower is not None}
        return ", ".join(name for name, is_there in names.items() if is_there) or "none"

    def to_json(self) -> str:
        return json.dumps(self.__dict__, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Parts:
        """Raises ValueError, TypeError: another version has written it."""
        return cls(**json.loads(text))


NO_PARTS = Parts()


def config_of(values: dict[str, Any]) -> HiggsAudioV2Config:
    """A configuration from the values of a native config.json, of the class that they are of."""
    is_extended = values.get("model_type") == ExtendedConfig.model_type
    return (ExtendedConfig if is_extended else HiggsAudioV2Config).from_dict(values)


def parts_of(config: HiggsAudioV2Config) -> Parts:
    """The optional parts of a model."""
    if not isinstance(config, ExtendedConfig):
        return Parts()
    return Parts(config.audio_self_attention, config.audio_tower)


def with_parts(config: HiggsAudioV2Config, added: Parts) -> HiggsAudioV2Config:
    """A configuration with further parts; the same one where there are none to add."""
    return _extended(config, added) if added else config


def ready_for_parts(config: HiggsAudioV2Config, added: Parts) -> HiggsAudioV2Config:
    """A configuration with the parts that it has, of a class that can take those to be added."""
    return _extended(config, Parts()) if added else config


def _extended(config: HiggsAudioV2Config, added: Parts) -> HiggsAudioV2Config:
    values = config.to_dict() | {"model_type": ExtendedConfig.model_type}
    values["audio_self_attention"] = added.audio_self_attention or values.get("audio_self_attention", False)
    values["audio_tower"] = added.audio_tower or values.get("audio_tower")
    # In all models of the family it stands in front of the token of the model's own audio.
    values["audio_in_token_id"] = values.get("audio_in_token_id") or config.audio_token_id - 1
    return config_of(values)


class AudioTower(nn.Module):
    """Whisper's encoder (Radford et al. 2022, arXiv 2212.04356), whose outputs are averaged in pairs: 25 a second."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv1d(config.num_mel_bins, config.d_model, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(config.d_model, config.d_model, kernel_size=3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(config.max_source_positions, config.d_model)
        self.layers = nn.ModuleList([WhisperEncoderLayer(config) for _ in range(config.encoder_layers)])
        self.layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Outputs (N, T / 4, d_model) of mel features (N, bins, T), of which `lengths` (N,) are of the clip."""
        x = F.gelu(self.conv1(features.to(self.conv1.weight.dtype)))
        x = F.gelu(self.conv2(x)).transpose(1, 2)
        at = torch.arange(x.shape[1], device=x.device)
        x = x + self.embed_positions(at)
        mask = (at < (lengths[:, None] + 1) // 2)[:, None, None]
        if self.config._attn_implementation == "eager":
            # There the original adds its mask of booleans to the scores, as numbers; elsewhere it is a mask.
            mask = mask.to(x.dtype)
        for layer in self.layers:
            x = layer(x, mask)
        return self.layer_norm(F.avg_pool1d(x.transpose(1, 2), 2).transpose(1, 2))


class FeatureProjector(nn.Module):
    """From the tower's width to the model's."""

    def __init__(self, tower_width: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(tower_width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class AttendingLayer(HiggsAudioV2DecoderLayer):
    """A decoder layer whose audio positions attend to each other before all attend to all."""

    audio_attn: HiggsAudioV2Attention
    audio_post_audio_attn_layer_norm: HiggsAudioV2RMSNorm

    def add_parts(self, config: HiggsAudioV2Config, index: int) -> None:
        """Make the modules that a native layer lacks."""
        self.audio_attn = HiggsAudioV2Attention(config, index)
        self.audio_post_audio_attn_layer_norm = HiggsAudioV2RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        audio_token_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """transformers' forward of a layer, for a single sequence (1, T, H), as generation calls it."""
        if len(hidden_states) != 1:
            raise NotImplementedError("audio self-attention generates for one sequence at a time")
        is_audio = audio_token_mask
        if is_audio is None:
            is_audio = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
        audio = hidden_states[is_audio][None]
        normed = hidden_states.clone()
        normed[~is_audio] = self.input_layernorm(hidden_states[~is_audio])
        if audio.shape[1]:
            # Keys and values of audio positions have a cache of their own, as they are fewer.
            cache = None if past_key_values is None else vars(past_key_values).setdefault("of_audio", DynamicCache())
            rotations = [rotation[is_audio][None] for rotation in position_embeddings]
            attended, _ = self.audio_attn(
                self.audio_input_layernorm(audio), (rotations[0], rotations[1]), past_key_values=cache
            )
            audio = audio + attended
            hidden_states = hidden_states.clone()
            hidden_states[is_audio] = audio[0]
            normed[is_audio] = self.audio_post_audio_attn_layer_norm(audio)[0]
        attended, _ = self.self_attn(
            normed, position_embeddings, attention_mask, past_key_values=past_key_values, **kwargs
        )
        hidden_states = hidden_states + attended
        text, audio = hidden_states[~is_audio], hidden_states[is_audio]
        result = torch.empty_like(hidden_states)
        result[~is_audio] = text + self.mlp(self.post_attention_layernorm(text))
        result[is_audio] = audio + self.audio_mlp(self.audio_post_attention_layernorm(audio))
        return result


class ListeningModel(HiggsAudioV2Model):
    """A model with a tower."""

    audio_tower: AudioTower
    audio_encoder_proj: FeatureProjector

    def add_parts(self, config: ExtendedConfig) -> None:
        """Make the modules that a native model lacks."""
        assert config.audio_tower is not None
        self.audio_tower = AudioTower(WhisperConfig(**config.audio_tower, attn_implementation="sdpa"))
        self.audio_encoder_proj = FeatureProjector(config.audio_tower["d_model"], config.hidden_size)

    def hear(self, features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Embeddings (N, T / 4, H) of mel features (N, bins, T), of which `lengths` (N,) are of the clip."""
        return self.audio_encoder_proj(self.audio_tower(features, lengths))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        audio_features: torch.Tensor | None = None,
        feature_lengths: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' forward; mel features (N, bins, T) of N clips fill the places of `<|AUDIO|>` in input_ids."""
        if input_ids is None or audio_features is None or feature_lengths is None:
            return super().forward(input_ids=input_ids, **kwargs)
        heard = self.hear(audio_features, feature_lengths)
        is_of_clip = torch.arange(heard.shape[1], device=heard.device) < ((feature_lengths + 1) // 2 // 2)[:, None]
        is_place = (input_ids == self.config.audio_in_token_id)[..., None]
        embedded = self.embed_tokens.register_forward_hook(
            lambda _module, _inputs, output: output.masked_scatter(is_place, heard[is_of_clip].to(output.dtype))
        )
        with embedded:
            return super().forward(input_ids=input_ids, **kwargs)


class ExtendedModel(HiggsAudioV2ForConditionalGeneration):
    """Higgs Audio v2 with the optional parts that its configuration names."""

    config: ExtendedConfig
    config_class = ExtendedConfig

    def __init__(self, config: ExtendedConfig, use_text_head: bool = False) -> None:
        super().__init__(config, use_text_head)
        self._make_modules(parts_of(config))
        self.post_init()

    def _make_modules(self, parts: Parts) -> None:
        if parts.audio_self_attention:
            for index, layer in enumerate(self.model.layers):
                layer.__class__ = AttendingLayer
                layer.add_parts(self.config, index)
        if parts.audio_tower is not None:
            self.model.__class__ = ListeningModel
            self.model.add_parts(self.config)

    @torch.no_grad()
    def make_parts(self, added: Parts) -> None:
        """Add parts that the base lacks, in the dtype and on the device of its norms, without values."""
        extended = with_parts(self.config, added)
        for name in ("audio_self_attention", "audio_tower", "audio_in_token_id"):
            setattr(self.config, name, getattr(extended, name))  # all modules share this one configuration
        with init_empty_weights():
            self._make_modules(added)
        like = self.model.norm.weight
        for module in self.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.is_meta:
                    empty = torch.empty(parameter.shape, dtype=like.dtype, device=like.device)
                    setattr(module, name, nn.Parameter(empty, requires_grad=False))

    @torch.no_grad()
    def add_parts(self, added: Parts, whisper_folder: Path | None) -> None:
        """Add parts that the base lacks, as the identity: what they add to the model is multiplied by zero at first.

        The other weights of self-attention are drawn from torch's generator; the tower's are those of a Whisper model.

        Raises InputError where that model's files do not hold them.
        """
        self.make_parts(added)
        if added.audio_self_attention:
            for layer in self.model.layers:
                _start_attention(layer, self.config.initializer_range)
        if added.audio_tower is not None:
            assert whisper_folder is not None
            _read_encoder(self.model.audio_tower, whisper_folder)
            for parameter in self.model.audio_encoder_proj.parameters():
                parameter.zero_()


def model_class(config: HiggsAudioV2Config) -> type[HiggsAudioV2ForConditionalGeneration]:
    """What a configuration's model is built as."""
    return ExtendedModel if isinstance(config, ExtendedConfig) else HiggsAudioV2ForConditionalGeneration


def tower_geometry(whisper_folder: Path) -> dict[str, Any]:
    """The geometry of a Whisper model's encoder. Raises InputError, naming --whisper_ckpt, for any other folder."""
    path = whisper_folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if config.get("model_type") != "whisper":
        raise InputError(
            f"--whisper_ckpt {whisper_folder}: model_type is {config.get('model_type')!r}; the tower is made from the "
            "encoder of a Whisper model"
        )
    whisper = WhisperConfig(**config)
    return {name: getattr(whisper, name) for name in TOWER_GEOMETRY}


def parts_to_add(
    options: ModelOptions, config: HiggsAudioV2Config, find_whisper: Callable[[str, str], Path]
) -> tuple[Parts, Path | None]:
    """The parts that options ask for and a base lacks, and the folder of the Whisper model a tower is made from.

    Args:
        find_whisper: gives the folder of a name, and says in its errors which option asked.
    """
    has, folder, tower = parts_of(config), None, None
    if options.whisper_conditioning and has.audio_tower is None:
        folder = find_whisper(options.whisper_ckpt, "--whisper_ckpt")
        tower = tower_geometry(folder)
    return Parts(options.audio_self_attention, tower).without(has), folder


def parts_in_full(options: ModelOptions, config: HiggsAudioV2Config) -> Parts:
    """The optional parts of a model that are trained in full."""
    return Parts(options.audio_self_attention, parts_of(config).audio_tower if options.whisper_conditioning else None)


def _start_attention(layer: AttendingLayer, std: float) -> None:
    for name, parameter in layer.audio_attn.named_parameters():
        if name.endswith(("bias", "o_proj.weight")):
            parameter.zero_()
        else:
            # Drawn on the CPU: the same on every kind of device.
            parameter.copy_(torch.empty(parameter.shape).normal_(std=std))
    layer.audio_post_audio_attn_layer_norm.weight.copy_(layer.audio_input_layernorm.weight)


def _read_encoder(tower: AudioTower, whisper_folder: Path) -> None:
    places = weight_places(whisper_folder)
    prefix = next((prefix for prefix in _ENCODER_PREFIXES if any(name.startswith(prefix) for name in places)), "")
    missing = [name for name, _ in tower.named_parameters() if prefix + name not in places]
    if missing:
        raise InputError(f"--whisper_ckpt {whisper_folder}: lacks {len(missing)} weights of an encoder: {missing[0]}")
    for name, parameter in tower.named_parameters():
        parameter.copy_(read_tensor(places[prefix + name], prefix + name))
