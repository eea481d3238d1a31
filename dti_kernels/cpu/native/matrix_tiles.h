// Products of bfloat16 in the processor's matrix tiles (AMX): sixteen rows of sixteen sums, and sixteen steps of each, at once.
#pragma once
#include "products.h"

#if defined(DTI_EMULATE_TILES) && DTI_VECTOR_BYTES == 64  // a test has them on any processor
#define DTI_TILES
#elif defined(__AMX_BF16__) && defined(__linux__) && defined(DTI_BFLOAT16) && DTI_VECTOR_BYTES == 64 && !defined(DTI_NO_TILES)
#define DTI_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dti {

constexpr int TILE = 16;  // rows of a tile, and numbers of four bytes in a row: sums, or steps
#ifdef DTI_TILES
template <class S> constexpr bool TILED = std::is_same_v<S, bfloat16>;
#else
template <class S> constexpr bool TILED = false;
#endif
// Rows that tiles may read and write beyond the last: what they hold is nobody's.
template <class S> constexpr Index SPARE_ROWS = TILED<S> ? TILE : 0;

#ifdef DTI_TILES
#ifdef DTI_EMULATE_TILES
struct Tile {
    uint32_t of[TILE][TILE];
};
inline Tile& tile(int number) {
    static thread_local Tile tiles[8];
    return tiles[number];
}
template <int T> inline void tile_zero() { tile(T) = {}; }
template <int T> inline void tile_load(const void* from, Index stride) {
    for (int i = 0; i < TILE; i++) std::memcpy(tile(T).of[i], static_cast<const char*>(from) + i * stride, 4 * TILE);
}
template <int T> inline void tile_store(void* to, Index stride) {
    for (int i = 0; i < TILE; i++) std::memcpy(static_cast<char*>(to) + i * stride, tile(T).of[i], 4 * TILE);
}
template <int SUMS, int A, int B> inline void tile_multiply_add() {
    for (int i = 0; i < TILE; i++) {
        V<float> sums = (V<float>)load(tile(SUMS).of[i]);
        for (int t = 0; t < TILE; t++) multiply_add(sums, all(tile(A).of[i][t]), load(tile(B).of[t]));
        store(tile(SUMS).of[i], (Words)sums);
    }
}
inline bool has_tiles() { return true; }
inline void configure_tiles() {}
inline void release_tiles() {}
#else
// One tile's number has to be in the instruction's text. They are volatile and touch memory: compilers keep them in their order and place.
#define DTI_EACH_TILE(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
template <int T> inline void tile_zero() {
#define DTI_ZERO(t) if constexpr (T == t) asm volatile("tilezero %%tmm" #t ::: "memory");
    DTI_EACH_TILE(DTI_ZERO)
}
template <int T> inline void tile_load(const void* from, Index stride) {
#define DTI_LOAD(t) if constexpr (T == t) asm volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(from), "r"(stride) : "memory");
    DTI_EACH_TILE(DTI_LOAD)
}
template <int T> inline void tile_store(void* to, Index stride) {
#define DTI_STORE(t) if constexpr (T == t) asm volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(to), "r"(stride) : "memory");
    DTI_EACH_TILE(DTI_STORE)
}
template <int SUMS, int A, int B> inline void tile_multiply_add() {
    static_assert(SUMS < 4 && A == 4 && B > 4);
#define DTI_MULTIPLY(s, b) if constexpr (SUMS == s && B == b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm4, %%tmm" #s ::: "memory");
#define DTI_MULTIPLY_BY(s) DTI_MULTIPLY(s, 5) DTI_MULTIPLY(s, 6) DTI_MULTIPLY(s, 7)
    DTI_MULTIPLY_BY(0) DTI_MULTIPLY_BY(1) DTI_MULTIPLY_BY(2) DTI_MULTIPLY_BY(3)
}
// Whether the kernel lets this process use them: it keeps their eight kilobytes only for those that have asked.
inline bool has_tiles() {
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    static const bool permitted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    return permitted;
}
inline void configure_tiles() {
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    } shapes;
    for (int t = 0; t < 8; t++) {
        shapes.bytes[t] = 4 * TILE;
        shapes.rows[t] = TILE;
    }
    asm volatile("ldtilecfg %0" ::"m"(shapes));
}
inline void release_tiles() { asm volatile("tilerelease"); }
#endif

// A thread's tiles, as long as this lives.
struct TilesInUse {
    const bool used;
    explicit TilesInUse(bool use) : used(use) {
        if (used) configure_tiles();
    }
    TilesInUse(const TilesInUse&) = delete;
    ~TilesInUse() {
        if (used) release_tiles();
    }
};

// c (TILE x 2 TILE) = a (TILE x steps) . panel (steps x 2 TILE); `steps`: a multiple of TILE
inline void tile_scores(const uint32_t* a, Index lda, const uint32_t* panel, Index steps, float* c, Index ldc) {
    constexpr Index WIDTH = 2 * TILE, SIZE = sizeof(float);
    tile_zero<0>();
    tile_zero<1>();
    for (Index d = 0; d < steps; d += TILE, panel += TILE * WIDTH) {
        tile_load<4>(a + d, lda * SIZE);
        tile_load<5>(panel, WIDTH * SIZE);
        tile_load<6>(panel + TILE, WIDTH * SIZE);
        tile_multiply_add<0, 4, 5>();
        tile_multiply_add<1, 4, 6>();
    }
    tile_store<0>(c, ldc * SIZE);
    tile_store<1>(c + TILE, ldc * SIZE);
}

// c (TILE x N tiles) += p (TILE x count) . b (count x N tiles); `count` steps: a multiple of TILE
template <int N>
inline void tile_accumulate_block(const uint32_t* p, Index ldp, const uint32_t* b, Index ldb, Index count, float* c, Index ldc) {
    constexpr Index SIZE = sizeof(float);
    tile_load<0>(c, ldc * SIZE);
    tile_load<1>(c + TILE, ldc * SIZE);
    if constexpr (N > 2) {
        tile_load<2>(c + 2 * TILE, ldc * SIZE);
        tile_load<3>(c + 3 * TILE, ldc * SIZE);
    }
    for (Index t = 0; t < count; t += TILE, b += TILE * ldb) {
        tile_load<4>(p + t, ldp * SIZE);
        tile_load<5>(b, ldb * SIZE);
        tile_multiply_add<0, 4, 5>();
        tile_load<6>(b + TILE, ldb * SIZE);
        tile_multiply_add<1, 4, 6>();
        if constexpr (N > 2) {
            tile_load<7>(b + 2 * TILE, ldb * SIZE);
            tile_multiply_add<2, 4, 7>();
            tile_load<5>(b + 3 * TILE, ldb * SIZE);
            tile_multiply_add<3, 4, 5>();
        }
    }
    tile_store<0>(c, ldc * SIZE);
    tile_store<1>(c + TILE, ldc * SIZE);
    if constexpr (N > 2) {
        tile_store<2>(c + 2 * TILE, ldc * SIZE);
        tile_store<3>(c + 3 * TILE, ldc * SIZE);
    }
}

// The same over all of a row's `depth` numbers, a multiple of 2 TILE.
inline void tile_accumulate(const uint32_t* p, Index ldp, const uint32_t* b, Index count, float* c, Index depth) {
    Index d = 0;
    for (; d + 4 * TILE <= depth; d += 4 * TILE) tile_accumulate_block<4>(p, ldp, b + d, depth, count, c + d, depth);
    if (d < depth) tile_accumulate_block<2>(p, ldp, b + d, depth, count, c + d, depth);
}
#else
struct TilesInUse {
    explicit TilesInUse(bool) {}
};
inline bool has_tiles() { return false; }
#endif

}  // namespace dti
