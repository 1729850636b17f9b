// The Python face of the native kernels: turns buffers into pointers and releases the GIL. All checking of shapes
// and types happens in freehold.kernels.ops; bfloat16 arrives as uint16, since buffers have no such type.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "kernels/rms_norm.h"

namespace nb = nanobind;

namespace {

template <typename Scalar, int Rank>
using Array = nb::ndarray<Scalar, nb::ndim<Rank>, nb::c_contig, nb::device::cpu>;

template <typename Buffer, typename Scalar>
void rms_norm(Array<const Buffer, 2> x, Array<const Buffer, 1> weight, Array<Buffer, 2> out, float eps) {
    const auto* x_data = reinterpret_cast<const Scalar*>(x.data());
    const auto* weight_data = reinterpret_cast<const Scalar*>(weight.data());
    auto* out_data = reinterpret_cast<Scalar*>(out.data());
    const size_t T = x.shape(0), D = x.shape(1);
    nb::gil_scoped_release release;
    freehold::rms_norm(x_data, weight_data, out_data, T, D, eps);
}

}  // namespace

NB_MODULE(_native, module) {
    module.doc() = "Native CPU kernels of Freehold; called through freehold.kernels, never directly.";
    module.def("rms_norm_f32", &rms_norm<float, float>, nb::arg("x"), nb::arg("weight"), nb::arg("out"),
               nb::arg("eps"));
    module.def("rms_norm_bf16", &rms_norm<uint16_t, freehold::bf16>, nb::arg("x"), nb::arg("weight"), nb::arg("out"),
               nb::arg("eps"));
}
