// How a step is cut into tasks for its threads. Nothing here changes a result: only who computes it.

#pragma once

#include <algorithm>
#include <vector>

#include "attention.hpp"
#include "interface.hpp"

namespace {

constexpr int CHUNK_ROWS = 128;  // most rows of a chunk that attend together: K and V are rearranged once for them
constexpr int CHUNK_MIN = 16;   // fewest, where there are as many
constexpr int BLOCK_MIN = 64;   // rows of a block: weights are read once for each
constexpr int BLOCK = 256;      // most: their inputs and outputs stay in the second level
constexpr int TASKS_MIN = 2;    // tasks of attention for each thread
constexpr int TASKS = 4;        // as many, where chunks are long enough

// Queries of `rows` consecutive rows against parts [part, end) of their sequence, of kv heads [kv, kv_end).
struct Attend {
    int row, rows, part, end, kv, kv_end;
};

struct Cut {
    int block_rows, blocks;       // of the step's rows; the last block may be smaller
    std::vector<int> part_at;     // (rows + 1,) first part of attention of each row
    std::vector<Attend> attends;  // attention tasks of a layer
    std::vector<int> attend_at;   // (blocks + 1,) first of each block
    bool whole;                   // whether a task attends to all parts

    static int most_blocks(int max_rows) { return max_rows / BLOCK_MIN + 1; }

    // `together`: one row's task may be of all kv heads.
    void make(const ms_batch& b, int kv_heads, bool together) {
        cut_rows(b);
        cut_attention(b, kv_heads);
        cut_heads(b, kv_heads, together);
    }

    // Into blocks, as many as there are threads where that leaves enough for each.
    void cut_rows(const ms_batch& b) {
        int wanted = std::max((b.rows + BLOCK - 1) / BLOCK, std::min<int>(b.threads, b.rows / BLOCK_MIN));
        block_rows = whole_tiles((b.rows + std::max(wanted, 1) - 1) / std::max(wanted, 1));
        blocks = (b.rows + block_rows - 1) / block_rows;
    }

    // Attention into tasks: rows of one chunk together, others one by one. Tasks take whole sequences
    // unless there are so few that threads would have none.
    void cut_attention(const ms_batch& b, int kv_heads) {
        part_at.assign(1, 0);
        for (int row = 0; row < b.rows; row++) part_at.push_back(part_at.back() + b.positions[row] / PART + 1);
        attends.clear(), attend_at.clear();
        int chunk_rows = std::clamp(b.rows * kv_heads / (TASKS * b.threads) / TILE * TILE, CHUNK_MIN, CHUNK_ROWS);
        for (int block = 0; block < blocks; block++) {
            attend_at.push_back((int)attends.size());
            int end = std::min((block + 1) * block_rows, b.rows);
            for (int row = block * block_rows, rows; row < end; row += rows) {
                rows = chunk(b, row, std::min(end, row + chunk_rows));
                attends.push_back({row, rows, 0, b.positions[row + rows - 1] / PART + 1, 0, kv_heads});
            }
        }
        attend_at.push_back((int)attends.size());
        whole = (int)attends.size() * kv_heads >= TASKS_MIN * b.threads;
        if (!whole) split();
    }

    // Rows from `row` on, before `end`, that are consecutive positions of one sequence.
    static int chunk(const ms_batch& b, int row, int end) {
        int rows = 1;
        while (row + rows < end && b.table_at[row + rows] == b.table_at[row] &&
               b.positions[row + rows] == b.positions[row] + rows)
            rows++;
        return rows;
    }

    // A task for every part of every sequence.
    void split() {
        std::vector<Attend> tasks;
        tasks.swap(attends);
        for (size_t block = 0, i = 0; block + 1 < attend_at.size(); block++) {
            size_t end = attend_at[block + 1];
            attend_at[block] = (int)attends.size();
            for (; i < end; i++)
                for (int part = 0; part < tasks[i].end; part++)
                    attends.push_back({tasks[i].row, tasks[i].rows, part, part + 1, 0, tasks[i].kv_end});
        }
        attend_at.back() = (int)attends.size();
    }

    // Tasks of one kv head each, a head's one after another because its K and V are near then, and from the end of the
    // sequence on, where they are longer. Behind them one row's tasks: of all kv heads, whose K and V are in the same
    // pages, where there are enough for all threads.
    void cut_heads(const ms_batch& b, int kv_heads, bool together) {
        std::vector<Attend> tasks;
        tasks.swap(attends);
        together = together && (int)tasks.size() >= TASKS * b.threads;
        for (size_t block = 0, first = 0; block + 1 < attend_at.size(); block++) {
            size_t end = attend_at[block + 1];
            attend_at[block] = (int)attends.size();
            for (int kv = 0; kv < kv_heads; kv++)
                for (size_t i = end; i-- > first;)
                    if (tasks[i].rows > 1 || !together) attends.push_back(tasks[i]), attends.back().kv = kv, attends.back().kv_end = kv + 1;
            for (size_t i = first; i < end; i++)
                if (tasks[i].rows == 1 && together) attends.push_back(tasks[i]);
            first = end;
        }
        attend_at.back() = (int)attends.size();
    }
};

}  // namespace
