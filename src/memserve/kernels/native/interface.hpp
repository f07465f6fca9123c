// The structs that the caller passes to the step, and their checks. memserve/kernels/native/__init__.py mirrors them.

#pragma once

#include "sampling.hpp"
#include "tiles.hpp"

extern "C" struct ms_config {
    int32_t layers, hidden, intermediate, heads, kv_heads, head_dim, vocab, max_context, page_tokens;
    int32_t max_rows, max_threads, amx;  // amx: use it if available
    int32_t experts, experts_used, experts_normed;  // 0 experts: all rows run through one MLP
    int32_t window;  // positions that a local layer's attention reaches, the row's own included
    float rms_eps;
};

extern "C" struct ms_layer {
    const float* attn_norm;
    Matrix qkv;
    const float *qkv_bias, *q_norm, *k_norm;  // null if the model has none
    Matrix o;
    const float* mlp_norm;
    Matrix router;         // (experts, hidden), or null
    Matrix gate_up, down;  // those of all experts, one after another
    int32_t local;         // whether its attention is limited to the window
};

extern "C" struct ms_batch {
    int32_t rows, wanted, threads, pages, tables_length;
    const int32_t* ids;        // (rows,)
    const int32_t* positions;  // (rows,)
    const int32_t* tables;     // (tables_length,) all page tables, one after another
    const int32_t* table_at;   // (rows,) where each row's table starts
    const int32_t* wanted_at;  // (wanted,) rows after which a token is wanted
    bf16* arena;               // (pages, layers, 2, kv_heads, page_tokens, head_dim)
    float* logits;             // (wanted, vocab), or null if not needed
    const ms_sampling* how;    // (wanted,) set if tokens are
    int32_t* tokens;           // (wanted,) drawn, -1 if the largest logit is not finite; or null: draw none
    int32_t (*crew)(int32_t);  // called after a layer with its threads: how many run the next; or null: the same
};

namespace {

constexpr int HEAD_MAX = 256;      // largest head_dim
constexpr int THREADS_MAX = 0xFF;  // they are counted in the low byte of Engine::epoch

// Whether the step can compute a model of these widths.
inline bool possible(const ms_config& c) {
    for (int width : {c.hidden, c.intermediate, c.head_dim})
        if (width < 32 || width % 32) return false;
    if (c.experts < 0 || (c.experts && (c.experts_used < 1 || c.experts_used > c.experts))) return false;
    if (c.window < 0) return false;
    return c.layers > 0 && c.head_dim <= HEAD_MAX && c.kv_heads > 0 && c.heads > 0 && c.heads % c.kv_heads == 0 &&
           c.vocab > 0 && c.page_tokens > 0 && c.max_context > 0 && c.max_rows > 0 &&
           c.max_threads > 0 && c.max_threads <= THREADS_MAX;
}

// Whether the token ids and the bits of allowed tokens of a row's draw fit the vocabulary.
inline bool fits(const ms_config& c, const ms_sampling& how) {
    if (how.reported && (how.reported->token < NOT_A_TOKEN || how.reported->token >= c.vocab)) return false;
    if (!how.adjust) return true;
    const ms_adjustments& adjust = *how.adjust;
    for (const ms_ids& part : {adjust.biased, adjust.prompt, adjust.output, adjust.forbidden})
        for (int64_t i = 0; i < part.count; i++)
            if (part.ids[i] < 0 || part.ids[i] >= c.vocab) return false;
    return !adjust.allowed.count || adjust.allowed.count * 32 >= c.vocab;
}

// Whether all rows, token ids, positions and pages of a batch are within bounds.
inline bool fits(const ms_config& c, const ms_batch& batch) {
    if (batch.rows < 1 || batch.rows > c.max_rows || batch.wanted < 0 || batch.wanted > batch.rows) return false;
    if (batch.threads < 1 || batch.threads > c.max_threads) return false;
    for (int i = 0; i < batch.wanted; i++)
        if (batch.wanted_at[i] < 0 || batch.wanted_at[i] >= batch.rows || (batch.tokens && !fits(c, batch.how[i]))) return false;
    for (int i = 0; i < batch.tables_length; i++)
        if (batch.tables[i] < 0 || batch.tables[i] >= batch.pages) return false;
    for (int row = 0; row < batch.rows; row++) {
        int position = batch.positions[row], page_at = batch.table_at[row];
        if (position < 0 || position >= c.max_context || batch.ids[row] < 0 || batch.ids[row] >= c.vocab) return false;
        if (page_at < 0 || page_at >= batch.tables_length - position / c.page_tokens) return false;
    }
    return true;
}

}  // namespace
