"""What is fully trained beside adapters, and stored with them: PEFT's `modules_to_save`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from higgs_ds.model.families import FAMILIES
from higgs_ds.model.parts import NO_PARTS, Parts

# The last norm is not among them: PEFT would take every norm for it.
_GROUP_OF_WEIGHT = {
    f"{module}.weight": group
    for family in FAMILIES
    for module, group in family.outside_layers.items()
    if not module.endswith("norm")
}


@dataclass(frozen=True)
class FullyTrained:
    """Optional parts of the model, and groups of the base's own weights (`heads`, `embeddings`)."""

    parts: Parts = NO_PARTS
    groups: tuple[str, ...] = ()

    @classmethod
    def of(cls, names: Iterable[str], parts: Parts) -> FullyTrained:
        """Return `parts` with the groups that weights belong to, which are given by their names in a native model."""
        return cls(parts, tuple(sorted({_GROUP_OF_WEIGHT[name] for name in names if name in _GROUP_OF_WEIGHT})))

    def has(self, name: str) -> bool:
        """Return whether a weight, given by its name in a native model, belongs to them."""
        return self.parts.has(name) or _GROUP_OF_WEIGHT.get(name) in self.groups

    def modules(self, names: Iterable[str]) -> list[str]:
        """Return the values of `modules_to_save` in a native model whose trained weights have these names.

        PEFT compares them with the ends of names.
        """
        own = [name for name in map(_without_prefix, names) if _GROUP_OF_WEIGHT.get(name) in self.groups]
        return sorted([*self.parts.modules, *(name.removesuffix(".weight") for name in own)])

    def __bool__(self) -> bool:
        return bool(self.parts or self.groups)

    def __str__(self) -> str:
        return ", ".join([*self.groups, *([str(self.parts)] if self.parts else [])]) or "none"


NOTHING_FULLY_TRAINED = FullyTrained()


def _without_prefix(name: str) -> str:
    """Return the name in the model of a tensor of an adapter's file."""
    return name.removeprefix("base_model.model.")


def is_own_weight(name: str | None) -> bool:
    """Return whether a name in a native model is that of a weight of the base that can be fully trained."""
    return name in _GROUP_OF_WEIGHT
