// What one thread does with a segment and a key head: tiles of rows, their scores, what they read, and all gradients.
#pragma once
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "segments.h"

namespace dti {

#ifndef DTI_TILE_ROWS  // tests try other sizes
#define DTI_TILE_ROWS 48
#endif
constexpr int TILE_ROWS = DTI_TILE_ROWS;  // times query heads of the group, of a tile
constexpr int CHUNK = 64;  // keys that a tile meets at a time: rows of values and their gradients stay in the L1 cache
template <class F> constexpr F HIDDEN = -std::numeric_limits<F>::infinity();  // score of a key that a row does not see

// One thread's memory and everything that it does with a segment and a key head.
template <class F> class Worker {
  public:
    // `not_finite` is set where rows may meet keys that they do not see, of which one or the other is not finite: results hold anything then.
    Worker(const Arguments& arguments, bool with_gradients, std::atomic<bool>& not_finite)
        : x(arguments), backward(with_gradients), not_finite(not_finite), per_group(arguments.num_heads / arguments.num_groups),
          depth(padded_depth<F>(arguments)), scale(F(arguments.scale)) {}

    // `slopes`: where the (H,) gradients of slopes are added to; null where nobody asks.
    void run(const Segment& segment, Index key_head, double* slopes) {
        if (not_finite && !x.is_cleared) return;
        s = &segment, g = key_head, slope_gradients = s->sums ? slopes : nullptr;
        two_streams = s->sums && x.k_initial;
        pack();
        for (Index row = s->first; row < s->stop; row += num_tokens) {
            begin_tile(row, tile_stop(row));
            probabilities();
            backward ? finish_with_gradients() : finish_with_output();
        }
    }

  private:
    static_assert(CHUNK % NR<F> == 0, "chunks are whole panels");

    // Keys and values of a segment: rows (keys x depth), panels (keys / NR x depth x NR).
    struct Stream {
        std::vector<F> key_panels, value_panels, key_rows, value_rows;
        F *d_keys, *d_values;
    };
    // Up to MR rows of a tile, and the columns that any of them sees: as a prefix, and as a span.
    struct Block {
        Index first;
        int count;
        Range columns[2];
    };

    const Arguments& x;
    const bool backward;
    std::atomic<bool>& not_finite;
    V<F> zeros = {};  // sums of 0 times what is packed: NaN where that is not finite
    const Index per_group, depth;
    const F scale;
    const Segment* s = nullptr;
    Index g = 0;
    double* slope_gradients = nullptr;
    bool two_streams = false;
    Stream current, initial;

    // A tile: rows (i, head of the group), i from `tile_first`. Its columns are whole panels: those of a prefix, then those of the span.
    Index tile_first = 0, num_tokens = 0, num_rows = 0, num_columns = 0, prefix_columns = 0;
    Index prefix_key = 0, span_key = 0;  // local keys of column 0 and of column `prefix_columns`
    std::vector<Range> seen;  // two per row of the layout, in columns
    std::vector<Block> blocks;
    std::vector<double> mean_distance;
    std::vector<F> q, d_out, d_q, scores, scores_initial, ratio, own_p, inverse, delta, d_s, d_s_initial, p_chunk_initial;

    static F* sized(std::vector<F>& memory, Index size) {
        if (Index(memory.size()) < size) memory.resize(size);
        return memory.data();
    }
    const F* row_of(const void* tensor, Index row) const {
        return static_cast<const F*>(tensor) + (row * x.num_groups + g) * x.head_dim;
    }
    Index query_at(Index row, Index r) const { return ((row - x.num_skipped) * x.num_heads + g * per_group + r) * x.head_dim; }
    const F* query_row(const void* tensor, Index row, Index r) const { return static_cast<const F*>(tensor) + query_at(row, r); }
    F dot(const F* a, const F* b) const {
        V<F> sums = {};
        Index d = 0;
        for (; d + LANES<F> <= x.head_dim; d += LANES<F>) sums += load(a + d) * load(b + d);
        F sum = sum_of<F>(sums);
        for (; d < x.head_dim; d++) sum += a[d] * b[d];
        return sum;
    }

    void pack() {
        const void* keys = s->sums && x.k_sum ? x.k_sum : x.k;
        zeros = V<F>{};
        pack_stream(current, keys, x.v);
        if (two_streams) pack_stream(initial, x.k_initial, x.v_initial);
        if (sum_of<F>(zeros) != 0) not_finite = true;
        if (!backward) return;
        const Index size = s->num_keys * depth;
        F* gradients = static_cast<F*>(x.key_gradients) + s->gradients + g * 2 * num_streams(x, s->sums) * size;
        std::memset(gradients, 0, 2 * num_streams(x, s->sums) * size * sizeof(F));
        current.d_keys = gradients, current.d_values = gradients + size;
        initial.d_keys = gradients + 2 * size, initial.d_values = gradients + 3 * size;
    }

    void pack_stream(Stream& stream, const void* keys, const void* values) {
        pack_panels(stream.key_panels, keys);
        if (backward) pack_panels(stream.value_panels, values), pack_rows(stream.key_rows, keys);
        else pack_rows(stream.value_rows, values);
    }

    // The row of a local key in a tensor, null where padding has no key. Fetches one a little farther on: heads lie apart, which hides
    // from the processor what is read next.
    const F* key_row(const void* tensor, Index key) const {
        const bool in_span = key >= s->span_first;
        const Index of = in_span ? s->span.first + key - s->span_first : s->prefix.first + key;
        if (of >= (in_span ? s->span.stop : s->prefix.stop)) return nullptr;
        const F* row = row_of(tensor, of);
        for (Index d = 0; d < x.head_dim; d += 64 / Index(sizeof(F)))
            __builtin_prefetch(row + 12 * x.num_groups * x.head_dim + d);
        return row;
    }

    void pack_rows(std::vector<F>& memory, const void* tensor) {
        F* to = sized(memory, s->num_keys * depth);
        V<F> sums = {};  // of its own: a member would be written at every step
        for (Index key = 0; key < s->num_keys; key++) {
            copy_padded(to + key * depth, key_row(tensor, key));
            sums += zeros_of(to + key * depth, depth);
        }
        zeros += sums;
    }

    // 0 times `count` numbers, added up.
    static V<F> zeros_of(const F* row, Index count) {
        V<F> sums = {};
        Index d = 0;
        for (; d + LANES<F> <= count; d += LANES<F>) sums += load(row + d) * F(0);
        for (; d < count; d++) sums[0] += row[d] * F(0);
        return sums;
    }

    void copy_padded(F* to, const F* row) const {
        const Index filled = row ? x.head_dim : 0;
        if (row) std::memcpy(to, row, filled * sizeof(F));
        std::fill(to + filled, to + depth, F(0));
    }

    void pack_panels(std::vector<F>& memory, const void* tensor) {
        F* to = sized(memory, s->num_keys * depth);
        V<F> sums = {};
        for (Index key = 0; key < s->num_keys; key++) {
            const F* row = key_row(tensor, key);
            const Index filled = row ? x.head_dim : 0;
            sums += zeros_of(row, filled);
            F* panel = to + key / NR<F> * NR<F> * depth + key % NR<F>;
            for (Index d = 0; d < filled; d++) panel[d * NR<F>] = row[d];
            for (Index d = filled; d < depth; d++) panel[d * NR<F>] = F(0);
        }
        zeros += sums;
    }

    // Few [SUM] rows where they lie far apart: a tile has a column for every key between them.
    Index tile_stop(Index first) const {
        const Index most = min(s->stop, first + max<Index>(1, TILE_ROWS / per_group));
        const Range own = Row{x, first}.span();
        Index stop = first + 1;
        while (stop < most && Row{x, stop}.span().stop - own.first <= 2 * own.size() + 512) stop++;
        return stop;
    }

    void begin_tile(Index first, Index stop) {
        tile_first = first, num_tokens = stop - first, num_rows = num_tokens * per_group;
        seen.resize(2 * num_tokens);
        Range keys[2];
        for (Index i = 0; i < num_tokens; i++) {
            const Row row{x, first + i};
            seen[2 * i] = s->local(row.prefix()), seen[2 * i + 1] = s->local(row.span());
            for (int part = 0; part < 2; part++) keys[part] = hull(keys[part], seen[2 * i + part]);
        }
        Range prefix = panels_of(keys[0], NR<F>), span = panels_of(keys[1], NR<F>);
        if (!prefix.empty() && prefix.stop >= span.first) span = hull(prefix, span), prefix = {0, 0};
        prefix_columns = prefix.size() * NR<F>, num_columns = prefix_columns + span.size() * NR<F>;
        prefix_key = prefix.first * NR<F>, span_key = span.first * NR<F>;
        for (Range& range : seen) {
            const bool in_span = range.first >= span_key;
            const Index shift = in_span ? prefix_columns - span_key : -prefix_key;
            range = range.empty() ? Range{0, 0} : Range{range.first + shift, range.stop + shift};
        }
        make_blocks();
        F* to = sized(q, num_rows * depth);
        for (Index t = 0; t < num_rows; t++)
            copy_padded(to + t * depth, query_row(x.q, tile_first + t / per_group, t % per_group));
    }

    // Rows join a block while it computes at most twice what they would compute apart.
    void make_blocks() {
        blocks.clear();
        Index apart = 0;
        for (Index t = 0; t < num_rows; t++) {
            const Range* own = &seen[t / per_group * 2];
            const Index own_size = own[0].size() + own[1].size();
            if (!blocks.empty() && blocks.back().count < MR) {
                Block& block = blocks.back();
                const Range prefix = hull(block.columns[0], own[0]), span = hull(block.columns[1], own[1]);
                if ((prefix.size() + span.size()) * (block.count + 1) <= 2 * (apart + own_size)) {
                    block.columns[0] = prefix, block.columns[1] = span, block.count++, apart += own_size;
                    continue;
                }
            }
            blocks.push_back({t, 1, {own[0], own[1]}});
            apart = own_size;
        }
        for (Block& block : blocks) {
            Range* c = block.columns;
            if (!c[0].empty() && !c[1].empty() && panels_of(c[0], NR<F>).stop > panels_of(c[1], NR<F>).first &&
                panels_of(c[1], NR<F>).stop > panels_of(c[0], NR<F>).first)
                c[1] = hull(c[0], c[1]), c[0] = {0, 0};
        }
    }

    Index key_of_column(Index column) const {
        return column < prefix_columns ? prefix_key + column : span_key + column - prefix_columns;
    }

    // Chunks of columns whose keys lie side by side.
    template <class Body> void for_chunks(Body body) const {
        for (const Range part : {Range{0, prefix_columns}, Range{prefix_columns, num_columns}})
            for (Index column = part.first; column < part.stop; column += CHUNK)
                body(Range{column, min<Index>(column + CHUNK, part.stop)});
    }

    // to (rows x columns of the chunk, from the chunk's first) = a (rows x depth) . panels, in the panels that a block sees.
    void multiply(const F* a, const std::vector<F>& panels, Range chunk, F* to, Index ld) const {
        for (Index column = chunk.first; column < chunk.stop; column += NR<F>) {
            const F* panel = panels.data() + key_of_column(column) * depth;
            for (const Block& block : blocks)
                if (sees(block, column))
                    with_rows(block.count, [&](auto m) {
                        scores_block<F, m()>(a + block.first * depth, depth, panel, depth,
                                             to + block.first * ld + column - chunk.first, ld);
                    });
        }
    }

    static bool sees(const Block& block, Index panel_column) {
        for (const Range& range : block.columns)
            if (range.first < panel_column + NR<F> && panel_column < range.stop) return true;
        return false;
    }

    // The whole panels of a block's columns.
    template <class Body> void for_panels(const Block& block, Range chunk, Body body) const {
        for (const Range& range : block.columns) {
            const Range panels = panels_of(range, NR<F>);
            const Range columns = common({panels.first * NR<F>, panels.stop * NR<F>}, chunk);
            if (!columns.empty()) body(columns);
        }
    }

    // Rows of the tile, and the columns of the chunk that their block computes.
    template <class Body> void for_rows(Range chunk, Body body) const {
        for (const Block& block : blocks)
            for_panels(block, chunk, [&](Range columns) {
                for (Index t = block.first; t < block.first + block.count; t++) body(t, columns);
            });
    }

    const F* ratio_of(Index t) const { return ratio.data() + t / per_group * num_columns; }

    // Scores of the tile's rows and their powers e^(score - shift), zeros where a row does not see a key of its block's panels:
    // `scores` and `own_p` times the row's `inverse` are the softmax.
    void probabilities() {
        const Index ld = num_columns;
        F* p = sized(scores, num_rows * ld);
        const Range columns{0, num_columns};
        for_chunks([&](Range chunk) { multiply(q.data(), current.key_panels, chunk, p + chunk.first, ld); });
        if (two_streams) {
            F* p_initial = sized(scores_initial, num_rows * ld);
            for_chunks([&](Range chunk) { multiply(q.data(), initial.key_panels, chunk, p_initial + chunk.first, ld); });
            fill_ratios();
            for_rows(columns, [&](Index t, Range of_row) { blend(p + t * ld, p_initial + t * ld, ratio_of(t), of_row); });
        }
        sized(own_p, num_rows), sized(inverse, num_rows);
        for (const Block& block : blocks)
            for (Index t = block.first; t < block.first + block.count; t++) softmax_row(block, t, p + t * ld);
    }

    void fill_ratios() {
        F* to = sized(ratio, num_tokens * num_columns);
        std::memset(to, 0, num_tokens * num_columns * sizeof(F));
        const F* table = static_cast<const F*>(x.ratios);
        const int32_t* ids = x.rows + RESET_ID * x.num_rows;
        for (Index i = 0; i < num_tokens; i++)
            for (const Range& range : {seen[2 * i], seen[2 * i + 1]})
                for (Index column = range.first; column < range.stop; column++) {
                    const Index distance = ids[tile_first + i] - ids[global_key(column)];
                    to[i * num_columns + column] = table[min(max<Index>(distance, 0), x.num_ratios - 1)];
                }
    }

    Index global_key(Index column) const {
        const Index key = key_of_column(column);
        return key < s->span_first ? s->prefix.first + key : s->span.first + key - s->span_first;
    }

    // a += ratio (b - a)
    static void blend(F* a, const F* b, const F* ratio, Range range) {
        for (Index c = range.first; c < range.stop; c += LANES<F>)
            store(a + c, load(a + c) + load(ratio + c) * (load(b + c) - load(a + c)));
    }

    // Tokens from a [SUM] back to a key; a prefix key outside the span sits right before it.
    template <class Body> void for_distances(Index i, Body body) const {
        const Row row{x, tile_first + i};
        const Range span = row.span();
        for (int part = 0; part < 2; part++) {
            const Range range = seen[2 * i + part];
            const Index first = part ? span.size() : span.size() + row.prefix().size();
            if (!range.empty()) body(range, first);  // distances first, first - 1, ...
        }
    }

    void softmax_row(const Block& block, Index t, F* p) {
        const Index i = t / per_group, r = t % per_group, row = tile_first + i;
        const Range columns{0, num_columns};
        // What is left to scale scores by: 1 where ALiBi had to be subtracted from the scaled score.
        F factor = scale;
        if (s->sums && x.slopes) {
            factor = 1;
            const F slope = static_cast<const F*>(x.slopes)[g * per_group + r];
            for_distances(i, [&](Range range, Index distance) {
                const F farthest = F(distance);  // and 32-bit counters, which processors convert by the vector
                for (int c = 0; c < int(range.size()); c++)
                    p[range.first + c] = p[range.first + c] * scale - slope * (farthest - F(c));
            });
        }
        F own = HIDDEN<F>;
        if (s->sums) own = scale * dot(query_row(x.q, row, r), row_of(x.k_sum ? x.k_sum : x.k, row));
        for_panels(block, columns, [&](Range range) { hide(p, range, &seen[2 * i]); });
        F& lse = static_cast<F*>(x.lse)[(g * per_group + r) * (x.num_rows - x.num_skipped) + row - x.num_skipped];
        // The backward knows a shift that no power is large with; it is rounded, so the sum of powers is only about 1.
        const F most = backward ? lse : max(own, largest(block, p) * factor);
        if (backward && !std::isfinite(lse)) not_finite = true;
        V<F> sum_of_keys = {};
        const V<F> times = all(factor), minus = all(-most), threshold = all(HIDDEN<F>);
        for_panels(block, columns, [&](Range range) {
            for (Index c = range.first; c < range.stop; c += NR<F>) {
                const V<F> scores_c[2] = {load(p + c), load(p + c + LANES<F>)};
                V<F> powers[2] = {scores_c[0] * times + minus, scores_c[1] * times + minus};
                exp_of(powers);
                for (int n = 0; n < 2; n++) powers[n] = scores_c[n] <= threshold ? V<F>{} : powers[n];
                for (int n = 0; n < 2; n++) store(p + c + n * LANES<F>, powers[n]);
                sum_of_keys += powers[0] + powers[1];
            }
        });
        V<F> own_powers[1] = {all(own - most)};
        if (s->sums) exp_of(own_powers);
        const F own_power = s->sums ? own_powers[0][0] : F(0);
        const F sum = sum_of<F>(sum_of_keys) + own_power;
        own_p[t] = own_power, inverse[t] = F(1) / sum;
        if (!backward) lse = most + std::log(sum);
    }

    F largest(const Block& block, const F* p) const {
        V<F> most = all(HIDDEN<F>);
        for_panels(block, {0, num_columns}, [&](Range range) {
            for (Index c = range.first; c < range.stop; c += LANES<F>) {
                const V<F> value = load(p + c);
                most = value > most ? value : most;
            }
        });
        return max_of<F>(most);
    }

    // Columns of a range that are not visible; `visible`: a row's prefix and span, in this order or empty.
    static void hide(F* p, Range range, const Range* visible) {
        Index first = range.first;
        for (int part = 0; part < 2; part++) {
            const Range seen_here = common(visible[part], range);
            if (seen_here.empty()) continue;
            std::fill(p + first, p + seen_here.first, HIDDEN<F>);
            first = seen_here.stop;
        }
        std::fill(p + first, p + range.stop, HIDDEN<F>);
    }

    void finish_with_output() {
        const Index ld = num_columns;
        F* o = sized(d_q, num_rows * depth);
        std::memset(o, 0, num_rows * depth * sizeof(F));
        F* p = scores.data();
        if (two_streams) {
            F* p_initial = scores_initial.data();
            for_rows({0, num_columns},
                     [&](Index t, Range of_row) { split(p + t * ld, p_initial + t * ld, ratio_of(t), of_row); });
        }
        for_chunks([&](Range chunk) {
            times_rows(p + chunk.first, ld, current.value_rows, chunk, o);
            if (two_streams) times_rows(scores_initial.data() + chunk.first, ld, initial.value_rows, chunk, o);
        });
        for (Index t = 0; t < num_rows; t++) {
            const Index row = tile_first + t / per_group, r = t % per_group;
            F* to = static_cast<F*>(x.out) + query_at(row, r);
            const F* v_own = row_of(x.v, row);
            for (Index d = 0; d < x.head_dim; d++) {
                const F read = s->sums ? o[t * depth + d] + own_p[t] * v_own[d] : o[t * depth + d];
                to[d] = read * inverse[t];
            }
        }
    }

    // b = ratio a, a -= b
    static void split(F* a, F* b, const F* ratio, Range range) {
        for (Index c = range.first; c < range.stop; c += LANES<F>) {
            const V<F> part = load(a + c) * load(ratio + c);
            store(b + c, part);
            store(a + c, load(a + c) - part);
        }
    }

    // to (rows x depth) += p (rows x columns of the chunk) . rows of its keys
    void times_rows(const F* p, Index ld, const std::vector<F>& rows, Range chunk, F* to) const {
        for (const Block& block : blocks)
            for (const Range& range : block.columns) {
                const Range columns = common(range, chunk);
                if (!columns.empty())
                    accumulate<F, false>(block.count, p + block.first * ld + columns.first - chunk.first, ld,
                                         rows.data() + key_of_column(columns.first) * depth, columns.size(),
                                         to + block.first * depth, depth);
            }
    }

    // to (keys x depth, from the chunk's first) += p^T (columns of the chunk x rows) . a (rows x depth), panel by panel: only where a
    // block has computed a panel does `p` hold anything.
    void times_columns(const F* p, Index ld, const F* a, Range chunk, F* to) const {
        for (Index panel = chunk.first; panel < chunk.stop; panel += NR<F>)
            for_rows_that_see(panel, [&](Range rows) {
                for (Index column = panel; column < panel + NR<F>; column += MR)
                    accumulate<F, true>(int(min<Index>(MR, panel + NR<F> - column)), p + rows.first * ld + column - chunk.first, ld,
                                        a + rows.first * depth, rows.size(), to + (column - chunk.first) * depth, depth);
            });
    }

    // Rows of neighbouring blocks that see a panel: nearly always one range of them.
    template <class Body> void for_rows_that_see(Index panel_column, Body body) const {
        Range rows;
        for (const Block& block : blocks) {
            if (sees(block, panel_column)) {
                rows = hull(rows, {block.first, block.first + block.count});
            } else if (!rows.empty()) {
                body(rows);
                rows = {};
            }
        }
        if (!rows.empty()) body(rows);
    }

    void finish_with_gradients() {
        read_output_gradients();
        if (slope_gradients) read_mean_distances();
        F* dq = sized(d_q, num_rows * depth);
        std::memset(dq, 0, num_rows * depth * sizeof(F));
        for_chunks([&](Range chunk) {
            score_gradients(chunk);
            const F *p = scores.data() + chunk.first, *ds = d_s.data();
            const Index first_key = key_of_column(chunk.first) * depth;
            times_columns(p, num_columns, d_out.data(), chunk, current.d_values + first_key);
            times_columns(ds, CHUNK, q.data(), chunk, current.d_keys + first_key);
            times_rows(ds, CHUNK, current.key_rows, chunk, dq);
            if (two_streams) {
                times_columns(p_chunk_initial.data(), CHUNK, d_out.data(), chunk, initial.d_values + first_key);
                times_columns(d_s_initial.data(), CHUNK, q.data(), chunk, initial.d_keys + first_key);
                times_rows(d_s_initial.data(), CHUNK, initial.key_rows, chunk, dq);
            }
        });
        if (s->sums) own_key_gradients(dq);
        for (Index t = 0; t < num_rows; t++) {
            F* to = static_cast<F*>(x.dq) + query_at(tile_first + t / per_group, t % per_group);
            for (Index d = 0; d < x.head_dim; d++) to[d] = dq[t * depth + d] * scale;
        }
    }

    // `d_s` (rows x CHUNK): gradients of a chunk's scores, in the panels that blocks see. With two streams, what belongs to the initial states
    // moves from `scores` and `d_s` to `p_chunk_initial` and `d_s_initial`.
    void score_gradients(Range chunk) {
        F *p = scores.data() + chunk.first, *ds = sized(d_s, num_rows * CHUNK);
        multiply(d_out.data(), current.value_panels, chunk, ds, CHUNK);
        F *ds_initial = nullptr, *p_initial = nullptr;
        if (two_streams) {
            ds_initial = sized(d_s_initial, num_rows * CHUNK), p_initial = sized(p_chunk_initial, num_rows * CHUNK);
            multiply(d_out.data(), initial.value_panels, chunk, ds_initial, CHUNK);
        }
        for_rows(chunk, [&](Index t, Range columns) {
            const Range local{columns.first - chunk.first, columns.stop - chunk.first};
            const F* p_t = p + t * num_columns;
            F* ds_t = ds + t * CHUNK;
            if (two_streams) blend(ds_t, ds_initial + t * CHUNK, ratio_of(t) + chunk.first, local);
            for (Index c = local.first; c < local.stop; c += LANES<F>) {
                const V<F> p_c = load(p_t + c);
                store(ds_t + c, p_c == V<F>{} ? p_c : p_c * (load(ds_t + c) - all(delta[t])));  // 0 also where d_out . v overflows
            }
        });
        if (slope_gradients) add_slope_gradients(ds, chunk);
        if (two_streams)
            for_rows(chunk, [&](Index t, Range columns) {
                const Range local{columns.first - chunk.first, columns.stop - chunk.first};
                split(p + t * num_columns, p_initial + t * CHUNK, ratio_of(t) + chunk.first, local);
                split(ds + t * CHUNK, ds_initial + t * CHUNK, ratio_of(t) + chunk.first, local);
            });
    }

    // `d_out`, and `delta`: what the gradients of a row's probabilities have in common. Both times `inverse`, once and for all.
    void read_output_gradients() {
        F* to = sized(d_out, num_rows * depth);
        sized(delta, num_rows);
        for (Index t = 0; t < num_rows; t++) {
            const Index row = tile_first + t / per_group, r = t % per_group;
            copy_padded(to + t * depth, query_row(x.grad_out, row, r));
            for (Index d = 0; d < x.head_dim; d++) to[t * depth + d] *= inverse[t];
            delta[t] = dot(to + t * depth, query_row(x.out, row, r));
            if (!std::isfinite(delta[t])) not_finite = true;
        }
    }

    // A slope's gradient is -sum ds distance over all keys, its own at 0. Since ds sum to 0, distances may count from anywhere; from
    // their mean, what is rounded in `delta` cancels.
    void add_slope_gradients(const F* ds, Range chunk) {
        for (Index t = 0; t < num_rows; t++) {
            double sum = 0;  // terms of both signs that nearly cancel
            for_distances(t / per_group, [&](Range range, Index distance) {
                const Range columns = common(range, chunk);
                for (Index c = columns.first; c < columns.stop; c++)
                    sum += double(ds[t * CHUNK + c - chunk.first]) * (double(distance - (c - range.first)) - mean_distance[t]);
            });
            slope_gradients[g * per_group + t % per_group] -= sum;
        }
    }

    void read_mean_distances() {
        mean_distance.assign(num_rows, 0);
        for (Index t = 0; t < num_rows; t++)
            for_distances(t / per_group, [&](Range range, Index distance) {
                const F* p = scores.data() + t * num_columns;
                for (Index c = range.first; c < range.stop; c++)
                    mean_distance[t] += double(p[c]) * double(distance - (c - range.first)) * double(inverse[t]);
            });
    }

    // Gradients through a [SUM]'s own key; nobody else writes those rows.
    void own_key_gradients(F* dq) {
        const void* keys = x.k_sum ? x.k_sum : x.k;
        void* d_keys = x.k_sum ? x.dk_sum : x.dk;
        for (Index i = 0; i < num_tokens; i++) {
            const Index row = tile_first + i;
            const F *k_own = row_of(keys, row), *v_own = row_of(x.v, row);
            F *dk = const_cast<F*>(row_of(d_keys, row)), *dv = const_cast<F*>(row_of(x.dv, row));
            std::fill(dk, dk + x.head_dim, F(0)), std::fill(dv, dv + x.head_dim, F(0));
            for (Index r = 0; r < per_group; r++) {
                const Index t = i * per_group + r;
                const F *d_o = d_out.data() + t * depth, *q_t = q.data() + t * depth;
                const F ds = own_p[t] * (dot(d_o, v_own) - delta[t]);
                if (slope_gradients) slope_gradients[g * per_group + r] += double(ds) * mean_distance[t];
                for (Index d = 0; d < x.head_dim; d++) {
                    dq[t * depth + d] += ds * k_own[d];
                    dk[d] += ds * q_t[d] * scale;
                    dv[d] += own_p[t] * d_o[d];
                }
            }
        }
    }
};

}  // namespace dti
