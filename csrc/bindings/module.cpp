// The Python face of the native kernels: turns addresses into pointers and releases the GIL. All checking of shapes and
// types happens in freehold.kernels, which is the only caller; tensors arrive as the integers of Tensor.data_ptr(),
// since making a buffer of each would cost more than many an op.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "kernels/ops.h"

namespace nb = nanobind;
using namespace freehold;
using Released = nb::call_guard<nb::gil_scoped_release>;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Matrix matrix(int form, uintptr_t data, uintptr_t scales, size_t R, size_t C, bool paired) {
    return Matrix(static_cast<Form>(form), at<void>(data), at<void>(scales), R, C, paired);
}

KvPages kv_pages(int type, uintptr_t keys, uintptr_t values, uintptr_t key_scales, uintptr_t value_scales, size_t count,
                 size_t K, size_t H) {
    return {static_cast<KvType>(type),
            at<void>(keys),
            at<void>(values),
            at<uint16_t>(key_scales),
            at<uint16_t>(value_scales),
            count,
            K,
            H};
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const char* name : {"scalar", "avx2", "avx512", "neon"})
        if (kernels_named(name)) names.emplace_back(name);
    return names;
}

}  // namespace

NB_MODULE(_native, module) {
    // At exit, weights may still hold their handles: memory that ends with the process is no leak to report.
    nb::set_leak_warnings(false);
    module.doc() = "Native CPU kernels of Freehold; called through freehold.kernels, never directly.";

    module.attr("page") = kPage;
    module.attr("split") = kSplit;

    module.def("instruction_sets", &instruction_sets, "Those that can run here, the best last.");
    module.def("instruction_set", [] { return std::string(kernels().name); });
    module.def("use_instruction_set", [](const std::string& name) { return use_kernels(name.c_str()); });

    nb::class_<Matrix>(module, "Matrix")
        .def("__init__", [](Matrix* self, int form, uintptr_t data, uintptr_t scales, size_t R, size_t C, bool paired) {
            new (self) Matrix(matrix(form, data, scales, R, C, paired));
        });
    nb::class_<KvPages>(module, "KvPages")
        .def("__init__", [](KvPages* self, int type, uintptr_t keys, uintptr_t values, uintptr_t key_scales,
                            uintptr_t value_scales, size_t count, size_t K, size_t H) {
            new (self) KvPages(kv_pages(type, keys, values, key_scales, value_scales, count, K, H));
        });

    nb::class_<Sequences>(module, "Sequences")
        .def("__init__",
             [](Sequences* self, size_t count, uintptr_t starts, uintptr_t lengths, uintptr_t table, size_t stride) {
                 new (self) Sequences{count, at<int64_t>(starts), at<int64_t>(lengths), at<int32_t>(table), stride};
             });

    nb::class_<Lora>(module, "Lora").def("__init__", [](Lora* self, const Matrix& a, const Matrix& b, float scaling) {
        new (self) Lora{a, b, scaling};
    });
    nb::class_<ExpertLora>(module, "ExpertLora")
        .def(
            "__init__",
            [](ExpertLora* self, const Lora* gate_up, const Lora* down) { new (self) ExpertLora{gate_up, down}; },
            nb::arg().none(), nb::arg().none(), nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>());

    nb::class_<Engine>(module, "Engine")
        .def(nb::init<unsigned>())
        .def_prop_ro("threads", &Engine::threads)
        .def_prop_ro("workspace_bytes", &Engine::workspace_bytes)
        .def(
            "rms_norm",
            [](Engine& self, uintptr_t x, uintptr_t weight, uintptr_t out, size_t T, size_t D, float eps) {
                self.rms_norm(at<float>(x), at<float>(weight), at<float>(out), T, D, eps);
            },
            Released())
        .def(
            "rms_norm_backward",
            [](Engine& self, uintptr_t x, uintptr_t weight, uintptr_t of_out, uintptr_t of_x, size_t T, size_t D,
               float eps) {
                self.rms_norm_backward(at<float>(x), at<float>(weight), at<float>(of_out), at<float>(of_x), T, D, eps);
            },
            Released())
        .def(
            "linear",
            [](Engine& self, const Matrix& w, uintptr_t x, size_t T, size_t stride, uintptr_t norm, float eps,
               uintptr_t bias, uintptr_t residual, uintptr_t out) {
                self.linear(w, {at<float>(x), T, stride, at<float>(norm), eps, at<float>(bias), at<float>(residual),
                                at<float>(out)});
            },
            Released())
        .def(
            "linear_backward",
            [](Engine& self, const Matrix& w, uintptr_t gradient, size_t T, size_t stride, uintptr_t out) {
                self.linear_backward(w, {at<float>(gradient), T, stride, at<float>(out)});
            },
            Released())
        .def(
            "add_product",
            [](Engine& self, uintptr_t left, size_t left_row, size_t left_column, uintptr_t right, size_t right_row,
               size_t right_column, uintptr_t out, size_t M, size_t K, size_t N) {
                self.add_product({{at<float>(left), left_row, left_column},
                                  {at<float>(right), right_row, right_column},
                                  M,
                                  K,
                                  N,
                                  at<float>(out)});
            },
            Released())
        .def(
            "widen",
            [](Engine& self, const Matrix& w, bool narrow, uintptr_t out) { self.widen(w, narrow, at<void>(out)); },
            Released())
        .def(
            "rope",
            [](Engine& self, uintptr_t x, size_t stride, uintptr_t cos, uintptr_t sin, uintptr_t out, size_t T,
               size_t N,
               size_t H) { self.rope(at<float>(x), stride, at<float>(cos), at<float>(sin), at<float>(out), T, N, H); },
            Released())
        .def(
            "kv_write",
            [](Engine& self, const KvPages& kv, const Sequences& sequences, uintptr_t k, size_t k_stride, uintptr_t v,
               size_t v_stride, uintptr_t cos, uintptr_t sin) {
                self.kv_write(kv, sequences, at<float>(k), k_stride, at<float>(v), v_stride,
                              {at<float>(cos), at<float>(sin)});
            },
            Released())
        .def(
            "attention",
            [](Engine& self, const KvPages& kv, const Sequences& sequences, uintptr_t q, size_t N, size_t stride,
               uintptr_t sinks, float scale, size_t window, uintptr_t out, uintptr_t cos, uintptr_t sin,
               uintptr_t logsum) {
                self.attention(kv, sequences,
                               {at<float>(q),
                                N,
                                stride,
                                at<float>(sinks),
                                scale,
                                window,
                                at<float>(out),
                                {at<float>(cos), at<float>(sin)},
                                at<float>(logsum)});
            },
            Released())
        .def(
            "self_attention_backward",
            [](Engine& self, uintptr_t q, uintptr_t k, uintptr_t v, size_t N, size_t K, size_t H, size_t count,
               uintptr_t starts, float scale, size_t window, uintptr_t out, uintptr_t logsum, uintptr_t gradient,
               uintptr_t of_q, uintptr_t of_k, uintptr_t of_v, uintptr_t common) {
                self.self_attention_backward({.q = at<float>(q),
                                              .k = at<float>(k),
                                              .v = at<float>(v),
                                              .N = N,
                                              .K = K,
                                              .H = H,
                                              .count = count,
                                              .starts = at<int64_t>(starts),
                                              .scale = scale,
                                              .window = window,
                                              .out = at<float>(out),
                                              .logsum = at<float>(logsum),
                                              .gradient = at<float>(gradient),
                                              .of_q = at<float>(of_q),
                                              .of_k = at<float>(of_k),
                                              .of_v = at<float>(of_v),
                                              .common = at<float>(common)});
            },
            Released())
        .def(
            "route",
            [](Engine& self, uintptr_t logits, size_t T, size_t E, size_t A, uintptr_t weights, uintptr_t experts) {
                self.route(at<float>(logits), T, E, A, at<float>(weights), at<int64_t>(experts));
            },
            Released())
        .def(
            "moe",
            [](Engine& self, const Matrix& gate_up, const Matrix& down, uintptr_t x, size_t T, size_t A,
               uintptr_t weights, uintptr_t experts, size_t E, uintptr_t gate_up_bias, uintptr_t down_bias,
               uintptr_t residual, float alpha, float limit, uintptr_t out, uintptr_t norm, float eps) {
                self.moe(
                    gate_up, down,
                    {at<float>(x), T, A, at<float>(weights), at<int64_t>(experts), E, at<float>(gate_up_bias),
                     at<float>(down_bias), at<float>(residual), alpha, limit, at<float>(out), at<float>(norm), eps});
            },
            Released())
        .def(
            "swiglu_backward",
            [](Engine& self, size_t count, size_t F, uintptr_t of_hidden, uintptr_t sums, uintptr_t weights,
               float alpha, float limit, uintptr_t of_sums, uintptr_t hidden, uintptr_t of_weights, bool narrow) {
                self.swiglu_backward({count, F, at<void>(of_hidden), at<void>(sums), at<float>(weights), alpha, limit,
                                      at<void>(of_sums), at<void>(hidden), at<float>(of_weights), narrow});
            },
            Released())
        .def(
            "moe_lora",
            [](Engine& self, const Matrix& gate_up, const Matrix& down, uintptr_t x, size_t T, size_t A,
               uintptr_t weights, uintptr_t experts, size_t E, uintptr_t gate_up_bias, uintptr_t down_bias,
               uintptr_t residual, float alpha, float limit, uintptr_t out, uintptr_t norm, float eps,
               const std::vector<const ExpertLora*>& loras, uintptr_t rows) {
                self.moe(gate_up, down,
                         {at<float>(x), T, A, at<float>(weights), at<int64_t>(experts), E, at<float>(gate_up_bias),
                          at<float>(down_bias), at<float>(residual), alpha, limit, at<float>(out), at<float>(norm), eps,
                          loras.size(), loras.data(), at<int64_t>(rows)});
            },
            Released())
        .def(
            "moe_kept",
            [](Engine& self, const Matrix& gate_up, const Matrix& down, uintptr_t x, size_t T, size_t A,
               uintptr_t weights, uintptr_t experts, size_t E, uintptr_t gate_up_bias, uintptr_t down_bias,
               uintptr_t residual, float alpha, float limit, uintptr_t out, uintptr_t norm, float eps,
               const std::vector<const ExpertLora*>& loras, uintptr_t rows, uintptr_t seen_x, uintptr_t seen_hidden,
               uintptr_t sums, bool narrow, uintptr_t gate_up_rows, uintptr_t down_rows) {
                self.moe(gate_up, down,
                         {at<float>(x),
                          T,
                          A,
                          at<float>(weights),
                          at<int64_t>(experts),
                          E,
                          at<float>(gate_up_bias),
                          at<float>(down_bias),
                          at<float>(residual),
                          alpha,
                          limit,
                          at<float>(out),
                          at<float>(norm),
                          eps,
                          loras.size(),
                          loras.data(),
                          at<int64_t>(rows),
                          {at<float>(seen_x), at<float>(seen_hidden)},
                          {at<void>(sums), narrow, at<float>(gate_up_rows), at<float>(down_rows)}});
            },
            Released())
        .def(
            "add_lora",
            [](Engine& self, uintptr_t x, size_t T, size_t stride, uintptr_t norm, float eps, uintptr_t rows,
               const std::vector<const Lora*>& parts, const std::vector<int64_t>& part_rows,
               const std::vector<size_t>& part_columns, uintptr_t out, size_t out_stride) {
                self.add_lora({at<float>(x), T, stride, at<float>(norm), eps, at<int64_t>(rows), parts.size(),
                               parts.data(), part_rows.data(), part_columns.data(), at<float>(out), out_stride});
            },
            Released())
        .def(
            "argmax", [](Engine& self, uintptr_t logits, size_t V) { return self.argmax(at<float>(logits), V); },
            Released())
        .def(
            "sample",
            [](Engine& self, uintptr_t logits, size_t V, float temperature, size_t top_k, double top_p, float min_p,
               double uniform) { return self.sample(at<float>(logits), V, temperature, top_k, top_p, min_p, uniform); },
            Released())
        .def(
            "read_bandwidth",
            [](Engine& self, uintptr_t data, size_t bytes) {
                double checksum;
                return self.read_gigabytes(at<uint8_t>(data), bytes, &checksum) * 1e9;
            },
            Released(), "Bytes a second, reading `bytes` once with all threads.")
        .def("dot_rate", &Engine::dot_rate, Released(),
             "Int8 multiply-adds a second of all threads, on registers alone.");
}
