// The slot of every head that goes first, and what is put into it.

#include <cstdint>
#include <cstring>
#include <limits>

// slot [batch, heads]: of the slots that are no padding (pos >= 0) the one with the lowest score, the newest at equal
// ones; 0 where there is none. Whether a score among them is NaN or -inf. The strides are those of scores and positions.
extern "C" int32_t lowest(const float *scores, int64_t score_batch, int64_t score_head, const int32_t *pos,
                          int64_t pos_batch, int64_t pos_head, int64_t batch, int64_t heads, int64_t slots, int64_t *slot) {
    int32_t odd = 0;
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t h = 0; h < heads; ++h) {
            const float *x = scores + b * score_batch + h * score_head;
            const int32_t *at = pos + b * pos_batch + h * pos_head;
            float least = std::numeric_limits<float>::infinity();
            int32_t broken = 0;
            for (int64_t i = 0; i < slots; ++i) {
                const bool real = at[i] >= 0;
                broken |= real & (x[i] != x[i]);
                least = real & (x[i] < least) ? x[i] : least;
            }
            int32_t newest = -1;
            int64_t best = 0;
            for (int64_t i = 0; i < slots; ++i)
                if (x[i] == least && at[i] > newest) newest = at[i], best = i;
            odd |= broken | (least == -std::numeric_limits<float>::infinity());
            slot[b * heads + h] = best;
        }
    return odd;
}

// The value [rows, size bytes] of every row goes into its place of a buffer [rows, places, size bytes].
extern "C" void put(char *buffer, int64_t row, int64_t place, const int64_t *slot, const char *value, int64_t value_row,
                    int64_t rows, int64_t size) {
    for (int64_t r = 0; r < rows; ++r) std::memcpy(buffer + r * row + slot[r] * place, value + r * value_row, size);
}
