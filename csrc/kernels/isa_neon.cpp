// NEON with the dot products of ARMv8.2. F16 is four registers.
//
// Int8 dot products: a register holds four rows of four inputs, as they lie in memory. sdot multiplies it by four
// inputs of a token, a lane of that token's register, and adds the products into 32 bits. Weights stay signed, so there
// is no bias: MXFP4 weights become twice their value by a table look-up.
#include <arm_neon.h>
#include <math.h>

#include <cstring>

#include "kernels/half.h"
#include "kernels/kernels.h"

namespace freehold {
namespace {

constexpr size_t kRows = 4, kManyRows = 4, kSums = 6;
constexpr size_t kLeftRows = 4, kLeftGroups = 1;

struct F16 {
    float32x4_t a, b, c, d;
};

inline F16 load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}; }
inline void store(float* p, F16 x) {
    vst1q_f32(p, x.a);
    vst1q_f32(p + 4, x.b);
    vst1q_f32(p + 8, x.c);
    vst1q_f32(p + 12, x.d);
}
inline float32x4_t widened_bf16x4(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
inline F16 load_bf16(const uint16_t* p) {
    return {widened_bf16x4(p), widened_bf16x4(p + 4), widened_bf16x4(p + 8), widened_bf16x4(p + 12)};
}
inline float32x4_t bf16x4_low(float32x4_t pairs) {
    return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(pairs), 16));
}
inline float32x4_t bf16x4_high(float32x4_t pairs) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(pairs), vdupq_n_u32(0xFFFF0000)));
}
inline F16 bf16_low(F16 p) { return {bf16x4_low(p.a), bf16x4_low(p.b), bf16x4_low(p.c), bf16x4_low(p.d)}; }
inline F16 bf16_high(F16 p) { return {bf16x4_high(p.a), bf16x4_high(p.b), bf16x4_high(p.c), bf16x4_high(p.d)}; }
inline F16 load_i8(const int8_t* p) {
    const int8x16_t bytes = vld1q_s8(p);
    const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_high_s8(bytes);
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_high_s16(low)),
            vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_high_s16(high))};
}
inline int32x4_t four_words(const uint8_t* p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }
template <int N>
inline float32x4_t bytes_x4(int32x4_t words) {
    return vcvtq_f32_s32(vshrq_n_s32(vshlq_s32(words, vdupq_n_s32(24 - 8 * N)), 24));
}
template <int N>
inline F16 bytes(const uint8_t* words) {
    return {bytes_x4<N>(four_words(words)), bytes_x4<N>(four_words(words + 16)), bytes_x4<N>(four_words(words + 32)),
            bytes_x4<N>(four_words(words + 48))};
}
template <int N>
inline float32x4_t nibbles_x4(const uint8_t* words) {
    static const int8_t kTwice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    const uint8x16_t all = vld1q_u8(words);
    const uint8x16_t codes = N % 2 ? vshrq_n_u8(all, 4) : vandq_u8(all, vdupq_n_u8(15));
    return bytes_x4<N / 2>(vreinterpretq_s32_s8(vqtbl1q_s8(vld1q_s8(kTwice), codes)));
}
template <int N>
inline F16 nibbles(const uint8_t* words) {
    return {nibbles_x4<N>(words), nibbles_x4<N>(words + 16), nibbles_x4<N>(words + 32), nibbles_x4<N>(words + 48)};
}
inline F16 set1(float x) {
    const float32x4_t four = vdupq_n_f32(x);
    return {four, four, four, four};
}
inline F16 zero() { return set1(0.0f); }
inline F16 fma(F16 x, F16 y, F16 z) {
    return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b), vfmaq_f32(z.c, x.c, y.c), vfmaq_f32(z.d, x.d, y.d)};
}
inline F16 mul(F16 x, F16 y) {
    return {vmulq_f32(x.a, y.a), vmulq_f32(x.b, y.b), vmulq_f32(x.c, y.c), vmulq_f32(x.d, y.d)};
}
inline F16 add(F16 x, F16 y) {
    return {vaddq_f32(x.a, y.a), vaddq_f32(x.b, y.b), vaddq_f32(x.c, y.c), vaddq_f32(x.d, y.d)};
}
inline F16 sub(F16 x, F16 y) {
    return {vsubq_f32(x.a, y.a), vsubq_f32(x.b, y.b), vsubq_f32(x.c, y.c), vsubq_f32(x.d, y.d)};
}
inline F16 div(F16 x, F16 y) {
    return {vdivq_f32(x.a, y.a), vdivq_f32(x.b, y.b), vdivq_f32(x.c, y.c), vdivq_f32(x.d, y.d)};
}
// As on x86: where one of the two is NaN, the second. NEON's own would return the NaN.
inline float32x4_t min4(float32x4_t x, float32x4_t y) { return vbslq_f32(vcltq_f32(x, y), x, y); }
inline float32x4_t max4(float32x4_t x, float32x4_t y) { return vbslq_f32(vcgtq_f32(x, y), x, y); }
inline F16 min(F16 x, F16 y) { return {min4(x.a, y.a), min4(x.b, y.b), min4(x.c, y.c), min4(x.d, y.d)}; }
inline F16 max(F16 x, F16 y) { return {max4(x.a, y.a), max4(x.b, y.b), max4(x.c, y.c), max4(x.d, y.d)}; }
inline F16 abs(F16 x) { return {vabsq_f32(x.a), vabsq_f32(x.b), vabsq_f32(x.c), vabsq_f32(x.d)}; }
inline F16 round(F16 x) { return {vrndnq_f32(x.a), vrndnq_f32(x.b), vrndnq_f32(x.c), vrndnq_f32(x.d)}; }
inline float32x4_t exp2i4(float32x4_t n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23));
}
inline F16 exp2i(F16 n) { return {exp2i4(n.a), exp2i4(n.b), exp2i4(n.c), exp2i4(n.d)}; }
inline float32x4_t keep_above4(float32x4_t x, float32x4_t key, float32x4_t least) {
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(x), vcltq_f32(key, least)));
}
inline F16 keep_above(F16 x, F16 key, float least) {
    const float32x4_t bound = vdupq_n_f32(least);
    return {keep_above4(x.a, key.a, bound), keep_above4(x.b, key.b, bound), keep_above4(x.c, key.c, bound),
            keep_above4(x.d, key.d, bound)};
}
inline bool no_nan(F16 x) {
    const uint32x4_t low = vandq_u32(vceqq_f32(x.a, x.a), vceqq_f32(x.b, x.b));
    const uint32x4_t high = vandq_u32(vceqq_f32(x.c, x.c), vceqq_f32(x.d, x.d));
    return vminvq_u32(vandq_u32(low, high)) != 0;
}
inline float sum(F16 x) {  // in AVX2's order
    const float32x4_t four = vaddq_f32(vaddq_f32(x.a, x.c), vaddq_f32(x.b, x.d));
    return vaddv_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)));
}
inline float largest(F16 x) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.a, x.b), vmaxq_f32(x.c, x.d))); }
inline void store_i8(int8_t* p, F16 x) {
    const int16x8_t low = vqmovn_high_s32(vqmovn_s32(vcvtq_s32_f32(x.a)), vcvtq_s32_f32(x.b));
    const int16x8_t high = vqmovn_high_s32(vqmovn_s32(vcvtq_s32_f32(x.c)), vcvtq_s32_f32(x.d));
    vst1q_s8(p, vqmovn_high_s16(vqmovn_s16(low), high));
}
inline uint16x4_t narrowed_bf16x4(float32x4_t x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
    // Rounding could carry a NaN into infinity.
    return vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), rounded, vorrq_u32(bits, vdupq_n_u32(0x400000))), 16);
}
inline void store_bf16(uint16_t* p, F16 x) {
    vst1_u16(p, narrowed_bf16x4(x.a));
    vst1_u16(p + 4, narrowed_bf16x4(x.b));
    vst1_u16(p + 8, narrowed_bf16x4(x.c));
    vst1_u16(p + 12, narrowed_bf16x4(x.d));
}
inline void place(F16 low, F16 high, const Tile& tile, size_t at) {
    store_i8(tile.values + at * kBlock, low);
    store_i8(tile.values + at * kBlock + 16, high);
}
inline uint16_t to_f16(float x) { return narrowed_half(x); }
inline float from_f16(uint16_t bits) {
    __fp16 half;
    std::memcpy(&half, &bits, sizeof half);
    return half;
}

#include "kernels/common.h"

// A block of a quad, that is of four rows: w[g] holds the inputs 4g … 4g + 3 of each. M tokens at once, so that no sum
// waits for itself, and each weight is read from its register M times.
template <size_t M>
inline void dot_tokens(const int8x16_t (&w)[8], float32x4_t row_scales, const int8_t* values, const float* token_scales,
                       float* acc) {
    int32x4_t dots[M];
    for (size_t t = 0; t < M; ++t) dots[t] = vdupq_n_s32(0);
    for (size_t half = 0; half < 2; ++half)
        for (size_t t = 0; t < M; ++t) {
            const int8x16_t x = vld1q_s8(values + t * kBlock + half * 16);
            dots[t] = vdotq_laneq_s32(dots[t], w[4 * half], x, 0);
            dots[t] = vdotq_laneq_s32(dots[t], w[4 * half + 1], x, 1);
            dots[t] = vdotq_laneq_s32(dots[t], w[4 * half + 2], x, 2);
            dots[t] = vdotq_laneq_s32(dots[t], w[4 * half + 3], x, 3);
        }
    for (size_t t = 0; t < M; ++t) {
        const float32x4_t scaled = vmulq_f32(vcvtq_f32_s32(dots[t]), row_scales);
        vst1q_f32(acc + t * kPanel, vfmaq_n_f32(vld1q_f32(acc + t * kPanel), scaled, token_scales[t]));
    }
}

// Decode gives a quad's weights and the scales of its rows, given where its panel's block begins.
template <class Decode>
inline void dot_panel(const uint8_t* weights, const uint8_t* scales, size_t B, const Tile& x, float* acc) {
    const size_t m = x.m;
    std::memset(acc, 0, m * kPanel * sizeof(float));
    for (size_t b = 0; b < B; ++b, weights += Decode::bytes, scales += Decode::scale_bytes) {
        if (m <= kFetchTokens) fetch<Decode::bytes>(weights);
        for (size_t quad = 0; quad < kPanel / 4; ++quad) {
            int8x16_t w[8];
            Decode::quad(weights + quad * 16, w);
            const float32x4_t row_scales = Decode::row_scales(scales + quad * Decode::scale_bytes / 4);
            const int8_t* values = x.values + b * m * kBlock;
            const float* token_scales = x.scales + b * m;
            float* out = acc + quad * 4;
            size_t t = 0;
            for (; t + 4 <= m; t += 4)
                dot_tokens<4>(w, row_scales, values + t * kBlock, token_scales + t, out + t * kPanel);
            for (; t < m; ++t) dot_tokens<1>(w, row_scales, values + t * kBlock, token_scales + t, out + t * kPanel);
        }
    }
}

template <class Decode>
inline void dot_panels(const uint8_t* weights, const uint8_t* scales, size_t B, size_t panels, const Tile& x,
                       float* acc) {
    for (size_t p = 0; p < panels; ++p)
        dot_panel<Decode>(weights + p * B * Decode::bytes, scales + p * B * Decode::scale_bytes, B, x,
                          acc + p * kTile * kPanel);
}

struct DecodeMxfp4 {
    static constexpr size_t bytes = kPanel * kBlock / 2, scale_bytes = kPanel;
    static void quad(const uint8_t* codes, int8x16_t (&w)[8]) {
        constexpr int8_t kTwice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
        const int8x16_t twice = vld1q_s8(kTwice);
        for (size_t j = 0; j < 4; ++j) {
            const uint8x16_t pair = vld1q_u8(codes + j * kPanel * 4);
            w[2 * j] = vqtbl1q_s8(twice, vandq_u8(pair, vdupq_n_u8(15)));
            w[2 * j + 1] = vqtbl1q_s8(twice, vshrq_n_u8(pair, 4));
        }
    }
    static float32x4_t row_scales(const uint8_t* scales) {  // halved, since weights are doubled
        uint32_t four;
        std::memcpy(&four, scales, sizeof four);
        const uint8x8_t exponents = vreinterpret_u8_u32(vdup_n_u32(four));
        const uint32x4_t bits = vshlq_n_u32(vmovl_u16(vget_low_u16(vmovl_u8(exponents))), 23);
        return vmulq_f32(vreinterpretq_f32_u32(bits), vdupq_n_f32(0.5f));
    }
};

struct DecodeQ8 {
    static constexpr size_t bytes = kPanel * kBlock, scale_bytes = 2 * kPanel;
    static void quad(const uint8_t* weights, int8x16_t (&w)[8]) {
        for (size_t g = 0; g < 8; ++g) w[g] = vreinterpretq_s8_u8(vld1q_u8(weights + g * kPanel * 4));
    }
    static float32x4_t row_scales(const uint8_t* scales) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(scales))); }
};

void dot_mxfp4(const uint8_t* codes, const uint8_t* scales, size_t B, size_t panels, const Tile& x, float* acc) {
    dot_panels<DecodeMxfp4>(codes, scales, B, panels, x, acc);
}
void dot_q8(const uint8_t* weights, const uint8_t* scales, size_t B, size_t panels, const Tile& x, float* acc) {
    dot_panels<DecodeQ8>(weights, scales, B, panels, x, acc);
}

double spin_dots(size_t rounds) {
    int32x4_t sums[8];
    const int8x16_t w = vdupq_n_s8(1), v = vdupq_n_s8(2);
    for (auto& s : sums) s = vdupq_n_s32(0);
    for (size_t i = 0; i < rounds; ++i)
        for (auto& s : sums) {
            s = vdotq_s32(s, w, v);
            asm volatile("" : "+w"(s));  // or the compiler would multiply once
        }
    return static_cast<double>(rounds) * 8 * 16;
}

uint64_t read(const uint8_t* data, size_t n) {
    uint64x2_t sums[4];
    for (auto& s : sums) s = vdupq_n_u64(0);
    for (size_t i = 0; i + 64 <= n; i += 64) {
        fetch<64>(data + i);
        for (size_t j = 0; j < 4; ++j) sums[j] = vaddq_u64(sums[j], vreinterpretq_u64_u8(vld1q_u8(data + i + 16 * j)));
    }
    return vaddvq_u64(vaddq_u64(vaddq_u64(sums[0], sums[1]), vaddq_u64(sums[2], sums[3])));
}

}  // namespace

extern const Kernels kNeonKernels;
const Kernels kNeonKernels = {
    .name = "neon",
    .q8_bytes = kBlock,
    .mxfp4_bytes = kBlock,
#include "kernels/table.h"
};

}  // namespace freehold
