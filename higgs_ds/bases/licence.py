"""The licence of a base, which also holds for what is trained from it: of known bases, or as its model card says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from higgs_ds.bases.builtin import BUILT_IN, portable_name
from higgs_ds.model.family import Family

_RELEASED_ON = "https://huggingface.co/bosonai/higgs-audio-v2-generation-3B-base"


@dataclass(frozen=True)
class Licence:
    """A licence as model cards name it: `id` in the hub's list; if that is "other", also a name and a link.

    `conditions`: what to do when publishing, in sentences.
    """

    id: str
    name: str | None = None
    link: str | None = None
    conditions: str = ""

    @property
    def title(self) -> str:
        """The name in Markdown, with its link."""
        name = self.name or self.id
        return f"[{name}]({self.link})" if self.link else name

    def header(self) -> dict[str, str]:
        """Return the values of a model card's header."""
        name = self.name.lower().replace(" ", "-") if self.name else None
        values = {"license": self.id, "license_name": name, "license_link": self.link}
        return {key: value for key, value in values.items() if value is not None}


BOSON = Licence(
    "other",
    "Boson Higgs Audio 2 Community License",
    f"{_RELEASED_ON}/blob/main/LICENSE",
    "Among other things it asks that a copy of it be passed on, that the name of a model made from the base begin with "
    '"Higgs Audio 2", and for these words: Built with Higgs Materials licensed from Boson AI USA, Inc., Copyright '
    "Boson AI USA, Inc., All Rights Reserved and Meta Llama 3 licensed under the Meta Llama 3 Community License, "
    "Copyright Meta Platforms, Inc., All Rights Reserved.",
)
KNOWN = {
    "bosonai/higgs-audio-v2-generation-3B-base": BOSON,
    "bosonai/higgs-tts-2-3b-base": BOSON,  # its name since April 2026
    **dict.fromkeys(BUILT_IN, Licence("apache-2.0")),
}


def licence_of(base: str | None, folder: Path | None = None, family: Family | None = None) -> Licence | None:
    """Return the licence of a base, by its name or by the card in its folder; None if it is not known.

    Args:
        folder: the base's folder, if it is not the one that `base` names.
        family: that the base belongs to; the licence of its released weights may hold for copies of them, too.
    """
    of_family = Licence("other", *family.licence) if family and family.licence else None
    if base is None:
        return of_family
    known = KNOWN.get(portable_name(base))
    in_card = _in_card((folder or Path(base)) / "README.md") or _in_card(Path(base) / "README.md")
    return known or in_card or of_family


def _in_card(path: Path) -> Licence | None:
    import yaml
    from huggingface_hub.repocard import metadata_load

    try:
        header = metadata_load(path) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return None
    found, name, link = (header.get(key) for key in ("license", "license_name", "license_link"))
    if not isinstance(found, str):
        return None
    is_address = isinstance(link, str) and link.startswith("http")  # others are relative to that card
    return Licence(found, name if isinstance(name, str) else None, link if is_address else None)
