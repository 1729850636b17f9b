"""Rounding a matrix to MXFP4 so that its products with the inputs it meets change least, not its numbers.

Rounding each number to the nearest forgets whatever is smaller than half a step, as nearly all of what an adapter adds
to numbers that lay on the grid before. Here the columns are rounded one after the other, each together with what is
still owed for the ones before it, as far as the inputs' correlations let one column stand in for another: the feedback
of GPTQ (https://arxiv.org/abs/2210.17323) in the form of LDLQ (https://arxiv.org/abs/2307.13304, section 3).
"""

import torch
from torch import Tensor

from freehold.weights import mxfp4
from freehold.weights.mxfp4 import Mxfp4Tensor

_DAMPING = 0.01  # of the mean square of an input: calibration inputs are few, and say nothing of some directions
_COLUMNS_AT_ONCE = 128


def pack_fitted(values_RC: Tensor, inputs_SC: Tensor) -> Mxfp4Tensor:
    """Quantise a float32 matrix with the squared error of inputs · valuesᵀ in mind.

    Scales are those that `mxfp4.pack` finds. Where there are no inputs it is the same as `pack`. Raises UsageError for
    NaN and infinity.
    """
    nearest = mxfp4.pack(values_RC)
    gram_CC = inputs_SC.T @ inputs_SC
    weight_C = gram_CC.diagonal()
    if not weight_C.any():
        return nearest
    # What is rounded last has the fewest others left to make up for it: let it be what matters least.
    order = torch.argsort(weight_C, descending=True)
    back = torch.argsort(order)
    scale_RC = nearest.scales.repeat_interleave(mxfp4.BLOCK, -1)[:, order]
    rounded_RC = _fed_back(values_RC[:, order], scale_RC, _feedback(gram_CC[order][:, order]))
    return mxfp4.pack_with_scales(rounded_RC[:, back], nearest.scales)


def _feedback(gram_CC: Tensor) -> Tensor:
    """M of gram = M · D · Mᵀ, unit upper triangular: column j says what is owed to it for the columns before."""
    gram = gram_CC.double()
    gram.diagonal().add_(_DAMPING * gram.diagonal().mean())
    factor = torch.linalg.cholesky(gram.flip(0, 1)).flip(0, 1)  # upper, and factor · factorᵀ = gram
    return (factor / factor.diagonal()).float()


def _fed_back(values_RC: Tensor, scale_RC: Tensor, feedback_CC: Tensor) -> Tensor:
    rounded_RC, owed_RC = torch.empty_like(values_RC), torch.zeros_like(values_RC)
    num_columns = values_RC.shape[1]
    for start in range(0, num_columns, _COLUMNS_AT_ONCE):
        stop = min(start + _COLUMNS_AT_ONCE, num_columns)
        wanted = values_RC[:, start:stop] + owed_RC[:, :start] @ feedback_CC[:start, start:stop]
        wanted = wanted.T.contiguous()  # so that a column is one stretch
        scales = scale_RC[:, start:stop].T.contiguous()
        for j in range(stop - start):
            at = start + j
            rounded = mxfp4.round_to_scales(wanted[j], scales[j])
            rounded_RC[:, at] = rounded
            owed_RC[:, at] = values_RC[:, at] - rounded
            wanted[j + 1 :].addr_(feedback_CC[at, at + 1 : stop], owed_RC[:, at])
    return rounded_RC
