// Attention of many queries, whole rows at a time: their output and column sums of it, from one product of queries and
// keys. A block of rows lies in the second-level cache; a sum costs a pass over it, and its noise is drawn there.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "../lanes.h"

namespace {

constexpr int ROWS = 6; // of a tile of the products
#ifdef __AVX512F__
constexpr int WIDE = 4; // its vectors per row: with these the tile fills the registers
#else
constexpr int WIDE = 1;
#endif
constexpr int PANEL = WIDE * LANES;      // keys that lie beside each other, channel by channel
constexpr int64_t BLOCK = 3 << 15;       // logits of a block of rows
constexpr int64_t MOST_ROWS = 16 * ROWS; // of a block
constexpr int64_t DEEP = 256;            // values of a tile
constexpr int64_t PIECES = 4;            // of a head's blocks, each with sums of its own, whatever the threads
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// A sum over the queries from `first` on of weight times attention, or its square, of slots whose distance from the
// query is in [least, most). With noise, attention is softmax((logits + Gumbel noise) / tau).
struct Sums {
    float *out;           // [batch, heads * group, slots]
    const float *weights; // [batch or 1, queries]; null: 1
    const int32_t *start; // of the noise, [batch, heads * group, queries or 1]; null: none
    const float *taus;    // [batch, queries]; null: tau for all
    int64_t weights_batch, start_head, start_query; // strides
    int64_t first, least, most;
    float tau;
    int32_t squared;
};

struct Rows {
    const float *q;
    const void *k, *v;      // v may be null
    float *out;             // [batch, heads * group, queries, value width]
    const int32_t *q_pos;   // [batch, queries]
    const int32_t *k_pos;   // [batch, heads or 1, slots]
    const Sums *sums;
    int64_t q_batch, q_head, q_query, k_batch, k_head, k_slot, v_batch, v_head, v_slot, pos_batch, pos_head; // strides
    int64_t batch, heads, group, queries, slots, width, value_width, n_sums;
    int64_t window; // how many tokens back a query sees; 0: all
    float scale;
    int32_t tail; // the queries are the newest slots in order, none of them padding
    int32_t threads;
    int32_t kind; // of keys and values
};

// c[r] (+)= sum over i < depth of a[r][i] * b[i], for R rows and V vectors of channels
template <int R, int V, class E>
inline void tile(const float *a, int64_t a_row, const E *b, int64_t b_row, int64_t depth, float *c, int64_t c_row,
                 bool add) {
    Lanes total[R][V] = {};
    for (int64_t i = 0; i < depth; ++i, b += b_row) {
        Lanes x[V];
        for (int v = 0; v < V; ++v) x[v] = load(b + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) total[r][v] += a[r * a_row + i] * x[v];
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) {
            float *at = c + r * c_row + v * LANES;
            store(at, add ? load(at) + total[r][v] : total[r][v]);
        }
}

template <int V, class E>
inline void product(const float *a, int64_t a_row, int64_t rows, const E *b, int64_t b_row, int64_t depth, float *c,
                    int64_t c_row, bool add) {
    for (int64_t r = 0; r < rows; r += ROWS, a += ROWS * a_row, c += ROWS * c_row) switch (rows - r) {
        case 1: tile<1, V>(a, a_row, b, b_row, depth, c, c_row, add); break;
        case 2: tile<2, V>(a, a_row, b, b_row, depth, c, c_row, add); break;
        case 3: tile<3, V>(a, a_row, b, b_row, depth, c, c_row, add); break;
        case 4: tile<4, V>(a, a_row, b, b_row, depth, c, c_row, add); break;
        case 5: tile<5, V>(a, a_row, b, b_row, depth, c, c_row, add); break;
        default: tile<ROWS, V>(a, a_row, b, b_row, depth, c, c_row, add);
        }
}

inline Ints ints(const int32_t *at) { return *reinterpret_cast<const Ints *>(at); }

// The natural logarithm of x > 0, to about 1e-7 of itself, also beside 1.
inline Lanes logarithm(Lanes x) {
    Ints bits;
    std::memcpy(&bits, &x, sizeof bits);
    const Ints power = (bits - 0x3f3504f3) >> 23; // what is left lies in sqrt(1/2) ... sqrt(2)
    bits -= power << 23;
    Lanes f;
    std::memcpy(&f, &bits, sizeof f);
    f -= 1.0f;
    // (log(1 + f) - f + f^2 / 2) / f^3, fitted to 6e-9 of log(1 + f): a division would cost more than all of these
    Lanes p = f * -0.0763434395f + 0.127615154f;
    p = p * f - 0.131602108f;
    p = p * f + 0.142017677f;
    p = p * f - 0.166233554f;
    p = p * f + 0.200012267f;
    p = p * f - 0.250008225f;
    p = p * f + 0.333333313f;
    return __builtin_convertvector(power, Lanes) * 0.693147181f + (f * f * (f * p - 0.5f) + f);
}

constexpr uint32_t STEP = 0x2545f491u, FIRST = 0x7feb352du, SECOND = 0x846ca68bu; // of kernels/noise

// the hash of one key more
inline uint32_t mixed_in(uint32_t state, uint32_t key) {
    uint32_t x = state * STEP + key;
    x ^= x >> 16;
    x *= FIRST;
    x ^= x >> 15;
    x *= SECOND;
    return x ^ x >> 16;
}

// -log of the uniform numbers that kernels/noise draws for these keys
inline Lanes minus_log_uniform(int32_t start, const int32_t *keys) {
    const Ints key = ints(keys);
    Words x;
    std::memcpy(&x, &key, sizeof x);
    x += static_cast<uint32_t>(start);
    x ^= x >> 16;
    x *= FIRST;
    x ^= x >> 15;
    x *= SECOND;
    x ^= x >> 16;
    x = (x >> 9) | 0x3f800000u;
    Lanes u;
    std::memcpy(&u, &x, sizeof u);
    return -logarithm(u - (1 - 0x1p-24f));
}

inline float largest(const float *x, int64_t n) {
    Lanes most = load(x);
    for (int64_t i = LANES; i < n; i += LANES) {
        const Lanes y = load(x + i);
        most = y > most ? y : most;
    }
    float one = most[0];
    for (int l = 1; l < LANES; ++l) one = std::max(one, most[l]);
    return one;
}

// out becomes exp(x - most), n in whole vectors; their sum
inline float powers(const float *x, int64_t n, float most, float *out) {
    Lanes total = {};
    for (int64_t i = 0; i < n; i += LANES) {
        const Lanes y = exponential(load(x + i) - most);
        store(out + i, y);
        total += y;
    }
    return sum(total);
}

// out += by times p, or p squared, where the distance from `now` allows it
inline void add(const float *p, int64_t n, float by, const Sums &s, int32_t now, const int32_t *pos, float *out) {
    const bool all = s.least <= 0 && s.most > INT32_MAX;
    const auto least = static_cast<int32_t>(s.least), most = static_cast<int32_t>(std::min<int64_t>(s.most, INT32_MAX));
    const Lanes zero = {};
    for (int64_t i = 0; i < n; i += LANES) {
        Lanes y = load(p + i);
        if (s.squared) y *= y;
        if (!all) {
            const Ints back = now - ints(pos + i);
            y = (back >= least) & (back < most) ? y : zero;
        }
        store(out + i, load(out + i) + y * by);
    }
}

template <class E> void attend_rows_of(const Rows &a) {
    const int64_t Hq = a.heads * a.group, panels = (a.slots + PANEL - 1) / PANEL, wide = panels * PANEL;
    const int64_t rows = std::min(MOST_ROWS, std::max<int64_t>(ROWS, BLOCK / wide / ROWS * ROWS));
    const int64_t blocks = (a.queries + rows - 1) / rows, pieces = std::min(PIECES, blocks);
    const int64_t values = (a.value_width + PANEL - 1) / PANEL * PANEL;
    std::vector<E> keys(a.batch * a.heads * wide * a.width);
    std::vector<int32_t> places(a.k_pos ? a.batch * a.heads * wide : 0, -1);
    std::vector<float> parts(pieces * a.batch * Hq * a.n_sums * wide);
#pragma omp parallel num_threads(a.threads)
    {
#pragma omp for schedule(static)
        for (int64_t at = 0; at < a.batch * a.heads; ++at) {
            const E *k = static_cast<const E *>(a.k) + at / a.heads * a.k_batch + at % a.heads * a.k_head;
            E *to = keys.data() + at * wide * a.width;
            for (int64_t j = 0; j < a.slots; ++j)
                for (int64_t d = 0; d < a.width; ++d)
                    to[(j / PANEL * a.width + d) * PANEL + j % PANEL] = k[j * a.k_slot + d];
            if (a.k_pos) {
                const int32_t *from = a.k_pos + at / a.heads * a.pos_batch + at % a.heads * a.pos_head;
                std::copy(from, from + a.slots, places.data() + at * wide);
            }
        }
        std::vector<float> logits(rows * wide), drawn(a.n_sums ? wide : 0), mixed(a.v ? rows * values : 0), share(rows);
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t piece = 0; piece < pieces; ++piece)
            for (int64_t head = 0; head < a.batch * Hq; ++head) {
                const int64_t b = head / Hq, kv = b * a.heads + head % Hq / a.group;
                const E *k = keys.data() + kv * wide * a.width;
                const E *v = a.v ? static_cast<const E *>(a.v) + b * a.v_batch + kv % a.heads * a.v_head : nullptr;
                const int32_t *pos = a.k_pos ? places.data() + kv * wide : nullptr;
                float *part = parts.data() + (piece * a.batch * Hq + head) * a.n_sums * wide;
                for (int64_t from = piece * rows; from < a.queries; from += pieces * rows) {
                    const int64_t n = std::min(rows, a.queries - from);
                    const int64_t seen = a.tail ? a.slots - a.queries + from + n : a.slots; // by the last of them
                    const int64_t whole = (seen + PANEL - 1) / PANEL * PANEL;
                    const float *q = a.q + b * a.q_batch + head % Hq * a.q_head + from * a.q_query;
                    for (int64_t j = 0; j < whole; j += PANEL)
                        product<WIDE>(q, a.q_query, n, k + j * a.width, PANEL, a.width, logits.data() + j, wide, false);
                    for (int64_t r = 0; r < n; ++r) {
                        float *x = logits.data() + r * wide;
                        const int64_t query = from + r;
                        const int32_t now = a.q_pos ? a.q_pos[b * a.queries + query] : 0;
                        for (int64_t j = 0; j < whole; j += LANES) store(x + j, load(x + j) * a.scale);
                        if (a.tail)
                            std::fill(x + a.slots - a.queries + query + 1, x + whole, NOTHING);
                        else {
                            const int32_t window = a.window ? static_cast<int32_t>(a.window) : INT32_MAX;
                            const Lanes nothing = Lanes{} + NOTHING;
                            for (int64_t j = 0; j < whole; j += LANES) {
                                const Ints slot = ints(pos + j), back = now - slot;
                                store(x + j, (slot >= 0) & (back >= 0) & (back < window) ? load(x + j) : nothing);
                            }
                        }
                        const float most = largest(x, whole);
                        const bool blind = most == NOTHING; // it sees no slot
                        const auto weight = [&](const Sums &s) {
                            return s.weights ? s.weights[b * s.weights_batch + query] : 1.0f;
                        };
                        const auto start = [&](const Sums &s) {
                            return s.start[head * s.start_head + query * s.start_query];
                        };
                        const auto by = [&](const Sums &s, float total) {
                            return weight(s) / (s.squared ? total * total : total);
                        };
                        const auto tau = [&](const Sums &s) { return s.taus ? s.taus[b * a.queries + query] : s.tau; };
                        float *y = drawn.data();
                        for (int64_t i = 0; i < a.n_sums && !blind; ++i) {
                            const Sums &s = a.sums[i];
                            const float t = tau(s);
                            if (query < s.first || t == 1) continue;
                            for (int64_t j = 0; j < whole; j += LANES) {
                                const Lanes z = load(x + j);
                                store(y + j, (s.start ? z - logarithm(minus_log_uniform(start(s), pos + j)) : z) / t);
                            }
                            const float total = powers(y, whole, largest(y, whole), y);
                            add(y, whole, by(s, total), s, now, pos, part + i * wide);
                        }
                        float total = 0;
                        if (blind)
                            std::fill(x, x + whole, 0.0f);
                        else
                            total = powers(x, whole, most, x);
                        share[r] = blind ? 0 : 1 / total;
                        for (int64_t i = 0; i < a.n_sums && !blind; ++i) {
                            const Sums &s = a.sums[i];
                            if (query < s.first || tau(s) != 1) continue;
                            if (!s.start) {
                                add(x, whole, by(s, total), s, now, pos, part + i * wide);
                                continue;
                            }
                            // exp(x + noise) is exp(x) / -log u
                            Lanes noisy = {};
                            for (int64_t j = 0; j < whole; j += LANES) {
                                const Lanes z = load(x + j) / minus_log_uniform(start(s), pos + j);
                                store(y + j, z);
                                noisy += z;
                            }
                            add(y, whole, by(s, sum(noisy)), s, now, pos, part + i * wide);
                        }
                    }
                    if (!v) continue;
                    float *out = a.out + (head * a.queries + from) * a.value_width;
                    for (int64_t j = 0; j < seen; j += DEEP) {
                        const int64_t depth = std::min(DEEP, seen - j);
                        const float *p = logits.data() + j;
                        const E *x = v + j * a.v_slot;
                        int64_t d = 0;
                        for (; d + PANEL <= a.value_width; d += PANEL)
                            product<WIDE>(p, wide, n, x + d, a.v_slot, depth, mixed.data() + d, values, j > 0);
                        for (; d < a.value_width; d += LANES)
                            product<1>(p, wide, n, x + d, a.v_slot, depth, mixed.data() + d, values, j > 0);
                    }
                    for (int64_t r = 0; r < n; ++r)
                        for (int64_t d = 0; d < a.value_width; ++d)
                            out[r * a.value_width + d] = mixed[r * values + d] * share[r];
                }
            }
#pragma omp for schedule(static)
        for (int64_t head = 0; head < a.batch * Hq; ++head)
            for (int64_t i = 0; i < a.n_sums; ++i)
                for (int64_t piece = 0; piece < pieces; ++piece) {
                    const float *part = parts.data() + ((piece * a.batch * Hq + head) * a.n_sums + i) * wide;
                    float *out = a.sums[i].out + head * a.slots;
                    for (int64_t j = 0; j < a.slots; ++j) out[j] = piece ? out[j] + part[j] : part[j];
                }
    }
}

} // namespace

extern "C" void attend_rows(const Rows *given) {
    switch (given->kind) {
    case HALVES: return attend_rows_of<Half>(*given);
    case BRAINS: return attend_rows_of<Brain>(*given);
    default: return attend_rows_of<float>(*given);
    }
}

// out [batch, heads, slots]: of one query, whose attention probs [batch, heads * group, slots] is known, what softmax of
// (logits + Gumbel noise) / tau would be, summed over each group. state [batch, heads * group]: keys of the noise, which
// the query's position joins where q_pos [batch] is given; tau [batch].
extern "C" void noisy_rows(const float *probs, const int64_t *state, const int32_t *q_pos, const float *tau,
                           const int32_t *pos, int64_t pos_batch, int64_t pos_head, float *out, int64_t batch,
                           int64_t heads, int64_t group, int64_t slots, int32_t threads) {
    const int64_t wide = (slots + LANES - 1) / LANES * LANES;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> row(wide), total(wide);
        std::vector<int32_t> keys(wide, -1);
#pragma omp for schedule(static)
        for (int64_t at = 0; at < batch * heads; ++at) {
            const int64_t b = at / heads;
            const int32_t *from = pos + b * pos_batch + at % heads * pos_head;
            std::copy(from, from + slots, keys.begin());
            std::fill(total.begin(), total.end(), 0.0f);
            const Lanes nothing = Lanes{} + NOTHING, zero = {};
            float *x = row.data();
            for (int64_t g = 0; g < group; ++g) {
                const int64_t head = at * group + g;
                std::copy(probs + head * slots, probs + (head + 1) * slots, x);
                std::fill(x + slots, x + wide, 0.0f);
                auto key = static_cast<uint32_t>(state[head]);
                if (q_pos) key = mixed_in(key, static_cast<uint32_t>(q_pos[b]));
                const auto start = static_cast<int32_t>(key * STEP);
                float of_all;
                if (tau[b] == 1) { // exp(logit + noise) is exp(logit) / -log u
                    Lanes sums = {};
                    for (int64_t j = 0; j < wide; j += LANES) {
                        const Lanes y = load(x + j) / minus_log_uniform(start, keys.data() + j);
                        store(x + j, y);
                        sums += y;
                    }
                    of_all = sum(sums);
                } else {
                    for (int64_t j = 0; j < wide; j += LANES) {
                        const Lanes p = load(x + j), u = minus_log_uniform(start, keys.data() + j);
                        store(x + j, p > zero ? (logarithm(p) - logarithm(u)) / tau[b] : nothing);
                    }
                    const float most = largest(x, wide);
                    of_all = most == NOTHING ? 0 : powers(x, wide, most, x);
                }
                const float share = of_all > 0 ? 1 / of_all : 0;
                for (int64_t j = 0; j < wide && share > 0; j += LANES)
                    store(total.data() + j, load(total.data() + j) + load(x + j) * share);
            }
            std::copy(total.begin(), total.begin() + slots, out + at * slots);
        }
    }
}
