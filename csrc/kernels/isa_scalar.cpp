// Plain C++: runs anywhere, and is what the other instruction sets are tested against.
#include <math.h>

#include <cstring>

#include "kernels/half.h"
#include "kernels/kernels.h"

namespace freehold {
namespace {

constexpr size_t kRows = 4, kManyRows = 2, kSums = 4;
constexpr size_t kLeftRows = 2, kLeftGroups = 1;

struct F16 {
    float lane[16];
};

template <class Function>
inline F16 each(Function function) {
    F16 out;
    for (int i = 0; i < 16; ++i) out.lane[i] = function(i);
    return out;
}

inline F16 load(const float* p) {
    F16 out;
    std::memcpy(out.lane, p, sizeof out.lane);
    return out;
}
inline void store(float* p, F16 x) { std::memcpy(p, x.lane, sizeof x.lane); }
inline F16 load_bf16(const uint16_t* p) {
    return each([&](int i) { return widened_bf16(p[i]); });
}
inline F16 bf16_low(F16 pairs) {
    return each([&](int i) { return float_of_bits(bits_of_float(pairs.lane[i]) << 16); });
}
inline F16 bf16_high(F16 pairs) {
    return each([&](int i) { return float_of_bits(bits_of_float(pairs.lane[i]) & 0xFFFF0000); });
}
inline F16 load_i8(const int8_t* p) {
    return each([&](int i) { return static_cast<float>(p[i]); });
}
template <int N>
inline F16 nibbles(const uint8_t* words) {
    constexpr float kTwice[] = {0, 1, 2, 3, 4, 6, 8, 12, -0.0f, -1, -2, -3, -4, -6, -8, -12};
    return each([&](int i) { return kTwice[words[4 * i + N / 2] >> (N % 2 * 4) & 15]; });
}
template <int N>
inline F16 bytes(const uint8_t* words) {
    return each([&](int i) { return static_cast<float>(static_cast<int8_t>(words[4 * i + N])); });
}
inline F16 set1(float x) {
    return each([&](int) { return x; });
}
inline F16 zero() { return set1(0.0f); }
inline F16 fma(F16 a, F16 b, F16 c) {
    return each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
inline F16 mul(F16 a, F16 b) {
    return each([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline F16 add(F16 a, F16 b) {
    return each([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline F16 sub(F16 a, F16 b) {
    return each([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline F16 div(F16 a, F16 b) {
    return each([&](int i) { return a.lane[i] / b.lane[i]; });
}
// As on x86: where one of the two is NaN, the second.
inline F16 min(F16 a, F16 b) {
    return each([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline F16 max(F16 a, F16 b) {
    return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline F16 abs(F16 a) {
    return each([&](int i) { return fabsf(a.lane[i]); });
}
inline F16 round(F16 a) {
    return each([&](int i) { return nearbyintf(a.lane[i]); });
}
inline F16 exp2i(F16 n) {
    return each([&](int i) {
        const int32_t exponent = n.lane[i] >= -126.0f ? static_cast<int32_t>(n.lane[i]) : -126;  // not of NaN
        const uint32_t bits = static_cast<uint32_t>(exponent + 127) << 23;
        float value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
    });
}
inline F16 keep_above(F16 x, F16 key, float least) {
    return each([&](int i) { return key.lane[i] < least ? 0.0f : x.lane[i]; });
}
inline bool no_nan(F16 a) {
    for (float lane : a.lane)
        if (lane != lane) return false;
    return true;
}
inline float sum(F16 a) {
    float total = 0.0f;
    for (float lane : a.lane) total += lane;
    return total;
}
inline float largest(F16 a) {
    float best = a.lane[0];
    for (float lane : a.lane) best = lane > best ? lane : best;
    return best;
}
inline void store_i8(int8_t* p, F16 x) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(static_cast<int32_t>(x.lane[i]));
}
inline void place(F16 low, F16 high, const Tile& tile, size_t at) {
    store_i8(tile.values + at * kBlock, low);
    store_i8(tile.values + at * kBlock + 16, high);
}
inline void store_bf16(uint16_t* p, F16 x) {
    for (int i = 0; i < 16; ++i) p[i] = narrowed_bf16(x.lane[i]);
}
inline uint16_t to_f16(float x) { return narrowed_half(x); }
inline float from_f16(uint16_t bits) { return widened_half(bits); }
#include "kernels/common.h"

// Twice the value of each E2M1 code.
constexpr int8_t kTwice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

void dot_mxfp4_panel(const uint8_t* codes, const uint8_t* scales, size_t B, const Tile& x, float* acc) {
    std::memset(acc, 0, x.m * kPanel * sizeof(float));
    for (size_t b = 0; b < B; ++b, codes += 256, scales += kPanel) {
        int8_t weights[kPanel][kBlock];
        for (size_t j = 0; j < 4; ++j)
            for (size_t r = 0; r < kPanel; ++r)
                for (size_t i = 0; i < 4; ++i) {
                    const uint8_t pair = codes[(j * kPanel + r) * 4 + i];
                    weights[r][8 * j + i] = kTwice[pair & 15];
                    weights[r][8 * j + 4 + i] = kTwice[pair >> 4];
                }
        for (size_t t = 0; t < x.m; ++t) {
            const int8_t* values = x.values + (b * x.m + t) * kBlock;
            for (size_t r = 0; r < kPanel; ++r) {
                int32_t dot = 0;
                for (size_t i = 0; i < kBlock; ++i) dot += weights[r][i] * values[i];
                acc[t * kPanel + r] += static_cast<float>(dot) * half_scale(scales[r]) * x.scales[b * x.m + t];
            }
        }
    }
}

void dot_q8_panel(const uint8_t* weights, const uint8_t* scales, size_t B, const Tile& x, float* acc) {
    std::memset(acc, 0, x.m * kPanel * sizeof(float));
    for (size_t b = 0; b < B; ++b, weights += 512, scales += 2 * kPanel) {
        for (size_t t = 0; t < x.m; ++t) {
            const int8_t* values = x.values + (b * x.m + t) * kBlock;
            for (size_t r = 0; r < kPanel; ++r) {
                int32_t dot = 0;
                for (size_t g = 0; g < 8; ++g)
                    for (size_t i = 0; i < 4; ++i)
                        dot += static_cast<int8_t>(weights[(g * kPanel + r) * 4 + i]) * values[4 * g + i];
                uint16_t scale;
                std::memcpy(&scale, scales + 2 * r, sizeof scale);
                acc[t * kPanel + r] += static_cast<float>(dot) * widened_half(scale) * x.scales[b * x.m + t];
            }
        }
    }
}

void dot_mxfp4(const uint8_t* codes, const uint8_t* scales, size_t B, size_t panels, const Tile& x, float* acc) {
    dot_each_panel<dot_mxfp4_panel, 256, kPanel>(codes, scales, B, panels, x, acc);
}

void dot_q8(const uint8_t* weights, const uint8_t* scales, size_t B, size_t panels, const Tile& x, float* acc) {
    dot_each_panel<dot_q8_panel, 512, 2 * kPanel>(weights, scales, B, panels, x, acc);
}

double spin_dots(size_t rounds) {
    volatile int32_t a = 3, b = 5;
    int32_t total = 0;
    for (size_t i = 0; i < rounds; ++i) total += a * b;
    volatile int32_t kept = total;
    (void)kept;
    return static_cast<double>(rounds);
}

uint64_t read(const uint8_t* data, size_t n) {
    uint64_t total = 0;
    for (size_t i = 0; i < n; i += 8) {
        uint64_t word;
        std::memcpy(&word, data + i, sizeof word);
        total += word;
    }
    return total;
}

}  // namespace

extern const Kernels kScalarKernels;
const Kernels kScalarKernels = {
    .name = "scalar",
    .q8_bytes = kBlock,
    .mxfp4_bytes = kBlock,
#include "kernels/table.h"
};

}  // namespace freehold
