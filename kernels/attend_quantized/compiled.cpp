// q·k and p·v over packed codes: a tile of them becomes numbers in the first-level cache and is used there at once.
// Layouts as in kernels/quantize; the pairs (row, head) are counted through, each with its own stride.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../lanes.h"

namespace {

constexpr int TILE = 32;    // tokens that are numbers at once: a multiple of the codes that fill whole bytes
constexpr int WIDEST = 512; // channels of a head

typedef int16_t Shorts __attribute__((vector_size(2 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

inline Lanes twice(const float *at) {
    const float a = at[0], b = at[1];
    return Lanes{a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b};
}
inline Ints widen(const uint8_t *at) { // in two steps: some compilers take a single one apart
    return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const Bytes *>(at), Shorts), Ints);
}

struct Packed {
    const uint8_t *codes;
    const uint16_t *scale, *offset; // float16
    int64_t codes_stride, scale_stride, offset_stride;
    int64_t n, width;
    int32_t bits, group, dim;
};

// Finite numbers only. Halves that are subnormal come out right too.
inline float from_half(uint16_t half) {
    uint32_t bits = static_cast<uint32_t>(half & 0x7fff) << 13, sign = static_cast<uint32_t>(half & 0x8000) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    x *= 0x1p112f;
    std::memcpy(&bits, &x, 4);
    bits |= sign;
    std::memcpy(&x, &bits, 4);
    return x;
}

template <int BITS> struct Pack {
    static constexpr int CODES = BITS == 3 ? 8 : 8 / BITS, BYTES = CODES * BITS / 8, MASK = (1 << BITS) - 1;
    // code j of the pack whose bytes lie `apart` from each other
    static inline int code(const uint8_t *pack, int64_t apart, int j) {
        const int at = BITS * j / 8, shift = BITS * j % 8;
        int x = pack[at * apart] >> shift;
        if (shift + BITS > 8) x |= pack[(at + 1) * apart] << (8 - shift);
        return x & MASK;
    }
};

// Tokens that share scale and offset per channel, [tokens, width].
template <int BITS>
void numbers_of_tokens(const uint8_t *codes, const float *scale, const float *offset, int tokens, int width,
                       float *tile) {
    using P = Pack<BITS>;
    for (int i = 0; i < tokens / P::CODES; ++i, codes += P::BYTES * width, tile += P::CODES * width)
#pragma GCC unroll 8
        for (int j = 0; j < P::CODES; ++j)
            for (int d = 0; d < width; ++d)
                tile[j * width + d] = static_cast<float>(P::code(codes + d, width, j)) * scale[d] + offset[d];
}

// Tokens with scales per group of channels, [tokens, width]: channel CODES * i + j comes to j * width / CODES + i.
template <int BITS>
void numbers_of_channels(const uint8_t *codes, const uint16_t *scales, const uint16_t *offsets, int tokens, int width,
                         int group, float *tile) {
    using P = Pack<BITS>;
    const int plane = width / P::CODES, step = group / P::CODES, groups = width / group;
    float a[TILE * WIDEST], b[TILE * WIDEST]; // of groups
    for (int i = 0; i < tokens * groups; ++i) a[i] = from_half(scales[i]), b[i] = from_half(offsets[i]);
    const float *scale = a, *offset = b;
    const bool whole = P::BYTES == 1 && step % LANES == 0;
    const bool halves = P::BYTES == 1 && step == LANES / 2 && groups % 2 == 0;
    const int used = halves ? 2 : 1, places = used * step; // groups that are taken together
    for (int t = 0; t < tokens; ++t, tile += width)
        for (int w = 0; w < groups; w += used, scale += used, offset += used, codes += places * P::BYTES) {
            float *out = tile + w * step;
            if (whole || halves) {
                const Lanes x = halves ? twice(scale) : *scale + Lanes{};
                const Lanes y = halves ? twice(offset) : *offset + Lanes{};
                for (int i = 0; i < places; i += LANES) {
                    const Ints all = widen(codes + i);
#pragma GCC unroll 8
                    for (int j = 0; j < P::CODES; ++j)
                        store(out + j * plane + i, __builtin_convertvector(all >> BITS * j & P::MASK, Lanes) * x + y);
                }
            } else {
                const float x = *scale, y = *offset;
                for (int i = 0; i < places; ++i)
#pragma GCC unroll 8
                    for (int j = 0; j < P::CODES; ++j)
                        out[j * plane + i] = static_cast<float>(P::code(codes + i * P::BYTES, 1, j)) * x + y;
            }
        }
}

// Tokens [t, t + n) of one head as numbers; they share a scale where scales are of tokens.
template <int BITS> __attribute__((noinline)) void numbers(const Packed &x, int64_t head, int64_t t, int n, float *tile) {
    using P = Pack<BITS>;
    const int width = x.width, group = x.group;
    const uint8_t *codes = x.codes + head * x.codes_stride;
    const uint16_t *scales = x.scale + head * x.scale_stride, *offsets = x.offset + head * x.offset_stride;
    if (x.dim == 2) {
        alignas(64) float scale[WIDEST], offset[WIDEST];
        const uint16_t *a = scales + t / group * width, *b = offsets + t / group * width;
        for (int d = 0; d < width; ++d) scale[d] = from_half(a[d]), offset[d] = from_half(b[d]);
        return numbers_of_tokens<BITS>(codes + t / P::CODES * P::BYTES * width, scale, offset, n, width, tile);
    }
    const int groups = width / group;
    codes += t * (width / P::CODES * P::BYTES), scales += t * groups, offsets += t * groups;
    numbers_of_channels<BITS>(codes, scales, offsets, n, width, group, tile);
}

void any_numbers(const Packed &x, int64_t head, int64_t t, int n, float *tile) {
    switch (x.bits) {
    case 1: return numbers<1>(x, head, t, n, tile);
    case 2: return numbers<2>(x, head, t, n, tile);
    case 3: return numbers<3>(x, head, t, n, tile);
    case 4: return numbers<4>(x, head, t, n, tile);
    default: return numbers<8>(x, head, t, n, tile);
    }
}

// Tokens from t on that are numbers at once.
inline int tokens_at(const Packed &x, int64_t t, int64_t to) {
    const int64_t end = x.dim == 2 ? std::min(to, (t / x.group + 1) * x.group) : to;
    return std::min<int64_t>(TILE, end - t);
}

// Where channel d of a head lies in the tiles.
inline int place(const Packed &x, int d) {
    if (x.dim == 2) return d;
    const int codes = x.bits == 3 ? 8 : 8 / x.bits;
    return d % codes * (x.width / codes) + d / codes;
}

// Piece i of a head that is cut into so many, in whole groups: each(t, tokens, tile) for its tiles of numbers.
template <class Each> inline void sweep(const Packed &x, int64_t head, int64_t i, int64_t pieces, Each each) {
    const int64_t unit = x.dim == 2 ? x.group : TILE, units = (x.n + unit - 1) / unit;
    const int64_t size = (units + pieces - 1) / pieces * unit, to = std::min(x.n, (i + 1) * size);
    alignas(64) float tile[TILE * WIDEST];
    for (int64_t t = i * size; t < to;) {
        const int tokens = tokens_at(x, t, to);
        any_numbers(x, head, t, tokens, tile);
        each(t, tokens, tile);
        t += tokens;
    }
}

} // namespace

extern "C" {

// out [heads, rows, *], whose rows lie `stride` apart: q [heads, rows, width] times the n packed keys of each head.
void packed_dot(const float *q, int64_t heads, int64_t rows, const Packed *keys, float *out, int64_t stride,
                int64_t pieces, int threads) {
    const Packed &x = *keys;
#pragma omp parallel for num_threads(threads) collapse(2) schedule(static)
    for (int64_t head = 0; head < heads; ++head)
        for (int64_t i = 0; i < pieces; ++i) {
            std::vector<float> own(rows * x.width);
            for (int64_t r = 0; r < rows; ++r)
                for (int d = 0; d < x.width; ++d)
                    own[r * x.width + place(x, d)] = q[(head * rows + r) * x.width + d];
            sweep(x, head, i, pieces, [&](int64_t t, int tokens, const float *tile) {
                dots(own.data(), rows, tile, tokens, x.width, out + head * rows * stride + t, stride);
            });
        }
}

// out [pieces, heads, rows, width]: p [heads, rows, *], whose rows lie `stride` apart, times the n packed values.
void packed_mix(const float *p, int64_t stride, int64_t heads, int64_t rows, const Packed *values, float *out,
                int64_t pieces, int threads) {
    const Packed &x = *values;
#pragma omp parallel for num_threads(threads) collapse(2) schedule(static)
    for (int64_t head = 0; head < heads; ++head)
        for (int64_t i = 0; i < pieces; ++i) {
            std::vector<float> total(rows * x.width);
            sweep(x, head, i, pieces, [&](int64_t t, int tokens, const float *tile) {
                mixes(p + head * rows * stride + t, stride, rows, tile, tokens, x.width, total.data());
            });
            float *result = out + (i * heads + head) * rows * x.width;
            for (int64_t r = 0; r < rows; ++r)
                for (int d = 0; d < x.width; ++d) result[r * x.width + d] = total[r * x.width + place(x, d)];
        }
}
}
