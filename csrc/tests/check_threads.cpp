// The pool, and an engine that several threads call.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

#include "tests/checks.h"

namespace test {

void check_pool() {
    for (unsigned threads = 1; threads <= 4; ++threads)
        for (size_t round = 0; round < 5; ++round) {
            where = text("pool of %u threads", threads);
            ThreadPool pool(threads);
            expect(pool.threads() == threads, "so many threads");
            if (round == 0) continue;  // made and never used
            for (size_t count : {size_t{0}, size_t{1}, size_t{7}, size_t{100}})
                for (size_t chunk : {size_t{0}, size_t{1}, size_t{3}, size_t{1000}}) {
                    std::vector<int> visits(count, 0);
                    pool.split(count, chunk, [&](size_t first, size_t last, unsigned thread) {
                        if (thread >= threads || first >= last || last > count) fail("a piece out of range");
                        if (chunk && first % chunk) fail("a piece that begins elsewhere");
                        for (size_t i = first; i < last; ++i) ++visits[i];
                    });
                    expect(std::all_of(visits.begin(), visits.end(), [](int n) { return n == 1; }), "each piece once");
                }
            std::atomic<size_t> pieces{0};
            for (size_t pause : {0, 2, 0, 2}) {
                std::this_thread::sleep_for(std::chrono::milliseconds(pause));  // until the workers sleep
                pool.split(8, 1, [&](size_t first, size_t last, unsigned thread) {
                    if (thread) std::this_thread::sleep_for(std::chrono::milliseconds(pause));  // until the caller does
                    pieces += last - first;
                });
            }
            for (size_t i = 0; i < 200; ++i)
                pool.split(3, 1, [&](size_t first, size_t last, unsigned) { pieces += last - first; });
            expect(pieces == 32 + 200 * 3, "each piece once");
        }
    report("pool");
}

void check_shared_engine() {
    Random random(16);
    constexpr size_t T = 20, R = 70, C = 96;
    const Weights w(random, Form::q8, 1, R, C);
    const Buffer<float> x = normals(random, T * C);
    on_each_set("one engine for two callers", [&](const Kernels&) {
        auto run = [&](Engine& engine, float* to) {
            engine.linear(w.matrix(), {x.data(), T, C, nullptr, 0, nullptr, nullptr, to});
        };
        Buffer<float> expected(T * R), first(T * R), second(T * R);
        run(engine_of(1), expected.data());
        for (size_t i = 0; i < 10; ++i) {
            std::thread other([&] { run(engine_of(3), second.data()); });
            run(engine_of(3), first.data());
            other.join();
            expect_same_bits(first.data(), expected.data(), T * R, "result");
            expect_same_bits(second.data(), expected.data(), T * R, "result");
        }
    });
    report("two callers");
}

}  // namespace test
