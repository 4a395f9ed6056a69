"""Read a base's tokenizer with the `tokenizers` library alone where that gives the same as transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from higgs_ds.common.errors import InputError

TOKENIZER_FILE, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_ADDED_TOKENS = "added_tokens.json"  # of older versions of transformers, which adds these tokens
# Classes of transformers that use tokenizer.json as it is. Others rebuild the tokenizer from its vocabulary.
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")


def read_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of a model's folder, which maps text to ids as transformers' does.

    transformers, whose import takes seconds, reads what may differ from tokenizer.json.

    Raises:
        InputError: the folder has no tokenizer, or a damaged one.
    """
    try:
        if _is_plain(folder):
            return Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        from transformers import AutoTokenizer

        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).backend_tokenizer
        return tokenizer
    except Exception as error:
        raise InputError(f"{folder}: its tokenizer does not load: {error}") from error


def _is_plain(folder: Path) -> bool:
    """Return whether tokenizer.json is all that decides which ids a text gets."""
    has = [(folder / name).is_file() for name in (TOKENIZER_FILE, TOKENIZER_CONFIG, _ADDED_TOKENS)]
    if has != [True, True, False]:
        return False
    config = json.loads((folder / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
    added = json.loads((folder / TOKENIZER_FILE).read_text(encoding="utf-8")).get("added_tokens", [])
    known = {(token["content"], token["id"]) for token in added}
    named = {content for content, _ in known}
    listed = {(token["content"], int(number)) for number, token in config.get("added_tokens_decoder", {}).items()}
    return config.get("tokenizer_class") in _PLAIN_CLASSES and listed <= known and set(_tokens_in(config)) <= named


def _tokens_in(config: dict[str, Any]) -> list[str]:
    """Return the special tokens that tokenizer_config.json names, which transformers adds if they are missing."""
    extra = config.get("extra_special_tokens") or {}
    found = [value for name, value in config.items() if name.endswith("_token")]
    found += [*(config.get("additional_special_tokens") or []), *(extra.values() if isinstance(extra, dict) else extra)]
    return [token["content"] if isinstance(token, dict) else token for token in found if token]
