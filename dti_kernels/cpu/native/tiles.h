// One thread's copy of a segment's keys, and tiles of its rows: which columns each row sees, and loops over them.
#pragma once
#include <atomic>
#include <cstring>

#include "matrix_tiles.h"
#include "segments.h"

namespace dti {

#ifndef DTI_TILE_ROWS  // tests try other sizes
#define DTI_TILE_ROWS 48
#endif
constexpr int TILE_ROWS = DTI_TILE_ROWS;  // times query heads of the group, of a tile
#ifndef DTI_MATRIX_TILE_ROWS
#define DTI_MATRIX_TILE_ROWS 64
#endif
constexpr int MATRIX_TILE_ROWS = DTI_MATRIX_TILE_ROWS;  // the same where products are of matrix tiles
constexpr int CHUNK = 64;  // keys that a tile meets at a time: rows of values and their gradients stay in the L1 cache

template <class S> class Tiles {
  protected:
    using F = Sum<S>;
    static constexpr int PER = PER_STEP<S>;
    static_assert(CHUNK % NR<F> == 0 && NR<F> % PER == 0, "chunks are whole panels, and panels whole steps");

    // Rows (rows x depth) as products take them: steps along the depth, the numbers themselves, or steps along the rows (rows / PER x depth).
    struct Factor {
        std::vector<S> numbers;
        std::vector<Step<S>> pairs;  // of rows; empty where a step is a number

        const Step<S>* along_depth() const { return reinterpret_cast<const Step<S>*>(numbers.data()); }
        const Step<S>* along_rows() const {
            if constexpr (PER == 1) return numbers.data();
            else return pairs.data();
        }
    };
    // Keys and values of a segment, in steps: panels (keys / NR x depth x NR), those of values for the backward, along the depth; rows
    // (keys x depth) of values in the forward, of keys in the backward, along the keys.
    struct Stream {
        std::vector<Step<S>> key_panels, value_panels, rows;
        F *d_keys, *d_values;
    };
    // Up to `block_rows` rows of a tile, and the columns that any of them sees: as a prefix, and as a span.
    struct Block {
        Index first;
        int count;
        Range columns[2];
    };

    const Arguments& x;
    const bool backward;
    std::atomic<bool>& not_finite;
    const Index per_group, depth, steps;  // head_dim in whole vectors, in numbers and in steps
    const bool tiled;  // products are of matrix tiles
    const int block_rows, tile_rows;
    const Segment* s = nullptr;
    Index g = 0;  // key head
    bool two_streams = false;
    Stream current, initial;
    std::vector<S> padded;  // a panel's rows
    V<F> zeros = {};  // sums of 0 times what is packed: NaN where that is not finite

    // A tile: rows (i, head of the group), i from `tile_first`. Its columns are whole panels: those of a prefix, then those of the span.
    Index tile_first = 0, num_tokens = 0, num_rows = 0, num_columns = 0, prefix_columns = 0;
    Index prefix_key = 0, span_key = 0;  // local keys of column 0 and of column `prefix_columns`
    std::vector<Range> seen;  // two per row of the layout, in columns
    std::vector<Block> blocks;
    Factor q;

    Tiles(const Arguments& arguments, bool with_gradients, std::atomic<bool>& not_finite)
        : x(arguments), backward(with_gradients), not_finite(not_finite), per_group(arguments.num_heads / arguments.num_groups),
          depth(padded_depth<F>(arguments)), steps(depth / PER), tiled(TILED<S> && steps % TILE == 0 && has_tiles()),
          block_rows(tiled ? TILE : MR), tile_rows(tiled ? MATRIX_TILE_ROWS : TILE_ROWS) {}

    template <class T> static T* sized(std::vector<T>& memory, Index size) {
        if (Index(memory.size()) < size) memory.resize(size);
        return memory.data();
    }
    const S* row_of(const void* tensor, Index row) const {
        return static_cast<const S*>(tensor) + (row * x.num_groups + g) * x.head_dim;
    }
    Index query_at(Index row, Index r) const { return ((row - x.num_skipped) * x.num_heads + g * per_group + r) * x.head_dim; }
    const S* query_row(const void* tensor, Index row, Index r) const { return static_cast<const S*>(tensor) + query_at(row, r); }
    // Keys that [SUM] rows read of themselves.
    const void* own_keys() const { return x.k_sum ? x.k_sum : x.k; }

    void pack(const Segment& segment, Index key_head) {
        s = &segment;
        g = key_head;
        two_streams = s->sums && x.k_initial;
        zeros = V<F>{};
        pack_stream(current, s->sums ? own_keys() : x.k, x.v);
        if (two_streams) pack_stream(initial, x.k_initial, x.v_initial);
        if (sum_of<F>(zeros) != 0) not_finite = true;
        if (!backward) return;
        const Index size = s->num_keys * depth, all_sizes = 2 * num_streams(x, s->sums) * size;
        F* gradients = static_cast<F*>(x.key_gradients) + s->gradients + g * all_sizes;
        std::memset(gradients, 0, all_sizes * sizeof(F));
        for (Stream* stream : {&current, &initial}) {  // without a second stream nobody reads its pointers
            stream->d_keys = gradients;
            stream->d_values = gradients + size;
            gradients += 2 * size;
        }
    }

    void pack_stream(Stream& stream, const void* keys, const void* values) {
        pack_keys(keys, &stream.key_panels, backward ? &stream.rows : nullptr);
        pack_keys(values, backward ? &stream.value_panels : nullptr, backward ? nullptr : &stream.rows);
    }

    // A tensor's rows in the layouts that are not null, panel by panel. They count for `zeros`.
    void pack_keys(const void* tensor, std::vector<Step<S>>* panels, std::vector<Step<S>>* rows) {
        Step<S>* to_panels = panels ? sized(*panels, s->num_keys * steps) : nullptr;
        Step<S>* to_rows = rows ? sized(*rows, s->num_keys * steps) : nullptr;
        S* panel = sized(padded, NR<F> * depth);
        V<F> sums = {};  // of its own: a member would be written at every step
        for (Index key = 0; key < s->num_keys; key += NR<F>) {
            for (Index i = 0; i < NR<F>; i++) copy_padded(panel + i * depth, key_row(tensor, key + i));
            for (Index i = 0; i < NR<F> * depth; i += LANES<F>) sums += load(panel + i) * F(0);
            if (panels) transpose_panel(reinterpret_cast<const Step<S>*>(panel), to_panels + key * steps);
            if (!rows) continue;
            for (Index i = 0; i < NR<F>; i += PER) pair_rows(panel + i * depth, panel + (i + PER - 1) * depth, to_rows + (key + i) * steps);
        }
        zeros += sums;
    }

    void transpose_panel(const Step<S>* from, Step<S>* to) const {
        Index d = 0;
        for (; d + LANES<Step<S>> <= steps; d += LANES<Step<S>>)
            for (Index i = 0; i < NR<F>; i += LANES<F>) transpose(from + i * steps + d, steps, to + d * NR<F> + i, NR<F>);
        for (; d < steps; d++)
            for (Index i = 0; i < NR<F>; i++) to[d * NR<F> + i] = from[i * steps + d];
    }

    // The row of a local key in a tensor, null where padding has no key. Prefetches the row 12 keys ahead: rows of one head are strided,
    // which defeats the hardware prefetcher.
    const S* key_row(const void* tensor, Index key) const {
        const Index of = s->global(key);
        if (of >= (key >= s->span_first ? s->span.stop : s->prefix.stop)) return nullptr;
        const S* row = row_of(tensor, of);
        for (Index d = 0; d < x.head_dim; d += 64 / Index(sizeof(S)))
            __builtin_prefetch(row + 12 * x.num_groups * x.head_dim + d);
        return row;
    }

    void copy_padded(S* to, const S* row) const {
        if (row && x.head_dim == depth) {  // whole vectors, without a call
            for (Index d = 0; d < depth; d += LANES<F>) std::memcpy(to + d, row + d, LANES<F> * sizeof(S));
            return;
        }
        const Index filled = row ? x.head_dim : 0;
        if (row) std::memcpy(to, row, filled * sizeof(S));
        std::memset(to + filled, 0, (depth - filled) * sizeof(S));
    }

    // Steps along two rows, or a row as it is.
    void pair_rows(const S* row, const S* next, Step<S>* to) const {
        if constexpr (PER == 1) std::memcpy(to, row, depth * sizeof(S));
        else interleave(row, next, to, depth);
    }

    // The other layout of a factor's `num_rows` numbers, after which room for a row of zeros is left; matrix tiles meet rows of zeros after it.
    void pair_rows(Factor& factor) const {
        if constexpr (PER > 1) {
            const Index size = (num_rows + 1) / PER * depth;
            sized(factor.pairs, size + SPARE_ROWS<S> * depth);
            std::memset(factor.pairs.data() + size, 0, SPARE_ROWS<S> * depth * sizeof(Step<S>));
            std::memset(factor.numbers.data() + num_rows * depth, 0, depth * sizeof(S));
            for (Index t = 0; t < num_rows; t += PER) {
                const S* row = factor.numbers.data() + t * depth;
                pair_rows(row, row + depth, factor.pairs.data() + t / PER * depth);
            }
        }
    }

    // Begins the tile of rows from `first` on; returns where it stops. Few [SUM] rows where they lie far apart: a tile has a column for
    // every key between them.
    Index begin_tile(Index first) {
        const Index most = min(s->stop - first, max<Index>(1, tile_rows / per_group));
        const Range own = Row{x, first}.span();
        tile_first = first;
        num_tokens = 1;
        while (num_tokens < most && Row{x, first + num_tokens}.span().stop - own.first <= 2 * own.size() + 512) num_tokens++;
        num_rows = num_tokens * per_group;
        seen.resize(2 * num_tokens);
        Range keys[2];
        for (Index i = 0; i < num_tokens; i++) {
            const Row row{x, first + i};
            seen[2 * i] = s->local(row.prefix());
            seen[2 * i + 1] = s->local(row.span());
            for (int part = 0; part < 2; part++) keys[part] = hull(keys[part], seen[2 * i + part]);
        }
        Range prefix = panels_of(keys[0], NR<F>), span = panels_of(keys[1], NR<F>);
        if (!prefix.empty() && prefix.stop >= span.first) {
            span = hull(prefix, span);
            prefix = {0, 0};
        }
        prefix_columns = prefix.size() * NR<F>;
        num_columns = prefix_columns + span.size() * NR<F>;
        prefix_key = prefix.first * NR<F>;
        span_key = span.first * NR<F>;
        for (Range& range : seen) {
            const Index shift = range.first >= span_key ? prefix_columns - span_key : -prefix_key;
            range = range.empty() ? Range{0, 0} : Range{range.first + shift, range.stop + shift};
        }
        make_blocks();
        copy_queries(q, x.q);
        if (backward) pair_rows(q);
        return first + num_tokens;
    }

    // The tile's rows of a tensor like q.
    void copy_queries(Factor& factor, const void* tensor) const {
        S* to = sized(factor.numbers, (num_rows + 1 + SPARE_ROWS<S>) * depth);
        for (Index t = 0; t < num_rows; t++)
            copy_padded(to + t * depth, query_row(tensor, tile_first + t / per_group, t % per_group));
    }

    // Rows join a block while it computes at most twice what they would compute apart.
    void make_blocks() {
        blocks.clear();
        Index apart = 0;
        for (Index t = 0; t < num_rows; t++) {
            const Range* own = &seen[t / per_group * 2];
            const Index own_size = own[0].size() + own[1].size();
            if (!blocks.empty() && blocks.back().count < block_rows) {
                Block& block = blocks.back();
                const Range prefix = hull(block.columns[0], own[0]), span = hull(block.columns[1], own[1]);
                if ((prefix.size() + span.size()) * (block.count + 1) <= 2 * (apart + own_size)) {
                    block = {block.first, block.count + 1, {prefix, span}};
                    apart += own_size;
                    continue;
                }
            }
            blocks.push_back({t, 1, {own[0], own[1]}});
            apart = own_size;
        }
        for (Block& block : blocks) {
            Range& prefix = block.columns[0];
            const Range a = panels_of(prefix, NR<F>), b = panels_of(block.columns[1], NR<F>);
            if (a.stop <= b.first || b.stop <= a.first) continue;  // no panel twice
            block.columns[1] = hull(prefix, block.columns[1]);
            prefix = {0, 0};
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

    static bool sees(const Block& block, Index panel_column) {
        for (const Range& range : block.columns)
            if (range.first < panel_column + NR<F> && panel_column < range.stop) return true;
        return false;
    }

    // The whole panels of a block's columns in a chunk, counted from the chunk's first column.
    template <class Body> void for_panels(const Block& block, Range chunk, Body body) const {
        for (const Range& range : block.columns) {
            const Range panels = panels_of(range, NR<F>);
            const Range columns = common({panels.first * NR<F>, panels.stop * NR<F>}, chunk);
            if (!columns.empty()) body(Range{columns.first - chunk.first, columns.stop - chunk.first});
        }
    }

    // Rows of the tile, and the columns of the chunk that their block computes, likewise counted.
    template <class Body> void for_rows(Range chunk, Body body) const {
        for (const Block& block : blocks)
            for_panels(block, chunk, [&](Range columns) {
                for (Index t = block.first; t < block.first + block.count; t++) body(t, columns);
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

    // A row's keys by distance from it, where it is a [SUM]: `body(columns, tokens back to the first of them)`, one token less per column. A
    // prefix outside the span sits right before it.
    template <class Body> void for_distances(Index i, Body body) const {
        const Row row{x, tile_first + i};
        const Range span = row.span();
        for (int part = 0; part < 2; part++) {
            const Index first = part ? span.size() : span.size() + row.prefix().size();
            if (!seen[2 * i + part].empty()) body(seen[2 * i + part], first);
        }
    }
};

}  // namespace dti
