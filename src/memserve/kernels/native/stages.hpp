// What all stages of a step share: the batch, its buffers, and how the tasks of a stage are divided among the threads.

#pragma once

#include "scratch.hpp"

namespace {

struct Stages {
    ms_config c;
    std::vector<ms_layer> layers;
    ms_batch b{};
    Cut cut;            // of all layers but the local ones
    Cut local;          // of the local ones, if `slides`
    bool slides = false;  // whether a row of the step reaches beyond the window
    Buffer<float> residual;  // (max_rows, hidden)
    Buffer<Operand> hidden;  // (max_rows, or places of experts, intermediate) in tiles
    Buffer<Operand> shared;  // (max_rows, widest input) in tiles: a linear's input when rows are many
    std::vector<Scratch> scratch;
    std::vector<Word> counters;  // tasks taken, per block of each stage of a step

    const Cut& cut_of(int layer) const { return slides && layers[layer].local ? local : cut; }

    // Runs task(block, i) for every i below count(block), each on whichever thread takes it first; threads start with
    // their own blocks. So a thread that lost its core for a while takes fewer. All threads must pass the same stages
    // in the same order.
    template <class Count, class F>
    void stage(int index, int me, int blocks_here, Count count, F task) {
        for (int k = 0; k < blocks_here; k++) {
            int block = (me + k) % blocks_here, end = count(block);
            auto& taken = counters[(size_t)index * Cut::most_blocks(c.max_rows) + block].value;
            for (int i; (i = taken.fetch_add(1, std::memory_order_relaxed)) < end;) task(block, i);
        }
        scratch[me].barrier->wait(b.threads);
    }

    // A stage with `columns` tasks for each block: task(column, first row, rows).
    template <class F>
    void columns(int index, int me, int columns, F task) {
        stage(index, me, cut.blocks, [&](int) { return columns; }, [&](int block, int column) {
            int row = block * cut.block_rows;
            task(column, row, std::min(cut.block_rows, b.rows - row));
        });
    }

    // A stage over all rows, TILE rows per task.
    template <class F>
    void each_row(int index, int me, F task) {
        columns(index, me, cut.block_rows / TILE, [&](int tile, int row, int rows) {
            for (int i = tile * TILE; i < std::min(rows, (tile + 1) * TILE); i++) task(row + i);
        });
    }

    // Writes one row of the residual stream, normed, to `to`.
    void normed(int row, const float* weight, InputRow to) {
        rms_norm(&residual[(long)row * c.hidden], weight, c.hidden, c.rms_eps,
                 [&](int i, Floats v) { store(to.at(i), v); });
    }

    // A linear's input; fill(row, to) makes one row of it. With few rows every thread makes all of it for itself,
    // which is cheaper than one more barrier; many rows are divided among the threads.
    template <class F>
    const Operand* input(int index, int me, int width, F fill) {
        Scratch& mine = scratch[me];
        if (b.rows > FEW) {
            each_row(index, me, [&](int row) { fill(row, InputRow(shared.data(), row, width)); });
            return shared.data();
        }
        for (int row = 0; row < b.rows; row++) fill(row, InputRow(mine.x.data(), row, width));
        return mine.x.data();
    }

    // Computes COLUMNS outputs of a linear and adds them to the residual stream.
    void add(const Matrix& weight, int K, int task, const Operand* x, int row, int rows, Scratch& mine) {
        const int first = task * COLUMNS;
        const float* outs = mine.outs.data();
        float* to = &residual[(long)row * c.hidden + first];
        const long width = c.hidden;
        mine.linear.strips(weight, first, first + TILE, K, x + (long)row * K, rows, mine.outs.data(), COLUMNS, [=](int i) {
            for (int n = 0; n < COLUMNS; n += TILE)
                store(to + i * width + n, load(to + i * width + n) + load(outs + i * COLUMNS + n));
        });
    }

    // Computes COLUMNS values of silu(gate) * up of `rows` rows of `x` into those of `hidden` from `row` on, the first of
    // a block. Gate's outputs begin at `outputs` of the matrix. For each TILE of them gate and up are computed side by
    // side.
    void gate(const Matrix& weight, long outputs, int task, const Operand* x, int row, int rows, Scratch& mine) {
        const float* outs = mine.outs.data();
        const long K = c.intermediate;
        for (int first = task * COLUMNS; first < (task + 1) * COLUMNS; first += TILE) {
            Operand* to = InputRow(hidden.data(), row, K).at(first);
            const long output = outputs + first;
            auto finish = [=](int i) {
                Floats g = load(outs + i * COLUMNS), u = load(outs + i * COLUMNS + TILE);
                store(InputRow(to, i, K).start, g * u / (every(1.f) + exponential(every(0.f) - g)));
            };
            mine.linear.strips(weight, output, K + output, c.hidden, x, rows, mine.outs.data(), COLUMNS, finish);
        }
    }
};

}  // namespace
