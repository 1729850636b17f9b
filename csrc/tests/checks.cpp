#include "tests/checks.h"

#include <algorithm>

namespace test {

const char* name_of(Form form) {
    constexpr const char* kNames[] = {"mxfp4", "q8", "bf16", "f32"};
    return kNames[static_cast<int>(form)];
}
const char* name_of(KvType type) {
    constexpr const char* kNames[] = {"f32", "bf16", "q8"};
    return kNames[static_cast<int>(type)];
}

std::vector<size_t> token_counts() { return sizes<size_t>({0, 1, 2, 31, 33, 70}, {0, 1, 2, 33}); }

std::vector<size_t> loners(size_t T) {
    std::vector<size_t> tokens;
    for (size_t t : {size_t{0}, T / 3, T - 1})
        if (t < T && (tokens.empty() || tokens.back() != t)) tokens.push_back(t);
    return tokens;
}

Engine& engine_of(unsigned threads) {
    static std::vector<std::unique_ptr<Engine>> engines(5);
    if (!engines[threads]) engines[threads] = std::make_unique<Engine>(threads);
    return *engines[threads];
}

void on_each_set(const std::string& what, const std::function<void(const Kernels&)>& check) {
    for (const Kernels* set : sets) {
        use_kernels(set->name);
        where = std::string(set->name) + " " + what;
        check(*set);
    }
}

Buffer<float> on_any_threads(size_t count, const std::function<void(Engine&, float*)>& run) {
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

bool quantised(Form form) { return form == Form::mxfp4 || form == Form::q8; }

// --- the quantiser's definition --------------------------------------------------------------------------------------

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

std::vector<double> seen_by(Form form, const float* x, size_t C) {
    if (!quantised(form)) return {x, x + C};
    const QuantisedRow row = quantise_plainly(x, C);
    std::vector<double> values(C);
    for (size_t c = 0; c < C; ++c) values[c] = row.at(c);
    return values;
}

Sum dot(const double* a, const double* b, size_t n) {
    Sum sum;
    for (size_t i = 0; i < n; ++i) sum.value += a[i] * b[i], sum.terms += std::abs(a[i] * b[i]);
    return sum;
}

double swiglu_plainly(double gate, double up, double alpha, double limit) {
    gate = std::min(gate, limit), up = std::clamp(up, -limit, limit);
    return gate / (1 + std::exp(-alpha * gate)) * (up + 1);
}

Angles::Angles(Random& random, size_t T, size_t H) : cos(T * (H / 2)), sin(T * (H / 2)) {
    for (size_t i = 0; i < cos.size(); ++i) {
        const double angle = 6.3 * random.uniform();
        cos[i] = static_cast<float>(std::cos(angle));
        sin[i] = static_cast<float>(std::sin(angle));
    }
}

Weights::Weights(Random& random, Form form, size_t E, size_t R, size_t C, bool paired, bool extreme)
    : form_(form),
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

Matrix Weights::matrix() const {
    const void* data = form_ == Form::bf16  ? static_cast<const void*>(words_.data())
                       : form_ == Form::f32 ? static_cast<const void*>(floats_.data())
                                            : static_cast<const void*>(bytes_.data());
    const void* scales = form_ == Form::mxfp4 ? static_cast<const void*>(exponents_.data())
                         : form_ == Form::q8  ? static_cast<const void*>(halves_.data())
                                              : nullptr;
    return {form_, data, scales, R_, C_, paired_};
}

void Weights::fill_row(Random& random, size_t e, size_t panel, size_t lane, bool extreme) {
    const size_t unit = panel / 2 * 16 + lane;  // of a paired matrix
    const size_t r = paired_ ? 2 * unit + panel % 2 : panel * 16 + lane;
    const bool used = r < R_;
    double* values = used ? values_.data() + (e * R_ + r) * C_ : nullptr;
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
                const int number = extreme ? (random.below(2) ? 127 : -127) : static_cast<int>(random.below(255)) - 127;
                value = number * scale;
                bytes_[((block * 8 + i / 4) * 16 + lane) * 4 + i % 4] = static_cast<uint8_t>(number);
            }
        }
    }
}

}  // namespace test
