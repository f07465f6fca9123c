// One thread's own memory for a step.

#pragma once

#include "cut.hpp"
#include "linear.hpp"
#include "threads.hpp"

namespace {

// One of a row's experts.
struct Choice {
    int expert;
    float weight;
};

// The rows that chose an expert: `count` places from `first` on, a multiple of TILE.
struct Group {
    int expert, first, count;
};

// The rows of a step grouped by expert. Every thread makes the same groups for itself.
struct Groups {
    std::vector<Group> all;  // in the order of the experts' numbers
    std::vector<int> rows;   // (places,) a group's rows are in ascending order
    std::vector<float> weights;  // (places,)
    std::vector<int> places;     // (rows, experts_used): of each choice
    std::vector<int> counts;     // (experts,)
    int used = 0;

    // Places that the groups of a step take at most, each of them whole blocks.
    static int most_places(const ms_config& c) {
        const int choices = c.max_rows * c.experts_used;
        return whole_tiles(choices + std::min(c.experts, choices) * (TILE - 1));
    }

    void resize(const ms_config& c) {
        all.reserve(c.experts), counts.resize(c.experts), places.resize((size_t)c.max_rows * c.experts_used);
        rows.resize(most_places(c)), weights.resize(most_places(c));
        used = c.experts_used;
    }

    int place_of(int row, int rank) const { return places[row * used + rank]; }

    // `choices`: (count, experts_used).
    void make(const Choice* choices, int count, const ms_config& c) {
        std::fill(counts.begin(), counts.end(), 0);
        for (int i = 0; i < count * used; i++) counts[choices[i].expert]++;
        all.clear();
        for (int expert = 0, first = 0; expert < c.experts; expert++) {
            const int here = counts[expert];
            if (here) all.push_back({expert, first, here});
            counts[expert] = first, first += whole_tiles(here);
        }
        for (int i = 0; i < count * used; i++) {
            const int place = places[i] = counts[choices[i].expert]++;
            rows[place] = i / used, weights[place] = choices[i].weight;
        }
    }
};

constexpr int FEW = 16;  // rows up to which every thread prepares all inputs for itself

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
    Groups groups;                // of the current layer
    std::vector<Choice> choices;  // (FEW, experts_used): when rows are few
    Buffer<Operand> own;          // (TILE, hidden) in tiles: the input of group `copied` when rows are few
    int copied;

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
        groups.resize(c);
        choices.resize((size_t)FEW * c.experts_used);
        if (c.experts) own.resize((size_t)TILE * c.hidden);
    }
};

}  // namespace
