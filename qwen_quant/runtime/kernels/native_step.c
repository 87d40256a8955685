/* One decoding step of a dense Qwen2 or Qwen3 decoder, one row, on top of the products of native.c: what lies between
two products (norms, rotation, attention, gate) costs more than they do when a small model runs it operator by operator.
Called by runtime/native_step.py, whose ctypes structures mirror the ones here.  Activations are FP32.

All threads walk through the whole step together, each with its share of the rows or heads; a barrier stands wherever
one needs what another made.  There are twelve of them in a block of a tenth of a millisecond, so waiting is a short spin, and
a yield where the processor is wanted by others: OpenMP's own barrier puts threads to sleep. */

#include <omp.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>

#include "native.c"
#include "native_int8.c"

#define MOST_GROUPS 1024 /* of a linear's inputs */
#define SPAN 32          /* positions whose keys or values stay near while all query heads that share them pass */
#define TEAM 4           /* query heads that share one load of a key or value */

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
    float *keys, *values;                  /* [kv_heads, capacity, head_dim], NULL with another of the three */
    uint16_t *key_halves, *value_halves;   /* the same in BF16 */
    int8_t *key_codes, *value_codes;       /* the same of an Int8 cache: value = scale * code */
    float *key_scales, *value_scales;      /* [kv_heads, capacity] */
} layer_t;

enum { WHOLE, CODED, HALF }; /* how a cache holds its vectors */

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

typedef struct {
    int id, count;
    atomic_int *arrived, *round;
} team_t;

#define SPINS 4000

static void barrier(const team_t *t) {
    if (t->count == 1) return;
    const int round = atomic_load_explicit(t->round, memory_order_relaxed);
    if (atomic_fetch_add_explicit(t->arrived, 1, memory_order_acq_rel) == t->count - 1) {
        atomic_store_explicit(t->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(t->round, round + 1, memory_order_release);
        return;
    }
    for (int spins = 0; atomic_load_explicit(t->round, memory_order_acquire) == round; spins++)
        if (spins < SPINS)
            _mm_pause();
        else
            sched_yield();
}

/* This thread's share of `size` things: [*start, *stop). */
static void share(const team_t *t, int64_t size, int64_t *start, int64_t *stop) {
    *start = size * t->id / t->count;
    *stop = size * (t->id + 1) / t->count;
}

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

/* Eight codes as floats. */
static inline __m256 widened(const int8_t *codes) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)codes)));
}

/* One token's vector as the Int8 cache holds it, bit for bit quantize_per_token of kv_cache.py in FP32. */
static void store_codes(const float *x, int64_t size, int8_t *codes, float *scale) {
    float largest = 0.0f;
    for (int64_t i = 0; i < size; i++) largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
    *scale = largest / 127.0f;
    if (*scale * 127.0f < largest) *scale = nextafterf(*scale, INFINITY);
    const float divisor = *scale > 0.0f ? *scale : 1.0f;
    for (int64_t i = 0; i < size; i++) {
        const float code = rintf(x[i] / divisor);
        codes[i] = (int8_t)(code > 127.0f ? 127.0f : code < -127.0f ? -127.0f : code);
    }
}

static void rms_norm(const float *x, const float *weight, float *out, int64_t size, float epsilon) {
    const float inverse = 1.0f / sqrtf(dot(x, x, size) / size + epsilon);
    for (int64_t i = 0; i < size; i++) out[i] = weight[i] * (x[i] * inverse);
}

static void round_inputs(const model_t *m, const float *x, int64_t width, int64_t group_size) {
    for (int64_t g = 0; g < width / group_size; g++)
        round_group(x + g * group_size, group_size, m->rounded + g * group_size, m->units + g, m->sums + g);
}

/* out = the rounded inputs times the transposed weight, plus bias, plus what out holds when `add`; this thread's. */
static void multiply_rows(const model_t *m, const linear_t *l, float *out, const int add, const team_t *t) {
    const int64_t groups = l->width / l->group_size;
    int64_t start, stop;
    share(t, l->rows, &start, &stop);
    for (int64_t n = start; n < stop; n++) {
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

static int cache_kind(const layer_t *layer) { return layer->key_codes ? CODED : layer->key_halves ? HALF : WHOLE; }

/* Eight values of a cached vector; a coded one's scale is applied by the caller. Those to come are asked for. */
static inline __attribute__((always_inline)) __m256 cached(const float *values, const int8_t *codes,
                                                           const uint16_t *halves, int64_t at, const int kind) {
    const char *place = kind == CODED ? (const char *)(codes + at)
                        : kind == HALF ? (const char *)(halves + at)
                                       : (const char *)(values + at);
    _mm_prefetch(place + AHEAD, _MM_HINT_T0);
    if (kind == CODED) return widened(codes + at);
    if (kind == WHOLE) return _mm256_loadu_ps(values + at);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)place)), 16));
}

/* One token's vector in BF16, rounded to the nearest, ties to even. */
static void store_halves(const float *x, int64_t size, uint16_t *halves) {
    for (int64_t i = 0; i < size; i++) {
        union { float value; uint32_t bits; } one = {x[i]};
        halves[i] = (uint16_t)((one.bits + 0x7FFF + (one.bits >> 16 & 1)) >> 16);
    }
}

/* Scores of `count` query heads from `head` on, which share key head kv, at positions t to t + places - 1. */
static inline __attribute__((always_inline)) void score(const model_t *m, const layer_t *layer, int64_t kv,
                                                        int64_t head, const int count, int64_t t, const int places,
                                                        const int kind) {
    const int64_t size = m->head_dim, padded = (m->capacity + 7) / 8 * 8, first = kv * m->capacity + t;
    const float *query = m->queries + head * size;
    float *scores = m->scores + head * padded + t;
    __m256 sums[2][TEAM];
    for (int p = 0; p < places; p++)
        for (int h = 0; h < count; h++) sums[p][h] = _mm256_setzero_ps();
    for (int64_t i = 0; i < size; i += 8) {
        __m256 keys[2];
        for (int p = 0; p < places; p++)
            keys[p] = cached(layer->keys, layer->key_codes, layer->key_halves, (first + p) * size + i, kind);
        for (int h = 0; h < count; h++) {
            const __m256 part = _mm256_loadu_ps(query + h * size + i);
            for (int p = 0; p < places; p++) sums[p][h] = _mm256_fmadd_ps(keys[p], part, sums[p][h]);
        }
    }
    for (int p = 0; p < places; p++) {
        const float unit = kind == CODED ? layer->key_scales[first + p] : 1.0f;
        for (int h = 0; h < count; h++) scores[h * padded + p] = horizontal(sums[p][h]) * unit * m->attention_scale;
    }
}

/* Adds weight times value over positions [t, stop) to `wide` vectors of columns of `count` query heads' outputs. */
static inline __attribute__((always_inline)) void mix(const model_t *m, const layer_t *layer, int64_t kv, int64_t head,
                                                      const int count, int64_t t, int64_t stop, int64_t column,
                                                      const int wide, const int kind) {
    const int64_t size = m->head_dim, padded = (m->capacity + 7) / 8 * 8, first = kv * m->capacity;
    const float *weights = m->scores + head * padded;
    float *out = m->mixed + head * size + column;
    __m256 sums[TEAM][2];
    for (int h = 0; h < count; h++)
        for (int c = 0; c < wide; c++) sums[h][c] = _mm256_loadu_ps(out + h * size + 8 * c);
    for (; t < stop; t++) {
        __m256 values[2];
        for (int c = 0; c < wide; c++)
            values[c] = cached(layer->values, layer->value_codes, layer->value_halves,
                               (first + t) * size + column + 8 * c, kind);
        for (int h = 0; h < count; h++) {
            const __m256 weight = _mm256_broadcast_ss(weights + h * padded + t);
            for (int c = 0; c < wide; c++) sums[h][c] = _mm256_fmadd_ps(weight, values[c], sums[h][c]);
        }
    }
    for (int h = 0; h < count; h++)
        for (int c = 0; c < wide; c++) _mm256_storeu_ps(out + h * size + 8 * c, sums[h][c]);
}

static inline __attribute__((always_inline)) void score_span(const model_t *m, const layer_t *layer, int64_t kv,
                                                             int64_t head, const int count, int64_t t, int64_t stop,
                                                             const int kind) {
    for (; t + 2 <= stop; t += 2) score(m, layer, kv, head, count, t, 2, kind);
    if (t < stop) score(m, layer, kv, head, count, t, 1, kind);
}

static inline __attribute__((always_inline)) void mix_span(const model_t *m, const layer_t *layer, int64_t kv,
                                                           int64_t head, const int count, int64_t t, int64_t stop,
                                                           int64_t column, int64_t end, const int kind) {
    for (; column + 16 <= end; column += 16) mix(m, layer, kv, head, count, t, stop, column, 2, kind);
    if (column < end) mix(m, layer, kv, head, count, t, stop, column, 1, kind);
}

/* FUNCTION(..., count, ..., kind) with both as constants, for `count` from 1 to TEAM. */
#define WITH_CONSTANTS(FUNCTION, count, kind, ...)                                                                     \
    switch ((count) + (kind) * TEAM) {                                                                                 \
    case 1: FUNCTION(m, layer, kv, head, 1, __VA_ARGS__, WHOLE); break;                                                \
    case 2: FUNCTION(m, layer, kv, head, 2, __VA_ARGS__, WHOLE); break;                                                \
    case 3: FUNCTION(m, layer, kv, head, 3, __VA_ARGS__, WHOLE); break;                                                \
    case 4: FUNCTION(m, layer, kv, head, 4, __VA_ARGS__, WHOLE); break;                                                \
    case 5: FUNCTION(m, layer, kv, head, 1, __VA_ARGS__, CODED); break;                                                \
    case 6: FUNCTION(m, layer, kv, head, 2, __VA_ARGS__, CODED); break;                                                \
    case 7: FUNCTION(m, layer, kv, head, 3, __VA_ARGS__, CODED); break;                                                \
    case 8: FUNCTION(m, layer, kv, head, 4, __VA_ARGS__, CODED); break;                                                \
    case 9: FUNCTION(m, layer, kv, head, 1, __VA_ARGS__, HALF); break;                                                 \
    case 10: FUNCTION(m, layer, kv, head, 2, __VA_ARGS__, HALF); break;                                                \
    case 11: FUNCTION(m, layer, kv, head, 3, __VA_ARGS__, HALF); break;                                                \
    default: FUNCTION(m, layer, kv, head, 4, __VA_ARGS__, HALF);                                                       \
    }

/* scores = q K^T * scale over positions 0 to `position`; this thread's share of spans of all key heads. */
static void score_heads(const model_t *m, const layer_t *layer, int64_t position, const team_t *team) {
    const int64_t spans = position / SPAN + 1, shared = m->heads / m->kv_heads;
    const int kind = cache_kind(layer);
    int64_t start, end;
    share(team, m->kv_heads * spans, &start, &end);
    for (int64_t unit = start; unit < end; unit++) {
        const int64_t kv = unit / spans, t = unit % spans * SPAN;
        const int64_t stop = t + SPAN < position + 1 ? t + SPAN : position + 1;
        for (int64_t head = kv * shared, last = head + shared; head < last; head += TEAM)
            WITH_CONSTANTS(score_span, last - head < TEAM ? last - head : TEAM, kind, t, stop)
    }
}

/* One head's scores become what its values are weighted with: the softmax, times the value's scale where coded. */
static void weigh(const model_t *m, const layer_t *layer, int64_t head, int64_t position) {
    const int64_t first = head / (m->heads / m->kv_heads) * m->capacity;
    float *scores = m->scores + head * ((m->capacity + 7) / 8 * 8), lanes[8], largest = -INFINITY;
    for (int64_t t = position + 1; t < (position + 8) / 8 * 8; t++) scores[t] = -INFINITY;
    __m256 most = _mm256_set1_ps(-INFINITY), sums = _mm256_setzero_ps();
    for (int64_t t = 0; t <= position; t += 8) most = _mm256_max_ps(most, _mm256_loadu_ps(scores + t));
    _mm256_storeu_ps(lanes, most);
    for (int i = 0; i < 8; i++) largest = lanes[i] > largest ? lanes[i] : largest;
    for (int64_t t = 0; t <= position; t += 8) {
        const __m256 shifted = _mm256_sub_ps(_mm256_loadu_ps(scores + t), _mm256_set1_ps(largest));
        const __m256 inside = _mm256_cmp_ps(shifted, _mm256_set1_ps(-87.0f), _CMP_GE_OQ);
        const __m256 weight = _mm256_and_ps(exponential(shifted), inside);
        _mm256_storeu_ps(scores + t, weight);
        sums = _mm256_add_ps(sums, weight);
    }
    const float inverse = 1.0f / horizontal(sums);
    if (layer->key_codes)
        for (int64_t t = 0; t <= position; t++) scores[t] = scores[t] * inverse * layer->value_scales[first + t];
    else
        for (int64_t t = 0; t <= position; t++) scores[t] *= inverse;
}

/* mixed = weights V over positions 0 to `position`; this thread's share of the columns of all value heads. */
static void mix_heads(const model_t *m, const layer_t *layer, int64_t position, const team_t *team) {
    const int64_t size = m->head_dim, shared = m->heads / m->kv_heads;
    const int kind = cache_kind(layer);
    int64_t start, end;
    share(team, m->kv_heads * size / 8, &start, &end);
    for (int64_t at = 8 * start; at < 8 * end;) {
        const int64_t kv = at / size, column = at % size, rest = 8 * end - kv * size, to = rest < size ? rest : size;
        for (int64_t head = kv * shared; head < (kv + 1) * shared; head++)
            for (int64_t i = column; i < to; i++) m->mixed[head * size + i] = 0.0f;
        for (int64_t t = 0; t <= position; t += SPAN) {
            const int64_t stop = t + SPAN < position + 1 ? t + SPAN : position + 1;
            for (int64_t head = kv * shared, last = head + shared; head < last; head += TEAM)
                WITH_CONSTANTS(mix_span, last - head < TEAM ? last - head : TEAM, kind, t, stop, column, to)
        }
        at = kv * size + to;
    }
}

/* One key head's vectors go to the cache, the key rotated. */
static void store_head(const model_t *m, const layer_t *layer, int64_t kv, int64_t position) {
    const int64_t size = m->head_dim, at = kv * m->capacity + position;
    float *key = m->gates + kv * size, *value = m->gates + (m->kv_heads + kv) * size;
    place_head(m, key, layer->key_norm, position);
    if (layer->key_codes) {
        store_codes(key, size, layer->key_codes + at * size, layer->key_scales + at);
        store_codes(value, size, layer->value_codes + at * size, layer->value_scales + at);
        return;
    }
    if (layer->key_halves) {
        store_halves(key, size, layer->key_halves + at * size);
        store_halves(value, size, layer->value_halves + at * size);
        return;
    }
    for (int64_t i = 0; i < size; i++) layer->keys[at * size + i] = key[i];
    for (int64_t i = 0; i < size; i++) layer->values[at * size + i] = value[i];
}

static void attention_half(const model_t *m, const layer_t *layer, int64_t position, const team_t *t) {
    int64_t start, stop;
    if (t->id == 0) {
        rms_norm(m->state, layer->input_norm, m->normed, m->hidden, m->epsilon);
        round_inputs(m, m->normed, layer->query.width, layer->query.group_size);
    }
    barrier(t);
    multiply_rows(m, &layer->query, m->queries, 0, t);
    multiply_rows(m, &layer->key, m->gates, 0, t);
    multiply_rows(m, &layer->value, m->gates + m->kv_heads * m->head_dim, 0, t);
    barrier(t);
    share(t, m->heads, &start, &stop);
    for (int64_t h = start; h < stop; h++) place_head(m, m->queries + h * m->head_dim, layer->query_norm, position);
    share(t, m->kv_heads, &start, &stop);
    for (int64_t kv = start; kv < stop; kv++) store_head(m, layer, kv, position);
    barrier(t);
    score_heads(m, layer, position, t);
    barrier(t);
    share(t, m->heads, &start, &stop);
    for (int64_t h = start; h < stop; h++) weigh(m, layer, h, position);
    barrier(t);
    mix_heads(m, layer, position, t);
    barrier(t);
    if (t->id == 0) round_inputs(m, m->mixed, layer->output.width, layer->output.group_size);
    barrier(t);
    multiply_rows(m, &layer->output, m->state, 1, t);
    barrier(t);
}

/* wide = silu(gates) * wide, this thread's share (in eights). */
static void apply_gate(const model_t *m, const team_t *t) {
    int64_t start, stop;
    share(t, m->intermediate / 8, &start, &stop);
    for (int64_t i = 8 * start; i < 8 * stop; i += 8) {
        const __m256 x = _mm256_loadu_ps(m->gates + i), one = _mm256_set1_ps(1.0f);
        const __m256 below = _mm256_add_ps(one, exponential(_mm256_sub_ps(_mm256_setzero_ps(), x)));
        _mm256_storeu_ps(m->wide + i, _mm256_mul_ps(_mm256_loadu_ps(m->wide + i), _mm256_div_ps(x, below)));
    }
}

static void gated_half(const model_t *m, const layer_t *layer, const team_t *t) {
    if (t->id == 0) {
        rms_norm(m->state, layer->middle_norm, m->normed, m->hidden, m->epsilon);
        round_inputs(m, m->normed, layer->gate.width, layer->gate.group_size);
    }
    barrier(t);
    multiply_rows(m, &layer->gate, m->gates, 0, t);
    multiply_rows(m, &layer->up, m->wide, 0, t);
    barrier(t);
    apply_gate(m, t);
    barrier(t);
    if (t->id == 0) round_inputs(m, m->wide, layer->down.width, layer->down.group_size);
    barrier(t);
    multiply_rows(m, &layer->down, m->state, 1, t);
    barrier(t);
}

static void walk(const model_t *m, int64_t token, int64_t position, const team_t *t) {
    int64_t start, stop;
    if (t->id == 0)
        for (int64_t i = 0; i < m->hidden; i++) {
            union { uint32_t bits; float value; } one = {(uint32_t)m->embedding[token * m->hidden + i] << 16};
            m->state[i] = one.value;
        }
    for (int64_t k = 0; k < m->layers; k++) {
        attention_half(m, m->layer + k, position, t);
        gated_half(m, m->layer + k, t);
    }
    if (t->id == 0) rms_norm(m->state, m->final_norm, m->normed, m->hidden, m->epsilon);
    barrier(t);
    share(t, m->vocabulary, &start, &stop);
    bf16_product(m->head + start * m->hidden, m->normed, m->logits + start, 1, stop - start, m->hidden, 1);
}

/* The likeliest token after `token` at `position`; logits stay in m->logits, keys and values in the layers' storage. */
int64_t decode_step(const model_t *m, int64_t token, int64_t position, int threads) {
    atomic_int arrived = 0, round = 0;
#pragma omp parallel num_threads(threads)
    {
        const team_t team = {omp_get_thread_num(), omp_get_num_threads(), &arrived, &round};
        walk(m, token, position, &team);
    }
    int64_t best = 0;
    for (int64_t n = 1; n < m->vocabulary; n++) best = m->logits[n] > m->logits[best] ? n : best;
    return best;
}
