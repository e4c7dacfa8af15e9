// Vectors of floats for the C++ forms, and the two products that attention is made of. Keys and values are floats or
// numbers of 16 bits, which become floats in registers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;

typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline Lanes load(const float *at) { return *reinterpret_cast<const Lanes *>(at); }
inline void store(float *at, Lanes x) { *reinterpret_cast<Lanes *>(at) = x; }

struct Half { // float16
    uint16_t bits;
};
struct Brain { // bfloat16
    uint16_t bits;
};
// what slots are made of, as kernels/compiled.py numbers it
enum Kind : int32_t { FLOATS, HALVES, BRAINS };

typedef uint16_t Words16 __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint32_t Words32 __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline Lanes load(const Brain *at) {
    const Words32 x = __builtin_convertvector(*reinterpret_cast<const Words16 *>(at), Words32) << 16;
    Lanes result;
    std::memcpy(&result, &x, sizeof result);
    return result;
}

inline Lanes load(const Half *at) {
#if defined(__AVX512F__)
    const __m512 x = _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i *>(at)));
    Lanes result;
    std::memcpy(&result, &x, sizeof result);
    return result;
#elif defined(__F16C__)
    const auto *eight = reinterpret_cast<const __m128i *>(at);
    const __m256 x[2] = {_mm256_cvtph_ps(_mm_loadu_si128(eight)), _mm256_cvtph_ps(_mm_loadu_si128(eight + 1))};
    Lanes result;
    std::memcpy(&result, x, sizeof result);
    return result;
#else
    const Words32 x = __builtin_convertvector(*reinterpret_cast<const Words16 *>(at), Words32);
    const Words32 small = (x & 0x7fffu) << 13;
    Lanes result;
    std::memcpy(&result, &small, sizeof result);
    result *= 0x1p112f; // subnormal ones come out right too
    Words32 bits;
    std::memcpy(&bits, &result, sizeof bits);
    const Words32 special = (x & 0x7c00u) == 0x7c00u; // infinities and what is no number
    bits |= (special & 0x7f800000u) | (x & 0x8000u) << 16;
    std::memcpy(&result, &bits, sizeof result);
    return result;
#endif
}

inline float sum(Lanes x) {
    float total = 0;
    for (int i = 0; i < LANES; ++i) total += x[i];
    return total;
}

// out[r * stride + t] = q[r]·k[t] for ROWS rows of q
template <int ROWS, class E>
inline void dots_of(const float *q, const E *k, int tokens, int width, float *out, int64_t stride) {
    for (int t = 0; t < tokens; ++t, k += width) {
        Lanes total[ROWS] = {};
        for (int d = 0; d < width; d += LANES) {
            const Lanes x = load(k + d);
            for (int r = 0; r < ROWS; ++r) total[r] += x * load(q + r * width + d);
        }
        for (int r = 0; r < ROWS; ++r) out[r * stride + t] = sum(total[r]);
    }
}

// out[r * stride + t] = q[r]·k[t], k [tokens, width]
template <class E>
inline void dots(const float *q, int64_t rows, const E *k, int tokens, int width, float *out, int64_t stride) {
    for (int64_t r = 0; r < rows; r += 4, q += 4 * width, out += 4 * stride) switch (rows - r) {
        case 1: dots_of<1>(q, k, tokens, width, out, stride); break;
        case 2: dots_of<2>(q, k, tokens, width, out, stride); break;
        case 3: dots_of<3>(q, k, tokens, width, out, stride); break;
        default: dots_of<4>(q, k, tokens, width, out, stride);
        }
}

// out[r] += sum over t of p[r * stride + t] * v[t], for VECTORS * LANES channels
template <int VECTORS, class E>
inline void mixes_of(const float *p, int64_t stride, int64_t rows, const E *v, int tokens, int width, float *out) {
    for (int64_t r = 0; r < rows; ++r, p += stride, out += width) {
        Lanes total[VECTORS] = {};
        for (int t = 0; t < tokens; ++t)
            for (int i = 0; i < VECTORS; ++i) total[i] += p[t] * load(v + t * width + i * LANES);
        for (int i = 0; i < VECTORS; ++i) store(out + i * LANES, load(out + i * LANES) + total[i]);
    }
}

// out[r] += sum over t of p[r * stride + t] * v[t], v [tokens, width]
template <class E>
inline void mixes(const float *p, int64_t stride, int64_t rows, const E *v, int tokens, int width, float *out) {
    int d = 0;
    for (; d + 4 * LANES <= width; d += 4 * LANES) mixes_of<4>(p, stride, rows, v + d, tokens, width, out + d);
    for (; d < width; d += LANES) mixes_of<1>(p, stride, rows, v + d, tokens, width, out + d);
}

// e to the power of x for x <= 0, to about 1e-7 of itself; 0 below -87
inline Lanes exponential(Lanes x) {
    const Ints small = x < -87.0f;
    const Lanes y = x * 1.44269504f; // in powers of two
    const Ints whole = __builtin_convertvector(y - 0.5f, Ints); // towards zero, so the rest lies in -1/2 … 1/2
    const Lanes n = __builtin_convertvector(whole, Lanes);
    const Lanes rest = (x - n * 0.693359375f) - n * -2.12194440e-4f; // ln 2 in two parts, the first one exact
    // Taylor's series: |rest| is at most ln 2 / 2, where the next term is 6e-9
    Lanes power = rest * (1.0f / 5040) + 1.0f / 720;
    power = power * rest + 1.0f / 120;
    power = power * rest + 1.0f / 24;
    power = power * rest + 1.0f / 6;
    power = power * rest + 0.5f;
    power = power * rest + 1.0f;
    power = power * rest + 1.0f;
    const Ints bits = (whole + 127) << 23; // 2 to the power of n
    Lanes scale;
    std::memcpy(&scale, &bits, sizeof scale);
    const Lanes result = power * scale, zero = {};
    return small ? zero : result;
}

// x becomes exp(x - most); their sum
inline float exponentials(float *x, int64_t n, float most) {
    float total = 0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const Lanes y = exponential(load(x + i) - most);
        store(x + i, y);
        total += sum(y);
    }
    for (; i < n; i += LANES) {
        float part[LANES];
        const int64_t here = std::min<int64_t>(LANES, n - i);
        for (int l = 0; l < LANES; ++l) part[l] = l < here ? x[i + l] - most : -1e30f;
        store(part, exponential(load(part)));
        for (int l = 0; l < here; ++l) x[i + l] = part[l];
        total += sum(load(part));
    }
    return total;
}

} // namespace
