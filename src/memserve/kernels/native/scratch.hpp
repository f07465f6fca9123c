// One thread's own memory for a step.

#pragma once

#include "cut.hpp"
#include "linear.hpp"
#include "threads.hpp"

namespace {

struct Scratch {
    Barrier* barrier = nullptr;  // the barrier of the thread's current shift
    Linear linear;
    Attention attention;
    Buffer<Operand> x;   // (max_rows, widest input): a linear's input when rows are few, and the head's input
    Buffer<float> outs;  // (BLOCK, COLUMNS or head_dim): a linear's output
    std::vector<Query> queries;  // of the current attention task
    const Attend* fetched;       // the task whose first part is prefetched already
    Upcoming upcoming;           // the part after the current one
    Buffer<float> sums;          // (queries of a task, result_size): attention so far
    Sampler sampler;

    void resize(const ms_config& c, bool amx) {
        const int group = c.heads / c.kv_heads, width = std::max(c.hidden, c.heads * c.head_dim);
        x.resize((size_t)whole_tiles(c.max_rows) * width);
        outs.resize((size_t)BLOCK * std::max(COLUMNS, c.head_dim));
        linear.amx = attention.amx = amx;
        linear.widened.resize((size_t)COLUMNS * std::max(width, c.intermediate));
        const int most = std::max(CHUNK_ROWS * group, c.heads);  // of a task: a chunk's, or one row's of all kv heads
        attention.resize(c.head_dim, most);
        queries.reserve(most);
        sums.resize((size_t)most * result_size(c.head_dim));
        upcoming.runs.reserve((size_t)(PART / c.page_tokens + 2) * 2 * c.kv_heads);
        sampler.resize(c.vocab);
    }
};

}  // namespace
