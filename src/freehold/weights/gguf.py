"""GGUF files, read through the `gguf` package: metadata, and tensors expanded to float32.

Enough for the default model, and for the weights of a gpt-oss GGUF that `gguf_export` wrote, to measure what is in it.
No model is loaded from one: its tokeniser and constants are not read; use the safetensors checkpoint for that.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freehold.config import ModelConfig
from freehold.errors import CheckpointError, UnsupportedError
from freehold.weights.gguf_export import TensorType, parts_of, unpack_mxfp4
from freehold.weights.layouts import canonical_shapes
from freehold.weights.mxfp4 import Mxfp4Tensor

_REMEDY = "download it again"


class GgufFile:
    """An opened GGUF file. Tensor data is mapped, and expanded one tensor at a time on request."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError if the file is missing, truncated or not GGUF."""
        from gguf import GGUFReader  # numpy-heavy: only those who read GGUF pay for it

        self.path = path
        try:
            reader = GGUFReader(path)
            metadata = {name: field.contents() for name, field in reader.fields.items()}
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing; {_REMEDY}") from None
        except (ValueError, IndexError, KeyError, OSError, OverflowError) as error:
            raise CheckpointError(f"{path} is truncated, corrupt or not a GGUF file ({error}); {_REMEDY}") from None
        self.metadata: Mapping[str, Any] = metadata
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    @property
    def tensor_names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def value(self, key: str) -> Any:
        """A metadata value; CheckpointError names the key if it is absent."""
        if key not in self.metadata:
            raise CheckpointError(f"{self.path} has no metadata key {key}; it is not the model that was expected")
        return self.metadata[key]

    def mxfp4(self, name: str) -> Mxfp4Tensor | None:
        """One tensor as it is packed; None where it is stored in another way."""
        stored = self._tensors.get(name)
        if stored is None or int(stored.tensor_type) != TensorType.MXFP4.number:
            return None
        *rows, columns = (int(size) for size in reversed(stored.shape))
        data = torch.from_numpy(np.array(stored.data, dtype=np.uint8, copy=True))
        return unpack_mxfp4(data.view(*rows, columns // TensorType.MXFP4.value[1] * 17))

    def tensor(self, name: str) -> Tensor:
        """One tensor in float32, row-major, the outermost dimension first."""
        from gguf.quants import dequantize

        if name not in self._tensors:
            raise CheckpointError(f"{self.path}: tensor {name} is missing; {_REMEDY}")
        stored = self._tensors[name]
        try:
            values = dequantize(stored.data, stored.tensor_type)
        except NotImplementedError:
            raise UnsupportedError(
                f"{self.path}: tensor {name} is stored as {stored.tensor_type.name}, which cannot be expanded"
            ) from None
        shape = tuple(int(size) for size in reversed(stored.shape))
        return torch.from_numpy(np.array(values, dtype=np.float32, copy=True)).view(shape)


class GgufWeights(Mapping[str, Tensor | Mxfp4Tensor]):
    """The weights of a gpt-oss GGUF by their canonical names, each read when it is asked for and not kept: experts as
    they are packed, all else expanded to float32. An output matrix is there even where the model shares its embedding:
    the file has both. Raises CheckpointError for what is not there, or of another shape than this model has."""

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self._file, self._config = GgufFile(path), config
        self._parts = parts_of(config)
        self._shapes = canonical_shapes(config)
        self._shapes.setdefault("unembedding", self._shapes["embedding"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, name: str) -> Tensor | Mxfp4Tensor:
        parts = self._parts[name]
        packed = [part for part in map(self._file.mxfp4, parts) if part is not None]
        value: Tensor | Mxfp4Tensor
        if len(packed) == len(parts):
            value = Mxfp4Tensor(_alternating([p.blocks for p in packed]), _alternating([p.scales for p in packed]))
            shape = (*value.scales.shape[:-1], value.scales.shape[-1] * TensorType.MXFP4.value[1])
        else:
            value = _alternating([self._file.tensor(part) for part in parts])
            shape = tuple(value.shape)
        if shape != self._shapes[name]:
            raise CheckpointError(
                f"{self._file.path}: {' and '.join(parts)} make a tensor of {shape}, and this model's has "
                f"{self._shapes[name]}; it is not the model that was expected"
            )
        return value


def _alternating(parts: list[Tensor]) -> Tensor:
    """Gate and up (E, F, …) as (E, 2F, …), a row of each in turn; a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.stack(parts, dim=2).flatten(1, 2)
