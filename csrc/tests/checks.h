// What the checks share: the settings of a run, plain definitions in double precision, and packed matrices.
#pragma once

#include <functional>
#include <limits>
#include <vector>

#include "kernels/ops.h"
#include "tests/support.h"

namespace test {

using namespace freehold;

inline bool quick = false;                // fewer sizes, for emulators
inline std::vector<const Kernels*> sets;  // the instruction sets under test

inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
inline constexpr float kInf = std::numeric_limits<float>::infinity();
inline constexpr double kTiny = 1e-37;  // what underflows may be off by so much
inline constexpr Form kForms[] = {Form::mxfp4, Form::q8, Form::bf16, Form::f32};
inline constexpr KvType kKvTypes[] = {KvType::f32, KvType::bf16, KvType::q8};

void check_half();
void check_quantise();
void check_dots(Form form);
void check_elementwise();
void check_argmax();
void check_speed_probes();

void check_rms_norm();
void check_rope();
void check_linear(Form form);
void check_linear_backward(Form form);
void check_add_product();
void check_widen(Form form);
void check_swiglu_backward();
void check_route();
void check_moe(Form gate_up_form, Form down_form);
void check_add_lora();
void check_sample();
void check_nan();

void check_kv_write(KvType type);
void check_attend();
void check_attention(KvType type);
void check_attention_backward();
void check_batches();
void check_nan_in_attention();

void check_pool();
void check_shared_engine();

const char* name_of(Form form);
const char* name_of(KvType type);

template <class T>
std::vector<T> sizes(std::initializer_list<T> all, std::initializer_list<T> few) {
    return quick ? few : all;
}
std::vector<size_t> token_counts();
// Some tokens of T, to be run alone.
std::vector<size_t> loners(size_t T);

Engine& engine_of(unsigned threads);  // 1 to 4

// Calls check(kernels) with each instruction set in use.
void on_each_set(const std::string& what, const std::function<void(const Kernels&)>& check);

// What `run` writes, `count` floats, after making sure that other numbers of threads write the same.
Buffer<float> on_any_threads(size_t count, const std::function<void(Engine&, float*)>& run);

// --- plain definitions ---------------------------------------------------------------------------------------------

bool quantised(Form form);

struct QuantisedRow {
    std::vector<int> numbers;   // whole blocks
    std::vector<float> scales;  // one a block
    double at(size_t c) const { return static_cast<double>(numbers[c]) * scales[c / 32]; }
};

QuantisedRow quantise_plainly(const float* x, size_t C);

// What a matrix of this form multiplies with: the row itself, or what quantising leaves of it.
std::vector<double> seen_by(Form form, const float* x, size_t C);

struct Sum {
    double value = 0, terms = 0;  // terms: of their magnitudes
};

Sum dot(const double* a, const double* b, size_t n);

double swiglu_plainly(double gate, double up, double alpha, double limit);

// cos and sin of random angles, (T, H / 2) each.
struct Angles {
    Buffer<float> cos, sin;
    Angles(Random& random, size_t T, size_t H);
};

// --- packed matrices -----------------------------------------------------------------------------------------------

// A stack of E packed matrices of R x C, with the values that it stands for.
class Weights {
  public:
    // `extreme` takes the largest magnitudes only, where narrow sums would overflow.
    Weights(Random& random, Form form, size_t E, size_t R, size_t C, bool paired = false, bool extreme = false);
    size_t rows() const { return R_; }
    size_t columns() const { return C_; }
    Matrix matrix() const;
    const double* row(size_t e, size_t r) const { return values_.data() + (e * R_ + r) * C_; }

  private:
    void fill_row(Random& random, size_t e, size_t panel, size_t lane, bool extreme);

    Form form_;
    size_t R_, C_, panels_, blocks_;
    bool paired_;
    Buffer<uint8_t> bytes_;
    Buffer<uint16_t> words_;
    Buffer<float> floats_;
    Buffer<uint8_t> exponents_;
    Buffer<uint16_t> halves_;
    std::vector<double> values_;
};

}  // namespace test
