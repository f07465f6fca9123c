// Draws for the tests of sampling, which need any logits and not a model's.

#include "sampling.hpp"

extern "C" void draws(const float* logits, int rows, int vocab, const ms_sampling* how, const int64_t* positions,
                      int32_t* tokens) {
    Sampler sampler;
    sampler.resize(vocab);
    for (int row = 0; row < rows; row++)
        tokens[row] = draw(logits + (long)row * vocab, how[row], positions[row], sampler);
}
