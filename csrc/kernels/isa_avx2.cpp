// AVX2 with FMA and F16C. F16 is two registers.
//
// Int8 dot products: maddubs multiplies unsigned by signed bytes and adds pairs into 16 bits. MXFP4 weights become
// 2w + 12 in 0 … 24. A sum begins with the tile's offset, which takes the bias of all its 16 products off beforehand:
// so it never leaves 16 bits, 16 · 12 · 127 < 2^15. q8 products need 32 bits. For few tokens the activation's sign goes
// to the weight, and maddubs multiplies by its magnitude; for many both sides are widened to 16 bits, and madd adds
// pairs.
#include <immintrin.h>
#include <math.h>

#include <cstring>

#include "kernels/half.h"
#include "kernels/kernels.h"

namespace freehold {
namespace {

constexpr size_t kRows = 4, kManyRows = 6, kSums = 4;
constexpr size_t kLeftRows = 6, kLeftGroups = 1;

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
inline __m256 bf16x8_low(__m256 pairs) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(pairs), 16));
}
inline __m256 bf16x8_high(__m256 pairs) {
    return _mm256_and_ps(pairs, _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(0xFFFF0000))));
}
inline F16 bf16_low(F16 pairs) { return {bf16x8_low(pairs.a), bf16x8_low(pairs.b)}; }
inline F16 bf16_high(F16 pairs) { return {bf16x8_high(pairs.a), bf16x8_high(pairs.b)}; }
inline __m256 widened_i8x8(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline F16 load_i8(const int8_t* p) { return {widened_i8x8(p), widened_i8x8(p + 8)}; }
inline __m256i eight_words(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
template <int N>
inline __m256 nibbles_x8(const uint8_t* words) {
    const __m256 twice =
        _mm256_setr_ps(0, 1, 2, 3, 4, 6, 8, 12);  // only the lowest 3 bits choose, the fourth is a sign
    const __m256i codes = _mm256_srli_epi32(eight_words(words), 4 * N);
    const __m256i sign = _mm256_and_si256(_mm256_slli_epi32(codes, 28), _mm256_set1_epi32(INT32_MIN));
    return _mm256_xor_ps(_mm256_permutevar8x32_ps(twice, codes), _mm256_castsi256_ps(sign));
}
template <int N>
inline F16 nibbles(const uint8_t* words) {
    return {nibbles_x8<N>(words), nibbles_x8<N>(words + 32)};
}
template <int N>
inline __m256 bytes_x8(const uint8_t* words) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(eight_words(words), 24 - 8 * N), 24));
}
template <int N>
inline F16 bytes(const uint8_t* words) {
    return {bytes_x8<N>(words), bytes_x8<N>(words + 32)};
}
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
// Sixteen rounded values, each 128 bits: of a the first four, then of b.
inline __m256i words_of(F16 x) { return _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)); }
inline void store_i8(int8_t* p, F16 x) {
    const __m256i words = _mm256_permute4x64_epi64(words_of(x), 0xD8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
inline __m256i rounded_bf16x8(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    // Rounding could carry a NaN into infinity.
    const __m256i nan = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, nan, is_nan), 16);
}
inline void store_bf16(uint16_t* p, F16 x) {
    const __m256i halves = _mm256_packus_epi32(rounded_bf16x8(x.a), rounded_bf16x8(x.b));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(halves, 0xD8));
}

// Activations for q8 weights: up to so many tokens of a tile are kept as 32 magnitudes and 32 values, more as 32 values
// of 16 bits each, where of every four inputs the middle ones have changed places.
constexpr size_t kFewTokens = 3;
constexpr size_t kQ8Bytes = 2 * kBlock;
constexpr char kMxfp4Bias = 12;

inline void place(F16 low, F16 high, const Tile& tile, size_t at) {
    const __m256i mixed = _mm256_packs_epi16(words_of(low), words_of(high));
    const __m256i block = _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    if (tile.form == Form::mxfp4) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(tile.values + at * kBlock), block);
        // What the bias adds to the 16-bit sums: of the first two inputs of every four, and of the others.
        const __m256i more = _mm256_maddubs_epi16(_mm256_set1_epi8(kMxfp4Bias), block);
        __m128i sums = _mm_add_epi16(_mm256_castsi256_si128(more), _mm256_extracti128_si256(more, 1));
        sums = _mm_add_epi16(sums, _mm_shuffle_epi32(sums, 0x4E));
        sums = _mm_add_epi16(sums, _mm_shuffle_epi32(sums, 0xB1));
        tile.offsets[at] = _mm_cvtsi128_si32(_mm_sub_epi16(_mm_setzero_si128(), sums));
        return;
    }
    auto* to = reinterpret_cast<__m256i*>(tile.values + at * kQ8Bytes);
    if (tile.m <= kFewTokens) {
        _mm256_storeu_si256(to, _mm256_abs_epi8(block));
        _mm256_storeu_si256(to + 1, block);
        return;
    }
    for (int half = 0; half < 2; ++half) {
        const __m128i bytes = half ? _mm256_extracti128_si256(block, 1) : _mm256_castsi256_si128(block);
        const __m256i wide = _mm256_cvtepi8_epi16(bytes);
        _mm256_storeu_si256(to + half, _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(wide, 0xD8), 0xD8));
    }
}
inline uint16_t to_f16(float x) { return narrowed_half(x); }
inline float from_f16(uint16_t bits) { return _cvtsh_ss(bits); }

#include "kernels/common.h"

// A loop that reads the same integers for several tokens: GCC would add up in trees and run out of registers, unless it
// is told that nobody knows what a sum is after each step.
inline void pin(__m256i& sum) { asm volatile("" : "+x"(sum)); }

inline __m256i load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
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

// A block of a panel has two halves of 8 rows. Kernels for few tokens read weights where they lie; those for many
// unpack a block first, half beside half, and take `at_once` tokens through it together.
struct Mxfp4 {
    static constexpr size_t bytes = kPanel * kBlock / 2, scale_bytes = kPanel, token_bytes = kBlock, at_once = 2;
    using Unpacked = __m256i[8][2];  // for each four inputs of 8 rows: twice their weights, and 12 more

    static __m256i low(__m256i pair) {
        const __m256i twelve_more =
            _mm256_broadcastsi128_si256(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
        return _mm256_shuffle_epi8(twelve_more, _mm256_and_si256(pair, _mm256_set1_epi8(15)));
    }
    static __m256i high(__m256i pair) { return low(_mm256_srli_epi16(pair, 4)); }

    static __m256 row_scales(const uint8_t* scales, size_t half) {  // halved, since weights are doubled
        const auto* bytes = reinterpret_cast<const __m128i*>(scales + half * 8);
        const __m256i exponents = _mm256_cvtepu8_epi32(_mm_loadl_epi64(bytes));
        return _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(exponents, 23)), _mm256_set1_ps(0.5f));
    }
    static void unpack(const uint8_t* codes, Unpacked& w) {
        for (size_t j = 0; j < 4; ++j)
            for (size_t half = 0; half < 2; ++half) {
                const __m256i pair = load_bytes(codes + j * 64 + half * 32);
                w[2 * j][half] = low(pair);
                w[2 * j + 1][half] = high(pair);
            }
    }
    // The products of four inputs of a half's rows and a token, 16 bits each.
    static void add_to(__m256i& sum, __m256i w, __m256i x) { sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x)); }
    static __m256i total(__m256i sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }

    template <size_t M>
    static void dot_few(const uint8_t* codes, const int8_t* values, const int32_t* offsets, __m256i (&dots)[M][2]) {
        for (size_t t = 0; t < M; ++t) dots[t][0] = dots[t][1] = _mm256_set1_epi32(offsets[t]);
#pragma GCC unroll 4
        for (size_t j = 0; j < 4; ++j)
            for (size_t half = 0; half < 2; ++half) {
                const __m256i pair = load_bytes(codes + j * 64 + half * 32), first = low(pair), second = high(pair);
                for (size_t t = 0; t < M; ++t) {
                    add_to(dots[t][half], first, broadcast4(values + t * token_bytes + 8 * j));
                    add_to(dots[t][half], second, broadcast4(values + t * token_bytes + 8 * j + 4));
                }
            }
        for (size_t t = 0; t < M; ++t)
            for (size_t half = 0; half < 2; ++half) dots[t][half] = total(dots[t][half]);
    }
    template <size_t M>
    static void dot_many(const Unpacked& w, const int8_t* values, const int32_t* offsets, __m256i (&dots)[M][2]) {
        for (size_t t = 0; t < M; ++t) dots[t][0] = dots[t][1] = _mm256_set1_epi32(offsets[t]);
#pragma GCC unroll 8
        for (size_t g = 0; g < 8; ++g)
            for (size_t t = 0; t < M; ++t) {
                const __m256i x = broadcast4(values + t * token_bytes + 4 * g);
                for (size_t half = 0; half < 2; ++half) add_to(dots[t][half], w[g][half], x), pin(dots[t][half]);
            }
        for (size_t t = 0; t < M; ++t)
            for (size_t half = 0; half < 2; ++half) dots[t][half] = total(dots[t][half]);
    }
};

struct Q8 {
    static constexpr size_t bytes = kPanel * kBlock, scale_bytes = 2 * kPanel, token_bytes = kQ8Bytes, at_once = 4;
    using Unpacked = __m256i[16][2];  // 16 bits each: of every four inputs of 8 rows, the even ones, then the odd ones

    static __m256 row_scales(const uint8_t* scales, size_t half) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + half * 16)));
    }
    static void unpack(const uint8_t* weights, Unpacked& w) {
        for (size_t g = 0; g < 8; ++g)
            for (size_t half = 0; half < 2; ++half) {
                const __m256i four = load_bytes(weights + g * 64 + half * 32);
                w[2 * g][half] = _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8);
                w[2 * g + 1][half] = _mm256_srai_epi16(four, 8);
            }
    }

    template <size_t M>
    static void dot_few(const uint8_t* weights, const int8_t* values, const int32_t*, __m256i (&dots)[M][2]) {
        for (size_t t = 0; t < M; ++t) dots[t][0] = dots[t][1] = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (size_t g = 0; g < 8; ++g)
            for (size_t half = 0; half < 2; ++half) {
                const __m256i w = load_bytes(weights + g * 64 + half * 32);
                for (size_t t = 0; t < M; ++t) {
                    const int8_t* x = values + t * token_bytes + 4 * g;
                    const __m256i pairs =
                        _mm256_maddubs_epi16(broadcast4(x), _mm256_sign_epi8(w, broadcast4(x + kBlock)));
                    dots[t][half] = _mm256_add_epi32(dots[t][half], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
                }
            }
    }
    template <size_t M>
    static void dot_many(const Unpacked& w, const int8_t* values, const int32_t*, __m256i (&dots)[M][2]) {
        for (size_t t = 0; t < M; ++t) dots[t][0] = dots[t][1] = _mm256_setzero_si256();
#pragma GCC unroll 16
        for (size_t g = 0; g < 16; ++g)
            for (size_t t = 0; t < M; ++t) {
                const __m256i x = broadcast4(values + t * token_bytes + 4 * g);
                for (size_t half = 0; half < 2; ++half) {
                    dots[t][half] = _mm256_add_epi32(dots[t][half], _mm256_madd_epi16(w[g][half], x));
                    pin(dots[t][half]);
                }
            }
    }
};

template <class Weights, size_t M>
inline void dot_panel_few(const uint8_t* weights, const uint8_t* scales, size_t B, const Tile& x, float* acc) {
    for (size_t b = 0; b < B; ++b, weights += Weights::bytes, scales += Weights::scale_bytes) {
        fetch<Weights::bytes>(weights);
        __m256i dots[M][2];
        Weights::template dot_few<M>(weights, x.values + b * M * Weights::token_bytes, x.offsets + b * M, dots);
        for (size_t half = 0; half < 2; ++half) {
            const __m256 row_scales = Weights::row_scales(scales, half);
            for (size_t t = 0; t < M; ++t)
                accumulate(acc + t * kPanel + half * 8, dots[t][half], row_scales, x.scales[b * M + t]);
        }
    }
}

template <class Weights, size_t M>
inline void dot_unpacked(const typename Weights::Unpacked& w, const __m256 (&row_scales)[2], const Tile& x, size_t at,
                         float* acc) {
    __m256i dots[M][2];
    Weights::template dot_many<M>(w, x.values + at * Weights::token_bytes, x.offsets + at, dots);
    for (size_t t = 0; t < M; ++t)
        for (size_t half = 0; half < 2; ++half)
            accumulate(acc + t * kPanel + half * 8, dots[t][half], row_scales[half], x.scales[at + t]);
}

template <class Weights>
inline void dot_panel_many(const uint8_t* weights, const uint8_t* scales, size_t B, const Tile& x, float* acc) {
    for (size_t b = 0; b < B; ++b, weights += Weights::bytes, scales += Weights::scale_bytes) {
        fetch<Weights::bytes>(weights);
        typename Weights::Unpacked w;
        Weights::unpack(weights, w);
        const __m256 row_scales[2] = {Weights::row_scales(scales, 0), Weights::row_scales(scales, 1)};
        size_t t = 0;
        for (; t + Weights::at_once <= x.m; t += Weights::at_once)
            dot_unpacked<Weights, Weights::at_once>(w, row_scales, x, b * x.m + t, acc + t * kPanel);
        for (; t < x.m; ++t) dot_unpacked<Weights, 1>(w, row_scales, x, b * x.m + t, acc + t * kPanel);
    }
}

template <class Weights>
void dot_panel(const uint8_t* weights, const uint8_t* scales, size_t B, const Tile& x, float* acc) {
    std::memset(acc, 0, x.m * kPanel * sizeof(float));
    static_assert(kFewTokens == 3);
    if (x.m == 1) return dot_panel_few<Weights, 1>(weights, scales, B, x, acc);
    if (x.m == 2) return dot_panel_few<Weights, 2>(weights, scales, B, x, acc);
    if (x.m == 3) return dot_panel_few<Weights, 3>(weights, scales, B, x, acc);
    dot_panel_many<Weights>(weights, scales, B, x, acc);
}

void dot_mxfp4(const uint8_t* codes, const uint8_t* scales, size_t B, size_t panels, const Tile& x, float* acc) {
    dot_each_panel<dot_panel<Mxfp4>, Mxfp4::bytes, Mxfp4::scale_bytes>(codes, scales, B, panels, x, acc);
}

void dot_q8(const uint8_t* weights, const uint8_t* scales, size_t B, size_t panels, const Tile& x, float* acc) {
    dot_each_panel<dot_panel<Q8>, Q8::bytes, Q8::scale_bytes>(weights, scales, B, panels, x, acc);
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
        fetch<64>(data + i);
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
    .q8_bytes = Q8::token_bytes,
    .mxfp4_bytes = Mxfp4::token_bytes,
#include "kernels/table.h"
};

}  // namespace freehold
