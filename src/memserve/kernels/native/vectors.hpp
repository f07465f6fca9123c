// Vectors of 16 float32 or 32 bfloat16 values: what the parts of the step have in common.

#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <new>
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

inline __m512bh load(const void* p) { return (__m512bh)_mm512_loadu_si512(p); }

inline void narrow(bf16* p, __m512 v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v)); }

// The first `n` lanes; all of them from 16 on.
inline __mmask16 first_lanes(int n) { return n >= 16 ? 0xFFFF : (__mmask16)((1 << n) - 1); }

// 2^x for x <= 0, relative error below 3e-6: 2^n times the Taylor series of 2^f for f in [-0.5, 0.5].
inline __m512 power_of_two(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-126.f));
    __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(x, n), y = _mm512_set1_ps(1.3333558e-3f);
    for (float c : {9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.f})
        y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(c));
    return _mm512_scalef_ps(y, n);
}

// e^x for every x that is a number.
inline __m512 exponential(__m512 x) {
    return power_of_two(_mm512_min_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _mm512_set1_ps(127.f)));
}

// out[i] = in[i] * scale * weight[i], where the scale makes the mean square of `in` one. `width`: a multiple of 16.
template <class Store>
inline void rms_norm(const float* in, const float* weight, int width, float eps, Store store) {
    __m512 squares = _mm512_setzero_ps();
    for (int i = 0; i < width; i += 16) {
        __m512 v = _mm512_loadu_ps(in + i);
        squares = _mm512_fmadd_ps(v, v, squares);
    }
    __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(squares) / width + eps);
    __m512 scale = _mm512_div_ps(_mm512_set1_ps(1.f), _mm512_sqrt_ps(mean));
    for (int i = 0; i < width; i += 16)
        store(i, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(in + i), scale), _mm512_loadu_ps(weight + i)));
}

}  // namespace
