/* The way of Shardmesh's kernels into ggml.
 *
 * libggml-cpu calls its `llamafile_sgemm` through the dynamic linker, which finds the one of this
 * file first if this library was loaded before, for everybody (RTLD_GLOBAL).  What is not for
 * Shardmesh goes on to ggml's.  Built once for each instruction set: hatch_build.py.
 */

#include "matmul.h"

#include <stddef.h>

enum { TYPE_F32 = 0, TYPE_F16 = 1, TYPE_Q8_0 = 8 }; /* enum ggml_type */

typedef bool sgemm(const ggml_compute_params *, int64_t m, int64_t n, int64_t k, const void *a,
                   int64_t lda, const void *b, int64_t ldb, void *c, int64_t ldc, int a_type,
                   int b_type, int c_type);

static sgemm *ggml_sgemm;
static bool use_q8;
static int f16_lanes;
static uint64_t n_q8, n_f16;

/* Called by ggml: every thread of a computation, with the same arguments. */
bool llamafile_sgemm(const ggml_compute_params *params, int64_t m, int64_t n, int64_t k,
                     const void *a, int64_t lda, const void *b, int64_t ldb, void *c, int64_t ldc,
                     int a_type, int b_type, int c_type) {
    bool is_q8 = a_type == TYPE_Q8_0 && b_type == TYPE_Q8_0 && c_type == TYPE_F32;
    bool is_f16 = a_type == TYPE_F16 && b_type == TYPE_F16 && c_type == TYPE_F32;
    if (use_q8 && is_q8 && shardmesh_q8_multiply(params, m, n, k, a, lda, b, ldb, c, ldc)) {
        n_q8 += params->ith == 0;
        return true;
    }
    /* Keys and values of one token's attention; several rows are ggml's matter. */
    if (f16_lanes && is_f16 && n == 1 &&
        shardmesh_f16_multiply(f16_lanes, params, m, k, a, lda, b, c)) {
        n_f16 += params->ith == 0;
        return true;
    }
    return ggml_sgemm != NULL &&
           ggml_sgemm(params, m, n, k, a, lda, b, ldb, c, ldc, a_type, b_type, c_type);
}

/* Which of the kernels compute: that for Q8_0, and that for F16 in so many lanes or, with 0, not at
 * all; `original` is ggml's function of the same name as the one above. */
void shardmesh_use(bool q8, int lanes, sgemm *original) {
    ggml_sgemm = original;
    use_q8 = q8;
    f16_lanes = lanes;
}

/* Products of matrices that were computed here, of each kind. */
void shardmesh_count(uint64_t *q8, uint64_t *f16) {
    *q8 = n_q8;
    *f16 = n_f16;
}
