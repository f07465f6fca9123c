// Runs steps of tiny random models, one of them with experts, in a program of its own so that a sanitizer sees all of it: chunks, decode rows and
// both together; a number of threads that changes between and within steps; scattered pages and pages that sequences
// share. Then it draws tokens from logits of many shapes and sizes. Exits with status 1 if a token's logits, or the token
// drawn from them, depend on how they were computed, or if a bad batch is accepted.

#include "step.cpp"

#include <cstdio>
#include <random>

namespace {

constexpr int LAYERS = 4, HIDDEN = 64, INNER = 96, HEADS = 6, KV_HEADS = 2, HEAD = 32, VOCAB = 132, CONTEXT = 320,
              WINDOW = 150;
constexpr int PAGE = 8, PAGES = 2 * CONTEXT / PAGE, MAX_ROWS = 64, THREADS = 3, TOKENS = 300;
constexpr int EXPERTS = 20, EXPERTS_USED = 3;
constexpr int SHARED = 256, SHARING = 5;  // SHARING sequences have their first SHARED positions in the same pages

std::mt19937 random_numbers(1);

// Changes the number of threads after each layer: fewer and more in turns.
int32_t changing_crew(int32_t threads) { return 1 + (threads + 1) % THREADS; }

// A matrix in tiles. The order of values in tiles does not matter, because they are random.
Buffer<bf16> matrix(size_t outputs, size_t width) {
    Buffer<bf16> values(whole_tiles((int)outputs) * width);
    for (auto& value : values) {
        float number = std::uniform_real_distribution<float>(-0.2f, 0.2f)(random_numbers);
        uint32_t bits;
        std::memcpy(&bits, &number, sizeof bits);
        value = (bf16)(bits >> 16);
    }
    return values;
}

struct Model {
    Buffer<bf16> embed = matrix(VOCAB, HIDDEN), qkv = matrix((HEADS + 2 * KV_HEADS) * HEAD, HIDDEN),
                 o = matrix(HIDDEN, HEADS * HEAD), router = matrix(EXPERTS, HIDDEN), gate_up = matrix(EXPERTS * 2 * INNER, HIDDEN),
                 down = matrix(EXPERTS * HIDDEN, INNER);
    std::vector<float> norm = std::vector<float>(HIDDEN, 1.1f), head_norm = std::vector<float>(HEAD, 0.9f),
                       bias = std::vector<float>((HEADS + 2 * KV_HEADS) * HEAD, 0.05f),
                       cosines = std::vector<float>(CONTEXT * HEAD / 2, 0.8f),
                       sines = std::vector<float>(CONTEXT * HEAD / 2, 0.6f);
    std::vector<bf16> arena;
    std::vector<int32_t> tables = std::vector<int32_t>(PAGES), ids = std::vector<int32_t>(TOKENS);
    std::vector<int32_t> drawn;
    Engine* engine = nullptr;

    explicit Model(bool amx, bool experts, int page = PAGE) {
        arena.assign((size_t)PAGES * LAYERS * 2 * KV_HEADS * page * HEAD, 0x7fc0);  // NaN
        for (int i = 0; i < PAGES; i++) tables[i] = i * 37 % PAGES;
        for (int i = 0; i < TOKENS; i++) ids[i] = i * 29 % VOCAB;
        ms_config config = {LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD, VOCAB, CONTEXT, page, MAX_ROWS, THREADS, amx,
                            experts ? EXPERTS : 0, experts ? EXPERTS_USED : 0, false, WINDOW, 1e-5f};
        auto in_bfloat16 = [](const Buffer<bf16>& values) { return Matrix{values.data(), nullptr}; };
        ms_layer layer = {norm.data(), in_bfloat16(qkv), bias.data(), head_norm.data(), head_norm.data(),
                          in_bfloat16(o), norm.data(), experts ? in_bfloat16(router) : Matrix{}, in_bfloat16(gate_up),
                          in_bfloat16(down), false};
        std::vector<ms_layer> layers(LAYERS, layer);
        layers[0].local = true;
        Matrix table = in_bfloat16(embed);
        engine = ms_open(&config, layers.data(), &table, &table, norm.data(), cosines.data(), sines.data());
    }
    ~Model() { ms_close(engine); }

// Compute tokens `start` to `end` of sequence 0 and, in the same step, token `other` (-1: none) of sequence 1, which has
    // the same ids. Gives the logits of the last token of each; with `draws`, a second step draws tokens from them.
    int step(int start, int end, int other, int threads, std::vector<float>& logits, bool draws = false) {
        std::vector<int32_t> tokens, positions, table_at, wanted;
        auto row = [&](int position, int sequence) {
            tokens.push_back(ids[position]), positions.push_back(position), table_at.push_back(sequence * PAGES / 2);
        };
        for (int position = start; position < end; position++) row(position, 0);
        wanted.push_back((int)tokens.size() - 1);
        if (other >= 0) row(other, 1), wanted.push_back((int)tokens.size() - 1);
        return run(tokens, positions, table_at, wanted, threads, logits, draws);
    }

// Compute one token at position `at[i]` of each sequence i, whose page table begins at `table_at[i]`.
    int decode(const std::vector<int32_t>& at, const std::vector<int32_t>& table_at, int threads, std::vector<float>& logits) {
        std::vector<int32_t> tokens(at.size(), 7), wanted;
        for (size_t i = 0; i < at.size(); i++) wanted.push_back((int)i);
        return run(tokens, at, table_at, wanted, threads, logits, false);
    }

    int run(const std::vector<int32_t>& tokens, const std::vector<int32_t>& positions, const std::vector<int32_t>& table_at,
            const std::vector<int32_t>& wanted, int threads, std::vector<float>& logits, bool draws) {
        logits.resize(wanted.size() * VOCAB);
        ms_batch batch = {(int)tokens.size(), (int)wanted.size(), threads, PAGES, (int)tables.size(), tokens.data(), positions.data(),
                          tables.data(), table_at.data(), wanted.data(), arena.data(), logits.data(), nullptr,
                          nullptr, tokens.size() % 2 ? changing_crew : nullptr};
        int refused = ms_step(engine, &batch);
        if (refused || !draws) return refused;
        ms_sampling how = {1.5, 0.9, 7, 0, -INFINITY, nullptr, nullptr};
        std::vector<ms_sampling> hows(wanted.size(), how);
        drawn.assign(wanted.size(), -2);
        batch.logits = nullptr, batch.how = hows.data(), batch.tokens = drawn.data();
        return ms_step(engine, &batch);
    }
};

bool refuses_what_is_not_there(bool amx) {
    Model model(amx, false);
    std::vector<float> logits;
    bool taken = !model.step(0, MAX_ROWS + 1, -1, 1, logits) || !model.step(0, 1, -1, THREADS + 1, logits) ||
                 !model.step(0, 1, -1, 0, logits);
    model.ids[0] = VOCAB;
    taken |= !model.step(0, 1, -1, 1, logits);
    model.ids[0] = 0, model.tables[3] = PAGES;
    return !taken && model.step(0, 1, -1, 1, logits);
}

// Whether sequence 0, in chunks, and sequence 1, token by token in the same steps, get the same logits and drawn tokens.
bool agrees(bool amx, bool experts) {
    Model model(amx, experts);
    std::vector<float> logits;
    std::vector<std::vector<float>> alone(TOKENS), chunked(TOKENS);
    std::vector<int32_t> drawn(TOKENS), drawn_chunked(TOKENS, -1);
    int start = 0, token = 0, failed = 0;
    for (int turn = 0; token < TOKENS; turn++) {
        if (start == TOKENS) start--;  // compute its last token again, which overwrites its own K and V
        int end = std::min(TOKENS, start + 1 + turn * 13 % 63);
        failed |= model.step(start, end, token, 1 + turn % THREADS, logits, true);
        chunked[end - 1].assign(logits.begin(), logits.begin() + VOCAB);
        drawn_chunked[end - 1] = model.drawn[0], drawn[token] = model.drawn[1];
        alone[token++].assign(logits.begin() + VOCAB, logits.end());
        start = end;
    }
    for (int i = 0; i < TOKENS; i++) {
        failed |= drawn[i] < 0 || drawn[i] >= VOCAB;
        failed |= !chunked[i].empty() && (chunked[i] != alone[i] || drawn_chunked[i] != drawn[i]);
    }
    return !failed;
}

// Whether ms_again gives, a few rows at a time, the logits that the last step gave for all its rows, and refuses a batch
// with another number of rows.
bool goes_on_with_the_last_step(bool amx) {
    Model model(amx, true);
    for (int threads = 1; threads <= THREADS; threads++) {
        std::vector<float> logits, again(3 * VOCAB);
        std::vector<int32_t> tokens, positions, table_at(MAX_ROWS, 0), wanted;
        for (int i = 0; i < MAX_ROWS; i++) tokens.push_back(model.ids[i]), positions.push_back(i), wanted.push_back(i);
        if (model.run(tokens, positions, table_at, wanted, threads, logits, false)) return false;
        ms_batch batch = {MAX_ROWS, 3, 1 + threads % THREADS, PAGES, (int)model.tables.size(), tokens.data(), positions.data(),
                          model.tables.data(), table_at.data(), nullptr, model.arena.data(), again.data(), nullptr, nullptr, nullptr};
        for (int row = 0; row + 3 <= MAX_ROWS; row += 3) {
            batch.wanted_at = &wanted[row];
            if (ms_again(model.engine, &batch)) return false;
            if (std::memcmp(again.data(), &logits[row * VOCAB], again.size() * sizeof(float))) return false;
        }
        batch.rows--;
        if (!ms_again(model.engine, &batch)) return false;
    }
    return true;
}

// Whether sequences that share their first pages get the same logits in one step as each alone. Pages have 16 tokens here,
// because the engine does not attend to shared pages of 8 together.
bool shares_pages(bool amx) {
    constexpr int TOKENS_A_PAGE = 16, OWN = 2;
    Model model(amx, false, TOKENS_A_PAGE);
    std::vector<float> alone, together;
    for (int start = 0; start < SHARED; start += MAX_ROWS) model.step(start, start + MAX_ROWS, -1, 1, alone);
    std::vector<int32_t> at, table_at;
    for (int i = 0; i < SHARING; i++) {  // the last sequence shares only half of them
        int pages = (i == SHARING - 1 ? SHARED / 2 : SHARED) / TOKENS_A_PAGE;
        table_at.push_back((int)model.tables.size()), at.push_back(pages * TOKENS_A_PAGE);
        for (int shared = 0; shared < pages; shared++) model.tables.push_back(int(model.tables[shared]));
        for (int own = 0; own < OWN; own++) model.tables.push_back(int(model.tables[SHARED / TOKENS_A_PAGE + OWN * i + own]));
    }
    for (int threads = 1; threads <= THREADS; threads++) {
        if (model.decode(at, table_at, threads, together)) return false;
        if (model.engine->cut.commons.size() != KV_HEADS * SHARED / PART) return false;
        for (int i = 0; i < SHARING; i++) {
            if (model.decode({at[i]}, {table_at[i]}, threads, alone) || !model.engine->cut.commons.empty()) return false;
            if (std::memcmp(alone.data(), &together[i * VOCAB], VOCAB * sizeof(float))) return false;
        }
    }
    return true;
}

// Checks a draw with adjusted logits, and its logprobs. The adjustments concern both ends of the vocabulary, name some
// tokens several times, and allow every other token only.
bool adjusts_what_there_is(const std::vector<float>& logits, ms_sampling how, Sampler& sampler) {
    const int vocab = (int)logits.size();
    const int32_t ids[] = {vocab - 1, 0, vocab / 2, 0, vocab - 1};
    const float bias[] = {-3};
    const std::vector<int32_t> even((vocab + 31) / 32, 0x55555555);
    ms_adjustments adjust = {{ids, 1}, bias, {ids, 3}, {ids, 5}, {ids, vocab > 1}, {even.data(), (int64_t)even.size()}, 1.3f, 0.5f, -0.2f};
    ms_logprobs reported = {MS_LOGPROBS_MAX, {}, {}, 0, NOT_A_TOKEN, 0};
    how.adjust = &adjust, how.reported = &reported;
    int token = draw(logits.data(), how, vocab, sampler);
    if (token == NOT_A_TOKEN) return largest(sampler.adjust(logits.data(), adjust), vocab) == NOT_A_TOKEN;
    bool fine = reported.count == std::min(vocab, MS_LOGPROBS_MAX) && reported.drawn <= 0 && (vocab == 1 || token != vocab - 1) && token % 2 == 0;
    for (int i = 0; i < reported.count; i++) fine &= reported.ids[i] >= 0 && reported.ids[i] < vocab && reported.values[i] <= 0;
    return fine && token >= 0 && token < vocab;
}

// Whether a draw whose token is given keeps that token and reports its logprob, also at both ends of the vocabulary.
bool reports_a_given_token(const std::vector<float>& logits, ms_sampling how, Sampler& sampler) {
    const int vocab = (int)logits.size();
    if (largest(logits.data(), vocab) == NOT_A_TOKEN) return true;
    for (int token : {0, vocab / 2, vocab - 1}) {
        ms_logprobs reported = {MS_LOGPROBS_MAX, {}, {}, 1, token, 0};
        how.reported = &reported;
        if (draw(logits.data(), how, vocab, sampler) != token) return false;
        if (reported.drawn > 0 || reported.rank < 1 || reported.rank > vocab) return false;
        if (reported.rank <= reported.count && reported.ids[reported.rank - 1] != token) return false;
    }
    return true;
}

// Draws from normally distributed logits, with ties, all equal, and with excluded tokens. A draw must give a token of the
// vocabulary that is not excluded.
bool draws_what_there_is() {
    std::normal_distribution<float> normal;
    for (int vocab = 1; vocab < 700; vocab += vocab < 70 ? 1 : 97)
        for (int shape = 0; shape < 4; shape++) {
            Sampler sampler;
            sampler.resize(vocab);
            std::vector<float> logits(vocab);  // of exactly this size, so that a sanitizer sees a read beyond it
            for (float& logit : logits) {
                logit = normal(random_numbers) * 3;
                if (shape == 1) logit = std::round(logit);
                if (shape == 2) logit = 0;
                if (shape == 3 && logit < 0) logit = -INFINITY;
            }
            for (double temperature : {0., 1e-300, 0.7, 1e300})
                for (double top_p : {1e-9, 0.9, 1.})
                    for (int top_k : {0, 2, 70}) {
                        ms_sampling how = {temperature, top_p, 3, top_k, top_k ? -1 : -INFINITY, nullptr, nullptr};
                        int token = draw(logits.data(), how, vocab, sampler);
                        if (!adjusts_what_there_is(logits, how, sampler)) return false;
                        if (!reports_a_given_token(logits, how, sampler)) return false;
                        bool none = largest(logits.data(), vocab) < 0;
                        if (none ? token != NOT_A_TOKEN : token < 0 || token >= vocab || logits[token] == -INFINITY)
                            return false;
                    }
        }
    return true;
}

}  // namespace

int main() {
    for (bool amx : {false, true}) {
        if (!refuses_what_is_not_there(amx)) return std::puts("a bad batch was accepted"), 1;
        for (bool experts : {false, true})
            if (!agrees(amx, experts)) return std::puts("logits depend on how a token was computed"), 1;
        if (!goes_on_with_the_last_step(amx)) return std::puts("ms_again does not give the logits of the last step"), 1;
        if (!shares_pages(amx)) return std::puts("sequences that share pages do not attend to them together, or get other logits than alone"), 1;
    }
    if (!draws_what_there_is()) return std::puts("a draw gave a token that is excluded or outside the vocabulary"), 1;
    return 0;
}
