// Draws from given logits, without a model, for the tests of sampling.

#include "sampling.hpp"

extern "C" void draws(const float* logits, int rows, int vocab, const ms_sampling* how, const int64_t* positions,
                      int32_t* tokens) {
    Sampler sampler;
    sampler.resize(vocab);
    for (int row = 0; row < rows; row++)
        tokens[row] = draw(logits + (long)row * vocab, how[row], positions[row], sampler);
}

extern "C" void adjusted(const float* logits, int vocab, const ms_adjustments* how, float* to) {
    Sampler sampler;
    sampler.resize(vocab);
    for (int again = 0; again < 2; again++)  // twice, because the first call's leftovers must not change the second
        std::copy_n(sampler.adjust(logits, *how), vocab, to);
}
