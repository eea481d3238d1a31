// Blocks of matrix products in registers, from steps of what is multiplied: single numbers, or pairs of bfloat16.
#pragma once
#include "vectors.h"

namespace dti {

constexpr int MR = 6;  // rows of a register block: 6 x 2 accumulators leave room for keys and a query in 16 vector registers

// One step of a sum of products: a number, or two bfloat16 numbers side by side, the first in the lower half, which processors multiply and add
// at once.
template <class S> struct Stepped {
    using type = S;
};
template <> struct Stepped<bfloat16> {
    using type = uint32_t;
};
template <class S> using Step = typename Stepped<S>::type;
template <class S> constexpr int PER_STEP = sizeof(Step<S>) / sizeof(S);

inline void multiply_add(V<float>& sum, V<float> a, V<float> b) { sum += a * b; }
inline void multiply_add(V<double>& sum, V<double> a, V<double> b) { sum += a * b; }
#if defined(DTI_WIDEN_BFLOAT16)  // a test does without the instructions
#elif defined(__AVX512BF16__) && DTI_VECTOR_BYTES == 64
#define DTI_BFLOAT16
inline void multiply_add(V<float>& sum, Words a, Words b) {
    sum = (V<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) && DTI_VECTOR_BYTES == 16
#define DTI_BFLOAT16
inline void multiply_add(V<float>& sum, Words a, Words b) {
    const bfloat16x8_t pairs[2] = {vreinterpretq_bf16_u32((uint32x4_t)a), vreinterpretq_bf16_u32((uint32x4_t)b)};
    sum = (V<float>)vbfdotq_f32((float32x4_t)sum, pairs[0], pairs[1]);
}
#elif defined(DTI_EMULATE_BFLOAT16)  // a test has the pairs on any processor
#define DTI_BFLOAT16
inline void multiply_add(V<float>& sum, Words a, Words b) {
    sum += (V<float>)(a << 16) * (V<float>)(b << 16);
    sum += (V<float>)(a & 0xffff0000) * (V<float>)(b & 0xffff0000);
}
#endif

// Pairs of the numbers of two rows: n, a multiple of vectors.
inline void interleave(const bfloat16* a, const bfloat16* b, uint32_t* to, Index n) {
    for (Index i = 0; i < n; i += LANES<float>) store(to + i, load_halves(a + i) | load_halves(b + i) << 16);
}

// c (M x NR) = a (M x depth) . panel (depth x NR), a and the panel in steps; so are lda and depth
template <class S, int M>
inline void scores_block(const Step<S>* a, Index lda, const Step<S>* panel, Index depth, Sum<S>* c, Index ldc) {
    using F = Sum<S>;
    V<F> acc[M][2] = {};
    for (Index d = 0; d < depth; d++, panel += NR<F>) {
        const V<Step<S>> b0 = load(panel), b1 = load(panel + LANES<F>);
#pragma GCC unroll 6
        for (int m = 0; m < M; m++) {
            const V<Step<S>> x = all(a[m * lda + d]);
            multiply_add(acc[m][0], x, b0);
            multiply_add(acc[m][1], x, b1);
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; m++) {
        store(c + m * ldc, acc[m][0]);
        store(c + m * ldc + LANES<F>, acc[m][1]);
    }
}

// c (M x N vectors) += sum over steps t < count of p(m, t) b (count x N vectors); p(m, t) is p[m ldp + t], or p[t ldp + m] by column.
template <class S, int M, int N, bool BY_COLUMN>
inline void accumulate_block(const Step<S>* p, Index ldp, const Step<S>* b, Index ldb, Index count, Sum<S>* c, Index ldc) {
    using F = Sum<S>;
    V<F> acc[M][N] = {};  // added to c at the end: fewer roundings at the size of c
    for (Index t = 0; t < count; t++, b += ldb) {
        V<Step<S>> b_n[N];
#pragma GCC unroll 2
        for (int n = 0; n < N; n++) b_n[n] = load(b + n * LANES<F>);
#pragma GCC unroll 6
        for (int m = 0; m < M; m++) {
            const V<Step<S>> x = all(BY_COLUMN ? p[t * ldp + m] : p[m * ldp + t]);
#pragma GCC unroll 2
            for (int n = 0; n < N; n++) multiply_add(acc[m][n], x, b_n[n]);
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
template <class S, bool BY_COLUMN>
inline void accumulate(int rows, const Step<S>* p, Index ldp, const Step<S>* b, Index count, Sum<S>* c, Index depth) {
    constexpr int WIDTH = NR<Sum<S>>;
    with_rows(rows, [&](auto m) {
        Index d = 0;
        for (; d + WIDTH <= depth; d += WIDTH)
            accumulate_block<S, m(), 2, BY_COLUMN>(p, ldp, b + d, depth, count, c + d, depth);
        if (d < depth) accumulate_block<S, m(), 1, BY_COLUMN>(p, ldp, b + d, depth, count, c + d, depth);
    });
}

}  // namespace dti
