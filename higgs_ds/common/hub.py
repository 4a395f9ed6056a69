"""Locate model folders by path or hub id."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from higgs_ds.common.errors import InputError

RELEASED_BASE = "bosonai/higgs-audio-v2-generation-3B-base"
# Default revisions of hub ids. The content of these repositories was replaced once, and may be again.
PINNED = {
    RELEASED_BASE: "10840182ca4ad5d9d9113b60b9bb3c1ef1ba3f84",
    "bosonai/higgs-tts-2-3b-base": "10840182ca4ad5d9d9113b60b9bb3c1ef1ba3f84",  # its name since April 2026
    "bosonai/higgs-audio-v2-tokenizer": "9d4988fbd4ad07b4cac3a5fa462741a41810dbec",
}

TEXT_FILES = ["*.json", "*.txt", "*.jinja", "*.model"]  # of a model: everything except its weights


def resolve_folder(name: str, asked_by: str, revision: str | None = None) -> Path:
    """Return the folder of a model named by path or hub id. A hub id is downloaded into the hub's cache.

    Args:
        asked_by: option or field that names the model; error messages start with it.
        revision: commit, tag or branch of a hub id. Default: the revision in PINNED, or else the newest.

    Raises:
        InputError: there is no such folder, and no such repository.
    """

    def download() -> Path:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, revision=revision or PINNED.get(name)))

    return _resolve(name, asked_by, download)


def resolve_without_weights(name: str, asked_by: str, revision: str | None = None) -> Path:
    """Like `resolve_folder`, but download only the configurations and the tokenizer of a hub id."""

    def download() -> Path:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, revision=revision or PINNED.get(name), allow_patterns=TEXT_FILES))

    return _resolve(name, asked_by, download)


def resolve_config_folder(name: str, asked_by: str, revision: str | None = None) -> Path:
    """Like `resolve_folder`, but download only config.json of a hub id."""

    def download() -> Path:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(name, "config.json", revision=revision or PINNED.get(name))).parent

    return _resolve(name, asked_by, download)


def _resolve(name: str, asked_by: str, download: Callable[[], Path]) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if not is_hub_id(name):
        raise InputError(f"{asked_by} {name}: no such folder (a hub id has the form OWNER/NAME)")
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return download()
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{asked_by} {name}: not a local folder, and not available on the hub: {reason}") from error


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form of a hub repository, OWNER/NAME, and not of a path."""
    return name.count("/") == 1 and name[0] not in "./~"
