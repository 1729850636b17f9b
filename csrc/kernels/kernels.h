// The innermost loops, one set per instruction set, picked once at run time. Everything here runs on the calling
// thread, allocates nothing and checks nothing. All of a token's sums run in an order that depends neither on the
// other tokens of its tile nor on the number of threads.
#pragma once

#include "kernels/types.h"

namespace freehold {

inline constexpr size_t kPage = 64;  // positions

// Keys and values of one layer, in pages that belong to any sequence; the caller owns the memory. Each lies as the
// right side of its product does, so that 16 neighbouring results come from one vector:
//   keys    (count, K, H, kPage), in bf16 (count, K, H / 2, kPage, 2); scales of q8 (count, K, H / 32, kPage), float16
//   values  (count, K, kPage, H);                                      scales of q8 (count, K, kPage, H / 32), float16
// freehold/kernels/kv.py is where Python has this layout.
struct KvPages {
    KvType type;
    void* keys;
    void* values;
    uint16_t* key_scales;
    uint16_t* value_scales;
    size_t count, K, H;

    // The first element of a page's head.
    [[gnu::always_inline]] size_t at(size_t page, size_t head) const { return (page * K + head) * kPage * H; }
};

// One piece of attention: queries of one sequence, of one kv head's group, over a run of keys that starts at a multiple
// of the split length. Rows are (query, head of the group). Partial results are merged by the caller.
//   q       rows x H, already scaled
//   limits  rows x 2: first and one past the last visible key, as positions of the sequence; the last row sees the last
//   pages   of the sequence
//   out     rows x padded H, peak and sum (rows): unnormalised result, largest score, sum of exponentials
struct AttentionPiece {
    const float* q;
    const int64_t* limits;
    const int32_t* pages;
    size_t rows, head;
    int64_t first_key, last_key;
    float* out;
    float* peak;
    float* sum;
    float* scratch;  // attention_scratch(rows, H) floats
};

[[gnu::always_inline]] constexpr size_t padded_head(size_t H) { return ceil_div(H, kPanel) * kPanel; }

// One piece of attention's gradient: one head's queries of one sequence, from `first_query` to `last_query`, over the
// keys that one or the other of them sees. Queries and keys are counted from the sequence's start, which the pointers
// are to; q_stride is that of q, gradient and of_q, kv_stride that of k and v.
struct SelfAttentionPiece {
    const float *q, *k, *v;
    size_t q_stride, kv_stride, H, window;  // 0 for no window
    float scale;
    const float* turned;  // (H, positions), `turned_stride` apart: the keys
    size_t turned_stride;
    size_t first_query, last_query, first_key, last_key;
    const float* logsum;  // logarithm of each softmax's sum, `logsum_stride` apart
    size_t logsum_stride;
    const float *gradient, *common;  // common: the sum of out * gradient
    float* of_q;
    float *of_k, *of_v;  // (H / 16, positions, 16), groups `of_kv_group` apart; added to
    size_t of_kv_group;
    float* scratch;  // self_attention_scratch floats
};

inline constexpr size_t kQueries = 64;  // of a piece
constexpr size_t self_attention_scratch(size_t keys, size_t H) { return (5 * padded_head(H) + 2 * keys) * kPanel; }

inline constexpr int64_t kSplit = 512;  // keys whose partial result is merged as a whole

constexpr size_t attention_scratch(size_t rows, size_t H) { return kPage * padded_head(H) + rows * kSplit; }

// c (columns, groups of 16) = or += weights (columns, K) * b (K, groups of 16): numbers that are read one by one times
// some that lie side by side. Distances are in floats.
struct LeftProduct {
    const float* weights;  // of column n and depth k at n * weight_column + k * weight_step
    size_t weight_column, weight_step;
    const float* b;  // (groups, K, 16), groups `b_group` apart
    size_t b_group;
    float* c;  // of group g and column n at g * c_group + n * c_column
    size_t c_group, c_column;
    size_t columns, groups, K;
    bool accumulate;
};

struct Kernels {
    const char* name;
    size_t q8_bytes, mxfp4_bytes;  // of a token's block of quantised activations, as dot_q8 and dot_mxfp4 read it

    // acc (panels, kTile, 16): for each of some consecutive panels, its 16 rows times every token of a tile. C is the
    // number of columns, B the number of blocks.
    void (*dot_mxfp4)(const uint8_t* codes, const uint8_t* scales, size_t B, size_t panels, const Tile& x, float* acc);
    void (*dot_q8)(const uint8_t* weights, const uint8_t* scales, size_t B, size_t panels, const Tile& x, float* acc);
    void (*dot_bf16)(const uint8_t* weights, size_t C, size_t panels, const Tile& x, float* acc);
    void (*dot_f32)(const uint8_t* weights, size_t C, size_t panels, const Tile& x, float* acc);

    // Some columns of a panel's 16 rows as floats: column c to out + c * stride. data and scales are those of the first
    // column, which begins a block; a quantised panel fills whole blocks of columns.
    void (*widen)(Form form, const uint8_t* data, const uint8_t* scales, size_t columns, float* out, size_t stride);
    void (*multiply_left)(const LeftProduct& product);

    // n floats, a multiple of 16, as bfloat16.
    void (*narrow)(const float* x, size_t n, uint16_t* out);

    // Quantise x (n floats, padded with zeros to whole blocks) as token t of a tile.
    void (*quantise)(const float* x, size_t n, const Tile& tile, size_t t);
    // The same for one block b; x has 32 floats.
    void (*quantise_block)(const float* x, const Tile& tile, size_t t, size_t b);

    // out = weight * x / sqrt(mean x^2 + eps), D floats; out may be x.
    void (*rms_norm)(const float* x, const float* weight, float* out, size_t D, float eps);
    // Its gradient for x; of_x may be of_out.
    void (*rms_norm_backward)(const float* x, const float* weight, const float* of_out, float* of_x, size_t D,
                              float eps);
    // out (16) = min(gate, limit) * sigmoid(alpha * that) * (clamp(up) + 1), gate and up with their biases added.
    void (*swiglu)(const float* gate, const float* up, const float* gate_bias, const float* up_bias, float* out,
                   float alpha, float limit);
    // Its gradient for one row of F hidden values. sums: 16 gates, their 16 ups, and so on, biases added, padded to
    // whole units with whatever; of_sums likewise, padded with zeros. hidden is computed again. What was clamped gets
    // no gradient; a value at the limit does. of_sums is multiplied by `weight`; returned is the sum of hidden *
    // of_hidden. All rows are in bfloat16 where `narrow`, else in float32.
    float (*swiglu_backward)(const void* of_hidden, const void* sums, size_t F, float weight, float alpha, float limit,
                             void* of_sums, void* hidden, bool narrow);
    // One head: rotate the pairs (i, i + H/2).
    void (*rope)(const float* x, const float* cos, const float* sin, float* out, size_t H);
    // Store one head of one position, row `row` of the page's head that begins at element `at`.
    void (*kv_store)(const float* x, const KvPages& kv, bool is_value, size_t at, size_t row);
    void (*attend)(const AttentionPiece& piece, const KvPages& kv);
    void (*self_attend_backward)(const SelfAttentionPiece& piece);
    // exp(x[i] - peak), for merging.
    float (*exp1)(float x);
    // out[i] = exp((x[i] - peak) * factor), 0 below e^-87; out has room for n rounded up to 16, and gets zeros there.
    void (*exp_all)(const float* x, size_t n, float peak, float factor, float* out);
    // Sum of n floats, n a multiple of 16.
    float (*sum_all)(const float* x, size_t n);
    // Index of the largest of n > 0 values, the first of equals; NaN counts as the smallest.
    size_t (*argmax)(const float* x, size_t n);

    // Multiply-adds done by `rounds` of this set's int8 dot product on registers alone, for the roofline.
    double (*spin_dots)(size_t rounds);
    // Sum of n bytes, for the read bandwidth; n is a multiple of 64.
    uint64_t (*read)(const uint8_t* data, size_t n);
};

// The set in use: at first the best that this processor has.
const Kernels& kernels();
// A set by name (scalar, avx2, avx512, neon); null where this processor or this build lacks it.
const Kernels* kernels_named(const char* name);
// Change the set in use; false where it cannot run here.
bool use_kernels(const char* name);

inline constexpr size_t kPanelsAtOnce = 4;
using PanelSums = float[kPanelsAtOnce][kTile * kPanel];

// Panels first … first + count - 1 of a matrix times a tile; count <= kPanelsAtOnce.
inline void dot_panels(const Kernels& k, const Matrix& w, size_t first, size_t count, const Tile& x, PanelSums& sums) {
    float* acc = sums[0];
    switch (w.form) {
        case Form::mxfp4:
            return k.dot_mxfp4(w.panel_data(first), w.panel_scales(first), w.blocks(), count, x, acc);
        case Form::q8:
            return k.dot_q8(w.panel_data(first), w.panel_scales(first), w.blocks(), count, x, acc);
        case Form::bf16:
            return k.dot_bf16(w.panel_data(first), w.C, count, x, acc);
        case Form::f32:
            return k.dot_f32(w.panel_data(first), w.C, count, x, acc);
    }
}

// Of a token's block of activations that will meet quantised weights.
inline size_t block_bytes(const Kernels& k, Form form) { return form == Form::mxfp4 ? k.mxfp4_bytes : k.q8_bytes; }

}  // namespace freehold
