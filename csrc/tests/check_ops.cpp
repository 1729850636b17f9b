// The ops of an engine, all but attention.
#include <algorithm>

#include "tests/checks.h"

namespace test {

void check_rms_norm() {
    Random random(4);
    for (size_t D : sizes<size_t>({1, 2, 7, 15, 16, 17, 31, 33, 64, 100, 2880, 4099}, {1, 17, 100}))
        for (size_t T : token_counts())
            for (double deviation : {1.0, 1e-4, 1e6}) {
                if (T * D > 20000) continue;
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

void check_rope() {
    Random random(17);
    for (size_t T : token_counts())
        for (size_t H : sizes<size_t>({2, 6, 32, 34, 64, 80, 128}, {2, 34, 64})) {
            const size_t N = 1 + random.below(4), stride = N * H + random.below(4);
            const Buffer<float> x = normals(random, T ? (T - 1) * stride + N * H : 0);
            const Angles angles(random, T, H);
            on_each_set(text("rope T=%zu N=%zu H=%zu stride=%zu", T, N, H, stride), [&](const Kernels&) {
                const Buffer<float> out = on_any_threads(T * N * H, [&](Engine& engine, float* to) {
                    engine.rope(x.data(), stride, angles.cos.data(), angles.sin.data(), to, T, N, H);
                });
                for (size_t t = 0; t < T; ++t)
                    for (size_t n = 0; n < N; ++n)
                        for (size_t i = 0; i < H / 2; ++i) {
                            const double a = x[t * stride + n * H + i], b = x[t * stride + n * H + H / 2 + i];
                            const double c = angles.cos[t * H / 2 + i], s = angles.sin[t * H / 2 + i];
                            const double tolerance = 2e-7 * (std::abs(a) + std::abs(b));
                            const float* got = out.data() + (t * N + n) * H;
                            expect_near(got[i], a * c - b * s, tolerance, "first half", t, n * H + i);
                            expect_near(got[H / 2 + i], b * c + a * s, tolerance, "second half", t, n * H + i);
                        }
            });
        }
    report("rope");
}

void check_linear(Form form) {
    Random random(8);
    struct Shape {
        size_t R, C;
    };
    std::vector<Shape> shapes = {{1, 1}, {16, 32}, {17, 33}, {31, 64}, {100, 95}, {48, 160}, {70, 7}, {150, 288}};
    if (quick) shapes = {{1, 1}, {17, 33}, {70, 96}};
    for (const Shape& shape : shapes) {
        const size_t R = shape.R, C = shape.C;
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
                    const LinearArgs args{.x = x.data(),
                                          .T = T,
                                          .stride = stride,
                                          .norm = normed ? norm.data() : nullptr,
                                          .eps = 1e-5f,
                                          .bias = biased ? bias.data() : nullptr,
                                          .residual = added ? residual.data() : nullptr,
                                          .out = nullptr};
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

void check_linear_backward(Form form) {
    Random random(21);
    struct Shape {
        size_t R, C;
    };
    std::vector<Shape> shapes = {{1, 1}, {16, 32}, {17, 33}, {31, 64}, {100, 95}, {48, 160}, {70, 7}, {150, 288}};
    if (quick) shapes = {{1, 1}, {17, 33}, {70, 96}};
    for (const Shape& shape : shapes) {
        const size_t R = shape.R, C = shape.C;
        const Weights w(random, form, 1, R, C);
        for (size_t T : token_counts()) {
            const size_t stride = R + T % 3;
            const Buffer<float> gradient = normals(random, T ? (T - 1) * stride + R : 0);
            const std::string what =
                text("linear_backward %s T=%zu R=%zu C=%zu stride=%zu", name_of(form), T, R, C, stride);
            on_each_set(what, [&](const Kernels&) {
                const Buffer<float> out = on_any_threads(T * C, [&](Engine& engine, float* to) {
                    engine.linear_backward(w.matrix(), {gradient.data(), T, stride, to});
                });
                for (size_t t = 0; t < T; ++t)
                    for (size_t c = 0; c < C; ++c) {
                        double value = 0, terms = 0;
                        for (size_t r = 0; r < R; ++r) {
                            const double term = gradient[t * stride + r] * w.row(0, r)[c];
                            value += term, terms += std::abs(term);
                        }
                        expect_near(out[t * C + c], value, 1e-6 * terms + kTiny, "out", t, c);
                    }
                for (size_t t : loners(T)) {
                    Buffer<float> alone(C);
                    engine_of(2).linear_backward(w.matrix(), {gradient.data() + t * stride, 1, stride, alone.data()});
                    expect_same_bits(alone.data(), out.data() + t * C, C, "a token alone and among others");
                }
            });
        }
    }
    report(std::string("linear_backward ") + name_of(form));
}

void check_add_product() {
    Random random(23);
    struct Shape {
        size_t M, K, N;
    };
    std::vector<Shape> shapes = {{0, 3, 4},   {3, 0, 4},    {3, 4, 0},   {1, 1, 1},     {2, 300, 16},
                                 {7, 16, 33}, {97, 257, 8}, {16, 5, 64}, {193, 16, 49}, {100, 513, 17}};
    if (quick) shapes = {{3, 0, 4}, {7, 16, 33}, {97, 257, 8}};
    for (const auto& [M, K, N] : shapes)
        for (int turned = 0; turned < 4; ++turned) {
            // Either side by rows or by columns, with something between them.
            const size_t gap = turned;
            const size_t left_lines = turned & 1 ? K : M, left_long = (turned & 1 ? M : K) + gap;
            const size_t right_lines = turned & 2 ? N : K, right_long = (turned & 2 ? K : N) + gap;
            const Buffer<float> left = normals(random, left_lines * left_long);
            const Buffer<float> right = normals(random, right_lines * right_long);
            const Buffer<float> before = normals(random, M * N);
            const Strided a = {left.data(), turned & 1 ? 1 : left_long, turned & 1 ? left_long : 1};
            const Strided b = {right.data(), turned & 2 ? 1 : right_long, turned & 2 ? right_long : 1};
            on_each_set(text("add_product M=%zu K=%zu N=%zu turned=%d", M, K, N, turned), [&](const Kernels&) {
                const Buffer<float> out = on_any_threads(M * N, [&](Engine& engine, float* to) {
                    std::copy_n(before.data(), M * N, to);
                    engine.add_product({a, b, M, K, N, to});
                });
                for (size_t m = 0; m < M; ++m)
                    for (size_t n = 0; n < N; ++n) {
                        double value = before[m * N + n], terms = std::abs(value);
                        for (size_t k = 0; k < K; ++k) {
                            const double term = static_cast<double>(a.data[m * a.row + k * a.column]) *
                                                b.data[k * b.row + n * b.column];
                            value += term, terms += std::abs(term);
                        }
                        expect_near(out[m * N + n], value, 1e-6 * terms + kTiny, "out", m, n);
                    }
                if (M == 0 || N == 0) return;
                Buffer<float> alone(N);
                std::copy_n(before.data() + (M - 1) * N, N, alone.data());
                engine_of(2).add_product({{a.data + (M - 1) * a.row, a.row, a.column}, b, 1, K, N, alone.data()});
                expect_same_bits(alone.data(), out.data() + (M - 1) * N, N, "a row alone and among others");
            });
        }
    report("add_product");
}

void check_widen(Form form) {
    Random random(22);
    struct Shape {
        size_t R, C;
    };
    for (const Shape& shape : sizes<Shape>({{1, 1}, {16, 32}, {17, 33}, {70, 7}, {100, 95}, {48, 160}}, {{17, 33}})) {
        const size_t R = shape.R, C = shape.C, lies = (R + 15) / 16 * 16;
        const Weights w(random, form, 1, R, C);
        on_each_set(text("widen %s R=%zu C=%zu", name_of(form), R, C), [&](const Kernels&) {
            Buffer<float> wide(C * lies);
            Buffer<uint16_t> narrow(C * lies);
            engine_of(3).widen(w.matrix(), false, wide.data());
            engine_of(2).widen(w.matrix(), true, narrow.data());
            for (size_t c = 0; c < C; ++c)
                for (size_t r = 0; r < lies; ++r) {
                    const auto value = static_cast<float>(r < R ? w.row(0, r)[c] : 0.0);
                    expect_near(wide[c * lies + r], value, 0, "wide", c, r);
                    expect_near(of_bf16(narrow[c * lies + r]), of_bf16(to_bf16(value)), 0, "narrow", c, r);
                }
        });
    }
    report(std::string("widen ") + name_of(form));
}

void check_swiglu_backward() {
    Random random(23);
    constexpr float kAlpha = 1.702f, kLimit = 1.5f;
    for (size_t F : sizes<size_t>({1, 16, 31, 32, 33, 70, 96}, {1, 33, 64}))
        for (size_t count : {size_t{1}, size_t{9}})
            for (bool narrow : {false, true}) {
                const size_t width = (F + 31) / 32 * 64;
                Buffer<float> of_hidden = normals(random, count * F), sums = normals(random, count * width);
                const Buffer<float> weights = normals(random, count);
                sums[0] = kLimit;  // where the gradient still is that of what is not clamped
                Buffer<uint16_t> narrow_of_hidden(count * F), narrow_sums(count * width);
                for (size_t i = 0; narrow && i < count * F; ++i)
                    of_hidden[i] = of_bf16(narrow_of_hidden[i] = to_bf16(of_hidden[i]));
                for (size_t i = 0; narrow && i < count * width; ++i)
                    sums[i] = of_bf16(narrow_sums[i] = to_bf16(sums[i]));
                on_each_set(
                    text("swiglu_backward F=%zu of %zu%s", F, count, narrow ? " narrow" : ""), [&](const Kernels&) {
                        Buffer<float> of_sums(count * width), hidden(count * F), of_weights(count);
                        Buffer<uint16_t> narrow_of_sums(count * width), narrow_hidden(count * F);
                        SwigluBackwardArgs args{count,  F,      of_hidden.data(), sums.data(),   weights.data(),
                                                kAlpha, kLimit, of_sums.data(),   hidden.data(), of_weights.data(),
                                                narrow};
                        if (narrow) {
                            args.of_hidden = narrow_of_hidden.data(), args.sums = narrow_sums.data();
                            args.of_sums = narrow_of_sums.data(), args.hidden = narrow_hidden.data();
                        }
                        engine_of(2).swiglu_backward(args);
                        for (size_t i = 0; narrow && i < count * width; ++i) of_sums[i] = of_bf16(narrow_of_sums[i]);
                        for (size_t i = 0; narrow && i < count * F; ++i) hidden[i] = of_bf16(narrow_hidden[i]);
                        const double precision = narrow ? 0x1p-8 : 4e-6;
                        for (size_t i = 0; i < count; ++i) {
                            double of_weight = 0, terms = 0;
                            for (size_t f = 0; f < width / 2; ++f) {
                                const size_t at = i * width + f / 16 * 32 + f % 16;
                                if (f >= F) {
                                    expect(of_sums[at] == 0 && of_sums[at + 16] == 0, "zeros as padding");
                                    continue;
                                }
                                const double gate = sums[at], up = sums[at + 16];
                                const double g = std::min<double>(gate, kLimit);
                                const double u = std::clamp<double>(up, -kLimit, kLimit);
                                const double sigmoid = 1 / (1 + std::exp(-kAlpha * g));
                                const double of = of_hidden[i * F + f] * static_cast<double>(weights[i]);
                                const double value = g * sigmoid * (u + 1);
                                const double slope = (u + 1) * sigmoid * (1 + kAlpha * g * (1 - sigmoid));
                                const double of_gate = gate <= kLimit ? of * slope : 0;
                                const double of_up = std::abs(up) <= kLimit ? of * g * sigmoid : 0;
                                const double tolerance = precision * (std::abs(of) * 4);
                                expect_near(of_sums[at], of_gate, tolerance, "of gate", i, f);
                                expect_near(of_sums[at + 16], of_up, tolerance, "of up", i, f);
                                expect_near(hidden[i * F + f], value, precision * 4, "hidden", i, f);
                                of_weight += value * of_hidden[i * F + f];
                                terms += std::abs(4 * of_hidden[i * F + f]);
                            }
                            expect_near(of_weights[i], of_weight, precision * terms, "of weight", i, 0);
                        }
                    });
            }
    report("swiglu_backward");
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

namespace {

// An adapter's factors for E matrices of R rows and C columns.
struct Factors {
    Weights a, b;
    Lora lora;

    Factors(Random& random, size_t E, size_t R, size_t C, size_t rank, bool paired = false)
        : a(random, Form::f32, E, rank, C),
          b(random, Form::f32, E, R, rank, paired),
          lora{a.matrix(), b.matrix(), 0.7f} {}

    // What expert e's result gains in row r.
    Sum added(size_t e, size_t r, const float* x) const {
        Sum sum{0, 0};
        for (size_t i = 0; i < a.rows(); ++i) {
            const Sum low = dot(a.row(e, i), std::vector<double>(x, x + a.columns()).data(), a.columns());
            sum.value += 0.7 * low.value * b.row(e, r)[i];
            sum.terms += 0.7 * low.terms * std::abs(b.row(e, r)[i]);
        }
        return sum;
    }
};

// An adapter inside a mixture; null where it leaves a matrix alone.
struct ExpertFactors {
    const Factors *gate_up, *down;
};

struct MoeCase {
    const Weights &gate_up, &down;
    Form gate_up_form, down_form;
    MoeArgs args;
    std::vector<ExpertFactors> adapters = {};  // behind args.loras

    size_t D() const { return gate_up.columns(); }
    size_t F() const { return down.columns(); }
};

// What expert e makes of a token's row x, and by how much that may be off: (D) each.
void visit_plainly(const MoeCase& c, size_t e, const float* x, const ExpertFactors& adapter, std::vector<double>& out,
                   std::vector<double>& off) {
    const size_t D = c.D(), F = c.F();
    const std::vector<double> seen = seen_by(c.gate_up_form, x, D);
    std::vector<float> hidden(F);
    std::vector<double> hidden_off(F);
    for (size_t f = 0; f < F; ++f) {
        const float* bias = c.args.gate_up_bias + e * 2 * F + 2 * f;
        const Sum gate = dot(c.gate_up.row(e, 2 * f), seen.data(), D);
        const Sum up = dot(c.gate_up.row(e, 2 * f + 1), seen.data(), D);
        const Sum of_gate = adapter.gate_up ? adapter.gate_up->added(e, 2 * f, x) : Sum{0, 0};
        const Sum of_up = adapter.gate_up ? adapter.gate_up->added(e, 2 * f + 1, x) : Sum{0, 0};
        const double g = gate.value + bias[0] + of_gate.value, u = up.value + bias[1] + of_up.value;
        hidden[f] = static_cast<float>(swiglu_plainly(g, u, c.args.alpha, c.args.limit));
        hidden_off[f] = 1e-6 * ((gate.terms + of_gate.terms + 1) * (std::abs(std::clamp(u, -7.0, 7.0)) + 1) * 1.2 +
                                (up.terms + of_up.terms + 1) * std::abs(std::min(g, 7.0)));
    }
    const std::vector<double> kept = seen_by(c.down_form, hidden.data(), F);
    const QuantisedRow row = quantise_plainly(hidden.data(), F);
    for (size_t d = 0; d < D; ++d) {
        const double bias = c.args.down_bias[e * D + d];
        const Sum sum = dot(c.down.row(e, d), kept.data(), F);
        const Sum added = adapter.down ? adapter.down->added(e, d, hidden.data()) : Sum{0, 0};
        double step = 0;
        out[d] = sum.value + bias + added.value;
        off[d] = 1e-6 * (sum.terms + std::abs(bias) + 4 * added.terms + 1);
        for (size_t f = 0; f < F; ++f) {
            off[d] += std::abs(c.down.row(e, d)[f]) * hidden_off[f];
            step = std::max(step, std::abs(c.down.row(e, d)[f]) * row.scales[f / 32]);
        }
        if (quantised(c.down_form)) off[d] += 3 * step;  // a few may be rounded to the other side
    }
}

// What is left for a gradient, and that asking for it changes nothing. With one adapter for all tokens, or none.
void check_kept(const MoeCase& c, const Factors* of_gate_up, const Factors* of_down) {
    const size_t visits = c.args.T * c.args.A, D = c.D(), F = c.F(), width = (F + 31) / 32 * 64;
    on_each_set(
        text("moe kept %s/%s T=%zu D=%zu F=%zu", name_of(c.gate_up_form), name_of(c.down_form), c.args.T, D, F),
        [&](const Kernels&) {
            const size_t low = of_gate_up ? of_gate_up->lora.a.panels * 16 : 0;
            Buffer<float> out(c.args.T * D), same(c.args.T * D), sums(visits * width), rows(visits * low);
            Buffer<float> down_rows(visits * (of_down ? of_down->lora.a.panels * 16 : 0));
            Buffer<uint16_t> narrow(visits * width);
            MoeArgs mine = c.args;
            mine.out = out.data();
            engine_of(2).moe(c.gate_up.matrix(), c.down.matrix(), mine);
            mine.out = same.data();
            mine.kept = {sums.data(), false, of_gate_up ? rows.data() : nullptr, of_down ? down_rows.data() : nullptr};
            engine_of(3).moe(c.gate_up.matrix(), c.down.matrix(), mine);
            expect_same_bits(same.data(), out.data(), out.size(), "out");
            mine.kept = {narrow.data(), true, nullptr, nullptr};
            engine_of(1).moe(c.gate_up.matrix(), c.down.matrix(), mine);
            expect_same_bits(same.data(), out.data(), out.size(), "out");
            size_t visit = 0;
            for (size_t e = 0; e < c.args.E; ++e)
                for (size_t i = 0; i < visits; ++i) {
                    if (static_cast<size_t>(c.args.experts[i]) != e) continue;
                    const float* x = c.args.x + i / c.args.A * D;
                    const std::vector<double> seen = seen_by(c.gate_up_form, x, D);
                    for (size_t r = 0; r < 2 * F; ++r) {
                        const size_t f = r / 2, at = visit * width + f / 16 * 32 + f % 16 + (r % 2 ? 16 : 0);
                        const Sum sum = dot(c.gate_up.row(e, r), seen.data(), D);
                        const Sum added = of_gate_up ? of_gate_up->added(e, r, x) : Sum{0, 0};
                        const double bias = c.args.gate_up_bias[e * 2 * F + r];
                        expect_near(sums[at], sum.value + added.value + bias,
                                    2e-6 * (sum.terms + added.terms + std::abs(bias)) + kTiny, "sum", visit, r);
                        expect_near(of_bf16(narrow[at]), of_bf16(to_bf16(sums[at])), 0, "narrow", visit, r);
                    }
                    for (size_t r = 0; of_gate_up && r < of_gate_up->a.rows(); ++r) {
                        const std::vector<double> plain(x, x + D);
                        const Sum sum = dot(of_gate_up->a.row(e, r), plain.data(), D);
                        expect_near(rows[visit * low + r], 0.7 * sum.value, 2e-6 * sum.terms + kTiny, "row", visit, r);
                    }
                    ++visit;
                }
            for (float value : down_rows) expect(std::isfinite(value), "rows of down are there");
        });
}

void check_moe_case(const MoeCase& c) {
    const size_t T = c.args.T, A = c.args.A, D = c.D();
    const std::string what =
        text("moe %s/%s T=%zu E=%zu A=%zu D=%zu F=%zu%s%s", name_of(c.gate_up_form), name_of(c.down_form), T, c.args.E,
             A, D, c.F(), c.args.norm ? " norm" : "", c.args.residual ? " residual" : "") +
        (c.adapters.empty() ? "" : " adapters");
    on_each_set(what, [&](const Kernels& k) {
        const Buffer<float> out = on_any_threads(T * D, [&](Engine& engine, float* to) {
            MoeArgs mine = c.args;
            mine.out = to;
            engine.moe(c.gate_up.matrix(), c.down.matrix(), mine);
        });
        for (size_t t = 0; t < T; ++t) {
            Buffer<float> x(D);
            std::copy(c.args.x + t * D, c.args.x + (t + 1) * D, x.data());
            if (c.args.norm) k.rms_norm(x.data(), c.args.norm, x.data(), D, c.args.eps);
            std::vector<double> expected(D, 0), tolerance(D, 0), part(D), off(D);
            if (c.args.residual) expected.assign(c.args.residual + t * D, c.args.residual + (t + 1) * D);
            const bool adapted = !c.adapters.empty() && c.args.rows[t] >= 0;
            const ExpertFactors adapter =
                adapted ? c.adapters[static_cast<size_t>(c.args.rows[t])] : ExpertFactors{nullptr, nullptr};
            for (size_t a = 0; a < A; ++a) {
                visit_plainly(c, static_cast<size_t>(c.args.experts[t * A + a]), x.data(), adapter, part, off);
                const double weight = c.args.weights[t * A + a];
                for (size_t d = 0; d < D; ++d) expected[d] += weight * part[d], tolerance[d] += weight * off[d] + 1e-6;
            }
            for (size_t d = 0; d < D; ++d) expect_near(out[t * D + d], expected[d], tolerance[d], "out", t, d);
        }
        for (size_t t : loners(T)) {
            MoeArgs mine = c.args;
            Buffer<float> alone(D);
            mine.T = 1, mine.x += t * D, mine.weights += t * A, mine.experts += t * A, mine.out = alone.data();
            if (mine.residual) mine.residual += t * D;
            if (mine.rows) mine.rows += t;
            engine_of(3).moe(c.gate_up.matrix(), c.down.matrix(), mine);
            expect_same_bits(alone.data(), out.data() + t * D, D, "a token alone and among others");
        }
    });
}

}  // namespace

void check_moe(Form gate_up_form, Form down_form) {
    Random random(13);
    struct Shape {
        size_t E, A, D, F;
    };
    std::vector<Shape> shapes = {{1, 1, 1, 1}, {4, 2, 33, 17}, {3, 3, 64, 32}, {9, 4, 95, 70}, {32, 4, 96, 64}};
    if (quick) shapes = {{4, 2, 33, 17}, {9, 4, 64, 40}};
    for (const auto& [E, A, D, F] : shapes) {
        const Weights gate_up(random, gate_up_form, E, 2 * F, D, true), down(random, down_form, E, D, F);
        const Buffer<float> gate_up_bias = normals(random, E * 2 * F), down_bias = normals(random, E * D);
        const Buffer<float> norm = normals(random, D);
        const Factors of_gate_up(random, E, 2 * F, D, 17, true), of_down(random, E, D, F, 3);
        const std::vector<ExpertFactors> adapters = {
            {&of_gate_up, &of_down}, {nullptr, &of_down}, {&of_gate_up, nullptr}};
        const ExpertLora all{&of_gate_up.lora, &of_down.lora}, second{nullptr, &of_down.lora},
            first{&of_gate_up.lora, nullptr};
        const ExpertLora* const loras[] = {&all, &second, &first};
        for (size_t T : token_counts()) {
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
            MoeArgs args{.x = x.data(),
                         .T = T,
                         .A = A,
                         .weights = weights.data(),
                         .experts = experts.data(),
                         .E = E,
                         .gate_up_bias = gate_up_bias.data(),
                         .down_bias = down_bias.data(),
                         .residual = T % 2 ? residual.data() : nullptr,
                         .alpha = 1.702f,
                         .limit = 7.0f,
                         .out = nullptr};
            check_moe_case({gate_up, down, gate_up_form, down_form, args});
            if (T > 40) continue;
            check_kept({gate_up, down, gate_up_form, down_form, args}, nullptr, nullptr);
            const Buffer<int64_t> nought = [&] {
                Buffer<int64_t> zeros(T);
                std::fill(zeros.begin(), zeros.end(), 0);
                return zeros;
            }();
            MoeArgs adapted = args;
            adapted.num_loras = 1, adapted.loras = loras, adapted.rows = nought.data();
            check_kept({gate_up, down, gate_up_form, down_form, adapted}, &of_gate_up, &of_down);
            args.norm = norm.data(), args.eps = 1e-5f;
            check_moe_case({gate_up, down, gate_up_form, down_form, args});
            Buffer<int64_t> rows(T);
            for (size_t t = 0; t < T; ++t) rows[t] = static_cast<int64_t>((t + 1) % 4) - 1;
            args.num_loras = 3, args.loras = loras, args.rows = rows.data();
            check_moe_case({gate_up, down, gate_up_form, down_form, args, adapters});
        }
    }
    report(std::string("moe ") + name_of(gate_up_form) + "/" + name_of(down_form));
}

void check_add_lora() {
    Random random(22);
    for (size_t C : sizes<size_t>({1, 33, 96}, {33}))
        for (size_t T : token_counts()) {
            if (T > 200) continue;
            // Two parts beside each other for the first adapter, one for the second, none for the third.
            const Factors left(random, 1, 21, C, 5), right(random, 1, 40, C, 70), whole(random, 1, 64, C, 16);
            const Factors* factors[] = {&left, &right, &whole};
            const Lora* parts[] = {&left.lora, &right.lora, &whole.lora};
            const int64_t part_rows[] = {0, 0, 1};
            const size_t columns[] = {2, 24, 0}, R = 64, stride = C + T % 3;
            const Buffer<float> x = normals(random, T ? (T - 1) * stride + C : 0), before = normals(random, T * R);
            const Buffer<float> norm = normals(random, C);
            Buffer<int64_t> rows(T);
            for (size_t t = 0; t < T; ++t) rows[t] = static_cast<int64_t>((t + 1) % 4) - 1;
            on_each_set(text("add_lora T=%zu C=%zu", T, C), [&](const Kernels& k) {
                AddLoraArgs args{x.data(),  T,           stride,  T % 2 ? norm.data() : nullptr,
                                 1e-5f,     rows.data(), 3,       parts,
                                 part_rows, columns,     nullptr, R};
                const Buffer<float> out = on_any_threads(T * R, [&](Engine& engine, float* to) {
                    std::copy(before.data(), before.data() + T * R, to);
                    AddLoraArgs mine = args;
                    mine.out = to;
                    engine.add_lora(mine);
                });
                for (size_t t = 0; t < T; ++t) {
                    Buffer<float> row(C);
                    std::copy(x.data() + t * stride, x.data() + t * stride + C, row.data());
                    if (args.norm) k.rms_norm(row.data(), norm.data(), row.data(), C, 1e-5f);
                    std::vector<double> expected(before.data() + t * R, before.data() + (t + 1) * R), terms(R, 0);
                    for (size_t i = 0; i < 3; ++i)
                        for (size_t r = 0; rows[t] == part_rows[i] && r < factors[i]->b.rows(); ++r) {
                            const Sum sum = factors[i]->added(0, r, row.data());
                            expected[columns[i] + r] += sum.value, terms[columns[i] + r] += sum.terms;
                        }
                    for (size_t r = 0; r < R; ++r)
                        expect_near(out[t * R + r], expected[r], 1e-6 * (terms[r] + std::abs(expected[r])), "out", t,
                                    r);
                }
                for (size_t t : loners(T)) {
                    AddLoraArgs mine = args;
                    Buffer<float> alone(R);
                    std::copy(before.data() + t * R, before.data() + (t + 1) * R, alone.data());
                    mine.T = 1, mine.x += t * stride, mine.rows += t, mine.out = alone.data();
                    engine_of(2).add_lora(mine);
                    expect_same_bits(alone.data(), out.data() + t * R, R, "a token alone and among others");
                }
            });
        }
    report("add_lora");
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
        const Weights w(random, form, 1, R, C);
        const Weights gate_up(random, form, 2, 2 * R, C, true), down(random, form, 2, C, R);
        const Buffer<float> gate_up_bias = normals(random, 2 * 2 * R), down_bias = normals(random, 2 * C);
        const Buffer<float> x = normals(random, T * C), norm = normals(random, C), weights = normals(random, T * 2);
        Buffer<int64_t> experts(T * 2);
        for (size_t i = 0; i < T * 2; ++i) experts[i] = static_cast<int64_t>(i % 2);

        auto linear = [&](const float* from, const float* with) {
            Buffer<float> out(T * R);
            engine_of(2).linear(w.matrix(), {from, T, C, with, 1e-5f, nullptr, nullptr, out.data()});
            return out;
        };
        auto moe = [&](const float* from) {
            Buffer<float> out(T * C);
            engine_of(2).moe(gate_up.matrix(), down.matrix(),
                             {from, T, 2, weights.data(), experts.data(), 2, gate_up_bias.data(), down_bias.data(),
                              nullptr, 1.702f, 7.0f, out.data()});
            return out;
        };
        auto compare = [&](const Buffer<float>& good, const Buffer<float>& out) {
            const size_t width = good.size() / T;
            for (size_t i = 0; i < good.size(); ++i) {
                if (i / width == hit) {
                    expect(!std::isfinite(out[i]), "not finite where the input is not");
                } else {
                    expect_same_bits(&out[i], &good[i], 1, "another token");
                }
            }
        };
        for (size_t at : {size_t{0}, size_t{14}, size_t{17}, size_t{40}, size_t{63}, C - 1})
            for (float bad : {kNan, kInf, -kInf}) {
                Buffer<float> spoilt(T * C);
                std::copy(x.data(), x.data() + T * C, spoilt.data());
                spoilt[hit * C + at] = bad;
                on_each_set(text("%s with %g at %zu", name_of(form), static_cast<double>(bad), at),
                            [&](const Kernels&) {
                                compare(linear(x.data(), nullptr), linear(spoilt.data(), nullptr));
                                if (!std::isnan(bad)) return;  // a norm or a clamp may make infinity finite again
                                compare(linear(x.data(), norm.data()), linear(spoilt.data(), norm.data()));
                                compare(moe(x.data()), moe(spoilt.data()));
                            });
            }
    }
    report("not a number");
}

}  // namespace test
