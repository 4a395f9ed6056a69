"""Model cards of adapters as they are saved, and what they share with the card of a finished run.

A card is for people who download the folder: it names nothing of this machine, and its commands are complete.
"""

from __future__ import annotations

from dataclasses import dataclass

from huggingface_hub import ModelCardData

from higgs_ds.bases.builtin import BUILT_IN, portable_name
from higgs_ds.bases.licence import Licence, licence_of
from higgs_ds.common.hub import is_hub_id
from higgs_ds.model.family import Family
from higgs_ds.model.quantization import BaseQuantization

THIS_FOLDER, BASE = "THIS_FOLDER", "BASE"  # stand for folders that a card cannot know
VOICES = """## Voices

The model speaks in the voices of its training data, and imitates those of reference clips. Use and publish it only with
the consent of the people whose voices they are. Do not use it to pretend that somebody said what they did not say, or
to deceive in other ways, and say of its speech that it is generated."""


@dataclass(frozen=True)
class Place:
    """Where the reader of a card gets its folder: from a repository of the hub, or None for a folder that they have."""

    repo_id: str | None = None

    @property
    def folder(self) -> str:
        """The folder in commands."""
        return self.repo_id.rpartition("/")[2] if self.repo_id else THIS_FOLDER

    @property
    def download(self) -> list[str]:
        """The command that makes this folder, if there is one."""
        return [f"hf download {self.repo_id} --local-dir {self.folder}"] if self.repo_id else []


def adapter_title(family: Family) -> str:
    return f"# LoRA adapter for {family.title}"


def header(base: str | None, family: Family, library: str, licence: Licence | None, *tags: str) -> str:
    """Return the header of a card. A base that is not on the hub is left out, as the hub refuses other names."""
    on_hub = base is not None and is_hub_id(base)
    data = ModelCardData(
        base_model=base if on_hub else None,
        library_name=library,
        pipeline_tag="text-to-speech",
        tags=[family.tag, "text-to-speech", *tags],
    )
    for name, value in (licence.header() if licence else {}).items():
        data[name] = value
    return f"---\n{data.to_yaml()}\n---"


def base_in_card(base: str | None, quantization: BaseQuantization | None) -> str:
    """Return how a card names the base of an adapter."""
    name = f"`{portable_name(base)}`" if base else "a base that it does not name"
    return name + (", with its decoder quantized to 4 bits (NF4)" if quantization else "")


def adapter_card(base: str | None, family: Family, how_it_was_made: str, has_parts: bool = False) -> str:
    """Return the card of an adapter; `how_it_was_made` ends with a line feed."""
    name = portable_name(base) if base else None
    licence = licence_of(base, family=family)
    return f"""{header(name, family, "peft", licence, "lora")}

{adapter_title(family)}

{how_it_was_made}
{adapter_commands(name, Place(), has_parts)}

{licence_section(name, licence)}

{VOICES}
"""


def adapter_commands(base: str | None, place: Place, has_parts: bool, get_base: str | None = None) -> str:
    """Return how to speak with an adapter, and how to merge it, with this project's commands.

    Args:
        base: its portable name; None if it is not known.
        has_parts: whether the adapter holds optional parts of the model, which only the original layout has.
        get_base: the command that makes the base's folder BASE, if its name does not lead to it.
    """
    is_found = base is not None and (base in BUILT_IN or is_hub_id(base)) and get_base is None
    option = "" if is_found else f" --base_model_path {BASE}"
    layout = " --export_layout original" if has_parts else ""
    lines = [
        *([get_base] if get_base else []),
        *place.download,
        f'python launch/generate.py{option} --lora_adapter_path {place.folder} --text "Hello." --output hello.wav',
        f"python launch/merge.py{option} --lora_adapter_path {place.folder} --output_path merged{layout}",
    ]
    where = ""
    if base in BUILT_IN:
        where = f"\n\nThe base, `{base}`, is built into higgs_ds, and is made from its files at the first use."
    elif not is_found and get_base is None:
        where = f"\n\n{BASE} is the folder of the base{f', `{base}`' if base else ''}, which this card cannot lead to."
    return f"""In a checkout of higgs_ds, speak, or merge it into its base:

{fenced("bash", lines)}{where}"""


def fenced(language: str, lines: list[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def licence_section(base: str | None, of_base: Licence | None, given: str | None = None) -> str:
    """Return the section on the licence: of the base, and what --hub_license names."""
    named = f", `{base}`," if base else ""
    if of_base is None:
        lines = [f"The licence of the base{named} is not known to the program that wrote this card."]
        lines += [] if given else ["State it here before you publish this."]
    else:
        conditions = f" {of_base.conditions}" if of_base.conditions else ""
        also = "Its conditions also hold for what is made from the base."
        lines = [f"The licence of the base{named} is {of_base.title}. {also}{conditions}"]
    if given:
        lines.insert(0, f"Published under {given}.")
    return "## Licence\n\n" + "\n".join(lines)
