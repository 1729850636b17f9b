// What the test of the kernels stands on: random numbers, memory without slack, number formats in double precision, and
// the report. Nothing here is shared with the code under test.
#pragma once

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

namespace test {

// --- report --------------------------------------------------------------------------------------------------------

inline std::string where;  // what is being checked, for the message of a failure
inline size_t checks = 0;  // since the last report

[[gnu::format(printf, 1, 2)]] inline std::string text(const char* format, ...) {
    char line[512];
    va_list args;
    va_start(args, format);
    std::vsnprintf(line, sizeof line, format, args);
    va_end(args);
    return line;
}

[[noreturn]] inline void fail(const std::string& what) {
    std::printf("FAILED %s: %s\n", where.c_str(), what.c_str());
    std::exit(1);
}

inline void expect(bool holds, const char* what) {
    ++checks;
    if (!holds) fail(what);
}

inline void expect_near(double got, double expected, double tolerance, const char* what, size_t row, size_t column) {
    ++checks;
    if (!(std::abs(got - expected) <= tolerance))
        fail(text("%s[%zu][%zu] is %.9g, expected %.9g within %.3g", what, row, column, got, expected, tolerance));
}

template <class T>
void expect_same_bits(const T* got, const T* expected, size_t count, const char* what) {
    ++checks;
    for (size_t i = 0; i < count; ++i)
        if (std::memcmp(got + i, expected + i, sizeof(T)) != 0)
            fail(text("%s: element %zu of %zu is %.9g, expected %.9g to the bit", what, i, count,
                      static_cast<double>(got[i]), static_cast<double>(expected[i])));
}

inline void report(const std::string& group) {
    std::printf("%-28s %8zu checks\n", group.c_str(), checks);
    std::fflush(stdout);
    if (!checks) fail("nothing was checked in " + group);
    checks = 0;
}

// --- memory --------------------------------------------------------------------------------------------------------

// So many elements and not a byte more behind them, for AddressSanitizer. Every other buffer starts one element past
// an aligned address. All bits are set at first, which in floats is NaN: what is read before it is written shows.
template <class T>
class Buffer {
  public:
    explicit Buffer(size_t size) : shift_((shift = !shift)), size_(size), data_(new T[size + shift_]) {
        std::memset(static_cast<void*>(data_.get()), 0xFF, (size + shift_) * sizeof(T));
    }
    T* data() { return data_.get() + shift_; }
    const T* data() const { return data_.get() + shift_; }
    size_t size() const { return size_; }
    T& operator[](size_t i) { return data()[i]; }
    const T& operator[](size_t i) const { return data()[i]; }
    T* begin() { return data(); }
    T* end() { return data() + size_; }

  private:
    static inline bool shift = false;
    size_t shift_, size_;
    std::unique_ptr<T[]> data_;
};

// --- random numbers ------------------------------------------------------------------------------------------------

class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint64_t bits() {  // splitmix64
        uint64_t z = state_ += 0x9E3779B97F4A7C15u;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        return z ^ (z >> 31);
    }
    size_t below(size_t bound) { return bits() % bound; }
    double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
    float normal(double deviation = 1.0) {
        const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform()));
        return static_cast<float>(deviation * radius * std::cos(2.0 * 3.14159265358979323846 * uniform()));
    }

  private:
    uint64_t state_;
};

inline Buffer<float> normals(Random& random, size_t count, double deviation = 1.0) {
    Buffer<float> values(count);
    for (float& value : values) value = random.normal(deviation);
    return values;
}

// --- number formats ------------------------------------------------------------------------------------------------

inline double of_half(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double sign = bits & 0x8000 ? -1.0 : 1.0;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    return sign * (exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24));
}

inline uint16_t to_half(double value) {
    const auto sign = static_cast<uint16_t>(std::signbit(value) ? 0x8000 : 0);
    if (std::isnan(value)) return static_cast<uint16_t>(sign | 0x7E00);
    value = std::abs(value);
    const int exponent = value > 0 ? std::max(std::ilogb(std::min(value, 1e9)), -14) : -14;
    // In steps of the format at this size; what is carried into the next exponent comes out right of itself.
    const double steps = std::nearbyint(std::ldexp(std::min(value, 1e9), 10 - exponent));
    const double bits = steps + 1024.0 * (exponent + 14);
    return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::min(bits, 31744.0)));
}

inline float of_bf16(uint16_t bits) {
    const uint32_t wide = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

inline uint16_t to_bf16(float value) {  // by way of the two neighbours
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    const auto below = static_cast<uint16_t>(wide >> 16), above = static_cast<uint16_t>(below + 1);
    if (std::isnan(value)) return static_cast<uint16_t>(below | 0x40);
    if (std::isinf(value)) return below;
    const double down = std::abs(static_cast<double>(value) - of_bf16(below));
    const double step = std::abs(static_cast<double>(of_bf16(static_cast<uint16_t>(below & 0xFF80)))) / 128;
    const double half = (step > 0 ? step : 0x1p-133) / 2;  // of the gap between the two
    return down < half || (down == half && below % 2 == 0) ? below : above;
}

}  // namespace test
