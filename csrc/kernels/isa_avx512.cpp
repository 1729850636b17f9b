// AVX-512 (F, BW, DQ, VL) with VNNI. F16 is one register, and so are 16 rows of four inputs: one dpbusd adds their
// products into 32 bits, with no risk of overflow. Weights are made unsigned by a bias that the tile's offsets take
// off: 12 for twice an MXFP4 weight, 128 for q8.
#include <immintrin.h>
#include <math.h>

#include <cstring>

#include "kernels/half.h"
#include "kernels/kernels.h"

namespace freehold {
namespace {

constexpr size_t kRows = 8, kManyRows = 8, kSums = 12;
constexpr size_t kLeftRows = 8, kLeftGroups = 2;

using F16 = __m512;

inline F16 load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F16 x) { _mm512_storeu_ps(p, x); }
inline F16 load_bf16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline F16 bf16_low(F16 pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pairs), 16)); }
inline F16 bf16_high(F16 pairs) {
    const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xFFFF0000));
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(pairs), mask));
}
inline F16 load_i8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
template <int N>
inline F16 nibbles(const uint8_t* words) {
    const __m512 twice =
        _mm512_setr_ps(0, 1, 2, 3, 4, 6, 8, 12, -0.0f, -1, -2, -3, -4, -6, -8, -12);  // only the lowest 4 bits choose
    return _mm512_permutexvar_ps(_mm512_srli_epi32(_mm512_loadu_si512(words), 4 * N), twice);
}
template <int N>
inline F16 bytes(const uint8_t* words) {
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(_mm512_loadu_si512(words), 24 - 8 * N), 24));
}
inline F16 set1(float x) { return _mm512_set1_ps(x); }
inline F16 zero() { return _mm512_setzero_ps(); }
inline F16 fma(F16 x, F16 y, F16 z) { return _mm512_fmadd_ps(x, y, z); }
inline F16 mul(F16 x, F16 y) { return _mm512_mul_ps(x, y); }
inline F16 add(F16 x, F16 y) { return _mm512_add_ps(x, y); }
inline F16 sub(F16 x, F16 y) { return _mm512_sub_ps(x, y); }
inline F16 div(F16 x, F16 y) { return _mm512_div_ps(x, y); }
inline F16 min(F16 x, F16 y) { return _mm512_min_ps(x, y); }
inline F16 max(F16 x, F16 y) { return _mm512_max_ps(x, y); }
inline F16 abs(F16 x) { return _mm512_abs_ps(x); }
inline F16 round(F16 x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F16 exp2i(F16 n) {
    const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
}
inline F16 keep_above(F16 x, F16 key, float least) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(key, _mm512_set1_ps(least), _CMP_NLT_UQ), x);
}
inline bool no_nan(F16 x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) == 0; }
inline float sum(F16 x) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}
inline float largest(F16 x) {
    const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
}
inline void store_i8(int8_t* p, F16 x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
}
inline void store_bf16(uint16_t* p, F16 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    // Rounding could carry a NaN into infinity.
    const __m512i kept =
        _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
    const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
}
constexpr int32_t kMxfp4Bias = 12, kQ8Bias = 128;
inline void place(F16 low, F16 high, const Tile& tile, size_t at) {
    store_i8(tile.values + at * kBlock, low);
    store_i8(tile.values + at * kBlock + 16, high);
    const int32_t sum = _mm512_reduce_add_epi32(_mm512_cvtps_epi32(_mm512_add_ps(low, high)));
    tile.offsets[at] = -sum * (tile.form == Form::mxfp4 ? kMxfp4Bias : kQ8Bias);
}
inline uint16_t to_f16(float x) { return narrowed_half(x); }
inline float from_f16(uint16_t bits) { return _cvtsh_ss(bits); }

#include "kernels/common.h"

inline __m512i broadcast4(const int8_t* p) {
    int32_t word;
    std::memcpy(&word, p, sizeof word);
    return _mm512_set1_epi32(word);
}

// One block of P panels side by side: each group of four activations is broadcast once for all of them.
template <size_t P>
struct Block {
    __m512i w[P][8];
    __m512 scales[P];
};

template <size_t P>
inline void dot_tokens(const Block<P>& block, const Tile& x, size_t b, float* acc) {
    const size_t m = x.m;
    const int8_t* __restrict values = x.values + b * m * kBlock;
    const float* __restrict token_scales = x.scales + b * m;
    const int32_t* __restrict offsets = x.offsets + b * m;
    for (size_t t = 0; t < m; ++t, values += kBlock, acc += kPanel) {
        __m512i even[P], odd[P];
        for (size_t p = 0; p < P; ++p) even[p] = _mm512_set1_epi32(offsets[t]), odd[p] = _mm512_setzero_si512();
        for (size_t g = 0; g < 8; g += 2) {
            const __m512i v = broadcast4(values + 4 * g), u = broadcast4(values + 4 * g + 4);
            for (size_t p = 0; p < P; ++p) {
                even[p] = _mm512_dpbusd_epi32(even[p], block.w[p][g], v);
                odd[p] = _mm512_dpbusd_epi32(odd[p], block.w[p][g + 1], u);
            }
        }
        const __m512 token_scale = set1(token_scales[t]);
        for (size_t p = 0; p < P; ++p) {
            float* sums = acc + p * kTile * kPanel;
            const __m512 scaled = mul(_mm512_cvtepi32_ps(_mm512_add_epi32(even[p], odd[p])), block.scales[p]);
            store(sums, fma(scaled, token_scale, load(sums)));
        }
    }
}

template <size_t P>
void dot_mxfp4_panels(const uint8_t* codes, const uint8_t* scales, size_t B, const Tile& x, float* acc) {
    const __m512i twelve_more =
        _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    const __m512i nibble = _mm512_set1_epi8(15);
    for (size_t p = 0; p < P; ++p) std::memset(acc + p * kTile * kPanel, 0, x.m * kPanel * sizeof(float));
    for (size_t b = 0; b < B; ++b) {
        Block<P> block;
        for (size_t p = 0; p < P; ++p) {
            if (x.m <= kFetchTokens) fetch<256>(codes + (p * B + b) * 256);
            for (size_t j = 0; j < 4; ++j) {
                const __m512i pair = _mm512_loadu_si512(codes + (p * B + b) * 256 + j * 64);
                block.w[p][2 * j] = _mm512_shuffle_epi8(twelve_more, _mm512_and_si512(pair, nibble));
                block.w[p][2 * j + 1] =
                    _mm512_shuffle_epi8(twelve_more, _mm512_and_si512(_mm512_srli_epi16(pair, 4), nibble));
            }
            const auto* bytes = reinterpret_cast<const __m128i*>(scales + (p * B + b) * kPanel);
            const __m512i exponents = _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes));
            block.scales[p] = mul(_mm512_castsi512_ps(_mm512_slli_epi32(exponents, 23)), set1(0.5f));
        }
        dot_tokens(block, x, b, acc);
    }
}

template <size_t P>
void dot_q8_panels(const uint8_t* weights, const uint8_t* scales, size_t B, const Tile& x, float* acc) {
    const __m512i top = _mm512_set1_epi8(static_cast<char>(0x80));
    for (size_t p = 0; p < P; ++p) std::memset(acc + p * kTile * kPanel, 0, x.m * kPanel * sizeof(float));
    for (size_t b = 0; b < B; ++b) {
        Block<P> block;
        for (size_t p = 0; p < P; ++p) {
            if (x.m <= kFetchTokens) fetch<512>(weights + (p * B + b) * 512);
            for (size_t g = 0; g < 8; ++g)
                block.w[p][g] = _mm512_xor_si512(_mm512_loadu_si512(weights + (p * B + b) * 512 + g * 64), top);
            const auto* halves = reinterpret_cast<const __m256i*>(scales + (p * B + b) * 2 * kPanel);
            block.scales[p] = _mm512_cvtph_ps(_mm256_loadu_si256(halves));
        }
        dot_tokens(block, x, b, acc);
    }
}

void dot_mxfp4(const uint8_t* codes, const uint8_t* scales, size_t B, size_t panels, const Tile& x, float* acc) {
    size_t p = 0;
    for (; p + 2 <= panels; p += 2)
        dot_mxfp4_panels<2>(codes + p * B * 256, scales + p * B * kPanel, B, x, acc + p * kTile * kPanel);
    if (p < panels) dot_mxfp4_panels<1>(codes + p * B * 256, scales + p * B * kPanel, B, x, acc + p * kTile * kPanel);
}

void dot_q8(const uint8_t* weights, const uint8_t* scales, size_t B, size_t panels, const Tile& x, float* acc) {
    size_t p = 0;
    for (; p + 2 <= panels; p += 2)
        dot_q8_panels<2>(weights + p * B * 512, scales + p * B * 2 * kPanel, B, x, acc + p * kTile * kPanel);
    if (p < panels)
        dot_q8_panels<1>(weights + p * B * 512, scales + p * B * 2 * kPanel, B, x, acc + p * kTile * kPanel);
}

double spin_dots(size_t rounds) {
    const __m512i w = _mm512_set1_epi8(1), v = _mm512_set1_epi8(2);
    __m512i a = w, b = w, c = w, d = w, e = w, f = w, g = w, h = w, i = w, j = w, k = w, l = w;
    for (size_t round = 0; round < rounds; ++round) {
        a = _mm512_dpbusd_epi32(a, w, v), b = _mm512_dpbusd_epi32(b, w, v), c = _mm512_dpbusd_epi32(c, w, v);
        d = _mm512_dpbusd_epi32(d, w, v), e = _mm512_dpbusd_epi32(e, w, v), f = _mm512_dpbusd_epi32(f, w, v);
        g = _mm512_dpbusd_epi32(g, w, v), h = _mm512_dpbusd_epi32(h, w, v), i = _mm512_dpbusd_epi32(i, w, v);
        j = _mm512_dpbusd_epi32(j, w, v), k = _mm512_dpbusd_epi32(k, w, v), l = _mm512_dpbusd_epi32(l, w, v);
    }
    asm volatile("" : : "v"(a), "v"(b), "v"(c), "v"(d), "v"(e), "v"(f), "v"(g), "v"(h), "v"(i), "v"(j), "v"(k), "v"(l));
    return static_cast<double>(rounds) * 12 * 64;
}

uint64_t read(const uint8_t* data, size_t n) {
    __m512i total = _mm512_setzero_si512();
    for (size_t i = 0; i + 64 <= n; i += 64) {
        fetch<64>(data + i);
        total = _mm512_add_epi64(total, _mm512_loadu_si512(data + i));
    }
    alignas(64) uint64_t lanes[8];
    _mm512_store_si512(lanes, total);
    uint64_t sum = 0;
    for (uint64_t lane : lanes) sum += lane;
    return sum;
}

}  // namespace

extern const Kernels kAvx512Kernels;
const Kernels kAvx512Kernels = {
    .name = "avx512",
    .q8_bytes = kBlock,
    .mxfp4_bytes = kBlock,
#include "kernels/table.h"
};

}  // namespace freehold
