"""Generate speech from a base, an adapter on its base, or a merged model, with transformers' own generation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer

from higgs_ds.adapters.convert import adapter_in_native_names
from higgs_ds.adapters.load import Adapter, read_adapter
from higgs_ds.adapters.save import ADAPTER_CONFIG
from higgs_ds.adapters.speakers import NO_SPEAKERS, TrainedSpeakers, read_speakers
from higgs_ds.bases.bundle import Bundle, open_bundle
from higgs_ds.bases.conversion import SAMPLE_RATE
from higgs_ds.common.console import warn
from higgs_ds.common.errors import InputError, collect_problems
from higgs_ds.common.files import saving, why_not_writable
from higgs_ds.common.resources import default_cache_dir
from higgs_ds.data.audio import WRITTEN_AS, read_audio, write_audio
from higgs_ds.data.codec import Codec
from higgs_ds.data.templates import Reference
from higgs_ds.model.loading import load_for_generation
from higgs_ds.model.parts import NO_PARTS, parts_of
from higgs_ds.model.prompt import Prompt as TokenizedPrompt
from higgs_ds.model.sample import Message
from higgs_ds.options.commands import GenerateOptions
from higgs_ds.options.generation import check_generate_options
from higgs_ds.speech.long_texts import speak_chunks
from higgs_ds.speech.measures import stop_warning
from higgs_ds.speech.texts import chunks_of, texts_to_speak
from higgs_ds.speech.voices import clip_problems, name_some, prompt_of, tag_problems, voices_of


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


@dataclass(frozen=True)
class Request:
    """What the options ask for: the text of each file to write, and its voices."""

    model: GenerationModel
    texts: dict[Path, str]
    voices: tuple[Reference, ...]


def main(options: GenerateOptions) -> None:
    """Write WAV files for the options. Raises InputError before any weight is loaded."""
    request = _check(options)
    bundle = request.model.bundle
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    codec = Codec(bundle.codec.folder, device)
    clips = [voice.clip for voice in request.voices if voice.clip is not None]
    references = [codec.encode(read_audio(clip, codec.sample_rate)) for clip in clips]
    model = load_generation_model(request.model, device)
    all_stopped: list[bool] = []
    for output, text in request.texts.items():
        torch.manual_seed(options.seed)  # for each, so that a line is spoken as it would be alone
        codes, stopped = _speak_text(model, request, references, text, options)
        all_stopped += stopped
        waveform = codec.decode(codes)
        with saving(output):
            write_audio(output, waveform, bundle.codec.sample_rate)
        print(f"WAV: {output} ({len(waveform) / bundle.codec.sample_rate:.2f} s, {_ending(stopped)})")
    if warning := stop_warning(sum(all_stopped) / len(all_stopped)):
        print(warning)


def _ending(stopped: list[bool]) -> str:
    """Describe how the chunks of a text ended."""
    if len(stopped) == 1 and not stopped[0]:
        return "cut off at --max_new_tokens, it did not stop on its own"
    cut_off = f"{stopped.count(False)} of them cut off at --max_new_tokens, which did not stop on their own"
    ending = "stopped on its own" if all(stopped) else cut_off
    return f"in {len(stopped)} chunks, {ending}" if len(stopped) > 1 else ending


def _speak_text(
    model: Any, request: Request, references: list[torch.Tensor], text: str, options: GenerateOptions
) -> tuple[torch.Tensor, list[bool]]:
    """Return the codes (C, F) of a text, and whether the model stopped on its own at the end of each chunk."""
    bundle = request.model.bundle
    chunks = chunks_of(text, options.chunk_chars)
    stopped: list[bool] = []

    def speak_chunk(messages: list[Message], given: list[torch.Tensor]) -> torch.Tensor:
        speech = speak(model, bundle, messages, given, _generation_settings(options))
        speech.check()
        if speech.codes.shape[1] == 0:
            where = f" of chunk {len(stopped) + 1} of {len(chunks)}" if len(chunks) > 1 else ""
            raise InputError(
                f"the model stopped before its first frame{where}: there is nothing to write; is it trained?"
            )
        stopped.append(speech.stopped)
        # An untrained model may generate the stream's special tokens between the codes; the codec cannot decode them.
        return speech.codes.clamp(max=bundle.stream.bos_id - 1)

    prompt = prompt_of(text, request.voices, options.scene)
    limit = bundle.family.max_references
    return speak_chunks(prompt, references, chunks, options.chunk_context, speak_chunk, limit), stopped


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


def trained_speakers(speaker: GenerationModel) -> TrainedSpeakers:
    """Return the speakers that the adapter, or the model without one, was trained with. Raises InputError."""
    of_adapter = read_speakers(speaker.adapter_folder) if speaker.adapter_folder else NO_SPEAKERS
    return of_adapter if of_adapter.voices else read_speakers(speaker.bundle.folder)


def load_generation_model(speaker: GenerationModel, device: torch.device) -> Any:
    """Load the model with its adapter on a device, ready to generate with transformers and PEFT."""
    return add_adapter(load_without_adapter(speaker, device), speaker)


def load_without_adapter(speaker: GenerationModel, device: torch.device) -> Any:
    """Load the model on a device, in the form that its adapter needs: quantized, with empty parts that it has."""
    bundle, adapter = speaker.bundle, speaker.adapter
    to_add = adapter.full.parts.without(parts_of(bundle.config)) if adapter else NO_PARTS
    model = load_for_generation(bundle.folder, adapter.quantization if adapter else None, device, to_add)
    if to_add:
        model.make_parts(to_add)
    return model


def add_adapter(model: Any, speaker: GenerationModel) -> Any:
    """Return the model with its adapter, if there is one, by PEFT."""
    adapter = speaker.adapter
    if adapter is not None and speaker.adapter_folder is not None:
        with adapter_in_native_names(speaker.adapter_folder, adapter) as folder:
            model = PeftModel.from_pretrained(model, folder)
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.scale_layer(adapter.strength)
    return model.eval()


def remove_adapter(model: PeftModel) -> Any:
    """Return the model that `add_adapter` was given, without anything of the adapter.

    The adapter is deleted first: PEFT 0.21's `unload` would leave the heads that were trained with it in the model.
    """
    model.delete_adapter(model.active_adapter)
    return model.unload()


def conversation(options: GenerateOptions) -> list[Message]:
    """Return the prompt of --text without speakers that the model was trained with."""
    return prompt_of(options.text, voices_of(options, NO_SPEAKERS), options.scene)


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
    prompt = generation_prompt(bundle, messages, references)
    inputs: dict[str, torch.Tensor] = {"input_ids": torch.tensor([prompt.input_ids])}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    num_rows = len(prompt.audio_columns)
    if references:
        inputs["audio_input_ids"] = torch.cat([stream.delay(codes) for codes in references])[None]
        inputs["audio_input_ids_mask"] = family.audio_mask(prompt)
    device = next(model.parameters()).device
    with watched_range(model) as in_range:
        rows = model.generate(**{name: tensor.to(device) for name, tensor in inputs.items()}, **settings)
    new_rows = rows[0, num_rows:].cpu()
    return Speech(stream.revert(new_rows), stream.has_ended(new_rows), bool(in_range[0]))


def generation_prompt(bundle: Bundle, messages: list[Message], references: list[torch.Tensor]) -> TokenizedPrompt:
    """Return the prompt after which the model speaks. Raises InputError if it has no place for some of it."""
    num_frames = [codes.shape[1] for codes in references]
    segments = bundle.family.render_generation(messages, bundle.vocabulary)
    return bundle.family.tokenize(segments, num_frames, bundle.tokenizer, bundle.stream)


@contextlib.contextmanager
def watched_range(model: Any) -> Iterator[list[torch.Tensor]]:
    """Within the block, check the logits of a model that computes in fp16: yield a list of whether all were finite."""
    in_range = [torch.tensor(True)]

    def check_range(_module: torch.nn.Module, _inputs: Any, logits: torch.Tensor) -> None:
        if logits.dtype == torch.float16:
            in_range[0] = in_range[0].to(logits.device) & logits.isfinite().all()

    head = (model.get_base_model() if isinstance(model, PeftModel) else model).audio_lm_head
    checked = head.register_forward_hook(check_range)
    try:
        yield in_range
    finally:
        checked.remove()


def _check(options: GenerateOptions) -> Request:
    problems = check_generate_options(options)
    if options.output.suffix.lower() not in WRITTEN_AS:
        problems.append(f"--output {options.output}: must end in {' or '.join(WRITTEN_AS)}")
    reason = why_not_writable(options.output.parent)
    if reason or options.output.is_dir():
        problems.append(f"--output {options.output}: cannot be written to: {reason or 'is a folder'}")
    speaker = collect_problems(
        problems,
        lambda: open_generation_model(
            options.base_model_path,
            options.lora_adapter_path,
            options.codec_ckpt,
            default_cache_dir(),
            options.lora_scale,
        ),
    )
    texts = collect_problems(problems, lambda: texts_to_speak(options)) or {}
    hop_length = speaker.bundle.codec.hop_length if speaker else 1
    problems += clip_problems(options, texts, SAMPLE_RATE, hop_length)
    voices = None
    if speaker and len(options.ref_audio or ()) == len(options.ref_text or ()):
        voices = collect_problems(problems, lambda: _voices(options, speaker))
    if voices is not None:
        problems += tag_problems(texts, len(voices))
    if speaker and voices is not None and not problems:
        family, vocabulary = speaker.bundle.family, speaker.bundle.vocabulary
        for text in texts.values():
            prompt = prompt_of(text, voices, options.scene)
            collect_problems(problems, lambda p=prompt: list(family.render_generation(p, vocabulary)))  # type: ignore[misc]
    if problems or speaker is None or voices is None:
        raise InputError(problems)
    return Request(speaker, texts, voices)


def _voices(options: GenerateOptions, speaker: GenerationModel) -> tuple[Reference, ...]:
    trained = trained_speakers(speaker)
    voices = voices_of(options, trained)
    if trained.voices and not voices:
        warn(f"warning: no --speaker is given, and the model's prompts say who speaks: {name_some(trained.voices)}")
    return voices


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
