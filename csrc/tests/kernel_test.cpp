// Every kernel of every instruction set that can run here, and every op built on them, against plain code in double
// precision. Stops at the first difference with a message and exit code 1.
//
//   kernel_test [--quick] [instruction set]...
//
// Results must also be the same to the bit for any number of threads, and for a token alone and among others.
#include <algorithm>
#include <chrono>
#include <functional>
#include <limits>
#include <thread>
#include <vector>

#include "kernels/half.h"
#include "kernels/ops.h"
#include "tests/support.h"

using namespace freehold;
using namespace test;

namespace {

bool quick = false;  // fewer sizes, for emulators
std::vector<const Kernels*> sets;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr double kTiny = 1e-37;  // what underflows may be off by so much
constexpr Form kForms[] = {Form::mxfp4, Form::q8, Form::bf16, Form::f32};
constexpr const char* kFormNames[] = {"mxfp4", "q8", "bf16", "f32"};
constexpr KvType kKvTypes[] = {KvType::f32, KvType::bf16, KvType::q8};
constexpr const char* kKvNames[] = {"f32", "bf16", "q8"};

const char* name_of(Form form) { return kFormNames[static_cast<int>(form)]; }
const char* name_of(KvType type) { return kKvNames[static_cast<int>(type)]; }

template <class T>
std::vector<T> sizes(std::initializer_list<T> all, std::initializer_list<T> few) {
    return quick ? few : all;
}
std::vector<size_t> token_counts() { return sizes<size_t>({0, 1, 2, 31, 33, 70}, {0, 1, 2, 33}); }

Engine& engine_of(unsigned threads) {
    static std::vector<std::unique_ptr<Engine>> engines(5);
    if (!engines[threads]) engines[threads] = std::make_unique<Engine>(threads);
    return *engines[threads];
}

// Calls check(kernels) with each instruction set in use.
template <class Check>
void on_each_set(const std::string& what, const Check& check) {
    for (const Kernels* set : sets) {
        use_kernels(set->name);
        where = std::string(set->name) + " " + what;
        check(*set);
    }
}

// What `run(engine, out)` writes, `count` floats, after making sure that other numbers of threads write the same.
template <class Run>
Buffer<float> on_any_threads(size_t count, const Run& run) {
    Buffer<float> out(count);
    run(engine_of(1), out.data());
    const std::string outer = where;
    for (unsigned threads : sizes({2u, 3u, 4u}, {3u})) {
        where = outer + text(", %u threads", threads);
        Buffer<float> again(count);
        run(engine_of(threads), again.data());
        expect_same_bits(again.data(), out.data(), count, "result");
    }
    where = outer;
    return out;
}

// Some tokens of T, to be run alone.
std::vector<size_t> loners(size_t T) {
    std::vector<size_t> tokens;
    for (size_t t : {size_t{0}, T / 3, T - 1})
        if (t < T && (tokens.empty() || tokens.back() != t)) tokens.push_back(t);
    return tokens;
}

// --- packed matrices -----------------------------------------------------------------------------------------------

// A stack of E packed matrices of R x C, with the values that it stands for.
class Weights {
  public:
    // `extreme` takes the largest magnitudes only, where narrow sums would overflow.
    Weights(Random& random, Form form, size_t E, size_t R, size_t C, bool paired = false, bool extreme = false)
        : form_(form),
          E_(E),
          R_(R),
          C_(C),
          panels_(paired ? (R / 2 + 31) / 32 * 4 : (R + 15) / 16),
          blocks_((C + 31) / 32),
          paired_(paired),
          bytes_(form == Form::mxfp4 ? E * panels_ * blocks_ * 256
                 : form == Form::q8  ? E * panels_ * blocks_ * 512
                                     : 0),
          words_(form == Form::bf16 ? E * panels_ * C * 16 : 0),
          floats_(form == Form::f32 ? E * panels_ * C * 16 : 0),
          exponents_(form == Form::mxfp4 ? E * panels_ * blocks_ * 16 : 0),
          halves_(form == Form::q8 ? E * panels_ * blocks_ * 16 : 0),
          values_(E * R * C) {
        std::fill(bytes_.begin(), bytes_.end(), uint8_t{0});
        for (size_t e = 0; e < E; ++e)
            for (size_t panel = 0; panel < panels_; ++panel)
                for (size_t lane = 0; lane < 16; ++lane) fill_row(random, e, panel, lane, extreme);
    }

    size_t rows() const { return R_; }
    size_t columns() const { return C_; }
    Matrix matrix() const {
        const void* data = form_ == Form::bf16  ? static_cast<const void*>(words_.data())
                           : form_ == Form::f32 ? static_cast<const void*>(floats_.data())
                                                : static_cast<const void*>(bytes_.data());
        const void* scales = form_ == Form::mxfp4 ? static_cast<const void*>(exponents_.data())
                             : form_ == Form::q8  ? static_cast<const void*>(halves_.data())
                                                  : nullptr;
        return {form_, data, scales, R_, C_, paired_};
    }
    const double* row(size_t e, size_t r) const { return values_.data() + (e * R_ + r) * C_; }

  private:
    void fill_row(Random& random, size_t e, size_t panel, size_t lane, bool extreme) {
        const size_t unit = panel / 2 * 16 + lane;  // of a paired matrix
        const size_t r = paired_ ? 2 * unit + panel % 2 : panel * 16 + lane;
        const bool used = r < R_;
        double* values = values_.data() + (e * R_ + r) * C_;
        const size_t at = e * panels_ + panel;
        if (form_ == Form::bf16 || form_ == Form::f32) {
            for (size_t c = 0; c < C_; ++c) {
                const float value = used ? random.normal(extreme ? 1e15 : 0.5) : 0.0f;
                const size_t index = (at * C_ + c) * 16 + lane;
                if (form_ == Form::f32) {
                    floats_[index] = value;
                    if (used) values[c] = value;
                } else {
                    words_[index] = to_bf16(value);
                    if (used) values[c] = of_bf16(words_[index]);
                }
            }
            return;
        }
        for (size_t b = 0; b < blocks_; ++b) {
            const size_t block = at * blocks_ + b;
            double scale;
            if (form_ == Form::mxfp4) {
                const auto exponent = static_cast<uint8_t>(used ? 120 + random.below(9) : 0);
                exponents_[block * 16 + lane] = exponent;
                scale = std::ldexp(1.0, exponent - 127);
            } else {
                halves_[block * 16 + lane] = used ? to_half(0.02 * random.uniform()) : 0;
                scale = of_half(halves_[block * 16 + lane]);
            }
            for (size_t i = 0; used && i < 32 && b * 32 + i < C_; ++i) {
                double& value = values[b * 32 + i];
                if (form_ == Form::mxfp4) {
                    constexpr double kMagnitudes[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
                    const size_t code = extreme ? 7 + 8 * random.below(2) : random.below(16);
                    value = (code < 8 ? 1 : -1) * kMagnitudes[code % 8] * scale;
                    const size_t byte = ((block * 4 + i / 8) * 16 + lane) * 4 + i % 4;
                    bytes_[byte] = static_cast<uint8_t>(bytes_[byte] | code << (i % 8 < 4 ? 0 : 4));
                } else {
                    const int number =
                        extreme ? (random.below(2) ? 127 : -127) : static_cast<int>(random.below(255)) - 127;
                    value = number * scale;
                    bytes_[((block * 8 + i / 4) * 16 + lane) * 4 + i % 4] = static_cast<uint8_t>(number);
                }
            }
        }
    }

    Form form_;
    size_t E_, R_, C_, panels_, blocks_;
    bool paired_;
    Buffer<uint8_t> bytes_;
    Buffer<uint16_t> words_;
    Buffer<float> floats_;
    Buffer<uint8_t> exponents_;
    Buffer<uint16_t> halves_;
    std::vector<double> values_;
};

bool quantised(Form form) { return form == Form::mxfp4 || form == Form::q8; }

// --- the quantiser's definition --------------------------------------------------------------------------------------

struct QuantisedRow {
    std::vector<int> numbers;   // whole blocks
    std::vector<float> scales;  // one a block
    double at(size_t c) const { return static_cast<double>(numbers[c]) * scales[c / 32]; }
};

QuantisedRow quantise_plainly(const float* x, size_t C) {
    QuantisedRow row;
    for (size_t start = 0; start < C; start += 32) {
        float peak = 0;
        for (size_t c = start; c < std::min(C, start + 32); ++c) peak = std::max(peak, std::abs(x[c]));
        const float inverse = peak > 0 && 127.0f / peak <= 3e38f ? 127.0f / peak : 0.0f;
        for (size_t c = start; c < start + 32; ++c)
            row.numbers.push_back(c < C ? static_cast<int>(std::nearbyint(x[c] * inverse)) : 0);
        row.scales.push_back(peak / 127.0f);
    }
    return row;
}

// What a matrix of this form multiplies with: the row itself, or what quantising leaves of it.
std::vector<double> seen_by(Form form, const float* x, size_t C) {
    if (!quantised(form)) return {x, x + C};
    const QuantisedRow row = quantise_plainly(x, C);
    std::vector<double> values(C);
    for (size_t c = 0; c < C; ++c) values[c] = row.at(c);
    return values;
}

struct Sum {
    double value = 0, terms = 0;  // terms: of their magnitudes
};

Sum dot(const double* a, const double* b, size_t n) {
    Sum sum;
    for (size_t i = 0; i < n; ++i) sum.value += a[i] * b[i], sum.terms += std::abs(a[i] * b[i]);
    return sum;
}

// --- kernels ---------------------------------------------------------------------------------------------------------

void check_half() {
    where = "half";
    for (uint32_t bits = 0; bits < 65536; ++bits) {
        const auto half = static_cast<uint16_t>(bits);
        const double value = of_half(half);
        const float widened = widened_half(half);
        if (std::isnan(value)) {
            expect(std::isnan(widened), "NaN stays NaN");
            expect(std::isnan(of_half(narrowed_half(widened))), "NaN stays NaN");
            continue;
        }
        expect(widened == value && std::signbit(widened) == std::signbit(value), "widened exactly");
        expect(narrowed_half(widened) == half, "narrowed back");
    }
    Random random(1);
    for (size_t i = 0; i < 200000; ++i) {
        const auto half = static_cast<uint16_t>(random.below(0x7BFF));
        const double low = of_half(half), high = of_half(static_cast<uint16_t>(half + 1));
        const double at = i % 3 == 0 ? 0.5 : random.uniform();  // ties too
        const auto value = static_cast<float>(low + at * (high - low));
        expect(narrowed_half(value) == to_half(value), "rounded to nearest even");
        expect(narrowed_half(-value) == to_half(-value), "rounded to nearest even");
    }
    for (float value : {65519.0f, 65520.0f, 1e30f, kInf, 1e-45f, 2.9802322e-8f, 2.9802326e-8f})
        expect(narrowed_half(value) == to_half(value), "rounded at the ends");
    for (uint32_t scale = 2; scale < 255; ++scale)
        expect(half_scale(static_cast<uint8_t>(scale)) == std::ldexp(1.0, static_cast<int>(scale) - 128), "half_scale");
    report("half");
}

// Memory of a tile's m tokens of C columns, either quantised, narrow or wide, or plain.
struct TestTile {
    Buffer<int8_t> narrow;
    Buffer<int16_t> wide;
    Buffer<float> scales, rows;
    Buffer<int32_t> offsets;
    Tile tile;

    TestTile(const Kernels& k, Form form, size_t m, size_t C, size_t stride)
        : narrow(quantised(form) && !is_wide(k, form) ? (C + 31) / 32 * m * 32 : 0),
          wide(quantised(form) && is_wide(k, form) ? (C + 31) / 32 * m * 32 : 0),
          scales(quantised(form) ? (C + 31) / 32 * m : 0),
          rows(quantised(form) ? 0 : (m - 1) * stride + C),
          offsets(scales.size()) {
        tile.m = m;
        tile.wide = is_wide(k, form);
        tile.values = tile.wide ? reinterpret_cast<int8_t*>(wide.data()) : narrow.data();
        tile.scales = scales.data();
        tile.offsets = offsets.data();
        tile.rows = rows.data();
        tile.stride = stride;
    }
    int value(size_t t, size_t b, size_t i) const {
        const size_t at = (b * tile.m + t) * 32 + i;
        return tile.wide ? wide[at] : narrow[at];
    }
    void set(size_t t, const float* row, size_t C, int bias) {
        if (!scales.size()) {
            std::copy(row, row + C, rows.data() + t * tile.stride);
            return;
        }
        const QuantisedRow plain = quantise_plainly(row, C);
        for (size_t b = 0; b * 32 < C; ++b) {
            int sum = 0;
            for (size_t i = 0; i < 32; ++i) {
                const int number = plain.numbers[b * 32 + i];
                const size_t at = (b * tile.m + t) * 32 + i;
                if (tile.wide) {
                    wide[at] = static_cast<int16_t>(number);
                } else {
                    narrow[at] = static_cast<int8_t>(number);
                }
                sum += number;
            }
            scales[b * tile.m + t] = plain.scales[b];
            offsets[b * tile.m + t] = -bias * sum;
        }
    }
};

void check_quantise() {
    Random random(2);
    for (size_t C : sizes<size_t>({1, 16, 31, 32, 33, 100, 160}, {1, 33, 96}))
        for (size_t m : {size_t{1}, size_t{3}, size_t{32}})
            for (double deviation : {1.0, 1e-20, 1e-38, 1e20, 0.0}) {
                const size_t t = random.below(m);
                Buffer<float> x = normals(random, C, deviation);
                const QuantisedRow row = quantise_plainly(x.data(), C);
                on_each_set(text("quantise C=%zu m=%zu t=%zu of size %g", C, m, t, deviation), [&](const Kernels& k) {
                    for (Form form : {Form::mxfp4, Form::q8}) {
                        TestTile to(k, form, m, C, 0);
                        k.quantise(x.data(), C, bias_of(k, form), to.tile, t);
                        for (size_t b = 0; b * 32 < C; ++b)
                            for (size_t j = 0; j < m; ++j) {
                                int sum = 0;
                                for (size_t i = 0; i < 32; ++i) {
                                    const int expected = j == t ? row.numbers[b * 32 + i] : -1;
                                    expect(to.value(j, b, i) == expected,
                                           "the rounded values, and nothing beside them");
                                    sum += expected;
                                }
                                if (j != t) continue;
                                expect(to.scales[b * m + j] == row.scales[b], "the block's scale");
                                expect(to.offsets[b * m + j] == -bias_of(k, form) * sum, "the block's offset");
                            }
                    }
                });
            }
    report("quantise");
}

void check_dots(Form form) {
    Random random(3);
    for (size_t C : sizes<size_t>({1, 7, 32, 33, 64, 95, 416}, {7, 33, 64}))
        for (size_t panels = 1; panels <= kPanelsAtOnce; ++panels)
            for (size_t m : sizes<size_t>({1, 2, 3, 4, 5, 7, 8, 9, 15, 31, 32}, {1, 5, 32})) {
                const bool extreme = m % 3 == 0;
                const Weights w(random, form, 1, panels * 16, C, false, extreme);
                Buffer<float> x = normals(random, m * C);
                if (extreme)
                    for (float& value : x) value = value > 0 ? 3.0f : -3.0f;
                on_each_set(
                    text("dot %s C=%zu panels=%zu m=%zu%s", name_of(form), C, panels, m,
                         extreme ? " of the largest values" : ""),
                    [&](const Kernels& k) {
                        const int bias = bias_of(k, form);
                        const Matrix matrix = w.matrix();
                        TestTile tile(k, form, m, C, C + m % 4);
                        for (size_t t = 0; t < m; ++t) tile.set(t, x.data() + t * C, C, bias);
                        PanelSums sums;
                        dot_panels(k, matrix, 0, panels, tile.tile, sums);
                        for (size_t t = 0; t < m; ++t) {
                            const std::vector<double> seen = seen_by(form, x.data() + t * C, C);
                            TestTile lone(k, form, 1, C, C);
                            lone.set(0, x.data() + t * C, C, bias);
                            PanelSums alone;
                            dot_panels(k, matrix, 0, panels, lone.tile, alone);
                            for (size_t p = 0; p < panels; ++p) {
                                const float* got = sums[p] + t * kPanel;
                                expect_same_bits(got, alone[p], kPanel, "a token among others and alone");
                                for (size_t r = 0; r < kPanel; ++r) {
                                    // In integers a block's sum is exact, so that only the sums of blocks may be off.
                                    double expected = 0, terms = 0;
                                    const size_t step = quantised(form) ? 32 : 1;
                                    for (size_t c = 0; c < C; c += step) {
                                        const double part =
                                            dot(w.row(0, p * 16 + r) + c, seen.data() + c, std::min(step, C - c)).value;
                                        expected += part, terms += std::abs(part);
                                    }
                                    expect_near(got[r], expected, 1e-6 * terms + kTiny, "sum of token, row", t,
                                                p * 16 + r);
                                }
                            }
                        }
                    });
            }
    report(std::string("dot ") + name_of(form));
}

void check_rms_norm() {
    Random random(4);
    for (size_t D : sizes<size_t>({1, 2, 7, 15, 16, 17, 31, 33, 64, 100, 2880, 4099}, {1, 17, 100}))
        for (size_t T : token_counts())
            for (double deviation : {1.0, 1e-4, 1e6}) {
                const Buffer<float> x = normals(random, T * D, deviation), weight = normals(random, D);
                on_each_set(text("rms_norm T=%zu D=%zu of size %g", T, D, deviation), [&](const Kernels& k) {
                    const Buffer<float> out = on_any_threads(T * D, [&](Engine& engine, float* to) {
                        engine.rms_norm(x.data(), weight.data(), to, T, D, 1e-5f);
                    });
                    for (size_t t = 0; t < T; ++t) {
                        double squares = 0;
                        for (size_t d = 0; d < D; ++d) squares += std::pow(x[t * D + d], 2);
                        const double scale = 1 / std::sqrt(squares / static_cast<double>(D) + 1e-5f);
                        for (size_t d = 0; d < D; ++d) {
                            const double expected = weight[d] * x[t * D + d] * scale;
                            expect_near(out[t * D + d], expected, 2e-6 * std::abs(expected) + kTiny, "out", t, d);
                        }
                    }
                    if (T == 0) return;
                    Buffer<float> in_place(D);
                    std::copy(x.data(), x.data() + D, in_place.data());
                    k.rms_norm(in_place.data(), weight.data(), in_place.data(), D, 1e-5f);
                    expect_same_bits(in_place.data(), out.data(), D, "in place");
                });
            }
    report("rms_norm");
}

double swiglu_plainly(double gate, double up, double alpha, double limit) {
    gate = std::min(gate, limit), up = std::clamp(up, -limit, limit);
    return gate / (1 + std::exp(-alpha * gate)) * (up + 1);
}

void check_elementwise() {
    Random random(5);
    for (size_t i = 0; i < 200; ++i) {
        const double deviation = i % 2 ? 2.0 : 40.0;
        const Buffer<float> gate = normals(random, 16, deviation), up = normals(random, 16, deviation);
        const Buffer<float> gate_bias = normals(random, 16), up_bias = normals(random, 16);
        on_each_set("swiglu", [&](const Kernels& k) {
            Buffer<float> out(16);
            k.swiglu(gate.data(), up.data(), gate_bias.data(), up_bias.data(), out.data(), 1.702f, 7.0f);
            for (size_t lane = 0; lane < 16; ++lane) {
                const double g = gate[lane] + gate_bias[lane], u = up[lane] + up_bias[lane];
                const double expected = swiglu_plainly(g, u, 1.702f, 7.0f);
                // alpha times gate is rounded in front of the exponential
                const double tolerance =
                    1e-6 * (1 + std::abs(g)) * std::abs(expected) + 1e-6 * std::abs(g) * 1e-3 + 1e-30;
                expect_near(out[lane], expected, tolerance, "lane", i, lane);
            }
        });
    }
    report("swiglu");

    on_each_set("exp1", [&](const Kernels& k) {
        expect(k.exp1(0.0f) == 1.0f, "exp(0) is 1");
        for (float x = -87.0f; x <= 87.0f; x += 0.013f)
            expect_near(k.exp1(x), std::exp(static_cast<double>(x)), 3e-7 * std::exp(static_cast<double>(x)), "exp", 0,
                        0);
        for (float x : {-88.0f, -1e10f, -kInf}) expect(k.exp1(x) >= 0 && k.exp1(x) < 2e-38f, "exp vanishes");
        expect(std::isnan(k.exp1(kNan)), "exp of NaN");
    });
    report("exp1");

    for (size_t n : sizes<size_t>({1, 15, 16, 17, 100, 1000}, {1, 17, 100}))
        for (float factor : {1.0f, 0.01f, 50.0f}) {
            Buffer<float> x = normals(random, n, 10);
            if (n > 3) x[2] = -kInf;
            const float peak = *std::max_element(x.begin(), x.end());
            on_each_set(text("exp_all n=%zu factor=%g", n, static_cast<double>(factor)), [&](const Kernels& k) {
                const size_t whole = (n + 15) / 16 * 16;
                Buffer<float> out(whole);
                k.exp_all(x.data(), n, peak, factor, out.data());
                double total = 0;
                for (size_t i = 0; i < whole; ++i) {
                    const double power = i < n ? (static_cast<double>(x[i]) - peak) * factor : -kInf;
                    const double expected = std::exp(power);
                    const bool gone = power < -87.01;
                    expect_near(out[i], gone ? 0 : expected, gone ? 0 : expected * 1e-6 * (1 - power) + 2e-38, "out", 0,
                                i);
                    total += out[i];
                }
                expect_near(k.sum_all(out.data(), whole), total, 1e-6 * total, "sum_all", 0, 0);
            });
        }
    report("exp_all, sum_all");

    for (size_t T : token_counts())
        for (size_t H : sizes<size_t>({2, 6, 32, 34, 64, 80, 128}, {2, 34, 64})) {
            const size_t N = 1 + random.below(4), stride = N * H + random.below(4);
            const Buffer<float> x = normals(random, T ? (T - 1) * stride + N * H : 0);
            Buffer<float> cos(T * H / 2), sin(T * H / 2);
            for (size_t i = 0; i < T * H / 2; ++i) {
                const double angle = 6.3 * random.uniform();
                cos[i] = static_cast<float>(std::cos(angle)), sin[i] = static_cast<float>(std::sin(angle));
            }
            on_each_set(text("rope T=%zu N=%zu H=%zu stride=%zu", T, N, H, stride), [&](const Kernels&) {
                const Buffer<float> out = on_any_threads(T * N * H, [&](Engine& engine, float* to) {
                    engine.rope(x.data(), stride, cos.data(), sin.data(), to, T, N, H);
                });
                for (size_t t = 0; t < T; ++t)
                    for (size_t n = 0; n < N; ++n)
                        for (size_t i = 0; i < H / 2; ++i) {
                            const double a = x[t * stride + n * H + i], b = x[t * stride + n * H + H / 2 + i];
                            const double c = cos[t * H / 2 + i], s = sin[t * H / 2 + i];
                            const double tolerance = 2e-7 * (std::abs(a) + std::abs(b));
                            const float* got = out.data() + (t * N + n) * H;
                            expect_near(got[i], a * c - b * s, tolerance, "first half", t, n * H + i);
                            expect_near(got[H / 2 + i], b * c + a * s, tolerance, "second half", t, n * H + i);
                        }
            });
        }
    report("rope");
}

void check_argmax() {
    Random random(6);
    for (size_t n : sizes<size_t>({1, 2, 15, 16, 17, 33, 100, 5000}, {1, 16, 33}))
        for (size_t kind = 0; kind < 6; ++kind) {
            Buffer<float> x = normals(random, n);
            for (float& value : x) {
                if (kind == 1) value = std::round(value);  // ties
                if (kind == 2 && random.below(3) == 0) value = kNan;
                if (kind == 3) value = -kInf;
                if (kind == 4) value = kNan;
                if (kind == 5) value = random.below(2) ? -kInf : kNan;
            }
            size_t expected = 0;
            while (expected + 1 < n && std::isnan(x[expected])) ++expected;
            if (std::isnan(x[expected])) expected = 0;
            for (size_t i = 0; i < n; ++i)
                if (x[i] > x[expected]) expected = i;
            on_each_set(text("argmax n=%zu kind=%zu", n, kind), [&](const Kernels& k) {
                expect(k.argmax(x.data(), n) == expected, "the first of the largest");
                expect(engine_of(3).argmax(x.data(), n) == expected, "the first of the largest");
            });
        }
    report("argmax");
}

void check_speed_probes() {
    Random random(7);
    on_each_set("read", [&](const Kernels& k) {
        for (size_t n : {size_t{0}, size_t{64}, size_t{640}}) {
            Buffer<uint8_t> data(n);
            for (uint8_t& byte : data) byte = static_cast<uint8_t>(random.bits());
            uint64_t expected = 0;
            for (size_t i = 0; i < n; i += 8) {
                uint64_t word;
                std::memcpy(&word, data.data() + i, sizeof word);
                expected += word;
            }
            expect(k.read(data.data(), n) == expected, "the sum of all words");
        }
        expect(k.spin_dots(1000) >= 1000, "multiply-adds are counted");
        Buffer<uint8_t> data(size_t{3} << 20);
        double once, again;
        expect(engine_of(1).read_gigabytes(data.data(), data.size(), &once) > 0, "bytes a second");
        expect(engine_of(3).read_gigabytes(data.data(), data.size(), &again) > 0, "bytes a second");
        expect(once == again, "all is read once");
        expect(engine_of(3).dot_rate(1000) > 0, "multiply-adds a second");
    });
    report("read, spin_dots");
}

// --- ops -------------------------------------------------------------------------------------------------------------

void check_linear(Form form) {
    Random random(8);
    struct Shape {
        size_t R, C;
    };
    const Shape all[] = {{1, 1}, {16, 32}, {17, 33}, {31, 64}, {100, 95}, {48, 160}, {70, 7}, {150, 288}};
    for (const Shape& shape : all) {
        const auto [R, C] = shape;
        if (quick && R % 16 == 0) continue;
        const Weights w(random, form, 1, R, C);
        for (size_t T : token_counts())
            for (size_t variant = 0; variant < 8; ++variant) {
                const bool normed = variant & 1, biased = variant & 2, added = variant & 4;
                const size_t stride = C + (variant % 3 == 0 ? 3 : 0);
                const Buffer<float> x = normals(random, T ? (T - 1) * stride + C : 0);
                const Buffer<float> norm = normals(random, C), bias = normals(random, R);
                const Buffer<float> residual = normals(random, T * R);
                const std::string what =
                    text("linear %s T=%zu R=%zu C=%zu stride=%zu%s%s%s", name_of(form), T, R, C, stride,
                         normed ? " norm" : "", biased ? " bias" : "", added ? " residual" : "");
                on_each_set(what, [&](const Kernels& k) {
                    const LinearArgs args{x.data(),
                                          T,
                                          stride,
                                          normed ? norm.data() : nullptr,
                                          1e-5f,
                                          biased ? bias.data() : nullptr,
                                          added ? residual.data() : nullptr,
                                          nullptr};
                    const Buffer<float> out = on_any_threads(T * R, [&](Engine& engine, float* to) {
                        LinearArgs mine = args;
                        mine.out = to;
                        if (added && T % 2) {  // onto itself
                            std::copy(residual.data(), residual.data() + T * R, to);
                            mine.residual = to;
                        }
                        engine.linear(w.matrix(), mine);
                    });
                    for (size_t t = 0; t < T; ++t) {
                        Buffer<float> row(C);
                        std::copy(x.data() + t * stride, x.data() + t * stride + C, row.data());
                        // The norm's own check is elsewhere; here its last bit decides how values are rounded.
                        if (normed) k.rms_norm(row.data(), norm.data(), row.data(), C, 1e-5f);
                        const std::vector<double> seen = seen_by(form, row.data(), C);
                        for (size_t r = 0; r < R; ++r) {
                            const double more = (biased ? bias[r] : 0.0) + (added ? residual[t * R + r] : 0.0);
                            const Sum sum = dot(w.row(0, r), seen.data(), C);
                            const double tolerance = 1e-6 * (sum.terms + std::abs(more) + 1);
                            expect_near(out[t * R + r], sum.value + more, tolerance, "out", t, r);
                        }
                    }
                    for (size_t t : loners(T)) {
                        LinearArgs mine = args;
                        Buffer<float> alone(R);
                        mine.T = 1, mine.x += t * stride, mine.out = alone.data();
                        if (added) mine.residual += t * R;
                        engine_of(2).linear(w.matrix(), mine);
                        expect_same_bits(alone.data(), out.data() + t * R, R, "a token alone and among others");
                    }
                });
            }
    }
    report(std::string("linear ") + name_of(form));
}

// Keys and values of one layer, to the element.
struct KvStore {
    KvType type;
    size_t K, capacity, H;
    Buffer<float> floats[2];
    Buffer<uint16_t> words[2];
    Buffer<int8_t> bytes[2];
    Buffer<uint16_t> scales[2];

    KvStore(KvType type, size_t K, size_t capacity, size_t H)
        : type(type),
          K(K),
          capacity(capacity),
          H(H),
          floats{Buffer<float>(count(KvType::f32)), Buffer<float>(count(KvType::f32))},
          words{Buffer<uint16_t>(count(KvType::bf16)), Buffer<uint16_t>(count(KvType::bf16))},
          bytes{Buffer<int8_t>(count(KvType::q8)), Buffer<int8_t>(count(KvType::q8))},
          scales{Buffer<uint16_t>(count(KvType::q8) / 32), Buffer<uint16_t>(count(KvType::q8) / 32)} {}

    size_t count(KvType of) const { return type == of ? K * capacity * H : 0; }
    void* data(size_t which) {
        switch (type) {
            case KvType::f32:
                return floats[which].data();
            case KvType::bf16:
                return words[which].data();
            default:
                return bytes[which].data();
        }
    }
    KvView view() { return {type, data(0), data(1), scales[0].data(), scales[1].data(), capacity, K, H}; }
    double at(size_t which, size_t head, size_t position, size_t h) const {
        const size_t i = (head * capacity + position) * H + h;
        switch (type) {
            case KvType::f32:
                return floats[which][i];
            case KvType::bf16:
                return of_bf16(words[which][i]);
            default:
                return bytes[which][i] * of_half(scales[which][i / 32]);
        }
    }
    bool untouched(size_t which, size_t i) const {
        switch (type) {
            case KvType::f32:
                return std::isnan(floats[which][i]);
            case KvType::bf16:
                return words[which][i] == 0xFFFF;
            default:
                return bytes[which][i] == -1 && scales[which][i / 32] == 0xFFFF;
        }
    }
};

void check_kv_write(KvType type) {
    Random random(9);
    for (size_t T : token_counts())
        for (size_t H : type == KvType::q8 ? sizes<size_t>({32, 64, 96}, {64}) : sizes<size_t>({1, 20, 64}, {20})) {
            const size_t K = 1 + random.below(3), start = random.below(40), capacity = start + T + random.below(3);
            const size_t strides[2] = {K * H + random.below(3), K * H + random.below(3)};
            Buffer<float> given[2] = {normals(random, T ? (T - 1) * strides[0] + K * H : 0),
                                      normals(random, T ? (T - 1) * strides[1] + K * H : 0)};
            for (auto& buffer : given)
                for (size_t i = 0; i < buffer.size(); ++i)  // whole blocks of zeros, large and tiny numbers
                    if (const size_t size = i / 32 % 5; size < 3)
                        buffer[i] *= size == 0 ? 0.0f : size == 1 ? 1e4f : 1e-5f;
            on_each_set(text("kv_write %s T=%zu K=%zu H=%zu", name_of(type), T, K, H), [&](const Kernels&) {
                for (unsigned threads : {1u, 3u}) {
                    KvStore store(type, K, capacity, H);
                    engine_of(threads).kv_write(store.view(), given[0].data(), strides[0], given[1].data(), strides[1],
                                                T, start);
                    for (size_t which = 0; which < 2; ++which)
                        for (size_t head = 0; head < K; ++head)
                            for (size_t position = 0; position < capacity; ++position) {
                                const size_t at = (head * capacity + position) * H;
                                const bool written = position >= start && position < start + T;
                                const float* x =
                                    written ? given[which].data() + (position - start) * strides[which] + head * H
                                            : nullptr;
                                for (size_t h = 0; h < H; ++h) {
                                    if (!written) {
                                        expect(store.untouched(which, at + h), "other positions are left alone");
                                    } else if (type == KvType::f32) {
                                        expect(store.floats[which][at + h] == x[h], "stored as given");
                                    } else if (type == KvType::bf16) {
                                        expect(store.words[which][at + h] == to_bf16(x[h]), "rounded to bfloat16");
                                    } else {
                                        const float* block = x + h / 32 * 32;
                                        float peak = 0;
                                        for (size_t i = 0; i < 32; ++i) peak = std::max(peak, std::abs(block[i]));
                                        const uint16_t half = to_half(peak / 127.0f);
                                        const auto step = static_cast<float>(of_half(half));
                                        const float factor = step > 0 ? 1.0f / step : 0.0f;
                                        const double number =
                                            std::clamp(std::nearbyint(x[h] * factor), -127.0f, 127.0f);
                                        expect(store.scales[which][(at + h) / 32] == half, "the block's scale");
                                        expect(store.bytes[which][at + h] == number, "the rounded value");
                                    }
                                }
                            }
                }
            });
        }
    report(std::string("kv_write ") + name_of(type));
}

struct AttentionCase {
    size_t K, group, H, length, T, window;
};

// Where each of the (T, N) results must lie, as (value, tolerance) for every h.
std::vector<Sum> attend_plainly(const AttentionCase& c, const KvStore& store, const float* q, size_t stride,
                                const float* sinks, double scale) {
    const size_t N = c.K * c.group;
    std::vector<Sum> results(c.T * N * c.H);
    std::vector<double> weights;
    for (size_t t = 0; t < c.T; ++t)
        for (size_t n = 0; n < N; ++n) {
            const size_t position = c.length - c.T + t, head = n / c.group;
            const size_t first = c.window && position + 1 > c.window ? position + 1 - c.window : 0;
            weights.assign(position + 1 - first, 0);
            double peak = sinks[n], size = 0;
            for (size_t s = first; s <= position; ++s) {
                double score = 0, terms = 0;
                for (size_t h = 0; h < c.H; ++h) {
                    const double term = q[t * stride + n * c.H + h] * store.at(0, head, s, h) * scale;
                    score += term, terms += std::abs(term);
                }
                weights[s - first] = score;
                peak = std::max(peak, score), size = std::max(size, terms);
            }
            double sum = std::exp(sinks[n] - peak);
            for (double& weight : weights) sum += weight = std::exp(weight - peak);
            for (size_t h = 0; h < c.H; ++h) {
                Sum& result = results[(t * N + n) * c.H + h];
                for (size_t s = first; s <= position; ++s) {
                    const double term = weights[s - first] / sum * store.at(1, head, s, h);
                    result.value += term, result.terms += std::abs(term);
                }
                result.terms *= 1e-6 * (1 + size);  // a score that is off by so much moves a weight by as much
            }
        }
    return results;
}

void check_attention(KvType type) {
    Random random(10);
    std::vector<AttentionCase> cases = {
        {1, 1, 64, 1, 1, 0},      {2, 4, 64, 5, 5, 0},      {1, 8, 64, 70, 70, 0},    {2, 3, 32, 100, 33, 16},
        {2, 8, 64, 700, 31, 0},   {1, 8, 64, 1100, 1, 0},   {2, 8, 64, 1100, 2, 128}, {1, 2, 96, 520, 70, 1},
        {2, 8, 64, 600, 70, 128}, {1, 70, 32, 66, 2, 0},    {3, 1, 64, 64, 0, 0},     {8, 8, 64, 300, 33, 128},
        {1, 1, 64, 1537, 33, 0},  {2, 1, 32, 513, 2, 5000},
    };
    if (quick) cases = {{1, 1, 32, 1, 1, 0}, {2, 3, 32, 100, 33, 16}, {1, 8, 32, 600, 2, 0}, {2, 2, 32, 530, 33, 20}};
    if (type != KvType::q8) {
        cases.push_back({2, 2, 20, 90, 33, 0});
        cases.push_back({1, 3, 1, 130, 5, 7});
        cases.push_back({1, 2, 18, 530, 2, 0});
    }
    for (const AttentionCase& c : cases) {
        const size_t N = c.K * c.group, stride = N * c.H + random.below(3);
        KvStore store(type, c.K, c.length + random.below(2) * 3, c.H);  // rows behind the last stay NaN
        const Buffer<float> k = normals(random, c.length * c.K * c.H), v = normals(random, c.length * c.K * c.H);
        engine_of(1).kv_write(store.view(), k.data(), c.K * c.H, v.data(), c.K * c.H, c.length, 0);
        const Buffer<float> q = normals(random, c.T ? (c.T - 1) * stride + N * c.H : 0, 1.5);
        Buffer<float> sinks = normals(random, N);
        if (N > 2) sinks[1] = -1e4f, sinks[2] = 30.0f;
        const float scale = 1 / std::sqrt(static_cast<float>(c.H));
        const std::vector<Sum> expected = attend_plainly(c, store, q.data(), stride, sinks.data(), scale);
        const std::string what = text("attention %s K=%zu N=%zu H=%zu length=%zu T=%zu window=%zu", name_of(type), c.K,
                                      N, c.H, c.length, c.T, c.window);
        on_each_set(what, [&](const Kernels&) {
            const AttentionArgs args{q.data(), c.T, N, stride, c.length, sinks.data(), scale, c.window, nullptr};
            const Buffer<float> out = on_any_threads(c.T * N * c.H, [&](Engine& engine, float* to) {
                AttentionArgs mine = args;
                mine.out = to;
                engine.attention(store.view(), mine);
            });
            for (size_t i = 0; i < out.size(); ++i)
                expect_near(out[i], expected[i].value, expected[i].terms + 1e-7, "out of (query, head)", i / c.H,
                            i % c.H);
            for (size_t t : loners(c.T)) {
                AttentionArgs mine = args;
                Buffer<float> alone(N * c.H);
                mine.q += t * stride, mine.T = 1, mine.length = c.length - c.T + t + 1, mine.out = alone.data();
                engine_of(4).attention(store.view(), mine);
                expect_same_bits(alone.data(), out.data() + t * N * c.H, N * c.H, "a token alone and among others");
            }
        });
    }
    report(std::string("attention ") + name_of(type));
}

// One piece as the op hands it out, with rows that see nothing, a part and all of it.
void check_attend() {
    Random random(11);
    for (KvType type : kKvTypes)
        for (size_t last : sizes<size_t>({1, 63, 64, 65, 200}, {1, 65})) {
            const size_t H = 64, rows = 9;
            KvStore store(type, 2, last, H);
            const Buffer<float> k = normals(random, last * 2 * H), v = normals(random, last * 2 * H);
            engine_of(1).kv_write(store.view(), k.data(), 2 * H, v.data(), 2 * H, last, 0);
            const Buffer<float> q = normals(random, rows * H, 0.3);
            Buffer<int64_t> limits(rows * 2);
            for (size_t r = 0; r < rows; ++r) {  // the last row sees all, the second last nothing of this piece
                limits[2 * r] = static_cast<int64_t>(r == rows - 1 ? 0 : r == rows - 2 ? last : random.below(last));
                limits[2 * r + 1] = static_cast<int64_t>(last + (r == rows - 2 ? 1 : 0));
            }
            on_each_set(text("attend %s over %zu keys", name_of(type), last), [&](const Kernels& kernels) {
                Buffer<float> out(rows * padded_head(H)), peak(rows), sum(rows), scratch(attention_scratch(rows, H));
                AttentionPiece piece{
                    q.data(),    limits.data(), rows,          1, 0, static_cast<int64_t>(last), out.data(),
                    peak.data(), sum.data(),    scratch.data()};
                kernels.attend(piece, store.view());
                for (size_t r = 0; r < rows; ++r) {
                    double expected_peak = -kInf, expected_sum = 0;
                    std::vector<double> scores(last, -kInf), values(H, 0);
                    for (auto s = static_cast<size_t>(limits[2 * r]); s < last; ++s) {
                        scores[s] = 0;
                        for (size_t h = 0; h < H; ++h) scores[s] += q[r * H + h] * store.at(0, 1, s, h);
                        expected_peak = std::max(expected_peak, scores[s]);
                    }
                    for (auto s = static_cast<size_t>(limits[2 * r]); s < last; ++s) {
                        const double weight = std::exp(scores[s] - expected_peak);
                        expected_sum += weight;
                        for (size_t h = 0; h < H; ++h) values[h] += weight * store.at(1, 1, s, h);
                    }
                    if (r == rows - 2) {
                        expect(peak[r] == -kInf && sum[r] == 0, "a row that sees nothing");
                        for (size_t h = 0; h < H; ++h) expect(out[r * H + h] == 0, "a row that sees nothing");
                        continue;
                    }
                    expect_near(peak[r], expected_peak, 1e-5, "peak", r, 0);
                    expect_near(sum[r], expected_sum, 1e-5 * expected_sum, "sum", r, 0);
                    for (size_t h = 0; h < H; ++h)
                        expect_near(out[r * H + h], values[h], 3e-5 * expected_sum, "out", r, h);
                }
            });
        }
    report("attend");
}

void check_route() {
    Random random(12);
    for (size_t T : token_counts())
        for (size_t E : {size_t{1}, size_t{4}, size_t{33}, size_t{128}})
            for (size_t A = 1; A <= std::min<size_t>(E, 5); ++A) {
                Buffer<float> logits = normals(random, T * E, 3);
                for (size_t i = 0; i < T * E; i += 3) logits[i] = std::round(logits[i]);  // ties
                where = text("route T=%zu E=%zu A=%zu", T, E, A);
                Buffer<float> weights(T * A);
                Buffer<int64_t> experts(T * A);
                engine_of(2).route(logits.data(), T, E, A, weights.data(), experts.data());
                for (size_t t = 0; t < T; ++t) {
                    const float* row = logits.data() + t * E;
                    std::vector<size_t> order(E);
                    for (size_t e = 0; e < E; ++e) order[e] = e;
                    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return row[a] > row[b]; });
                    double sum = 0;
                    for (size_t a = 0; a < A; ++a) sum += std::exp(static_cast<double>(row[order[a]]) - row[order[0]]);
                    for (size_t a = 0; a < A; ++a) {
                        expect(experts[t * A + a] == static_cast<int64_t>(order[a]),
                               "the largest, the first of equals");
                        const double expected = std::exp(static_cast<double>(row[order[a]]) - row[order[0]]) / sum;
                        expect_near(weights[t * A + a], expected, 1e-6 * expected, "weight", t, a);
                    }
                }
            }
    report("route");
}

void check_moe(Form gate_up_form, Form down_form) {
    Random random(13);
    struct Shape {
        size_t E, A, D, F;
    };
    std::vector<Shape> shapes = {{1, 1, 1, 1}, {4, 2, 33, 17}, {3, 3, 64, 32}, {9, 4, 95, 70}, {32, 4, 160, 96}};
    if (quick) shapes = {{4, 2, 33, 17}, {9, 4, 64, 40}};
    for (const auto& [E, A, D, F] : shapes) {
        const Weights gate_up(random, gate_up_form, E, 2 * F, D, true), down(random, down_form, E, D, F);
        const Buffer<float> gate_up_bias = normals(random, E * 2 * F), down_bias = normals(random, E * D);
        for (size_t T : token_counts()) {
            const bool added = T % 2;
            const Buffer<float> x = normals(random, T * D), residual = normals(random, T * D);
            Buffer<float> weights(T * A);
            Buffer<int64_t> experts(T * A);
            for (size_t t = 0; t < T; ++t) {
                std::vector<int64_t> all(E);
                for (size_t e = 0; e < E; ++e) all[e] = static_cast<int64_t>(e);
                for (size_t a = 0; a < A; ++a) {
                    std::swap(all[a], all[a + random.below(E - a)]);
                    experts[t * A + a] = all[a];
                    weights[t * A + a] = static_cast<float>(random.uniform());
                }
            }
            std::vector<double> expected(T * D), tolerance(T * D);
            for (size_t t = 0; t < T; ++t) {
                const std::vector<double> seen = seen_by(gate_up_form, x.data() + t * D, D);
                for (size_t d = 0; d < D; ++d) expected[t * D + d] = added ? residual[t * D + d] : 0.0;
                for (size_t a = 0; a < A; ++a) {
                    const auto e = static_cast<size_t>(experts[t * A + a]);
                    std::vector<float> hidden(F);
                    std::vector<double> unsure(F);  // how far off a hidden value may be
                    for (size_t f = 0; f < F; ++f) {
                        const Sum gate = dot(gate_up.row(e, 2 * f), seen.data(), D);
                        const Sum up = dot(gate_up.row(e, 2 * f + 1), seen.data(), D);
                        const double g = gate.value + gate_up_bias[e * 2 * F + 2 * f];
                        const double u = up.value + gate_up_bias[e * 2 * F + 2 * f + 1];
                        hidden[f] = static_cast<float>(swiglu_plainly(g, u, 1.702f, 7.0f));
                        unsure[f] = 1e-6 * ((gate.terms + 1) * (std::abs(std::clamp(u, -7.0, 7.0)) + 1) * 1.2 +
                                            (up.terms + 1) * std::abs(std::min(g, 7.0)));
                    }
                    const std::vector<double> kept = seen_by(down_form, hidden.data(), F);
                    const QuantisedRow row = quantise_plainly(hidden.data(), F);
                    for (size_t d = 0; d < D; ++d) {
                        const Sum sum = dot(down.row(e, d), kept.data(), F);
                        double off = 1e-6 * (sum.terms + std::abs(down_bias[e * D + d]) + 1), step = 0;
                        for (size_t f = 0; f < F; ++f) {
                            off += std::abs(down.row(e, d)[f]) * unsure[f];
                            step = std::max(step, std::abs(down.row(e, d)[f]) * row.scales[f / 32]);
                        }
                        if (quantised(down_form)) off += 3 * step;  // a few may be rounded to the other side
                        expected[t * D + d] += weights[t * A + a] * (sum.value + down_bias[e * D + d]);
                        tolerance[t * D + d] += weights[t * A + a] * off + 1e-6;
                    }
                }
            }
            const std::string what = text("moe %s/%s T=%zu E=%zu A=%zu D=%zu F=%zu%s", name_of(gate_up_form),
                                          name_of(down_form), T, E, A, D, F, added ? " residual" : "");
            on_each_set(what, [&](const Kernels&) {
                const MoeArgs args{x.data(),
                                   T,
                                   A,
                                   weights.data(),
                                   experts.data(),
                                   E,
                                   gate_up_bias.data(),
                                   down_bias.data(),
                                   added ? residual.data() : nullptr,
                                   1.702f,
                                   7.0f,
                                   nullptr};
                const Buffer<float> out = on_any_threads(T * D, [&](Engine& engine, float* to) {
                    MoeArgs mine = args;
                    mine.out = to;
                    engine.moe(gate_up.matrix(), down.matrix(), mine);
                });
                for (size_t i = 0; i < T * D; ++i) expect_near(out[i], expected[i], tolerance[i], "out", i / D, i % D);
                for (size_t t : loners(T)) {
                    MoeArgs mine = args;
                    Buffer<float> alone(D);
                    mine.T = 1, mine.x += t * D, mine.weights += t * A, mine.experts += t * A, mine.out = alone.data();
                    if (added) mine.residual += t * D;
                    engine_of(3).moe(gate_up.matrix(), down.matrix(), mine);
                    expect_same_bits(alone.data(), out.data() + t * D, D, "a token alone and among others");
                }
            });
        }
    }
    report(std::string("moe ") + name_of(gate_up_form) + "/" + name_of(down_form));
}

void check_sample() {
    Random random(14);
    for (size_t V : sizes<size_t>({1, 2, 17, 256, 257, 3000}, {1, 17, 300}))
        for (size_t i = 0; i < (quick ? 40u : 150u); ++i) {
            Buffer<float> logits = normals(random, V, 2);
            for (float& logit : logits) {
                if (i % 4 == 1) logit = std::round(logit);  // ties
                if (i % 4 == 2 && random.below(3) == 0) logit = -kInf;
            }
            logits[random.below(V)] = 0.25f;
            const auto temperature = static_cast<float>(0.1 + 2 * random.uniform());
            const size_t top_k = random.below(2) ? random.below(V + 2) : 0;
            const double top_p = random.below(2) ? 1.0 : 0.02 + 0.97 * random.uniform();
            const auto min_p = random.below(2) ? 0.0f : static_cast<float>(0.3 * random.uniform());
            const double uniform = i % 10 == 0 ? 0.0 : random.uniform();

            std::vector<size_t> order(V);
            for (size_t v = 0; v < V; ++v) order[v] = v;
            std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return logits[a] > logits[b]; });
            std::vector<double> weights(V);
            double total = 0;
            for (size_t j = 0; j < V; ++j) {
                const double power = (static_cast<double>(logits[order[j]]) - logits[order[0]]) / temperature;
                weights[order[j]] = top_k && j >= top_k ? 0 : std::exp(power);
                total += weights[order[j]];
            }
            double passed = 0;
            for (size_t v : order) {
                const double weight = weights[v];
                if (top_p < 1 && passed >= top_p * total) weights[v] = 0;
                passed += weight;
                if (weight < static_cast<double>(min_p)) weights[v] = 0;
            }
            total = 0;
            for (double weight : weights) total += weight;

            on_each_set(
                text("sample V=%zu temperature=%g top_k=%zu top_p=%g min_p=%g uniform=%g", V,
                     static_cast<double>(temperature), top_k, top_p, static_cast<double>(min_p), uniform),
                [&](const Kernels&) {
                    const size_t token =
                        engine_of(2).sample(logits.data(), V, temperature, top_k, top_p, min_p, uniform);
                    expect(token < V && weights[token] > 0, "a token that the filters keep");
                    double before = 0;
                    for (size_t v = 0; v < token; ++v) before += weights[v];
                    expect(before <= (uniform + 1e-5) * total && before + weights[token] >= (uniform - 1e-5) * total,
                           "the token at this point of the cumulated probability");
                });
        }
    report("sample");
}

// What is not a number must show in the token that holds it, and there alone.
void check_nan() {
    Random random(15);
    constexpr size_t C = 75, R = 33, T = 5, hit = 3;
    for (Form form : kForms) {
        const Weights w(random, form, 1, R, C, false), gate_up(random, form, 2, 2 * R, C, true),
            down(random, form, 2, C, R);
        const Buffer<float> gate_up_bias = normals(random, 2 * 2 * R), down_bias = normals(random, 2 * C);
        const Buffer<float> x = normals(random, T * C), norm = normals(random, C), weights = normals(random, T * 2);
        Buffer<int64_t> experts(T * 2);
        for (size_t i = 0; i < T * 2; ++i) experts[i] = static_cast<int64_t>(i % 2);
        for (size_t at : {size_t{0}, size_t{14}, size_t{17}, size_t{40}, size_t{63}, C - 1})
            for (float bad : {kNan, kInf, -kInf})
                on_each_set(
                    text("%s with %g at %zu", name_of(form), static_cast<double>(bad), at), [&](const Kernels&) {
                        Buffer<float> spoilt(T * C);
                        std::copy(x.data(), x.data() + T * C, spoilt.data());
                        spoilt[hit * C + at] = bad;
                        auto run = [&](const float* from, size_t op) {
                            Buffer<float> out(T * (op < 2 ? R : C));
                            if (op < 2) {
                                engine_of(2).linear(w.matrix(), {from, T, C, op ? norm.data() : nullptr, 1e-5f, nullptr,
                                                                 nullptr, out.data()});
                            } else {
                                engine_of(2).moe(gate_up.matrix(), down.matrix(),
                                                 {from, T, 2, weights.data(), experts.data(), 2, gate_up_bias.data(),
                                                  down_bias.data(), nullptr, 1.702f, 7.0f, out.data()});
                            }
                            return out;
                        };
                        for (size_t op = 0; op < 3; ++op) {
                            if (op > 0 && !std::isnan(bad)) continue;  // a norm or a clamp may make these finite again
                            const Buffer<float> good = run(x.data(), op), out = run(spoilt.data(), op);
                            const size_t width = good.size() / T;
                            for (size_t i = 0; i < good.size(); ++i)
                                if (i / width == hit)
                                    expect(!std::isfinite(out[i]), "not finite where the input is not");
                                else
                                    expect_same_bits(out.data() + i, good.data() + i, 1, "another token");
                        }
                    });
    }
    constexpr size_t H = 32, N = 2, length = 90;
    for (KvType type : kKvTypes)
        for (size_t at : {size_t{0}, size_t{17}, H - 1})
            for (bool in_key : {false, true})
                on_each_set(
                    text("attention %s with NaN in a %s at %zu", name_of(type), in_key ? "key" : "query", at),
                    [&](const Kernels&) {
                        KvStore store(type, 1, length, H);
                        Buffer<float> k = normals(random, length * H), v = normals(random, length * H);
                        Buffer<float> q = normals(random, length * N * H), sinks = normals(random, N),
                                      out(length * N * H);
                        constexpr size_t position = 70;
                        (in_key ? k[position * H + at] : q[(position * N + 1) * H + at]) = kNan;
                        engine_of(2).kv_write(store.view(), k.data(), H, v.data(), H, length, 0);
                        engine_of(2).attention(
                            store.view(), {q.data(), length, N, N * H, length, sinks.data(), 0.2f, 10, out.data()});
                        for (size_t i = 0; i < out.size(); ++i) {
                            const size_t t = i / (N * H), n = i / H % N;
                            const bool sees = in_key ? t >= position && t < position + 10 : t == position && n == 1;
                            expect(std::isnan(out[i]) == sees, "NaN where it is in sight, and there alone");
                        }
                    });
    report("not a number");
}

// --- threads ---------------------------------------------------------------------------------------------------------

void check_pool() {
    for (unsigned threads = 1; threads <= 4; ++threads)
        for (size_t round = 0; round < 5; ++round) {
            where = text("pool of %u threads", threads);
            ThreadPool pool(threads);
            expect(pool.threads() == threads, "so many threads");
            if (round == 0) continue;  // made and never used
            for (size_t count : {size_t{0}, size_t{1}, size_t{7}, size_t{100}})
                for (size_t chunk : {size_t{0}, size_t{1}, size_t{3}, size_t{1000}}) {
                    std::vector<int> visits(count, 0);
                    pool.split(count, chunk, [&](size_t first, size_t last, unsigned thread) {
                        if (thread >= threads || first >= last || last > count) fail("a piece out of range");
                        for (size_t i = first; i < last; ++i) ++visits[i];
                    });
                    expect(std::all_of(visits.begin(), visits.end(), [](int n) { return n == 1; }), "each piece once");
                }
            std::vector<int> calls(threads, 0);
            for (size_t i = 0; i < 50; ++i) pool.each_thread([&](unsigned thread) { ++calls[thread]; });
            std::this_thread::sleep_for(std::chrono::milliseconds(2));  // until the workers sleep
            pool.each_thread([&](unsigned thread) {
                if (thread) std::this_thread::sleep_for(std::chrono::milliseconds(2));  // until the caller does
                ++calls[thread];
            });
            expect(std::all_of(calls.begin(), calls.end(), [](int n) { return n == 51; }), "each thread each time");
        }
    report("pool");
}

void check_shared_engine() {
    Random random(16);
    constexpr size_t T = 20, R = 70, C = 96;
    const Weights w(random, Form::q8, 1, R, C);
    const Buffer<float> x = normals(random, T * C);
    on_each_set("one engine for two callers", [&](const Kernels&) {
        auto run = [&](Engine& engine, float* to) {
            engine.linear(w.matrix(), {x.data(), T, C, nullptr, 0, nullptr, nullptr, to});
        };
        Buffer<float> expected(T * R), first(T * R), second(T * R);
        run(engine_of(1), expected.data());
        for (size_t i = 0; i < 10; ++i) {
            std::thread other([&] { run(engine_of(3), second.data()); });
            run(engine_of(3), first.data());
            other.join();
            expect_same_bits(first.data(), expected.data(), T * R, "result");
            expect_same_bits(second.data(), expected.data(), T * R, "result");
        }
    });
    report("two callers");
}

}  // namespace

int main(int count, char** arguments) {
    std::vector<std::string> wanted;
    for (int i = 1; i < count; ++i) {
        if (!std::strcmp(arguments[i], "--quick")) {
            quick = true;
        } else {
            wanted.emplace_back(arguments[i]);
        }
    }
    if (wanted.empty())
        for (const char* name : {"scalar", "avx2", "avx512", "neon"})
            if (kernels_named(name)) wanted.emplace_back(name);
    std::printf("instruction sets:");
    for (const std::string& name : wanted) {
        std::printf(" %s", name.c_str());
        where = name;
        const Kernels* set = kernels_named(name.c_str());
        if (!set) fail("this instruction set is not built, or cannot run here");
        if (set->name != name) fail("it calls itself otherwise");
        sets.push_back(set);
    }
    std::printf("\n");

    check_half();
    check_quantise();
    for (Form form : kForms) check_dots(form);
    check_rms_norm();
    check_elementwise();
    check_argmax();
    check_attend();
    check_speed_probes();
    for (Form form : kForms) check_linear(form);
    for (KvType type : kKvTypes) check_kv_write(type);
    for (KvType type : kKvTypes) check_attention(type);
    check_route();
    for (Form form : kForms) check_moe(form, form);
    check_moe(Form::mxfp4, Form::q8);
    check_moe(Form::bf16, Form::q8);
    check_sample();
    check_nan();
    check_pool();
    check_shared_engine();
    std::printf("all as expected\n");
    return 0;
}
