/* Products of rows of half precision with one such row: the bits of ggml's own, in less time.
 *
 * That is what the attention of a single token consists of: each of its heads meets the key of
 * every position, a row of some hundred bytes.  ggml calls a function for each of them, which ends
 * with adding up the lanes of a register, step by step.  Here the lanes of many rows are added up
 * together.
 *
 * The bits are ggml's because each number is: a row has four sums of as many lanes as ggml was
 * built for (16 with AVX-512, else 8), each lane one chain of fused multiplications and additions,
 * and all of them are added in ggml's order.  kernels.py compares before use.
 */

#include "matmul.h"

#include <immintrin.h>

enum { SUMS = 4 }; /* of a row, side by side */
#if defined(__AVX512F__)
enum { LANES_MAX = 16 };
#else
enum { LANES_MAX = 8 };
#endif

#define ALWAYS_INLINE static inline __attribute__((always_inline))

ALWAYS_INLINE int64_t least(int64_t one, int64_t other) {
    return one < other ? one : other;
}

/* --- 8 lanes --- */

ALWAYS_INLINE __m256 load_8(const uint16_t *halves) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)halves));
}

/* The lanes of one row: `k` is a multiple of SUMS * 8. */
ALWAYS_INLINE __m256 lanes_8(const uint16_t *a, const uint16_t *b, int64_t k) {
    __m256 sums[SUMS] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(),
                         _mm256_setzero_ps()};
    for (int64_t i = 0; i < k; i += SUMS * 8) {
        for (int j = 0; j < SUMS; j++) {
            sums[j] = _mm256_fmadd_ps(load_8(a + i + 8 * j), load_8(b + i + 8 * j), sums[j]);
        }
    }
    return _mm256_add_ps(_mm256_add_ps(sums[0], sums[2]), _mm256_add_ps(sums[1], sums[3]));
}

/* Up to 8 rows: upper and lower half of a row's lanes, then neighbours twice. */
ALWAYS_INLINE void group_8(const uint16_t *a, int64_t lda, int64_t n_rows, const uint16_t *b,
                           int64_t k, float *c) {
    __m256 halves[4];
    for (int i = 0; i < 4; i++) {
        __m256 one = lanes_8(a + least(i, n_rows - 1) * lda, b, k);
        __m256 other = lanes_8(a + least(i + 4, n_rows - 1) * lda, b, k);
        halves[i] = _mm256_add_ps(_mm256_permute2f128_ps(one, other, 0x20),
                                  _mm256_permute2f128_ps(one, other, 0x31));
    }
    __m256 pairs = _mm256_hadd_ps(halves[0], halves[1]);
    __m256 sums = _mm256_hadd_ps(pairs, _mm256_hadd_ps(halves[2], halves[3]));
    if (n_rows == 8) {
        _mm256_storeu_ps(c, sums);
        return;
    }
    float all[8];
    _mm256_storeu_ps(all, sums);
    for (int64_t row = 0; row < n_rows; row++) {
        c[row] = all[row];
    }
}

/* --- 16 lanes --- */

#if defined(__AVX512F__)

ALWAYS_INLINE __m512 load_16(const uint16_t *halves) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)halves));
}

/* The lanes of four rows, so that `b` is converted once for them; `k` is a multiple of SUMS * 16. */
ALWAYS_INLINE void lanes_16(__m512 lanes[4], const uint16_t *const rows[4], const uint16_t *b,
                            int64_t k) {
    __m512 sums[4][SUMS];
    for (int row = 0; row < 4; row++) {
        for (int j = 0; j < SUMS; j++) {
            sums[row][j] = _mm512_setzero_ps();
        }
    }
    for (int64_t i = 0; i < k; i += SUMS * 16) {
#pragma GCC unroll 4
        for (int j = 0; j < SUMS; j++) {
            __m512 others = load_16(b + i + 16 * j);
#pragma GCC unroll 4
            for (int row = 0; row < 4; row++) {
                __m512 values = load_16(rows[row] + i + 16 * j);
                sums[row][j] = _mm512_fmadd_ps(values, others, sums[row][j]);
            }
        }
    }
    for (int row = 0; row < 4; row++) {
        lanes[row] = _mm512_add_ps(_mm512_add_ps(sums[row][0], sums[row][2]),
                                   _mm512_add_ps(sums[row][1], sums[row][3]));
    }
}

/* Two registers become one: in each, lanes are added to those half as many further on.  Rows lie
 * behind each other in quarters of a register until it is a quarter's own lanes that are added. */
ALWAYS_INLINE __m512 add_halves(__m512 one, __m512 other) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(one, other, 0x44),
                         _mm512_shuffle_f32x4(one, other, 0xee));
}

ALWAYS_INLINE __m512 add_quarters(__m512 one, __m512 other) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(one, other, 0x88),
                         _mm512_shuffle_f32x4(one, other, 0xdd));
}

ALWAYS_INLINE __m512 add_pairs(__m512 one, __m512 other) {
    return _mm512_add_ps(_mm512_shuffle_ps(one, other, 0x44), _mm512_shuffle_ps(one, other, 0xee));
}

ALWAYS_INLINE __m512 add_neighbours(__m512 one, __m512 other) {
    return _mm512_add_ps(_mm512_shuffle_ps(one, other, 0x88), _mm512_shuffle_ps(one, other, 0xdd));
}

/* Up to 16 rows.  After the additions quarter j of a register has rows i, of four that were taken
 * together, as its lanes: so row 4 j + i is the j-th of the i-th four. */
ALWAYS_INLINE void group_16(const uint16_t *a, int64_t lda, int64_t n_rows, const uint16_t *b,
                            int64_t k, float *c) {
    __m512 fours[4];
    for (int i = 0; i < 4; i++) {
        const uint16_t *rows[4];
        for (int j = 0; j < 4; j++) {
            rows[j] = a + least(4 * j + i, n_rows - 1) * lda;
        }
        __m512 lanes[4];
        lanes_16(lanes, rows, b, k);
        fours[i] = add_quarters(add_halves(lanes[0], lanes[1]), add_halves(lanes[2], lanes[3]));
    }
    __m512 sums = add_neighbours(add_pairs(fours[0], fours[1]), add_pairs(fours[2], fours[3]));
    _mm512_mask_storeu_ps(c, (__mmask16)((1u << n_rows) - 1), sums);
}

#endif

bool shardmesh_f16_multiply(int lanes, const ggml_compute_params *params, int64_t m, int64_t k,
                            const uint16_t *a, int64_t lda, const uint16_t *b, float *c) {
    if (lanes > LANES_MAX || k % (SUMS * lanes) != 0) { /* ggml adds a remainder one by one */
        return false;
    }
    int64_t end = m * (params->ith + 1) / params->nth;
    for (int64_t row = m * params->ith / params->nth; row < end; row += lanes) {
        int64_t n_rows = least(lanes, end - row);
#if defined(__AVX512F__)
        if (lanes == 16) {
            group_16(a + row * lda, lda, n_rows, b, k, c + row);
            continue;
        }
#endif
        group_8(a + row * lda, lda, n_rows, b, k, c + row);
    }
    return true;
}
