"""The record of a base that is kept in 4 bits. Imports neither torch nor bitsandbytes, which take seconds."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

QUANT_TYPE = "nf4"
BLOCK_SIZE = 64
_DECODER_LINEAR = re.compile(r"\w+\.layers\.\d+\.(self_attn|mlp|audio_mlp)\.\w+_proj\.weight$")


@dataclass(frozen=True)
class BaseQuantization:
    """How a base was quantized. Stored with each adapter that was trained on it.

    digests: 64 bits of the SHA-256 of each quantized weight, by its name in the base.
    """

    compute_dtype: str
    bitsandbytes: str
    device: str
    digests: dict[str, str]
    quant_type: str = QUANT_TYPE
    block_size: int = BLOCK_SIZE
    double_quant: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the quantized weights were multiplied in."""
        import torch

        return getattr(torch, self.compute_dtype)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> BaseQuantization:
        """Read a record. Raises ValueError or TypeError if another version wrote it in another form."""
        record = cls(**json.loads(text))
        if (record.quant_type, record.block_size, record.double_quant) != (QUANT_TYPE, BLOCK_SIZE, True):
            raise ValueError(f"{record.quant_type} in blocks of {record.block_size} is not supported")
        return record


def is_quantized_weight(name: str) -> bool:
    """Return whether the base's tensor of this name is kept in 4 bits."""
    return _DECODER_LINEAR.match(name) is not None
