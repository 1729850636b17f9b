"""GGUF files, read through the `gguf` package: metadata, and tensors expanded to float32.

Enough for the default model. A gpt-oss GGUF is not read yet: use the safetensors checkpoint.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freehold.errors import CheckpointError, UnsupportedError

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
