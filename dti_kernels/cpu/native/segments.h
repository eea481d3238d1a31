// The operator's arguments, and segments: which rows are one task, and which keys it sees.
#pragma once
#include <algorithm>
#include <vector>

#include "vectors.h"

// Mirrored by `_Arguments` in compiled.py. Null pointers are inputs that are off and gradients that nobody asks for.
struct Arguments {
    int64_t num_rows, num_context, num_skipped, num_heads, num_groups, head_dim, num_ratios, num_threads;
    double scale;
    const void *q, *k, *v, *k_sum, *k_initial, *v_initial, *ratios, *slopes;
    const int32_t* rows;  // (7, T), StreamLayout.rows
    void *out, *lse;
    const void* grad_out;
    void *dq, *dk, *dv, *dk_sum, *dk_initial, *dv_initial;
    double* dslopes;  // (H,)
    void* key_gradients;  // memory of the segments' own, `dti_num_gradients` numbers
    void* parallel;  // GOMP_parallel of the OpenMP runtime that PyTorch runs on; null: threads of our own
    int64_t is_cleared;  // whether zeros stand where numbers were not finite: what is not finite now is so by right
};

namespace dti {

using std::max;
using std::min;

// Columns of a layout's rows (layout.py).
enum RowField { PROMPT_FIRST, PREFIX_STOP, START, STOP, RESET_ID };
constexpr int32_t PREFIX_RESET_ID = 1 << 30;

#ifndef DTI_SEGMENT_ROWS  // tests try other sizes
#define DTI_SEGMENT_ROWS 512
#endif
constexpr int SEGMENT_ROWS = DTI_SEGMENT_ROWS;
// [SUM] rows lie an interaction apart: a segment of them ends where it would see many more keys than its first row.
constexpr int SUM_SEGMENT_ROWS = min(96, SEGMENT_ROWS), SUM_SEGMENT_KEYS = 6 * SEGMENT_ROWS;

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
    Index gradients, num_gradients;  // of its keys: where their numbers begin, and how many there are

    Index local(Index key) const { return key < span.first ? key - prefix.first : span_first + key - span.first; }
    Index global(Index key) const { return key < span_first ? prefix.first + key : span.first + key - span_first; }
    Range local(Range keys) const {
        if (keys.empty()) return {0, 0};
        const Index begin = local(keys.first);
        return {begin, begin + keys.size()};
    }
};

struct Row {
    const Arguments& x;
    Index row;
    Index at(int field) const { return x.rows[field * x.num_rows + row]; }
    Range prefix() const { return {at(PROMPT_FIRST), at(PREFIX_STOP)}; }
    Range span() const { return {at(START), at(STOP)}; }
};

// Whether rows see what lies inside the batch, in the order that segments build on: else memory would be read that is nobody's. `check_spans` of
// layout.py asks the same, and says which row is wrong. No branches: a vector of rows at a time.
inline bool is_layout(const Arguments& x) {
#ifdef DTI_UNCHECKED  // a test shows what happens then
    return true;
#endif
    const Index num_rows = x.num_rows, num_context = x.num_context;
    const int32_t* field[5];
    for (int i = 0; i < 5; i++) field[i] = x.rows + i * num_rows;
    const int32_t *first = field[PROMPT_FIRST], *prefix = field[PREFIX_STOP], *start = field[START], *stop = field[STOP];
    const int32_t *reset_id = field[RESET_ID], context = int32_t(num_context);
    int wrong = 0;
    for (Index i = 0; i < num_rows; i++)
        wrong |= (first[i] < 0) | (prefix[i] < first[i]) | (start[i] < prefix[i]) | (stop[i] <= start[i]) | (stop[i] > context) |
                 (reset_id[i] < 0) | (reset_id[i] > PREFIX_RESET_ID);
    for (int32_t i = 0; i < context; i++) wrong |= stop[i] != i + 1;
    for (const Range part : {Range{1, num_context}, Range{num_context + 1, num_rows}})
        for (Index i = part.first; i < part.stop; i++) {
            const int joined = (prefix[i - 1] == first[i - 1]) & (start[i - 1] == first[i - 1]);
            const int same = (first[i] == first[i - 1]) & ((prefix[i] == first[i]) | (prefix[i] == prefix[i - 1]) | joined);
            const int later = (first[i] != first[i - 1]) & (first[i] >= stop[i - 1]);
            wrong |= !(same | later) | (start[i] < start[i - 1]) | (stop[i] < stop[i - 1]);
        }
    return !wrong;
}

template <class F> Index padded_depth(const Arguments& x) { return round_up(x.head_dim, LANES<F>); }

// Gradients that a segment's task sums: keys and values, and those of the initial states.
inline int num_streams(const Arguments& x, bool sums) { return sums && x.k_initial ? 2 : 1; }

template <class F> std::vector<Segment> segments_of(const Arguments& x) {
    std::vector<Segment> segments;
    Index gradients = 0;
    auto add = [&](Index first, Index stop, bool sums) {
        Segment s{first, stop, sums};
        s.prefix = Row{x, first}.prefix();
        s.span = {Row{x, first}.span().first, Row{x, stop - 1}.span().stop};
        s.span_first = round_up(s.prefix.size(), NR<F>);
        s.num_keys = s.span_first + round_up(s.span.size(), NR<F>);
        s.gradients = gradients;
        s.num_gradients = 2 * num_streams(x, sums) * x.num_groups * s.num_keys * padded_depth<F>(x);
        gradients += s.num_gradients;
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

}  // namespace dti
