"""Generate speech from a base, an adapter on its base, or a merged model, with transformers' own generation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer

from higgs_ds.adapters.convert import adapter_in_native_names
from higgs_ds.adapters.load import Adapter, read_adapter
from higgs_ds.adapters.save import ADAPTER_CONFIG
from higgs_ds.bases.bundle import Bundle, open_bundle
from higgs_ds.bases.conversion import SAMPLE_RATE
from higgs_ds.common.errors import InputError
from higgs_ds.common.files import saving, why_not_writable
from higgs_ds.common.resources import default_cache_dir
from higgs_ds.data.audio import WRITTEN_AS, AudioError, examine, read_audio, write_audio
from higgs_ds.data.codec import Codec
from higgs_ds.model.loading import load_for_generation
from higgs_ds.model.parts import NO_PARTS, parts_of
from higgs_ds.model.sample import ASSISTANT, SYSTEM, USER, AudioClip, Message
from higgs_ds.options.commands import GenerateOptions, check_lora_scale

MAX_REFERENCE_S = 60.0  # longer references are refused before they are decoded


@dataclass(frozen=True)
class Speech:
    """Generated speech: codes (C, F), and whether the model stopped on its own.

    in_range: False if the model computes in fp16, and logits were not finite.
    """

    codes: torch.Tensor
    stopped: bool
    in_range: bool = True

    def check(self) -> None:
        """Raise InputError if the logits were not finite, which makes the codes meaningless."""
        if not self.in_range:
            raise InputError(
                "generation in fp16: the logits are not finite, because this model's values leave fp16's range "
                "(65,504); generate on a GPU of compute capability 8.0 or higher, or without a GPU"
            )


@dataclass(frozen=True)
class GenerationModel:
    """A base or merged model, and the adapter to generate with, before any weight is loaded."""

    bundle: Bundle
    adapter: Adapter | None
    adapter_folder: Path | None


def main(options: GenerateOptions) -> None:
    """Write a WAV file for the options. Raises InputError before any weight is loaded."""
    speaker = _check(options)
    bundle = speaker.bundle
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    codec = Codec(bundle.codec.folder, device)
    messages = conversation(options)
    references = [codec.encode(read_audio(clip, codec.sample_rate)) for message in messages for clip in message.clips]
    model = load_generation_model(speaker, device)
    torch.manual_seed(options.seed)
    speech = speak(model, bundle, messages, references, _generation_settings(options))
    speech.check()
    if speech.codes.shape[1] == 0:
        raise InputError("the model stopped before its first frame: there is nothing to write; is it trained?")
    # An untrained model may generate the stream's special tokens between the codes; the codec cannot decode them.
    waveform = codec.decode(speech.codes.clamp(max=bundle.stream.bos_id - 1))
    with saving(options.output):
        write_audio(options.output, waveform, bundle.codec.sample_rate)
    ending = "stopped on its own" if speech.stopped else "cut off at --max_new_tokens, it did not stop on its own"
    print(f"WAV: {options.output} ({len(waveform) / bundle.codec.sample_rate:.2f} s, {ending})")


def open_generation_model(
    base_name: str | None, adapter_folder: Path | None, codec_name: str | None, cache_dir: Path, strength: float = 1.0
) -> GenerationModel:
    """Open the named model, by default the adapter's base or a built-in one, and the adapter. Raises InputError.

    `strength`: a factor of the adapter's change of the weights.
    """
    adapter = None
    if adapter_folder is not None:
        adapter = read_adapter(adapter_folder, strength)
        base_name = base_name or PeftConfig.from_pretrained(adapter_folder).base_model_name_or_path
    elif base_name and (Path(base_name) / ADAPTER_CONFIG).is_file():
        raise InputError(f"--base_model_path {base_name}: is an adapter; give it as --lora_adapter_path")
    return GenerationModel(open_bundle(base_name, None, codec_name, cache_dir), adapter, adapter_folder)


def load_generation_model(speaker: GenerationModel, device: torch.device) -> Any:
    """Load the model with its adapter on a device, ready to generate with transformers and PEFT."""
    bundle, adapter = speaker.bundle, speaker.adapter
    to_add = adapter.full.parts.without(parts_of(bundle.config)) if adapter else NO_PARTS
    model = load_for_generation(bundle.folder, adapter.quantization if adapter else None, device, to_add)
    if to_add:
        model.make_parts(to_add)
    if adapter is not None and speaker.adapter_folder is not None:
        with adapter_in_native_names(speaker.adapter_folder, adapter) as folder:
            model = PeftModel.from_pretrained(model, folder)
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.scale_layer(adapter.strength)
    return model.eval()


def conversation(options: GenerateOptions) -> list[Message]:
    """Return the prompt: the scene, the reference pair if a voice is to be cloned, the text."""
    scene = f"<|scene_desc_start|>\n{options.scene}\n<|scene_desc_end|>"
    messages = [Message(SYSTEM, (f"Generate audio following instruction.\n\n{scene}",))]
    if options.ref_audio is not None and options.ref_text is not None:
        messages += [Message(USER, (options.ref_text,)), Message(ASSISTANT, (AudioClip(options.ref_audio),))]
    return [*messages, Message(USER, (options.text,))]


@torch.no_grad()
def speak(
    model: Any, bundle: Bundle, messages: list[Message], references: list[torch.Tensor], settings: dict[str, Any]
) -> Speech:
    """Generate the assistant's audio turn after `messages`.

    Args:
        model: a model loaded by transformers or PEFT.
        references: codes (C, F) of the clips in `messages`, in order.
        settings: keyword arguments of `generate`, which override the model's own generation settings.
    """
    family, stream = bundle.family, bundle.stream
    num_frames = [codes.shape[1] for codes in references]
    segments = family.render_generation(messages, bundle.vocabulary)
    prompt = family.tokenize(segments, num_frames, bundle.tokenizer, stream)
    inputs: dict[str, torch.Tensor] = {"input_ids": torch.tensor([prompt.input_ids])}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    num_rows = len(prompt.audio_columns)
    if references:
        inputs["audio_input_ids"] = torch.cat([stream.delay(codes) for codes in references])[None]
        inputs["audio_input_ids_mask"] = family.audio_mask(prompt)
    device, in_range = next(model.parameters()).device, [torch.tensor(True)]

    def check_range(_module: torch.nn.Module, _inputs: Any, logits: torch.Tensor) -> None:
        if logits.dtype == torch.float16:
            in_range[0] = in_range[0].to(device) & logits.isfinite().all()

    head = (model.get_base_model() if isinstance(model, PeftModel) else model).audio_lm_head
    checked = head.register_forward_hook(check_range)
    rows = model.generate(**{name: tensor.to(device) for name, tensor in inputs.items()}, **settings)
    checked.remove()
    new_rows = rows[0, num_rows:].cpu()
    return Speech(stream.revert(new_rows), stream.has_ended(new_rows), bool(in_range[0]))


def _check(options: GenerateOptions) -> GenerationModel:
    problems = []
    speaker = None
    if not options.text.strip():
        problems.append("--text: is empty; give the text to speak")
    if (options.ref_audio is None) != (options.ref_text is None):
        problems.append("--ref_audio and --ref_text: give both, a reference clip and its text, or neither")
    if options.output.suffix.lower() not in WRITTEN_AS:
        problems.append(f"--output {options.output}: must end in {' or '.join(WRITTEN_AS)}")
    reason = why_not_writable(options.output.parent)
    if reason or options.output.is_dir():
        problems.append(f"--output {options.output}: cannot be written to: {reason or 'is a folder'}")
    problems += check_lora_scale(options.lora_scale, options.lora_adapter_path)
    try:
        speaker = open_generation_model(
            options.base_model_path,
            options.lora_adapter_path,
            options.codec_ckpt,
            default_cache_dir(),
            options.lora_scale,
        )
    except InputError as error:
        problems += error.problems
    if options.ref_audio is not None:
        try:
            facts = examine(AudioClip(options.ref_audio), MAX_REFERENCE_S, SAMPLE_RATE)
            if speaker is not None and facts.num_samples(SAMPLE_RATE) < speaker.bundle.codec.hop_length:
                problems.append(f"--ref_audio {options.ref_audio}: is shorter than one frame of the codec")
            if options.output.exists() and options.output.samefile(options.ref_audio):
                problems.append(f"--output {options.output}: is --ref_audio, which it would overwrite")
        except (AudioError, OSError) as error:
            problems.append(f"--ref_audio {options.ref_audio}: {error}")
    if problems or speaker is None:
        raise InputError(problems)
    return speaker


def _generation_settings(options: GenerateOptions) -> dict[str, Any]:
    """Return keyword arguments of `generate` for the given options; the model's own settings apply to the rest."""
    settings: dict[str, Any] = {"max_new_tokens": options.max_new_tokens}
    if options.temperature is not None:
        settings |= generation_settings(options.temperature)
        if options.temperature > 0:
            settings |= {"top_k": options.top_k, "top_p": options.top_p}
    return {name: value for name, value in settings.items() if value is not None}


def generation_settings(temperature: float) -> dict[str, Any]:
    """Return keyword arguments of `generate` for a temperature; 0 is greedy."""
    return {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
