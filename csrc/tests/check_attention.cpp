// Keys and values: how they are stored, and attention over them.
#include <algorithm>

#include "tests/checks.h"

namespace test {

// Keys and values of one layer, to the element: pages in no order, of one sequence.
struct KvStore {
    KvType type;
    size_t K, H;
    std::vector<int32_t> table;
    Buffer<float> floats[2];
    Buffer<uint16_t> words[2];
    Buffer<int8_t> bytes[2];
    Buffer<uint16_t> scales[2];
    int64_t starts[2], lengths[1];

    KvStore(KvType type, size_t K, size_t positions, size_t H)
        : type(type),
          K(K),
          H(H),
          table((positions + kPage - 1) / kPage),
          floats{Buffer<float>(count(KvType::f32)), Buffer<float>(count(KvType::f32))},
          words{Buffer<uint16_t>(count(KvType::bf16)), Buffer<uint16_t>(count(KvType::bf16))},
          bytes{Buffer<int8_t>(count(KvType::q8)), Buffer<int8_t>(count(KvType::q8))},
          scales{Buffer<uint16_t>(count(KvType::q8) / 32), Buffer<uint16_t>(count(KvType::q8) / 32)} {
        for (size_t i = 0; i < table.size(); ++i)  // odd ones first, backwards, then the even ones
            table[i] = static_cast<int32_t>(i % 2 ? table.size() / 2 - 1 - i / 2 : table.size() / 2 + i / 2);
    }

    size_t count(KvType of) const { return type == of ? table.size() * K * kPage * H : 0; }
    size_t capacity() const { return table.size() * kPage; }
    void* data(size_t which) {
        switch (type) {
            case KvType::f32:
                return floats[which].data();
            case KvType::bf16:
                return words[which].data();
            default:
                return bytes[which].data();
        }
    }
    KvPages pages() { return {type, data(0), data(1), scales[0].data(), scales[1].data(), table.size(), K, H}; }
    // T tokens that end at `length`; the next call changes what the last returned.
    Sequences sequence(size_t length, size_t T) {
        starts[0] = 0, starts[1] = static_cast<int64_t>(T), lengths[0] = static_cast<int64_t>(length);
        return {1, starts, lengths, table.data(), table.size()};
    }
    // Number h of a key (which = 0) or a value, and its scale: see KvPages.
    size_t number(size_t which, size_t head, size_t position, size_t h) const {
        const size_t row = position % kPage, V = type == KvType::bf16 ? 2 : 1;
        return first(head, position) * H + (which ? row * H + h : (h / V * kPage + row) * V + h % V);
    }
    size_t scale(size_t which, size_t head, size_t position, size_t h) const {
        const size_t row = position % kPage, blocks = H / 32, b = h / 32;
        return first(head, position) * blocks + (which ? row * blocks + b : b * kPage + row);
    }
    double at(size_t which, size_t head, size_t position, size_t h) const {
        const size_t i = number(which, head, position, h);
        switch (type) {
            case KvType::f32:
                return floats[which][i];
            case KvType::bf16:
                return of_bf16(words[which][i]);
            default:
                return bytes[which][i] * of_half(scales[which][scale(which, head, position, h)]);
        }
    }
    bool untouched(size_t which, size_t head, size_t position, size_t h) const {
        const size_t i = number(which, head, position, h);
        switch (type) {
            case KvType::f32:
                return std::isnan(floats[which][i]);
            case KvType::bf16:
                return words[which][i] == 0xFFFF;
            default:
                return bytes[which][i] == -1 && scales[which][scale(which, head, position, h)] == 0xFFFF;
        }
    }

  private:
    size_t first(size_t head, size_t position) const {
        return (static_cast<size_t>(table[position / kPage]) * K + head) * kPage;
    }
};

namespace {

// One stored head of one position: what is made of x, or nothing where there is no x.
void expect_stored(const KvStore& store, size_t which, size_t head, size_t position, const float* x) {
    for (size_t h = 0; h < store.H; ++h) {
        const size_t at = store.number(which, head, position, h);
        if (!x) {
            expect(store.untouched(which, head, position, h), "other positions are left alone");
        } else if (store.type == KvType::f32) {
            expect(store.floats[which][at] == x[h], "stored as given");
        } else if (store.type == KvType::bf16) {
            expect(store.words[which][at] == to_bf16(x[h]), "rounded to bfloat16");
        } else {
            const float* block = x + h / 32 * 32;
            float peak = 0;
            for (size_t i = 0; i < 32; ++i) peak = std::max(peak, std::abs(block[i]));
            const uint16_t half = to_half(peak / 127.0f);
            const auto step = static_cast<float>(of_half(half));
            const float factor = step > 0 ? 1.0f / step : 0.0f;
            const float number = std::clamp(std::nearbyint(x[h] * factor), -127.0f, 127.0f);
            expect(store.scales[which][store.scale(which, head, position, h)] == half, "the block's scale");
            expect(store.bytes[which][at] == static_cast<int>(number), "the rounded value");
        }
    }
}

// Heads of all kinds: zeros, large and tiny numbers, ties where steps are 1, and common ones.
Buffer<float> heads(Random& random, size_t count) {
    Buffer<float> x = normals(random, count);
    for (size_t i = 0; i < count; ++i) {
        const size_t kind = i / 32 % 6;
        if (kind == 0) x[i] = 0;
        if (kind == 1) x[i] *= 1e4f;
        if (kind == 2) x[i] *= 1e-5f;
        if (kind == 3) x[i] = i % 32 ? std::floor(30 * x[i]) + 0.5f : 127.0f;
    }
    return x;
}

}  // namespace

void check_kv_write(KvType type) {
    Random random(9);
    for (size_t T : token_counts())
        for (size_t H : type == KvType::q8 ? sizes<size_t>({32, 64, 96}, {64}) : sizes<size_t>({2, 20, 64}, {20})) {
            const size_t K = 1 + random.below(3), start = random.below(140);
            const size_t strides[2] = {K * H + random.below(3), K * H + random.below(3)};
            const Buffer<float> given[2] = {heads(random, T ? (T - 1) * strides[0] + K * H : 0),
                                            heads(random, T ? (T - 1) * strides[1] + K * H : 0)};
            const Angles angles(random, T, H);
            const bool turned = H % 2 == 0 && random.below(2);
            Rotation rotation;
            if (turned) rotation = {angles.cos.data(), angles.sin.data()};
            const std::string what =
                text("kv_write %s T=%zu K=%zu H=%zu%s", name_of(type), T, K, H, turned ? " turned" : "");
            auto check = [&](const Kernels& k, unsigned threads) {
                KvStore store(type, K, start + T, H);
                engine_of(threads).kv_write(store.pages(), store.sequence(start + T, T), given[0].data(), strides[0],
                                            given[1].data(), strides[1], rotation);
                for (size_t which = 0; which < 2; ++which)
                    for (size_t head = 0; head < K; ++head)
                        for (size_t position = 0; position < store.capacity(); ++position) {
                            const size_t t = position - start;
                            if (position < start || t >= T) {
                                expect_stored(store, which, head, position, nullptr);
                                continue;
                            }
                            const float* x = given[which].data() + t * strides[which] + head * H;
                            Buffer<float> key(H);
                            if (turned && which == 0) {  // rope has its own check; here its last bit matters
                                k.rope(x, rotation.cos + t * (H / 2), rotation.sin + t * (H / 2), key.data(), H);
                                x = key.data();
                            }
                            expect_stored(store, which, head, position, x);
                        }
            };
            on_each_set(what, [&](const Kernels& k) {
                check(k, 1);
                check(k, 3);
            });
        }
    report(std::string("kv_write ") + name_of(type));
}

struct AttentionCase {
    size_t K, group, H, length, T, window;
};

// The queries as attention sees them, and what is stored of one side of the keys and values.
std::vector<double> queries_of(const AttentionCase& c, const Buffer<float>& q, size_t stride, const Angles* angles) {
    std::vector<double> seen(q.data(), q.data() + q.size());
    for (size_t t = 0; angles && t < c.T; ++t)
        for (size_t n = 0; n < c.K * c.group; ++n)
            for (size_t i = 0; i < c.H / 2; ++i) {
                double &a = seen[t * stride + n * c.H + i], &b = seen[t * stride + n * c.H + c.H / 2 + i];
                const double x = a, y = b, cos = angles->cos[t * c.H / 2 + i], sin = angles->sin[t * c.H / 2 + i];
                a = x * cos - y * sin, b = y * cos + x * sin;
            }
    return seen;
}
std::vector<double> stored_in(const AttentionCase& c, const KvStore& store, size_t which) {
    std::vector<double> stored;
    for (size_t head = 0; head < c.K; ++head)
        for (size_t s = 0; s < c.length; ++s)
            for (size_t h = 0; h < c.H; ++h) stored.push_back(store.at(which, head, s, h));
    return stored;
}

// The (T, N, H) results, with how far off each may be in place of `terms`.
// `logsums` (T, N): the logarithm of each softmax's sum.
std::vector<Sum> attend_plainly(const AttentionCase& c, const KvStore& store, const std::vector<double>& q,
                                size_t stride, const float* sinks, double scale, std::vector<Sum>& logsums) {
    const size_t N = c.K * c.group;
    const std::vector<double> keys = stored_in(c, store, 0), values = stored_in(c, store, 1);
    std::vector<Sum> results(c.T * N * c.H);
    for (size_t t = 0; t < c.T; ++t)
        for (size_t n = 0; n < N; ++n) {
            const size_t position = c.length - c.T + t, head = n / c.group * c.length;
            const size_t first = c.window && position + 1 > c.window ? position + 1 - c.window : 0;
            std::vector<double> weights(position + 1);
            double peak = sinks[n], size = 0;
            for (size_t s = first; s <= position; ++s) {
                const Sum score = dot(q.data() + t * stride + n * c.H, keys.data() + (head + s) * c.H, c.H);
                weights[s] = score.value * scale;
                peak = std::max(peak, weights[s]), size = std::max(size, score.terms * scale);
            }
            double sum = std::exp(sinks[n] - peak);
            for (size_t s = first; s <= position; ++s) sum += weights[s] = std::exp(weights[s] - peak);
            logsums.push_back({peak + std::log(sum), 1e-6 * (1 + size + std::abs(peak))});
            Sum* result = results.data() + (t * N + n) * c.H;
            for (size_t s = first; s <= position; ++s)
                for (size_t h = 0; h < c.H; ++h) {
                    const double term = weights[s] / sum * values[(head + s) * c.H + h];
                    result[h].value += term, result[h].terms += std::abs(term);
                }
            // A score that is off by so much moves a weight by as much.
            for (size_t h = 0; h < c.H; ++h) result[h].terms = result[h].terms * 1e-6 * (1 + size) + 1e-7;
        }
    return results;
}

void check_attention(KvType type) {
    Random random(10);
    std::vector<AttentionCase> cases = {
        {1, 1, 64, 1, 1, 0},      {2, 4, 64, 5, 5, 0},      {1, 8, 64, 70, 70, 0},    {2, 3, 32, 100, 33, 16},
        {2, 8, 64, 700, 31, 0},   {1, 8, 64, 1100, 1, 0},   {2, 8, 64, 1100, 2, 128}, {1, 2, 96, 520, 70, 1},
        {2, 8, 64, 600, 70, 128}, {1, 70, 32, 66, 2, 0},    {3, 1, 64, 64, 0, 0},     {8, 8, 64, 300, 33, 128},
        {1, 1, 64, 1537, 33, 0},  {2, 1, 32, 513, 2, 5000},
    };
    if (quick) cases = {{1, 1, 32, 1, 1, 0}, {2, 3, 32, 100, 33, 16}, {1, 8, 32, 600, 2, 0}, {2, 2, 32, 530, 33, 20}};
    if (type != KvType::q8) {
        cases.push_back({2, 2, 20, 90, 33, 0});
        cases.push_back({1, 3, 2, 130, 5, 7});
        cases.push_back({1, 2, 18, 530, 2, 0});
    }
    for (const AttentionCase& c : cases) {
        const size_t N = c.K * c.group, stride = N * c.H + random.below(3);
        KvStore store(type, c.K, c.length, c.H);  // rows behind the last stay NaN
        const Buffer<float> k = normals(random, c.length * c.K * c.H), v = normals(random, c.length * c.K * c.H);
        engine_of(1).kv_write(store.pages(), store.sequence(c.length, c.length), k.data(), c.K * c.H, v.data(),
                              c.K * c.H);
        const Buffer<float> q = normals(random, c.T ? (c.T - 1) * stride + N * c.H : 0, 1.5);
        Buffer<float> sinks = normals(random, N);
        if (N > 2) sinks[1] = -1e4f, sinks[2] = 30.0f;
        const float scale = 1 / std::sqrt(static_cast<float>(c.H));
        const Angles angles(random, c.T, c.H);
        const bool turned = c.H % 2 == 0 && c.length % 3;
        const std::vector<double> seen = queries_of(c, q, stride, turned ? &angles : nullptr);
        std::vector<Sum> logsums;
        const std::vector<Sum> expected = attend_plainly(c, store, seen, stride, sinks.data(), scale, logsums);
        const std::string what = text("attention %s K=%zu N=%zu H=%zu length=%zu T=%zu window=%zu%s", name_of(type),
                                      c.K, N, c.H, c.length, c.T, c.window, turned ? " turned" : "");
        on_each_set(what, [&](const Kernels&) {
            AttentionArgs args{q.data(), N, stride, sinks.data(), scale, c.window, nullptr};
            if (turned) args.rotation = {angles.cos.data(), angles.sin.data()};
            const Buffer<float> out = on_any_threads(c.T * N * c.H, [&](Engine& engine, float* to) {
                AttentionArgs mine = args;
                mine.out = to;
                engine.attention(store.pages(), store.sequence(c.length, c.T), mine);
            });
            for (size_t i = 0; i < out.size(); ++i)
                expect_near(out[i], expected[i].value, expected[i].terms, "out of (query, head)", i / c.H, i % c.H);
            Buffer<float> logsum(c.T * N), same(out.size());
            AttentionArgs both = args;
            both.out = same.data(), both.logsum = logsum.data();
            engine_of(2).attention(store.pages(), store.sequence(c.length, c.T), both);
            expect_same_bits(same.data(), out.data(), out.size(), "with the sums and without");
            for (size_t i = 0; i < logsum.size(); ++i)
                expect_near(logsum[i], logsums[i].value, logsums[i].terms, "logsum", i / N, i % N);
            for (size_t t : loners(c.T)) {
                AttentionArgs mine = args;
                Buffer<float> alone(N * c.H);
                mine.q += t * stride, mine.out = alone.data();
                if (turned) mine.rotation.cos += t * c.H / 2, mine.rotation.sin += t * c.H / 2;
                engine_of(4).attention(store.pages(), store.sequence(c.length - c.T + t + 1, 1), mine);
                expect_same_bits(alone.data(), out.data() + t * N * c.H, N * c.H, "a token alone and among others");
            }
        });
    }
    report(std::string("attention ") + name_of(type));
}

void check_attention_backward() {
    Random random(24);
    struct Case {
        size_t K, group, H, window;
        std::vector<size_t> counts;
    };
    std::vector<Case> cases = {{1, 1, 16, 0, {1}},
                               {2, 3, 18, 0, {70, 1, 17}},
                               {2, 2, 64, 20, {65, 0, 130}},
                               {1, 8, 6, 1, {40}},
                               {2, 1, 32, 16, {17, 33}}};
    if (quick) cases = {{2, 2, 18, 0, {17, 1}}, {1, 2, 32, 16, {40}}};
    for (const Case& c : cases) {
        const size_t N = c.K * c.group, H = c.H;
        std::vector<int64_t> starts = {0};
        for (size_t count : c.counts) starts.push_back(starts.back() + static_cast<int64_t>(count));
        const auto T = static_cast<size_t>(starts.back());
        const Buffer<float> q = normals(random, T * N * H), k = normals(random, T * c.K * H),
                            v = normals(random, T * c.K * H), sinks = normals(random, N),
                            gradient = normals(random, T * N * H);
        const double scale = 1 / std::sqrt(static_cast<double>(H));
        Buffer<float> out(T * N * H), logsum(T * N);
        std::vector<Sum> of_q(T * N * H), of_k(T * c.K * H), of_v(T * c.K * H);
        auto add = [](Sum& to, double value, double terms) { to.value += value, to.terms += terms; };
        for (size_t b = 0; b < c.counts.size(); ++b)
            for (size_t position = 0; position < c.counts[b]; ++position)
                for (size_t n = 0; n < N; ++n) {
                    const size_t start = static_cast<size_t>(starts[b]), row = ((start + position) * N + n) * H;
                    const size_t first = c.window && position + 1 > c.window ? position + 1 - c.window : 0;
                    auto at = [&](size_t s) { return ((start + s) * c.K + n / c.group) * H; };
                    std::vector<double> weights(position + 1);
                    double sum = std::exp(static_cast<double>(sinks[n]));
                    for (size_t s = first; s <= position; ++s) {
                        double score = 0;
                        for (size_t h = 0; h < H; ++h) score += static_cast<double>(q[row + h]) * k[at(s) + h];
                        sum += weights[s] = std::exp(score * scale);
                    }
                    logsum[(start + position) * N + n] = static_cast<float>(std::log(sum));
                    double common = 0;
                    for (size_t h = 0; h < H; ++h) {
                        double value = 0;
                        for (size_t s = first; s <= position; ++s) value += weights[s] / sum * v[at(s) + h];
                        out[row + h] = static_cast<float>(value), common += value * gradient[row + h];
                    }
                    for (size_t s = first; s <= position; ++s) {
                        double of_weight = 0, terms = std::abs(common);
                        for (size_t h = 0; h < H; ++h) {
                            const double term = static_cast<double>(gradient[row + h]) * v[at(s) + h];
                            of_weight += term, terms += std::abs(term);
                        }
                        const double weight = weights[s] / sum, of_score = weight * (of_weight - common) * scale;
                        for (size_t h = 0; h < H; ++h) {
                            add(of_v[at(s) + h], weight * gradient[row + h], std::abs(weight * gradient[row + h]));
                            add(of_q[row + h], of_score * k[at(s) + h],
                                std::abs(weight * terms * scale * k[at(s) + h]));
                            add(of_k[at(s) + h], of_score * q[row + h], std::abs(weight * terms * scale * q[row + h]));
                        }
                    }
                }
        on_each_set(
            text("attention_backward K=%zu N=%zu H=%zu T=%zu window=%zu", c.K, N, H, T, c.window), [&](const Kernels&) {
                const size_t of_queries = T * N * H, of_keys = T * c.K * H;
                const Buffer<float> got = on_any_threads(of_queries + 2 * of_keys, [&](Engine& engine, float* to) {
                    Buffer<float> common(T * N);
                    engine.self_attention_backward({.q = q.data(),
                                                    .k = k.data(),
                                                    .v = v.data(),
                                                    .N = N,
                                                    .K = c.K,
                                                    .H = H,
                                                    .count = c.counts.size(),
                                                    .starts = starts.data(),
                                                    .scale = static_cast<float>(scale),
                                                    .window = c.window,
                                                    .out = out.data(),
                                                    .logsum = logsum.data(),
                                                    .gradient = gradient.data(),
                                                    .of_q = to,
                                                    .of_k = to + of_queries,
                                                    .of_v = to + of_queries + of_keys,
                                                    .common = common.data()});
                });
                auto compare = [&](size_t from, const std::vector<Sum>& expected, const char* what) {
                    for (size_t i = 0; i < expected.size(); ++i)
                        expect_near(got[from + i], expected[i].value, 1e-5 * expected[i].terms + 1e-7, what, i / H,
                                    i % H);
                };
                compare(0, of_q, "of q");
                compare(of_queries, of_k, "of k");
                compare(of_queries + of_keys, of_v, "of v");
            });
    }
    report("attention_backward");
}

// Sequences that share a batch and a pool of pages: each is written and read as if it were alone.
void check_batches() {
    Random random(12);
    constexpr size_t K = 2, N = 8, H = 32;
    for (KvType type : kKvTypes)
        for (size_t window : {size_t{0}, size_t{70}})
            for (size_t count : sizes<size_t>({1, 2, 5}, {3})) {
                std::vector<int64_t> starts = {0}, lengths;
                for (size_t b = 0; b < count; ++b) {
                    const size_t T = b == 1 ? 0 : 1 + random.below(b % 2 ? 2 : 70);  // the second has nothing to do
                    starts.push_back(starts.back() + static_cast<int64_t>(T));
                    lengths.push_back(static_cast<int64_t>(T + random.below(b % 2 ? 1200 : 90)));
                }
                const auto T = static_cast<size_t>(starts.back());
                constexpr size_t width = 21;
                std::vector<int32_t> table(count * width, -1);
                int32_t pages = 0;
                for (size_t i = 0; i < width; ++i)  // dealt out in turn
                    for (size_t b = 0; b < count; ++b)
                        if (static_cast<int64_t>(i * kPage) < lengths[b]) table[b * width + i] = pages++;
                KvStore pool(type, K, static_cast<size_t>(pages) * kPage, H);
                std::vector<Buffer<float>> k, v;
                for (size_t b = 0; b < count; ++b) {
                    k.push_back(normals(random, static_cast<size_t>(lengths[b]) * K * H));
                    v.push_back(normals(random, static_cast<size_t>(lengths[b]) * K * H));
                }
                const Buffer<float> q = normals(random, T * N * H), sinks = normals(random, N);
                on_each_set(text("batch of %zu in %s, window %zu", count, name_of(type), window), [&](const Kernels&) {
                    Buffer<float> new_k(T * K * H), new_v(T * K * H);
                    for (size_t b = 0; b < count; ++b) {  // what came before goes in alone, the batch's own together
                        const int64_t fresh = starts[b + 1] - starts[b], old = lengths[b] - fresh;
                        const int64_t alone[] = {0, old}, length[] = {old};
                        const Sequences before{1, alone, length, table.data() + b * width, width};
                        engine_of(1).kv_write(pool.pages(), before, k[b].data(), K * H, v[b].data(), K * H);
                        const auto at = static_cast<size_t>(starts[b]) * K * H;
                        std::copy(k[b].data() + old * K * H, k[b].data() + lengths[b] * K * H, new_k.data() + at);
                        std::copy(v[b].data() + old * K * H, v[b].data() + lengths[b] * K * H, new_v.data() + at);
                    }
                    const Sequences together{count, starts.data(), lengths.data(), table.data(), width};
                    engine_of(3).kv_write(pool.pages(), together, new_k.data(), K * H, new_v.data(), K * H);
                    const Buffer<float> out = on_any_threads(T * N * H, [&](Engine& engine, float* to) {
                        engine.attention(pool.pages(), together, {q.data(), N, N * H, sinks.data(), 0.2f, window, to});
                    });
                    for (size_t b = 0; b < count; ++b) {
                        const auto length = static_cast<size_t>(lengths[b]);
                        const auto fresh = static_cast<size_t>(starts[b + 1] - starts[b]);
                        KvStore own(type, K, length, H);
                        engine_of(1).kv_write(own.pages(), own.sequence(length, length), k[b].data(), K * H,
                                              v[b].data(), K * H);
                        Buffer<float> alone(fresh * N * H);
                        const size_t at = static_cast<size_t>(starts[b]) * N * H;
                        engine_of(1).attention(own.pages(), own.sequence(length, fresh),
                                               {q.data() + at, N, N * H, sinks.data(), 0.2f, window, alone.data()});
                        expect_same_bits(out.data() + at, alone.data(), alone.size(), "a sequence among others");
                    }
                    std::vector<int32_t> wrong = table;
                    for (int32_t bad : {-1, pages}) {
                        wrong[0] = bad;
                        const Sequences lost{1, starts.data(), lengths.data(), wrong.data(), width};
                        bool refused = false;
                        try {
                            engine_of(2).attention(
                                pool.pages(), lost,
                                {q.data(), N, N * H, sinks.data(), 0.2f, 0, Buffer<float>(T * N * H).data()});
                        } catch (const std::out_of_range&) {
                            refused = true;
                        }
                        expect(refused, "a page that does not exist is refused");
                    }
                });
            }
    report("batches of sequences");
}

// One piece as the op hands it out, with rows that see nothing, a part and all of it.
void check_attend() {
    Random random(11);
    for (KvType type : kKvTypes)
        for (size_t last : sizes<size_t>({1, 63, 64, 65, 200}, {1, 65})) {
            const size_t H = 64, rows = 9;
            KvStore store(type, 2, last, H);
            const Buffer<float> k = normals(random, last * 2 * H), v = normals(random, last * 2 * H);
            engine_of(1).kv_write(store.pages(), store.sequence(last, last), k.data(), 2 * H, v.data(), 2 * H);
            const Buffer<float> q = normals(random, rows * H, 0.3);
            Buffer<int64_t> limits(rows * 2);
            for (size_t r = 0; r < rows; ++r) {  // the last row sees all, the second last nothing of this piece
                limits[2 * r] = static_cast<int64_t>(r == rows - 1 ? 0 : r == rows - 2 ? last : random.below(last));
                limits[2 * r + 1] = static_cast<int64_t>(last + (r == rows - 2 ? 1 : 0));
            }
            on_each_set(text("attend %s over %zu keys", name_of(type), last), [&](const Kernels& kernels) {
                Buffer<float> out(rows * padded_head(H)), peak(rows), sum(rows), scratch(attention_scratch(rows, H));
                AttentionPiece piece{
                    q.data(),   limits.data(), store.table.data(), rows,          1, 0, static_cast<int64_t>(last),
                    out.data(), peak.data(),   sum.data(),         scratch.data()};
                kernels.attend(piece, store.pages());
                for (size_t r = 0; r < rows; ++r) {
                    double expected_peak = -kInf, expected_sum = 0;
                    std::vector<double> scores(last, -kInf), values(H, 0);
                    for (auto s = static_cast<size_t>(limits[2 * r]); s < last; ++s) {
                        scores[s] = 0;
                        for (size_t h = 0; h < H; ++h) scores[s] += q[r * H + h] * store.at(0, 1, s, h);
                        expected_peak = std::max(expected_peak, scores[s]);
                    }
                    for (auto s = static_cast<size_t>(limits[2 * r]); s < last; ++s) {
                        const double weight = std::exp(scores[s] - expected_peak);
                        expected_sum += weight;
                        for (size_t h = 0; h < H; ++h) values[h] += weight * store.at(1, 1, s, h);
                    }
                    if (r == rows - 2) {
                        expect(peak[r] == -kInf && sum[r] == 0, "a row that sees nothing");
                        for (size_t h = 0; h < H; ++h) expect(out[r * H + h] == 0, "a row that sees nothing");
                        continue;
                    }
                    expect_near(peak[r], expected_peak, 1e-5, "peak", r, 0);
                    expect_near(sum[r], expected_sum, 1e-5 * expected_sum, "sum", r, 0);
                    for (size_t h = 0; h < H; ++h)
                        expect_near(out[r * H + h], values[h], 3e-5 * expected_sum, "out", r, h);
                }
            });
        }
    report("attend");
}

void check_nan_in_attention() {
    Random random(18);
    constexpr size_t H = 32, N = 2, length = 90;
    for (KvType type : kKvTypes)
        for (size_t at : {size_t{0}, size_t{17}, H - 1})
            for (bool in_key : {false, true})
                on_each_set(
                    text("attention %s with NaN in a %s at %zu", name_of(type), in_key ? "key" : "query", at),
                    [&](const Kernels&) {
                        KvStore store(type, 1, length, H);
                        Buffer<float> k = normals(random, length * H), v = normals(random, length * H);
                        Buffer<float> q = normals(random, length * N * H), sinks = normals(random, N),
                                      out(length * N * H);
                        constexpr size_t position = 70;
                        (in_key ? k[position * H + at] : q[(position * N + 1) * H + at]) = kNan;
                        engine_of(2).kv_write(store.pages(), store.sequence(length, length), k.data(), H, v.data(), H);
                        engine_of(2).attention(store.pages(), store.sequence(length, length),
                                               {q.data(), N, N * H, sinks.data(), 0.2f, 10, out.data()});
                        for (size_t i = 0; i < out.size(); ++i) {
                            const size_t t = i / (N * H), n = i / H % N;
                            const bool sees = in_key ? t >= position && t < position + 10 : t == position && n == 1;
                            expect(std::isnan(out[i]) == sees, "NaN where it is in sight, and there alone");
                        }
                    });
    report("not a number in attention");
}

}  // namespace test
