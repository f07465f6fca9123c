// Vectors: what the parts of the step compute with. Which instructions they are made of is known to the two files that
// this one chooses between, and to the kernels that are made for one of them: amx.hpp and attend_*.hpp.
//
// Both files have
//   Floats    16 float32, Doubles 8 float64, with arithmetic; sums and maxima of a whole vector in one order each
//   Operand   the type of what is multiplied with weights, keys and values, and of weights of attention
//   Pairs     what one pass over a pair of values along k multiplies: a vector of weights, or a pair of operands in every
//             place of one; PASSES passes are a whole pair

#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using bf16 = uint16_t;

// Memory that starts at a cache line: an unaligned vector would cost two loads.
template <class T>
struct Lines {
    using value_type = T;
    Lines() = default;
    template <class U>
    Lines(const Lines<U>&) {}
    T* allocate(size_t n) { return (T*)::operator new(n * sizeof(T), std::align_val_t(64)); }
    void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
    bool operator==(const Lines&) const { return true; }
    bool operator!=(const Lines&) const { return false; }
};

template <class T>
using Buffer = std::vector<T, Lines<T>>;

// Asks for the cache line at `p`, into the second level. Not by the intrinsic: g++ takes a function that does nothing else for
// one without effects, and leaves out the calls of it.
inline void prefetch(const void* p) { asm volatile("prefetcht1 %0" : : "m"(*(const char*)p)); }

}  // namespace

#ifdef __AVX512BF16__
#include "vectors_avx512.hpp"
#else
#include "vectors_avx2.hpp"
#endif

namespace {

// Calls run(std::integral_constant of a number) for every number below N: code beside code, not a loop. g++ unrolls loops after
// it has decided what registers hold, so that sums in an array would be stored with every product.
template <class F, int... NUMBERS>
inline void each_of(F run, std::integer_sequence<int, NUMBERS...>) {
    (run(std::integral_constant<int, NUMBERS>()), ...);
}
template <int N, class F>
inline void each(F run) {
    each_of(run, std::make_integer_sequence<int, N>());
}

// Calls run(std::integral_constant of `number`), a number from 1 to MOST.
template <int MOST, class F>
inline void as_constant(int number, F run) {
    each<MOST>([&](auto before) {
        if (number == before + 1) run(std::integral_constant<int, before + 1>());
    });
}

// 2^x for x <= 0, relative error below 3e-6: 2^n times the Taylor series of 2^f for f in [-0.5, 0.5].
inline Floats power_of_two(Floats x) {
    x = larger(x, every(-126.f));
    Floats n = rounded(x), f = x - n, y = every(1.3333558e-3f);
    for (float c : {9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.f}) y = fma(y, f, every(c));
    return scaled(y, n);
}

#ifndef __AVX512BF16__
inline Floats weight_of(Floats x) { return power_of_two(x); }
#endif

// e^x for every x that is a number.
inline Floats exponential(Floats x) { return power_of_two(smaller(x * every(1.44269504f), every(127.f))); }

// out[i] = in[i] * scale * weight[i], where the scale makes the mean square of `in` one. `width`: a multiple of 16.
template <class Store>
inline void rms_norm(const float* in, const float* weight, int width, float eps, Store store) {
    Floats squares = every(0.f);
    for (int i = 0; i < width; i += 16) {
        Floats v = load(in + i);
        squares = fma(v, v, squares);
    }
    Floats scale = every(1.f) / root(every(sum(squares) / width + eps));
    for (int i = 0; i < width; i += 16) store(i, load(in + i) * scale * load(weight + i));
}

}  // namespace
