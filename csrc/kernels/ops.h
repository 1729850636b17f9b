// The ops of freehold/kernels/ops.py, over raw pointers: kernels put together and spread over threads.
//
// All matrices of activations are float32, row-major; a stride is in floats from one row to the next. The caller owns
// the memory of every argument; an op may use the pool's threads and the workspace, and keeps nothing. One op runs at
// a time: each takes the engine's lock. Results do not depend on the number of threads, nor a token's on the others.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "kernels/kernels.h"
#include "kernels/threads.h"

namespace freehold {

// Memory that ops reuse. Grows to what the largest call needs.
class Workspace {
  public:
    // Pieces are handed out one after the other, each aligned to 64 bytes. Call `reset` with their sum first.
    void reset(size_t bytes);
    template <class T>
    T* take(size_t count) {
        T* piece = reinterpret_cast<T*>(data_.get() + used_);
        used_ += size_of<T>(count);
        return piece;
    }
    template <class T>
    static size_t size_of(size_t count) {
        return ceil_div(count * sizeof(T), 64) * 64;
    }
    size_t capacity() const { return capacity_; }
    void release();

  private:
    struct Free {
        void operator()(uint8_t* data) const;
    };
    std::unique_ptr<uint8_t, Free> data_;
    size_t capacity_ = 0, used_ = 0;
};

struct LinearArgs {
    const float* x;  // (T, C)
    size_t T, stride;
    const float* norm;  // (C) or null: x goes through rms_norm first
    float eps;
    const float* bias;      // (R) or null
    const float* residual;  // (T, R) or null: added to the result; may be `out`
    float* out;             // (T, R)
};

struct LinearBackwardArgs {
    const float* gradient;  // (T, R), of the result
    size_t T, stride;
    float* out;  // (T, C), of the input
};

// A matrix as it lies, distances in floats.
struct Strided {
    const float* data;
    size_t row, column;
};

struct ProductArgs {
    Strided left;   // (M, K)
    Strided right;  // (K, N)
    size_t M, K, N;
    float* out;  // (M, N), added to
};

// Two small f32 factors by which a product x * wT gains scaling * (x * aT) * bT: a is (R, C), and b has the rows of w.
// Of a mixture they are the first of E each, and b is paired where w is.
struct Lora {
    Matrix a, b;
    float scaling;
};

// What one adapter adds inside a mixture; null where it leaves a matrix alone.
struct ExpertLora {
    const Lora* gate_up;
    const Lora* down;
};

// What adapters add to the result of a linear layer. Part i is for the tokens whose number in `rows` is part_rows[i],
// and for the columns of the result from part_columns[i] on.
struct AddLoraArgs {
    const float* x;  // (T, C), what the layer read
    size_t T, stride;
    const float* norm;  // (C) or null, as in LinearArgs
    float eps;
    const int64_t* rows;  // (T)
    size_t num_parts;
    const Lora* const* parts;
    const int64_t* part_rows;
    const size_t* part_columns;
    float* out;  // (T, out_stride)
    size_t out_stride;
};

// What a gradient asks `moe` to leave behind, null for what it does not. Visits are pairs of a token and an expert,
// sorted by expert, by adapter and by token. The rows are what the adapters' first factors make of the input, scaled:
// of one adapter alone, and as wide as its panels.
struct MoeKept {
    void* sums = nullptr;  // (visits, 64 for each 32 hidden values): panels of gates and ups in turn, biases added
    bool narrow = false;   // these in bfloat16, else in float32
    float* gate_up_rows = nullptr;  // (visits, 16 * panels of a)
    float* down_rows = nullptr;
};

// Factors by which dropout multiplies what adapters see of the input, by visit; null for none.
struct MoeSeen {
    const float* x = nullptr;       // (visits, D)
    const float* hidden = nullptr;  // (visits, F)
};

struct MoeArgs {
    const float* x;  // (T, D)
    size_t T, A;
    const float* weights;    // (T, A)
    const int64_t* experts;  // (T, A), each in [0, E)
    size_t E;
    const float* gate_up_bias;  // (E, 2F), gate and up in turn
    const float* down_bias;     // (E, D)
    const float* residual;      // (T, D) or null
    float alpha, limit;
    float* out;                   // (T, D), neither x nor residual
    const float* norm = nullptr;  // (D) or null: x goes through rms_norm first
    float eps = 0.0f;
    size_t num_loras = 0;
    const ExpertLora* const* loras = nullptr;
    const int64_t* rows = nullptr;  // (T), below num_loras: each token's in `loras`, none where negative
    MoeSeen seen = {};
    MoeKept kept = {};
};

// The activation's gradient. All but the weights are in bfloat16 where `narrow`, else in float32.
struct SwigluBackwardArgs {
    size_t count, F;
    const void* of_hidden;  // (count, F), before the weights
    const void* sums;       // (count, 64 for each 32 hidden values), as moe leaves them
    const float* weights;   // (count)
    float alpha, limit;
    void* of_sums;      // as sums
    void* hidden;       // (count, F), computed again
    float* of_weights;  // (count): the sum of hidden * of_hidden
    bool narrow;
};

// cos and sin (T, H / 2) of each token's position, for who turns its heads along the way; null for heads as they are.
struct Rotation {
    const float* cos = nullptr;
    const float* sin = nullptr;
};

// Whose tokens a batch holds. Sequence b has tokens starts[b] … starts[b + 1] - 1, the last of its lengths[b]
// positions. Position p of it lies in page table[b * stride + p / kPage]; pages that nobody writes or sees may be named
// anything.
struct Sequences {
    size_t count;
    const int64_t* starts;   // (count + 1)
    const int64_t* lengths;  // (count)
    const int32_t* table;    // (count, stride)
    size_t stride;

    size_t tokens() const { return count ? static_cast<size_t>(starts[count]) : 0; }
    const int32_t* pages(size_t b) const { return table + b * stride; }
};

struct AttentionArgs {
    const float* q;  // (T, N, H), N * H consecutive, rows `stride` apart
    size_t N, stride;
    const float* sinks;  // (N)
    float scale;
    size_t window;  // keys in sight, the query itself counted; 0 for all
    float* out;     // (T, N, H)
    Rotation rotation = {};
    float* logsum = nullptr;  // (T, N) or null: the logarithm of each softmax's sum
};

// The gradient of `attention` for whole sequences, one after the other: sequence b has tokens starts[b] … starts[b + 1]
// - 1. q, out, gradient, of_q are (T, N, H), k, v, of_k, of_v (T, K, H), all contiguous.
struct SelfAttentionBackwardArgs {
    const float *q, *k, *v;
    size_t N, K, H, count;
    const int64_t* starts;
    float scale;
    size_t window;        // 0 for all
    const float* out;     // as attention left it
    const float* logsum;  // (T, N), and so this
    const float* gradient;
    float *of_q, *of_k, *of_v;
    float* common;  // (T, N): the sum of out * gradient
};

// The thread pool with its workspace.
class Engine {
  public:
    explicit Engine(unsigned threads) : pool_(threads) {}

    unsigned threads() const { return pool_.threads(); }
    size_t workspace_bytes() const { return workspace_.capacity(); }

    void rms_norm(const float* x, const float* weight, float* out, size_t T, size_t D, float eps);
    void rms_norm_backward(const float* x, const float* weight, const float* of_out, float* of_x, size_t T, size_t D,
                           float eps);
    void linear(const Matrix& w, const LinearArgs& args);
    // gradient * w, in float32 throughout. A few rows of w at a time are widened, by each thread for itself.
    void linear_backward(const Matrix& w, const LinearBackwardArgs& args);
    // out += left * right, where N or K or M is small: each sum runs over K in order.
    void add_product(const ProductArgs& args);
    // The values that a matrix stands for, turned round: out (C, 16 * panels), rows as they lie, in bfloat16 where
    // `narrow`, else in float32.
    void widen(const Matrix& w, bool narrow, void* out);
    void rope(const float* x, size_t stride, const float* cos, const float* sin, float* out, size_t T, size_t N,
              size_t H);
    // Write the batch's tokens, the keys turned. k and v are (T, K, H) with rows `k_stride` and `v_stride` apart. This
    // and `attention` throw std::out_of_range where a page that is needed does not exist.
    void kv_write(const KvPages& kv, const Sequences& sequences, const float* k, size_t k_stride, const float* v,
                  size_t v_stride, Rotation rotation = {});
    void attention(const KvPages& kv, const Sequences& sequences, const AttentionArgs& args);
    void self_attention_backward(const SelfAttentionBackwardArgs& args);
    void route(const float* logits, size_t T, size_t E, size_t A, float* weights, int64_t* experts);
    // Tokens that no part is for are left as they are.
    void add_lora(const AddLoraArgs& args);
    // gate_up and down are the first of E packed matrices each; gate_up is paired. Tokens without an adapter get the
    // same numbers whether or not others have one.
    void moe(const Matrix& gate_up, const Matrix& down, const MoeArgs& args);
    void swiglu_backward(const SwigluBackwardArgs& args);
    size_t argmax(const float* logits, size_t V);
    // Draw a token: keep the top_k largest (0: all), of these the likeliest that reach top_p, of these what has at
    // least min_p of the largest's probability; then take the one where the cumulated probability, in order of ids,
    // passes `uniform` in [0, 1). temperature > 0, and at least one logit is finite.
    size_t sample(const float* logits, size_t V, float temperature, size_t top_k, double top_p, float min_p,
                  double uniform);

    double read_gigabytes(const uint8_t* data, size_t bytes, double* checksum);
    double dot_rate(size_t rounds);

  private:
    ThreadPool pool_;
    Workspace workspace_;
    std::mutex busy_;
};

}  // namespace freehold
