// Scalar conversions of small float formats. Static: each file has its own copy, compiled for its instruction set.
#pragma once

#include <cstdint>
#include <cstring>

namespace freehold {

static inline float float_of_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
static inline uint32_t bits_of_float(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float widened_bf16(uint16_t bits) { return float_of_bits(uint32_t{bits} << 16); }

// Round to nearest, ties to even.
static inline uint16_t narrowed_bf16(float value) {
    const uint32_t bits = bits_of_float(value);
    if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);  // rounding could carry it into infinity
    return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// Half of an E8M0 scale, 2^(s - 128): kernels multiply by twice the weights. 0 and 1 give 0 and 2^-127, 255 infinity.
static inline float half_scale(uint8_t scale) { return float_of_bits(uint32_t{scale} << 23) * 0.5f; }

static inline float widened_half(uint16_t half) {
    const uint32_t sign = uint32_t{half & 0x8000u} << 16;
    const uint32_t magnitude = half & 0x7FFFu;
    if (magnitude >= 0x7C00) return float_of_bits(sign | 0x7F800000u | (magnitude & 0x3FF) << 13);
    if (magnitude < 0x400)  // subnormal: an integer times 2^-24
        return float_of_bits(bits_of_float(static_cast<float>(magnitude) * 5.9604644775390625e-8f) | sign);
    return float_of_bits(sign | ((magnitude << 13) + (112u << 23)));
}

// Round to nearest, ties to even; too large becomes infinity.
static inline uint16_t narrowed_half(float value) {
    const uint32_t bits = bits_of_float(value);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    const uint32_t magnitude = bits & 0x7FFFFFFF;
    if (magnitude > 0x7F800000) return sign | 0x7E00;
    if (magnitude >= 0x477FF000) return sign | 0x7C00;
    if (magnitude < 0x38800000) {  // subnormal: let float addition round at 2^-24
        const float shifted = float_of_bits(magnitude) + 0.5f;
        return sign | static_cast<uint16_t>(bits_of_float(shifted) - bits_of_float(0.5f));
    }
    const uint32_t rounded = magnitude + 0xFFF + (magnitude >> 13 & 1) - (112u << 23);
    return sign | static_cast<uint16_t>(rounded >> 13);
}

}  // namespace freehold
