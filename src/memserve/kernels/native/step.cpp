// One forward step of a Llama-like model in bfloat16: decode rows, prefill chunks, or both.
//
// With few tokens a step is one pass over the weights, so that memory bandwidth is its limit; torch 2.13 reaches a
// fifth of it. Here one call runs all layers on a few threads, and reads the weights where they are: row-major, in the
// one mapping that all workers of a host share.
//
// Every token is a row of its own: its K and V are appended first, then it attends to its own and all earlier
// positions. So a decode row and a prefill chunk are the same thing, and chunks need no mask.
//
// A row's results depend on its sequence alone, bit for bit: not on the other rows, on how its prompt was cut into
// chunks, on which pages it has, nor on the threads. Every sum is taken in one order (see linear.hpp and
// attention.hpp); attention goes in parts of PART positions, fixed from position 0, merged in order.
//
// Needs AVX-512 F, BW, VL, DQ and BF16; the loader checks. No dependency but libstdc++ and Linux futexes.

#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>

#include "attention.hpp"
#include "linear.hpp"
#include "sampling.hpp"
#include "threads.hpp"
#include "vectors.hpp"

// ---- the interface; memserve/kernels/native/__init__.py mirrors these structs ----------------------------

extern "C" struct ms_config {
    int32_t layers, hidden, intermediate, heads, kv_heads, head_dim, vocab, max_context, page_tokens;
    int32_t max_rows, max_threads;
    float rms_eps;
};

extern "C" struct ms_layer {
    const float* attn_norm;
    const bf16* qkv;
    const float *qkv_bias, *q_norm, *k_norm;  // null where the model has none
    const bf16* o;
    const float* mlp_norm;
    const bf16 *gate_up, *down;
};

extern "C" struct ms_batch {
    int32_t rows, wanted, threads, pages, tables_length;
    const int32_t* ids;        // (rows,)
    const int32_t* positions;  // (rows,)
    const int32_t* tables;     // (tables_length,) all page tables, one after another
    const int32_t* table_at;   // (rows,) where each row's table starts
    const int32_t* wanted_at;  // (wanted,) rows after which a token is wanted
    bf16* arena;               // (pages, layers, 2, kv_heads, page_tokens, head_dim)
    float* logits;             // (wanted, vocab), or null where nobody wants them
    const ms_sampling* how;    // (wanted,)
    int32_t* tokens;           // (wanted,) drawn, -1 where the largest logit is not finite; or null: none is drawn
};

// ---- the model -------------------------------------------------------------------------------------------

namespace {

constexpr int HEAD_MAX = 256;      // head_dim
constexpr int FEW = 16;            // rows up to which every thread prepares all inputs for itself
constexpr int CHUNK_ROWS = 32;     // rows of a chunk that attend together
constexpr int BLOCK = 256;         // rows of one task of a linear: their inputs and outputs stay in the second level
constexpr int THREADS_MAX = 0xFF;  // what fits beside the count of steps

// What one thread needs for itself.
struct Scratch {
    Buffer<bf16> x;       // (max_rows, widest input): a linear's input when rows are few, and the head's
    Buffer<bf16> packed;  // (16, widest input)
    Buffer<float> tile;   // (BLOCK, 2 COLUMNS or head_dim)
    Attention attention;
    std::vector<Query> queries;
    Sampler sampler;
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

    Buffer<float> residual;       // (max_rows, hidden)
    Buffer<bf16> q;               // (max_rows, heads, head_dim)
    Buffer<bf16> hidden;          // (max_rows, intermediate)
    Buffer<bf16> shared;          // (max_rows, widest input): a linear's input when rows are many
    Buffer<float> parts;          // (parts, kv_heads, group, 2 + head_dim): see Query
    Buffer<float> logits;         // (most wanted so far, vocab): where the caller wants none
    std::vector<int> part_at;     // (rows + 1,) first part of each row
    std::vector<Attend> attends;  // attention tasks of a layer, each for every kv head
    std::vector<Scratch> scratch;
    std::vector<Word> counters;  // tasks taken, one for each stage of a step

    ms_batch b;
    Barrier barrier;
    Word epoch;  // a count of steps and, in the low byte, the threads that take part in the newest
    std::atomic<bool> closing{false};
    std::vector<std::thread> threads;

    int group() const { return c.heads / c.kv_heads; }
    int part_size() const { return group() * (2 + c.head_dim); }
    int widest() const { return std::max({c.hidden, c.heads * c.head_dim, c.intermediate}); }

    // Runs task(i) for every i below count, each on whichever thread comes first: a thread that lost its core for a
    // while takes fewer. All threads must pass the same stages in the same order.
    template <class F>
    void stage(int index, int count, F task) {
        auto& taken = counters[index].value;
        for (int i; (i = taken.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
        barrier.wait(b.threads);
    }

    // A stage over `columns` times blocks of rows: task(column, first row, rows).
    template <class F>
    void blocks(int index, int columns, F task) {
        int count = (b.rows + BLOCK - 1) / BLOCK;
        stage(index, columns * count, [&](int i) {
            int row = i % count * BLOCK;
            task(i / count, row, std::min(BLOCK, b.rows - row));
        });
    }

    bf16* slot(int row, int position, int layer, int half, int head) {
        long page = b.tables[b.table_at[row] + position / c.page_tokens];
        long block = ((page * c.layers + layer) * 2 + half) * c.kv_heads + head;
        return b.arena + (block * c.page_tokens + position % c.page_tokens) * c.head_dim;
    }

    // One row of the residual stream, normed, to bfloat16.
    void normed(int row, const float* weight, bf16* to) {
        rms_norm(&residual[(long)row * c.hidden], weight, c.hidden, c.rms_eps,
                 [&](int i, __m512 v) { narrow(to + i, v); });
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

    // One head of q, k or v: biased, normed and rotated as the model has it, to the q buffer or to its page.
    void project(const ms_layer& w, int layer, int head, const bf16* x, int first, int rows, Scratch& mine) {
        int D = c.head_dim, kv = head - c.heads;
        const bf16* weight = w.qkv + (long)head * D * c.hidden;
        linear(weight, D, c.hidden, x + (long)first * c.hidden, rows, mine.tile.data(), D, mine.packed.data());
        for (int i = 0; i < rows; i++) {
            float* y = &mine.tile[(long)i * D];
            int row = first + i, position = b.positions[row];
            if (w.qkv_bias) add_bias(y, w.qkv_bias + (long)head * D);
            if (kv < c.kv_heads) {
                if (const float* weight = kv < 0 ? w.q_norm : w.k_norm)
                    rms_norm(y, weight, D, c.rms_eps, [&](int d, __m512 v) { _mm512_storeu_ps(y + d, v); });
                rotate(y, position);
            }
            bf16* to = kv < 0 ? &q[((long)row * c.heads + head) * D]
                              : slot(row, position, layer, kv >= c.kv_heads, kv % c.kv_heads);
            for (int d = 0; d < D; d += 16) narrow(to + d, _mm512_loadu_ps(y + d));
        }
    }

    void add_bias(float* y, const float* bias) {
        for (int d = 0; d < c.head_dim; d += 16)
            _mm512_storeu_ps(y + d, _mm512_add_ps(_mm512_loadu_ps(y + d), _mm512_loadu_ps(bias + d)));
    }

    void rotate(float* y, int position) {
        int half = c.head_dim / 2;
        const float *cosine = cosines + (long)position * half, *sine = sines + (long)position * half;
        for (int i = 0; i < half; i += 16) {
            __m512 lo = _mm512_loadu_ps(y + i), hi = _mm512_loadu_ps(y + half + i);
            __m512 cs = _mm512_loadu_ps(cosine + i), sn = _mm512_loadu_ps(sine + i);
            _mm512_storeu_ps(y + i, _mm512_fmsub_ps(lo, cs, _mm512_mul_ps(hi, sn)));
            _mm512_storeu_ps(y + half + i, _mm512_fmadd_ps(hi, cs, _mm512_mul_ps(lo, sn)));
        }
    }

    // A task's queries of one kv head.
    void attend_task(int layer, const Attend& task, int kv, Scratch& mine) {
        int D = c.head_dim, G = group(), first = task.part * PART;
        const bf16* keys[PART];
        int count = find_keys(layer, task.row + task.rows - 1, first, kv, keys);
        mine.queries.clear();
        for (int row = task.row; row < task.row + task.rows; row++) {
            int mine_count = std::min(count, b.positions[row] + 1 - first);
            if (mine_count <= 0) continue;  // this part begins after the row's own position
            float* out = &parts[((long)(part_at[row] + task.part) * c.kv_heads + kv) * part_size()];
            const bf16* from = &q[((long)row * c.heads + kv * G) * D];
            for (int g = 0; g < G; g++) mine.queries.push_back({from + g * D, mine_count, out + g * (2 + D)});
        }
        long to_value = (long)c.kv_heads * c.page_tokens * D;
        attend(mine.queries.data(), (int)mine.queries.size(), keys, count, D, to_value, mine.attention);
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

    // The attention parts of one row, merged in order: (heads * head_dim,).
    void merge(int row, bf16* to) {
        int D = c.head_dim, G = group();
        for (int head = 0; head < c.heads; head++, to += D) {
            auto at = [&](int part) {
                return &parts[((long)part * c.kv_heads + head / G) * part_size() + head % G * (2 + D)];
            };
            float most = -INFINITY, total = 0;
            for (int p = part_at[row]; p < part_at[row + 1]; p++) most = std::max(most, at(p)[0]);
            __m512 sums[HEAD_MAX / 16] = {};
            for (int p = part_at[row]; p < part_at[row + 1]; p++) {
                const float* part = at(p);
                float factor = std::exp2(part[0] - most);
                total += factor * part[1];
                for (int i = 0; i < D / 16; i++)
                    sums[i] = _mm512_fmadd_ps(_mm512_set1_ps(factor), _mm512_loadu_ps(part + 2 + 16 * i), sums[i]);
            }
            __m512 share = _mm512_set1_ps(1.f / total);
            for (int i = 0; i < D / 16; i++) narrow(to + 16 * i, _mm512_mul_ps(sums[i], share));
        }
    }

    // COLUMNS outputs of a linear, added to the residual stream.
    void add(const bf16* weight, int K, int task, const bf16* x, int row, int rows, Scratch& mine) {
        int first = task * COLUMNS, count = std::min(COLUMNS, c.hidden - first);
        float* outs = mine.tile.data();
        linear(weight + (long)first * K, count, K, x + (long)row * K, rows, outs, COLUMNS, mine.packed.data());
        for (int i = 0; i < rows; i++) {
            float* to = &residual[(long)(row + i) * c.hidden + first];
            for (int n = 0; n < count; n += 16)
                _mm512_storeu_ps(to + n, _mm512_add_ps(_mm512_loadu_ps(to + n), _mm512_loadu_ps(outs + i * COLUMNS + n)));
        }
    }

    // COLUMNS values of silu(gate) * up.
    void gate(const bf16* weight, int task, const bf16* x, int row, int rows, Scratch& mine) {
        int first = task * COLUMNS, count = std::min(COLUMNS, c.intermediate - first), width = 2 * COLUMNS;
        const bf16 *from = x + (long)row * c.hidden, *up = weight + (long)(c.intermediate + first) * c.hidden;
        float* outs = mine.tile.data();
        linear(weight + (long)first * c.hidden, count, c.hidden, from, rows, outs, width, mine.packed.data());
        linear(up, count, c.hidden, from, rows, outs + COLUMNS, width, mine.packed.data());
        for (int i = 0; i < rows; i++, outs += width)
            for (int n = 0; n < count; n += 16) {
                __m512 g = _mm512_loadu_ps(outs + n), u = _mm512_loadu_ps(outs + COLUMNS + n);
                __m512 down = _mm512_add_ps(_mm512_set1_ps(1.f), exponential(_mm512_sub_ps(_mm512_setzero_ps(), g)));
                narrow(&hidden[(long)(row + i) * c.intermediate + first + n], _mm512_div_ps(_mm512_mul_ps(g, u), down));
            }
    }

    void run(int me) {
        Scratch& mine = scratch[me];
        int at = 0;
        stage(at++, b.rows, [&](int row) {
            const bf16* from = embed + (long)b.ids[row] * c.hidden;
            for (int i = 0; i < c.hidden; i += 16) _mm512_storeu_ps(&residual[(long)row * c.hidden + i], widen(from + i));
        });
        for (int layer = 0; layer < c.layers; layer++) at = run_layer(layer, at, mine);
        for (int i = 0; i < b.wanted; i++) normed(b.wanted_at[i], norm, &mine.x[(long)i * c.hidden]);
        int columns = 8 * COLUMNS;
        stage(at++, b.wanted ? (c.vocab + columns - 1) / columns : 0, [&](int task) {
            int first = task * columns, count = std::min(columns, c.vocab - first);
            linear(head + (long)first * c.hidden, count, c.hidden, mine.x.data(), b.wanted, b.logits + first, c.vocab,
                   mine.packed.data());
        });
        stage(at++, b.tokens ? b.wanted : 0, [&](int i) {
            int position = b.positions[b.wanted_at[i]] + 1;
            b.tokens[i] = draw(b.logits + (long)i * c.vocab, b.how[i], position, mine.sampler);
        });
    }

    // Stages `at` to at + 8; the next stage's number.
    int run_layer(int layer, int at, Scratch& mine) {
        const ms_layer& w = layers[layer];
        int tasks = (c.hidden + COLUMNS - 1) / COLUMNS, width = c.heads * c.head_dim, heads = c.kv_heads;
        const bf16* x = input(at++, c.hidden, mine, [&](int row, bf16* to) { normed(row, w.attn_norm, to); });
        blocks(at++, c.heads + 2 * heads,
               [&](int head, int row, int rows) { project(w, layer, head, x, row, rows, mine); });
        stage(at++, (int)attends.size() * heads,
              [&](int i) { attend_task(layer, attends[i / heads], i % heads, mine); });
        x = input(at++, width, mine, [&](int row, bf16* to) { merge(row, to); });
        blocks(at++, tasks, [&](int task, int row, int rows) { add(w.o, width, task, x, row, rows, mine); });
        x = input(at++, c.hidden, mine, [&](int row, bf16* to) { normed(row, w.mlp_norm, to); });
        blocks(at++, (c.intermediate + COLUMNS - 1) / COLUMNS,
               [&](int task, int row, int rows) { gate(w.gate_up, task, x, row, rows, mine); });
        blocks(at++, tasks, [&](int task, int row, int rows) {
            add(w.down, c.intermediate, task, hidden.data(), row, rows, mine);
        });
        return at;
    }

    // Between steps a thread sleeps. One that takes no part may wake late, so it must not read `b`, which may be the
    // next step's by then; one that takes part is waited for.
    void serve(int me) {
        for (int seen = 0;;) {
            while (epoch.value.load(std::memory_order_acquire) == seen) sleep_while(epoch.value, seen);
            seen = epoch.value.load(std::memory_order_acquire);
            if (closing) return;
            if (me < (seen & THREADS_MAX)) run(me);
        }
    }

    // Whether every row, token id, position and page of a batch is inside of what there is.
    bool fits(const ms_batch& batch) const {
        if (batch.rows < 1 || batch.rows > c.max_rows || batch.wanted < 0 || batch.wanted > batch.rows) return false;
        if (batch.threads < 1 || batch.threads > c.max_threads) return false;
        for (int i = 0; i < batch.wanted; i++)
            if (batch.wanted_at[i] < 0 || batch.wanted_at[i] >= batch.rows) return false;
        for (int i = 0; i < batch.tables_length; i++)
            if (batch.tables[i] < 0 || batch.tables[i] >= batch.pages) return false;
        for (int row = 0; row < batch.rows; row++) {
            int position = batch.positions[row], page_at = batch.table_at[row];
            if (position < 0 || position >= c.max_context || batch.ids[row] < 0 || batch.ids[row] >= c.vocab) return false;
            if (page_at < 0 || page_at >= batch.tables_length - position / c.page_tokens) return false;
        }
        return true;
    }

    // Cuts the step's attention into tasks: rows of one chunk together, others one by one, all in parts.
    void share_out() {
        part_at.assign(1, 0);
        for (int row = 0; row < b.rows; row++) part_at.push_back(part_at.back() + b.positions[row] / PART + 1);
        parts.resize((size_t)part_at[b.rows] * c.kv_heads * part_size());
        attends.clear();
        for (int row = 0, rows; row < b.rows; row += rows) {
            for (rows = 1; rows < CHUNK_ROWS && row + rows < b.rows; rows++)
                if (b.table_at[row + rows] != b.table_at[row] || b.positions[row + rows] != b.positions[row] + rows) break;
            for (int part = 0; part <= b.positions[row + rows - 1] / PART; part++) attends.push_back({row, rows, part});
        }
    }

    void step(const ms_batch& batch) {
        b = batch;
        share_out();
        if (!b.logits) {
            logits.resize(std::max(logits.size(), (size_t)b.wanted * c.vocab));
            b.logits = logits.data();
        }
        for (auto& counter : counters) counter.value.store(0, std::memory_order_relaxed);
        if (b.threads > 1) {
            unsigned steps = (unsigned)epoch.value.load(std::memory_order_relaxed) >> 8;
            epoch.value.store((int)((steps + 1) << 8 | b.threads), std::memory_order_release);
            wake_all(epoch.value);
        }
        run(0);
    }
};

// Whether the step can compute a model of these widths.
bool possible(const ms_config& c) {
    for (int width : {c.hidden, c.intermediate, c.head_dim})
        if (width < 32 || width % 32) return false;
    return c.layers > 0 && c.head_dim <= HEAD_MAX && c.kv_heads > 0 && c.heads > 0 && c.heads % c.kv_heads == 0 &&
           c.vocab > 0 && c.vocab % 4 == 0 && c.page_tokens > 0 && c.max_context > 0 && c.max_rows > 0 &&
           c.max_threads > 0 && c.max_threads <= THREADS_MAX;
}

}  // namespace

extern "C" {

void ms_close(Engine* engine);

// The weights stay the caller's and must outlive the engine. Returns null when memory or threads are short, or for
// widths that it cannot compute.
Engine* ms_open(const ms_config* config, const ms_layer* layers, const bf16* embed, const bf16* head,
                const float* norm, const float* cosines, const float* sines) {
    if (!possible(*config)) return nullptr;
    auto engine = std::unique_ptr<Engine>();
    try {
        engine = std::make_unique<Engine>();
        const ms_config& c = engine->c = *config;
        engine->layers.assign(layers, layers + c.layers);
        engine->embed = embed, engine->head = head, engine->norm = norm;
        engine->cosines = cosines, engine->sines = sines;
        size_t rows = c.max_rows, width = std::max(c.hidden, c.heads * c.head_dim);
        engine->residual.resize(rows * c.hidden);
        engine->q.resize(rows * c.heads * c.head_dim);
        engine->hidden.resize(rows * c.intermediate);
        engine->shared.resize(rows * width);
        engine->scratch.resize(c.max_threads);
        for (auto& scratch : engine->scratch) {
            scratch.x.resize(rows * width);
            scratch.packed.resize((size_t)16 * engine->widest());
            scratch.tile.resize((size_t)BLOCK * std::max(2 * COLUMNS, c.head_dim));
            scratch.attention.resize(c.head_dim);
            scratch.queries.reserve((size_t)CHUNK_ROWS * engine->group());
            scratch.sampler.resize(c.vocab);
        }
        engine->counters = std::vector<Word>(3 + 8 * c.layers);
        for (int i = 1; i < c.max_threads; i++) engine->threads.emplace_back(&Engine::serve, engine.get(), i);
        return engine.release();
    } catch (const std::exception&) {
        if (engine) ms_close(engine.release());
        return nullptr;
    }
}

// One step. Not for two threads at once. 0, or 1 for a batch that is not inside of the engine's bounds, or 2 where
// memory is short; then nothing was computed.
int ms_step(Engine* engine, const ms_batch* batch) {
    if (!engine->fits(*batch)) return 1;
    try {
        engine->step(*batch);
        return 0;
    } catch (const std::bad_alloc&) {  // before any thread started
        return 2;
    }
}

void ms_close(Engine* engine) {
    engine->closing = true;
    engine->epoch.value.fetch_xor(1 << 8, std::memory_order_release);
    wake_all(engine->epoch.value);
    for (auto& thread : engine->threads) thread.join();
    delete engine;
}

}  // extern "C"
