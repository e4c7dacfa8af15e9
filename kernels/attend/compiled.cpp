// One query per row over ragged pages and a rectangular tail, in one softmax. Layouts as in kernels/attend; a row here is
// one KV head of one sequence of the batch. Threads take equal shares of the pages, whichever rows they belong to.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#else
inline int omp_get_thread_num() { return 0; }
#endif

#include "../lanes.h"

namespace {

constexpr float NOTHING = -std::numeric_limits<float>::infinity();

struct Pages {
    const float *q;                // [rows, group, width]
    const void *k, *v;             // [pages, page, width] and of the values' width
    const int32_t *pos;            // [pages, page]
    const int64_t *owner;          // [pages], ascending
    const void *tail_k, *tail_v;   // [rows, tail, …], rows lie tail_*_stride apart
    const int32_t *tail_pos;       // [batch, heads, tail], lying apart by the two strides
    const int32_t *q_pos;          // [batch]
    float *out;                    // [rows, group, values' width]
    int64_t rows, heads, group, width, value_width, pages, page, tail;
    int64_t tail_k_stride, tail_v_stride, tail_pos_batch, tail_pos_head;
    int64_t window; // how many tokens back a query sees; 0: all
    float scale;
    int32_t threads;
    int32_t kind; // of keys and values
};

// The scale, and -inf where the query does not see the slot.
inline void mask(float *x, int64_t group, const int32_t *pos, int64_t slots, int32_t now, const Pages &a) {
    for (int64_t g = 0; g < group; ++g, x += slots)
        for (int64_t i = 0; i < slots; ++i) {
            const bool seen = pos[i] >= 0 && pos[i] <= now && (a.window == 0 || now - pos[i] < a.window);
            x[i] = seen ? x[i] * a.scale : NOTHING;
        }
}

inline float largest(const float *x, int64_t n, float so_far) {
    for (int64_t i = 0; i < n; ++i) so_far = std::max(so_far, x[i]);
    return so_far;
}

template <class E> void attend_pages_of(const Pages &a) {
    const auto *keys = static_cast<const E *>(a.k), *values = static_cast<const E *>(a.v);
    const auto *tail_keys = static_cast<const E *>(a.tail_k), *tail_values = static_cast<const E *>(a.tail_v);
    const int64_t G = a.group, of_page = G * a.page, of_tail = G * a.tail, of_out = G * a.value_width;
    std::vector<float> x(a.pages * of_page), y(a.rows * of_tail), most(a.rows * G);
    // sums of every thread: in an order of their own, so that the same input gives the same output
    std::vector<float> parts(a.threads * a.rows * of_out), totals(a.threads * a.rows * G);
#pragma omp parallel num_threads(a.threads)
    {
#pragma omp for schedule(static)
        for (int64_t p = 0; p < a.pages; ++p) {
            const int64_t row = a.owner[p];
            float *mine = x.data() + p * of_page;
            dots(a.q + row * G * a.width, G, keys + p * a.page * a.width, a.page, a.width, mine, a.page);
            mask(mine, G, a.pos + p * a.page, a.page, a.q_pos[row / a.heads], a);
        }
#pragma omp for schedule(static)
        for (int64_t row = 0; row < a.rows; ++row) {
            float *mine = y.data() + row * of_tail;
            dots(a.q + row * G * a.width, G, tail_keys + row * a.tail_k_stride, a.tail, a.width, mine, a.tail);
            const int64_t b = row / a.heads, h = row % a.heads;
            mask(mine, G, a.tail_pos + b * a.tail_pos_batch + h * a.tail_pos_head, a.tail, a.q_pos[b], a);
            const int64_t first = std::lower_bound(a.owner, a.owner + a.pages, row) - a.owner;
            const int64_t last = std::upper_bound(a.owner, a.owner + a.pages, row) - a.owner;
            for (int64_t g = 0; g < G; ++g) {
                float m = largest(mine + g * a.tail, a.tail, NOTHING);
                for (int64_t p = first; p < last; ++p)
                    m = largest(x.data() + p * of_page + g * a.page, a.page, m);
                most[row * G + g] = m == NOTHING ? 0 : m; // a query that sees nothing: all its weights are 0
            }
        }
#pragma omp for schedule(static)
        for (int64_t p = 0; p < a.pages; ++p) {
            const int64_t row = a.owner[p];
            float *mine = x.data() + p * of_page;
            const int64_t place = omp_get_thread_num() * a.rows + row;
            for (int64_t g = 0; g < G; ++g)
                totals[place * G + g] += exponentials(mine + g * a.page, a.page, most[row * G + g]);
            const E *v = values + p * a.page * a.value_width;
            mixes(mine, a.page, G, v, a.page, a.value_width, parts.data() + place * of_out);
        }
#pragma omp for schedule(static)
        for (int64_t row = 0; row < a.rows; ++row) {
            float *mine = y.data() + row * of_tail, *out = a.out + row * of_out;
            std::fill(out, out + of_out, 0.0f);
            for (int64_t g = 0; g < G; ++g)
                totals[row * G + g] += exponentials(mine + g * a.tail, a.tail, most[row * G + g]);
            mixes(mine, a.tail, G, tail_values + row * a.tail_v_stride, a.tail, a.value_width, out);
            for (int32_t i = 0; i < a.threads; ++i)
                for (int64_t d = 0; d < of_out; ++d) out[d] += parts[(i * a.rows + row) * of_out + d];
            for (int64_t g = 0; g < G; ++g) {
                float total = 0;
                for (int32_t i = 0; i < a.threads; ++i) total += totals[(i * a.rows + row) * G + g];
                for (int64_t d = 0; d < a.value_width; ++d) out[g * a.value_width + d] *= total > 0 ? 1 / total : 0;
            }
        }
    }
}

} // namespace

extern "C" void attend_pages(const Pages *given) {
    switch (given->kind) {
    case HALVES: return attend_pages_of<Half>(*given);
    case BRAINS: return attend_pages_of<Brain>(*given);
    default: return attend_pages_of<float>(*given);
    }
}
