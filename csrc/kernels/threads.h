// A pool of threads that waits actively for a moment, then sleeps. One piece of parallel work runs at a time.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace freehold {

class ThreadPool {
  public:
    // The caller of `split` counts as one of the threads, so threads - 1 are started. At least 1.
    explicit ThreadPool(unsigned threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    unsigned threads() const { return static_cast<unsigned>(workers_.size()) + 1; }

    // Runs work(first, last, thread) over pieces of at most `chunk` of [0, count), handed out as threads become free.
    template <class Work>
    void split(size_t count, size_t chunk, const Work& work) {
        if (chunk == 0) chunk = 1;
        if (threads() == 1 || count <= chunk) {
            if (count) work(size_t{0}, count, 0u);
            return;
        }
        std::atomic<size_t> next{0};
        const auto take_pieces = [&](unsigned thread) {
            for (;;) {
                const size_t first = next.fetch_add(chunk, std::memory_order_relaxed);
                if (first >= count) return;
                work(first, first + chunk < count ? first + chunk : count, thread);
            }
        };
        using Take = decltype(take_pieces);
        run([](const void* context, unsigned thread) { (*static_cast<const Take*>(context))(thread); }, &take_pieces);
    }

  private:
    using Function = void (*)(const void*, unsigned);

    // Calls function on this thread, and on every worker that comes while this thread is at it. A worker that was
    // asleep, or whose core is taken by another program, is not waited for: whoever is there does the work.
    void run(Function function, const void* context);
    void work_on(unsigned thread);
    void stop();

    static constexpr uint32_t kClosed = 1u << 31;

    std::vector<std::thread> workers_;
    Function function_ = nullptr;
    const void* context_ = nullptr;
    alignas(64) std::atomic<uint32_t> round_{0};
    // Workers inside the present piece of work; kClosed when nobody may enter any more.
    alignas(64) std::atomic<uint32_t> inside_{kClosed};
    std::atomic<bool> stopping_{false};
};

}  // namespace freehold
