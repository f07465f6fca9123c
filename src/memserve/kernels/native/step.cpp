// One forward step of a Llama-like model in bfloat16: decode rows, prefill chunks, or both.
//
// With few tokens a step is one pass over the weights, limited by memory bandwidth, of which torch 2.13 reaches a
// fifth. Here one call runs all layers on a few threads. It reads the weights in place, in the one mapping that all
// workers of a host share, in the order in which they are stored (tiles.hpp).
//
// Every token is a row of its own: its K and V are appended first, then it attends to its own and all earlier
// positions, in a local layer to the last of them: its window. So a decode row and a prefill chunk are the same thing,
// and chunks need no mask. Parts before the windows of all rows of a task are not read.
//
// A row's results depend on its sequence alone, bit for bit: not on the other rows, on how its prompt was cut into
// chunks, on which pages it has, nor on the threads. Every sum is taken in one order (see linear.hpp and
// attention.hpp); attention works in parts of PART positions, fixed from position 0 and merged in order.
//
// Many rows are cut into blocks, one or more per thread. A thread takes its blocks through all stages if possible, so
// that it reads what it wrote itself. A thread that is done with its own blocks takes tasks of the others.
//
// Needs AVX2 and FMA, or AVX-512 F, BW, VL, DQ and BF16, and uses AMX if the processor has it; the loader builds for
// the instructions that are available (vectors.hpp). No dependencies but libstdc++ and Linux futexes.

#include <memory>
#include <thread>

#include "experts.hpp"

// ---- the model -------------------------------------------------------------------------------------------

namespace {

constexpr int LAYER_STAGES = 7 + EXPERT_STAGES;  // stages of run_layer at most
constexpr int HEAD_COLUMNS = 8 * COLUMNS;        // outputs of one task of the head

struct Engine : Experts {
    Matrix embed, head;
    const float *norm, *cosines, *sines;  // (max_context, head_dim / 2)
    bool amx;

    Buffer<Operand> q;            // (max_rows, heads, head_dim)
    Buffer<float> parts;          // (parts, heads, result_size): see Cut::part_at
    Buffer<float> logits;         // (most wanted so far, vocab): used if the caller passes none

    Barrier barriers[2];  // used by shifts in turn: a thread may enter the next before all left the last one
    Word epoch;     // a count of shifts and, in the low byte, the threads that take part in the latest
    int first = 0;  // layer at which the latest shift begins
    std::atomic<bool> closing{false};
    std::vector<std::thread> threads;

    int group() const { return c.heads / c.kv_heads; }

    bf16* slot(int row, int position, int layer, int half, int head) {
        long page = b.tables[b.table_at[row] + position / c.page_tokens];
        long block = ((page * c.layers + layer) * 2 + half) * c.kv_heads + head;
        return b.arena + (block * c.page_tokens + position % c.page_tokens) * c.head_dim;
    }

    // Computes one head of q, k or v, biased, normed and rotated as the model has it, into the q buffer or its page.
    void project(const ms_layer& w, int layer, int head, const Operand* x, int first, int rows, Scratch& mine) {
        const int D = c.head_dim;
        const long K = c.hidden, output = (long)head * D;
        float* outs = mine.outs.data();
        x += first * K;
        int d = 0;
        for (; d < D - COLUMNS; d += COLUMNS)
            mine.linear.strips(w.qkv, output + d, output + d + TILE, K, x, rows, outs + d, D, [](int) {});
        mine.linear.strips(w.qkv, output + d, output + d + TILE, K, x, rows, outs + d, D,
                              [&](int i) { place(w, layer, head, first + i, outs + (long)i * D); });
    }

    // Writes one row's outputs of one head of q, k or v to their destination.
    void place(const ms_layer& w, int layer, int head, int row, float* y) {
        const int D = c.head_dim, kv = head - c.heads, position = b.positions[row];
        if (w.qkv_bias) add_bias(y, w.qkv_bias + (long)head * D);
        if (const float* weight = kv < 0 ? w.q_norm : kv < c.kv_heads ? w.k_norm : nullptr)
            rms_norm(y, weight, D, c.rms_eps, [&](int d, Floats v) { store(y + d, v); });
        if (kv < 0) rotate(y, position, &q[((long)row * c.heads + head) * D]);
        else if (kv < c.kv_heads) rotate(y, position, slot(row, position, layer, 0, kv));
        else copy(y, slot(row, position, layer, 1, kv - c.kv_heads));
    }

    void copy(const float* y, bf16* to) {
        for (int d = 0; d < c.head_dim; d += 16) store(to + d, load(y + d));
    }

    void add_bias(float* y, const float* bias) {
        for (int d = 0; d < c.head_dim; d += 16) store(y + d, load(y + d) + load(bias + d));
    }

    template <class Value>
    void rotate(const float* y, int position, Value* to) {
        int half = c.head_dim / 2;
        const float *cosine = cosines + (long)position * half, *sine = sines + (long)position * half;
        for (int i = 0; i < half; i += 16) {
            Floats lo = load(y + i), hi = load(y + half + i), cs = load(cosine + i), sn = load(sine + i);
            store(to + i, fms(lo, cs, hi * sn));
            store(to + half + i, fma(hi, cs, lo * sn));
        }
    }

    // Whether a task's results are kept in `parts` for others to continue from, as those of single parts are.
    static bool kept(const Cut& cut, const Attend& task) { return task.common || !cut.whole; }

    // The i-th row of a task.
    static int row_of(const Cut& cut, const Attend& task, int i) { return task.common ? cut.order[task.row + i] : task.row + i; }

    // Runs a task's queries. Results go to the input of the next linear or, if they are kept, to `parts`. `next`: the
    // task that the thread will probably take next, if any.
    void attend_task(int layer, const Attend& task, const Attend* next, Scratch& mine) {
        int heads = task.kv_end - task.kv;
        find_queries(cut_of(layer), task, mine);
        if (mine.fetched != &task) {
            find_lines(layer, task, task.part, mine.upcoming);
            mine.upcoming.fetch(0, 1);
        }
        for (int part = task.part; part < task.end; part++) {
            if (part + 1 < task.end) find_lines(layer, task, part + 1, mine.upcoming);
            else if (next) find_lines(layer, *next, next->part, mine.upcoming);
            else mine.upcoming.runs.clear();
            for (int head = 0; head < heads; head++)
                attend_part(layer, task, part, task.kv + head, mine,
                            [&](int share, int shares) { mine.upcoming.fetch(share + head * shares, shares * heads); });
        }
        mine.fetched = next;
        if (kept(cut_of(layer), task)) return;
        const Query* query = mine.queries.data();
        for (int kv = task.kv; kv < task.kv_end; kv++)
            for (int row = task.row; row < task.row + task.rows; row++) {
                InputRow to(shared.data(), row, (long)c.heads * c.head_dim);
                for (int head = kv * group(); head < (kv + 1) * group(); head++, query++)
                    write_attention(query->out, c.head_dim, to, head * c.head_dim);
            }
    }

    // Collects a task's queries, by kv head and row. Kept results go to `parts`, or nowhere for queries that do not
    // attend to the part; those whose windows begin behind it leave them in `sums`. Other results start from what common
    // tasks found.
    void find_queries(const Cut& cut, const Attend& task, Scratch& mine) {
        int G = group(), size = result_size(c.head_dim);
        mine.queries.clear();
        for (int kv = task.kv; kv < task.kv_end; kv++)
            for (int i = 0; i < task.rows; i++) {
                int row = row_of(cut, task, i);
                long part = cut.part_at[row] + task.part - cut.first_of[row], head = kv * G;
                float* out = &mine.sums[mine.queries.size() * size];
                if (!kept(cut, task)) for (int g = 0; g < G; g++) merge_parts(cut, row, kv * G + g, out + g * size);
                else if (part >= cut.part_at[row + 1]) out = nullptr;
                else if (part >= cut.part_at[row]) out = &parts[(part * c.heads + head) * size];
                for (int g = 0; g < G; g++)
                    mine.queries.push_back({&q[((long)row * c.heads + head + g) * c.head_dim], 0, 0, out ? out + g * size : out});
            }
    }

    // Runs a task's queries of one kv head against one part; ahead(share, shares) prefetches what comes next.
    template <class Ahead>
    void attend_part(int layer, const Attend& task, int part, int kv, Scratch& mine, Ahead ahead) {
        const Cut& cut = cut_of(layer);
        int G = group(), first = part * PART, number = task.rows * G;
        const bf16* keys[PART];
        int count = find_keys(layer, row_of(cut, task, task.rows - 1), first, kv, keys);
        Query* queries = &mine.queries[(kv - task.kv) * number];
        for (int i = 0, n = 0; i < task.rows; i++) {
            int position = b.positions[row_of(cut, task, i)];
            int from = std::clamp(cut.begin_of(position) - first, 0, PART), here = std::clamp(position + 1 - first, 0, PART);
            for (int g = 0; g < G; g++, n++) queries[n].from = from, queries[n].count = here;
        }
        Keys all = {keys, count, (long)c.kv_heads * c.page_tokens * c.head_dim, c.page_tokens % TILE == 0,
                    part == (kept(cut, task) ? task.part : cut.first_of[task.row]), part == task.end - 1};
        attend(queries, number, all, c.head_dim, mine.attention, ahead);
    }

    // Finds the K of a part's tokens, from position `first` on, never past the row's own; returns how many they are.
    int find_keys(int layer, int row, int first, int kv, const bf16** keys) {
        int count = std::min(PART, b.positions[row] + 1 - first);
        for (int t = 0; t < count;) {
            const bf16* key = slot(row, first + t, layer, 0, kv);
            int left = c.page_tokens - (first + t) % c.page_tokens;
            for (; left > 0 && t < count; left--, key += c.head_dim) keys[t++] = key;
        }
        return count;
    }

    // Finds the K and V of a task's part, in memory order.
    void find_lines(int layer, const Attend& task, int part, Upcoming& to) {
        int row = row_of(cut_of(layer), task, task.rows - 1), first = part * PART, last = std::min(first + PART, b.positions[row] + 1) - 1;
        int tokens = std::min(c.page_tokens, PART), start = tokens < PART ? 0 : first % c.page_tokens;
        to.runs.clear(), to.length = tokens * c.head_dim * (int)sizeof(bf16) / 64, to.next = 0;
        for (int page = first / c.page_tokens; page <= last / c.page_tokens; page++)
            for (int half = 0; half < 2; half++)
                for (int kv = task.kv; kv < task.kv_end; kv++)
                    to.runs.push_back((const char*)slot(row, page * c.page_tokens + start, layer, half, kv));
    }

    // Merges the attention of one row, all of whose parts were kept: (heads * head_dim,).
    void merge_row(const Cut& cut, int row, InputRow to, Scratch& mine) {
        for (int head = 0; head < c.heads; head++) {
            merge_parts(cut, row, head, mine.sums.data());
            write_attention(mine.sums.data(), c.head_dim, to, head * c.head_dim);
        }
    }

    // Merges the kept parts of a row's head in order. Leaves `sums` unchanged if none was kept.
    void merge_parts(const Cut& cut, int row, int head, float* sums) {
        for (int p = cut.part_at[row]; p < cut.part_at[row + 1]; p++)
            merge(sums, &parts[((long)p * c.heads + head) * result_size(c.head_dim)], c.head_dim, p == cut.part_at[row]);
    }

    // Writes one head's attention to values `at` onwards of a linear's input.
    static void write_attention(const float* sums, int head_dim, InputRow to, int at) {
        Floats share = every(1.f / sums[head_dim + TOTAL]);
        for (int i = 0; i < head_dim; i += 16) store(to.at(at + i), load(sums + i) * share);
    }

    // Runs a shift: layers that the same threads run. A step is one shift, or several if its caller lends out or gets
    // cores during the step: then all threads return, and those of the next shift continue at layer `first`.
    void run(int me, int shift) {
        Tiles tiles(amx);
        Barrier& barrier = *(scratch[me].barrier = &barriers[shift >> 8 & 1]);
        int crew = b.threads, layer = first;
        if (!layer) each_row(0, me, [&](int row) { read_output(embed, b.ids[row], c.hidden, &residual[(long)row * c.hidden]); });
        while (layer < c.layers) {
            run_layer(layer, 1 + LAYER_STAGES * layer, me);
            if (++layer == c.layers || !b.crew) continue;
            if (me == 0) change_crew(layer, crew);
            barrier.wait(crew);  // `crew` is this thread's copy: b.threads may already be the next shift's
            if (epoch.value.load(std::memory_order_acquire) != shift) return;
        }
        finish(1 + LAYER_STAGES * c.layers, me);
    }

    // Asks the caller while all other threads wait. A thread that is released sleeps in serve() from then on.
    void change_crew(int layer, int crew) {
        int next = std::clamp((int)b.crew(crew), 1, (int)c.max_threads);
        if (next == crew) return;
        first = layer, b.threads = next;
        begin_shift();
    }

    void begin_shift() {
        unsigned shifts = (unsigned)epoch.value.load(std::memory_order_relaxed) >> 8;
        epoch.value.store((int)((shifts + 1) << 8 | b.threads), std::memory_order_release);
        wake_all(epoch.value);
    }

    // Computes logits and tokens after the last layer, in the stages from `at` on.
    void finish(int at, int me) {
        Scratch& mine = scratch[me];
        for (int i = 0; i < b.wanted; i++) normed(b.wanted_at[i], norm, InputRow(mine.x.data(), i, c.hidden));
        int tasks = b.wanted ? (c.vocab + HEAD_COLUMNS - 1) / HEAD_COLUMNS : 0;
        stage(at++, me, 1, [&](int) { return tasks; }, [&](int, int task) {
            for (int row = 0; row < b.wanted; row += BLOCK) head_task(task, row, std::min(BLOCK, b.wanted - row), mine);
        });
        stage(at++, me, 1, [&](int) { return b.tokens ? b.wanted : 0; }, [&](int, int i) {
            int position = b.positions[b.wanted_at[i]] + 1;
            b.tokens[i] = draw(b.logits + (long)i * c.vocab, b.how[i], position, mine.sampler);
        });
    }

    // Computes HEAD_COLUMNS logits of some of the wanted rows.
    void head_task(int task, int row, int rows, Scratch& mine) {
        const Operand* x = mine.x.data() + (long)row * c.hidden;
        float* outs = mine.outs.data();
        int end = std::min((task + 1) * HEAD_COLUMNS, c.vocab);
        for (int first = task * HEAD_COLUMNS; first < end; first += COLUMNS) {
            int count = std::min(COLUMNS, end - first);
            auto finish = [&](int i) {
                std::memcpy(b.logits + (long)(row + i) * c.vocab + first, outs + i * COLUMNS, count * sizeof(float));
            };
            long second = count > TILE ? first + TILE : first;
            mine.linear.strips(head, first, second, c.hidden, x, rows, outs, COLUMNS, finish);
        }
    }

    // Runs a layer in LAYER_STAGES stages from `at` on.
    void run_layer(int layer, int at, int me) {
        const ms_layer& w = layers[layer];
        const Cut& cut = cut_of(layer);
        Scratch& mine = scratch[me];
        int tasks = c.hidden / COLUMNS, width = c.heads * c.head_dim;
        const Operand* x = input(at++, me, c.hidden, [&](int row, InputRow to) { normed(row, w.attn_norm, to); });
        columns(at++, me, c.heads + 2 * c.kv_heads,
                [&](int head, int row, int rows) { project(w, layer, head, x, row, rows, mine); });
        mine.fetched = nullptr;
        if (int count = (int)cut.commons.size())
            stage(at, me, 1, [&](int) { return count; }, [&](int, int i) {
                attend_task(layer, cut.commons[i], i + b.threads < count ? &cut.commons[i + b.threads] : nullptr, mine);
            });
        at++;
        stage(at++, me, cut.blocks, [&](int block) { return cut.attend_at[block + 1] - cut.attend_at[block]; },
              [&](int block, int i) {
                  const Attend* task = &cut.attends[cut.attend_at[block] + i];
                  bool more = cut.attend_at[block] + i + b.threads < cut.attend_at[block + 1];
                  attend_task(layer, *task, more ? task + b.threads : nullptr, mine);
              });
        x = shared.data();
        if (!cut.whole) x = input(at, me, width, [&](int row, InputRow to) { merge_row(cut, row, to, mine); });
        at++;
        columns(at++, me, tasks, [&](int task, int row, int rows) { add(w.o, width, task, x, row, rows, mine); });
        x = input(at++, me, c.hidden, [&](int row, InputRow to) { normed(row, w.mlp_norm, to); });
        if (c.experts) return run_experts(w, x, at, me);
        columns(at++, me, c.intermediate / COLUMNS,
                [&](int task, int row, int rows) { gate(w.gate_up, 0, task, x + (long)row * c.hidden, row, rows, mine); });
        columns(at++, me, tasks, [&](int task, int row, int rows) {
            add(w.down, c.intermediate, task, hidden.data(), row, rows, mine);
        });
    }

    // A thread sleeps between shifts. One that takes no part in a shift may wake late, so it must not read `b` or
    // `first`, which may be the next shift's by then. One that takes part is waited for.
    void serve(int me) {
        for (int seen = 0;;) {
            while (epoch.value.load(std::memory_order_acquire) == seen) sleep_while(epoch.value, seen);
            seen = epoch.value.load(std::memory_order_acquire);
            if (closing) return;
            if (me < (seen & THREADS_MAX)) run(me, seen);
        }
    }

    // Runs a step from layer `from` on. With `from` behind all layers: the head alone, on what the last step left in
    // `residual`.
    void step(const ms_batch& batch, int from) {
        b = batch;
        const bool together = group() <= TILE && c.page_tokens % TILE == 0;
        slides = c.window && *std::max_element(b.positions, b.positions + b.rows) >= c.window;
        cut.make(b, c.kv_heads, c.page_tokens, together, 0);
        if (slides) local.make(b, c.kv_heads, c.page_tokens, together, c.window);
        const int kept = std::max(cut.part_at[b.rows], slides ? local.part_at[b.rows] : 0);
        parts.resize((size_t)kept * c.heads * result_size(c.head_dim));
        if (!b.logits) {
            logits.resize(std::max(logits.size(), (size_t)b.wanted * c.vocab));
            b.logits = logits.data();
        }
        for (auto& counter : counters) counter.value.store(0, std::memory_order_relaxed);
        first = from;
        if (b.threads > 1) begin_shift();
        int shift;
        do run(0, shift = epoch.value.load(std::memory_order_relaxed));
        while (shift != epoch.value.load(std::memory_order_relaxed));
    }
};

int run(Engine& engine, const ms_batch& batch, int from) {
    if (!fits(engine.c, batch)) return 1;
    try {
        engine.step(batch, from);
        return 0;
    } catch (const std::bad_alloc&) {  // before any thread started
        return 2;
    }
}

}  // namespace

extern "C" {

void ms_close(Engine* engine);

// The weights remain the caller's and must outlive the engine. Returns null if memory or threads are short, or for
// widths that it cannot compute.
Engine* ms_open(const ms_config* config, const ms_layer* layers, const Matrix* embed, const Matrix* head,
                const float* norm, const float* cosines, const float* sines) {
    if (!possible(*config)) return nullptr;
    auto engine = std::unique_ptr<Engine>();
    try {
        engine = std::make_unique<Engine>();
        const ms_config& c = engine->c = *config;
        engine->layers.assign(layers, layers + c.layers);
        engine->embed = *embed, engine->head = *head, engine->norm = norm;
        engine->cosines = cosines, engine->sines = sines;
        engine->amx = c.amx && amx_granted();
        size_t rows = whole_tiles(c.max_rows), width = std::max(c.hidden, c.heads * c.head_dim);
        engine->residual.resize(rows * c.hidden);
        engine->q.resize(rows * c.heads * c.head_dim);
        engine->hidden.resize((c.experts ? Groups::most_places(c) : rows) * c.intermediate);
        if (c.experts) engine->resize_experts();
        engine->shared.resize(rows * width);
        engine->scratch.resize(c.max_threads);
        for (auto& scratch : engine->scratch) scratch.resize(c, engine->amx);
        engine->counters = std::vector<Word>((size_t)(3 + LAYER_STAGES * c.layers) * Cut::most_blocks(c.max_rows));
        for (int i = 1; i < c.max_threads; i++) engine->threads.emplace_back(&Engine::serve, engine.get(), i);
        return engine.release();
    } catch (const std::exception&) {
        if (engine) ms_close(engine.release());
        return nullptr;
    }
}

// Runs one step; two threads must not call it at once. Returns 0, 1 for a batch outside the engine's bounds, or 2 if
// memory is short. In the last two cases nothing was computed.
int ms_step(Engine* engine, const ms_batch* batch) { return run(*engine, *batch, 0); }

// Computes the last step's logits and tokens after other rows: `batch` is that step's except for the wanted rows.
// Returns as ms_step.
int ms_again(Engine* engine, const ms_batch* batch) {
    return batch->rows == engine->b.rows ? run(*engine, *batch, engine->c.layers) : 1;
}

// Whether the engine multiplies on AMX.
int ms_amx(const Engine* engine) { return engine->amx; }

void ms_close(Engine* engine) {
    engine->closing = true;
    engine->epoch.value.fetch_xor(1 << 8, std::memory_order_release);
    wake_all(engine->epoch.value);
    for (auto& thread : engine->threads) thread.join();
    delete engine;
}

}  // extern "C"
