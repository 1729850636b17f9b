// What all kernels share: number formats as they lie in memory, packed matrices, and tiles of activations.
// The layouts are those of freehold/weights/packed.py, which packs and unpacks them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace freehold {

inline constexpr size_t kPanel = 16;      // rows that lie side by side
inline constexpr size_t kBlock = 32;      // columns that share a scale
inline constexpr size_t kTile = 32;       // tokens that go through a panel together, at most
inline constexpr size_t kUnitPanels = 4;  // panels of paired gate and up rows that make one block of hidden units

// Always inlined, so that no copy compiled for one instruction set can be linked into the code of another.
[[gnu::always_inline]] constexpr size_t ceil_div(size_t count, size_t by) { return (count + by - 1) / by; }

enum class Form : int { mxfp4 = 0, q8 = 1, bf16 = 2, f32 = 3 };
enum class KvType : int { f32 = 0, bf16 = 1, q8 = 2 };

// A packed matrix of R rows and C columns; the caller owns the memory. q8 numbers are -127 … 127: for -128, which
// packing never makes, results are undefined. Panels follow each other without a gap, and so do the matrices of a
// stack.
struct Matrix {
    Form form;
    const uint8_t* data;
    const uint8_t* scales;
    size_t R, C;
    size_t panels;

    Matrix(Form form, const void* data, const void* scales, size_t R, size_t C, bool paired = false)
        : form(form),
          data(static_cast<const uint8_t*>(data)),
          scales(static_cast<const uint8_t*>(scales)),
          R(R),
          C(C),
          panels(paired ? ceil_div(R / 2, 2 * kPanel) * kUnitPanels : ceil_div(R, kPanel)) {}

    bool quantised() const { return form == Form::mxfp4 || form == Form::q8; }
    size_t blocks() const { return ceil_div(C, kBlock); }
    size_t panel_bytes() const {
        switch (form) {
            case Form::mxfp4:
                return blocks() * kPanel * kBlock / 2;
            case Form::q8:
                return blocks() * kPanel * kBlock;
            case Form::bf16:
                return C * kPanel * 2;
            default:
                return C * kPanel * 4;
        }
    }
    size_t panel_scale_bytes() const {
        return form == Form::mxfp4 ? blocks() * kPanel : form == Form::q8 ? blocks() * kPanel * 2 : 0;
    }
    const uint8_t* panel_data(size_t panel) const { return data + panel * panel_bytes(); }
    const uint8_t* panel_scales(size_t panel) const { return scales + panel * panel_scale_bytes(); }
    Matrix of_stack(size_t index) const {
        Matrix one = *this;
        one.data += index * panels * panel_bytes();
        one.scales += index * panels * panel_scale_bytes();
        return one;
    }
};

// Activations of m <= kTile tokens, either quantised, block by block with the tokens of a block side by side:
//   values (B, m, bytes of a block) · scales (B, m) · offsets (B, m)
// where the instruction set decides what values and offsets look like for the weights' form, or as plain rows (m, C)
// that lie `stride` floats apart.
struct Tile {
    size_t m = 0;
    Form form = Form::f32;  // of the weights
    int8_t* values = nullptr;
    float* scales = nullptr;
    int32_t* offsets = nullptr;
    const float* rows = nullptr;
    size_t stride = 0;
};

}  // namespace freehold
