// Every kernel of every instruction set that can run here, and every op built on them, against plain code in double
// precision. Stops at the first difference with a message and exit code 1.
//
//   kernel_test [--quick] [instruction set]...
//
// Results must also be the same to the bit for any number of threads, and for a token alone and among others.
#include "tests/checks.h"

using namespace test;

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
    check_elementwise();
    check_argmax();
    check_attend();
    check_batches();
    check_speed_probes();
    check_rms_norm();
    check_rope();
    for (Form form : kForms) check_linear(form);
    for (Form form : kForms) check_linear_backward(form);
    check_add_product();
    for (Form form : kForms) check_widen(form);
    check_swiglu_backward();
    for (KvType type : kKvTypes) check_kv_write(type);
    for (KvType type : kKvTypes) check_attention(type);
    check_attention_backward();
    check_route();
    for (Form form : kForms) check_moe(form, form);
    check_moe(Form::mxfp4, Form::q8);
    check_moe(Form::bf16, Form::q8);
    check_add_lora();
    check_sample();
    check_nan();
    check_nan_in_attention();
    check_pool();
    check_shared_engine();
    std::printf("all as expected\n");
    return 0;
}
