#include "kernels/rms_norm.h"

#include <cmath>
#include <cstring>

namespace freehold {
namespace {

inline float load(float value) { return value; }
inline float load(bf16 value) {
    const uint32_t bits = uint32_t{value.bits} << 16;
    float widened;
    std::memcpy(&widened, &bits, sizeof widened);
    return widened;
}

inline void store(float value, float* out) { *out = value; }
inline void store(float value, bf16* out) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (std::isnan(value)) {
        out->bits = static_cast<uint16_t>((bits >> 16) | 0x40);  // stay a NaN: rounding could carry it into infinity
        return;
    }
    bits += 0x7FFF + ((bits >> 16) & 1);  // round to nearest, ties to even
    out->bits = static_cast<uint16_t>(bits >> 16);
}

template <typename Scalar>
void rms_norm_rows(const Scalar* x, const Scalar* weight, Scalar* out, size_t T, size_t D, float eps) {
    // Independent partial sums let the compiler use vector registers without reassociating floats.
    constexpr size_t lanes = 16;
    for (size_t t = 0; t < T; ++t, x += D, out += D) {
        float partial[lanes] = {};
        size_t d = 0;
        for (; d + lanes <= D; d += lanes) {
            for (size_t lane = 0; lane < lanes; ++lane) {
                const float value = load(x[d + lane]);
                partial[lane] += value * value;
            }
        }
        float sum = 0.0f;
        for (; d < D; ++d) sum += load(x[d]) * load(x[d]);
        for (float lane_sum : partial) sum += lane_sum;

        const float scale = 1.0f / std::sqrt(sum / static_cast<float>(D) + eps);
        for (d = 0; d < D; ++d) store(load(weight[d]) * (load(x[d]) * scale), out + d);
    }
}

}  // namespace

void rms_norm(const float* x, const float* weight, float* out, size_t T, size_t D, float eps) {
    rms_norm_rows(x, weight, out, T, D, eps);
}

void rms_norm(const bf16* x, const bf16* weight, bf16* out, size_t T, size_t D, float eps) {
    rms_norm_rows(x, weight, out, T, D, eps);
}

}  // namespace freehold
