// Vectors of the machine's own width: numbers from memory and back, sums and exponentials.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(DTI_VECTOR_BYTES)  // a test tries other widths
#elif defined(__AVX512F__)
#define DTI_VECTOR_BYTES 64
#elif defined(__AVX__)
#define DTI_VECTOR_BYTES 32
#else
#define DTI_VECTOR_BYTES 16
#endif
#if defined(__AVX512F__) && DTI_VECTOR_BYTES == 64
#include <immintrin.h>
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) && DTI_VECTOR_BYTES == 16
#include <arm_neon.h>
#endif

namespace dti {

using Index = int64_t;

// The upper half of a float: tensors hold it, sums are float.
struct bfloat16 {
    uint16_t bits;
};
template <class S> struct Accumulated {
    using type = S;
};
template <> struct Accumulated<bfloat16> {
    using type = float;
};
// Numbers S of tensors are summed, and given to softmax, as Sum<S>.
template <class S> using Sum = typename Accumulated<S>::type;
template <class S> constexpr bool ROUNDS = !std::is_same_v<S, Sum<S>>;  // what is multiplied by S is rounded to S first

template <class F> struct Vector;
template <> struct Vector<float> {
    typedef float type __attribute__((vector_size(DTI_VECTOR_BYTES)));
    typedef float unaligned __attribute__((vector_size(DTI_VECTOR_BYTES), aligned(4), may_alias));
    typedef int32_t bits __attribute__((vector_size(DTI_VECTOR_BYTES)));
    typedef uint32_t words __attribute__((vector_size(DTI_VECTOR_BYTES)));
    typedef uint16_t halves __attribute__((vector_size(DTI_VECTOR_BYTES / 2)));
};
template <> struct Vector<double> {
    typedef double type __attribute__((vector_size(DTI_VECTOR_BYTES)));
    typedef double unaligned __attribute__((vector_size(DTI_VECTOR_BYTES), aligned(8), may_alias));
    typedef int64_t bits __attribute__((vector_size(DTI_VECTOR_BYTES)));
};
using Words = Vector<float>::words;
template <> struct Vector<uint32_t> {
    using type = Words;
    using bits = Words;
    typedef uint32_t unaligned __attribute__((vector_size(DTI_VECTOR_BYTES), aligned(4), may_alias));
};
template <class F> using V = typename Vector<F>::type;
template <class F> constexpr int LANES = DTI_VECTOR_BYTES / int(sizeof(F));
template <class F> constexpr int NR = 2 * LANES<F>;  // keys of a panel

template <class F> inline V<F> load(const F* x) { return *reinterpret_cast<const typename Vector<F>::unaligned*>(x); }
template <class F> inline void store(F* x, V<F> value) { *reinterpret_cast<typename Vector<F>::unaligned*>(x) = value; }
template <class F> inline V<F> all(F x) { return x - V<F>{}; }

inline Words load_halves(const bfloat16* x) {
#if defined(__AVX512F__) && DTI_VECTOR_BYTES == 64  // compilers convert half a vector at a time
    return (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
#else
    Vector<float>::halves halves;
    std::memcpy(&halves, x, sizeof halves);
    return __builtin_convertvector(halves, Words);
#endif
}
inline V<float> load(const bfloat16* x) { return (V<float>)(load_halves(x) << 16); }
// Rounds to the nearest, ties to even; NaN stays NaN.
inline Words upper_halves(V<float> x) {
    const Words bits = (Words)x;
    return (x == x ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000) >> 16;
}
inline void store(bfloat16* x, V<float> value) {
#if defined(__AVX512BF16__) && DTI_VECTOR_BYTES == 64
    const __m256bh halves = _mm512_cvtneps_pbh((__m512)value);
#else
    const Vector<float>::halves halves = __builtin_convertvector(upper_halves(value), Vector<float>::halves);
#endif
    std::memcpy(x, &halves, sizeof halves);
}

template <class F> inline F wide(F x) { return x; }
inline float wide(bfloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
// n sums as numbers of a tensor; `to` may be `from`.
template <class F> inline void narrow(F* to, const F* from, Index n) {
    if (to != from) std::memcpy(to, from, n * sizeof(F));
}
inline void narrow(bfloat16* to, const float* from, Index n) {
    Index i = 0;
    for (; i + LANES<float> <= n; i += LANES<float>) store(to + i, load(from + i));
    if (i == n) return;
    float last[LANES<float>] = {};
    bfloat16 rounded[LANES<float>];
    std::memcpy(last, from + i, (n - i) * sizeof(float));
    store(rounded, load(last));
    std::memcpy(to + i, rounded, (n - i) * sizeof(bfloat16));
}

// The lower or the upper halves of two vectors, element by element in turns.
template <class F, bool UPPER, int... I> inline V<F> mixed(V<F> a, V<F> b, std::integer_sequence<int, I...>) {
    constexpr int FIRST = UPPER ? LANES<F> / 2 : 0;
#ifdef __clang__
    return __builtin_shufflevector(a, b, (FIRST + I / 2 + I % 2 * LANES<F>)...);
#else
    return __builtin_shuffle(a, b, typename Vector<F>::bits{(FIRST + I / 2 + I % 2 * LANES<F>)...});
#endif
}
// to (LANES rows, `ldt` apart) = from (likewise, `ldf` apart), transposed. Every round halves the distance between a column's elements.
template <class F> inline void transpose(const F* from, Index ldf, F* to, Index ldt) {
    constexpr std::make_integer_sequence<int, LANES<F>> ALL;
    V<F> x[LANES<F>], y[LANES<F>];
    for (int i = 0; i < LANES<F>; i++) x[i] = load(from + i * ldf);
    for (int distance = LANES<F> / 2; distance; distance /= 2) {
        for (int i = 0; i < LANES<F> / 2; i++) {
            y[2 * i] = mixed<F, false>(x[i], x[i + LANES<F> / 2], ALL);
            y[2 * i + 1] = mixed<F, true>(x[i], x[i + LANES<F> / 2], ALL);
        }
        for (int i = 0; i < LANES<F>; i++) x[i] = y[i];
    }
    for (int i = 0; i < LANES<F>; i++) store(to + i * ldt, x[i]);
}

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

// Both in fewer dependent steps, where there is an instruction for each.
inline float folded_sum_of(V<float> x) {
#if defined(__AVX512F__) && DTI_VECTOR_BYTES == 64
    return _mm512_reduce_add_ps((__m512)x);
#else
    return sum_of<float>(x);
#endif
}
inline float folded_max_of(V<float> x) {
#if defined(__AVX512F__) && DTI_VECTOR_BYTES == 64
    return _mm512_reduce_max_ps((__m512)x);
#else
    return max_of<float>(x);
#endif
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

}  // namespace dti
