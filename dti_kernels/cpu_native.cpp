// Attention over streaming prompts on CPUs, forward and backward: what cpu.py computes, in registers and caches.
//
//     context row:  s_j = scale q . k_j;   [SUM] row:  s_j = scale q . k~_j - slope dist(j), and itself;   out = softmax(s) v~
//
// Rows are cut into segments of neighbours; a task is one segment and one key head. It packs the keys and values that the segment
// sees (once as rows, once transposed in panels of NR keys), then walks tiles of rows. The scores of a tile's rows with all of their
// keys stay in the L2 cache, so softmax needs no running maximum and the backward no log-sum-exp. Six rows by NR keys are one
// register block, and only blocks that some row sees are computed. Gradients of keys go to memory of their segment's own and are
// summed segment after segment: results do not depend on the number of threads.
//
// Time O(T (window + block)), memory O(T) beside a tile of scores per thread. Built and called by cpu_native.py.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__AVX512F__)
#define DTI_VECTOR_BYTES 64
#elif defined(__AVX__)
#define DTI_VECTOR_BYTES 32
#else
#define DTI_VECTOR_BYTES 16
#endif

// Mirrored by `_Arguments` in cpu_native.py. Null pointers are inputs that are off and gradients that nobody asks for.
struct Arguments {
    int64_t num_rows, num_context, num_skipped, num_heads, num_groups, head_dim, num_ratios, num_threads;
    double scale;
    const void *q, *k, *v, *k_sum, *k_initial, *v_initial, *ratios, *slopes;
    const int32_t *rows, *keys;
    void *out, *lse;
    const void* grad_out;
    void *dq, *dk, *dv, *dk_sum, *dk_initial, *dv_initial;
    double* dslopes;  // (H,)
    void* key_gradients;  // memory of the segments' own, `dti_key_gradients` numbers
    void* parallel;  // GOMP_parallel of the OpenMP runtime that PyTorch runs on; null: threads of our own
};

namespace {

using std::max;
using std::min;
using Index = int64_t;

// Columns of a layout's rows and keys (layout.py).
enum RowField { PROMPT_FIRST, PREFIX_STOP, START, STOP, RESET_ID };

constexpr int MR = 6;  // rows of a register block: 6 x 2 accumulators leave room for keys and a query in 16 vector registers
constexpr int TILE_ROWS = 48;  // times query heads of the group, of a tile
constexpr int CHUNK = 64;  // keys that a tile meets at a time: rows of values and their gradients stay in the L1 cache
constexpr int SEGMENT_ROWS = 512;
// [SUM] rows lie an interaction apart: a segment of them ends where it would see many more keys than its first row.
constexpr int SUM_SEGMENT_ROWS = 96, SUM_SEGMENT_KEYS = 3072;
constexpr double HIDDEN = -1e30;  // score of a key that a row does not see

template <class F> struct Vector;
template <> struct Vector<float> {
    typedef float type __attribute__((vector_size(DTI_VECTOR_BYTES)));
    typedef float unaligned __attribute__((vector_size(DTI_VECTOR_BYTES), aligned(4), may_alias));
    typedef int32_t bits __attribute__((vector_size(DTI_VECTOR_BYTES)));
};
template <> struct Vector<double> {
    typedef double type __attribute__((vector_size(DTI_VECTOR_BYTES)));
    typedef double unaligned __attribute__((vector_size(DTI_VECTOR_BYTES), aligned(8), may_alias));
    typedef int64_t bits __attribute__((vector_size(DTI_VECTOR_BYTES)));
};
template <class F> using V = typename Vector<F>::type;
template <class F> constexpr int LANES = DTI_VECTOR_BYTES / int(sizeof(F));
template <class F> constexpr int NR = 2 * LANES<F>;  // keys of a panel

template <class F> inline V<F> load(const F* x) { return *reinterpret_cast<const typename Vector<F>::unaligned*>(x); }
template <class F> inline void store(F* x, V<F> value) { *reinterpret_cast<typename Vector<F>::unaligned*>(x) = value; }
template <class F> inline V<F> all(F x) { return x - V<F>{}; }

template <class F> inline F sum_of(V<F> x) {
    F sum = 0;
    for (int i = 0; i < LANES<F>; i++) sum += x[i];
    return sum;
}
template <class F> inline F max_of(V<F> x) {
    F most = x[0];
    for (int i = 1; i < LANES<F>; i++) most = max(most, x[i]);
    return most;
}

// e^x for x <= 0, relative error 2e-9 before rounding; below e^-87 it is e^-87.
inline V<float> exp_of(V<float> x) {
    using B = Vector<float>::bits;
    x = x < all(-87.0f) ? all(-87.0f) : x;  // lets NaN through
    const V<float> magic = all(12582912.0f);  // 1.5 x 2^23: adding it rounds to an integer, which the low bits then hold
    const V<float> log2_e = all(1.44269502f), rest = all(1.92596299e-8f);
    const V<float> shifted = x * log2_e + magic, f = (x * log2_e - (shifted - magic)) + x * rest;
    V<float> p = all(0.0001534580223960802f);  // 2^f, |f| <= 1/2
    p = p * f + all(0.0013399930903688073f);
    p = p * f + all(0.009618489071726799f);
    p = p * f + all(0.05550328642129898f);
    p = p * f + all(0.24022646248340607f);
    p = p * f + all(0.6931471824645996f);
    p = p * f + all(1.0f);
    return (V<float>)((B)p + ((B)shifted << 23));
}
inline V<double> exp_of(V<double> x) {
    for (int i = 0; i < LANES<double>; i++) x[i] = std::exp(x[i]);
    return x;
}

// c (M x NR) = a (M x depth) . panel (depth x NR)
template <class F, int M> inline void scores_block(const F* a, Index lda, const F* panel, Index depth, F* c, Index ldc) {
    V<F> acc[M][2] = {};
    for (Index d = 0; d < depth; d++, panel += NR<F>) {
        const V<F> b0 = load(panel), b1 = load(panel + LANES<F>);
#pragma GCC unroll 6
        for (int m = 0; m < M; m++) {
            const V<F> x = all(a[m * lda + d]);
            acc[m][0] += x * b0;
            acc[m][1] += x * b1;
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; m++) {
        store(c + m * ldc, acc[m][0]);
        store(c + m * ldc + LANES<F>, acc[m][1]);
    }
}

// c (M x N vectors) += sum over t < count of p(m, t) b (count x N vectors); p(m, t) is p[m ldp + t], or p[t ldp + m] by column.
template <class F, int M, int N, bool BY_COLUMN>
inline void accumulate_block(const F* p, Index ldp, const F* b, Index ldb, Index count, F* c, Index ldc) {
    V<F> acc[M][N] = {};  // added to c at the end: fewer roundings at the size of c
    for (Index t = 0; t < count; t++, b += ldb) {
        V<F> b_n[N];
#pragma GCC unroll 2
        for (int n = 0; n < N; n++) b_n[n] = load(b + n * LANES<F>);
#pragma GCC unroll 6
        for (int m = 0; m < M; m++) {
            const V<F> x = all(BY_COLUMN ? p[t * ldp + m] : p[m * ldp + t]);
#pragma GCC unroll 2
            for (int n = 0; n < N; n++) acc[m][n] += x * b_n[n];
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; m++)
#pragma GCC unroll 2
        for (int n = 0; n < N; n++) {
            F* to = c + m * ldc + n * LANES<F>;
            store(to, load(to) + acc[m][n]);
        }
}

template <class Body> inline void with_rows(int count, Body body) {
    switch (count) {
        case 1: body(std::integral_constant<int, 1>{}); break;
        case 2: body(std::integral_constant<int, 2>{}); break;
        case 3: body(std::integral_constant<int, 3>{}); break;
        case 4: body(std::integral_constant<int, 4>{}); break;
        case 5: body(std::integral_constant<int, 5>{}); break;
        default: body(std::integral_constant<int, 6>{}); break;
    }
}

// The same over all of a row's `depth` numbers.
template <class F, bool BY_COLUMN>
inline void accumulate(int rows, const F* p, Index ldp, const F* b, Index count, F* c, Index depth) {
    with_rows(rows, [&](auto m) {
        Index d = 0;
        for (; d + NR<F> <= depth; d += NR<F>)
            accumulate_block<F, m(), 2, BY_COLUMN>(p, ldp, b + d, depth, count, c + d, depth);
        if (d < depth) accumulate_block<F, m(), 1, BY_COLUMN>(p, ldp, b + d, depth, count, c + d, depth);
    });
}

struct Range {
    Index first = 0, stop = 0;
    Index size() const { return stop - first; }
    bool empty() const { return stop <= first; }
};
inline Range hull(Range a, Range b) {
    if (a.empty()) return b;
    if (b.empty()) return a;
    return {min(a.first, b.first), max(a.stop, b.stop)};
}
inline Range common(Range a, Range b) { return {max(a.first, b.first), min(a.stop, b.stop)}; }
inline Index round_up(Index x, Index to) { return (x + to - 1) / to * to; }
inline Range panels_of(Range x, Index width) {
    return x.empty() ? Range{0, 0} : Range{x.first / width, (x.stop + width - 1) / width};
}

// Neighbouring rows, and the keys that they see: the prefix of the first row's prompt where it lies apart, then the span from its
// start to the last row's stop. The prefix of any later prompt lies inside that span. Local numbers of keys: 0.. for the prefix,
// from `span_first` (a panel's beginning) on for the span.
struct Segment {
    Index first, stop;
    bool sums;
    Range prefix, span;
    Index span_first, num_keys;  // num_keys: padded to whole panels
    Index gradients;  // where its gradients of keys begin, in numbers

    Index local(Index key) const { return key < span.first ? key - prefix.first : span_first + key - span.first; }
    Range local(Range keys) const {
        if (keys.empty()) return {0, 0};
        const Index first = local(keys.first);
        return {first, first + keys.size()};
    }
};

struct Row {
    const Arguments& x;
    Index row;
    Index at(int field) const { return x.rows[field * x.num_rows + row]; }
    Range prefix() const { return {at(PROMPT_FIRST), at(PREFIX_STOP)}; }
    Range span() const { return {at(START), at(STOP)}; }
};

template <class F> Index padded_depth(const Arguments& x) { return round_up(x.head_dim, LANES<F>); }

// Gradients that a segment's task sums: keys and values, and those of the initial states.
inline int num_streams(const Arguments& x, bool sums) { return sums && x.k_initial ? 2 : 1; }

template <class F> std::vector<Segment> segments_of(const Arguments& x) {
    std::vector<Segment> segments;
    Index gradients = 0;
    auto add = [&](Index first, Index stop, bool sums) {
        Segment s{};
        s.first = first, s.stop = stop, s.sums = sums;
        s.prefix = Row{x, first}.prefix();
        s.span = {Row{x, first}.span().first, Row{x, stop - 1}.span().stop};
        s.span_first = round_up(max<Index>(s.prefix.size(), 0), NR<F>);
        s.num_keys = s.span_first + round_up(s.span.size(), NR<F>);
        s.gradients = gradients;
        gradients += 2 * num_streams(x, sums) * x.num_groups * s.num_keys * padded_depth<F>(x);
        segments.push_back(s);
    };
    for (Index row = x.num_skipped; row < x.num_context; row += SEGMENT_ROWS)
        add(row, min(row + SEGMENT_ROWS, x.num_context), false);
    for (Index row = x.num_context; row < x.num_rows;) {
        const Range own = Row{x, row}.span();
        Index stop = row + 1;
        while (stop < x.num_rows && stop - row < SUM_SEGMENT_ROWS &&
               Row{x, stop}.span().stop - own.first <= own.size() + SUM_SEGMENT_KEYS)
            stop++;
        add(row, stop, true);
        row = stop;
    }
    return segments;
}

template <class F> Index gradients_size(const Arguments& x) {
    Index size = 0;
    for (const Segment& s : segments_of<F>(x))
        size += 2 * num_streams(x, s.sums) * x.num_groups * s.num_keys * padded_depth<F>(x);
    return size;
}

// One thread's memory and everything that it does with a segment and a key head.
template <class F> class Worker {
  public:
    Worker(const Arguments& arguments, bool backward)
        : x(arguments), backward(backward), per_group(arguments.num_heads / arguments.num_groups),
          depth(padded_depth<F>(arguments)), scale(F(arguments.scale)) {}

    // `slopes`: where the (H,) gradients of slopes are added to; null where nobody asks.
    void run(const Segment& segment, Index key_head, double* slopes) {
        s = &segment, g = key_head, slope_gradients = s->sums ? slopes : nullptr;
        two_streams = s->sums && x.k_initial;
        pack();
        for (Index row = s->first; row < s->stop; row += num_tokens) {
            begin_tile(row, tile_stop(row));
            probabilities();
            backward ? finish_backward() : finish_forward();
        }
    }

  private:
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
    std::vector<F> q, d_out, d_q, scores, scores_initial, ratio, own_p, delta, d_p, d_p_initial, part;

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
        pack_stream(current, keys, x.v);
        if (two_streams) pack_stream(initial, x.k_initial, x.v_initial);
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

    // A row of the tensor for every local key, zeros in between.
    template <class Body> void for_keys(const void* tensor, Body body) {
        for (Index key = 0; key < s->num_keys; key++) {
            const bool in_span = key >= s->span_first;
            const Index of = in_span ? s->span.first + key - s->span_first : s->prefix.first + key;
            body(key, of < (in_span ? s->span.stop : s->prefix.stop) ? row_of(tensor, of) : nullptr);
        }
    }

    void pack_rows(std::vector<F>& memory, const void* tensor) {
        F* to = sized(memory, s->num_keys * depth);
        for_keys(tensor, [&](Index key, const F* row) { copy_padded(to + key * depth, row); });
    }

    void copy_padded(F* to, const F* row) const {
        const Index filled = row ? x.head_dim : 0;
        if (row) std::memcpy(to, row, filled * sizeof(F));
        std::fill(to + filled, to + depth, F(0));
    }

    void pack_panels(std::vector<F>& memory, const void* tensor) {
        F* to = sized(memory, s->num_keys * depth);
        for_keys(tensor, [&](Index key, const F* row) {
            F* panel = to + key / NR<F> * NR<F> * depth + key % NR<F>;
            for (Index d = 0; d < x.head_dim; d++) panel[d * NR<F>] = row ? row[d] : F(0);
            for (Index d = x.head_dim; d < depth; d++) panel[d * NR<F>] = F(0);
        });
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

    // Scores of the tile's rows and their softmax, zeros where a row does not see a key of its block's panels: `scores` holds the
    // probabilities, normalised in the backward; `own_p` those of own keys; `delta` the row's sum (forward: with which to divide).
    void probabilities() {
        const Index ld = num_columns;
        F* p = sized(scores, num_rows * ld);
        // Rows between those that see a panel are read with it.
        if (backward) std::memset(p, 0, num_rows * ld * sizeof(F));
        const Range columns{0, num_columns};
        for_chunks([&](Range chunk) { multiply(q.data(), current.key_panels, chunk, p + chunk.first, ld); });
        if (two_streams) {
            F* p_initial = sized(scores_initial, num_rows * ld);
            for_chunks([&](Range chunk) { multiply(q.data(), initial.key_panels, chunk, p_initial + chunk.first, ld); });
            fill_ratios();
            for (const Block& block : blocks)
                for_panels(block, columns, [&](Range range) {
                    for (Index t = block.first; t < block.first + block.count; t++)
                        blend(p + t * ld, p_initial + t * ld, ratio.data() + t / per_group * ld, range);
                });
        }
        sized(own_p, num_rows), sized(delta, num_rows);
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
                for (Index c = range.first; c < range.stop; c++)
                    p[c] = p[c] * scale - slope * F(distance - (c - range.first));
            });
        }
        F most = F(HIDDEN), own = F(HIDDEN);
        if (s->sums) {
            const void* keys = x.k_sum ? x.k_sum : x.k;
            own = scale * dot(query_row(x.q, row, r), row_of(keys, row));
            most = own;
        }
        V<F> most_of = all(F(HIDDEN));
        for_panels(block, columns, [&](Range range) {
            hide(p, range, &seen[2 * i]);
            for (Index c = range.first; c < range.stop; c += LANES<F>) {
                const V<F> value = load(p + c);
                most_of = value > most_of ? value : most_of;
            }
        });
        const F of_keys = max_of<F>(most_of);
        if (of_keys > F(HIDDEN)) most = max(most, of_keys * factor);
        V<F> sum_of_keys = {};
        const V<F> times = all(factor), minus = all(-most), threshold = all(F(HIDDEN));
        for_panels(block, columns, [&](Range range) {
            for (Index c = range.first; c < range.stop; c += LANES<F>) {
                const V<F> score = load(p + c);
                const V<F> power = exp_of(score * times + minus);
                const V<F> value = score <= threshold ? V<F>{} : power;
                store(p + c, value);
                sum_of_keys += value;
            }
        });
        const F own_power = s->sums ? exp_of(all(own - most))[0] : F(0);
        const F sum = sum_of<F>(sum_of_keys) + own_power;
        own_p[t] = own_power / sum, delta[t] = sum;
        if (backward) {
            const V<F> inverse = all(F(1) / sum);
            for_panels(block, columns, [&](Range range) {
                for (Index c = range.first; c < range.stop; c += LANES<F>) store(p + c, load(p + c) * inverse);
            });
        } else {
            static_cast<F*>(x.lse)[(g * per_group + r) * (x.num_rows - x.num_skipped) + row - x.num_skipped] =
                most + std::log(sum);
        }
    }

    static void hide(F* p, Range range, const Range* visible) {
        const Range a = common(visible[0], range), b = common(visible[1], range);
        const Range first = a.empty() || (!b.empty() && b.first < a.first) ? b : a;
        const Range second = a.empty() || b.empty() ? Range{range.stop, range.stop} : (first.first == a.first ? b : a);
        if (first.empty()) {
            std::fill(p + range.first, p + range.stop, F(HIDDEN));
            return;
        }
        std::fill(p + range.first, p + first.first, F(HIDDEN));
        if (first.stop < second.first) std::fill(p + first.stop, p + second.first, F(HIDDEN));
        if (second.stop < range.stop) std::fill(p + max(first.stop, second.stop), p + range.stop, F(HIDDEN));
    }

    void finish_forward() {
        const Index ld = num_columns;
        F* o = sized(d_q, num_rows * depth);
        std::memset(o, 0, num_rows * depth * sizeof(F));
        F* p = scores.data();
        if (two_streams) {
            F* p_initial = scores_initial.data();
            for (const Block& block : blocks)
                for_panels(block, {0, num_columns}, [&](Range range) {
                    for (Index t = block.first; t < block.first + block.count; t++)
                        split(p + t * ld, p_initial + t * ld, ratio.data() + t / per_group * ld, range);
                });
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
                const F of_keys = o[t * depth + d] / delta[t];
                to[d] = s->sums ? of_keys + own_p[t] * v_own[d] : of_keys;
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

    // to (keys x depth, from the chunk's first) += p^T (columns of the chunk x rows) . a (rows x depth)
    void times_columns(const F* p, Index ld, const F* a, Range chunk, F* to) const {
        for (Index column = chunk.first; column < chunk.stop; column += MR) {
            const int count = int(min<Index>(MR, chunk.stop - column));
            const Range rows = rows_that_see({column, column + count});
            if (!rows.empty())
                accumulate<F, true>(count, p + rows.first * ld + column - chunk.first, ld, a + rows.first * depth, rows.size(),
                                    to + (column - chunk.first) * depth, depth);
        }
    }

    Range rows_that_see(Range columns) const {
        Range rows;
        for (const Block& block : blocks)
            for (const Range& range : block.columns)
                if (!common(range, columns).empty()) rows = hull(rows, {block.first, block.first + block.count});
        return rows;
    }

    void finish_backward() {
        const Index ld = num_columns;
        read_output_gradients();
        F* dq = sized(d_q, num_rows * depth);
        std::memset(dq, 0, num_rows * depth * sizeof(F));
        F *ds = sized(d_p, num_rows * CHUNK), *ds_initial = nullptr, *p_initial = nullptr;
        if (two_streams) ds_initial = sized(d_p_initial, num_rows * CHUNK), p_initial = sized(part, num_rows * CHUNK);
        for_chunks([&](Range chunk) {
            F* p = scores.data() + chunk.first;
            const Index first_key = key_of_column(chunk.first) * depth;
            std::memset(ds, 0, num_rows * CHUNK * sizeof(F));
            multiply(d_out.data(), current.value_panels, chunk, ds, CHUNK);
            if (two_streams) {
                std::memset(ds_initial, 0, num_rows * CHUNK * sizeof(F));
                std::memset(p_initial, 0, num_rows * CHUNK * sizeof(F));
                multiply(d_out.data(), initial.value_panels, chunk, ds_initial, CHUNK);
            }
            for (const Block& block : blocks)
                for_panels(block, chunk, [&](Range range) {
                    const Range local{range.first - chunk.first, range.stop - chunk.first};
                    for (Index t = block.first; t < block.first + block.count; t++) {
                        const F* of_token = two_streams ? ratio.data() + t / per_group * ld + chunk.first : nullptr;
                        F* ds_t = ds + t * CHUNK;
                        if (two_streams) blend(ds_t, ds_initial + t * CHUNK, of_token, local);
                        for (Index c = local.first; c < local.stop; c += LANES<F>)
                            store(ds_t + c, load(p + t * ld + c) * (load(ds_t + c) - all(delta[t])));
                    }
                });
            if (slope_gradients) add_slope_gradients(ds, chunk);
            if (two_streams)
                for (const Block& block : blocks)
                    for_panels(block, chunk, [&](Range range) {
                        const Range local{range.first - chunk.first, range.stop - chunk.first};
                        for (Index t = block.first; t < block.first + block.count; t++) {
                            const F* of_token = ratio.data() + t / per_group * ld + chunk.first;
                            split(p + t * ld, p_initial + t * CHUNK, of_token, local);
                            split(ds + t * CHUNK, ds_initial + t * CHUNK, of_token, local);
                        }
                    });
            times_columns(p, ld, d_out.data(), chunk, current.d_values + first_key);
            times_columns(ds, CHUNK, q.data(), chunk, current.d_keys + first_key);
            times_rows(ds, CHUNK, current.key_rows, chunk, dq);
            if (two_streams) {
                times_columns(p_initial, CHUNK, d_out.data(), chunk, initial.d_values + first_key);
                times_columns(ds_initial, CHUNK, q.data(), chunk, initial.d_keys + first_key);
                times_rows(ds_initial, CHUNK, initial.key_rows, chunk, dq);
            }
        });
        if (s->sums) own_key_gradients(dq);
        for (Index t = 0; t < num_rows; t++) {
            F* to = static_cast<F*>(x.dq) + query_at(tile_first + t / per_group, t % per_group);
            for (Index d = 0; d < x.head_dim; d++) to[d] = dq[t * depth + d] * scale;
        }
    }

    // `d_out`, and `delta`: what the gradients of a row's probabilities have in common.
    void read_output_gradients() {
        F* to = sized(d_out, num_rows * depth);
        for (Index t = 0; t < num_rows; t++) {
            const Index row = tile_first + t / per_group, r = t % per_group;
            copy_padded(to + t * depth, query_row(x.grad_out, row, r));
            delta[t] = dot(query_row(x.grad_out, row, r), query_row(x.out, row, r));
        }
    }

    void add_slope_gradients(const F* ds, Range chunk) {
        for (Index t = 0; t < num_rows; t++) {
            double sum = 0;  // terms of both signs that nearly cancel
            for_distances(t / per_group, [&](Range range, Index distance) {
                const Range columns = common(range, chunk);
                for (Index c = columns.first; c < columns.stop; c++)
                    sum += double(ds[t * CHUNK + c - chunk.first]) * double(distance - (c - range.first));
            });
            slope_gradients[g * per_group + t % per_group] -= sum;
        }
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
                for (Index d = 0; d < x.head_dim; d++) {
                    dq[t * depth + d] += ds * k_own[d];
                    dk[d] += ds * q_t[d] * scale;
                    dv[d] += own_p[t] * d_o[d];
                }
            }
        }
    }
};

// Tasks 0, 1, ... on all threads: `make()` gives each thread what it calls with them.
template <class Make> struct Tasks {
    const Make& make;
    Index count;
    std::atomic<Index> next{0};
    std::atomic<bool> failed{false};

    static void work(void* tasks) {
        auto& self = *static_cast<Tasks*>(tasks);
        try {
            auto run = self.make();
            for (Index task; (task = self.next++) < self.count;) run(task);
        } catch (const std::bad_alloc&) {
            self.failed = true;
        }
    }
};

// False where memory ran out.
template <class Make> bool run_tasks(const Arguments& x, Index count, const Make& make) {
    Tasks<Make> tasks{make, count};
    const unsigned num_threads = unsigned(max<Index>(1, min(x.num_threads, count)));
    if (num_threads == 1) {
        Tasks<Make>::work(&tasks);
    } else if (x.parallel) {
        using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
        reinterpret_cast<Parallel>(x.parallel)(&Tasks<Make>::work, &tasks, num_threads, 0);
    } else {
        std::vector<std::thread> threads;
        for (unsigned i = 1; i < num_threads; i++) threads.emplace_back(&Tasks<Make>::work, &tasks);
        Tasks<Make>::work(&tasks);
        for (std::thread& thread : threads) thread.join();
    }
    return !tasks.failed;
}

template <class F> bool run_segments(const Arguments& x, const std::vector<Segment>& segments, bool backward, double* slopes) {
    return run_tasks(x, Index(segments.size()) * x.num_groups, [&] {
        return [&, worker = Worker<F>(x, backward)](Index task) mutable {
            const Index segment = task / x.num_groups;
            worker.run(segments[segment], task % x.num_groups, slopes ? slopes + segment * x.num_heads : nullptr);
        };
    });
}

// Gradients of neighbouring keys: sums over segments, in their order. `kind`: 0 keys, 1 values, 2 and 3 those of the initial states.
template <class F>
void sum_gradients(const Arguments& x, const std::vector<Segment>& segments, Range keys, bool of_context, bool of_sums, int kind,
                   F factor, void* tensor) {
    if (!tensor) return;
    const Index row_size = x.num_groups * x.head_dim, depth = padded_depth<F>(x);
    F* to = static_cast<F*>(tensor);
    std::fill(to + keys.first * row_size, to + keys.stop * row_size, F(0));
    for (const Segment& s : segments) {
        if (!(s.sums ? of_sums : of_context)) continue;
        for (const Range& part : {common(s.prefix, keys), common(s.span, keys)})
            for (Index key = part.first; key < part.stop; key++)
                for (Index g = 0; g < x.num_groups; g++) {
                    const Index block = g * 2 * num_streams(x, s.sums) + kind;
                    const F* from = static_cast<const F*>(x.key_gradients) + s.gradients +
                                    (block * s.num_keys + s.local(key)) * depth;
                    F* row = to + key * row_size + g * x.head_dim;
                    for (Index d = 0; d < x.head_dim; d++) row[d] += factor * from[d];
                }
    }
}

template <class F> int forward(const Arguments& x) try {
    return run_segments<F>(x, segments_of<F>(x), false, nullptr) ? 0 : 1;
} catch (const std::bad_alloc&) {
    return 1;
}

template <class F> int backward(const Arguments& x) try {
    const std::vector<Segment> segments = segments_of<F>(x);
    std::vector<double> slopes(x.dslopes ? segments.size() * x.num_heads : 0);
    if (!run_segments<F>(x, segments, true, x.dslopes ? slopes.data() : nullptr)) return 1;
    for (size_t i = 0; i < slopes.size(); i++) x.dslopes[i % x.num_heads] += slopes[i];
    if (x.k_sum) {  // then nobody reads the keys of [SUM] rows
        const Index row_size = x.num_groups * x.head_dim;
        F* dk = static_cast<F*>(x.dk);
        std::fill(dk + x.num_context * row_size, dk + x.num_rows * row_size, F(0));
    }
    constexpr Index KEYS = 64;
    const bool summed = run_tasks(x, (x.num_context + KEYS - 1) / KEYS, [&] {
        return [&](Index task) {
            const Range keys{task * KEYS, min((task + 1) * KEYS, x.num_context)};
            sum_gradients<F>(x, segments, keys, true, !x.k_sum, 0, F(x.scale), x.dk);
            sum_gradients<F>(x, segments, keys, true, true, 1, F(1), x.dv);
            sum_gradients<F>(x, segments, keys, false, true, 0, F(x.scale), x.dk_sum);
            sum_gradients<F>(x, segments, keys, false, true, 2, F(x.scale), x.dk_initial);
            sum_gradients<F>(x, segments, keys, false, true, 3, F(1), x.dv_initial);
        };
    });
    return summed ? 0 : 1;
} catch (const std::bad_alloc&) {
    return 1;
}

}  // namespace

extern "C" {
// 0, or 1 where memory ran out.
int dti_forward_float32(const Arguments* x) { return forward<float>(*x); }
int dti_forward_float64(const Arguments* x) { return forward<double>(*x); }
int dti_backward_float32(const Arguments* x) { return backward<float>(*x); }
int dti_backward_float64(const Arguments* x) { return backward<double>(*x); }
// How many numbers `key_gradients` of a backward must hold.
int64_t dti_key_gradients_float32(const Arguments* x) { return gradients_size<float>(*x); }
int64_t dti_key_gradients_float64(const Arguments* x) { return gradients_size<double>(*x); }
// So that a caller built against another layout of the arguments notices.
int64_t dti_size_of_arguments() { return sizeof(Arguments); }
}
