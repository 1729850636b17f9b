"""The C++ kernels, for CPU tensors. Inference only: what needs gradients stays on the reference ops."""

import torch
from torch import Tensor

from freehold import _native


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    x_TD = x_TD.contiguous()
    out_TD = torch.empty_like(x_TD)
    if x_TD.dtype == torch.float32:
        _native.rms_norm_f32(x_TD, weight_D, out_TD, eps)
    else:  # buffers know no bfloat16: hand over the bits
        _native.rms_norm_bf16(x_TD.view(torch.uint16), weight_D.view(torch.uint16), out_TD.view(torch.uint16), eps)
    return out_TD
