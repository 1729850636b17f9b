// Root-mean-square normalisation over the last dimension.
//
//   out[t, d] = weight[d] * x[t, d] / sqrt(mean over d of x[t, d]^2 + eps)
//
// Shapes: x and out are (T, D), weight is (D), all row-major and contiguous. Sums run in float32 over
// fixed lanes, so a row's result never depends on T. The caller owns all memory; out may be x itself.
// Runs on the calling thread only. Nothing is checked: the Python wrapper has validated shapes and types.
#pragma once

#include <cstddef>
#include <cstdint>

namespace freehold {

// bfloat16 as it lies in memory: the upper half of a float32.
struct bf16 {
    uint16_t bits;
};

void rms_norm(const float* x, const float* weight, float* out, size_t T, size_t D, float eps);
void rms_norm(const bf16* x, const bf16* weight, bf16* out, size_t T, size_t D, float eps);

}  // namespace freehold
