"""--push_to_hub: upload the adapter, merged or complete model with Hugging Face's own client; no token is printed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import httpx

from higgs_ds.adapters.save import ADAPTER_CONFIG
from higgs_ds.bases.builtin import portable_name
from higgs_ds.bases.bundle import Bundle
from higgs_ds.bases.licence import licence_of
from higgs_ds.common.errors import InputError, PublishError
from higgs_ds.common.files import replaced_folder, saving, write_json
from higgs_ds.common.run_files import TO_PUBLISH
from higgs_ds.options.run import RunOptions

NOT_UPLOADED = ["**/.*"]


def check_login(options: RunOptions) -> None:
    """Raise InputError if publishing would fail.

    The reasons are: no token, one that the hub rejects, no connection to it, or a licence that it does not know.
    """
    if not options.push_to_hub:
        return
    if get_token() is None:
        raise InputError("--push_to_hub: you are not logged in; run `hf auth login`, or set HF_TOKEN")
    try:
        HfApi().whoami()
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise InputError(f"--push_to_hub: the hub rejects your token ({_reason(error)}); log in again") from error
        raise InputError(
            f"--push_to_hub: the hub cannot be reached ({_reason(error)}); leave the option out, and publish later "
            "with `hf upload`"
        ) from error
    _check_licence_id(options.hub_license)


def _check_licence_id(given: str | None) -> None:
    if given is None:
        return
    try:
        ModelCard(f"---\nlicense: {json.dumps(given)}\n---\n").validate()
    except ValueError as error:
        raise InputError(
            f"--hub_license {given}: the hub does not accept it ({_reason(error)}); its list is at "
            "https://huggingface.co/docs/hub/repositories-licenses"
        ) from error
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise InputError(f"--hub_license {given}: the hub could not check it: {_reason(error)}") from error


def check_licence(options: RunOptions, bundle: Bundle | None) -> None:
    """Raise InputError if something is to be published, and neither the base's licence nor another one is known.

    `bundle`: None if the base could not be opened, which is another problem.
    """
    if bundle is None or not options.push_to_hub or options.hub_license is not None:
        return
    if licence_of(bundle.name, bundle.folder, bundle.family) is None:
        raise InputError(
            f"--push_to_hub: the licence of the base {bundle.name} is not known; name the one to publish under with "
            "--hub_license, as the hub names it (apache-2.0, cc-by-nc-4.0, other, ...)"
        )


def adapter_to_publish(adapter: Path) -> Path:
    """Return a folder to upload for an adapter: itself, or a copy that does not name its base by a path.

    The copy names a built-in base by its name, and another one by the name of its folder.

    Raises:
        SaveError: the copy cannot be written.
    """
    config = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    name = portable_name(config["base_model_name_or_path"])
    if name == config["base_model_name_or_path"]:
        return adapter
    copy = adapter.parent / TO_PUBLISH
    with saving(copy), replaced_folder(copy) as folder:
        shutil.copytree(adapter, folder, dirs_exist_ok=True)
        write_json(folder / ADAPTER_CONFIG, config | {"base_model_name_or_path": name})
    return copy


def upload(folder: Path, options: RunOptions) -> str:
    """Upload a folder as a repository, which is created if it does not exist; return its address.

    Raises:
        PublishError: the upload failed; the message has the command to try again, and the folder is unchanged.
    """
    repo_id = options.hub_repo_id
    assert repo_id is not None
    try:
        api = HfApi()
        address = api.create_repo(repo_id, private=options.hub_private, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id,
            folder_path=folder,
            commit_message="Trained with higgs_ds",
            ignore_patterns=NOT_UPLOADED,
        )
    except (HfHubHTTPError, HFValidationError, httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
        # hf_xet, which transfers large files, reports failures as RuntimeError.
        private = " --private" if options.hub_private else ""
        raise PublishError(
            f"training has finished and the folder to publish is {folder}, but uploading it to {repo_id} failed: "
            f"{_reason(error)}\nTry again: hf upload {repo_id} {folder} .{private}"
        ) from error
    return str(address)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
