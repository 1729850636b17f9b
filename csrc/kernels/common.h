// The kernels that read the same on every instruction set, written over a vector of 16 floats. An isa_*.cpp file
// defines F16, its operations and the int8 dot products in an anonymous namespace, then includes this file there.
//
// Operations expected: load, store, load_bf16, bf16_low and bf16_high (of 16 pairs of them, as 32 bits each, the lower
// or the upper ones), load_i8, zero, set1, fma (a*b + c), mul, add, sub, div, abs, min and max (the second where one is
// NaN), sum (of lanes, in a fixed order), largest (of lanes), no_nan (in any lane), round (to nearest even), exp2i (2^n
// for integral n in [-126, 127], anything for NaN), keep_above (x, but 0 where key < least), store_i8 (rounded values
// in [-127, 127]), place (a block of such values as activations of a tile), to_f16, from_f16, transpose16 and kRows.
//
// Nothing here may call an inline function or template from outside: the linker keeps one copy of those for the whole
// program, and it could be the one compiled for an instruction set that the processor lacks.

inline F16 exp(F16 x) {
    // Cephes' expf: 2^n * p(r) with |r| <= ln 2 / 2; relative error under 2e-7. Below -87 the result is 0 or nearly so.
    x = min(set1(88.0f), max(set1(-87.0f), x));  // in this order NaN stays NaN
    const F16 n = round(mul(x, set1(1.44269504f)));
    const F16 r = fma(n, set1(2.12194440e-4f), fma(n, set1(-0.693359375f), x));
    F16 p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = add(fma(p, mul(r, r), r), set1(1.0f));
    return mul(p, exp2i(n));
}

inline float exp1(float x) {
    float lanes[16];
    store(lanes, exp(set1(x)));
    return lanes[0];
}

// With few tokens a panel is read faster than it can be fetched, and the hardware's prefetchers stop at every page: so
// each block asks for what comes a little later, first into the large cache, then into the small one, whose few buffers
// for what is under way would not cover the whole latency.
constexpr size_t kFetchFar = 4096, kFetchNear = 1024;
constexpr size_t kFetchTokens = 4;  // with more, the hardware's own prefetching is enough (AVX2 always asks)

template <size_t Bytes>
inline void fetch(const uint8_t* data) {
    for (size_t i = 0; i < Bytes; i += 64) {
        __builtin_prefetch(data + kFetchFar + i, 0, 2);
        __builtin_prefetch(data + kFetchNear + i);
    }
}

// For sets that take quantised panels one by one: DataBytes and ScaleBytes are those of one block of a panel.
using DotPanel = void (*)(const uint8_t* data, const uint8_t* scales, size_t B, const Tile& x, float* acc);

template <DotPanel Dot, size_t DataBytes, size_t ScaleBytes>
void dot_each_panel(const uint8_t* data, const uint8_t* scales, size_t B, size_t panels, const Tile& x, float* acc) {
    for (size_t p = 0; p < panels; ++p)
        Dot(data + p * B * DataBytes, scales + p * B * ScaleBytes, B, x, acc + p * kTile * kPanel);
}

// --- dot products with plain weights -----------------------------------------------------------------------------

struct LoadBf16 {
    static constexpr size_t bytes = 2;
    static F16 at(const uint8_t* weights) { return load_bf16(reinterpret_cast<const uint16_t*>(weights)); }
};
struct LoadF32 {
    static constexpr size_t bytes = 4;
    static F16 at(const uint8_t* weights) { return load(reinterpret_cast<const float*>(weights)); }
};

template <class Load, size_t M>
inline void dot_plain_tokens(const uint8_t* weights, size_t C, const float* x, size_t stride, float* acc) {
    F16 sums[M];
    for (size_t t = 0; t < M; ++t) sums[t] = zero();
    for (size_t c = 0; c < C; ++c) {
        const F16 w = Load::at(weights + c * kPanel * Load::bytes);
        for (size_t t = 0; t < M; ++t) sums[t] = fma(w, set1(x[t * stride + c]), sums[t]);
    }
    for (size_t t = 0; t < M; ++t) store(acc + t * kPanel, sums[t]);
}

template <class Load>
void dot_plain(const uint8_t* weights, size_t C, size_t panels, const Tile& x, float* acc) {
    for (size_t p = 0; p < panels; ++p, weights += C * kPanel * Load::bytes, acc += kTile * kPanel) {
        size_t t = 0;
        for (; t + kRows <= x.m; t += kRows)
            dot_plain_tokens<Load, kRows>(weights, C, x.rows + t * x.stride, x.stride, acc + t * kPanel);
        for (; t < x.m; ++t) dot_plain_tokens<Load, 1>(weights, C, x.rows + t * x.stride, x.stride, acc + t * kPanel);
    }
}

void dot_bf16(const uint8_t* weights, size_t C, size_t panels, const Tile& x, float* acc) {
    dot_plain<LoadBf16>(weights, C, panels, x, acc);
}
void dot_f32(const uint8_t* weights, size_t C, size_t panels, const Tile& x, float* acc) {
    dot_plain<LoadF32>(weights, C, panels, x, acc);
}

// --- activations ---------------------------------------------------------------------------------------------------

// Of 32 values the largest magnitude; NaN unless all are finite, which `largest` alone could lose.
inline float peak_of(F16 low, F16 high) {
    const float peak = largest(max(abs(low), abs(high)));
    return no_nan(fma(low, zero(), mul(high, zero()))) ? peak : NAN;
}

void quantise_block(const float* x, const Tile& tile, size_t t, size_t b) {
    F16 low = load(x), high = load(x + 16);
    const float peak = peak_of(low, high);
    if (peak != peak) low = high = zero();                  // the scale carries it on
    const float inverse = peak > 0 ? 127.0f / peak : 0.0f;  // a peak so small that this overflows is cut below
    const F16 factor = set1(inverse <= 3e38f ? inverse : 0.0f);
    place(round(mul(low, factor)), round(mul(high, factor)), tile, b * tile.m + t);
    tile.scales[b * tile.m + t] = peak / 127.0f;
}

void quantise(const float* x, size_t n, const Tile& tile, size_t t) {
    size_t b = 0;
    for (; (b + 1) * kBlock <= n; ++b) quantise_block(x + b * kBlock, tile, t, b);
    if (b * kBlock < n) {
        float rest[kBlock] = {};
        for (size_t i = b * kBlock; i < n; ++i) rest[i - b * kBlock] = x[i];
        quantise_block(rest, tile, t, b);
    }
}

void rms_norm(const float* x, const float* weight, float* out, size_t D, float eps) {
    F16 squares = zero();
    size_t d = 0;
    for (; d + 16 <= D; d += 16) {
        const F16 v = load(x + d);
        squares = fma(v, v, squares);
    }
    float total = sum(squares);
    for (; d < D; ++d) total += x[d] * x[d];
    const float scale = 1.0f / sqrtf(total / static_cast<float>(D) + eps);
    for (d = 0; d + 16 <= D; d += 16) store(out + d, mul(load(weight + d), mul(load(x + d), set1(scale))));
    for (; d < D; ++d) out[d] = weight[d] * (x[d] * scale);
}

void swiglu(const float* gate, const float* up, const float* gate_bias, const float* up_bias, float* out, float alpha,
            float limit) {
    const F16 g = min(set1(limit), add(load(gate), load(gate_bias)));  // in this order NaN stays NaN
    const F16 u = max(set1(-limit), min(set1(limit), add(load(up), load(up_bias))));
    const F16 sigmoid = div(set1(1.0f), add(set1(1.0f), exp(mul(g, set1(-alpha)))));
    store(out, mul(mul(g, sigmoid), add(u, set1(1.0f))));
}

void rope(const float* x, const float* cos, const float* sin, float* out, size_t H) {
    const size_t half = H / 2;
    size_t i = 0;
    for (; i + 16 <= half; i += 16) {
        const F16 a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
        store(out + i, sub(mul(a, c), mul(b, s)));
        store(out + half + i, add(mul(b, c), mul(a, s)));
    }
    for (; i < half; ++i) {
        const float a = x[i], b = x[half + i];
        out[i] = a * cos[i] - b * sin[i];
        out[half + i] = b * cos[i] + a * sin[i];
    }
}

inline int64_t lesser(int64_t a, int64_t b) { return b < a ? b : a; }
inline int64_t greater(int64_t a, int64_t b) { return a < b ? b : a; }
inline float greater(float a, float b) { return a < b ? b : a; }

// --- attention -----------------------------------------------------------------------------------------------------

inline uint16_t bf16_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40);  // rounding could carry a NaN into infinity
    return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

void kv_store(const float* x, const KvPages& kv, bool is_value, size_t at) {
    const size_t H = kv.H;
    void* target = is_value ? kv.values : kv.keys;
    switch (kv.type) {
        case KvType::f32:
            std::memcpy(static_cast<float*>(target) + at, x, H * sizeof(float));
            return;
        case KvType::bf16:
            for (size_t i = 0; i < H; ++i) static_cast<uint16_t*>(target)[at + i] = bf16_of(x[i]);
            return;
        case KvType::q8: {
            uint16_t* scales = (is_value ? kv.value_scales : kv.key_scales) + at / kBlock;
            for (size_t b = 0; b < H / kBlock; ++b) {
                const F16 low = load(x + b * kBlock), high = load(x + b * kBlock + 16);
                const float peak = peak_of(low, high);
                scales[b] = to_f16(peak / 127.0f);
                const float step = from_f16(scales[b]);
                const F16 factor = set1(step > 0 ? 1.0f / step : 0.0f);
                const F16 most = set1(127.0f), least = set1(-127.0f);
                int8_t* values = static_cast<int8_t*>(target) + at + b * kBlock;
                store_i8(values, max(min(round(mul(low, factor)), most), least));
                store_i8(values + 16, max(min(round(mul(high, factor)), most), least));
            }
        }
    }
}

// 16 floats of one stored head, from element i on (i + 16 <= H).
template <KvType type>
inline F16 kv_load(const void* from, const uint16_t* scales, size_t at) {
    if constexpr (type == KvType::f32) return load(static_cast<const float*>(from) + at);
    if constexpr (type == KvType::bf16) return load_bf16(static_cast<const uint16_t*>(from) + at);
    return mul(load_i8(static_cast<const int8_t*>(from) + at), set1(from_f16(scales[at / kBlock])));
}
template <KvType type>
inline float kv_load1(const void* from, size_t at) {  // never q8: its H is a multiple of 32
    if constexpr (type == KvType::f32) return static_cast<const float*>(from)[at];
    const uint32_t bits = uint32_t{static_cast<const uint16_t*>(from)[at]} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Memory that is needed next: the first few blocks of a product ask for it in passing, `step` bytes with every k.
struct Ahead {
    static constexpr size_t blocks = 8;
    const uint8_t *next, *end;
    size_t step;
    // K as in the product. Without `bytes` the same line is asked for again and again, which costs no memory traffic.
    Ahead(const void* from, size_t bytes, size_t K)
        : next(static_cast<const uint8_t*>(from)), end(next + bytes), step((bytes + blocks * K - 1) / (blocks * K)) {}
    void pass(size_t K) {
        next += step * K;
        if (next >= end) step = 0;
    }
};

inline F16 widened(const float* p) { return load(p); }
inline F16 widened(const uint16_t* p) { return load_bf16(p); }

// c (R, 16 C columns of a row of `stride`) = a (R rows of K values, a_stride apart) * b (K rows, b_stride apart)
template <size_t R, size_t C, class Value>
inline void micro(const float* a, size_t a_stride, const Value* b, size_t b_stride, size_t K, float* c, size_t stride,
                  bool accumulate, Ahead& ahead) {
    F16 sums[R][C];
    for (size_t r = 0; r < R; ++r)
        for (size_t n = 0; n < C; ++n) sums[r][n] = accumulate ? load(c + r * stride + n * 16) : zero();
    for (size_t k = 0; k < K; ++k) {
        __builtin_prefetch(ahead.next + k * ahead.step);
        F16 columns[C];
        for (size_t n = 0; n < C; ++n) columns[n] = widened(b + k * b_stride + n * 16);
        for (size_t r = 0; r < R; ++r) {
            const F16 value = set1(a[r * a_stride + k]);
            for (size_t n = 0; n < C; ++n) sums[r][n] = fma(value, columns[n], sums[r][n]);
        }
    }
    for (size_t r = 0; r < R; ++r)
        for (size_t n = 0; n < C; ++n) store(c + r * stride + n * 16, sums[r][n]);
    ahead.pass(K);
}

// Each sum runs over k in order, whichever way rows and columns are taken.
template <class Value>
inline void multiply(const float* a, size_t a_stride, const Value* b, size_t b_stride, size_t K, float* c,
                     size_t stride, size_t rows, size_t columns, bool accumulate, Ahead& ahead) {
    size_t r = 0;
    for (; r + kRows <= rows; r += kRows)
        for (size_t n = 0; n < columns; n += 16)
            micro<kRows, 1>(a + r * a_stride, a_stride, b + n, b_stride, K, c + r * stride + n, stride, accumulate,
                            ahead);
    for (; r < rows; ++r) {  // one row: several columns at once keep the multipliers busy
        size_t n = 0;
        for (; n + 64 <= columns; n += 64)
            micro<1, 4>(a + r * a_stride, a_stride, b + n, b_stride, K, c + r * stride + n, stride, accumulate, ahead);
        for (; n < columns; n += 16)
            micro<1, 1>(a + r * a_stride, a_stride, b + n, b_stride, K, c + r * stride + n, stride, accumulate, ahead);
    }
}

// 32 bfloat16 of each of 16 rows, as 32 rows of 16 floats: pairs of them travel as one.
inline void transpose_bf16(const uint16_t* rows, size_t row_stride, float* out, size_t stride) {
    F16 pairs[16];
    for (size_t r = 0; r < 16; ++r) pairs[r] = load(reinterpret_cast<const float*>(rows + r * row_stride));
    alignas(64) float columns[16 * 16];
    transpose16(pairs, columns, 16);
    for (size_t c = 0; c < 16; ++c) {
        const F16 pair = load(columns + 16 * c);
        store(out + 2 * c * stride, bf16_low(pair));
        store(out + (2 * c + 1) * stride, bf16_high(pair));
    }
}

// `count` <= 64 stored keys of a head from element `at` on: (H, 64), with zeros for those that are missing.
template <KvType type>
inline void load_keys(const KvPages& kv, size_t at, size_t count, float* keys) {
    constexpr size_t N = kKeysAtOnce;
    const size_t H = kv.H;
    for (size_t j = 0; j < N; j += 16) {
        size_t i = 0;
        if (type == KvType::bf16 && j + 16 <= count)
            for (; i + 32 <= H; i += 32)
                transpose_bf16(static_cast<const uint16_t*>(kv.keys) + at + j * H + i, H, keys + i * N + j, N);
        for (; i + 16 <= H; i += 16) {
            F16 square[16];
            for (size_t k = 0; k < 16; ++k)
                square[k] = j + k < count ? kv_load<type>(kv.keys, kv.key_scales, at + (j + k) * H + i) : zero();
            transpose16(square, keys + i * N + j, N);
        }
        for (; i < H; ++i)
            for (size_t k = j; k < j + 16; ++k)
                keys[i * N + k] = k < count ? kv_load1<type>(kv.keys, at + k * H + i) : 0.0f;
    }
}

// `count` stored values of a head from element `at` on: (count, padded H)
template <KvType type>
inline void load_values(const KvPages& kv, size_t at, size_t count, float* values) {
    const size_t H = kv.H, padded = padded_head(H);
    for (size_t j = 0; j < count; ++j, at += H, values += padded) {
        size_t i = 0;
        for (; i + 16 <= H; i += 16) store(values + i, kv_load<type>(kv.values, kv.value_scales, at + i));
        for (; i < padded; ++i) values[i] = i < H ? kv_load1<type>(kv.values, at + i) : 0.0f;
    }
}

void attend(const AttentionPiece& piece, const KvPages& kv) {
    constexpr size_t N = kKeysAtOnce;
    const size_t H = kv.H, padded = padded_head(H), rows = piece.rows;
    float* keys = piece.scratch;          // (H, 64): transposed, so that scores of 16 keys are one vector
    float* values = keys + padded * N;    // (64, padded H)
    float* scores = values + N * padded;  // (rows, 64)
    // For few rows it is not worth while to widen values first.
    const bool read_in_place = kv.type == KvType::bf16 && rows <= 2 * kRows && padded == H;
    for (size_t r = 0; r < rows; ++r) piece.peak[r] = -INFINITY, piece.sum[r] = 0.0f;
    std::memset(piece.out, 0, rows * padded * sizeof(float));

    for (int64_t start = piece.first_key; start < piece.last_key; start += kKeysAtOnce) {
        const size_t count = static_cast<size_t>(lesser(kKeysAtOnce, piece.last_key - start));
        const size_t block = static_cast<size_t>(start) / N,
                     at = kv.at(static_cast<size_t>(piece.pages[block]), piece.head);
        switch (kv.type) {
            case KvType::f32:
                load_keys<KvType::f32>(kv, at, count, keys), load_values<KvType::f32>(kv, at, count, values);
                break;
            case KvType::bf16:
                load_keys<KvType::bf16>(kv, at, count, keys);
                if (!read_in_place) load_values<KvType::bf16>(kv, at, count, values);
                break;
            case KvType::q8:
                load_keys<KvType::q8>(kv, at, count, keys), load_values<KvType::q8>(kv, at, count, values);
        }
        const bool last = start + kKeysAtOnce >= piece.last_key;
        const size_t next = last ? at : kv.at(static_cast<size_t>(piece.pages[block + 1]), piece.head);
        const size_t size = kv.type == KvType::f32    ? 4
                            : kv.type == KvType::bf16 ? 2
                                                      : 1,
                     ahead = last ? 0 : N * H * size;
        Ahead next_keys(static_cast<const uint8_t*>(kv.keys) + next * size, ahead, H);
        Ahead next_values(static_cast<const uint8_t*>(kv.values) + next * size, ahead, N);
        multiply(piece.q, H, keys, N, H, scores, N, rows, N, false, next_keys);

        for (size_t r = 0; r < rows; ++r) {
            float* row = scores + r * N;
            const int64_t low = greater(piece.limits[2 * r] - start, int64_t{0});
            const int64_t high = lesser(piece.limits[2 * r + 1] - start, static_cast<int64_t>(count));
            if (low >= high) {  // nothing of this block is in sight of this row: it changes nothing
                std::memset(row, 0, N * sizeof(float));
                continue;
            }
            for (int64_t j = 0; j < low; ++j) row[j] = -INFINITY;
            for (int64_t j = high; j < static_cast<int64_t>(N); ++j) row[j] = -INFINITY;
            F16 s[N / 16];
            for (size_t j = 0; j < N / 16; ++j) s[j] = load(row + 16 * j);
            const float peak = greater(piece.peak[r], largest(max(max(s[0], s[1]), max(s[2], s[3]))));
            if (peak != piece.peak[r]) {
                const F16 shrink = set1(piece.sum[r] > 0 ? exp1(piece.peak[r] - peak) : 0.0f);
                float* out = piece.out + r * padded;
                for (size_t i = 0; i < padded; i += 16) store(out + i, mul(load(out + i), shrink));
                float lanes[16];
                store(lanes, shrink);
                piece.sum[r] *= lanes[0];
                piece.peak[r] = peak;
            }
            F16 total = zero();
            for (size_t j = 0; j < N / 16; ++j) {
                const F16 shifted = sub(s[j], set1(peak));
                // exp clamps: what is masked must be zero, and so is what lies far below
                s[j] = keep_above(exp(shifted), shifted, -87.0f);
                total = add(total, s[j]);
                store(row + 16 * j, s[j]);
            }
            piece.sum[r] += sum(total);
        }
        if (read_in_place) {
            const uint16_t* stored = static_cast<const uint16_t*>(kv.values) + at;
            multiply(scores, N, stored, H, count, piece.out, padded, rows, padded, true, next_values);
        } else {
            multiply(scores, N, values, padded, count, piece.out, padded, rows, padded, true, next_values);
        }
    }
}

// --- sampling ------------------------------------------------------------------------------------------------------

void exp_all(const float* x, size_t n, float peak, float factor, float* out) {
    const F16 p = set1(peak), f = set1(factor);
    for (size_t i = 0; i < n; i += 16) {
        float rest[16];
        if (i + 16 > n)
            for (size_t j = 0; j < 16; ++j) rest[j] = i + j < n ? x[i + j] : -INFINITY;
        const F16 scaled = mul(sub(load(i + 16 > n ? rest : x + i), p), f);
        store(out + i, keep_above(exp(scaled), scaled, -87.0f));
    }
}

float sum_all(const float* x, size_t n) {
    F16 total = zero();
    for (size_t i = 0; i < n; i += 16) total = add(total, load(x + i));
    return sum(total);
}

size_t argmax(const float* x, size_t n) {
    F16 best = set1(-INFINITY);
    size_t i = 0;
    for (; i + 16 <= n; i += 16) best = max(load(x + i), best);
    float peak = largest(best);
    for (size_t j = i; j < n; ++j) peak = x[j] > peak ? x[j] : peak;
    for (size_t j = 0; j < n; ++j)
        if (x[j] == peak) return j;
    return 0;
}
