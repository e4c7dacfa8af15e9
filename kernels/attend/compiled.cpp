// One query per row over ragged pages and a rectangular tail, in one softmax. Layouts as in kernels/attend; a row here is
// one KV head of one sequence of the batch. Threads take pieces of the rows' slots, whichever rows they belong to.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../lanes.h"

namespace {

constexpr float NOTHING = -std::numeric_limits<float>::infinity();
// slots of a piece; their values serve all queries of a group from the cache
constexpr int64_t PIECE = 128, NEAR = 64;

struct Pages {
    const float *q;                // [rows, group, width]
    const void *k, *v;             // [places, width] and of the values' width
    const int32_t *pos;            // [places]
    const int32_t *at;             // the places of every row's slots
    const int64_t *first, *held;   // [rows], of `at`
    const void *tail_k, *tail_v;   // [rows, tail, …], rows lie tail_*_stride apart
    const int32_t *tail_pos;       // [batch, heads, tail], lying apart by the two strides
    const int32_t *q_pos;          // [batch]
    float *out, *mass;             // [rows, group, values' width], [rows, group, most + tail]
    const float *bias, *factor;    // [places], or null: what slots add to their logits, and multiply their values by
    const float *tail_bias, *tail_factor; // [rows, tail], or null
    int64_t rows, heads, group, width, value_width, most, tail;
    int64_t tail_k_stride, tail_v_stride, tail_pos_batch, tail_pos_head;
    int64_t window; // how many tokens back a query sees; 0: all
    float scale;
    int32_t threads;
    int32_t kind; // of keys and values
};

// Slots `from` on of a row: n of its pages, or of its tail.
struct Piece {
    int64_t row, from, n;
    bool tail;
};

// Calls act(i, n) for every n places from at[i] on that follow each other; x are the places' numbers, `width` each, which
// the processor is asked for before they are due where they lie apart.
template <class E, class Act> inline void runs(const int32_t *at, int64_t n, const E *x, int64_t width, Act act) {
    constexpr int64_t AHEAD = 8, LINE = 64 / sizeof(E);
    for (int64_t i = 0, j; i < n; i = j) {
        for (j = i + 1; j < n && at[j] == at[i] + (j - i); ++j) {
        }
        if (j - i < AHEAD && i + AHEAD < n)
            for (int64_t d = 0; d < width; d += LINE) __builtin_prefetch(x + at[i + AHEAD] * width + d);
        act(i, j - i);
    }
}

// Scale and bias, and -inf where the query does not see the slot; x of every query of the group, `wide` apart.
inline void mask(float *x, int64_t wide, const int32_t *pos, const float *bias, int64_t n, int32_t now, const Pages &a) {
    const int32_t oldest = a.window ? std::max<int32_t>(0, now - static_cast<int32_t>(a.window) + 1) : 0;
    for (int64_t g = 0; g < a.group; ++g, x += wide) {
        for (int64_t i = 0; i < n; ++i) x[i] = (pos[i] >= oldest) & (pos[i] <= now) ? x[i] * a.scale : NOTHING;
        for (int64_t i = 0; bias && i < n; ++i) x[i] += bias[i];
    }
}

template <class E> void logits_of(const Piece &p, const Pages &a, const E *keys, const E *tail_keys) {
    const int64_t G = a.group, wide = a.most + a.tail;
    const float *q = a.q + p.row * G * a.width;
    float *x = a.mass + p.row * G * wide + p.from + (p.tail ? a.most : 0);
    const int32_t now = a.q_pos[p.row / a.heads];
    if (p.tail) {
        dots(q, G, tail_keys + p.row * a.tail_k_stride + p.from * a.width, p.n, a.width, x, wide);
        const int32_t *pos = a.tail_pos + p.row / a.heads * a.tail_pos_batch + p.row % a.heads * a.tail_pos_head;
        return mask(x, wide, pos + p.from, a.tail_bias ? a.tail_bias + p.row * a.tail + p.from : nullptr, p.n, now, a);
    }
    const int32_t *at = a.at + a.first[p.row] + p.from;
    int32_t pos[PIECE];
    float bias[PIECE];
    for (int64_t i = 0; i < p.n; ++i) pos[i] = a.pos[at[i]];
    for (int64_t i = 0; a.bias && i < p.n; ++i) bias[i] = a.bias[at[i]];
    runs(at, p.n, keys, a.width, [&](int64_t i, int64_t n) { dots(q, G, keys + at[i] * a.width, n, a.width, x + i, wide); });
    mask(x, wide, pos, a.bias ? bias : nullptr, p.n, now, a);
}

inline float largest(const float *x, int64_t n, float so_far) {
    Lanes most = Lanes{} + so_far;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const Lanes y = load(x + i);
        most = y > most ? y : most;
    }
    for (; i < n; ++i) so_far = std::max(so_far, x[i]);
    for (int l = 0; l < LANES; ++l) so_far = std::max(so_far, most[l]);
    return so_far;
}

// x becomes the softmax of its first n and last `tail` numbers, and 0 between them; all 0 for a query that sees nothing.
inline void softmax(float *x, int64_t n, const Pages &a) {
    float *tail = x + a.most;
    std::fill(x + n, tail, 0.0f);
    const float most = largest(tail, a.tail, largest(x, n, NOTHING));
    if (most == NOTHING) return std::fill(x, tail + a.tail, 0.0f);
    const float share = 1 / (exponentials(x, n, most) + exponentials(tail, a.tail, most));
    for (int64_t i = 0; i < n; ++i) x[i] *= share;
    for (int64_t i = 0; i < a.tail; ++i) tail[i] *= share;
}

// The attention x [group] to n <= NEAR slots times their factors, into y [group, NEAR]; at: their places, null in the tail.
inline void multiply(const float *x, int64_t wide, const float *factor, const int32_t *at, int64_t n, int64_t G, float *y) {
    for (int64_t g = 0; g < G; ++g)
        for (int64_t i = 0; i < n; ++i) y[g * NEAR + i] = x[g * wide + i] * factor[at ? at[i] : i];
}

template <class E> void mix(const Piece &p, const Pages &a, const E *values, const E *tail_values, E *near, float *weighed, float *out) {
    const int64_t G = a.group, wide = a.most + a.tail, width = a.value_width;
    const float *x = a.mass + p.row * G * wide + p.from + (p.tail ? a.most : 0);
    for (int64_t t = 0; t < p.n; t += NEAR) {
        const int64_t n = std::min(NEAR, p.n - t);
        const E *v = tail_values + p.row * a.tail_v_stride + (p.from + t) * width;
        if (!p.tail) {
            const int32_t *at = a.at + a.first[p.row] + p.from + t;
            v = values + at[0] * width;
            if (at[n - 1] != at[0] + n - 1 || !std::is_sorted(at, at + n)) {
                runs(at, n, values, width, [&](int64_t i, int64_t m) { std::copy_n(values + at[i] * width, m * width, near + i * width); });
                v = near;
            }
        }
        const float *factor = p.tail ? a.tail_factor : a.factor;
        if (!factor) {
            mixes(x + t, wide, G, v, n, width, out);
            continue;
        }
        if (p.tail)
            multiply(x + t, wide, factor + p.row * a.tail + p.from + t, nullptr, n, G, weighed);
        else
            multiply(x + t, wide, factor, a.at + a.first[p.row] + p.from + t, n, G, weighed);
        mixes(weighed, NEAR, G, v, n, width, out);
    }
}

template <class E> void attend_pages_of(const Pages &a) {
    const auto *k = static_cast<const E *>(a.k), *v = static_cast<const E *>(a.v);
    const auto *tail_k = static_cast<const E *>(a.tail_k), *tail_v = static_cast<const E *>(a.tail_v);
    const int64_t G = a.group, wide = a.most + a.tail, of_out = G * a.value_width;
    std::vector<Piece> pieces;
    std::vector<int64_t> begin; // of every row's pieces
    for (int64_t row = 0; row < a.rows; ++row) {
        begin.push_back(pieces.size());
        for (const bool tail : {false, true}) {
            const int64_t slots = tail ? a.tail : a.held[row];
            for (int64_t i = 0; i < slots; i += PIECE) pieces.push_back({row, i, std::min(PIECE, slots - i), tail});
        }
    }
    begin.push_back(pieces.size());
    const auto all = static_cast<int64_t>(pieces.size());
    std::vector<float> parts(all * of_out); // so that sums are in one order, whatever the threads
#pragma omp parallel num_threads(a.threads)
    {
        std::vector<E> near(NEAR * a.value_width);
        std::vector<float> weighed(G * NEAR);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < all; ++i) logits_of(pieces[i], a, k, tail_k);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < a.rows * G; ++r) softmax(a.mass + r * wide, a.held[r / G], a);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < all; ++i) mix(pieces[i], a, v, tail_v, near.data(), weighed.data(), parts.data() + i * of_out);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < a.rows; ++row) {
            float *out = a.out + row * of_out;
            std::fill(out, out + of_out, 0.0f);
            for (int64_t i = begin[row]; i < begin[row + 1]; ++i)
                for (int64_t d = 0; d < of_out; ++d) out[d] += parts[i * of_out + d];
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
