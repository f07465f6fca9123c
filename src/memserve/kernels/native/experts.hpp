// A layer whose MLP is several experts: a router chooses a few of them for each row.
//
// The rows of a step are grouped by expert. So the weights of an expert are read once for all of its rows, and those of
// an expert that no row chose are not read. Each group takes whole blocks of TILE places, in which its rows lie next to
// each other. A row's choice depends on its own logits, and its experts' outputs are added in the order of their
// numbers, so that its result depends neither on the other rows nor on the threads.

#pragma once

#include "stages.hpp"

namespace {

constexpr int EXPERT_STAGES = 4;  // stages of run_experts
constexpr int TASKS_EACH = 32;    // tasks of a stage per thread, if there are enough columns

// Writes the numbers and weights of the `used` experts with the greatest logits: of equal ones, the lower number. The
// weights are a softmax over all experts, divided by their sum if `normed`. Where a logit is NaN, so is every weight.
inline void choose(const float* logits, int experts, int used, bool normed, Choice* to) {
    int count = 0;
    for (int expert = 0; expert < experts; expert++) {
        const float logit = logits[expert];
        if (count == used && !(logit > to[used - 1].weight)) continue;
        int at = count < used ? count++ : used - 1;
        for (; at > 0 && logit > to[at - 1].weight; at--) to[at] = to[at - 1];
        to[at] = {expert, logit};
    }
    const float most = to[0].weight;
    float total = 0;
    if (normed) for (int i = 0; i < used; i++) total += std::exp(to[i].weight - most);
    else for (int expert = 0; expert < experts; expert++) total += std::exp(logits[expert] - most);
    for (int i = 0; i < used; i++) to[i].weight = std::exp(to[i].weight - most) / total;
}

struct Experts : Stages {
    Buffer<float> scores;          // (max_rows, experts in whole strips): the router's logits
    std::vector<Choice> choices;   // (max_rows, experts_used): when rows are many
    Buffer<Operand> gathered;      // (places, hidden) in tiles: the groups' inputs when rows are many

    void resize_experts() {
        scores.resize((size_t)c.max_rows * whole_tiles(c.experts));
        choices.resize((size_t)c.max_rows * c.experts_used);
        gathered.resize((size_t)Groups::most_places(c) * c.hidden);
    }

    // Runs the experts of all rows in EXPERT_STAGES stages from `at` on. `x`: their input, normed.
    void run_experts(const ms_layer& w, const Operand* x, int at, int me) {
        Scratch& mine = scratch[me];
        mine.copied = -1;
        mine.groups.make(route(w.router, x, at++, me), b.rows, c);
        if (b.rows > FEW)
            each_row(at, me, [&](int row) {
                for (int rank = 0; rank < c.experts_used; rank++) copy_row(x, row, gathered.data(), mine.groups.place_of(row, rank));
            });
        at++;
        const int groups = (int)mine.groups.all.size();
        spread(at++, me, groups, c.intermediate / COLUMNS, [&](int group, int first, int end) {
            gate_group(w.gate_up, mine.groups.all[group], x, first, end, mine);
        });
        spread(at++, me, 1, c.hidden / COLUMNS, [&](int, int first, int end) {
            for (const Group& group : mine.groups.all) add_group(w.down, group, first, end, mine);
        });
    }

    // A stage that divides the columns of each of `count` products into parts: task(product, first column, end).
    template <class F>
    void spread(int index, int me, int count, int columns, F task) {
        const int parts = std::clamp((TASKS_EACH * b.threads + count - 1) / count, 1, columns);
        stage(index, me, 1, [&](int) { return count * parts; }, [&](int, int i) {
            task(i / parts, i % parts * columns / parts, (i % parts + 1) * columns / parts);
        });
    }

    // Chooses the experts of all rows: (rows, experts_used). With few rows, the threads divide the router's outputs
    // and each chooses for itself; many rows are divided among the threads.
    const Choice* route(const Matrix& router, const Operand* x, int at, int me) {
        Scratch& mine = scratch[me];
        const int width = whole_tiles(c.experts);
        if (b.rows > FEW) {
            columns(at, me, cut.block_rows / TILE, [&](int tile, int first, int rows) {
                const int row = first + tile * TILE, count = std::min(TILE, rows - tile * TILE);
                for (int output = 0; output < width && count > 0; output += COLUMNS) score(router, output, x, row, count, mine);
                for (int i = row; i < row + count; i++) choose_for(i, choices.data());
            });
            return choices.data();
        }
        stage(at, me, 1, [&](int) { return width / TILE; }, [&](int, int strip) { score(router, strip * TILE, x, 0, b.rows, mine); });
        for (int row = 0; row < b.rows; row++) choose_for(row, mine.choices.data());
        return mine.choices.data();
    }

    void choose_for(int row, Choice* to) {
        const float* logits = &scores[(long)row * whole_tiles(c.experts)];
        choose(logits, c.experts, c.experts_used, c.experts_normed, to + (long)row * c.experts_used);
    }

    // Computes the router's logits from `output` on for a block of rows: with few rows TILE of them, otherwise COLUMNS.
    void score(const Matrix& router, int output, const Operand* x, int row, int rows, Scratch& mine) {
        const long width = whole_tiles(c.experts);
        const bool both = b.rows > FEW && output + TILE < width;
        const float* outs = mine.outs.data();
        float* to = &scores[row * width + output];
        const long second = both ? output + TILE : output;  // never beyond the matrix
        mine.linear.strips(router, output, second, c.hidden, x + (long)row * c.hidden, rows, mine.outs.data(), COLUMNS, [=](int i) {
            store(to + i * width, load(outs + i * COLUMNS));
            if (both) store(to + i * width + TILE, load(outs + i * COLUMNS + TILE));
        });
    }

    // Copies a row of one input to a row of another.
    void copy_row(const Operand* from, int row, Operand* to, int place) {
        InputRow source((Operand*)from, row, c.hidden), target(to, place, c.hidden);
        for (int k = 0; k < c.hidden; k += TILE_K) std::memcpy(target.at(k), source.at(k), TILE_K * sizeof(Operand));
    }

    // The input of a group. With few rows, each thread copies the rows of the group that it works on, unless they are
    // the step's first rows anyway.
    const Operand* input_of(const Group& group, const Operand* x, Scratch& mine) {
        if (b.rows > FEW) return gathered.data() + (long)group.first * c.hidden;
        const int* rows = &mine.groups.rows[group.first];
        if (rows[group.count - 1] == group.count - 1) return x;  // rows are in ascending order
        if (mine.copied != group.expert)
            for (int i = 0; i < group.count; i++) copy_row(x, rows[i], mine.own.data(), i);
        mine.copied = group.expert;
        return mine.own.data();
    }

    // Computes silu(gate) * up of a group: columns `first` to `end`, COLUMNS values each.
    void gate_group(const Matrix& gate_up, const Group& group, const Operand* x, int first, int end, Scratch& mine) {
        const Operand* from = input_of(group, x, mine);
        const long outputs = 2L * c.intermediate * group.expert;
        for (int column = first; column < end; column++)
            for (int row = 0; row < group.count; row += BLOCK)
                gate(gate_up, outputs, column, from + (long)row * c.hidden, group.first + row, std::min(BLOCK, group.count - row), mine);
    }

    // Adds a group's weighted outputs to the residual stream: columns `first` to `end`, COLUMNS values each.
    void add_group(const Matrix& down, const Group& group, int first, int end, Scratch& mine) {
        const float* outs = mine.outs.data();
        const long K = c.intermediate, width = c.hidden;
        for (int column = first; column < end; column++)
            for (int row = 0; row < group.count; row += BLOCK) {
                const int place = group.first + row;
                const long output = width * group.expert + column * COLUMNS;
                float* to = &residual[column * COLUMNS];
                auto finish = [=, rows = &mine.groups.rows[place], weights = &mine.groups.weights[place]](int i) {
                    float* sum = to + rows[i] * width;
                    for (int n = 0; n < COLUMNS; n += TILE)
                        store(sum + n, fma(every(weights[i]), load(outs + i * COLUMNS + n), load(sum + n)));
                };
                mine.linear.strips(down, output, output + TILE, K, hidden.data() + place * K, std::min(BLOCK, group.count - row),
                                   mine.outs.data(), COLUMNS, finish);
            }
    }
};

}  // namespace
