// The kernels of the table one by one; those of attention are checked in check_attention.cpp.
#include <algorithm>

#include "kernels/half.h"
#include "tests/checks.h"

namespace test {

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

// Memory of a tile's m tokens of C columns, quantised as a set likes it or plain.
struct TestTile {
    const Kernels& k;
    size_t C;
    Buffer<int8_t> values;
    Buffer<float> scales, rows;
    Buffer<int32_t> offsets;
    Tile tile;

    TestTile(const Kernels& k, Form form, size_t m, size_t C, size_t stride)
        : k(k),
          C(C),
          values(quantised(form) ? (C + 31) / 32 * m * block_bytes(k, form) : 0),
          scales(quantised(form) ? (C + 31) / 32 * m : 0),
          rows(quantised(form) ? 0 : (m - 1) * stride + C),
          offsets(scales.size()) {
        tile.m = m;
        tile.form = form;
        tile.values = values.data();
        tile.scales = scales.data();
        tile.offsets = offsets.data();
        tile.rows = rows.data();
        tile.stride = stride;
    }
    void set(size_t t, const float* row) {
        if (scales.size()) {
            k.quantise(row, C, tile, t);
        } else {
            std::copy(row, row + C, rows.data() + t * tile.stride);
        }
    }
    // 16 columns from `first` on, of each token, as weights of one see them: (m, 16)
    Buffer<float> read(size_t first) const {
        const size_t blocks = (C + 31) / 32, block = first / 32;
        Buffer<uint8_t> weights(blocks * (tile.form == Form::q8 ? 512 : 256)), exponents(blocks * 16);
        Buffer<uint16_t> halves(blocks * 16);
        std::fill(weights.begin(), weights.end(), uint8_t{0});
        std::fill(exponents.begin(), exponents.end(), uint8_t{127});
        std::fill(halves.begin(), halves.end(), to_half(1.0f));
        for (size_t r = 0; r < 16; ++r) {
            const size_t column = first % 32 + r;
            if (tile.form == Form::q8) {
                weights[block * 512 + (column / 4 * 16 + r) * 4 + column % 4] = 1;
            } else {
                weights[block * 256 + (column / 8 * 16 + r) * 4 + column % 4] = column % 8 < 4 ? 0x02 : 0x20;
            }
        }
        const void* row_scales = tile.form == Form::q8 ? static_cast<const void*>(halves.data()) : exponents.data();
        PanelSums sums;
        dot_panels(k, Matrix(tile.form, weights.data(), row_scales, 16, C), 0, 1, tile, sums);
        Buffer<float> seen(tile.m * 16);
        std::copy(sums[0], sums[0] + tile.m * 16, seen.data());
        return seen;
    }
};

void check_quantise() {
    Random random(2);
    for (size_t C : sizes<size_t>({1, 16, 31, 32, 33, 100, 160}, {1, 33, 96}))
        for (size_t m : sizes<size_t>({1, 2, 3, 4, 7, 32}, {1, 3, 32}))
            for (double deviation : {1.0, 1e-20, 1e-38, 1e20, 0.0}) {
                Buffer<float> x = normals(random, m * C, deviation);
                if (deviation == 1.0)  // ties: in steps of 1, as the largest says
                    for (size_t i = 0; i < m * C; ++i) x[i] = i % C % 32 == 5 ? -127.0f : std::floor(30 * x[i]) + 0.5f;
                on_each_set(text("quantise C=%zu m=%zu of size %g", C, m, deviation), [&](const Kernels& k) {
                    for (Form form : {Form::mxfp4, Form::q8}) {
                        TestTile to(k, form, m, C, 0);
                        for (size_t t = m; t-- > 0;) to.set(t, x.data() + t * C);
                        for (size_t first = 0; first < C; first += 16) {
                            const Buffer<float> seen = to.read(first);
                            for (size_t t = 0; t < m; ++t) {
                                const QuantisedRow row = quantise_plainly(x.data() + t * C, C);
                                for (size_t i = 0; i < 16; ++i) {
                                    const auto number = static_cast<float>(row.numbers[first + i]);
                                    expect(seen[t * 16 + i] == number * row.scales[first / 32], "the rounded values");
                                }
                            }
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
            for (size_t m : sizes<size_t>({1, 2, 3, 4, 5, 7, 8, 9, 15, 31, 32}, {1, 3, 5, 32})) {
                const bool extreme = (m + panels) % 2 == 0;
                const Weights w(random, form, 1, panels * 16, C, false, extreme);
                Buffer<float> x = normals(random, m * C);
                if (extreme)
                    for (float& value : x) value = value > 0 ? 3.0f : -3.0f;
                on_each_set(
                    text("dot %s C=%zu panels=%zu m=%zu%s", name_of(form), C, panels, m,
                         extreme ? " of the largest values" : ""),
                    [&](const Kernels& k) {
                        const Matrix matrix = w.matrix();
                        TestTile tile(k, form, m, C, C + m % 4);
                        for (size_t t = 0; t < m; ++t) tile.set(t, x.data() + t * C);
                        PanelSums sums;
                        dot_panels(k, matrix, 0, panels, tile.tile, sums);
                        for (size_t t = 0; t < m; ++t) {
                            const std::vector<double> seen = seen_by(form, x.data() + t * C, C);
                            TestTile lone(k, form, 1, C, C);
                            lone.set(0, x.data() + t * C);
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
    on_each_set("swiglu of NaN", [&](const Kernels& k) {
        for (size_t lane = 0; lane < 16; ++lane)
            for (bool in_gate : {false, true}) {
                Buffer<float> gate = normals(random, 16), up = normals(random, 16), out(16);
                (in_gate ? gate : up)[lane] = kNan;
                const Buffer<float> bias = normals(random, 16);
                k.swiglu(gate.data(), up.data(), bias.data(), bias.data(), out.data(), 1.702f, 7.0f);
                for (size_t i = 0; i < 16; ++i) expect(std::isnan(out[i]) == (i == lane), "NaN in its lane alone");
            }
    });
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

    for (size_t n : sizes<size_t>({1, 15, 16, 17, 100, 1000}, {1, 15, 17, 100}))
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

}  // namespace test
