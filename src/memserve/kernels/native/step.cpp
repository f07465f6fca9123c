// One forward step of a Llama-like model in bfloat16: decode rows, prefill chunks, or both.
//
// With few tokens a step is one pass over the weights, so that memory bandwidth is its limit; torch 2.13 reaches a
// fifth of it. Here one call runs all layers on a few threads, and reads the weights where they are: row-major, in the
// one mapping that all workers of a host share. Nothing is packed or copied.
//
// Every token is a row of its own: its K and V are appended first, then it attends to its own and all earlier
// positions. So a decode row and a prefill chunk are the same thing, and chunks need no mask.
//
// Results do not depend on the company a sequence has: every sum is taken in one fixed order, whatever the number of
// other rows or of threads (one accumulator an output; attention in parts of PART positions, merged in order). Only
// how a sequence itself is cut into chunks shows, in the last bits: a chunk's rows attend together, see `attend_block`.
//
// Needs AVX-512 F, BW, VL, DQ and BF16; the loader checks. No dependency but libstdc++ and Linux futexes.

#include <immintrin.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <vector>

namespace {

using bf16 = uint16_t;

constexpr int PART = 256;       // positions of one attention task
constexpr int GROUP_MAX = 16;   // query heads that share a kv head
constexpr int HEAD_MAX = 256;   // head_dim
constexpr int COLUMNS = 32;     // outputs of one task of a linear
constexpr int PANEL = 24;       // rows of x that a linear works on at a time
constexpr int FEW = 16;         // rows up to which every thread prepares all inputs for itself
constexpr int AHEAD = 12288;    // bytes of weights between what is prefetched and what is used
constexpr int KEYS_AHEAD = 32;  // tokens
constexpr int BLOCK = 16;       // rows of a chunk that attend together
constexpr int BLOCK_MIN = 4;    // fewer attend alone: rearranging K and V would cost more than it saves
constexpr int SPIN = 1000;      // pauses before a waiting thread sleeps: some 20 microseconds

// ---- vectors ---------------------------------------------------------------------------------------------

inline __m512bh load(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }

inline __m512 widen(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}

inline void narrow(bf16* p, __m512 v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v)); }

// A 16 x 16 matrix of 32-bit values, transposed; the strides are in values.
inline void transpose(const int32_t* from, long from_stride, int32_t* to, long to_stride) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(from + i * from_stride);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + 2 + j]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + 2 + j]);
        }
    for (int i = 0; i < 4; i++) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_si512(to + i * to_stride, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
        _mm512_storeu_si512(to + (i + 8) * to_stride, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
        _mm512_storeu_si512(to + (i + 4) * to_stride, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
        _mm512_storeu_si512(to + (i + 12) * to_stride, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd));
    }
}

// The sums of four vectors.
inline __m128 sum4(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512d lo = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    __m512d hi = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    __m512 all = _mm512_add_ps(_mm512_castpd_ps(lo), _mm512_castpd_ps(hi));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// e^x, to about 2 units in the last place: 2^n times the Taylor series of 2^f for f in [-0.5, 0.5].
inline __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _mm512_set1_ps(-126.f));
    x = _mm512_min_ps(x, _mm512_set1_ps(127.f));
    __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(x, n), y = _mm512_set1_ps(1.5403530e-4f);
    for (float c : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.f})
        y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(c));
    return _mm512_scalef_ps(y, n);
}

// ---- dot products ----------------------------------------------------------------------------------------

// out[m][0..3] = w[0..3] . x[m] for M rows of x. What lies AHEAD bytes further is prefetched on the way, which doubles
// the rate: four rows at once are no stream to the hardware's prefetcher, and it stops at every page. Into the second
// level, because more lines can be under way to it (measured on Zen 4; distances of 8 to 64 KB differ little).
template <int M, bool FETCH>
inline void dots(const bf16* w, int K, const bf16* x, float* out, long stride) {
    __m512 sums[4][M];
    for (auto& row : sums)
        for (auto& sum : row) sum = _mm512_setzero_ps();
    for (int k = 0; k < K; k += 32) {
        __m512bh rows[4];
        for (int r = 0; r < 4; r++) {
            rows[r] = load(w + (long)r * K + k);
            if (FETCH) _mm_prefetch((const char*)w + AHEAD + k * 8 + r * 64, _MM_HINT_T1);
        }
        for (int m = 0; m < M; m++) {
            __m512bh value = load(x + (long)m * K + k);
            for (int r = 0; r < 4; r++) sums[r][m] = _mm512_dpbf16_ps(sums[r][m], rows[r], value);
        }
    }
    for (int m = 0; m < M; m++)
        _mm_storeu_ps(out + m * stride, sum4(sums[0][m], sums[1][m], sums[2][m], sums[3][m]));
}

template <bool FETCH>
inline void tile(int rows, const bf16* w, int K, const bf16* x, float* out, long stride) {
    switch (rows) {
        case 1: return dots<1, FETCH>(w, K, x, out, stride);
        case 2: return dots<2, FETCH>(w, K, x, out, stride);
        case 3: return dots<3, FETCH>(w, K, x, out, stride);
        case 4: return dots<4, FETCH>(w, K, x, out, stride);
        case 5: return dots<5, FETCH>(w, K, x, out, stride);
        default: return dots<6, FETCH>(w, K, x, out, stride);
    }
}

// out[m][0..count) = w . x[m] for `count` rows of w (a multiple of 4) and all rows of x: (rows, K). Rows of x go in
// panels that fit in the first-level cache, against which the task's rows of w pass from the second.
void linear(const bf16* w, int count, int K, const bf16* x, int rows, float* out, long stride) {
    for (int panel = 0; panel < rows; panel += PANEL) {
        int end = std::min(rows, panel + PANEL);
        for (int n = 0; n < count; n += 4)
            for (int m = panel; m < end; m += 6) {
                auto run = m == 0 ? tile<true> : tile<false>;
                run(std::min(6, end - m), w + (long)n * K, K, x + (long)m * K, out + m * stride + n, stride);
            }
    }
}

// out[q][16 j + i] = x[q] . column 16 j + i, for four rows of x and four times 16 columns. `pairs` holds 32-bit pairs of
// values: (count, PART), two values of every column a row.
inline void outer(const int32_t* const* x, const int32_t* pairs, long width, int count, float* const* out) {
    __m512 sums[4][4] = {};
    for (int k = 0; k < count; k++) {
        __m512bh columns[4];
        for (int j = 0; j < 4; j++) columns[j] = (__m512bh)_mm512_loadu_si512(pairs + k * width + 16 * j);
        for (int i = 0; i < 4; i++) {
            __m512bh value = (__m512bh)_mm512_set1_epi32(x[i][k]);
            for (int j = 0; j < 4; j++) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], value, columns[j]);
        }
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) _mm512_storeu_ps(out[i] + 16 * j, sums[i][j]);
}

// ---- threads ---------------------------------------------------------------------------------------------

void sleep_while(std::atomic<int>& word, int value) {
    syscall(SYS_futex, (int*)&word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void wake_all(std::atomic<int>& word) {
    syscall(SYS_futex, (int*)&word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

// Waits until `word` is no longer `value`: spins briefly, then sleeps, so that a thread that is not running (its core
// taken by another process) costs the others a wake-up and not a core.
void wait_change(std::atomic<int>& word, int value) {
    for (int i = 0; i < SPIN; i++) {
        if (word.load(std::memory_order_acquire) != value) return;
        _mm_pause();
    }
    while (word.load(std::memory_order_acquire) == value) sleep_while(word, value);
}

struct alignas(64) Word {
    std::atomic<int> value{0};
};

struct Barrier {
    Word arrived, phase;
    void wait(int threads) {
        if (threads == 1) return;
        int phase_now = phase.value.load(std::memory_order_acquire);
        if (arrived.value.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
            arrived.value.store(0, std::memory_order_relaxed);
            phase.value.store(phase_now + 1, std::memory_order_release);
            wake_all(phase.value);
        } else {
            wait_change(phase.value, phase_now);
        }
    }
};

}  // namespace

// ---- the interface; memserve/kernels/native/__init__.py mirrors these structs ----------------------------

extern "C" struct ms_config {
    int32_t layers, hidden, intermediate, heads, kv_heads, head_dim, vocab, page_tokens, max_rows, max_threads;
    float rms_eps;
};

extern "C" struct ms_layer {
    const float* attn_norm;
    const bf16 *qkv, *o;
    const float* mlp_norm;
    const bf16 *gate_up, *down;
};

extern "C" struct ms_batch {
    int32_t rows, wanted, threads;
    const int32_t* ids;        // (rows,)
    const int32_t* positions;  // (rows,)
    const int32_t* tables;     // all page tables, one after another
    const int32_t* table_at;   // (rows,) where each row's table starts
    const int32_t* wanted_at;  // (wanted,) rows whose logits are wanted
    bf16* arena;               // (pages, layers, 2, kv_heads, page_tokens, head_dim)
    float* logits;             // (wanted, vocab)
};

// ---- the model -------------------------------------------------------------------------------------------

namespace {

// What one thread needs for itself.
struct Scratch {
    std::vector<bf16> x;      // (rows, widest input): a linear's input when rows are few, and the head's
    std::vector<float> tile;  // (rows, 2 * COLUMNS or head_dim)
    // Of attend_block:
    std::vector<int32_t> keys, values;  // (head_dim / 2, PART) and (PART / 2, head_dim), pairs of bfloat16
    std::vector<float> scores;          // (4, PART)
    std::vector<bf16> weights;          // (4, PART)
};

// Queries of `rows` consecutive rows against part number `part` of their sequence.
struct Attend {
    int row, rows, part;
};

struct Engine {
    ms_config c;
    std::vector<ms_layer> layers;
    const bf16 *embed, *head;
    const float *norm, *cosines, *sines;  // (max_context, head_dim / 2)

    std::vector<float> residual;  // (rows, hidden)
    std::vector<bf16> q;          // (rows, heads, head_dim)
    std::vector<bf16> hidden;     // (rows, intermediate)
    std::vector<bf16> shared;     // (rows, widest input): a linear's input when rows are many
    std::vector<float> parts;     // (tasks, group, 2 + head_dim): maximum, sum, weighted V of each attention task
    std::vector<int> part_at;     // (rows + 1,) first part of each row
    std::vector<Attend> attends;  // attention tasks of a layer, each for every kv head
    std::vector<Scratch> scratch;
    std::vector<Word> counters;   // tasks taken, one for each stage of a step

    ms_batch b;
    Barrier barrier;
    Word epoch;  // a count of steps and, in the low byte, the threads that take part in the newest
    std::atomic<bool> closing{false};
    std::vector<std::thread> threads;

    int group() const { return c.heads / c.kv_heads; }
    int part_size() const { return group() * (2 + c.head_dim); }

    // Runs task(i) for every i below count, each on whichever thread comes first: a thread that lost its core for a
    // while takes fewer. All threads must pass the same stages in the same order.
    template <class F>
    void stage(int index, int count, F task) {
        auto& taken = counters[index].value;
        for (int i; (i = taken.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
        barrier.wait(b.threads);
    }

    bf16* slot(int row, int position, int layer, int half, int head) {
        long page = b.tables[b.table_at[row] + position / c.page_tokens];
        long block = ((page * c.layers + layer) * 2 + half) * c.kv_heads + head;
        return b.arena + (block * c.page_tokens + position % c.page_tokens) * c.head_dim;
    }

    // RMS norm of one row of the residual stream, to bfloat16.
    void normed(int row, const float* weight, bf16* out) {
        const float* x = &residual[(long)row * c.hidden];
        __m512 squares = _mm512_setzero_ps();
        for (int i = 0; i < c.hidden; i += 16) {
            __m512 v = _mm512_loadu_ps(x + i);
            squares = _mm512_fmadd_ps(v, v, squares);
        }
        __m512 scale = _mm512_set1_ps(1.f / std::sqrt(_mm512_reduce_add_ps(squares) / c.hidden + c.rms_eps));
        for (int i = 0; i < c.hidden; i += 16)
            narrow(out + i, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i), scale), _mm512_loadu_ps(weight + i)));
    }

    // A linear's input, of which fill(row, to) makes one row. For few rows every thread makes all for itself, which
    // is cheaper than one more barrier; many are shared out.
    template <class F>
    const bf16* input(int index, int width, Scratch& mine, F fill) {
        if (b.rows > FEW) {
            stage(index, b.rows, [&](int row) { fill(row, &shared[(long)row * width]); });
            return shared.data();
        }
        for (int row = 0; row < b.rows; row++) fill(row, &mine.x[(long)row * width]);
        return mine.x.data();
    }

    // One head of q, k or v for all rows: rotated if q or k, then to the q buffer or to its page.
    void project(const ms_layer& weights, int layer, int head, const bf16* x, Scratch& mine) {
        int D = c.head_dim, half = D / 2;
        linear(weights.qkv + (long)head * D * c.hidden, D, c.hidden, x, b.rows, mine.tile.data(), D);
        for (int row = 0; row < b.rows; row++) {
            float* y = &mine.tile[(long)row * D];
            int position = b.positions[row], kv = head - c.heads;
            if (kv < c.kv_heads) {
                const float *cosine = cosines + (long)position * half, *sine = sines + (long)position * half;
                for (int i = 0; i < half; i += 16) {
                    __m512 lo = _mm512_loadu_ps(y + i), hi = _mm512_loadu_ps(y + half + i);
                    __m512 cs = _mm512_loadu_ps(cosine + i), sn = _mm512_loadu_ps(sine + i);
                    _mm512_storeu_ps(y + i, _mm512_fmsub_ps(lo, cs, _mm512_mul_ps(hi, sn)));
                    _mm512_storeu_ps(y + half + i, _mm512_fmadd_ps(hi, cs, _mm512_mul_ps(lo, sn)));
                }
            }
            bf16* to = kv < 0 ? &q[((long)row * c.heads + head) * D]
                              : slot(row, position, layer, kv >= c.kv_heads, kv % c.kv_heads);
            for (int i = 0; i < D; i += 16) narrow(to + i, _mm512_loadu_ps(y + i));
        }
    }

    float* part_of(int row, int part, int kv) {
        return &parts[((long)(part_at[row] + part) * c.kv_heads + kv) * part_size()];
    }

    // Where the K of the positions from `first` on lies. Never past the row's own position, nor past PART.
    int find_keys(int layer, int row, int first, int kv, const bf16** keys) {
        int count = std::min(PART, b.positions[row] + 1 - first);
        for (int t = 0; t < count;) {
            const bf16* key = slot(row, first + t, layer, 0, kv);
            int left = c.page_tokens - (first + t) % c.page_tokens;
            for (; left > 0 && t < count; left--, key += c.head_dim) keys[t++] = key;
        }
        return count;
    }

    // From a token's K to its V.
    long to_value() const { return (long)c.kv_heads * c.page_tokens * c.head_dim; }

    void attend(int layer, const Attend& task, int kv, Scratch& mine) {
        if (task.rows > 1)
            attend_block(layer, task, kv, mine);
        else
            attend_one(layer, task.row, task.part, kv);
    }

    // One row's queries of one kv head.
    void attend_one(int layer, int row, int part, int kv) {
        int D = c.head_dim, G = group();
        const bf16* queries = &q[((long)row * c.heads + kv * G) * D];
        alignas(64) float scores[GROUP_MAX][PART];
        const bf16* keys[PART];
        int count = find_keys(layer, row, part * PART, kv, keys);
        float scale = 1.f / std::sqrt((float)D);
        for (int t = 0; t < count; t += 4) {
            const bf16* four[4];
            for (int i = 0; i < 4; i++) {
                four[i] = keys[std::min(t + i, count - 1)];
                // Pages lie anywhere: fetch the V needed below, and K some pages ahead.
                const bf16* ahead = keys[std::min(t + i + KEYS_AHEAD, count - 1)];
                for (int d = 0; d < D; d += 32) {
                    _mm_prefetch((const char*)(four[i] + to_value() + d), _MM_HINT_T1);
                    _mm_prefetch((const char*)(ahead + d), _MM_HINT_T1);
                }
            }
            for (int g = 0; g < G; g++) {
                __m512 sums[4] = {};
                for (int i = 0; i < 4; i++)
                    for (int d = 0; d < D; d += 32)
                        sums[i] = _mm512_dpbf16_ps(sums[i], load(queries + g * D + d), load(four[i] + d));
                _mm_store_ps(scores[g] + t, _mm_mul_ps(sum4(sums[0], sums[1], sums[2], sums[3]), _mm_set1_ps(scale)));
            }
        }
        float* out = part_of(row, part, kv);
        for (int g = 0; g < G; g++) softmax(scores[g], count, out + g * (2 + D));
        weigh(keys, count, scores, out);
    }

    // Several rows of a chunk: K is transposed and V paired once for all their queries, so that scores and outputs are
    // matrix products without sums across a vector.
    void attend_block(int layer, const Attend& task, int kv, Scratch& mine) {
        int D = c.head_dim, G = group(), last = task.row + task.rows - 1, first = task.part * PART;
        const bf16* keys[PART];
        int count = find_keys(layer, last, first, kv, keys), padded = (count + 63) / 64 * 64;
        rearrange(keys, count, padded, mine);
        float scale = 1.f / std::sqrt((float)D);
        alignas(64) float sums[4][64];
        for (int at = 0; at < task.rows * G; at += 4) {
            const int32_t *queries[4], *weights[4];
            float *scores[4], *outs[4], *rows_out[4];
            int counts[4], here = std::min(4, task.rows * G - at);
            for (int i = 0; i < 4; i++) {
                int j = at + std::min(i, here - 1), row = task.row + j / G, head = kv * G + j % G;
                queries[i] = (const int32_t*)&q[((long)row * c.heads + head) * D];
                counts[i] = std::min(count, b.positions[row] + 1 - first);
                scores[i] = &mine.scores[(long)i * PART];
                weights[i] = (const int32_t*)&mine.weights[(long)i * PART];
                outs[i] = sums[i];
                rows_out[i] = counts[i] > 0 ? part_of(row, task.part, kv) + j % G * (2 + D) : nullptr;
            }
            for (int t = 0; t < padded; t += 64) {
                float* to[4] = {scores[0] + t, scores[1] + t, scores[2] + t, scores[3] + t};
                outer(queries, &mine.keys[t], PART, D / 2, to);
            }
            for (int i = 0; i < here; i++)
                if (rows_out[i]) weigh_one(scores[i], counts[i], padded, scale, rows_out[i], (bf16*)weights[i]);
            for (int d = 0; d < D; d += 64) {
                outer(weights, &mine.values[d], value_width(), padded / 2, outs);
                for (int i = 0; i < here; i++)
                    if (rows_out[i]) std::memcpy(rows_out[i] + 2 + d, outs[i], std::min(64, D - d) * sizeof(float));
            }
        }
    }

    int value_width() const { return (c.head_dim + 63) / 64 * 64; }

    // K to (D / 2, PART) and V to (PART / 2, D), both in pairs of values; zeros from `count` to `padded`.
    void rearrange(const bf16* const* keys, int count, int padded, Scratch& mine) {
        int D = c.head_dim;
        const __m512i low = interleaved(0), high = interleaved(16);
        for (int t = 0; t < padded; t += 16)
            for (int d = 0; d < D / 2; d += 16) {
                alignas(64) int32_t square[16][16];
                for (int i = 0; i < 16; i++) {
                    __m512i row = t + i < count ? _mm512_loadu_si512(keys[t + i] + 2 * d) : _mm512_setzero_si512();
                    _mm512_store_si512(square[i], row);
                }
                transpose(square[0], 16, &mine.keys[(long)d * PART + t], PART);
            }
        for (int t = 0; t < padded; t += 2)
            for (int d = 0; d < D; d += 32) {
                __m512i zero = _mm512_setzero_si512();
                __m512i a = t < count ? _mm512_loadu_si512(keys[t] + to_value() + d) : zero;
                __m512i z = t + 1 < count ? _mm512_loadu_si512(keys[t + 1] + to_value() + d) : zero;
                int32_t* to = &mine.values[(long)t / 2 * value_width() + d];
                _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, low, z));
                _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(a, high, z));
            }
    }

    // Indices for permutex2var that pair value i of one vector with value i of another, from value `start` on.
    static __m512i interleaved(int start) {
        alignas(64) int16_t index[32];
        for (int i = 0; i < 32; i++) index[i] = start + i / 2 + (i % 2 ? 32 : 0);
        return _mm512_load_si512(index);
    }

    // One query's scores to bfloat16 weights, zero past its own position; out[0] and out[1] as in softmax.
    static void weigh_one(float* scores, int count, int padded, float scale, float* out, bf16* weights) {
        for (int i = 0; i < padded; i += 16)
            _mm512_storeu_ps(scores + i, _mm512_mul_ps(_mm512_loadu_ps(scores + i), _mm512_set1_ps(scale)));
        softmax(scores, count, out);
        for (int i = (count + 15) / 16 * 16; i < padded; i += 16) _mm512_storeu_ps(scores + i, _mm512_setzero_ps());
        for (int i = 0; i < padded; i += 16) narrow(weights + i, _mm512_loadu_ps(scores + i));
    }

    // Scores become weights in place; out[0] is their maximum, out[1] the sum of weights.
    static void softmax(float* scores, int count, float* out) {
        for (int i = count; i % 16; i++) scores[i] = -INFINITY;
        __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
        for (int i = 0; i < count; i += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(scores + i));
        out[0] = _mm512_reduce_max_ps(most);
        for (int i = 0; i < count; i += 16) {
            __mmask16 real = count - i >= 16 ? 0xFFFF : (1 << (count - i)) - 1;
            __m512 shifted = _mm512_sub_ps(_mm512_loadu_ps(scores + i), _mm512_set1_ps(out[0]));
            __m512 weight = _mm512_maskz_mov_ps(real, exponential(shifted));
            _mm512_storeu_ps(scores + i, weight);
            sum = _mm512_add_ps(sum, weight);
        }
        out[1] = _mm512_reduce_add_ps(sum);
    }

    // Weights times V, 64 dimensions at a time, which is what fits in registers for four heads.
    void weigh(const bf16* const* keys, int count, float (*weights)[PART], float* out) {
        int D = c.head_dim, G = group();
        for (int d0 = 0; d0 < D; d0 += 64)
            for (int g0 = 0; g0 < G; g0 += 4) {
                int wide = std::min(64, D - d0) / 16, heads = std::min(4, G - g0);
                __m512 sums[4][4] = {};
                for (int t = 0; t < count; t++) {
                    const bf16* value = keys[t] + to_value() + d0;
                    for (int i = 0; i < wide; i++) {
                        __m512 v = widen(value + i * 16);
                        for (int g = 0; g < heads; g++)
                            sums[g][i] = _mm512_fmadd_ps(_mm512_set1_ps(weights[g0 + g][t]), v, sums[g][i]);
                    }
                }
                for (int g = 0; g < heads; g++)
                    for (int i = 0; i < wide; i++)
                        _mm512_storeu_ps(out + (g0 + g) * (2 + D) + 2 + d0 + i * 16, sums[g][i]);
            }
    }

    // The attention parts of one row, merged in order: (heads * head_dim,).
    void merge(int row, bf16* to) {
        int D = c.head_dim, G = group();
        for (int head = 0; head < c.heads; head++, to += D) {
            auto at = [&](int part) {
                return &parts[((long)part * c.kv_heads + head / G) * part_size() + head % G * (2 + D)];
            };
            float most = -INFINITY, total = 0;
            for (int p = part_at[row]; p < part_at[row + 1]; p++) most = std::max(most, at(p)[0]);
            alignas(64) float sums[HEAD_MAX] = {};
            for (int p = part_at[row]; p < part_at[row + 1]; p++) {
                const float* part = at(p);
                float factor = std::exp(part[0] - most);
                total += factor * part[1];
                for (int i = 0; i < D; i++) sums[i] += factor * part[2 + i];
            }
            __m512 share = _mm512_set1_ps(1.f / total);
            for (int i = 0; i < D; i += 16) narrow(to + i, _mm512_mul_ps(_mm512_load_ps(sums + i), share));
        }
    }

    // COLUMNS outputs of a linear, added to the residual stream.
    void add(const bf16* weight, int K, int task, const bf16* x, Scratch& mine) {
        int first = task * COLUMNS, count = std::min(COLUMNS, c.hidden - first);
        linear(weight + (long)first * K, count, K, x, b.rows, mine.tile.data(), COLUMNS);
        for (int row = 0; row < b.rows; row++) {
            float *to = &residual[(long)row * c.hidden + first], *from = &mine.tile[row * COLUMNS];
            for (int i = 0; i < count; i++) to[i] += from[i];
        }
    }

    // COLUMNS values of silu(gate) * up.
    void gate(const bf16* weight, int task, const bf16* x, Scratch& mine) {
        int first = task * COLUMNS, count = std::min(COLUMNS, c.intermediate - first);
        float *gates = mine.tile.data(), *ups = gates + (long)b.rows * COLUMNS;
        linear(weight + (long)first * c.hidden, count, c.hidden, x, b.rows, gates, COLUMNS);
        linear(weight + (long)(c.intermediate + first) * c.hidden, count, c.hidden, x, b.rows, ups, COLUMNS);
        for (int row = 0; row < b.rows; row++)
            for (int i = 0; i < count; i += 16) {
                __m512 g = _mm512_loadu_ps(gates + row * COLUMNS + i), u = _mm512_loadu_ps(ups + row * COLUMNS + i);
                __m512 down = _mm512_add_ps(_mm512_set1_ps(1.f), exponential(_mm512_sub_ps(_mm512_setzero_ps(), g)));
                narrow(&hidden[(long)row * c.intermediate + first + i], _mm512_div_ps(_mm512_mul_ps(g, u), down));
            }
    }

    void run(int me) {
        Scratch& mine = scratch[me];
        int at = 0, tasks = (c.hidden + COLUMNS - 1) / COLUMNS, width = c.heads * c.head_dim;
        stage(at++, b.rows, [&](int row) {
            const bf16* from = embed + (long)b.ids[row] * c.hidden;
            for (int i = 0; i < c.hidden; i += 16) _mm512_storeu_ps(&residual[(long)row * c.hidden + i], widen(from + i));
        });
        for (int layer = 0; layer < c.layers; layer++) {
            const ms_layer& w = layers[layer];
            const bf16* x = input(at++, c.hidden, mine, [&](int row, bf16* to) { normed(row, w.attn_norm, to); });
            stage(at++, c.heads + 2 * c.kv_heads, [&](int head) { project(w, layer, head, x, mine); });
            int heads = c.kv_heads, count = (int)attends.size() * heads;
            stage(at++, count, [&](int i) { attend(layer, attends[i / heads], i % heads, mine); });
            x = input(at++, width, mine, [&](int row, bf16* to) { merge(row, to); });
            stage(at++, tasks, [&](int task) { add(w.o, width, task, x, mine); });
            x = input(at++, c.hidden, mine, [&](int row, bf16* to) { normed(row, w.mlp_norm, to); });
            stage(at++, (c.intermediate + COLUMNS - 1) / COLUMNS, [&](int task) { gate(w.gate_up, task, x, mine); });
            stage(at++, tasks, [&](int task) { add(w.down, c.intermediate, task, hidden.data(), mine); });
        }
        for (int i = 0; i < b.wanted; i++)
            normed(b.wanted_at[i], norm, &mine.x[(long)i * c.hidden]);
        int columns = 8 * COLUMNS;
        stage(at, b.wanted ? (c.vocab + columns - 1) / columns : 0, [&](int task) {
            int first = task * columns, count = std::min(columns, c.vocab - first);
            linear(head + (long)first * c.hidden, count, c.hidden, mine.x.data(), b.wanted, b.logits + first, c.vocab);
        });
    }

    // Between steps a thread sleeps. One that takes no part may wake late, so it must not read `b`, which may be the
    // next step's by then; one that takes part is waited for.
    void serve(int me) {
        for (int seen = 0;;) {
            while (epoch.value.load(std::memory_order_acquire) == seen) sleep_while(epoch.value, seen);
            seen = epoch.value.load(std::memory_order_acquire);
            if (closing) return;
            if (me < (seen & 0xFF)) run(me);
        }
    }

    // Cuts the step's attention into tasks: rows of one chunk in blocks, others one by one, all in parts.
    void share_out() {
        part_at.assign(1, 0);
        for (int row = 0; row < b.rows; row++) part_at.push_back(part_at.back() + b.positions[row] / PART + 1);
        attends.clear();
        for (int row = 0, rows; row < b.rows; row += rows) {
            for (rows = 1; rows < BLOCK && row + rows < b.rows; rows++)
                if (b.table_at[row + rows] != b.table_at[row] || b.positions[row + rows] != b.positions[row] + rows) break;
            if (rows < BLOCK_MIN) rows = 1;
            for (int part = 0; part <= b.positions[row + rows - 1] / PART; part++) attends.push_back({row, rows, part});
        }
    }

    void step(const ms_batch& batch) {
        b = batch;
        share_out();
        parts.resize((size_t)part_at[b.rows] * c.kv_heads * part_size());
        for (auto& counter : counters) counter.value.store(0, std::memory_order_relaxed);
        if (b.threads > 1) {
            unsigned steps = (unsigned)epoch.value.load(std::memory_order_relaxed) >> 8;
            epoch.value.store((int)((steps + 1) << 8 | b.threads), std::memory_order_release);
            wake_all(epoch.value);
        }
        run(0);
    }
};

}  // namespace

extern "C" {

// The weights stay the caller's and must outlive the engine. Returns null when memory or threads are short.
Engine* ms_open(const ms_config* config, const ms_layer* layers, const bf16* embed, const bf16* head,
                const float* norm, const float* cosines, const float* sines) {
    try {
        auto engine = std::make_unique<Engine>();
        const ms_config& c = engine->c = *config;
        engine->layers.assign(layers, layers + c.layers);
        engine->embed = embed, engine->head = head, engine->norm = norm;
        engine->cosines = cosines, engine->sines = sines;
        engine->residual.resize((size_t)c.max_rows * c.hidden);
        engine->q.resize((size_t)c.max_rows * c.heads * c.head_dim);
        engine->hidden.resize((size_t)c.max_rows * c.intermediate);
        engine->shared.resize((size_t)c.max_rows * std::max(c.hidden, c.heads * c.head_dim));
        engine->scratch.resize(c.max_threads);
        for (auto& scratch : engine->scratch) {
            scratch.x.resize((size_t)c.max_rows * std::max(c.hidden, c.heads * c.head_dim));
            scratch.tile.resize((size_t)c.max_rows * std::max(2 * COLUMNS, c.head_dim));
            scratch.keys.resize((size_t)c.head_dim / 2 * PART);
            scratch.values.resize((size_t)engine->value_width() * PART / 2);
            scratch.scores.resize(4 * PART);
            scratch.weights.resize(4 * PART);
        }
        engine->counters = std::vector<Word>(2 + 8 * c.layers);
        for (int i = 1; i < c.max_threads; i++) engine->threads.emplace_back(&Engine::serve, engine.get(), i);
        return engine.release();
    } catch (const std::exception&) {
        return nullptr;
    }
}

// One step. The batch is checked by the caller. Not for two threads at once.
void ms_step(Engine* engine, const ms_batch* batch) { engine->step(*batch); }

void ms_close(Engine* engine) {
    engine->closing = true;
    engine->epoch.value.fetch_xor(1 << 8, std::memory_order_release);
    wake_all(engine->epoch.value);
    for (auto& thread : engine->threads) thread.join();
    delete engine;
}

}  // extern "C"
