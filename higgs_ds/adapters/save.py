"""Write `lora_adapters/` from gathered float32 master weights, and check it before it is moved into place."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from higgs_ds.adapters.card import adapter_card, base_in_card
from higgs_ds.adapters.origin import Origin, describe_origins, origins_to_json
from higgs_ds.adapters.speakers import NO_SPEAKERS, TrainedSpeakers
from higgs_ds.common.errors import NotFiniteError, SaveError
from higgs_ds.common.files import write_json, write_text
from higgs_ds.model.families import family_of_weight
from higgs_ds.model.family import Family
from higgs_ds.model.fully_trained import NOTHING_FULLY_TRAINED, FullyTrained
from higgs_ds.model.parts import Parts
from higgs_ds.model.quantization import BaseQuantization

if TYPE_CHECKING:
    from peft import LoraConfig

QUANTIZATION_KEY, DIGEST_KEY, PARTS_KEY = "base_quantization", "sha256", "parts_in_full"
BASE_KEY, ORIGINS_KEY = "base_weights", "started_from"
PEFT_PREFIX = "base_model.model."
ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters: adapters by PEFT's names in a file, a model's own weights by their own names."""
    return {_name_in_file(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _name_in_file(name: str) -> str:
    return name.replace("lora_magnitude_vector.default.weight", "lora_magnitude_vector").replace(".default.", ".")


@dataclass(frozen=True)
class AdapterFormat:
    """What an adapter's files record besides its tensors: PEFT's configuration, and how its base was quantized.

    `full`: what was fully trained beside it; these weights are among the tensors.
    `base_weights`: `Bundle.weights_digest` of the base; `origins`: see `Origin`; `averaged`: whether the tensors are
    averages over the steps (--ema_decay).
    """

    config: LoraConfig
    quantization: BaseQuantization | None = None
    full: FullyTrained = NOTHING_FULLY_TRAINED
    base_weights: str | None = None
    origins: tuple[Origin, ...] = ()
    averaged: bool = False
    speakers: TrainedSpeakers = NO_SPEAKERS

    @property
    def full_parts(self) -> Parts:
        return self.full.parts

    def metadata(self, tensors: dict[str, torch.Tensor], written_config: dict[str, Any]) -> dict[str, str]:
        """Return the header of the tensor file."""
        quantization = self.quantization.to_json() if self.quantization else None
        metadata = {"format": "pt", DIGEST_KEY: digest(tensors, written_config, quantization)}
        metadata |= {QUANTIZATION_KEY: quantization} if quantization else {}
        metadata |= {BASE_KEY: self.base_weights} if self.base_weights else {}
        metadata |= {ORIGINS_KEY: origins_to_json(self.origins)} if self.origins else {}
        return metadata | ({PARTS_KEY: self.full.parts.to_json()} if self.full.parts else {})


def digest(tensors: dict[str, torch.Tensor], config: dict[str, Any], quantization: str | None) -> str:
    """SHA-256 of what decides an adapter's effect: its tensors, its configuration, how its base was quantized.

    The base's path is left out: the base may be moved, and its name in the configuration changed.
    """
    use = {name: value for name, value in config.items() if name != "base_model_name_or_path"}
    sha = hashlib.sha256(json.dumps([use, quantization], sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        sha.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], form: AdapterFormat, must_have_moved: bool) -> None:
    """Write an adapter in PEFT's format, and check what was written.

    Args:
        folder: an empty folder, which the caller moves to its final place only if this returns.
        tensors: by the names of `trained_parameters`.
        must_have_moved: whether it is an error if all B factors are still zero; true after a step with a learning
            rate above 0.

    Raises:
        NotFiniteError: a tensor holds NaN or infinity; nothing is written.
        SaveError: the files read back differently than written.
    """
    check_finite(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    form.config.save_pretrained(folder)
    written = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    written |= {"inference_mode": True, "target_modules": sorted(written["target_modules"])}
    written |= {"modules_to_save": form.full.modules(tensors)} if form.full else {}
    write_json(folder / ADAPTER_CONFIG, dict(sorted(written.items())))
    in_order = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    save_file(in_order, folder / ADAPTER_WEIGHTS, form.metadata(tensors, written))
    family = family_of_weight(next(iter(tensors)).removeprefix(PEFT_PREFIX))
    write_text(folder / ADAPTER_CARD, _card(form, family))
    form.speakers.write(folder)
    verify_adapter(folder, tensors, must_have_moved)


def check_finite(tensors: dict[str, torch.Tensor]) -> None:
    """Raise NotFiniteError if a trained tensor holds NaN or infinity."""
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise NotFiniteError(
            f"{len(broken)} of {len(tensors)} trained tensors hold NaN or infinity, for instance {broken[0]}; "
            "they were not saved. The last checkpoint is unchanged; lower --lr"
        )


def verify_adapter(folder: Path, tensors: dict[str, torch.Tensor], must_have_moved: bool) -> None:
    """Raise SaveError unless the files of an adapter hold exactly `tensors` and, if they must, B factors have moved."""
    from peft import LoraConfig

    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as written:
            names = set(written.keys())
            # One tensor at a time: with --also_train, all of them are gigabytes.
            same = {name for name in names & tensors.keys() if torch.equal(written.get_tensor(name), tensors[name])}
        LoraConfig.from_pretrained(folder)
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise SaveError(f"{folder}: does not read back: {error}") from error
    differing = (names | tensors.keys()) - same
    if differing:
        raise SaveError(
            f"{folder}: {len(differing)} tensors read back differently than written: {sorted(differing)[:3]}"
        )
    if must_have_moved and not any(tensor.any() for name, tensor in tensors.items() if ".lora_B." in name):
        raise SaveError(f"{folder}: every lora_B is zero although the model was trained: the adapter has no effect")


def _card(form: AdapterFormat, family: Family) -> str:
    config = form.config
    full = f"\nFully trained, and stored with the adapter: {form.full}.\n" if form.full else ""
    started = f"\n{describe_origins(form.origins)}\n" if form.origins else ""
    on = base_in_card(config.base_model_name_or_path, form.quantization)
    averaged = "\nThe weights are an exponential moving average over the steps.\n" if form.averaged else ""
    made = f"Trained with higgs_ds on {on}: rank {config.r}, alpha {config.lora_alpha}, float32.\n"
    speakers = f"\n{form.speakers.in_card().rstrip()}\n" if form.speakers.voices else ""
    how = made + averaged + full + started + speakers
    return adapter_card(config.base_model_name_or_path, family, how, bool(form.full.parts))
