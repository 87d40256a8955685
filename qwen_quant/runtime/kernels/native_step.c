/* One decoding step of a dense Qwen2 or Qwen3 decoder, one row, on top of the products of native.c: what lies between
two products (norms, rotation, attention, gate) costs more than they do when a small model runs it operator by operator.
Called by runtime/native_step.py, whose ctypes structures mirror the ones here.  All threads walk through the whole step
together; a barrier stands wherever one needs what another made.  Activations are FP32. */

#include "native.c"

#define MOST_GROUPS 1024 /* of a linear's inputs */

typedef struct {
    const uint8_t *codes;
    const uint16_t *scales;
    const uint8_t *zeros; /* NULL: all 8 */
    const float *bias;    /* or NULL */
    int64_t rows, width, group_size;
} linear_t;

typedef struct {
    linear_t query, key, value, output, gate, up, down;
    const float *input_norm, *middle_norm; /* [hidden] */
    const float *query_norm, *key_norm;    /* [head_dim], or NULL */
    float *keys, *values;                  /* [kv_heads, capacity, head_dim] */
} layer_t;

typedef struct {
    int64_t layers, hidden, heads, kv_heads, head_dim, intermediate, vocabulary, capacity;
    float epsilon, attention_scale;
    const layer_t *layer;
    const uint16_t *embedding, *head;    /* BF16 [vocabulary, hidden] */
    const float *final_norm;             /* [hidden] */
    const float *cosines, *sines;        /* [capacity, head_dim] */
    float *state, *normed, *mixed, *wide; /* [hidden], [width of query], [width of output], [width of down] */
    float *queries, *gates;              /* [heads * head_dim], [intermediate] */
    float *scores;                       /* [heads, capacity rounded up to 8] */
    int16_t *rounded;                    /* [widest input] */
    float *units, *sums;                 /* [MOST_GROUPS] */
    float *logits;                       /* [vocabulary] */
} model_t;

/* e^x to 1e-7 relative: 2^n times a Taylor polynomial of 2^f, |f| <= 1/2. */
static inline __m256 exponential(__m256 x) {
    const __m256 low = _mm256_set1_ps(-87.0f), high = _mm256_set1_ps(88.0f);
    const __m256 t = _mm256_mul_ps(_mm256_min_ps(_mm256_max_ps(x, low), high), _mm256_set1_ps(1.44269504089f));
    const __m256 n = _mm256_round_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = _mm256_sub_ps(t, n);
    const float terms[] = {1.52527338e-5f, 1.54035304e-4f, 1.33335581e-3f, 9.61812911e-3f,
                           5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f}; /* ln(2)^k / k!, k from 7 to 0 */
    __m256 p = _mm256_set1_ps(terms[0]);
    for (int k = 1; k < 8; k++) p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(terms[k]));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(p, _mm256_castsi256_ps(power));
}

static float dot(const float *a, const float *b, int64_t size) { /* size a multiple of 8 */
    __m256 sum = _mm256_setzero_ps();
    for (int64_t i = 0; i < size; i += 8) sum = _mm256_fmadd_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i), sum);
    return horizontal(sum);
}

static void rms_norm(const float *x, const float *weight, float *out, int64_t size, float epsilon) {
    const float inverse = 1.0f / sqrtf(dot(x, x, size) / size + epsilon);
    for (int64_t i = 0; i < size; i++) out[i] = weight[i] * (x[i] * inverse);
}

static void round_inputs(const model_t *m, const float *x, int64_t width, int64_t group_size) {
    for (int64_t g = 0; g < width / group_size; g++)
        round_group(x + g * group_size, group_size, m->rounded + g * group_size, m->units + g, m->sums + g);
}

/* out = the rounded inputs times the transposed weight, plus bias, plus what out holds when `add`. */
static void multiply_rows(const model_t *m, const linear_t *l, float *out, const int add) {
    const int64_t groups = l->width / l->group_size;
#pragma omp for schedule(static) nowait
    for (int64_t n = 0; n < l->rows; n++) {
        const uint8_t *codes = l->codes + n * l->width / 2, *zeros = l->zeros ? l->zeros + n * groups : 0;
        const uint16_t *scales = l->scales + n * groups;
        float result;
        if (l->group_size == 32)
            row_product(codes, scales, zeros, m->rounded, m->units, m->sums, l->width, 32, 1, 1, &result, 1);
        else
            row_product(codes, scales, zeros, m->rounded, m->units, m->sums, l->width, l->group_size, 1, 0, &result, 1);
        out[n] = result + (l->bias ? l->bias[n] : 0.0f) + (add ? out[n] : 0.0f);
    }
}

/* Norm of a head's vector (where the family has one), then rotation by the position's angles. */
static void place_head(const model_t *m, float *head, const float *norm, int64_t position) {
    const int64_t size = m->head_dim, half = size / 2;
    const float *cosine = m->cosines + position * size, *sine = m->sines + position * size;
    if (norm) rms_norm(head, norm, head, size, m->epsilon);
    for (int64_t i = 0; i < half; i++) {
        const float a = head[i], b = head[i + half];
        head[i] = a * cosine[i] - b * sine[i];
        head[i + half] = b * cosine[i + half] + a * sine[i + half];
    }
}

/* mixed[one head] = softmax(q K^T * scale) V over positions 0 to `position`. */
static void attend(const model_t *m, const layer_t *layer, int64_t head, int64_t position) {
    const int64_t size = m->head_dim, kv = head / (m->heads / m->kv_heads), padded = (m->capacity + 7) / 8 * 8;
    const float *keys = layer->keys + kv * m->capacity * size, *values = layer->values + kv * m->capacity * size;
    const float *query = m->queries + head * size;
    float *scores = m->scores + head * padded, *out = m->mixed + head * size, largest = -INFINITY;
    for (int64_t t = 0; t <= position; t++) {
        scores[t] = dot(query, keys + t * size, size) * m->attention_scale;
        largest = scores[t] > largest ? scores[t] : largest;
    }
    __m256 sums = _mm256_setzero_ps();
    for (int64_t t = position + 1; t < (position + 8) / 8 * 8; t++) scores[t] = -INFINITY;
    for (int64_t t = 0; t <= position; t += 8) {
        const __m256 shifted = _mm256_sub_ps(_mm256_loadu_ps(scores + t), _mm256_set1_ps(largest));
        const __m256 inside = _mm256_cmp_ps(shifted, _mm256_set1_ps(-87.0f), _CMP_GE_OQ);
        const __m256 weight = _mm256_and_ps(exponential(shifted), inside);
        _mm256_storeu_ps(scores + t, weight);
        sums = _mm256_add_ps(sums, weight);
    }
    const float inverse = 1.0f / horizontal(sums);
    for (int64_t i = 0; i < size; i++) out[i] = 0.0f;
    for (int64_t t = 0; t <= position; t++) {
        const __m256 weight = _mm256_set1_ps(scores[t] * inverse);
        for (int64_t i = 0; i < size; i += 8)
            _mm256_storeu_ps(out + i, _mm256_fmadd_ps(weight, _mm256_loadu_ps(values + t * size + i), _mm256_loadu_ps(out + i)));
    }
}

static void attention_half(const model_t *m, const layer_t *layer, int64_t position) {
    const int64_t size = m->head_dim, at = position * size;
#pragma omp single
    {
        rms_norm(m->state, layer->input_norm, m->normed, m->hidden, m->epsilon);
        round_inputs(m, m->normed, layer->query.width, layer->query.group_size);
    }
    multiply_rows(m, &layer->query, m->queries, 0);
    multiply_rows(m, &layer->key, m->gates, 0);
    multiply_rows(m, &layer->value, m->gates + m->kv_heads * size, 0);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t h = 0; h < m->heads + m->kv_heads; h++) {
        if (h < m->heads) {
            place_head(m, m->queries + h * size, layer->query_norm, position);
            continue;
        }
        const int64_t kv = h - m->heads;
        float *key = layer->keys + kv * m->capacity * size + at, *value = layer->values + kv * m->capacity * size + at;
        for (int64_t i = 0; i < size; i++) key[i] = m->gates[kv * size + i];
        for (int64_t i = 0; i < size; i++) value[i] = m->gates[(m->kv_heads + kv) * size + i];
        place_head(m, key, layer->key_norm, position);
    }
#pragma omp for schedule(static)
    for (int64_t h = 0; h < m->heads; h++) attend(m, layer, h, position);
#pragma omp single
    round_inputs(m, m->mixed, layer->output.width, layer->output.group_size);
    multiply_rows(m, &layer->output, m->state, 1);
#pragma omp barrier
}

static void gated_half(const model_t *m, const layer_t *layer) {
#pragma omp single
    {
        rms_norm(m->state, layer->middle_norm, m->normed, m->hidden, m->epsilon);
        round_inputs(m, m->normed, layer->gate.width, layer->gate.group_size);
    }
    multiply_rows(m, &layer->gate, m->gates, 0);
    multiply_rows(m, &layer->up, m->wide, 0);
#pragma omp barrier
#pragma omp single
    {
        for (int64_t i = 0; i < m->intermediate; i += 8) {
            const __m256 x = _mm256_loadu_ps(m->gates + i), one = _mm256_set1_ps(1.0f);
            const __m256 below = _mm256_add_ps(one, exponential(_mm256_sub_ps(_mm256_setzero_ps(), x)));
            _mm256_storeu_ps(m->wide + i, _mm256_mul_ps(_mm256_loadu_ps(m->wide + i), _mm256_div_ps(x, below)));
        }
        round_inputs(m, m->wide, layer->down.width, layer->down.group_size);
    }
    multiply_rows(m, &layer->down, m->state, 1);
#pragma omp barrier
}

/* The likeliest token after `token` at `position`; logits stay in m->logits, keys and values in the layers' storage. */
int64_t decode_step(const model_t *m, int64_t token, int64_t position, int threads) {
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
        for (int64_t i = 0; i < m->hidden; i++) {
            union { uint32_t bits; float value; } one = {(uint32_t)m->embedding[token * m->hidden + i] << 16};
            m->state[i] = one.value;
        }
        for (int64_t k = 0; k < m->layers; k++) {
            attention_half(m, m->layer + k, position);
            gated_half(m, m->layer + k);
        }
#pragma omp single
        rms_norm(m->state, m->final_norm, m->normed, m->hidden, m->epsilon);
    }
    bf16_product(m->head, m->normed, m->logits, 1, m->vocabulary, m->hidden, threads);
    int64_t best = 0;
    for (int64_t n = 1; n < m->vocabulary; n++) best = m->logits[n] > m->logits[best] ? n : best;
    return best;
}
