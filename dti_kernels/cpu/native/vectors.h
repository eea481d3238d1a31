// Vectors of the machine's own width, and what is computed in registers: exponentials and blocks of matrix products.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#if defined(DTI_VECTOR_BYTES)  // a test tries other widths
#elif defined(__AVX512F__)
#define DTI_VECTOR_BYTES 64
#elif defined(__AVX__)
#define DTI_VECTOR_BYTES 32
#else
#define DTI_VECTOR_BYTES 16
#endif

namespace dti {

using Index = int64_t;

constexpr int MR = 6;  // rows of a register block: 6 x 2 accumulators leave room for keys and a query in 16 vector registers

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
    for (int i = 1; i < LANES<F>; i++) most = std::max(most, x[i]);
    return most;
}

// e^x in place for x <= 0, relative error 2e-9 before rounding; below e^-87 it is e^-87. Several vectors at once: one alone is a chain
// of dependent steps that leaves the processor idle.
template <int N> inline void exp_of(V<float> (&x)[N]) {
    using B = Vector<float>::bits;
    const V<float> magic = all(12582912.0f);  // 1.5 x 2^23: adding it rounds to an integer, which the low bits then hold
    const V<float> log2_e = all(1.44269502f), rest = all(1.92596299e-8f);
    constexpr float powers[] = {0.0013399930903688073f, 0.009618489071726799f, 0.05550328642129898f,
                                0.24022646248340607f,   0.6931471824645996f,   1.0f};  // 2^f, |f| <= 1/2
    V<float> shifted[N], f[N], p[N];
    for (int n = 0; n < N; n++) x[n] = x[n] < all(-87.0f) ? all(-87.0f) : x[n];  // lets NaN through
    for (int n = 0; n < N; n++) shifted[n] = x[n] * log2_e + magic;
    for (int n = 0; n < N; n++) f[n] = (x[n] * log2_e - (shifted[n] - magic)) + x[n] * rest;
    for (int n = 0; n < N; n++) p[n] = all(0.0001534580223960802f) * f[n] + all(powers[0]);
#pragma GCC unroll 5
    for (int i = 1; i < 6; i++)
        for (int n = 0; n < N; n++) p[n] = p[n] * f[n] + all(powers[i]);
    for (int n = 0; n < N; n++) x[n] = (V<float>)((B)p[n] + ((B)shifted[n] << 23));
}
template <int N> inline void exp_of(V<double> (&x)[N]) {
    for (int n = 0; n < N; n++)
        for (int i = 0; i < LANES<double>; i++) x[n][i] = std::exp(x[n][i]);
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

// Calls `body` with the number of rows, 1 to MR, as a constant.
template <int M = MR, class Body> inline void with_rows(int count, Body body) {
    if constexpr (M > 1)
        if (count < M) return with_rows<M - 1>(count, body);
    body(std::integral_constant<int, M>{});
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

}  // namespace dti
