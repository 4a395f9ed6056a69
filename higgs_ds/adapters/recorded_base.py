"""The base that an adapter names, and whether it is the one that the adapter was trained on."""

from __future__ import annotations

from pathlib import Path

from higgs_ds.adapters.load import Adapter
from higgs_ds.adapters.save import ADAPTER_CONFIG
from higgs_ds.bases.builtin import find_base
from higgs_ds.bases.conversion import native_folder
from higgs_ds.common.errors import InputError
from higgs_ds.common.resources import default_cache_dir
from higgs_ds.common.tensor_files import sampled_digest, weight_files

_GIVE_IT = "give the base, a folder or a hub id, as --base_model_path"


def find_recorded_base(adapter: Adapter, folder: Path) -> Path:
    """Return the native folder of the base that the adapter in `folder` names.

    Raises:
        InputError: it names none, its base cannot be found, or that base's weights are not those of the training.
        SaveError: a built-in or converted base cannot be written to the cache.
    """
    record = adapter.record
    if record.base is None:
        raise InputError(f"{folder}: its {ADAPTER_CONFIG} names no base; {_GIVE_IT}")
    try:
        found = find_base(record.base, "base", default_cache_dir())
        found = native_folder(found, f"base {record.base}", default_cache_dir())
    except InputError as error:
        raise InputError(
            f"{folder}: the base that it names cannot be used: {'; '.join(error.problems)}. It may have been moved, or "
            f"be on another machine; {_GIVE_IT}"
        ) from error
    if record.base_weights not in (None, sampled_digest(weight_files(found))):
        raise InputError(
            f"{folder}: was trained on other weights than those that its base, {record.base}, has now: the folder or "
            f"the hub's repository has changed, or another revision was used; {_GIVE_IT}"
        )
    return found


def describe_recorded_base(adapter: Adapter) -> str:
    """Return a line about the base that `find_recorded_base` has returned."""
    known = "its weights are those of the training"
    unknown = "the adapter has no record of its weights, so that they could not be compared"
    return f"Base: {adapter.record.base}, named by the adapter; {known if adapter.record.base_weights else unknown}"
