// Products of a tile's rows with its keys: scores, what rows read, and what keys are given, on the blocks that some row sees.
#pragma once
#include "tiles.h"

namespace dti {

template <class S> class TileProducts : protected Tiles<S> {
  protected:
    using Base = Tiles<S>;
    using typename Base::Block, typename Base::F, typename Base::Factor;
    using Base::PER;
    using Base::blocks, Base::depth, Base::num_rows, Base::steps, Base::tiled;
    using Base::for_panels, Base::for_rows, Base::for_rows_that_see, Base::key_of_column, Base::sees, Base::sized;

    std::vector<F> few_rows;
    std::vector<Step<S>> pairs_of_panel, turned_columns;

    using Tiles<S>::Tiles;

    // to (rows x columns of the chunk, from the chunk's first) = a (rows x depth) . panels, in the panels that a block sees.
    void multiply(const Factor& a, const std::vector<Step<S>>& panels, Range chunk, F* to, Index ld) const {
        for (Index column = chunk.first; column < chunk.stop; column += NR<F>) {
            const Step<S>* panel = panels.data() + key_of_column(column) * steps;
            // In order: a matrix tile writes rows beyond its block's, which later blocks overwrite where they see the panel.
            for (const Block& block : blocks) {
                if (!sees(block, column)) continue;
                const Step<S>* rows = a.along_depth() + block.first * steps;
                F* scores_of_block = to + block.first * ld + column - chunk.first;
                if constexpr (TILED<S>)
                    if (tiled) {
                        tile_scores(rows, steps, panel, steps, scores_of_block, ld);
                        continue;
                    }
                with_rows(block.count,
                          [&](auto m) { scores_block<S, m()>(rows, steps, panel, steps, scores_of_block, ld); });
            }
        }
    }

    // A chunk of probabilities or of their gradients (rows x columns, from the chunk's first) as products take it, numbers of S in the panels
    // that blocks see: where they are, or rounded, in `memory`.
    struct Weights {
        const S* numbers;
        Index ld;
    };
    Weights weights(const F* p, Index ld, Range chunk, std::vector<S>& memory) const {
        if constexpr (ROUNDS<S>) {
            S* to = sized(memory, (num_rows + SPARE_ROWS<S>) * CHUNK);
            for_rows(chunk, [&](Index t, Range columns) {
                for (Index c = columns.first; c < columns.stop; c += LANES<F>) store(to + t * CHUNK + c, load(p + t * ld + c));
            });
            return {to, CHUNK};
        } else {
            return {p, ld};
        }
    }

    // to (rows x depth) += p (rows x columns of the chunk) . rows of its keys. In whole steps: beyond the columns that a block sees, p is 0.
    void times_rows(const Weights& p, const std::vector<Step<S>>& rows, Range chunk, F* to) {
        const Step<S>* weights = reinterpret_cast<const Step<S>*>(p.numbers);
        if constexpr (TILED<S>)
            if (tiled) return times_rows_in_tiles(weights, p.ld / PER, rows, chunk, to);
        for (const Block& block : blocks)
            for (const Range& range : block.columns) {
                const Range columns = common(range, chunk);
                if (columns.empty()) continue;
                const Range of_steps = panels_of(columns, PER);
                accumulate<S, false>(block.count, weights + (block.first * p.ld - chunk.first) / PER + of_steps.first, p.ld / PER,
                                     rows.data() + key_of_column(of_steps.first * PER) / PER * depth, of_steps.size(),
                                     to + block.first * depth, depth);
            }
    }

    // The same over whole panels, in which p is 0 where a row of the block sees nothing. Blocks of fewer rows than a tile have are summed apart.
    void times_rows_in_tiles(const Step<S>* p, Index ldp, const std::vector<Step<S>>& rows, Range chunk, F* to) {
        for (const Block& block : blocks)
            for_panels(block, chunk, [&](Range columns) {
                F *sums_of_block = to + block.first * depth, *sums_of_tile = sums_of_block;
                if (block.count < TILE) {
                    sums_of_tile = sized(few_rows, TILE * depth);
                    std::memcpy(sums_of_tile, sums_of_block, block.count * depth * sizeof(F));
                }
                tile_accumulate(p + block.first * ldp + columns.first / PER, ldp,
                                rows.data() + key_of_column(chunk.first + columns.first) / PER * depth, columns.size() / PER,
                                sums_of_tile, depth);
                if (block.count < TILE) std::memcpy(sums_of_block, sums_of_tile, block.count * depth * sizeof(F));
            });
    }

    // A panel's columns (steps along some rows x NR) and the steps: where they are, or pairs of rows, in which rows outside are zeros.
    struct Columns {
        const Step<S>* numbers;
        Index ld;
        Range of_rows;
    };
    Columns columns_of(const Weights& p, Index column, Range rows) {
        if constexpr (PER == 1) {
            return {p.numbers + rows.first * p.ld + column, p.ld, rows};
        } else {
            static constexpr S NONE[NR<F>] = {};
            const auto row = [&](Index t) { return rows.first <= t && t < rows.stop ? p.numbers + t * p.ld + column : NONE; };
            Range pairs = panels_of(rows, PER);
            if (tiled) pairs.stop = pairs.first + round_up(pairs.size(), TILE);
            Step<S>* to = sized(pairs_of_panel, pairs.size() * NR<F>);
            for (Index i = 0; i < pairs.size(); i++)
                interleave(row((pairs.first + i) * PER), row((pairs.first + i) * PER + 1), to + i * NR<F>, NR<F>);
            return {to, NR<F>, pairs};
        }
    }

    // to (keys x depth, from the chunk's first) += p^T (columns of the chunk x rows) . a (rows x depth), panel by panel: only where a
    // block has computed a panel does `p` hold anything.
    void times_columns(const Weights& p, const Factor& a, Range chunk, F* to) {
        for (Index panel = 0; panel < chunk.size(); panel += NR<F>)
            for_rows_that_see(chunk.first + panel, [&](Range rows) {
                const Columns columns = columns_of(p, panel, rows);
                if constexpr (TILED<S>)
                    if (tiled) return times_columns_in_tiles(columns, a, to + panel * depth);
                for (Index c = 0; c < NR<F>; c += MR)
                    accumulate<S, true>(int(min<Index>(MR, NR<F> - c)), columns.numbers + c, columns.ld,
                                        a.along_rows() + columns.of_rows.first * depth, columns.of_rows.size(), to + (panel + c) * depth, depth);
            });
    }

    // Steps along rows have to lie side by side in a tile, so columns are turned into rows.
    void times_columns_in_tiles(const Columns& columns, const Factor& a, F* to) {
        const Index count = columns.of_rows.size();
        Step<S>* turned = sized(turned_columns, TILE * count);
        for (Index c = 0; c < NR<F>; c += TILE) {
            for (Index t = 0; t < count; t += TILE) transpose(columns.numbers + t * columns.ld + c, columns.ld, turned + t, count);
            tile_accumulate(turned, count, a.along_rows() + columns.of_rows.first * depth, count, to + c * depth, depth);
        }
    }
};

}  // namespace dti
