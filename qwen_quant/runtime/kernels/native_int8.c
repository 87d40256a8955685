/* Int8 codes of a weight as bitsandbytes makes them (bnb.py), for processors with AVX2 and F16C.  Included by
native_step.c, called by int8.py. */

#define INT8_STEP 7.874015718698502e-3f /* bitsandbytes multiplies by this literal instead of dividing by 127 */

enum { BF16_WEIGHT, FP16_WEIGHT, FP32_WEIGHT };

/* `count` <= 8 stored values from `at` on, zeros behind them. */
static inline __attribute__((always_inline)) __m256 stored_values(const void *weights, const int kind, int64_t at,
                                                                  int64_t count) {
    uint16_t halves[8] = {0};
    float wholes[8] = {0};
    if (kind == FP32_WEIGHT) {
        const float *from = (const float *)weights + at;
        return _mm256_loadu_ps(count == 8 ? from : memcpy(wholes, from, count * sizeof(float)));
    }
    const uint16_t *from = (const uint16_t *)weights + at;
    if (count < 8) from = memcpy(halves, from, count * sizeof(uint16_t));
    const __m128i part = _mm_loadu_si128((const __m128i *)from);
    if (kind == FP16_WEIGHT) return _mm256_cvtph_ps(part);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(part), 16));
}

static inline __m256 through_half(__m256 x) {
    return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

typedef struct {
    __m256 scale, back, wrong, size;
} int8_row_t;

/* Codes of 8 values, in the lowest 8 bytes; the squares of the values and of what is lost are added to the row's. */
static inline __attribute__((always_inline)) int64_t int8_codes(int8_row_t *row, __m256 x) {
    const __m256i whole = _mm256_cvtps_epi32(_mm256_mul_ps(through_half(x), row->scale)); /* ties to even */
    const __m256 dense = _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(whole), row->back), _mm256_set1_ps(INT8_STEP));
    const __m256 off = _mm256_sub_ps(dense, x);
    row->wrong = _mm256_fmadd_ps(off, off, row->wrong);
    row->size = _mm256_fmadd_ps(x, x, row->size);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    return _mm_cvtsi128_si64(_mm_packs_epi16(words, words));
}

/* One row: codes[width], returns its largest magnitude; sums[0] = |dense - row|^2, sums[1] = |row|^2. */
static inline __attribute__((always_inline)) float int8_row(const void *weights, const int kind, int64_t start,
                                                            int64_t width, int8_t *codes, double *sums) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    const int64_t even = width / 8 * 8, rest = width - even;
    __m256 most = _mm256_setzero_ps();
    for (int64_t i = 0; i < even; i += 8)
        most = _mm256_max_ps(most, _mm256_andnot_ps(sign, stored_values(weights, kind, start + i, 8)));
    if (rest) most = _mm256_max_ps(most, _mm256_andnot_ps(sign, stored_values(weights, kind, start + even, rest)));
    float lanes[8], largest = 0.0f;
    _mm256_storeu_ps(lanes, through_half(most)); /* rounding keeps the order, so the largest may be rounded last */
    for (int i = 0; i < 8; i++) largest = lanes[i] > largest ? lanes[i] : largest;
    const float scale = largest > 0.0f ? 127.0f * (1.0f / largest) : 0.0f; /* rounded twice, as torch divides */
    int8_row_t row = {_mm256_set1_ps(scale), _mm256_set1_ps(largest), _mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int64_t i = 0; i < even; i += 8) {
        const int64_t eight = int8_codes(&row, stored_values(weights, kind, start + i, 8));
        memcpy(codes + i, &eight, 8);
    }
    if (rest) {
        const int64_t eight = int8_codes(&row, stored_values(weights, kind, start + even, rest));
        memcpy(codes + even, &eight, rest);
    }
    sums[0] = horizontal(row.wrong);
    sums[1] = horizontal(row.size);
    return largest;
}

/* codes int8 [rows, width], scb FP32 [rows], sums FP64 [rows, 2] of finite weights [rows, width]. */
void int8_rows(const void *weights, int kind, int64_t rows, int64_t width, int8_t *codes, float *scb, double *sums,
               int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t n = 0; n < rows; n++) {
        int8_t *to = codes + n * width;
        if (kind == BF16_WEIGHT)
            scb[n] = int8_row(weights, BF16_WEIGHT, n * width, width, to, sums + 2 * n);
        else if (kind == FP16_WEIGHT)
            scb[n] = int8_row(weights, FP16_WEIGHT, n * width, width, to, sums + 2 * n);
        else
            scb[n] = int8_row(weights, FP32_WEIGHT, n * width, width, to, sums + 2 * n);
    }
}
