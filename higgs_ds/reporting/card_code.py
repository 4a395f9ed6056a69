"""The Python code of model cards: a downloader runs it with transformers and PEFT, and mostly without this project."""

from __future__ import annotations

from dataclasses import dataclass

from higgs_ds.adapters.card import BASE, Place, fenced
from higgs_ds.bases.builtin import BUILT_IN
from higgs_ds.common.hub import is_hub_id

_SPEAK = """
conversation = [
    {"role": "system", "content": "Generate audio following instruction."},
    {"role": "scene", "content": "Audio is recorded from a quiet room."},
    {"role": "user", "content": "Hello."},
]
settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
inputs = processor.apply_chat_template(conversation, **settings).to(model.device)
rows = model.generate(**inputs, max_new_tokens=500)  # 25 are one second
processor.save_audio(processor.batch_decode(rows), "hello.wav")"""
_CODEC_IS_RELATIVE = "  # the path of a codec in the folder is relative to it; Python 3.11 or newer"


@dataclass(frozen=True)
class CardBase:
    """The base of a run, for the code that gets it: its portable name, its layout, its revision if one was chosen."""

    name: str
    layout: str
    revision: str | None = None


def model_code(place: Place, within: str = "", folder: str | None = None) -> str:
    """Return code that loads a model in the native layout, and speaks.

    Args:
        within: where it is in its place, with a slash.
        folder: where it is instead of its place.
    """
    is_download = folder is None and place.repo_id is not None
    imports = "from huggingface_hub import snapshot_download\n" if is_download else ""
    found = f'snapshot_download("{place.repo_id}")' if is_download else f'"{folder or place.folder}"'
    return _block(f"""import contextlib
{imports}from transformers import AutoProcessor, HiggsAudioV2ForConditionalGeneration

folder = {found}{f' + "{within}"' if within else ""}
with contextlib.chdir(folder):{_CODEC_IS_RELATIVE}
    processor = AutoProcessor.from_pretrained(".")
model = HiggsAudioV2ForConditionalGeneration.from_pretrained(folder).eval()  # .to("cuda") on a GPU""")


def adapter_code(base: CardBase, place: Place, has_text_head: bool = False) -> str:
    """Return code that loads an adapter on its base, which must be in the native layout, with PEFT, and speaks.

    `has_text_head`: whether the adapter holds the heads, of which transformers otherwise leaves out that of text.
    """
    imports, folder = _base_folder(base)
    arguments = "base, use_text_head=True" if has_text_head else "base"
    return _block(f"""import contextlib
{imports}from peft import PeftModel
from transformers import AutoProcessor, HiggsAudioV2ForConditionalGeneration

base = {folder}
with contextlib.chdir(base):{_CODEC_IS_RELATIVE}
    processor = AutoProcessor.from_pretrained(".")
model = HiggsAudioV2ForConditionalGeneration.from_pretrained({arguments})
model = PeftModel.from_pretrained(model, "{place.repo_id or place.folder}").eval()  # .to("cuda") on a GPU""")


def _base_folder(base: CardBase) -> tuple[str, str]:
    """Return the imports, each with a line feed, and the expression that give the folder of a base."""
    if base.name in BUILT_IN:
        imports = ["higgs_ds.bases.builtin import builtin_base", "higgs_ds.common.resources import default_cache_dir"]
        return "".join(f"from {name}\n" for name in imports), f'builtin_base("{base.name}", default_cache_dir())'
    if is_hub_id(base.name):
        revision = f', revision="{base.revision}"' if base.revision else ""
        return "from huggingface_hub import snapshot_download\n", f'snapshot_download("{base.name}"{revision})'
    return "", f'"{BASE}"'


def _block(code: str) -> str:
    return fenced("python", [code, *_SPEAK.splitlines()])
