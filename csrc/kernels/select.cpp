#include <atomic>
#include <cstdlib>
#include <cstring>

#include "kernels/kernels.h"

#if defined(__aarch64__)
#include <sys/auxv.h>
#elif defined(__x86_64__)
#include <cpuid.h>
#endif

namespace freehold {

extern const Kernels kScalarKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kNeonKernels;

namespace {

std::atomic<const Kernels*> in_use{nullptr};

#if defined(__x86_64__)
bool has_f16c() {  // Clang knows it by its number only
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
           has_f16c();
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}
#elif defined(__aarch64__)
bool has_neon_dot() {
    constexpr unsigned long kAsimdDp = 1ul << 20;  // HWCAP_ASIMDDP
    return (getauxval(AT_HWCAP) & kAsimdDp) != 0;
}
#endif

const Kernels* best() {
    for (const char* name : {"avx512", "avx2", "neon"})
        if (const Kernels* found = kernels_named(name)) return found;
    return &kScalarKernels;
}

}  // namespace

const Kernels* kernels_named(const char* name) {
    if (!std::strcmp(name, "scalar")) return &kScalarKernels;
#if defined(__x86_64__)
    if (!std::strcmp(name, "avx2") && has_avx2()) return &kAvx2Kernels;
    if (!std::strcmp(name, "avx512") && has_avx512()) return &kAvx512Kernels;
#elif defined(__aarch64__)
    if (!std::strcmp(name, "neon") && has_neon_dot()) return &kNeonKernels;
#endif
    return nullptr;
}

const Kernels& kernels() {
    const Kernels* set = in_use.load(std::memory_order_acquire);
    if (!set) in_use.store(set = best(), std::memory_order_release);
    return *set;
}

bool use_kernels(const char* name) {
    const Kernels* found = kernels_named(name);
    if (found) in_use.store(found, std::memory_order_release);
    return found != nullptr;
}

}  // namespace freehold
