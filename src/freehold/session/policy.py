"""How a model runs here: on which device, with which kernels, in which number formats. Decided once, when it is loaded.

On a CPU with native kernels, weights are packed, activations are quantised to int8 in blocks of 32 where they meet
quantised weights, sums and everything else are float32. Otherwise the reference ops run, in one type throughout.
"""

from dataclasses import dataclass

import torch

from freehold import machine
from freehold.config import ModelConfig
from freehold.errors import BackendError, UsageError
from freehold.kernels import backends
from freehold.kernels.kv import KvType, kv_type
from freehold.weights.pack_file import DEFAULT_DENSE, dense_form
from freehold.weights.packed import Form

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SHORT: dict[torch.dtype, KvType] = {torch.float32: "f32", torch.bfloat16: "bf16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """`dtype` is what activations are in; `dense` the form of packed dense weights, None where the reference runs."""

    device: torch.device
    dtype: torch.dtype
    kv: KvType
    dense: Form | None
    threads: int

    @property
    def native(self) -> bool:
        return self.dense is not None

    def describe(self, experts: str) -> str:
        """One line for people; `experts` is the format in which the checkpoint keeps its experts."""
        name = str(self.dtype).removeprefix("torch.")
        if self.dense is None:
            return f"reference ops in {name} on {self.device}, experts in {experts}, KV cache {self.kv}"
        experts = "mxfp4" if experts == "mxfp4" else self.dense
        met = "float32 activations"
        if "q8" in (self.dense, experts):
            met = "int8 activations per block of 32, summed in float32"
        elif experts == "mxfp4":
            met = "float32 activations, for the experts int8 per block of 32"
        return (
            f"native kernels ({instruction_set()}, {self.threads} thread{'s' if self.threads > 1 else ''}): dense "
            f"{self.dense}, experts {experts}, {met}; residual stream float32, KV cache {self.kv}"
        )


def decide(
    config: ModelConfig,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    dense: str | None = None,
    kv_dtype: str | None = None,
    threads: int | None = None,
) -> Policy:
    """Fill in what is None and check the rest.

    The device is the GPU if torch sees one, else the CPU. There native kernels run if they are built: dense weights q8,
    KV cache bf16. Where the reference ops run, the type is bfloat16 on a GPU, and on a CPU float32 if the dense weights
    then take at most a quarter of the machine's memory. Raises UsageError or BackendError, naming value and remedy.
    """
    chosen = _device(device)
    native = chosen.type == "cpu" and backends.native() is not None
    asked = _dtype(dtype)
    threads = machine.physical_cores() if threads is None else machine.check_threads(threads)
    if native and asked == torch.bfloat16:
        raise UsageError(
            "the native kernels compute in float32; for bfloat16 weights use dense bf16 (--dense bf16), for reference "
            "ops in bfloat16 set FREEHOLD_KERNELS=reference"
        )
    if not native and dense is not None:
        raise UsageError(
            f"dense {dense!r}: only the native CPU kernels pack weights, and they do not run here; use dtype"
        )
    type = torch.float32 if native else asked or _automatic_dtype(config, chosen)
    kv = kv_type(kv_dtype or ("bf16" if native else _SHORT[type]), config.head_dim)
    return Policy(
        device=chosen,
        dtype=type,
        kv=kv,
        dense=dense_form(dense or DEFAULT_DENSE) if native else None,
        threads=threads,
    )


def instruction_set() -> str:
    """The native kernels' instruction set, or a word that there are none."""
    module = backends.native()
    return "none" if module is None else str(module.instruction_set())


def use_threads(count: int) -> None:
    """Let the native kernels use so many threads."""
    module = backends.native()
    if module is not None:
        module.set_threads(count)


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).item()  # also refuses "meta", which holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise BackendError(
            f"device {str(device)!r} cannot be used here ({reason}); choose cpu, or see `freehold doctor`"
        ) from None
    return chosen


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None:
        return None
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen not in DTYPES.values():
        raise UsageError(f"dtype must be {' or '.join(DTYPES)}, got {dtype!r}")
    return chosen


def _automatic_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    # By what the machine has, not by what is free just now: the same seed shall give the same text tomorrow.
    if device.type != "cpu":
        return torch.bfloat16
    dense = (config.num_parameters - config.num_expert_weights) * 4
    return torch.float32 if dense <= machine.total_memory() / 4 else torch.bfloat16
