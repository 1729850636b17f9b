// AVX2 with FMA and F16C. F16 is two registers.
//
// Int8 dot products: maddubs multiplies unsigned by signed bytes and adds pairs into 16 bits. MXFP4 weights become
// 2w + 12 in 0 … 24, so four such pairs fit in 16 bits (4 · 2 · 24 · 127 < 2^15) before they are widened; the bias
// is taken off by the tile's offsets. q8 products would not fit: both sides are widened to 16 bits, and madd adds
// pairs.
#include <immintrin.h>
#include <math.h>

#include <cstring>

#include "kernels/half.h"
#include "kernels/kernels.h"

namespace freehold {
namespace {

constexpr size_t kRows = 4;

struct F16 {
    __m256 a, b;
};

inline F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F16 x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
inline __m256 widened_bf16x8(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline F16 load_bf16(const uint16_t* p) { return {widened_bf16x8(p), widened_bf16x8(p + 8)}; }
inline __m256 widened_i8x8(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline F16 load_i8(const int8_t* p) { return {widened_i8x8(p), widened_i8x8(p + 8)}; }
inline F16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F16 fma(F16 x, F16 y, F16 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F16 mul(F16 x, F16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F16 add(F16 x, F16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F16 sub(F16 x, F16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F16 div(F16 x, F16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F16 min(F16 x, F16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F16 max(F16 x, F16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F16 abs(F16 x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline F16 round(F16 x) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
inline __m256 exp2i8(__m256 n) {
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
inline F16 exp2i(F16 n) { return {exp2i8(n.a), exp2i8(n.b)}; }
inline F16 keep_above(F16 x, F16 key, float least) {
    const __m256 bound = _mm256_set1_ps(least);
    return {_mm256_and_ps(x.a, _mm256_cmp_ps(key.a, bound, _CMP_NLT_UQ)),
            _mm256_and_ps(x.b, _mm256_cmp_ps(key.b, bound, _CMP_NLT_UQ))};
}
inline bool no_nan(F16 x) { return _mm256_movemask_ps(_mm256_cmp_ps(x.a, x.b, _CMP_UNORD_Q)) == 0; }
inline float sum(F16 x) {
    const __m256 eight = _mm256_add_ps(x.a, x.b);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}
inline float largest(F16 x) {
    const __m256 eight = _mm256_max_ps(x.a, x.b);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
}
inline int32_t store_i8(int8_t* p, F16 x) {
    const __m256i a = _mm256_cvtps_epi32(x.a), b = _mm256_cvtps_epi32(x.b);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xD8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
    const __m256i pairs = _mm256_madd_epi16(words, _mm256_set1_epi16(1));
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
}
inline uint16_t to_f16(float x) { return narrowed_half(x); }
inline float from_f16(uint16_t bits) { return _cvtsh_ss(bits); }

// Eight rows of eight: out[i * stride + j] = rows[j][i].
inline void transpose8(const __m256* rows, float* out, size_t stride) {
    __m256 pairs[8], quads[8];
    for (int i = 0; i < 4; ++i) {
        pairs[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
        quads[4 * i] = _mm256_shuffle_ps(pairs[4 * i], pairs[4 * i + 2], 0x44);
        quads[4 * i + 1] = _mm256_shuffle_ps(pairs[4 * i], pairs[4 * i + 2], 0xEE);
        quads[4 * i + 2] = _mm256_shuffle_ps(pairs[4 * i + 1], pairs[4 * i + 3], 0x44);
        quads[4 * i + 3] = _mm256_shuffle_ps(pairs[4 * i + 1], pairs[4 * i + 3], 0xEE);
    }
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(out + i * stride, _mm256_permute2f128_ps(quads[i], quads[4 + i], 0x20));
        _mm256_storeu_ps(out + (i + 4) * stride, _mm256_permute2f128_ps(quads[i], quads[4 + i], 0x31));
    }
}
inline void transpose16(const F16* rows, float* out, size_t stride) {
    for (size_t half = 0; half < 2; ++half) {
        __m256 low[8], high[8];
        for (size_t j = 0; j < 8; ++j) low[j] = rows[8 * half + j].a, high[j] = rows[8 * half + j].b;
        transpose8(low, out + 8 * half, stride);
        transpose8(high, out + 8 * stride + 8 * half, stride);
    }
}

#include "kernels/common.h"

inline __m256i broadcast4(const int8_t* p) {
    int32_t word;
    std::memcpy(&word, p, sizeof word);
    return _mm256_set1_epi32(word);
}

// acc (8 rows) += int sum * row scales * token scale
inline void accumulate(float* acc, __m256i sum, __m256 row_scales, float token_scale) {
    const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), row_scales);
    _mm256_storeu_ps(acc, _mm256_fmadd_ps(scaled, _mm256_set1_ps(token_scale), _mm256_loadu_ps(acc)));
}

void dot_mxfp4_panel(const uint8_t* codes, const uint8_t* scales, size_t B, const Tile& x, float* acc) {
    const __m256i twelve_more =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    const size_t m = x.m;
    std::memset(acc, 0, m * kPanel * sizeof(float));
    for (size_t b = 0; b < B; ++b, codes += 256, scales += kPanel) {
        if (m <= kFetchTokens) fetch<256>(codes);
        for (size_t half = 0; half < 2; ++half) {
            __m256i w[8];
            for (size_t j = 0; j < 4; ++j) {
                const __m256i pair = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + j * 64 + half * 32));
                w[2 * j] = _mm256_shuffle_epi8(twelve_more, _mm256_and_si256(pair, nibble));
                w[2 * j + 1] = _mm256_shuffle_epi8(twelve_more, _mm256_and_si256(_mm256_srli_epi16(pair, 4), nibble));
            }
            const __m256i exponents =
                _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales + half * 8)));
            const __m256 row_scales =
                _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(exponents, 23)), _mm256_set1_ps(0.5f));
            const int8_t* __restrict values = x.values + b * m * kBlock;
            const float* __restrict token_scales = x.scales + b * m;
            const int32_t* __restrict offsets = x.offsets + b * m;
            float* __restrict sums = acc + half * 8;
            for (size_t t = 0; t < m; ++t, values += kBlock, sums += kPanel) {
                __m256i low = _mm256_maddubs_epi16(w[0], broadcast4(values));
                low = _mm256_add_epi16(low, _mm256_maddubs_epi16(w[1], broadcast4(values + 4)));
                low = _mm256_add_epi16(low, _mm256_maddubs_epi16(w[2], broadcast4(values + 8)));
                low = _mm256_add_epi16(low, _mm256_maddubs_epi16(w[3], broadcast4(values + 12)));
                __m256i high = _mm256_maddubs_epi16(w[4], broadcast4(values + 16));
                high = _mm256_add_epi16(high, _mm256_maddubs_epi16(w[5], broadcast4(values + 20)));
                high = _mm256_add_epi16(high, _mm256_maddubs_epi16(w[6], broadcast4(values + 24)));
                high = _mm256_add_epi16(high, _mm256_maddubs_epi16(w[7], broadcast4(values + 28)));
                __m256i dot = _mm256_add_epi32(_mm256_madd_epi16(low, ones), _mm256_madd_epi16(high, ones));
                dot = _mm256_add_epi32(dot, _mm256_set1_epi32(offsets[t]));
                accumulate(sums, dot, row_scales, token_scales[t]);
            }
        }
    }
}

// Eight rows of one q8 block, two bytes a weight: of each group of four columns first the rows 0 … 3, then 4 … 7.
struct WideBlock {
    alignas(32) int16_t rows[8][2][16];
};

template <size_t M>
inline void dot_wide(const WideBlock& w, const int16_t* values, const float* token_scales, __m256 row_scales,
                     float* sums) {
    __m256i low[M], high[M];
    for (size_t t = 0; t < M; ++t) low[t] = high[t] = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (size_t g = 0; g < 8; ++g) {
        const __m256i first = _mm256_load_si256(reinterpret_cast<const __m256i*>(w.rows[g][0]));
        const __m256i second = _mm256_load_si256(reinterpret_cast<const __m256i*>(w.rows[g][1]));
        for (size_t t = 0; t < M; ++t) {
            int64_t four;
            std::memcpy(&four, values + t * kBlock + 4 * g, sizeof four);
            const __m256i v = _mm256_set1_epi64x(four);
            low[t] = _mm256_add_epi32(low[t], _mm256_madd_epi16(v, first));
            high[t] = _mm256_add_epi32(high[t], _mm256_madd_epi16(v, second));
            // One after the other: GCC would add up in trees and run out of registers.
            asm volatile("" : "+x"(low[t]), "+x"(high[t]));
        }
    }
    for (size_t t = 0; t < M; ++t) {  // neighbours belong to one row
        const __m256i dot = _mm256_permute4x64_epi64(_mm256_hadd_epi32(low[t], high[t]), 0xD8);
        accumulate(sums + t * kPanel, dot, row_scales, token_scales[t]);
    }
}

void dot_q8_panel(const uint8_t* weights, const uint8_t* scales, size_t B, const Tile& x, float* acc) {
    const size_t m = x.m;
    std::memset(acc, 0, m * kPanel * sizeof(float));
    for (size_t b = 0; b < B; ++b, weights += 512, scales += 2 * kPanel) {
        if (m <= kFetchTokens) fetch<512>(weights);
        const auto* values = reinterpret_cast<const int16_t*>(x.values) + b * m * kBlock;
        const float* token_scales = x.scales + b * m;
        for (size_t half = 0; half < 2; ++half) {
            WideBlock w;
            for (size_t g = 0; g < 8; ++g)
                for (size_t i = 0; i < 2; ++i) {
                    const auto* bytes = reinterpret_cast<const __m128i*>(weights + g * 64 + half * 32 + i * 16);
                    _mm256_store_si256(reinterpret_cast<__m256i*>(w.rows[g][i]),
                                       _mm256_cvtepi8_epi16(_mm_loadu_si128(bytes)));
                }
            const __m256 row_scales =
                _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + half * 16)));
            float* sums = acc + half * 8;
            size_t t = 0;
            for (; t + 4 <= m; t += 4)
                dot_wide<4>(w, values + t * kBlock, token_scales + t, row_scales, sums + t * kPanel);
            for (; t < m; ++t) dot_wide<1>(w, values + t * kBlock, token_scales + t, row_scales, sums + t * kPanel);
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
    const __m256i w = _mm256_set1_epi8(1);
    __m256i v = _mm256_set1_epi8(2), a = w, b = w, c = w, d = w, e = w, f = w, g = w, h = w;
    for (size_t i = 0; i < rounds; ++i) {
        asm volatile("" : "+x"(v));  // or the compiler would multiply once
        a = _mm256_add_epi16(a, _mm256_maddubs_epi16(w, v));
        asm volatile("" : "+x"(v));
        b = _mm256_add_epi16(b, _mm256_maddubs_epi16(w, v));
        asm volatile("" : "+x"(v));
        c = _mm256_add_epi16(c, _mm256_maddubs_epi16(w, v));
        asm volatile("" : "+x"(v));
        d = _mm256_add_epi16(d, _mm256_maddubs_epi16(w, v));
        asm volatile("" : "+x"(v));
        e = _mm256_add_epi16(e, _mm256_maddubs_epi16(w, v));
        asm volatile("" : "+x"(v));
        f = _mm256_add_epi16(f, _mm256_maddubs_epi16(w, v));
        asm volatile("" : "+x"(v));
        g = _mm256_add_epi16(g, _mm256_maddubs_epi16(w, v));
        asm volatile("" : "+x"(v));
        h = _mm256_add_epi16(h, _mm256_maddubs_epi16(w, v));
    }
    asm volatile("" : : "x"(a), "x"(b), "x"(c), "x"(d), "x"(e), "x"(f), "x"(g), "x"(h));
    return static_cast<double>(rounds) * 8 * 32;
}

uint64_t read(const uint8_t* data, size_t n) {
    __m256i total = _mm256_setzero_si256(), other = total;
    for (size_t i = 0; i + 64 <= n; i += 64) {
        total = _mm256_add_epi64(total, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + i)));
        other = _mm256_add_epi64(other, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + i + 32)));
    }
    alignas(32) uint64_t lanes[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), _mm256_add_epi64(total, other));
    return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

}  // namespace

extern const Kernels kAvx2Kernels;
const Kernels kAvx2Kernels = {
    .name = "avx2",
    .q8_bias = 0,
    .mxfp4_bias = 12,
    .q8_wide = true,
#include "kernels/table.h"
};

}  // namespace freehold
