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

    // Runs work(first, last, thread) over pieces of [0, count), handed out as threads become free. The pieces begin at
    // multiples of `least`. At first they are long, which streams memory well; the last are short, so that all threads
    // end together.
    template <class Work>
    void split(size_t count, size_t least, const Work& work) {
        if (least == 0) least = 1;
        if (threads() == 1 || count <= least) {
            if (count) work(size_t{0}, count, 0u);
            return;
        }
        std::atomic<size_t> next{0};
        const auto take_pieces = [&](unsigned thread) {
            size_t first = next.load(std::memory_order_relaxed);
            while (first < count) {
                const size_t share = (count - first) / (3 * threads()) / least * least;
                const size_t size = share > least ? share : least;
                if (!next.compare_exchange_weak(first, first + size, std::memory_order_relaxed)) continue;
                work(first, first + size < count ? first + size : count, thread);
                first = next.load(std::memory_order_relaxed);
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
