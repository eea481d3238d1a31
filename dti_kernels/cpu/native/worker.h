// Scores of a tile's rows, the values that they read, and all gradients.
#pragma once
#include <cmath>
#include <limits>

#include "tile_products.h"

namespace dti {

template <class F> constexpr F HIDDEN = -std::numeric_limits<F>::infinity();  // score of a key that a row does not see

// One thread's memory and everything that it does with a segment and a key head.
template <class S> class Worker : TileProducts<S> {
    using Base = TileProducts<S>;
    using typename Base::Block, typename Base::F, typename Base::Factor, typename Base::Stream, typename Base::Weights;
    using Base::backward, Base::blocks, Base::current, Base::depth, Base::g, Base::initial, Base::not_finite, Base::num_columns;
    using Base::num_rows, Base::num_tokens, Base::per_group, Base::q, Base::s, Base::seen, Base::tile_first, Base::tiled, Base::two_streams;
    using Base::x, Base::copy_queries, Base::for_chunks, Base::for_distances, Base::for_panels, Base::for_rows, Base::key_of_column;
    using Base::multiply, Base::own_keys, Base::pair_rows, Base::query_at, Base::query_row, Base::row_of, Base::sized;
    using Base::times_columns, Base::times_rows, Base::weights;

  public:
    // `not_finite` is set where rows may meet keys that they do not see, of which one or the other is not finite: results hold anything then.
    Worker(const Arguments& arguments, bool with_gradients, std::atomic<bool>& not_finite)
        : Base(arguments, with_gradients, not_finite), scale(F(arguments.scale)) {}

    // `slopes`: where the (H,) gradients of slopes are added to; null where nobody asks.
    void run(const Segment& segment, Index key_head, double* slopes) {
        if (not_finite && !x.is_cleared) return;
        slope_gradients = segment.sums ? slopes : nullptr;
        this->pack(segment, key_head);
        const TilesInUse tiles(tiled);
        for (Index row = s->first; row < s->stop;) {
            row = this->begin_tile(row);
            probabilities();
            backward ? finish_with_gradients() : finish_with_output();
        }
    }

  private:
    const F scale;
    double* slope_gradients = nullptr;
    std::vector<double> mean_distance;
    Factor d_out;
    std::vector<F> d_q, scores, scores_initial, ratio, own_p, inverse, delta, d_s, d_s_initial, p_chunk_initial, sums;
    std::vector<S> rounded_p, rounded_ds;
    
    // float32 and float64 are added lane by lane, so that no instruction of one processor decides their order.
    static F total(V<F> x) {
        if constexpr (ROUNDS<S>) return folded_sum_of(x);
        else return sum_of<F>(x);
    }

    F dot(const S* a, const S* b) const {
        V<F> sums = {};
        Index d = 0;
        for (; d + LANES<F> <= x.head_dim; d += LANES<F>) sums += load(a + d) * load(b + d);
        F sum = total(sums);
        for (; d < x.head_dim; d++) sum += wide(a[d]) * wide(b[d]);
        return sum;
    }

    const F* ratio_of(Index t) const { return ratio.data() + t / per_group * num_columns; }

    // Scores of the tile's rows and their powers e^(score - shift), zeros where a row does not see a key of its block's panels:
    // `scores` and `own_p` times the row's `inverse` are the softmax.
    void probabilities() {
        const Index ld = num_columns;
        F* p = sized(scores, (num_rows + SPARE_ROWS<S>) * ld);
        for_chunks([&](Range chunk) { multiply(q, current.key_panels, chunk, p + chunk.first, ld); });
        if (two_streams) {
            F* p_initial = sized(scores_initial, (num_rows + SPARE_ROWS<S>) * ld);
            for_chunks([&](Range chunk) { multiply(q, initial.key_panels, chunk, p_initial + chunk.first, ld); });
            fill_ratios();
            for_rows({0, ld}, [&](Index t, Range of_row) { blend(p + t * ld, p_initial + t * ld, ratio_of(t), of_row); });
        }
        sized(own_p, num_rows);
        sized(inverse, num_rows);
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
                    const Index distance = ids[tile_first + i] - ids[s->global(key_of_column(column))];
                    to[i * num_columns + column] = table[min(max<Index>(distance, 0), x.num_ratios - 1)];
                }
    }

    // a += ratio (b - a)
    static void blend(F* a, const F* b, const F* ratio, Range range) {
        for (Index c = range.first; c < range.stop; c += LANES<F>)
            store(a + c, load(a + c) + load(ratio + c) * (load(b + c) - load(a + c)));
    }

    void softmax_row(const Block& block, Index t, F* p) {
        const Index i = t / per_group, r = t % per_group, row = tile_first + i;
        const Range columns{0, num_columns};
        // ALiBi is subtracted from scaled scores, so nothing is left to scale them by.
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
        if (s->sums) own = scale * dot(query_row(x.q, row, r), row_of(own_keys(), row));
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
        const F sum = total(sum_of_keys) + own_power;
        own_p[t] = own_power;
        inverse[t] = F(1) / sum;
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
        if constexpr (ROUNDS<S>) return folded_max_of(most);
        else return max_of<F>(most);
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
        F *p = scores.data(), *p_initial = scores_initial.data();
        if (two_streams)
            for_rows({0, ld}, [&](Index t, Range of_row) { split(p + t * ld, p_initial + t * ld, ratio_of(t), of_row); });
        for_chunks([&](Range chunk) {
            times_rows(weights(p + chunk.first, ld, chunk, rounded_p), current.rows, chunk, o);
            if (two_streams) times_rows(weights(p_initial + chunk.first, ld, chunk, rounded_p), initial.rows, chunk, o);
        });
        for (Index t = 0; t < num_rows; t++) {
            const Index row = tile_first + t / per_group, r = t % per_group;
            F* read = o + t * depth;
            const S* v_own = row_of(x.v, row);
            for (Index d = 0; d < x.head_dim; d++) {
                if (s->sums) read[d] += own_p[t] * wide(v_own[d]);
                read[d] *= inverse[t];
            }
            narrow(static_cast<S*>(x.out) + query_at(row, r), read, x.head_dim);
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

    void finish_with_gradients() {
        read_output_gradients();
        if (slope_gradients) read_mean_distances();
        F* dq = sized(d_q, num_rows * depth);
        std::memset(dq, 0, num_rows * depth * sizeof(F));
        for_chunks([&](Range chunk) {
            score_gradients(chunk);
            const Index first_key = key_of_column(chunk.first) * depth;
            const auto add = [&](const Stream& stream, const F* p, Index ld, const F* ds) {
                times_columns(weights(p, ld, chunk, rounded_p), d_out, chunk, stream.d_values + first_key);
                const Weights of_scores = weights(ds, CHUNK, chunk, rounded_ds);
                times_columns(of_scores, q, chunk, stream.d_keys + first_key);
                times_rows(of_scores, stream.rows, chunk, dq);
            };
            add(current, scores.data() + chunk.first, num_columns, d_s.data());
            if (two_streams) add(initial, p_chunk_initial.data(), CHUNK, d_s_initial.data());
        });
        if (s->sums) own_key_gradients(dq);
        for (Index t = 0; t < num_rows; t++) {
            F* of_row = dq + t * depth;
            for (Index d = 0; d < x.head_dim; d++) of_row[d] *= scale;
            narrow(static_cast<S*>(x.dq) + query_at(tile_first + t / per_group, t % per_group), of_row, x.head_dim);
        }
    }

    // `d_s` (rows x CHUNK): gradients of a chunk's scores, in the panels that blocks see. With two streams, what belongs to the initial states
    // moves from `scores` and `d_s` to `p_chunk_initial` and `d_s_initial`.
    void score_gradients(Range chunk) {
        F *p = scores.data() + chunk.first, *p_initial = sized(p_chunk_initial, num_rows * CHUNK);
        F *ds = sized(d_s, (num_rows + SPARE_ROWS<S>) * CHUNK), *ds_initial = sized(d_s_initial, (num_rows + SPARE_ROWS<S>) * CHUNK);
        multiply(d_out, current.value_panels, chunk, ds, CHUNK);
        if (two_streams) multiply(d_out, initial.value_panels, chunk, ds_initial, CHUNK);
        for_rows(chunk, [&](Index t, Range columns) {
            F *p_t = p + t * num_columns, *ds_t = ds + t * CHUNK;
            if (two_streams) blend(ds_t, ds_initial + t * CHUNK, ratio_of(t) + chunk.first, columns);
            for (Index c = columns.first; c < columns.stop; c += LANES<F>) {
                V<F> p_c = load(p_t + c);
                if (ROUNDS<S>) store(p_t + c, p_c *= all(inverse[t]));
                store(ds_t + c, p_c == V<F>{} ? p_c : p_c * (load(ds_t + c) - all(delta[t])));  // 0 also where d_out . v overflows
            }
        });
        if (slope_gradients) add_slope_gradients(ds, chunk);
        if (two_streams)
            for_rows(chunk, [&](Index t, Range columns) {
                split(p + t * num_columns, p_initial + t * CHUNK, ratio_of(t) + chunk.first, columns);
                split(ds + t * CHUNK, ds_initial + t * CHUNK, ratio_of(t) + chunk.first, columns);
            });
    }

    // `d_out`, and `delta`, which the gradients of all probabilities of a row have in common. Both times `inverse`, once and for all; where
    // that would round `d_out` anew, the probabilities are.
    void read_output_gradients() {
        copy_queries(d_out, x.grad_out);
        sized(delta, num_rows);
        for (Index t = 0; t < num_rows; t++) {
            S* to = d_out.numbers.data() + t * depth;
            if constexpr (ROUNDS<S>) own_p[t] *= inverse[t];
            else for (Index d = 0; d < x.head_dim; d++) to[d] *= inverse[t];
            delta[t] = dot(to, query_row(x.out, tile_first + t / per_group, t % per_group));
            if (!std::isfinite(delta[t])) not_finite = true;
        }
        pair_rows(d_out);
    }

    // A slope's gradient is -sum ds distance over all keys, its own at 0. Since ds sum to 0, distances may count from anywhere; from
    // their mean, the rounding of `delta` cancels.
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
        void* d_keys = x.k_sum ? x.dk_sum : x.dk;
        F *dk = sized(sums, 2 * depth), *dv = dk + depth;
        for (Index i = 0; i < num_tokens; i++) {
            const Index row = tile_first + i;
            const S *k_own = row_of(own_keys(), row), *v_own = row_of(x.v, row);
            std::fill(dk, dk + 2 * depth, F(0));
            for (Index r = 0; r < per_group; r++) {
                const Index t = i * per_group + r;
                const S *d_o = d_out.numbers.data() + t * depth, *q_t = q.numbers.data() + t * depth;
                const F ds = own_p[t] * (dot(d_o, v_own) - delta[t]);
                if (slope_gradients) slope_gradients[g * per_group + r] += double(ds) * mean_distance[t];
                for (Index d = 0; d < x.head_dim; d++) {
                    dq[t * depth + d] += ds * wide(k_own[d]);
                    dk[d] += ds * wide(q_t[d]) * scale;
                    dv[d] += own_p[t] * wide(d_o[d]);
                }
            }
            narrow(const_cast<S*>(row_of(d_keys, row)), dk, x.head_dim);
            narrow(const_cast<S*>(row_of(x.dv, row)), dv, x.head_dim);
        }
    }
};

}  // namespace dti
