/* Products with 4-bit weights on x86-64 with AVX2, FMA and F16C.  Compiled and called by native.py.

Weights [rows, width], width a multiple of 64, group_size 32 or a multiple of 64:
    codes   rows * width / 2 bytes; 64 consecutive codes are 16 little-endian 16-bit lanes, lane j holds codes j,
            j + 16, j + 32 and j + 48 from its lowest four bits up
    scales  FP16 [rows, groups]
    zeros   uint8 [rows, groups], or NULL when all are 8
A weight is (code - zero) * scale.

product(): inputs are rounded to 16-bit integers, one scale per group of inputs, so that one multiply-add instruction
takes 16 products, and a shift and a mask of the lanes are its operand; sums of codes within a group are exact integers
(at most 256 * 15 * 32767, far below 2^31), zeros enter as zero * (sum of the inputs of the group).  The error is 2^-16
of the largest input of a group; a BF16 input has 2^-9 of each.  A group with an infinity or a NaN gives NaN. */

#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#define BLOCK 4       /* input rows that share one unpacking */
#define CHUNK 64      /* groups whose scales are made ready at once */
#define AHEAD 2048    /* bytes of codes that are asked for in advance */
#define LANES 16      /* codes that one multiply-add takes */

int supported(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

/* One group of inputs -> integers, the value of one unit, and the sum of the integers. */
static void round_group(const float *x, int64_t size, int16_t *q, float *unit, float *sum) {
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
    int32_t all = 0;
    for (int i = 0; i < 8; i++) all += parts[i];
    *sum = all;
    *unit = finite ? largest / 32767.0f : NAN;
}

static inline float horizontal(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* Scale of weights times unit of inputs for groups [first, first + size) and each row of inputs, into factors; returns
through totals what the zeros take off.  Eight groups at a time, the rest one by one. */
static inline __attribute__((always_inline)) void ready_factors(
    const uint16_t *scales, const uint8_t *zeros, const float *units, const float *sums, int64_t groups, int64_t size,
    const int count, float (*factors)[CHUNK], __m256 *totals) {
    int64_t g = 0;
    for (; g + 8 <= size; g += 8) {
        const __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(scales + g)));
        const __m256i whole = zeros ? _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(zeros + g)))
                                    : _mm256_set1_epi32(8);
        const __m256 zero = _mm256_cvtepi32_ps(whole);
        for (int m = 0; m < count; m++) {
            const __m256 factor = _mm256_mul_ps(scale, _mm256_loadu_ps(units + m * groups + g));
            _mm256_storeu_ps(factors[m] + g, factor);
            const __m256 off = _mm256_mul_ps(zero, _mm256_loadu_ps(sums + m * groups + g));
            totals[m] = _mm256_fnmadd_ps(factor, off, totals[m]);
        }
    }
    for (; g < size; g++)
        for (int m = 0; m < count; m++) {
            factors[m][g] = _cvtsh_ss(scales[g]) * units[m * groups + g];
            const float off = factors[m][g] * ((zeros ? zeros[g] : 8) * sums[m * groups + g]);
            totals[m] = _mm256_sub_ps(totals[m], _mm256_zextps128_ps256(_mm_set_ss(off)));
        }
}

/* Sums of 16 codes, the `quarter`th of each lane of packed, times inputs. */
static inline __attribute__((always_inline)) __m256i multiply(__m256i packed, const int quarter, const int16_t *x) {
    const __m256i shifted = _mm256_srli_epi16(packed, 4 * quarter);
    const __m256i codes = quarter == 3 ? shifted : _mm256_and_si256(shifted, _mm256_set1_epi16(15));
    return _mm256_madd_epi16(codes, _mm256_loadu_si256((const __m256i *)(x + LANES * quarter)));
}

static inline __m256 scaled(__m256i sum, float factor, __m256 total) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(factor), total);
}

/* One weight row times `count` rows of rounded inputs; inlined once per constant count and kind of group. */
static inline __attribute__((always_inline)) void row_product(
    const uint8_t *codes, const uint16_t *scales, const uint8_t *zeros, const int16_t *q, const float *units,
    const float *sums, int64_t width, int64_t group_size, const int count, const int small, float *out,
    int64_t out_stride) {
    const int64_t groups = width / group_size, wide = small ? 64 : group_size, step = small ? 2 : 1;
    __m256 totals[BLOCK];
    float factors[BLOCK][CHUNK];
    for (int m = 0; m < count; m++) totals[m] = _mm256_setzero_ps();
    for (int64_t first = 0; first < groups; first += CHUNK) {
        const int64_t size = groups - first < CHUNK ? groups - first : CHUNK;
        ready_factors(scales + first, zeros ? zeros + first : 0, units + first, sums + first, groups, size, count,
                      factors, totals);
        for (int64_t g = 0; g < size; g += step) {
            __m256i low[BLOCK], high[BLOCK];
            for (int m = 0; m < count; m++) low[m] = high[m] = _mm256_setzero_si256();
            const int64_t start = (first + g) * group_size;
            for (int64_t k = start; k < start + wide; k += 64) {
                const __m256i packed = _mm256_loadu_si256((const __m256i *)(codes + k / 2));
                _mm_prefetch((const char *)(codes + k / 2 + AHEAD), _MM_HINT_T0);
                for (int m = 0; m < count; m++) {
                    const int16_t *x = q + m * width + k;
                    const __m256i first_half = _mm256_add_epi32(multiply(packed, 0, x), multiply(packed, 1, x));
                    const __m256i last_half = _mm256_add_epi32(multiply(packed, 2, x), multiply(packed, 3, x));
                    low[m] = _mm256_add_epi32(low[m], first_half);
                    high[m] = _mm256_add_epi32(high[m], last_half);
                }
            }
            for (int m = 0; m < count; m++) {
                if (small) { /* two groups of 32 lie in one load */
                    totals[m] = scaled(low[m], factors[m][g], totals[m]);
                    totals[m] = scaled(high[m], factors[m][g + 1], totals[m]);
                } else {
                    totals[m] = scaled(_mm256_add_epi32(low[m], high[m]), factors[m][g], totals[m]);
                }
            }
        }
    }
    for (int m = 0; m < count; m++) out[m * out_stride] = horizontal(totals[m]);
}

/* out[count, rows] = inputs[count, width] times the transposed weights. Returns 0, or 1 when memory ran out. */
int product(const uint8_t *codes, const uint16_t *scales, const uint8_t *zeros, const float *inputs, float *out,
            int64_t count, int64_t rows, int64_t width, int64_t group_size, int threads) {
    const int64_t groups = width / group_size;
    int16_t *q = malloc(count * width * sizeof *q);
    float *units = malloc(count * groups * sizeof *units);
    float *sums = malloc(count * groups * sizeof *sums); /* integers, exact in FP32: at most 256 * 32767 */
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
                const float *sum = sums + m * groups;
                float *to = out + m * rows + n;
                const int together = count - m >= BLOCK ? BLOCK : 1;
                if (group_size == 32 && together == 1)
                    row_product(row, scale, zero, x, unit, sum, width, 32, 1, 1, to, rows);
                else if (group_size == 32)
                    row_product(row, scale, zero, x, unit, sum, width, 32, BLOCK, 1, to, rows);
                else if (together == 1)
                    row_product(row, scale, zero, x, unit, sum, width, group_size, 1, 0, to, rows);
                else
                    row_product(row, scale, zero, x, unit, sum, width, group_size, BLOCK, 0, to, rows);
                m += together;
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
    const __m256i mask = _mm256_set1_epi16(15);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t n = 0; n < rows; n++) {
        for (int64_t k = 0; k < width; k += 64) {
            const __m256i packed = _mm256_loadu_si256((const __m256i *)(codes + (n * width + k) / 2));
            for (int quarter = 0; quarter < 4; quarter++) {
                const int64_t at = k + LANES * quarter, g = n * groups + at / group_size;
                const __m256 scale = _mm256_set1_ps(_cvtsh_ss(scales[g]));
                const __m256i zero = _mm256_set1_epi16(zeros ? zeros[g] : 8);
                const __m256i lanes = _mm256_and_si256(_mm256_srl_epi16(packed, _mm_cvtsi32_si128(4 * quarter)), mask);
                const __m256i values = _mm256_sub_epi16(lanes, zero);
                float *to = out + n * width + at;
                const __m256 first = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(values)));
                const __m256 last = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_extracti128_si256(values, 1)));
                _mm256_storeu_ps(to, _mm256_mul_ps(first, scale));
                _mm256_storeu_ps(to + 8, _mm256_mul_ps(last, scale));
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
