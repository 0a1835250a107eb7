/* What the parts of Shardmesh's kernels share; see matmul.c. */

#pragma once

#include <stdbool.h>
#include <stdint.h>

typedef struct {
    int ith, nth; /* this thread, and how many there are; ggml's struct goes on */
} ggml_compute_params;

typedef struct {
    uint16_t scale; /* half precision */
    int8_t quants[32];
} block_q8_0;

/* c (n, m) = rows of activations b (n, k blocks) times rows of weights a (m, k blocks); a thread
 * computes its part of the rows of weights.  False, for all threads, if there is no room. */
bool shardmesh_q8_multiply(const ggml_compute_params *params, int64_t m, int64_t n, int64_t k,
                           const block_q8_0 *a, int64_t lda, const block_q8_0 *b, int64_t ldb,
                           float *c, int64_t ldc);

/* c (m) = one row b (k) times rows a (m, k), all of half precision, summed in so many lanes; a
 * thread computes its part of the rows of a.  False, for all threads, if it cannot be done. */
bool shardmesh_f16_multiply(int lanes, const ggml_compute_params *params, int64_t m, int64_t k,
                            const uint16_t *a, int64_t lda, const uint16_t *b, float *c);
