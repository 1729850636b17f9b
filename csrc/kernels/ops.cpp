#include "kernels/ops.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

namespace freehold {

void Workspace::Free::operator()(uint8_t* data) const { std::free(data); }

void Workspace::reset(size_t bytes) {
    used_ = 0;
    if (bytes <= capacity_) return;
    release();
    data_.reset(static_cast<uint8_t*>(std::aligned_alloc(64, ceil_div(bytes, 64) * 64)));
    if (!data_) throw std::bad_alloc();
    capacity_ = bytes;
}

void Workspace::release() {
    data_.reset();
    capacity_ = used_ = 0;
}

namespace {

// Tokens are handed out in tiles of like size, so that none is left with a single one.
struct TileRange {
    size_t first, m;
};
size_t tile_count(size_t T) { return ceil_div(T, kTile); }
TileRange tile_range(size_t T, size_t tile) {
    const size_t count = tile_count(T), first = T * tile / count;
    return {first, T * (tile + 1) / count - first};
}

TileRange tile_holding(size_t T, size_t t) {
    size_t tile = t * tile_count(T) / T;  // right, or one too small
    if (const TileRange range = tile_range(T, tile); t >= range.first + range.m) ++tile;
    return tile_range(T, tile);
}

// Quantised activations of T tokens, as consecutive tiles.
struct Quantised {
    int8_t* values = nullptr;
    float* scales = nullptr;
    int32_t* offsets = nullptr;
    size_t blocks = 0, block_bytes = 0;
    Form form = Form::f32;

    // For activations that meet `w`.
    static size_t bytes(const Kernels& k, const Matrix& w, size_t T) {
        return Workspace::size_of<int8_t>(T * w.blocks() * freehold::block_bytes(k, w.form)) +
               Workspace::size_of<float>(T * w.blocks()) + Workspace::size_of<int32_t>(T * w.blocks());
    }

    void take(Workspace& workspace, const Kernels& k, const Matrix& w, size_t T) {
        blocks = w.blocks();
        block_bytes = freehold::block_bytes(k, w.form);
        form = w.form;
        values = workspace.take<int8_t>(T * blocks * block_bytes);
        scales = workspace.take<float>(T * blocks);
        offsets = workspace.take<int32_t>(T * blocks);
    }

    Tile tile(size_t first, size_t m) const {
        Tile tile;
        tile.m = m;
        tile.form = form;
        tile.values = values + first * blocks * block_bytes;
        tile.scales = scales + first * blocks;
        tile.offsets = offsets + first * blocks;
        return tile;
    }
};

static_assert(kUnitPanels <= kPanelsAtOnce);

// low (m, stride) = scaling * x * aT, a tile's rows through the first factor.
void narrow(const Kernels& k, const Matrix& a, float scaling, const Tile& x, float* low, size_t stride) {
    alignas(64) PanelSums sums;
    for (size_t panel = 0; panel < a.panels; panel += kPanelsAtOnce) {
        const size_t count = std::min(kPanelsAtOnce, a.panels - panel);
        dot_panels(k, a, panel, count, x, sums);
        for (size_t t = 0; t < x.m; ++t)
            for (size_t p = 0; p < count; ++p)
                for (size_t r = 0; r < kPanel; ++r)
                    low[t * stride + (panel + p) * kPanel + r] = scaling * sums[p][t * kPanel + r];
    }
}

// sums += low * bT, for some panels of the second factor.
void add_widened(const Kernels& k, const Matrix& b, size_t panel, size_t count, const Tile& low, PanelSums& sums) {
    alignas(64) PanelSums added;
    dot_panels(k, b, panel, count, low, added);
    for (size_t p = 0; p < count; ++p)
        for (size_t i = 0; i < low.m * kPanel; ++i) sums[p][i] += added[p][i];
}

Tile plain_tile(const float* rows, size_t stride, size_t m) {
    Tile tile;
    tile.m = m;
    tile.rows = rows;
    tile.stride = stride;
    return tile;
}

}  // namespace

void Engine::rms_norm(const float* x, const float* weight, float* out, size_t T, size_t D, float eps) {
    std::lock_guard<std::mutex> lock(busy_);
    const Kernels& k = kernels();
    pool_.split(T, 8, [&](size_t first, size_t last, unsigned) {
        for (size_t t = first; t < last; ++t) k.rms_norm(x + t * D, weight, out + t * D, D, eps);
    });
}

void Engine::rms_norm_backward(const float* x, const float* weight, const float* of_out, float* of_x, size_t T,
                               size_t D, float eps) {
    std::lock_guard<std::mutex> lock(busy_);
    const Kernels& k = kernels();
    pool_.split(T, 8, [&](size_t first, size_t last, unsigned) {
        for (size_t t = first; t < last; ++t)
            k.rms_norm_backward(x + t * D, weight, of_out + t * D, of_x + t * D, D, eps);
    });
}

void Engine::linear(const Matrix& w, const LinearArgs& args) {
    std::lock_guard<std::mutex> lock(busy_);
    const Kernels& k = kernels();
    const size_t T = args.T, tiles = tile_count(T);
    if (T == 0) return;
    const size_t row_floats = ceil_div(w.C, kPanel) * kPanel;
    const bool normed_rows = args.norm && !w.quantised();
    workspace_.reset((w.quantised() ? Quantised::bytes(k, w, T) : 0) +
                     Workspace::size_of<float>(normed_rows ? T * row_floats : threads() * row_floats));
    Quantised quantised;
    if (w.quantised()) quantised.take(workspace_, k, w, T);
    float* rows = workspace_.take<float>(normed_rows ? T * row_floats : threads() * row_floats);

    if (w.quantised() || normed_rows) {
        pool_.split(T, 4, [&](size_t first, size_t last, unsigned thread) {
            for (size_t t = first; t < last; ++t) {
                const float* x = args.x + t * args.stride;
                float* normed = rows + (normed_rows ? t : thread) * row_floats;
                if (args.norm) k.rms_norm(x, args.norm, normed, w.C, args.eps), x = normed;
                if (!w.quantised()) continue;
                const TileRange range = tile_holding(T, t);
                k.quantise(x, w.C, quantised.tile(range.first, range.m), t - range.first);
            }
        });
    }
    pool_.split(w.panels, kPanelsAtOnce, [&](size_t first, size_t last, unsigned) {
        alignas(64) PanelSums sums;
        for (size_t panel = first; panel < last; panel += kPanelsAtOnce) {
            const size_t count = std::min(kPanelsAtOnce, last - panel);
            for (size_t i = 0; i < tiles; ++i) {
                const TileRange range = tile_range(T, i);
                Tile tile;
                if (w.quantised()) {
                    tile = quantised.tile(range.first, range.m);
                } else {
                    tile.m = range.m;
                    tile.stride = normed_rows ? row_floats : args.stride;
                    tile.rows = (normed_rows ? rows : args.x) + range.first * tile.stride;
                }
                dot_panels(k, w, panel, count, tile, sums);
                for (size_t t = 0; t < range.m; ++t) {
                    for (size_t p = 0; p < count; ++p) {
                        const size_t row = (panel + p) * kPanel, at = (range.first + t) * w.R + row;
                        const float* acc = sums[p] + t * kPanel;
                        for (size_t r = 0; r < std::min(kPanel, w.R - row); ++r) {
                            float value = acc[r];
                            if (args.bias) value += args.bias[row + r];
                            if (args.residual) value += args.residual[at + r];
                            args.out[at + r] = value;
                        }
                    }
                }
            }
        }
    });
}

namespace {

constexpr size_t kStrip = 96;        // columns that a thread takes at once: whole blocks, a multiple of kLeftRows
constexpr size_t kDepthPanels = 5;   // whose rows are widened at once; with the strip's columns, 30 KiB
constexpr size_t kTurnTokens = 512;  // these two bound the workspace: so many gradients,
constexpr size_t kTurnPanels = 512;  // of so many panels' rows, are turned at once

// Of a panel: how far apart columns' weights lie, and blocks' scales.
size_t column_bytes(const Matrix& w) {
    return w.panel_bytes() / std::max<size_t>(1, w.quantised() ? w.blocks() * kBlock : w.C);
}
size_t block_scale_bytes(const Matrix& w) {
    return w.quantised() ? w.panel_scale_bytes() / std::max<size_t>(1, w.blocks()) : 0;
}

}  // namespace

void Engine::linear_backward(const Matrix& w, const LinearBackwardArgs& args) {
    std::lock_guard<std::mutex> lock(busy_);
    const Kernels& k = kernels();
    if (args.T == 0) return;
    if (w.panels == 0) std::fill(args.out, args.out + args.T * w.C, 0.0f);
    constexpr size_t depth = kDepthPanels * kPanel;
    const size_t most_groups = ceil_div(std::min(args.T, kTurnTokens), kPanel);
    const size_t most_panels = std::min(w.panels, kTurnPanels);
    const size_t sums_floats = most_groups * kStrip * kPanel;
    workspace_.reset(Workspace::size_of<float>(most_groups * most_panels * kPanel * kPanel) +
                     Workspace::size_of<float>(threads() * sums_floats) +
                     Workspace::size_of<float>(threads() * kStrip * depth));
    float* turned = workspace_.take<float>(most_groups * most_panels * kPanel * kPanel);  // (groups, rows, 16 tokens)
    float* all_sums = workspace_.take<float>(threads() * sums_floats);
    float* all_weights = workspace_.take<float>(threads() * kStrip * depth);

    for (size_t first_token = 0; first_token < args.T; first_token += kTurnTokens) {
        const size_t tokens = std::min(kTurnTokens, args.T - first_token), groups = ceil_div(tokens, kPanel);
        for (size_t first_panel = 0; first_panel < w.panels; first_panel += kTurnPanels) {
            const size_t panels = std::min(kTurnPanels, w.panels - first_panel),
                         group_floats = panels * kPanel * kPanel;
            pool_.split(panels, 8, [&](size_t first, size_t last, unsigned) {
                for (size_t g = 0; g < groups; ++g)
                    for (size_t t = 0; t < kPanel; ++t) {
                        const size_t token = g * kPanel + t;
                        const float* row = args.gradient + (first_token + token) * args.stride;
                        float* to = turned + g * group_floats + t;
                        for (size_t at = first * kPanel; at < last * kPanel; ++at) {
                            const size_t r = first_panel * kPanel + at;
                            to[at * kPanel] = token < tokens && r < w.R ? row[r] : 0.0f;
                        }
                    }
            });
            pool_.split(ceil_div(w.C, kStrip), 1, [&](size_t begin, size_t end, unsigned thread) {
                float* sums = all_sums + thread * sums_floats;  // (groups, kStrip, 16 tokens)
                float* weights = all_weights + thread * kStrip * depth;
                for (size_t strip = begin; strip < end; ++strip) {
                    const size_t column = strip * kStrip, columns = std::min(kStrip, w.C - column);
                    float* out = args.out + first_token * w.C + column;
                    if (first_panel)
                        for (size_t t = 0; t < groups * kPanel; ++t)
                            for (size_t c = 0; c < columns; ++c)
                                sums[(t / kPanel * kStrip + c) * kPanel + t % kPanel] =
                                    t < tokens ? out[t * w.C + c] : 0.0f;
                    for (size_t panel = 0; panel < panels; panel += kDepthPanels) {
                        const size_t count = std::min(kDepthPanels, panels - panel);
                        for (size_t p = 0; p < count; ++p) {
                            const size_t at = first_panel + panel + p;
                            k.widen(w.form, w.panel_data(at) + column * column_bytes(w),
                                    w.panel_scales(at) + column / kBlock * block_scale_bytes(w), columns,
                                    weights + p * kPanel, depth);
                        }
                        k.multiply_left({.weights = weights,
                                         .weight_column = depth,
                                         .weight_step = 1,
                                         .b = turned + panel * kPanel * kPanel,
                                         .b_group = group_floats,
                                         .c = sums,
                                         .c_group = kStrip * kPanel,
                                         .c_column = kPanel,
                                         .columns = columns,
                                         .groups = groups,
                                         .K = count * kPanel,
                                         .accumulate = first_panel + panel > 0});
                    }
                    for (size_t t = 0; t < tokens; ++t)
                        for (size_t c = 0; c < columns; ++c)
                            out[t * w.C + c] = sums[(t / kPanel * kStrip + c) * kPanel + t % kPanel];
                }
            });
        }
    }
}

namespace {

constexpr size_t kProductRows = 96;    // that a thread takes at once, with two panels of columns:
constexpr size_t kProductDepth = 256;  // so many rows of the right matrix are 32 KiB

}  // namespace

void Engine::add_product(const ProductArgs& args) {
    std::lock_guard<std::mutex> lock(busy_);
    const Kernels& k = kernels();
    const auto [left, right, M, K, N, out] = args;
    constexpr size_t width = 2 * kPanel, right_floats = kProductDepth * width, sums_floats = kProductRows * width;
    workspace_.reset(Workspace::size_of<float>(threads() * right_floats) +
                     Workspace::size_of<float>(threads() * sums_floats));
    float* all_rights = workspace_.take<float>(threads() * right_floats);
    float* all_sums = workspace_.take<float>(threads() * sums_floats);
    const size_t strips = ceil_div(N, width);
    pool_.split(ceil_div(M, kProductRows) * strips, 1, [&](size_t begin, size_t end, unsigned thread) {
        float* packed = all_rights + thread * right_floats;  // (panels, kProductDepth, 16)
        for (size_t tile = begin; tile < end; ++tile) {
            const size_t row = tile / strips * kProductRows, rows = std::min(kProductRows, M - row);
            const size_t column = tile % strips * width, columns = std::min(width, N - column);
            const size_t panels = ceil_div(columns, kPanel);
            const bool whole = columns % kPanel == 0;  // else the sums of a panel would not fit in their place
            float* place = out + row * N + column;
            float* sums = whole ? place : all_sums + thread * sums_floats;
            const size_t stride = whole ? N : width;
            if (!whole)
                for (size_t r = 0; r < rows; ++r)
                    for (size_t c = 0; c < width; ++c) sums[r * width + c] = c < columns ? place[r * N + c] : 0.0f;
            for (size_t first = 0; first < K; first += kProductDepth) {
                const size_t depth = std::min(kProductDepth, K - first);
                for (size_t panel = 0; panel < panels; ++panel) {
                    const size_t at = column + panel * kPanel, count = std::min(kPanel, N - at);
                    const float* from = right.data + first * right.row + at * right.column;
                    float* to = packed + panel * kProductDepth * kPanel;
                    for (size_t i = 0; i < depth; ++i, from += right.row, to += kPanel)
                        if (right.column == 1 && count == kPanel)
                            std::memcpy(to, from, kPanel * sizeof(float));
                        else
                            for (size_t c = 0; c < kPanel; ++c) to[c] = c < count ? from[c * right.column] : 0.0f;
                }
                k.multiply_left({.weights = left.data + row * left.row + first * left.column,
                                 .weight_column = left.row,
                                 .weight_step = left.column,
                                 .b = packed,
                                 .b_group = kProductDepth * kPanel,
                                 .c = sums,
                                 .c_group = kPanel,
                                 .c_column = stride,
                                 .columns = rows,
                                 .groups = panels,
                                 .K = depth,
                                 .accumulate = true});
            }
            if (!whole)
                for (size_t r = 0; r < rows; ++r) std::copy_n(sums + r * width, columns, place + r * N);
        }
    });
}

void Engine::widen(const Matrix& w, bool narrow, void* out) {
    std::lock_guard<std::mutex> lock(busy_);
    const Kernels& k = kernels();
    const size_t row = w.panels * kPanel;
    pool_.split(ceil_div(w.C, kStrip), 1, [&](size_t first, size_t last, unsigned) {
        alignas(64) float wide[kStrip * kPanel];
        for (size_t strip = first; strip < last; ++strip) {
            const size_t column = strip * kStrip, columns = std::min(kStrip, w.C - column);
            for (size_t panel = 0; panel < w.panels; ++panel) {
                const uint8_t* data = w.panel_data(panel) + column * column_bytes(w);
                const uint8_t* scales = w.panel_scales(panel) + column / kBlock * block_scale_bytes(w);
                // A quantised panel fills whole blocks, which may be more than the matrix has columns.
                if (narrow || columns % kBlock) {
                    k.widen(w.form, data, scales, columns, wide, kPanel);
                } else {
                    k.widen(w.form, data, scales, columns, static_cast<float*>(out) + column * row + panel * kPanel,
                            row);
                    continue;
                }
                for (size_t c = 0; c < columns; ++c) {
                    const size_t to = (column + c) * row + panel * kPanel;
                    if (narrow) {
                        k.narrow(wide + c * kPanel, kPanel, static_cast<uint16_t*>(out) + to);
                    } else {
                        std::memcpy(static_cast<float*>(out) + to, wide + c * kPanel, kPanel * sizeof(float));
                    }
                }
            }
        }
    });
}

void Engine::rope(const float* x, size_t stride, const float* cos, const float* sin, float* out, size_t T, size_t N,
                  size_t H) {
    std::lock_guard<std::mutex> lock(busy_);
    const Kernels& k = kernels();
    pool_.split(T, 8, [&](size_t first, size_t last, unsigned) {
        for (size_t t = first; t < last; ++t)
            for (size_t n = 0; n < N; ++n)
                k.rope(x + t * stride + n * H, cos + t * (H / 2), sin + t * (H / 2), out + (t * N + n) * H, H);
    });
}

namespace {

// Pages of sequence b from the one that holds position `first` on, to its last.
void check_pages(const char* op, const KvPages& kv, const Sequences& sequences, size_t b, int64_t first) {
    for (auto i = static_cast<size_t>(first) / kPage; i * kPage < static_cast<size_t>(sequences.lengths[b]); ++i)
        if (static_cast<uint64_t>(static_cast<int64_t>(sequences.pages(b)[i])) >= kv.count)
            throw std::out_of_range(std::string("[") + op + "] a page's number is not below the number of pages");
}

}  // namespace

void Engine::kv_write(const KvPages& kv, const Sequences& sequences, const float* keys, size_t k_stride,
                      const float* values, size_t v_stride, Rotation rotation) {
    std::lock_guard<std::mutex> lock(busy_);
    const Kernels& k = kernels();
    const size_t H = kv.H, padded = padded_head(H);
    const int64_t* starts = sequences.starts;
    for (size_t b = 0; b < sequences.count; ++b)
        if (starts[b] < starts[b + 1])
            check_pages("kv_write", kv, sequences, b, sequences.lengths[b] - (starts[b + 1] - starts[b]));
    workspace_.reset(Workspace::size_of<float>(threads() * padded));
    float* turned = workspace_.take<float>(threads() * padded);
    pool_.split(sequences.tokens(), 16, [&](size_t first, size_t last, unsigned thread) {
        float* mine = turned + thread * padded;
        const int64_t* end = std::upper_bound(starts, starts + sequences.count + 1, static_cast<int64_t>(first));
        for (size_t t = first; t < last; ++t) {
            while (static_cast<int64_t>(t) >= *end) ++end;
            const auto b = static_cast<size_t>(end - starts) - 1;
            const auto position = static_cast<size_t>(sequences.lengths[b] - (*end - static_cast<int64_t>(t)));
            const auto page = static_cast<size_t>(sequences.pages(b)[position / kPage]);
            for (size_t head = 0; head < kv.K; ++head) {
                const float* key = keys + t * k_stride + head * H;
                if (rotation.cos) {
                    k.rope(key, rotation.cos + t * (H / 2), rotation.sin + t * (H / 2), mine, H);
                    key = mine;
                }
                const size_t at = kv.at(page, head), row = position % kPage;
                k.kv_store(key, kv, false, at, row);
                k.kv_store(values + t * v_stride + head * H, kv, true, at, row);
            }
        }
    });
}

void Engine::attention(const KvPages& kv, const Sequences& sequences, const AttentionArgs& args) {
    std::lock_guard<std::mutex> lock(busy_);
    const Kernels& k = kernels();
    const size_t N = args.N, H = kv.H, group = N / kv.K, padded = padded_head(H);
    auto first_visible = [&](int64_t position) {
        return args.window ? std::max<int64_t>(0, position - static_cast<int64_t>(args.window) + 1) : 0;
    };

    // Queries of one sequence and their kv head: `count` tokens from `token` on, at consecutive positions.
    struct Item {
        size_t sequence, token, count, head;
        int64_t position, first_split, last_split;
    };
    size_t longest = 0;
    for (size_t b = 0; b < sequences.count; ++b)
        longest = std::max(longest, static_cast<size_t>(sequences.starts[b + 1] - sequences.starts[b]));
    if (longest == 0) return;
    const size_t queries = std::clamp<size_t>(64 / group, 1, longest), rows = queries * group;
    std::vector<Item> items;
    int64_t most_splits = 0;
    for (size_t b = 0; b < sequences.count; ++b) {
        const auto first = static_cast<size_t>(sequences.starts[b]),
                   last = static_cast<size_t>(sequences.starts[b + 1]);
        const int64_t start = sequences.lengths[b] - static_cast<int64_t>(last - first);
        if (first < last) check_pages("attention", kv, sequences, b, first_visible(start));
        for (size_t token = first; token < last; token += queries) {
            const size_t count = std::min(queries, last - token);
            const int64_t position = start + static_cast<int64_t>(token - first);
            const int64_t end = position + static_cast<int64_t>(count);
            const int64_t first_split = first_visible(position) / kSplit, last_split = (end + kSplit - 1) / kSplit;
            most_splits = std::max(most_splits, last_split - first_split);
            for (size_t head = 0; head < kv.K; ++head)
                items.push_back({b, token, count, head, position, first_split, last_split});
        }
    }

    // Few items over many keys are split by keys. Each split is summed up on its own and merged in order in both cases,
    // so that the results are the same.
    const bool by_keys = items.size() < 4 * threads() && most_splits > 1;
    struct Piece {
        size_t item;
        int64_t split;
    };
    std::vector<Piece> pieces;
    for (size_t i = 0; by_keys && i < items.size(); ++i)
        for (int64_t split = items[i].first_split; split < items[i].last_split; ++split) pieces.push_back({i, split});

    const size_t partial = rows * (padded + 2);
    const size_t per_thread = Workspace::size_of<float>(rows * H) + Workspace::size_of<int64_t>(rows * 2) +
                              Workspace::size_of<float>(attention_scratch(rows, H)) +
                              Workspace::size_of<float>(partial);
    const size_t num_totals = by_keys ? pieces.size() : threads();
    workspace_.reset(per_thread * threads() + Workspace::size_of<float>(num_totals * partial));
    struct Scratch {
        float *q, *scratch, *piece;
        int64_t* limits;
    };
    std::vector<Scratch> scratches(threads());
    for (Scratch& s : scratches)
        s = {workspace_.take<float>(rows * H), workspace_.take<float>(attention_scratch(rows, H)),
             workspace_.take<float>(partial), workspace_.take<int64_t>(rows * 2)};
    float* totals = workspace_.take<float>(num_totals * partial);

    auto prepare = [&](const Item& item, Scratch& s) {
        for (size_t i = 0; i < item.count; ++i)
            for (size_t g = 0; g < group; ++g) {
                const float* q = args.q + (item.token + i) * args.stride + (item.head * group + g) * H;
                float* to = s.q + (i * group + g) * H;
                if (args.rotation.cos) {
                    const size_t at = (item.token + i) * (H / 2);
                    k.rope(q, args.rotation.cos + at, args.rotation.sin + at, to, H);
                    q = to;
                }
                for (size_t h = 0; h < H; ++h) to[h] = q[h] * args.scale;
                const int64_t position = item.position + static_cast<int64_t>(i);
                s.limits[2 * (i * group + g)] = first_visible(position);
                s.limits[2 * (i * group + g) + 1] = position + 1;
            }
        AttentionPiece piece{};
        piece.q = s.q;
        piece.limits = s.limits;
        piece.pages = sequences.pages(item.sequence);
        piece.rows = item.count * group;
        piece.head = item.head;
        piece.scratch = s.scratch;
        return piece;
    };
    auto run_split = [&](AttentionPiece& piece, int64_t split, float* result) {
        const int64_t low = piece.limits[0] / int64_t{kPage} * int64_t{kPage};
        piece.first_key = std::max(split * kSplit, low);
        piece.last_key = std::min((split + 1) * kSplit, piece.limits[2 * piece.rows - 1]);
        piece.out = result;
        piece.peak = result + rows * padded;
        piece.sum = piece.peak + rows;
        k.attend(piece, kv);
    };
    auto merge = [&](float* total, const float* piece, size_t count) {
        for (size_t r = 0; r < count; ++r) {
            float &peak = total[rows * padded + r], &sum = total[rows * (padded + 1) + r];
            const float other = piece[rows * padded + r], other_sum = piece[rows * (padded + 1) + r];
            if (other_sum == 0.0f) continue;
            const float highest = std::max(peak, other);
            const float mine = sum > 0 ? k.exp1(peak - highest) : 0.0f, theirs = k.exp1(other - highest);
            for (size_t h = 0; h < padded; ++h)
                total[r * padded + h] = total[r * padded + h] * mine + piece[r * padded + h] * theirs;
            sum = sum * mine + other_sum * theirs;
            peak = highest;
        }
    };
    auto clear = [&](float* total) {
        std::fill(total, total + partial, 0.0f);
        std::fill(total + rows * padded, total + rows * (padded + 1), -INFINITY);
    };
    auto finish = [&](const Item& item, const float* total) {
        for (size_t r = 0; r < item.count * group; ++r) {
            const size_t n = item.head * group + r % group;
            const float peak = total[rows * padded + r], sink = args.sinks[n], highest = std::max(peak, sink);
            const float mine = k.exp1(peak - highest);
            const float sum = total[rows * (padded + 1) + r] * mine + k.exp1(sink - highest), factor = mine / sum;
            const size_t at = (item.token + r / group) * N + n;
            if (args.logsum) args.logsum[at] = highest + std::log(sum);
            float* out = args.out + at * H;
            for (size_t h = 0; h < H; ++h) out[h] = total[r * padded + h] * factor;
        }
    };

    if (!by_keys) {
        pool_.split(items.size(), 1, [&](size_t begin, size_t end, unsigned thread) {
            Scratch& s = scratches[thread];
            float* total = totals + thread * partial;
            for (size_t i = begin; i < end; ++i) {
                AttentionPiece piece = prepare(items[i], s);
                clear(total);
                for (int64_t split = items[i].first_split; split < items[i].last_split; ++split) {
                    run_split(piece, split, s.piece);
                    merge(total, s.piece, piece.rows);
                }
                finish(items[i], total);
            }
        });
        return;
    }
    pool_.split(pieces.size(), 1, [&](size_t begin, size_t end, unsigned thread) {
        for (size_t i = begin; i < end; ++i) {
            AttentionPiece piece = prepare(items[pieces[i].item], scratches[thread]);
            run_split(piece, pieces[i].split, totals + i * partial);
        }
    });
    float* total = scratches[0].piece;
    size_t next = 0;
    for (size_t i = 0; i < items.size(); ++i) {
        clear(total);
        for (; next < pieces.size() && pieces[next].item == i; ++next)
            merge(total, totals + next * partial, items[i].count * group);
        finish(items[i], total);
    }
}

namespace {

size_t longest_of(const SelfAttentionBackwardArgs& args) {
    int64_t longest = 0;
    for (size_t b = 0; b < args.count; ++b) longest = std::max(longest, args.starts[b + 1] - args.starts[b]);
    return static_cast<size_t>(longest);
}

// (T, K, H) to (K, H, T).
void turn_heads(ThreadPool& pool, const float* x, size_t T, size_t K, size_t H, float* out) {
    pool.split(T, 64, [&](size_t first, size_t last, unsigned) {
        for (size_t at = 0; at < K * H; ++at)
            for (size_t t = first; t < last; ++t) out[at * T + t] = x[t * K * H + at];
    });
}

// A head's part of a sequence.
SelfAttentionPiece piece_of(const SelfAttentionBackwardArgs& args, size_t b, size_t head) {
    const size_t kv_head = head / (args.N / args.K), H = args.H, token = static_cast<size_t>(args.starts[b]);
    const size_t q = (token * args.N + head) * H, kv = (token * args.K + kv_head) * H;
    SelfAttentionPiece piece{};
    piece.q = args.q + q, piece.k = args.k + kv, piece.v = args.v + kv;
    piece.q_stride = args.N * H, piece.kv_stride = args.K * H, piece.H = H, piece.window = args.window;
    piece.scale = args.scale;
    piece.logsum = args.logsum + token * args.N + head, piece.logsum_stride = args.N;
    piece.gradient = args.gradient + q, piece.of_q = args.of_q + q;
    piece.common = args.common + token * args.N + head;
    return piece;
}

void choose_queries(SelfAttentionPiece& piece, size_t first, size_t last) {
    piece.first_query = first, piece.last_query = last, piece.last_key = last;
    piece.first_key = piece.window && first + 1 > piece.window ? first + 1 - piece.window : 0;
}

}  // namespace

void Engine::self_attention_backward(const SelfAttentionBackwardArgs& args) {
    std::lock_guard<std::mutex> lock(busy_);
    const Kernels& k = kernels();
    const size_t longest = longest_of(args), N = args.N, K = args.K, H = args.H, padded = padded_head(H);
    if (longest == 0) return;
    const auto T = static_cast<size_t>(args.starts[args.count]);
    const size_t scratch = self_attention_scratch(longest, H), sums = longest * padded;
    workspace_.reset(Workspace::size_of<float>(T * K * H) + Workspace::size_of<float>(threads() * scratch) +
                     Workspace::size_of<float>(threads() * 2 * sums));
    float* turned = workspace_.take<float>(T * K * H);
    float* all_scratch = workspace_.take<float>(threads() * scratch);
    float* all_sums = workspace_.take<float>(threads() * 2 * sums);
    turn_heads(pool_, args.k, T, K, H, turned);
    pool_.split(T * N, 64, [&](size_t first, size_t last, unsigned) {
        for (size_t i = first; i < last; ++i) {
            float sum = 0.0f;
            for (size_t h = 0; h < H; ++h) sum += args.out[i * H + h] * args.gradient[i * H + h];
            args.common[i] = sum;
        }
    });
    pool_.split(args.count * K, 1, [&](size_t begin, size_t end, unsigned thread) {
        float* of_k = all_sums + thread * 2 * sums;
        float* of_v = of_k + sums;
        for (size_t i = begin; i < end; ++i) {
            const size_t b = i / K, kv_head = i % K, token = static_cast<size_t>(args.starts[b]);
            const size_t count = static_cast<size_t>(args.starts[b + 1]) - token;
            std::fill(of_k, of_k + 2 * sums, 0.0f);
            for (size_t head = kv_head * (N / K); head < (kv_head + 1) * (N / K); ++head) {
                SelfAttentionPiece piece = piece_of(args, b, head);
                piece.turned = turned + kv_head * H * T + token, piece.turned_stride = T;
                piece.of_k = of_k, piece.of_v = of_v, piece.of_kv_group = longest * kPanel;
                piece.scratch = all_scratch + thread * scratch;
                for (size_t first = 0; first < count; first += kQueries) {
                    choose_queries(piece, first, std::min(count, first + kQueries));
                    k.self_attend_backward(piece);
                }
            }
            for (size_t t = 0; t < count; ++t)
                for (size_t h = 0; h < H; ++h) {
                    const size_t from = (h / kPanel * longest + t) * kPanel + h % kPanel;
                    args.of_k[((token + t) * K + kv_head) * H + h] = of_k[from];
                    args.of_v[((token + t) * K + kv_head) * H + h] = of_v[from];
                }
        }
    });
}

void Engine::route(const float* logits, size_t T, size_t E, size_t A, float* weights, int64_t* experts) {
    for (size_t t = 0; t < T; ++t, logits += E, weights += A, experts += A) {
        for (size_t a = 0; a < A; ++a) {
            size_t best = E;
            for (size_t e = 0; e < E; ++e) {
                if (std::find(experts, experts + a, static_cast<int64_t>(e)) != experts + a) continue;
                if (best == E || logits[e] > logits[best]) best = e;
            }
            experts[a] = static_cast<int64_t>(best);
            weights[a] = logits[best];
        }
        float sum = 0.0f;
        const float peak = weights[0];
        for (size_t a = 0; a < A; ++a) sum += weights[a] = std::exp(weights[a] - peak);
        for (size_t a = 0; a < A; ++a) weights[a] /= sum;
    }
}

void Engine::add_lora(const AddLoraArgs& args) {
    std::lock_guard<std::mutex> lock(busy_);
    const Kernels& k = kernels();
    // The tokens that parts are for, those of one adapter in a row.
    struct Group {
        int64_t row;
        size_t first, count;
    };
    std::vector<size_t> tokens;
    std::vector<Group> groups;
    auto group_of = [&](int64_t row) {
        return std::find_if(groups.begin(), groups.end(), [&](const Group& group) { return group.row == row; });
    };
    for (size_t i = 0; i < args.num_parts; ++i) {
        const int64_t row = args.part_rows[i];
        if (group_of(row) != groups.end()) continue;
        const size_t first = tokens.size();
        for (size_t t = 0; t < args.T; ++t)
            if (args.rows[t] == row) tokens.push_back(t);
        groups.push_back({row, first, tokens.size() - first});
    }
    if (tokens.empty()) return;

    struct Narrowing {
        const Lora* lora;
        size_t first, m;  // of `tokens`
        float* low;
    };
    struct Widening {
        const Lora* lora;
        size_t panel, column, first_tile, num_tiles;
    };
    const size_t C = args.parts[0]->a.C;
    size_t stride = 0, num_lows = 0;
    for (size_t i = 0; i < args.num_parts; ++i) {
        stride = std::max(stride, args.parts[i]->a.panels * kPanel);
        num_lows += group_of(args.part_rows[i])->count;
    }
    workspace_.reset(Workspace::size_of<float>(tokens.size() * C) + Workspace::size_of<float>(num_lows * stride));
    float* x = workspace_.take<float>(tokens.size() * C);
    float* low = workspace_.take<float>(num_lows * stride);
    std::vector<Narrowing> narrowings;
    std::vector<Widening> widenings;
    for (size_t i = 0; i < args.num_parts; ++i) {
        const Group group = *group_of(args.part_rows[i]);
        const size_t first_tile = narrowings.size(), num_tiles = tile_count(group.count);
        for (size_t j = 0; j < num_tiles; ++j) {
            const TileRange range = tile_range(group.count, j);
            narrowings.push_back({args.parts[i], group.first + range.first, range.m, low + range.first * stride});
        }
        low += group.count * stride;
        for (size_t panel = 0; panel < args.parts[i]->b.panels; panel += kPanelsAtOnce)
            widenings.push_back({args.parts[i], panel, args.part_columns[i], first_tile, num_tiles});
    }

    pool_.split(tokens.size(), 8, [&](size_t first, size_t last, unsigned) {
        for (size_t i = first; i < last; ++i) {
            const float* row = args.x + tokens[i] * args.stride;
            if (args.norm) {
                k.rms_norm(row, args.norm, x + i * C, C, args.eps);
            } else {
                std::memcpy(x + i * C, row, C * sizeof(float));
            }
        }
    });
    pool_.split(narrowings.size(), 1, [&](size_t first, size_t last, unsigned) {
        for (size_t i = first; i < last; ++i) {
            const Narrowing& to = narrowings[i];
            narrow(k, to.lora->a, to.lora->scaling, plain_tile(x + to.first * C, C, to.m), to.low, stride);
        }
    });
    pool_.split(widenings.size(), 1, [&](size_t first, size_t last, unsigned) {
        alignas(64) PanelSums sums;
        for (size_t i = first; i < last; ++i) {
            const Widening& part = widenings[i];
            const Matrix& b = part.lora->b;
            const size_t count = std::min(kPanelsAtOnce, b.panels - part.panel);
            for (size_t j = part.first_tile; j < part.first_tile + part.num_tiles; ++j) {
                const Narrowing& from = narrowings[j];
                dot_panels(k, b, part.panel, count, plain_tile(from.low, stride, from.m), sums);
                for (size_t t = 0; t < from.m; ++t) {
                    float* out = args.out + tokens[from.first + t] * args.out_stride + part.column;
                    for (size_t p = 0; p < count; ++p) {
                        const size_t row = (part.panel + p) * kPanel;
                        for (size_t r = 0; r < std::min(kPanel, b.R - row); ++r)
                            out[row + r] += sums[p][t * kPanel + r];
                    }
                }
            }
        }
    });
}

namespace {

// Who visits whom: visits sorted by expert, an expert's by adapter, those without one first, and an adapter's by token.
struct Visits {
    struct Visit {
        size_t token, slot;
    };
    struct ExpertTile {
        size_t expert, first, m;
        const ExpertLora* lora;  // null for none
    };
    std::vector<size_t> used;  // experts that somebody visits, in order
    std::vector<Visit> sorted;
    std::vector<ExpertTile> tiles;
    std::vector<size_t> first_tile, tile_of;  // of each used expert, and of each visit

    explicit Visits(const MoeArgs& args) : sorted(args.T * args.A), tile_of(args.T * args.A) {
        const size_t A = args.A, E = args.E, visits = sorted.size();
        for (size_t i = 0; i < visits; ++i)
            if (static_cast<uint64_t>(args.experts[i]) >= E)
                throw std::out_of_range("[moe] an expert's number is not below the number of experts");
        for (size_t t = 0; t < args.T && args.num_loras; ++t)
            if (args.rows[t] >= static_cast<int64_t>(args.num_loras))
                throw std::out_of_range("[moe] an adapter's number is not below the number of adapters");
        const size_t kinds = args.num_loras + 1;
        auto group = [&](size_t i) {
            const size_t kind = args.num_loras ? static_cast<size_t>(std::max<int64_t>(args.rows[i / A], -1) + 1) : 0;
            return static_cast<size_t>(args.experts[i]) * kinds + kind;
        };
        std::vector<size_t> starts(E * kinds + 1, 0);
        for (size_t i = 0; i < visits; ++i) ++starts[group(i) + 1];
        for (size_t g = 0; g < E * kinds; ++g) starts[g + 1] += starts[g];
        for (size_t e = 0; e < E; ++e)
            if (starts[e * kinds] < starts[(e + 1) * kinds]) used.push_back(e);
        std::vector<size_t> next(starts.begin(), starts.end() - 1);
        for (size_t i = 0; i < visits; ++i) sorted[next[group(i)]++] = {i / A, i % A};
        first_tile.assign(used.size() + 1, 0);
        for (size_t u = 0; u < used.size(); ++u) {
            for (size_t kind = 0; kind < kinds; ++kind) {
                const size_t g = used[u] * kinds + kind, count = starts[g + 1] - starts[g];
                for (size_t i = 0; i < tile_count(count); ++i) {
                    const TileRange range = tile_range(count, i);
                    for (size_t j = 0; j < range.m; ++j) tile_of[starts[g] + range.first + j] = tiles.size();
                    tiles.push_back({used[u], starts[g] + range.first, range.m, kind ? args.loras[kind - 1] : nullptr});
                }
            }
            first_tile[u + 1] = tiles.size();
        }
    }
};

constexpr size_t kUnitFloats = kUnitPanels * kPanel;  // gates and ups of 32 hidden values

// What the activation of one token's unit is made from.
void keep_sums(const Kernels& k, const MoeKept& kept, const PanelSums& acc, size_t t,
               const float (&biases)[kUnitPanels][kPanel], size_t at) {
    alignas(64) float values[kUnitFloats];
    for (size_t p = 0; p < kUnitPanels; ++p)
        for (size_t r = 0; r < kPanel; ++r) values[p * kPanel + r] = acc[p][t * kPanel + r] + biases[p][r];
    if (kept.narrow) {
        k.narrow(values, kUnitFloats, static_cast<uint16_t*>(kept.sums) + at);
    } else {
        std::memcpy(static_cast<float*>(kept.sums) + at, values, sizeof values);
    }
}

}  // namespace

void Engine::moe(const Matrix& gate_up, const Matrix& down, const MoeArgs& args) {
    std::lock_guard<std::mutex> lock(busy_);
    const Kernels& k = kernels();
    const size_t T = args.T, A = args.A, D = gate_up.C, F = gate_up.R / 2, count = T * A;
    if (T == 0) return;
    const size_t units = ceil_div(F, kBlock);  // a unit: 32 hidden values
    const size_t hidden_floats = units * kBlock;
    using ExpertTile = Visits::ExpertTile;
    const Visits visits(args);
    const std::vector<ExpertTile>& tiles = visits.tiles;
    // One token: all its experts read the same activations. (A caller may name one of them twice; `route` never does.)
    const bool shared = T == 1 && visits.used.size() == A;

    // Adapters read what matrices read, before it is quantised.
    size_t low_floats = 0;
    bool any_gate_up = false, any_down = false;
    for (const ExpertTile& tile : tiles) {
        if (!tile.lora) continue;
        for (const Lora* lora : {tile.lora->gate_up, tile.lora->down})
            if (lora) low_floats = std::max(low_floats, lora->a.panels * kPanel);
        any_gate_up = any_gate_up || tile.lora->gate_up;
        any_down = any_down || tile.lora->down;
    }
    const size_t inputs = shared ? 1 : count;
    const size_t row_floats = gate_up.quantised() && !any_gate_up ? 0 : ceil_div(D, kPanel) * kPanel;
    const size_t kept_hidden = down.quantised() && !any_down ? 0 : count * hidden_floats;
    const size_t seen_floats = args.seen.x || args.seen.hidden ? kTile * std::max(D, hidden_floats) : 0;
    workspace_.reset((gate_up.quantised() ? Quantised::bytes(k, gate_up, inputs) : 0) +
                     (down.quantised() ? Quantised::bytes(k, down, count) : 0) +
                     Workspace::size_of<float>(kept_hidden) + Workspace::size_of<float>(count * row_floats) +
                     Workspace::size_of<float>(args.norm ? T * D : 0) + Workspace::size_of<float>(count * low_floats) +
                     Workspace::size_of<float>(threads() * seen_floats));
    Quantised x, hidden;
    if (gate_up.quantised()) x.take(workspace_, k, gate_up, inputs);
    if (down.quantised()) hidden.take(workspace_, k, down, count);
    float* hidden_rows = workspace_.take<float>(kept_hidden);
    float* x_rows = workspace_.take<float>(count * row_floats);
    float* lows = workspace_.take<float>(count * low_floats);
    float* all_seen = workspace_.take<float>(threads() * seen_floats);
    const float* tokens = args.x;  // (T, D), normed if that is asked for
    if (args.norm) {
        float* normed = workspace_.take<float>(T * D);
        pool_.split(T, 8, [&](size_t first, size_t last, unsigned) {
            for (size_t t = first; t < last; ++t) k.rms_norm(args.x + t * D, args.norm, normed + t * D, D, args.eps);
        });
        tokens = normed;
    }

    auto plain_input = [&](const ExpertTile& tile) {
        return plain_tile(shared ? tokens : x_rows + tile.first * row_floats, row_floats, tile.m);
    };
    auto input_tile = [&](const ExpertTile& tile) {
        if (x.values) return shared ? x.tile(0, 1) : x.tile(tile.first, tile.m);
        return plain_input(tile);
    };
    auto plain_hidden = [&](const ExpertTile& tile) {
        return plain_tile(hidden_rows + tile.first * hidden_floats, hidden_floats, tile.m);
    };
    auto low_tile = [&](const ExpertTile& tile) {
        return plain_tile(lows + tile.first * low_floats, low_floats, tile.m);
    };
    // `seen` are the factors that the C inputs of each visit are multiplied by, if any; `kept` is where its rows go.
    auto narrow_all = [&](auto chosen, auto input, const float* seen, size_t C, float* kept) {
        pool_.split(tiles.size(), 1, [&](size_t first, size_t last, unsigned thread) {
            for (size_t i = first; i < last; ++i) {
                const ExpertTile& at = tiles[i];
                const Lora* lora = at.lora ? chosen(*at.lora) : nullptr;
                if (!lora) continue;
                Tile tile = input(at);
                if (seen) {
                    float* to = all_seen + thread * seen_floats;
                    for (size_t t = 0; t < at.m; ++t)
                        for (size_t c = 0; c < C; ++c)
                            to[t * C + c] = tile.rows[t * tile.stride + c] * seen[(at.first + t) * C + c];
                    tile = plain_tile(to, C, at.m);
                }
                float* low = lows + at.first * low_floats;
                narrow(k, lora->a.of_stack(at.expert), lora->scaling, tile, low, low_floats);
                const size_t width = lora->a.panels * kPanel;
                for (size_t t = 0; kept && t < at.m; ++t)
                    std::memcpy(kept + (at.first + t) * width, low + t * low_floats, width * sizeof(float));
            }
        });
    };
    if (shared) {
        if (x.values) k.quantise(tokens, D, x.tile(0, 1), 0);
    } else {
        pool_.split(count, 16, [&](size_t first, size_t last, unsigned) {
            for (size_t i = first; i < last; ++i) {
                const ExpertTile& tile = tiles[visits.tile_of[i]];
                const float* row = tokens + visits.sorted[i].token * D;
                if (x.values) k.quantise(row, D, x.tile(tile.first, tile.m), i - tile.first);
                if (!x.values || (tile.lora && tile.lora->gate_up))
                    std::memcpy(x_rows + i * row_floats, row, D * sizeof(float));
            }
        });
    }

    if (any_gate_up)
        narrow_all([](const ExpertLora& lora) { return lora.gate_up; }, plain_input, args.seen.x, D,
                   args.kept.gate_up_rows);

    pool_.split(visits.used.size() * units, 1, [&](size_t begin, size_t end, unsigned) {
        alignas(64) PanelSums acc;
        alignas(64) float biases[kUnitPanels][kPanel];
        alignas(64) float values[kBlock];
        for (size_t item = begin; item < end; ++item) {
            const size_t u = item / units, unit = item % units, e = visits.used[u];
            const Matrix w = gate_up.of_stack(e);
            const float* bias = args.gate_up_bias + e * 2 * F;
            for (size_t i = 0; i < kBlock; ++i) {  // gate, up, gate, up: as the panels come
                const size_t f = unit * kBlock + i, panel = i / kPanel * 2, lane = i % kPanel;
                biases[panel][lane] = f < F ? bias[2 * f] : 0.0f;
                biases[panel + 1][lane] = f < F ? bias[2 * f + 1] : 0.0f;
            }
            for (size_t n = visits.first_tile[u]; n < visits.first_tile[u + 1]; ++n) {
                const ExpertTile& at = tiles[n];
                const Tile tile = input_tile(at);
                dot_panels(k, w, unit * kUnitPanels, kUnitPanels, tile, acc);
                if (at.lora && at.lora->gate_up)
                    add_widened(k, at.lora->gate_up->b.of_stack(e), unit * kUnitPanels, kUnitPanels, low_tile(at), acc);
                for (size_t t = 0; t < tile.m; ++t) {
                    if (args.kept.sums)
                        keep_sums(k, args.kept, acc, t, biases, ((at.first + t) * units + unit) * kUnitFloats);
                    for (size_t p = 0; p < kUnitPanels; p += 2)
                        k.swiglu(acc[p] + t * kPanel, acc[p + 1] + t * kPanel, biases[p], biases[p + 1],
                                 values + p / 2 * kPanel, args.alpha, args.limit);
                    for (size_t i = F - std::min(F, unit * kBlock); i < kBlock; ++i) values[i] = 0.0f;
                    if (hidden.values) k.quantise_block(values, hidden.tile(at.first, at.m), t, unit);
                    if (!hidden.values || (at.lora && at.lora->down))
                        std::memcpy(hidden_rows + (at.first + t) * hidden_floats + unit * kBlock, values,
                                    sizeof values);
                }
            }
        }
    });

    if (any_down)
        narrow_all([](const ExpertLora& lora) { return lora.down; }, plain_hidden, args.seen.hidden, F,
                   args.kept.down_rows);

    pool_.split(down.panels, kPanelsAtOnce, [&](size_t begin, size_t end, unsigned) {
        alignas(64) PanelSums sums;
        for (size_t panel = begin; panel < end; panel += kPanelsAtOnce) {
            const size_t panels = std::min(kPanelsAtOnce, end - panel);
            const size_t row = panel * kPanel, num_rows = std::min(panels * kPanel, D - row);
            for (size_t t = 0; t < T; ++t)
                for (size_t r = 0; r < num_rows; ++r)
                    args.out[t * D + row + r] = args.residual ? args.residual[t * D + row + r] : 0.0f;
            for (const ExpertTile& at : tiles) {  // by expert, so that every token sums in the same order
                const Tile tile = hidden.values ? hidden.tile(at.first, at.m) : plain_hidden(at);
                dot_panels(k, down.of_stack(at.expert), panel, panels, tile, sums);
                if (at.lora && at.lora->down)
                    add_widened(k, at.lora->down->b.of_stack(at.expert), panel, panels, low_tile(at), sums);
                const float* bias = args.down_bias + at.expert * D + row;
                for (size_t t = 0; t < at.m; ++t) {
                    const Visits::Visit visit = visits.sorted[at.first + t];
                    const float weight = args.weights[visit.token * A + visit.slot];
                    float* out = args.out + visit.token * D + row;
                    for (size_t r = 0; r < num_rows; ++r)
                        out[r] += weight * (sums[r / kPanel][t * kPanel + r % kPanel] + bias[r]);
                }
            }
        }
    });
}

void Engine::swiglu_backward(const SwigluBackwardArgs& args) {
    std::lock_guard<std::mutex> lock(busy_);
    const Kernels& k = kernels();
    const size_t number = args.narrow ? sizeof(uint16_t) : sizeof(float), F = args.F;
    const size_t row = F * number, wide_row = ceil_div(F, kBlock) * 2 * kBlock * number;
    const auto* of_hidden = static_cast<const uint8_t*>(args.of_hidden);
    const auto* sums = static_cast<const uint8_t*>(args.sums);
    auto* of_sums = static_cast<uint8_t*>(args.of_sums);
    auto* hidden = static_cast<uint8_t*>(args.hidden);
    pool_.split(args.count, 8, [&](size_t first, size_t last, unsigned) {
        for (size_t i = first; i < last; ++i)
            args.of_weights[i] =
                k.swiglu_backward(of_hidden + i * row, sums + i * wide_row, F, args.weights[i], args.alpha, args.limit,
                                  of_sums + i * wide_row, hidden + i * row, args.narrow);
    });
}

size_t Engine::argmax(const float* logits, size_t V) {
    std::lock_guard<std::mutex> lock(busy_);
    return kernels().argmax(logits, V);
}

namespace {

// Integers that sort as the floats do; -0 counts as 0, NaN as anything.
int32_t sort_key(float x) {
    x += 0.0f;
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

// The largest key at which `measure` of all tokens with that key or more reaches `wanted`: 32 passes and no sorting.
template <class Measure>
int32_t find_key(const Measure& measure, double wanted) {
    int64_t low = INT32_MIN, high = int64_t{INT32_MAX} + 1;  // reaches it at `low`, or nowhere; not at `high`
    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        (measure(static_cast<int32_t>(middle)) >= wanted ? low : high) = middle;
    }
    return static_cast<int32_t>(low);
}

double count_from(const int32_t* keys, size_t V, int32_t key) {
    int32_t count = 0;
    for (size_t i = 0; i < V; ++i) count += keys[i] >= key;
    return count;
}

// `x` or 0, without a branch, which would be mispredicted half the time.
float if_so(bool so, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits &= 0u - static_cast<uint32_t>(so);
    std::memcpy(&x, &bits, sizeof bits);
    return x;
}

double mass_from(const int32_t* keys, const float* weights, size_t V, int32_t key) {
    double total = 0;
    for (size_t start = 0; start < V; start += 1024) {
        float lanes[16] = {};
        const size_t end = std::min(V, start + 1024), whole = start + (end - start) / 16 * 16;
        for (size_t i = start; i < whole; i += 16)
            for (size_t lane = 0; lane < 16; ++lane) lanes[lane] += if_so(keys[i + lane] >= key, weights[i + lane]);
        for (size_t i = whole; i < end; ++i) lanes[0] += keys[i] >= key ? weights[i] : 0.0f;
        for (float lane : lanes) total += lane;
    }
    return total;
}

// Keep what sorts above `key`, and of those that equal it the first ones, while `keep_equal(weight)` says so.
template <class KeepEqual>
void drop_below(float* weights, const int32_t* keys, size_t V, int32_t key, const KeepEqual& keep_equal) {
    for (size_t i = 0; i < V; ++i)
        if (keys[i] < key || (keys[i] == key && !keep_equal(weights[i]))) weights[i] = 0.0f;
}

}  // namespace

size_t Engine::sample(const float* logits, size_t V, float temperature, size_t top_k, double top_p, float min_p,
                      double uniform) {
    std::lock_guard<std::mutex> lock(busy_);
    const Kernels& k = kernels();
    constexpr size_t run = 256;  // tokens that are skipped at once when looking for the one to take
    const size_t runs = ceil_div(V, run);
    workspace_.reset(Workspace::size_of<float>(runs * run) + Workspace::size_of<float>(V) +
                     2 * Workspace::size_of<int32_t>(V));
    float* weights = workspace_.take<float>(runs * run);
    std::fill(weights + V, weights + runs * run, 0.0f);
    const size_t likeliest = k.argmax(logits, V);
    // A temperature so small that its inverse overflows takes the likeliest, as its limit does.
    const float factor = std::min(1.0f / temperature, 1e30f);
    k.exp_all(logits, V, logits[likeliest], factor, weights);
    auto mass = [&] {
        double total = 0;
        for (size_t r = 0; r < runs; ++r) total += k.sum_all(weights + r * run, run);
        return total;
    };

    int32_t* keys = workspace_.take<int32_t>(V);
    for (size_t i = 0; i < V; ++i) keys[i] = sort_key(logits[i]);
    if (top_k && top_k < V) {
        auto count = [&](int32_t key) { return count_from(keys, V, key); };
        const int32_t key = find_key(count, static_cast<double>(top_k));
        double room = static_cast<double>(top_k) - (key == INT32_MAX ? 0 : count(key + 1));
        drop_below(weights, keys, V, key, [&](float) { return room-- > 0; });
    }
    if (top_p < 1) {
        const double total = mass(), wanted = top_p * total;
        // Tokens so light that all V of them would weigh less than what may be missing are none of those that are kept;
        // few are left to search. Half of that, so that rounding does not matter.
        const float light = static_cast<float>((1 - top_p) * total / static_cast<double>(V) / 2);
        float* heavy_weights = workspace_.take<float>(V);
        int32_t* heavy_keys = workspace_.take<int32_t>(V);
        size_t heavy = 0;
        for (size_t i = 0; i < V; ++i) {
            heavy_weights[heavy] = weights[i];
            heavy_keys[heavy] = keys[i];
            heavy += weights[i] >= light;
        }
        auto reached = [&](int32_t key) { return mass_from(heavy_keys, heavy_weights, heavy, key); };
        const int32_t key = find_key(reached, wanted);
        double missing = wanted - (key == INT32_MAX ? 0 : reached(key + 1));
        drop_below(weights, keys, V, key, [&](float weight) {
            const bool keep = missing > 0;
            missing -= weight;
            return keep;
        });
    }
    if (min_p > 0)
        for (size_t i = 0; i < V; ++i)
            if (weights[i] < min_p) weights[i] = 0.0f;
    weights[likeliest] = 1.0f;

    const double target = uniform * mass();
    double passed = 0;
    size_t taken = likeliest;
    for (size_t r = 0; r < runs; ++r) {
        const double next = passed + k.sum_all(weights + r * run, run);
        if (next <= target) {
            passed = next;
            continue;
        }
        for (size_t i = r * run; i < std::min(V, (r + 1) * run); ++i) {
            if (weights[i] == 0.0f) continue;
            taken = i;
            passed += weights[i];
            if (passed > target) break;
        }
        break;
    }
    return taken;
}

double Engine::read_gigabytes(const uint8_t* data, size_t bytes, double* checksum) {
    std::lock_guard<std::mutex> lock(busy_);
    const Kernels& k = kernels();
    const size_t piece = size_t{1} << 20, count = bytes / piece;
    std::vector<uint64_t> sums(threads() * 8, 0);
    const auto start = std::chrono::steady_clock::now();
    pool_.split(count, 4, [&](size_t first, size_t last, unsigned thread) {
        sums[thread * 8] += k.read(data + first * piece, (last - first) * piece);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    *checksum = 0;
    for (uint64_t sum : sums) *checksum += static_cast<double>(sum);
    return static_cast<double>(count * piece) / seconds.count() / 1e9;
}

double Engine::dot_rate(size_t rounds) {
    std::lock_guard<std::mutex> lock(busy_);
    const Kernels& k = kernels();
    std::vector<double> done(threads() * 8, 0);
    const auto start = std::chrono::steady_clock::now();
    pool_.split(threads() * 8, 1, [&](size_t first, size_t last, unsigned thread) {
        for (size_t i = first; i < last; ++i) done[thread * 8] += k.spin_dots(rounds / 8);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    double total = 0;
    for (double one : done) total += one;
    return total / seconds.count();
}

}  // namespace freehold
