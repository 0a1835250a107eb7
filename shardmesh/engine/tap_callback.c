/* What llama.cpp calls for each node of its graph, without Python: see tap.py.
 *
 * llama.cpp asks for hundreds of nodes per token.  In Python each question takes a microsecond or two
 * and the interpreter's lock; here it is a comparison of two strings.  The functions of ggml are
 * given as pointers, so that this file needs neither ggml's headers nor its library to be built.
 */

#include <stdbool.h>
#include <stddef.h>
#include <string.h>

struct tap {
    const char *(*get_name)(const void *tensor);
    size_t (*n_bytes)(const void *tensor);
    void (*get)(const void *tensor, void *data, size_t offset, size_t size);
    void (*set)(void *tensor, const void *data, size_t offset, size_t size);
    const char *output_name; /* NULL: the graph runs to its end */
    const char *input_name;  /* NULL: nothing is put in */
    char *output;            /* room for the rows that come out ... */
    size_t output_room;      /* ... in bytes */
    size_t output_n_bytes;   /* what came, also where there was no room for it */
    const char *input;       /* the rows to put in */
    size_t input_n_bytes;
    size_t input_wanted; /* bytes of the node that they go to; 0: it did not come */
};

static bool is_named(const char *name, const char *wanted) {
    return wanted != NULL && strcmp(name, wanted) == 0;
}

/* ggml_backend_sched_eval_callback */
bool shardmesh_tap(void *tensor, bool ask, void *user_data) {
    struct tap *tap = user_data;
    const char *name = tap->get_name(tensor);
    bool is_input = is_named(name, tap->input_name);
    if (ask) {
        return is_input || is_named(name, tap->output_name);
    }
    size_t size = tap->n_bytes(tensor);
    if (is_input) {
        tap->input_wanted = size;
        if (size != tap->input_n_bytes) {
            return false; /* tap.py tells */
        }
        tap->set(tensor, tap->input, 0, size);
        return true;
    }
    /* It comes once for each part that llama.cpp cuts a batch in. */
    if (size <= tap->output_room && tap->output_n_bytes <= tap->output_room - size) {
        tap->get(tensor, tap->output + tap->output_n_bytes, 0, size);
    }
    tap->output_n_bytes += size;
    return false;
}
