// Vectors: the types that the step computes with. Only the two files that this one chooses between, and the kernels
// written for one of them (amx.hpp and attend_*.hpp), know the instructions.
//
// Both files have
//   Floats    16 float32, Doubles 8 float64, with arithmetic; sums and maxima of a whole vector in one order each
//   Operand   the type of what is multiplied with weights, keys and values, and of weights of attention
//   Pairs     the factors of one pass over a pair of values along k: a vector of weights, or a pair of operands
//             broadcast to a vector; PASSES passes are a whole pair

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

// Allocates memory that starts at a cache line: an unaligned vector would cost two loads.
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

// Prefetches the cache line at `p` into the second-level cache. Not by the intrinsic: g++ takes a function that does
// nothing else for one without effects, and drops the calls of it.
inline void prefetch(const void* p) { asm volatile("prefetcht1 %0" : : "m"(*(const char*)p)); }

}  // namespace

#ifdef __AVX512BF16__
#include "vectors_avx512.hpp"
#else
#include "vectors_avx2.hpp"
#endif

namespace {

// Calls run(std::integral_constant of a number) for every number below N, as straight-line code, not a loop. g++
// unrolls loops only after it has assigned registers, so sums in an array would be stored with every product.
template <class F, int... NUMBERS>
inline void each_of(F run, std::integer_sequence<int, NUMBERS...>) {
    (run(std::integral_constant<int, NUMBERS>()), ...);
}
template <int N, class F>
inline void each(F run) {
    each_of(run, std::make_integer_sequence<int, N>());
}

// Calls run(std::integral_constant of `number`); `number` is 1 to MOST.
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

// e^x for every x but NaN, limited to the range of power_of_two.
inline Floats exponential(Floats x) { return power_of_two(smaller(x * every(1.44269504f), every(127.f))); }

// Calls store(i, values) for in[i] * scale * weight[i], where scale makes the mean square of `in` 1. `width` is a
// multiple of 16, as is i.
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
