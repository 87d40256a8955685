/* Products with 4-bit weights on x86-64 with AVX2, FMA and F16C.  Compiled and called by native.py.

Weights [rows, width], width a multiple of group_size, group_size a multiple of 32:
    codes   rows * width / 2 bytes; of each 32 consecutive codes, byte j holds code j low and code j + 16 high
    scales  FP16 [rows, groups]
    zeros   uint8 [rows, groups], or NULL when all are 8
A weight is (code - zero) * scale.

product(): inputs are rounded to 16-bit integers, one scale per group of inputs, so that one multiply-add instruction
takes 16 products; sums within a group are exact integers (at most 256 * 15 * 32767 * 2, far below 2^31).  The error is
2^-16 of the largest input of a group; a BF16 input has 2^-9 of each.  A group with an infinity or a NaN gives NaN. */

#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#define BLOCK 4 /* input rows that share one unpacking */

int supported(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

/* One group of inputs -> integers, the value of one unit, and the sum of the integers. */
static void round_group(const float *x, int64_t size, int16_t *q, float *unit, int32_t *sum) {
    const __m256 sign = _mm256_set1_ps(-0.0f), limit = _mm256_set1_ps(FLT_MAX);
    __m256 most = _mm256_setzero_ps(), fine = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
    for (int64_t i = 0; i < size; i += 8) {
        __m256 a = _mm256_andnot_ps(sign, _mm256_loadu_ps(x + i));
        fine = _mm256_and_ps(fine, _mm256_cmp_ps(a, limit, _CMP_LE_OQ));
        most = _mm256_max_ps(most, a);
    }
    float lanes[8], largest = 0;
    _mm256_storeu_ps(lanes, most);
    for (int i = 0; i < 8; i++) largest = lanes[i] > largest ? lanes[i] : largest;
    const int finite = _mm256_movemask_ps(fine) == 255;
    /* below this the inverse of a unit would overflow; such inputs add nothing that FP32 sums would keep */
    const float inverse = finite && largest > 1e-30f ? 32767.0f / largest : 0.0f;
    const __m256 scale = _mm256_set1_ps(inverse);
    __m256i total = _mm256_setzero_si256();
    for (int64_t i = 0; i < size; i += 16) {
        __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), scale));
        __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8), scale));
        if (!finite) a = b = _mm256_setzero_si256();
        total = _mm256_add_epi32(total, _mm256_add_epi32(a, b));
        _mm256_storeu_si256((__m256i *)(q + i), _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xD8));
    }
    int32_t parts[8];
    _mm256_storeu_si256((__m256i *)parts, total);
    *sum = 0;
    for (int i = 0; i < 8; i++) *sum += parts[i];
    *unit = finite ? largest / 32767.0f : NAN;
}

static inline float horizontal(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* One weight row times `count` rows of rounded inputs; inlined once per constant count. */
static inline __attribute__((always_inline)) void row_product(
    const uint8_t *codes, const uint16_t *scales, const uint8_t *zeros, const int16_t *q, const float *units,
    const int32_t *sums, int64_t width, int64_t group_size, const int count, float *out, int64_t out_stride) {
    const int64_t groups = width / group_size;
    const __m128i mask = _mm_set1_epi8(15);
    __m256 totals[BLOCK];
    for (int m = 0; m < count; m++) totals[m] = _mm256_setzero_ps();
    for (int64_t g = 0; g < groups; g++) {
        __m256i low[BLOCK], high[BLOCK];
        const int zero = zeros ? zeros[g] : 8;
        for (int m = 0; m < count; m++) {
            low[m] = _mm256_zextsi128_si256(_mm_cvtsi32_si128(-zero * sums[m * groups + g]));
            high[m] = _mm256_setzero_si256();
        }
        for (int64_t k = g * group_size; k < (g + 1) * group_size; k += 32) {
            const __m128i packed = _mm_loadu_si128((const __m128i *)(codes + k / 2));
            const __m256i first = _mm256_cvtepu8_epi16(_mm_and_si128(packed, mask));
            const __m256i second = _mm256_cvtepu8_epi16(_mm_and_si128(_mm_srli_epi16(packed, 4), mask));
            for (int m = 0; m < count; m++) {
                const __m256i *x = (const __m256i *)(q + m * width + k);
                low[m] = _mm256_add_epi32(low[m], _mm256_madd_epi16(first, _mm256_loadu_si256(x)));
                high[m] = _mm256_add_epi32(high[m], _mm256_madd_epi16(second, _mm256_loadu_si256(x + 1)));
            }
        }
        const float scale = _cvtsh_ss(scales[g]);
        for (int m = 0; m < count; m++)
            totals[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(low[m], high[m])),
                                        _mm256_set1_ps(scale * units[m * groups + g]), totals[m]);
    }
    for (int m = 0; m < count; m++) out[m * out_stride] = horizontal(totals[m]);
}

/* out[count, rows] = inputs[count, width] times the transposed weights. Returns 0, or 1 when memory ran out. */
int product(const uint8_t *codes, const uint16_t *scales, const uint8_t *zeros, const float *inputs, float *out,
            int64_t count, int64_t rows, int64_t width, int64_t group_size, int threads) {
    const int64_t groups = width / group_size;
    int16_t *q = malloc(count * width * sizeof *q);
    float *units = malloc(count * groups * sizeof *units);
    int32_t *sums = malloc(count * groups * sizeof *sums);
    const int failed = !q || !units || !sums;
    if (!failed) {
        for (int64_t i = 0; i < count * groups; i++)
            round_group(inputs + i * group_size, group_size, q + i * group_size, units + i, sums + i);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (int64_t n = 0; n < rows; n++) {
            const uint8_t *row = codes + n * width / 2, *zero = zeros ? zeros + n * groups : 0;
            const uint16_t *scale = scales + n * groups;
            for (int64_t m = 0; m < count;) {
                const int16_t *x = q + m * width;
                const float *unit = units + m * groups;
                const int32_t *sum = sums + m * groups;
                float *to = out + m * rows + n;
                if (count - m >= BLOCK) {
                    row_product(row, scale, zero, x, unit, sum, width, group_size, BLOCK, to, rows);
                    m += BLOCK;
                } else {
                    row_product(row, scale, zero, x, unit, sum, width, group_size, 1, to, rows);
                    m += 1;
                }
            }
        }
    }
    free(q);
    free(units);
    free(sums);
    return failed;
}

/* out FP32 [rows, width] = the weights. */
void dequantize(const uint8_t *codes, const uint16_t *scales, const uint8_t *zeros, float *out, int64_t rows,
                int64_t width, int64_t group_size, int threads) {
    const int64_t groups = width / group_size;
    const __m128i mask = _mm_set1_epi8(15);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t n = 0; n < rows; n++) {
        for (int64_t k = 0; k < width; k += 32) {
            const int64_t g = n * groups + k / group_size;
            const __m128i zero = _mm_set1_epi8(zeros ? (char)zeros[g] : 8);
            const __m256 scale = _mm256_set1_ps(_cvtsh_ss(scales[g]));
            const __m128i packed = _mm_loadu_si128((const __m128i *)(codes + (n * width + k) / 2));
            __m128i part[2] = {_mm_sub_epi8(_mm_and_si128(packed, mask), zero),
                               _mm_sub_epi8(_mm_and_si128(_mm_srli_epi16(packed, 4), mask), zero)};
            for (int i = 0; i < 4; i++) {
                const __m128i bytes = i & 1 ? _mm_srli_si128(part[i / 2], 8) : part[i / 2];
                const __m256 value = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
                _mm256_storeu_ps(out + n * width + k + 8 * i, _mm256_mul_ps(value, scale));
            }
        }
    }
}

/* out[count, rows] = inputs[count, width] times transposed BF16 weights [rows, width]; sums in FP32. */
void bf16_product(const uint16_t *weights, const float *inputs, float *out, int64_t count, int64_t rows, int64_t width,
                  int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t n = 0; n < rows; n++) {
        const uint16_t *w = weights + n * width;
        for (int64_t m = 0; m < count; m++) {
            const float *x = inputs + m * width;
            __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
            int64_t k = 0;
            for (; k + 32 <= width; k += 32)
                for (int i = 0; i < 4; i++) {
                    const __m128i part = _mm_loadu_si128((const __m128i *)(w + k + 8 * i));
                    const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(part), 16);
                    sums[i] = _mm256_fmadd_ps(_mm256_castsi256_ps(wide), _mm256_loadu_ps(x + k + 8 * i), sums[i]);
                }
            float rest = 0;
            for (; k < width; k++) {
                union { uint32_t bits; float value; } one = {(uint32_t)w[k] << 16};
                rest += one.value * x[k];
            }
            out[m * rows + n] =
                rest + horizontal(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
        }
    }
}
