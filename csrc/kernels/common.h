// The kernels that read the same on every instruction set, written over a vector of 16 floats. An isa_*.cpp file
// defines F16, its operations and the int8 dot products in an anonymous namespace, then includes this file there.
//
// Operations expected: load, store, load_bf16, bf16_low and bf16_high (of 16 pairs of them, as 32 bits each, the lower
// or the upper ones), load_i8, zero, set1, fma (a*b + c), mul, add, sub, div, abs, min and max (the second where one is
// NaN), sum (of lanes, in a fixed order), largest (of lanes), no_nan (in any lane), round (to nearest even), exp2i (2^n
// for integral n in [-126, 127], anything for NaN), keep_above (x, but 0 where key < least), store_i8 (rounded values
// in [-127, 127]), store_bf16 (rounded to nearest even), place (a block of such values as activations of a tile),
// to_f16, from_f16, kRows and kManyRows (the rows that a product takes at once, where it has few and where it has
// many), kSums (vectors that fit in registers as its sums), kLeftRows and kLeftGroups (weights and vectors of tokens
// that a product from the left takes at once), nibbles<N> and bytes<N> (of 16 words the one numbered N, the lowest
// first: twice an E2M1 code's value, an int8's).
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

// --- products from the left, for gradients ---------------------------------------------------------------------------

// Chunk j of a block of MXFP4: nibble 2i of a row's word is column i, nibble 2i + 1 column 4 + i.
inline void widen_chunk(const uint8_t* words, F16 scale, float* out, size_t stride) {
    store(out, mul(nibbles<0>(words), scale));
    store(out + stride, mul(nibbles<2>(words), scale));
    store(out + 2 * stride, mul(nibbles<4>(words), scale));
    store(out + 3 * stride, mul(nibbles<6>(words), scale));
    store(out + 4 * stride, mul(nibbles<1>(words), scale));
    store(out + 5 * stride, mul(nibbles<3>(words), scale));
    store(out + 6 * stride, mul(nibbles<5>(words), scale));
    store(out + 7 * stride, mul(nibbles<7>(words), scale));
}

void widen(Form form, const uint8_t* data, const uint8_t* scales, size_t columns, float* out, size_t stride) {
    float sizes[kPanel];
    switch (form) {
        case Form::mxfp4:
            for (size_t c = 0; c < columns; c += kBlock, scales += kPanel) {
                for (size_t r = 0; r < kPanel; ++r) sizes[r] = half_scale(scales[r]);
                for (size_t j = 0; j < 4; ++j, data += 64, out += 8 * stride)
                    widen_chunk(data, load(sizes), out, stride);
            }
            return;
        case Form::q8:
            for (size_t c = 0; c < columns; c += kBlock, scales += 2 * kPanel) {
                uint16_t halves[kPanel];
                std::memcpy(halves, scales, sizeof halves);
                for (size_t r = 0; r < kPanel; ++r) sizes[r] = from_f16(halves[r]);
                const F16 scale = load(sizes);
                for (size_t g = 0; g < 8; ++g, data += 64, out += 4 * stride) {
                    store(out, mul(bytes<0>(data), scale));
                    store(out + stride, mul(bytes<1>(data), scale));
                    store(out + 2 * stride, mul(bytes<2>(data), scale));
                    store(out + 3 * stride, mul(bytes<3>(data), scale));
                }
            }
            return;
        case Form::bf16:
            for (size_t c = 0; c < columns; ++c) store(out + c * stride, LoadBf16::at(data + c * kPanel * 2));
            return;
        case Form::f32:
            for (size_t c = 0; c < columns; ++c) store(out + c * stride, LoadF32::at(data + c * kPanel * 4));
    }
}

// R columns of the weights from `n` on, and G groups from `g` on.
template <size_t R, size_t G>
inline void left_micro(const LeftProduct& p, size_t n, size_t g) {
    const float* weights = p.weights + n * p.weight_column;
    const float* b = p.b + g * p.b_group;
    float* c = p.c + g * p.c_group + n * p.c_column;
    const size_t column = p.weight_column, step = p.weight_step, b_group = p.b_group;
    F16 sums[R][G];
    for (size_t r = 0; r < R; ++r)
        for (size_t i = 0; i < G; ++i) sums[r][i] = p.accumulate ? load(c + i * p.c_group + r * p.c_column) : zero();
    for (size_t k = 0; k < p.K; ++k, weights += step, b += kPanel) {
        F16 side[G];
        for (size_t i = 0; i < G; ++i) side[i] = load(b + i * b_group);
        for (size_t r = 0; r < R; ++r) {
            const F16 weight = set1(weights[r * column]);
            for (size_t i = 0; i < G; ++i) sums[r][i] = fma(weight, side[i], sums[r][i]);
        }
    }
    for (size_t r = 0; r < R; ++r)
        for (size_t i = 0; i < G; ++i) store(c + i * p.c_group + r * p.c_column, sums[r][i]);
}

template <size_t R, size_t G>
inline void left_columns(const LeftProduct& p, size_t n, size_t g) {
    for (; n + R <= p.columns; n += R) left_micro<R, G>(p, n, g);
    if constexpr (R > 1)
        if (n < p.columns) left_columns<R - 1, G>(p, n, g);
}

// Each sum runs over k in order, however columns and groups are taken.
void multiply_left(const LeftProduct& p) {
    size_t g = 0;
    for (; g + kLeftGroups <= p.groups; g += kLeftGroups) left_columns<kLeftRows, kLeftGroups>(p, 0, g);
    for (; g < p.groups; ++g) left_columns<kLeftRows, 1>(p, 0, g);
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

void rms_norm_backward(const float* x, const float* weight, const float* of_out, float* of_x, size_t D, float eps) {
    F16 squares = zero(), products = zero();
    size_t d = 0;
    for (; d + 16 <= D; d += 16) {
        const F16 v = load(x + d);
        squares = fma(v, v, squares);
        products = fma(mul(load(of_out + d), load(weight + d)), v, products);
    }
    float total = sum(squares), product = sum(products);
    for (; d < D; ++d) total += x[d] * x[d], product += of_out[d] * weight[d] * x[d];
    const float mean = total / static_cast<float>(D) + eps, scale = 1.0f / sqrtf(mean);
    const float pull = -product / (static_cast<float>(D) * mean);  // of x, beside what goes straight through
    for (d = 0; d + 16 <= D; d += 16)
        store(of_x + d, mul(set1(scale), fma(load(x + d), set1(pull), mul(load(of_out + d), load(weight + d)))));
    for (; d < D; ++d) of_x[d] = scale * (of_out[d] * weight[d] + x[d] * pull);
}

void swiglu(const float* gate, const float* up, const float* gate_bias, const float* up_bias, float* out, float alpha,
            float limit) {
    const F16 g = min(set1(limit), add(load(gate), load(gate_bias)));  // in this order NaN stays NaN
    const F16 u = max(set1(-limit), min(set1(limit), add(load(up), load(up_bias))));
    const F16 sigmoid = div(set1(1.0f), add(set1(1.0f), exp(mul(g, set1(-alpha)))));
    store(out, mul(mul(g, sigmoid), add(u, set1(1.0f))));
}

struct Narrow {
    using Number = uint16_t;
    static F16 get(const uint16_t* p) { return load_bf16(p); }
    static void put(uint16_t* p, F16 x) { store_bf16(p, x); }
};
struct Plain {
    using Number = float;
    static F16 get(const float* p) { return load(p); }
    static void put(float* p, F16 x) { store(p, x); }
};

void narrow(const float* x, size_t n, uint16_t* out) {
    for (size_t i = 0; i < n; i += 16) store_bf16(out + i, load(x + i));
}

template <class As>
inline float swiglu_backward_as(const typename As::Number* of_hidden, const typename As::Number* sums, size_t F,
                                float weight, float alpha, float limit, typename As::Number* of_sums,
                                typename As::Number* hidden) {
    using Number = typename As::Number;
    const F16 one = set1(1.0f), most = set1(limit), least = set1(-limit);
    F16 total = zero();
    size_t f = 0;
    for (; f < F; f += 16, sums += 32, of_sums += 32) {
        const size_t count = F - f < 16 ? F - f : 16;
        Number rest[16] = {};
        if (count < 16) std::memcpy(rest, of_hidden + f, count * sizeof(Number));
        const F16 gradient = As::get(count < 16 ? rest : of_hidden + f);
        const F16 gate = As::get(sums), up = As::get(sums + 16);
        const F16 g = min(most, gate), u = add(max(least, min(most, up)), one);  // NaN stays NaN
        const F16 sigmoid = div(one, add(one, exp(mul(g, set1(-alpha)))));
        const F16 swish = mul(g, sigmoid), value = mul(swish, u);
        total = fma(gradient, value, total);
        const F16 weighted = mul(gradient, set1(weight));
        const F16 slope = mul(sigmoid, fma(mul(g, set1(alpha)), sub(one, sigmoid), one));
        const F16 of_gate = mul(weighted, mul(u, slope)), of_up = mul(weighted, swish);
        As::put(of_sums, keep_above(of_gate, sub(zero(), gate), -limit));
        As::put(of_sums + 16, keep_above(of_up, sub(zero(), abs(up)), -limit));
        if (count < 16) {
            As::put(rest, value);
            std::memcpy(hidden + f, rest, count * sizeof(Number));
        } else {
            As::put(hidden + f, value);
        }
    }
    for (; f % kBlock; f += 16, of_sums += 32) As::put(of_sums, zero()), As::put(of_sums + 16, zero());
    return sum(total);
}

float swiglu_backward(const void* of_hidden, const void* sums, size_t F, float weight, float alpha, float limit,
                      void* of_sums, void* hidden, bool narrow) {
    if (narrow)
        return swiglu_backward_as<Narrow>(static_cast<const uint16_t*>(of_hidden), static_cast<const uint16_t*>(sums),
                                          F, weight, alpha, limit, static_cast<uint16_t*>(of_sums),
                                          static_cast<uint16_t*>(hidden));
    return swiglu_backward_as<Plain>(static_cast<const float*>(of_hidden), static_cast<const float*>(sums), F, weight,
                                     alpha, limit, static_cast<float*>(of_sums), static_cast<float*>(hidden));
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

void kv_store(const float* x, const KvPages& kv, bool is_value, size_t at, size_t row) {
    const size_t H = kv.H;
    void* target = is_value ? kv.values : kv.keys;
    const size_t first = is_value ? row * H : row, step = is_value ? 1 : kPage;  // of its numbers, but for pairs
    switch (kv.type) {
        case KvType::f32: {
            float* page = static_cast<float*>(target) + at;
            for (size_t h = 0; h < H; ++h) page[first + h * step] = x[h];
            return;
        }
        case KvType::bf16: {
            uint16_t* page = static_cast<uint16_t*>(target) + at;
            if (is_value) {
                for (size_t h = 0; h < H; ++h) page[first + h] = narrowed_bf16(x[h]);
            } else {
                uint16_t* pair = page + 2 * row;
                for (size_t h = 0; h < H; h += 2, pair += 2 * kPage)
                    pair[0] = narrowed_bf16(x[h]), pair[1] = narrowed_bf16(x[h + 1]);
            }
            return;
        }
        case KvType::q8: {
            int8_t* page = static_cast<int8_t*>(target) + at;
            uint16_t* scales = (is_value ? kv.value_scales : kv.key_scales) + at / kBlock;
            for (size_t b = 0; b < H / kBlock; ++b) {
                const F16 low = load(x + b * kBlock), high = load(x + b * kBlock + 16);
                const float peak = peak_of(low, high);
                const uint16_t scale = to_f16(peak / 127.0f);
                const float size = from_f16(scale);
                const F16 factor = set1(size > 0 ? 1.0f / size : 0.0f);
                const F16 most = set1(127.0f), least = set1(-127.0f);
                int8_t numbers[kBlock];
                store_i8(numbers, max(min(round(mul(low, factor)), most), least));
                store_i8(numbers + 16, max(min(round(mul(high, factor)), most), least));
                scales[is_value ? row * (H / kBlock) + b : row + b * kPage] = scale;
                for (size_t i = 0; i < kBlock; ++i) page[first + (b * kBlock + i) * step] = numbers[i];
            }
        }
    }
}

// Memory that is needed next: a product asks for some of it in passing, with every four k, at four places.
struct Ahead {
    const uint8_t *next, *end;
    size_t apart, step;

    // `times` is how often the product asks.
    Ahead(const void* from, size_t bytes, size_t times)
        : next(static_cast<const uint8_t*>(from)),
          end(next + bytes),
          apart(times * 64 >= bytes ? 0 : bytes / 4),
          step(bytes ? 64 : 0) {
        if (apart) end = next + apart;
    }
    [[gnu::always_inline]] void ask() {
        __builtin_prefetch(next);
        __builtin_prefetch(next + apart);
        __builtin_prefetch(next + 2 * apart);
        __builtin_prefetch(next + 3 * apart);
        next += step;
    }
    void stop_at_end() {
        if (next >= end) step = 0;
    }
};

// The right side of a product as it lies in memory: `at` widens 16 columns of rows k … k + rows - 1.
struct Floats {
    static constexpr size_t rows = 1;
    const float* data;
    size_t stride;
    void at(size_t k, size_t column, F16* out) const { out[0] = load(data + k * stride + column); }
};
struct Bf16Rows {
    static constexpr size_t rows = 1;
    const uint16_t* data;
    size_t stride;
    void at(size_t k, size_t column, F16* out) const { out[0] = load_bf16(data + k * stride + column); }
};
struct Bf16Pairs {  // (K / 2, columns, 2): one load brings two rows, and nothing is shuffled
    static constexpr size_t rows = 2;
    const uint16_t* data;
    size_t columns;
    void at(size_t k, size_t column, F16* out) const {
        const F16 pairs = load(reinterpret_cast<const float*>(data + k * columns + 2 * column));
        out[0] = bf16_low(pairs), out[1] = bf16_high(pairs);
    }
};

// c (R, 16 C columns of a row of `stride`) = a (R rows of K values, a_stride apart) * b (K rows, from `column` on)
template <size_t R, size_t C, class Right>
inline void micro(const float* a, size_t a_stride, const Right& b, size_t column, size_t K, float* c, size_t stride,
                  bool accumulate, Ahead& ahead) {
    F16 sums[R][C];
    for (size_t r = 0; r < R; ++r)
        for (size_t n = 0; n < C; ++n) sums[r][n] = accumulate ? load(c + r * stride + n * 16) : zero();
    // Inlined by force, or GCC might keep the sums in memory.
    const auto add = [&](size_t k) __attribute__((always_inline)) {
        F16 columns[C][Right::rows];
        for (size_t n = 0; n < C; ++n) b.at(k, column + n * 16, columns[n]);
        for (size_t i = 0; i < Right::rows; ++i)
            for (size_t r = 0; r < R; ++r) {
                const F16 value = set1(a[r * a_stride + k + i]);
                for (size_t n = 0; n < C; ++n) sums[r][n] = fma(value, columns[n][i], sums[r][n]);
            }
    };
    size_t k = 0;
    for (; k + 4 <= K; k += 4) {
        ahead.ask();
        for (size_t i = 0; i < 4; i += Right::rows) add(k + i);
    }
    for (; k < K; k += Right::rows) add(k);
    for (size_t r = 0; r < R; ++r)
        for (size_t n = 0; n < C; ++n) store(c + r * stride + n * 16, sums[r][n]);
    ahead.stop_at_end();
}

// Vectors of columns that a product of R rows takes at once.
constexpr size_t columns_at_once(size_t R) { return R * 4 <= kSums ? 4 : R * 2 <= kSums ? 2 : 1; }

// How many tiles a product has.
template <size_t R>
size_t num_tiles(size_t rows, size_t columns) {
    const size_t tiles = rows / R * ceil_div(columns, 16 * columns_at_once(R));
    if constexpr (R > 1)
        if (rows % R) return tiles + num_tiles<R - 1>(rows % R, columns);
    return tiles;
}

// R rows at once, of as many columns as keep the multipliers busy, and then what is left of the rows.
// Each sum runs over k in order, whichever way rows and columns are taken.
template <size_t R, class Right>
inline void multiply(const float* a, size_t a_stride, const Right& b, size_t K, float* c, size_t stride, size_t rows,
                     size_t columns, bool accumulate, Ahead& ahead) {
    constexpr size_t C = columns_at_once(R);
    size_t r = 0;
    for (; r + R <= rows; r += R) {
        size_t n = 0;
        for (; n + C * 16 <= columns; n += C * 16)
            micro<R, C>(a + r * a_stride, a_stride, b, n, K, c + r * stride + n, stride, accumulate, ahead);
        for (; C > 1 && n < columns; n += 16)
            micro<R, 1>(a + r * a_stride, a_stride, b, n, K, c + r * stride + n, stride, accumulate, ahead);
    }
    if constexpr (R > 1)
        if (r < rows)
            multiply<R - 1>(a + r * a_stride, a_stride, b, K, c + r * stride, stride, rows - r, columns, accumulate,
                            ahead);
}

// The keys of a page's head, from element `at` on, as floats: (H, kPage)
void widen_keys(const KvPages& kv, size_t at, float* keys) {
    if (kv.type == KvType::bf16) {
        const Bf16Pairs pairs{static_cast<const uint16_t*>(kv.keys) + at, kPage};
        for (size_t h = 0; h < kv.H; h += 2)
            for (size_t j = 0; j < kPage; j += 16) {
                F16 two[2];
                pairs.at(h, j, two);
                store(keys + h * kPage + j, two[0]), store(keys + (h + 1) * kPage + j, two[1]);
            }
        return;
    }
    const int8_t* numbers = static_cast<const int8_t*>(kv.keys) + at;
    const uint16_t* halves = kv.key_scales + at / kBlock;
    for (size_t b = 0; b < kv.H; b += kBlock, halves += kPage) {
        float scales[kPage];
        for (size_t j = 0; j < kPage; ++j) scales[j] = from_f16(halves[j]);
        for (size_t i = b * kPage; i < (b + kBlock) * kPage; i += 16)
            store(keys + i, mul(load_i8(numbers + i), load(scales + i % kPage)));
    }
}

// `count` values of a page's head, from element `at` on, as floats: (count, padded H)
void widen_values(const KvPages& kv, size_t at, size_t count, float* values) {
    const size_t H = kv.H, padded = padded_head(H);
    for (size_t j = 0; j < count; ++j, at += H, values += padded) {
        size_t i = 0;
        if (kv.type == KvType::f32) {
            std::memcpy(values, static_cast<const float*>(kv.values) + at, H * sizeof(float));
            i = H;
        } else if (kv.type == KvType::q8) {
            const int8_t* numbers = static_cast<const int8_t*>(kv.values) + at;
            const uint16_t* scales = kv.value_scales + at / kBlock;
            for (; i < H; i += 16) store(values + i, mul(load_i8(numbers + i), set1(from_f16(scales[i / kBlock]))));
        } else {
            const uint16_t* numbers = static_cast<const uint16_t*>(kv.values) + at;
            for (; i + 16 <= H; i += 16) store(values + i, load_bf16(numbers + i));
            for (; i < H; ++i) {
                const uint32_t bits = uint32_t{numbers[i]} << 16;
                std::memcpy(values + i, &bits, sizeof bits);
            }
        }
        for (; i < padded; ++i) values[i] = 0.0f;
    }
}

// Scores become weights, exp(score - peak), but 0 outside [low, high) of `count` (a multiple of 16).
inline void weigh(float* row, size_t count, int64_t low, int64_t high, float* peak, float* sum_of_all) {
    const auto end = static_cast<int64_t>(count);
    low = lesser(greater(low, int64_t{0}), end), high = greater(lesser(high, end), low);
    for (int64_t j = 0; j < low; ++j) row[j] = -INFINITY;
    for (int64_t j = high; j < end; ++j) row[j] = -INFINITY;
    F16 most = set1(-INFINITY);
    for (size_t j = 0; j < count; j += 16) most = max(load(row + j), most);
    *peak = largest(most);
    const F16 shift = set1(low < high ? *peak : 0.0f);  // with nothing in sight all weights are 0
    F16 total = zero();
    for (size_t j = 0; j < count; j += 16) {
        const F16 shifted = sub(load(row + j), shift);
        // exp clamps: what is masked must be zero, and so is what lies far below
        const F16 weight = keep_above(exp(shifted), shifted, -87.0f);
        total = add(total, weight);
        store(row + j, weight);
    }
    *sum_of_all = sum(total);
}

// All scores come first and then all weights, so that no result has to be scaled down when a larger score turns up.
void attend(const AttentionPiece& piece, const KvPages& kv) {
    constexpr size_t S = kSplit;
    const size_t H = kv.H, padded = padded_head(H), rows = piece.rows;
    const auto count = static_cast<size_t>(piece.last_key - piece.first_key), pages = ceil_div(count, kPage);
    const int32_t* table = piece.pages + static_cast<size_t>(piece.first_key) / kPage;
    float* widened = piece.scratch;             // keys (H, kPage) or values (kPage, padded H) of a page
    float* weights = widened + kPage * padded;  // (rows, S): scores at first
    // For few rows it is not worth while to widen bfloat16 first.
    const bool few = kv.type == KvType::bf16 && rows <= 2 * kRows;
    const size_t size = kv.type == KvType::f32 ? 4 : kv.type == KvType::bf16 ? 2 : 1, bytes = kPage * H * size;
    auto place = [&](size_t page) { return kv.at(static_cast<size_t>(table[page]), piece.head); };
    auto address = [&](const void* data, size_t page) {
        return static_cast<const uint8_t*>(data) + place(page) * size;
    };

    const size_t tiles = few ? num_tiles<kRows>(rows, kPage) : num_tiles<kManyRows>(rows, kPage);
    const size_t value_tiles = few && padded == H ? num_tiles<kRows>(rows, padded) : num_tiles<kManyRows>(rows, padded);

    for (size_t page = 0; page < pages; ++page) {
        Ahead ahead(page + 1 < pages ? address(kv.keys, page + 1) : address(kv.values, 0), bytes, tiles * (H / 4));
        float* scores = weights + page * kPage;
        if (few) {
            const Bf16Pairs keys{reinterpret_cast<const uint16_t*>(address(kv.keys, page)), kPage};
            multiply<kRows>(piece.q, H, keys, H, scores, S, rows, kPage, false, ahead);
        } else {
            if (kv.type != KvType::f32) widen_keys(kv, place(page), widened);
            const Floats keys{kv.type == KvType::f32 ? static_cast<const float*>(kv.keys) + place(page) : widened,
                              kPage};
            multiply<kManyRows>(piece.q, H, keys, H, scores, S, rows, kPage, false, ahead);
        }
    }

    for (size_t r = 0; r < rows; ++r)
        weigh(weights + r * S, pages * kPage, piece.limits[2 * r] - piece.first_key,
              lesser(piece.limits[2 * r + 1], piece.last_key) - piece.first_key, piece.peak + r, piece.sum + r);

    std::memset(piece.out, 0, rows * padded * sizeof(float));
    const int64_t end = piece.limits[2 * rows - 1];  // until there, the next piece probably goes on
    for (size_t page = 0; page < pages; ++page) {
        const bool last = page + 1 == pages;
        const size_t K = last ? count - page * kPage : kPage;
        const bool over = last && piece.last_key == end;
        Ahead ahead(last ? address(kv.keys, over ? page : page + 1) : address(kv.values, page + 1), over ? 0 : bytes,
                    value_tiles * (kPage / 4));
        const float* of_page = weights + page * kPage;
        if (few && padded == H) {
            const Bf16Rows values{reinterpret_cast<const uint16_t*>(address(kv.values, page)), H};
            multiply<kRows>(of_page, S, values, K, piece.out, padded, rows, padded, true, ahead);
        } else {
            widen_values(kv, place(page), K, widened);
            multiply<kManyRows>(of_page, S, Floats{widened, padded}, K, piece.out, padded, rows, padded, true, ahead);
        }
    }
}

// --- attention for training ------------------------------------------------------------------------------------------
//
// Scores lie with 16 queries side by side and keys below each other: so softmax needs no sums across lanes, and each
// product is one from the left.

// Up to 16 rows of n floats, side by side: (n, 16), lanes without a row are 0.
inline void turn(const float* rows, size_t stride, size_t count, size_t n, float factor, float* out) {
    for (size_t lane = 0; lane < kPanel; ++lane)
        for (size_t i = 0; i < n; ++i) out[i * kPanel + lane] = lane < count ? rows[lane * stride + i] * factor : 0.0f;
}

inline void turn_back(const float* columns, size_t count, size_t n, float factor, float* rows, size_t stride) {
    for (size_t lane = 0; lane < count; ++lane)
        for (size_t i = 0; i < n; ++i) rows[lane * stride + i] = columns[i * kPanel + lane] * factor;
}

// 0 for the queries in sight of a key, 1 for the others. `at` are the queries' positions.
inline F16 out_of_sight(F16 at, size_t key, size_t window) {
    const F16 one = set1(1.0f);
    F16 seen = keep_above(one, at, static_cast<float>(key));
    if (window) seen = keep_above(seen, sub(zero(), at), -static_cast<float>(key + window - 1));
    return sub(one, seen);
}

// Rows of K numbers times those of 16 queries below each other.
inline LeftProduct of_rows(const float* rows, size_t stride, size_t count, const float* queries, size_t K, float* out) {
    return {rows, stride, 1, queries, 0, out, 0, kPanel, count, 1, K, false};
}

// Scores of a group of 16 queries from `first` on, with the keys from `low` to `high`, but -1e30 where out of sight.
inline void turned_scores(const SelfAttentionPiece& piece, const float* q, size_t first, float* scores) {
    const size_t keys = piece.last_key - piece.first_key;
    multiply_left(of_rows(piece.k + piece.first_key * piece.kv_stride, piece.kv_stride, keys, q, piece.H, scores));
    float positions[kPanel];
    for (size_t i = 0; i < kPanel; ++i) positions[i] = static_cast<float>(first + i);
    const F16 at = load(positions);
    for (size_t j = 0; j < keys; ++j) {
        const size_t key = piece.first_key + j;
        if (key <= first && (!piece.window || first + kPanel <= key + piece.window)) continue;
        float* row = scores + j * kPanel;
        store(row, fma(out_of_sight(at, key, piece.window), set1(-1e30f), load(row)));
    }
}

inline F16 exp_or_zero(F16 x) { return keep_above(exp(x), x, -87.0f); }  // exp clamps

void self_attend_backward(const SelfAttentionPiece& piece) {
    const size_t H = piece.H, keys = piece.last_key - piece.first_key, groups = ceil_div(H, kPanel);
    const size_t padded = groups * kPanel;
    float* q = piece.scratch;                // (H, 16)
    float* gradient = q + H * kPanel;        // (H, 16)
    float* of_q = gradient + H * kPanel;     // (H, 16)
    float* q_rows = of_q + H * kPanel;       // (groups, 16, 16): 16 queries below each other
    float* rows = q_rows + padded * kPanel;  // the same of the gradient
    float* weights = rows + padded * kPanel;
    float* of_scores = weights + keys * kPanel;
    for (size_t first = piece.first_query; first < piece.last_query; first += kPanel) {
        const size_t count = piece.last_query - first < kPanel ? piece.last_query - first : kPanel;
        turn(piece.q + first * piece.q_stride, piece.q_stride, count, H, piece.scale, q);
        turn(piece.gradient + first * piece.q_stride, piece.q_stride, count, H, 1.0f, gradient);
        for (size_t i = 0; i < padded; ++i)
            for (size_t lane = 0; lane < kPanel; ++lane) {
                const size_t to = (i / kPanel * kPanel + lane) * kPanel + i % kPanel;
                q_rows[to] = i < H ? q[i * kPanel + lane] : 0.0f;
                rows[to] = i < H ? gradient[i * kPanel + lane] : 0.0f;
            }
        float logsums[kPanel], common[kPanel];
        for (size_t i = 0; i < kPanel; ++i) {
            logsums[i] = i < count ? piece.logsum[(first + i) * piece.logsum_stride] : 0.0f;
            common[i] = i < count ? piece.common[(first + i) * piece.logsum_stride] : 0.0f;
        }
        turned_scores(piece, q, first, weights);
        multiply_left(
            of_rows(piece.v + piece.first_key * piece.kv_stride, piece.kv_stride, keys, gradient, H, of_scores));
        const F16 logsum = load(logsums), shift = load(common);
        for (size_t j = 0; j < keys; ++j) {
            const F16 weight = exp_or_zero(sub(load(weights + j * kPanel), logsum));
            store(weights + j * kPanel, weight);
            store(of_scores + j * kPanel, mul(weight, sub(load(of_scores + j * kPanel), shift)));
        }
        multiply_left(of_rows(piece.turned + piece.first_key, piece.turned_stride, H, of_scores, keys, of_q));
        turn_back(of_q, count, H, piece.scale, piece.of_q + first * piece.q_stride, piece.q_stride);
        const size_t offset = piece.first_key * kPanel;
        LeftProduct to_keys = of_rows(of_scores, kPanel, keys, q_rows, kPanel, piece.of_k + offset);
        to_keys.b_group = kPanel * kPanel;
        to_keys.c_group = piece.of_kv_group;
        to_keys.groups = groups;
        to_keys.accumulate = true;
        LeftProduct to_values = to_keys;
        to_values.weights = weights;
        to_values.b = rows;
        to_values.c = piece.of_v + offset;
        multiply_left(to_keys);
        multiply_left(to_values);
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
