// Attention over streaming prompts on CPUs, forward and backward: the mathematics of blocks.py, in registers and caches.
//
//     context row:  s_j = scale q . k_j;   [SUM] row:  s_j = scale q . k~_j - slope dist(j), and itself;   out = softmax(s) v~
//
// Rows are cut into segments of neighbours; a task is one segment and one key head. It packs the keys and values that the segment
// sees (once as rows, once transposed in panels of NR keys), then walks tiles of rows. The scores of a tile's rows with all of their
// keys stay in the L2 cache, so softmax needs no running maximum. Six rows by NR keys are one register block (sixteen, where the
// processor has matrix tiles), and only blocks that some row sees are computed. Gradients of keys go to memory of their segment's own
// and are summed segment after segment: results do not depend on the number of threads.
//
// Time O(T (window + block)), memory O(T) beside a tile of scores per thread. Built by build.py, called by compiled.py.
#include <atomic>
#include <exception>
#include <thread>

#include "worker.h"

namespace {

using namespace dti;

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
        } catch (const std::exception&) {  // no memory, or more of it than there can be
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
        try {
            for (unsigned i = 1; i < num_threads; i++) threads.emplace_back(&Tasks<Make>::work, &tasks);
        } catch (const std::exception&) {  // a limit of threads: those that there are do all tasks
        }
        Tasks<Make>::work(&tasks);
        for (std::thread& thread : threads) thread.join();
    }
    return !tasks.failed;
}

// The result of a pass. NOT_FINITE: numbers that are not finite reach rows which do not see them, and the outputs are void.
enum Status { DONE, NO_MEMORY, NO_LAYOUT, NOT_FINITE };

template <class S> Status run_segments(const Arguments& x, const std::vector<Segment>& segments, bool backward, double* slopes) {
    std::atomic<bool> not_finite{false};
    const bool done = run_tasks(x, Index(segments.size()) * x.num_groups, [&] {
        return [&, worker = Worker<S>(x, backward, not_finite)](Index task) mutable {
            const Index segment = task / x.num_groups;
            worker.run(segments[segment], task % x.num_groups, slopes ? slopes + segment * x.num_heads : nullptr);
        };
    });
    return !done ? NO_MEMORY : not_finite && !x.is_cleared ? NOT_FINITE : DONE;
}

// Gradients of neighbouring keys: sums over segments, in their order. `kind`: 0 keys, 1 values, 2 and 3 those of the initial states.
template <class S>
void sum_gradients(const Arguments& x, const std::vector<Segment>& segments, Range keys, bool of_context, bool of_sums, int kind,
                   Sum<S> factor, void* tensor) {
    using F = Sum<S>;
    if (!tensor) return;
    const Index row_size = x.num_groups * x.head_dim, depth = padded_depth<F>(x);
    S* to = static_cast<S*>(tensor) + keys.first * row_size;
    std::vector<F> memory(ROUNDS<S> ? keys.size() * row_size : 0);
    F* sums;
    if constexpr (ROUNDS<S>) sums = memory.data();
    else sums = to;
    std::fill(sums, sums + keys.size() * row_size, F(0));
    for (const Segment& s : segments) {
        if (!(s.sums ? of_sums : of_context)) continue;
        for (const Range& part : {common(s.prefix, keys), common(s.span, keys)})
            for (Index key = part.first; key < part.stop; key++)
                for (Index g = 0; g < x.num_groups; g++) {
                    const Index block = g * 2 * num_streams(x, s.sums) + kind;
                    const F* from = static_cast<const F*>(x.key_gradients) + s.gradients +
                                    (block * s.num_keys + s.local(key)) * depth;
                    F* row = sums + (key - keys.first) * row_size + g * x.head_dim;
                    for (Index d = 0; d < x.head_dim; d++) row[d] += factor * from[d];
                }
    }
    narrow(to, sums, keys.size() * row_size);
}

// A status that is not DONE as a negative number.
template <class S> int64_t num_gradients(const Arguments& x) try {
    if (!is_layout(x)) return -NO_LAYOUT;
    const std::vector<Segment> segments = segments_of<Sum<S>>(x);
    return segments.empty() ? 0 : segments.back().gradients + segments.back().num_gradients;
} catch (const std::exception&) {
    return -NO_MEMORY;
}

template <class S> int forward(const Arguments& x) try {
    if (!is_layout(x)) return NO_LAYOUT;
    return run_segments<S>(x, segments_of<Sum<S>>(x), false, nullptr);
} catch (const std::exception&) {
    return NO_MEMORY;
}

template <class S> int backward(const Arguments& x) try {
    if (!is_layout(x)) return NO_LAYOUT;
    const std::vector<Segment> segments = segments_of<Sum<S>>(x);
    std::vector<double> slopes(x.dslopes ? segments.size() * x.num_heads : 0);
    const Status status = run_segments<S>(x, segments, true, x.dslopes ? slopes.data() : nullptr);
    if (status != DONE) return status;
    for (size_t i = 0; i < slopes.size(); i++) x.dslopes[i % x.num_heads] += slopes[i];
    if (x.k_sum) {  // then nobody reads the keys of [SUM] rows
        const Index row_size = x.num_groups * x.head_dim;
        S* dk = static_cast<S*>(x.dk);
        std::memset(dk + x.num_context * row_size, 0, (x.num_rows - x.num_context) * row_size * sizeof(S));
    }
    constexpr Index KEYS = 64;
    const bool summed = run_tasks(x, (x.num_context + KEYS - 1) / KEYS, [&] {
        return [&](Index task) {
            const Range keys{task * KEYS, min((task + 1) * KEYS, x.num_context)};
            sum_gradients<S>(x, segments, keys, true, !x.k_sum, 0, Sum<S>(x.scale), x.dk);
            sum_gradients<S>(x, segments, keys, true, true, 1, 1, x.dv);
            sum_gradients<S>(x, segments, keys, false, true, 0, Sum<S>(x.scale), x.dk_sum);
            sum_gradients<S>(x, segments, keys, false, true, 2, Sum<S>(x.scale), x.dk_initial);
            sum_gradients<S>(x, segments, keys, false, true, 3, 1, x.dv_initial);
        };
    });
    return summed ? DONE : NO_MEMORY;
} catch (const std::exception&) {
    return NO_MEMORY;
}

}  // namespace

extern "C" {
// A `Status`.
int dti_forward_float32(const Arguments* x) { return forward<float>(*x); }
int dti_forward_float64(const Arguments* x) { return forward<double>(*x); }
int dti_backward_float32(const Arguments* x) { return backward<float>(*x); }
int dti_backward_float64(const Arguments* x) { return backward<double>(*x); }
// How many numbers `key_gradients` of a backward must hold; of bfloat16 those of float32.
int64_t dti_num_gradients_float32(const Arguments* x) { return num_gradients<float>(*x); }
int64_t dti_num_gradients_float64(const Arguments* x) { return num_gradients<double>(*x); }
#ifdef DTI_BFLOAT16  // only where the processor multiplies it: elsewhere tensors are widened
int dti_forward_bfloat16(const Arguments* x) { return forward<bfloat16>(*x); }
int dti_backward_bfloat16(const Arguments* x) { return backward<bfloat16>(*x); }
#endif
// So that a caller built against another layout of the arguments notices.
int64_t dti_size_of_arguments() { return sizeof(Arguments); }
}
