// Cuts a step into tasks for its threads. Nothing here changes a result, only which thread computes it.

#pragma once

#include <algorithm>
#include <vector>

#include "attention.hpp"
#include "interface.hpp"

namespace {

constexpr int CHUNK_ROWS = 128;  // most rows of a chunk that attend together: K and V are rearranged once for them
constexpr int CHUNK_MIN = 16;   // fewest, if the chunk has as many
constexpr int BLOCK_MIN = 64;   // rows below which a thread gets no block of its own: weights are read once per block
constexpr int BLOCK = 256;      // most rows of a block: their inputs and outputs stay in the second-level cache
constexpr int TASKS_MIN = 2;    // attention tasks per thread below which sequences are split into parts
constexpr int TASKS = 4;        // attention tasks per thread, if chunks are long enough

// A task of attention: queries of `rows` rows against parts [part, end) of their sequence, for kv heads [kv, kv_end).
// The rows are consecutive from `row` on. A `common` task has rows of several sequences, from `row` on in Cut::order,
// and one part, which lies in the same pages for all of them.
struct Attend {
    int row, rows, part, end, kv, kv_end;
    bool common;
};

struct Cut {
    int window;                   // positions that attention reaches, the row's own included, or 0 for all
    int block_rows, blocks;       // rows per block, and blocks; the last block may be smaller
    std::vector<int> first_of;    // (rows,) the first part that each row attends to
    std::vector<int> part_at;     // (rows + 1,) index of each row's first kept part
    std::vector<Attend> attends;  // attention tasks of a layer
    std::vector<int> attend_at;   // (blocks + 1,) index of each block's first task
    bool whole;                   // whether each of these covers all parts of its rows but the common ones
    std::vector<Attend> commons;  // run before them: one part of several sequences each
    std::vector<int> order;       // rows that may share parts; those with the same pages are adjacent
    std::vector<int> common;      // (rows,) number of each row's leading parts that common tasks cover

    static int most_blocks(int max_rows) { return max_rows / BLOCK_MIN + 1; }

    // `together`: a task of one row may cover all kv heads, and continue from the results of common tasks. `reach`:
    // the window.
    void make(const ms_batch& b, int kv_heads, int page_tokens, bool together, int reach) {
        window = reach;
        first_of.clear();
        for (int row = 0; row < b.rows; row++) first_of.push_back(begin_of(b.positions[row]) / PART);
        cut_rows(b);
        cut_attention(b, kv_heads);
        common.assign(b.rows, 0), commons.clear();
        if (together) cut_common(b, kv_heads, page_tokens);
        if (!whole) split();
        cut_heads(b, kv_heads, together);
        part_at.assign(1, 0);
        for (int row = 0; row < b.rows; row++)
            part_at.push_back(part_at.back() + std::max((whole ? common[row] : b.positions[row] / PART + 1) - first_of[row], 0));
    }

    // The first position that the row at `position` attends to.
    int begin_of(int position) const { return window ? std::max(position + 1 - window, 0) : 0; }

    // Cuts rows into blocks: one per thread if that leaves enough rows for each.
    void cut_rows(const ms_batch& b) {
        int wanted = std::max((b.rows + BLOCK - 1) / BLOCK, std::min<int>(b.threads, b.rows / BLOCK_MIN));
        block_rows = whole_tiles((b.rows + std::max(wanted, 1) - 1) / std::max(wanted, 1));
        blocks = (b.rows + block_rows - 1) / block_rows;
    }

    // Cuts attention into tasks: rows of one chunk together, others one by one. A task covers whole sequences, unless
    // there are so few that threads would have none.
    void cut_attention(const ms_batch& b, int kv_heads) {
        attends.clear(), attend_at.clear();
        int chunk_rows = std::clamp(b.rows * kv_heads / (TASKS * b.threads) / TILE * TILE, CHUNK_MIN, CHUNK_ROWS);
        for (int block = 0; block < blocks; block++) {
            attend_at.push_back((int)attends.size());
            int end = std::min((block + 1) * block_rows, b.rows);
            for (int row = block * block_rows, rows; row < end; row += rows) {
                rows = chunk(b, row, std::min(end, row + chunk_rows));
                attends.push_back({row, rows, first_of[row], b.positions[row + rows - 1] / PART + 1, 0, kv_heads, false});
            }
        }
        attend_at.push_back((int)attends.size());
        whole = (int)attends.size() * kv_heads >= TASKS_MIN * b.threads;
    }

    // Sequences that share a prefix in the same pages (a system prompt, a document, one chat's answers) attend to it
    // together: K and V are read once for all. Only rows that are tasks of their own do: a chunk's task reads K and V
    // once for many queries anyway.
    void cut_common(const ms_batch& b, int kv_heads, int page_tokens) {
        order.clear();
        for (const Attend& task : attends)
            if (task.rows == 1) order.push_back(task.row);
        auto pages = [&](int row) { return b.tables + b.table_at[row]; };
        // Pages that hold the whole parts before the row's position. The part with the position stays the row's own.
        auto whole_pages = [&](int row) { return (b.positions[row] / PART * PART + page_tokens - 1) / page_tokens; };
        std::sort(order.begin(), order.end(), [&](int x, int y) {
            return std::lexicographical_compare(pages(x), pages(x) + whole_pages(x), pages(y), pages(y) + whole_pages(y));
        });
        std::vector<int> alike;  // parts that each of `order` shares with the next
        for (size_t i = 0; i + 1 < order.size(); i++) {
            int x = order[i], y = order[i + 1], most = std::min(whole_pages(x), whole_pages(y));
            bool apart = (i + 1) % CHUNK_ROWS == 0;  // no task has more than CHUNK_ROWS rows
            int same = apart ? 0 : int(std::mismatch(pages(x), pages(x) + most, pages(y)).first - pages(x));
            alike.push_back(std::min(same * page_tokens, std::min(b.positions[x], b.positions[y])) / PART);
        }
        int most = alike.empty() ? 0 : *std::max_element(alike.begin(), alike.end());
        for (int part = 0; part < most; part++)
            for (size_t first = 0, end; first < alike.size(); first = end) {
                for (end = first; end < alike.size() && alike[end] > part;) end++;
                if (end++ == first) continue;
                for (size_t i = first; i < end; i++) common[order[i]] = part + 1;
                // A part before all of their windows is covered without a task.
                if (std::all_of(&order[first], &order[first] + (end - first), [&](int row) { return first_of[row] > part; }))
                    continue;
                for (int kv = 0; kv < kv_heads; kv++)
                    commons.push_back({(int)first, (int)(end - first), part, part + 1, kv, kv + 1, true});
            }
        for (Attend& task : attends)
            if (task.rows == 1) task.part = std::max(common[task.row], first_of[task.row]);
    }

    // Number of rows from `row` on, before `end`, that are consecutive positions of one sequence.
    static int chunk(const ms_batch& b, int row, int end) {
        int rows = 1;
        while (row + rows < end && b.table_at[row + rows] == b.table_at[row] &&
               b.positions[row + rows] == b.positions[row] + rows)
            rows++;
        return rows;
    }

    // Splits the tasks into one for every part of every sequence.
    void split() {
        std::vector<Attend> tasks;
        tasks.swap(attends);
        for (size_t block = 0, i = 0; block + 1 < attend_at.size(); block++) {
            size_t end = attend_at[block + 1];
            attend_at[block] = (int)attends.size();
            for (; i < end; i++)
                for (int part = tasks[i].part; part < tasks[i].end; part++)
                    attends.push_back({tasks[i].row, tasks[i].rows, part, part + 1, 0, tasks[i].kv_end, false});
        }
        attend_at.back() = (int)attends.size();
    }

    // Makes tasks of one kv head each. A head's tasks are adjacent, because its K and V are near then; they start at
    // the end of the sequence, where they are longer. Tasks of one row follow: they cover all kv heads, whose K and V
    // are in the same pages, if there are enough tasks for all threads.
    void cut_heads(const ms_batch& b, int kv_heads, bool together) {
        std::vector<Attend> tasks;
        tasks.swap(attends);
        together = together && (int)tasks.size() >= TASKS * b.threads;
        for (size_t block = 0, first = 0; block + 1 < attend_at.size(); block++) {
            size_t end = attend_at[block + 1];
            attend_at[block] = (int)attends.size();
            for (int kv = 0; kv < kv_heads; kv++)
                for (size_t i = end; i-- > first;) {
                    const Attend& task = tasks[i];
                    if (task.rows > 1 || !together) attends.push_back({task.row, task.rows, task.part, task.end, kv, kv + 1, false});
                }
            for (size_t i = first; i < end; i++)
                if (tasks[i].rows == 1 && together) attends.push_back(tasks[i]);
            first = end;
        }
        attend_at.back() = (int)attends.size();
    }
};

}  // namespace
