/* Products of Q8_0 weights with rows of activations: the bits of ggml's own, in less time.
 *
 * ggml looks the scale of each block up in a table of 256 KB, which has to share the cache with the
 * weights, and reads each row of weights anew for every few rows of activations.  Here scales are
 * converted, and a row of weights meets up to eight rows of activations at once.
 *
 * The bits are ggml's because nothing of its arithmetic is changed: the products within a block are
 * whole numbers, whose order cannot matter; each of eight lanes takes four neighbours of a block,
 * the blocks follow each other in one chain of fused multiplications and additions, with the scales
 * multiplied first, and the lanes are added in the same order.  kernels.py compares before use.
 */

#include "matmul.h"

#include <immintrin.h>

enum { BLOCK = 32, LANES = 8 };
enum { BLOCK_BYTES = BLOCK + LANES * sizeof(float) }; /* of one block of activations, laid out */
enum { TILE = 8 };      /* rows of activations that meet a row of weights at once */
enum { TILES_MAX = 8 }; /* that are laid out before the weights are gone through */
enum { ROWS_NEAR = 16 }; /* rows of weights that stay in the cache for all these tiles */
enum { ROOM = 256 * 1024 }; /* bytes of the stack, for activations; threads have megabytes */
enum { NEAR = 24 * 1024 };  /* bytes of a tile that leave room in the first cache for weights */
enum { AHEAD = 4096 };      /* bytes that weights are fetched ahead of their use */

/* Up to TILE rows of activations, block by block, so that they are read in one go. */
typedef struct {
    int n;           /* rows in use */
    int width;       /* rows laid out: 1, 2, 4 or 8 */
    uint8_t *quants; /* (blocks, width, BLOCK), as `dot` wants them */
    float *scales;   /* (blocks, width, LANES): each as often as there are lanes */
} tile;

static float to_float(uint16_t half) {
    return _cvtsh_ss(half);
}

#if (defined(__AVX512VNNI__) && defined(__AVX512VL__)) || defined(__AVXVNNI__)

/* The instruction multiplies bytes without sign by bytes with one: 128 is added to activations,
 * and what that makes of a block's products is subtracted beforehand, once for all of a tile. */
static const uint8_t ADDED = 128;

static inline __m256i multiply_add(__m256i sum, __m256i without_sign, __m256i with_sign) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sum, without_sign, with_sign);
#else
    return _mm256_dpbusd_epi32(sum, without_sign, with_sign);
#endif
}

static inline __m256i prepare(__m256i weights) {
    __m256i zero = _mm256_setzero_si256();
    return _mm256_sub_epi32(zero, multiply_add(zero, _mm256_set1_epi8((char)ADDED), weights));
}

static inline __m256i dot(__m256i weights, __m256i prepared, __m256i activations) {
    return multiply_add(prepared, activations, weights);
}

#else

/* The sign goes over to the activations, which are never -128; two products fit into 16 bits. */
static const uint8_t ADDED = 0;

static inline __m256i prepare(__m256i weights) {
    return _mm256_sign_epi8(weights, weights);
}

static inline __m256i dot(__m256i weights, __m256i prepared, __m256i activations) {
    __m256i pairs = _mm256_maddubs_epi16(prepared, _mm256_sign_epi8(activations, weights));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

#endif

static inline float sum_of_lanes(__m256 lanes) {
    __m128 four = _mm_add_ps(_mm256_extractf128_ps(lanes, 1), _mm256_castps256_ps128(lanes));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* `n_rows` rows of weights times `width` rows of activations; both numbers are known when this is
 * compiled, so that all sums stay in registers. */
static inline __attribute__((always_inline)) void multiply(const int n_rows, const int width,
                                                           const block_q8_0 *weights, int64_t lda,
                                                           int64_t k, const tile *tile, float *c,
                                                           int64_t ldc) {
    __m256 sums[2][TILE];
    for (int row = 0; row < n_rows; row++) {
        for (int column = 0; column < width; column++) {
            sums[row][column] = _mm256_setzero_ps();
        }
    }
    /* The next rows, where several are read side by side. */
    int64_t ahead = n_rows == 1 ? AHEAD : n_rows * lda * (int64_t)sizeof(block_q8_0) + AHEAD / 2;
    const uint8_t *quants = tile->quants;
    const float *scales = tile->scales;
    for (int64_t i = 0; i < k; i++) {
#pragma GCC unroll 2
        for (int row = 0; row < n_rows; row++) {
            const block_q8_0 *block = weights + row * lda + i;
            /* A single token needs each weight once: it shall drive nothing else out of the caches,
             * or whatever is done between two tokens begins with waiting for memory. */
            if (width == 1) {
                _mm_prefetch((const char *)block + ahead, _MM_HINT_NTA);
            } else {
                _mm_prefetch((const char *)block + ahead, _MM_HINT_T0);
            }
            __m256i signed_weights = _mm256_loadu_si256((const __m256i *)block->quants);
            __m256i prepared = prepare(signed_weights);
            __m256 scale = _mm256_set1_ps(to_float(block->scale));
#pragma GCC unroll 8
            for (int column = 0; column < width; column++) {
                __m256i others = _mm256_load_si256((const __m256i *)(quants + column * BLOCK));
                __m256 products = _mm256_cvtepi32_ps(dot(signed_weights, prepared, others));
                __m256 both = _mm256_mul_ps(scale, _mm256_load_ps(scales + column * LANES));
                sums[row][column] = _mm256_fmadd_ps(both, products, sums[row][column]);
            }
        }
        quants += width * BLOCK;
        scales += width * LANES;
    }
    for (int row = 0; row < n_rows; row++) {
        for (int column = 0; column < width; column++) {
            if (column < tile->n) {
                c[column * ldc + row] = sum_of_lanes(sums[row][column]);
            }
        }
    }
}

static inline __attribute__((always_inline)) void multiply_rows(const int width, int64_t n_rows,
                                                                const block_q8_0 *weights,
                                                                int64_t lda, int64_t k,
                                                                const tile *tile, float *c,
                                                                int64_t ldc) {
    int64_t row = 0;
    if (width > 1 && k * width * BLOCK_BYTES > NEAR) {
        for (; row + 2 <= n_rows; row += 2) {
            multiply(2, width, weights + row * lda, lda, k, tile, c + row, ldc);
        }
    }
    for (; row < n_rows; row++) {
        multiply(1, width, weights + row * lda, lda, k, tile, c + row, ldc);
    }
}

static void multiply_tile(int64_t n_rows, const block_q8_0 *weights, int64_t lda, int64_t k,
                          const tile *tile, float *c, int64_t ldc) {
    switch (tile->width) {
    case 1: multiply_rows(1, n_rows, weights, lda, k, tile, c, ldc); break;
    case 2: multiply_rows(2, n_rows, weights, lda, k, tile, c, ldc); break;
    case 4: multiply_rows(4, n_rows, weights, lda, k, tile, c, ldc); break;
    default: multiply_rows(8, n_rows, weights, lda, k, tile, c, ldc); break;
    }
}

static void lay_out(tile *tile, const block_q8_0 *b, int64_t ldb, int64_t k) {
    for (int column = 0; column < tile->width; column++) {
        /* Rows that are laid out and not in use repeat the first one. */
        const block_q8_0 *blocks = b + (column < tile->n ? column : 0) * ldb;
        for (int64_t i = 0; i < k; i++) {
            int64_t place = i * tile->width + column;
            __m256i quants = _mm256_loadu_si256((const __m256i *)blocks[i].quants);
            quants = _mm256_add_epi8(quants, _mm256_set1_epi8((char)ADDED));
            _mm256_store_si256((__m256i *)(tile->quants + place * BLOCK), quants);
            __m256 scale = _mm256_set1_ps(to_float(blocks[i].scale));
            _mm256_store_ps(tile->scales + place * LANES, scale);
        }
    }
}

/* Lays out as many of n rows as there is room for; returns how many. */
static int64_t lay_out_tiles(tile *tiles, int *n_tiles, uint8_t *room, const block_q8_0 *b,
                             int64_t ldb, int64_t n, int64_t k) {
    const int64_t row_bytes = k * BLOCK_BYTES;
    int64_t done = 0;
    uint8_t *end = room + ROOM;
    for (*n_tiles = 0; *n_tiles < TILES_MAX && done < n; (*n_tiles)++) {
        int width = TILE;
        while (width > 1 && (width / 2 >= n - done || width * row_bytes > ROOM)) {
            width /= 2;
        }
        if (width * row_bytes > end - room) {
            break;
        }
        tile *next = &tiles[*n_tiles];
        next->width = width;
        next->n = n - done < width ? (int)(n - done) : width;
        next->quants = room;
        next->scales = (float *)(room + width * k * BLOCK);
        lay_out(next, b + done * ldb, ldb, k);
        room += width * row_bytes;
        done += next->n;
    }
    return done;
}

bool shardmesh_q8_multiply(const ggml_compute_params *params, int64_t m, int64_t n, int64_t k,
                           const block_q8_0 *a, int64_t lda, const block_q8_0 *b, int64_t ldb,
                           float *c, int64_t ldc) {
    if (k * BLOCK_BYTES > ROOM) {
        return false;
    }
    uint8_t room[ROOM] __attribute__((aligned(64)));
    tile tiles[TILES_MAX];
    int n_tiles;
    const int64_t row_end = m * (params->ith + 1) / params->nth;
    for (int64_t done = 0; done < n;) {
        int64_t n_laid_out = lay_out_tiles(tiles, &n_tiles, room, b + done * ldb, ldb, n - done, k);
        for (int64_t row = m * params->ith / params->nth; row < row_end; row += ROWS_NEAR) {
            int64_t n_rows = row_end - row < ROWS_NEAR ? row_end - row : ROWS_NEAR;
            float *out = c + done * ldc + row;
            for (int i = 0; i < n_tiles; i++) {
                multiply_tile(n_rows, a + row * lda, lda, k, &tiles[i], out, ldc);
                out += tiles[i].n * ldc;
            }
        }
        done += n_laid_out;
    }
    return true;
}
