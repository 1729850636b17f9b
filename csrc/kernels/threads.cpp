#include "kernels/threads.h"

namespace freehold {
namespace {

// Around a tenth of a millisecond: longer than the gap between two ops of a forward pass, too short to be noticed by
// whoever else wants the core.
constexpr int kSpins = 4000;

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb" ::: "memory");
#endif
}

// Wait until the value is no longer `old`; returns it.
uint32_t wait_for_change(const std::atomic<uint32_t>& value, uint32_t old) {
    for (int i = 0; i < kSpins; ++i) {
        const uint32_t now = value.load(std::memory_order_acquire);
        if (now != old) return now;
        pause();
    }
    value.wait(old, std::memory_order_acquire);
    return value.load(std::memory_order_acquire);
}

}  // namespace

ThreadPool::ThreadPool(unsigned threads) {
    try {
        for (unsigned thread = 1; thread < threads; ++thread)
            workers_.emplace_back([this, thread] { work_on(thread); });
    } catch (...) {  // the system has no more threads: those that were started must end first
        stop();
        throw;
    }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
    stopping_ = true;
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(Function function, const void* context) {
    if (workers_.empty()) return function(context, 0);
    function_ = function;
    context_ = context;
    inside_.fetch_and(~kClosed, std::memory_order_release);
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
    function(context, 0);
    uint32_t inside = inside_.fetch_or(kClosed, std::memory_order_acq_rel) | kClosed;
    while (inside != kClosed) inside = wait_for_change(inside_, inside);
}

void ThreadPool::work_on(unsigned thread) {
    uint32_t seen = 0;
    for (;;) {
        seen = wait_for_change(round_, seen);
        if (stopping_.load(std::memory_order_relaxed)) return;
        // Between entering and leaving, function and context stay as they are: `run` does not return before.
        const bool open = (inside_.fetch_add(1, std::memory_order_acq_rel) & kClosed) == 0;
        if (open) function_(context_, thread);
        if (inside_.fetch_sub(1, std::memory_order_acq_rel) == kClosed + 1) inside_.notify_one();
    }
}

}  // namespace freehold
