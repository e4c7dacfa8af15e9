// One query per row over a rectangle of slots that it sees all of: its output and its attention, in one pass over both.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "../lanes.h"

namespace {

struct Rectangle {
    const float *q;      // [rows, group, width]
    const void *k, *v;   // [rows, slots, width] and of the values' width, rows lie *_stride apart
    float *out, *probs;  // [rows, group, values' width], [rows, group, slots]
    int64_t rows, group, slots, width, value_width, k_stride, v_stride;
    int64_t pieces; // into which each row's slots are cut
    float scale;
    int32_t threads;
    int32_t kind; // of keys and values
};

template <class E> void attend_with_probs_of(const Rectangle &a) {
    const int64_t G = a.group, of_out = G * a.value_width, size = (a.slots + a.pieces - 1) / a.pieces;
    std::vector<float> parts(a.pieces * a.rows * of_out);
#pragma omp parallel num_threads(a.threads)
    {
#pragma omp for collapse(2) schedule(static)
        for (int64_t row = 0; row < a.rows; ++row)
            for (int64_t i = 0; i < a.pieces; ++i) {
                const int64_t from = std::min(a.slots, i * size), n = std::min(a.slots, from + size) - from;
                const E *k = static_cast<const E *>(a.k) + row * a.k_stride + from * a.width;
                dots(a.q + row * G * a.width, G, k, n, a.width, a.probs + row * G * a.slots + from, a.slots);
            }
#pragma omp for schedule(static)
        for (int64_t r = 0; r < a.rows * G; ++r) {
            float *x = a.probs + r * a.slots, most = -std::numeric_limits<float>::infinity();
            for (int64_t i = 0; i < a.slots; ++i) most = std::max(most, x[i] *= a.scale);
            const float total = exponentials(x, a.slots, most);
            for (int64_t i = 0; i < a.slots; ++i) x[i] /= total;
        }
#pragma omp for collapse(2) schedule(static)
        for (int64_t row = 0; row < a.rows; ++row)
            for (int64_t i = 0; i < a.pieces; ++i) {
                const int64_t from = std::min(a.slots, i * size), n = std::min(a.slots, from + size) - from;
                const E *v = static_cast<const E *>(a.v) + row * a.v_stride + from * a.value_width;
                float *sums = parts.data() + (i * a.rows + row) * of_out;
                for (int64_t t = 0; t < n; t += 64) // the values of 64 slots serve all queries from the cache
                    mixes(a.probs + row * G * a.slots + from + t, a.slots, G, v + t * a.value_width,
                          std::min<int64_t>(64, n - t), a.value_width, sums);
            }
    }
    std::copy(parts.begin(), parts.begin() + a.rows * of_out, a.out);
    for (int64_t i = 1; i < a.pieces; ++i)
        for (int64_t d = 0; d < a.rows * of_out; ++d) a.out[d] += parts[i * a.rows * of_out + d];
}

} // namespace

extern "C" void attend_with_probs(const Rectangle *given) {
    switch (given->kind) {
    case HALVES: return attend_with_probs_of<Half>(*given);
    case BRAINS: return attend_with_probs_of<Brain>(*given);
    default: return attend_with_probs_of<float>(*given);
    }
}
