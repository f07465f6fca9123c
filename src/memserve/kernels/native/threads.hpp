// How threads wait for each other: spinning for a short time, then sleeping in the kernel.

#pragma once

#include <immintrin.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>

namespace {

constexpr int SPIN = 1000;  // pauses before a waiting thread sleeps: some 20 microseconds

inline void sleep_while(std::atomic<int>& word, int value) {
    syscall(SYS_futex, (int*)&word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

inline void wake_all(std::atomic<int>& word) {
    syscall(SYS_futex, (int*)&word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

// Waits until `word` is no longer `value`. Spins briefly, then sleeps, so that a thread that is not running (its core
// taken by another process) costs the others a wake-up and not a core.
inline void wait_change(std::atomic<int>& word, int value) {
    for (int i = 0; i < SPIN; i++) {
        if (word.load(std::memory_order_acquire) != value) return;
        _mm_pause();
    }
    while (word.load(std::memory_order_acquire) == value) sleep_while(word, value);
}

struct alignas(64) Word {
    std::atomic<int> value{0};
};

struct Barrier {
    Word arrived, phase;
    void wait(int threads) {
        if (threads == 1) return;
        int phase_now = phase.value.load(std::memory_order_acquire);
        if (arrived.value.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
            arrived.value.store(0, std::memory_order_relaxed);
            phase.value.store(phase_now + 1, std::memory_order_release);
            wake_all(phase.value);
        } else {
            wait_change(phase.value, phase_now);
        }
    }
};

}  // namespace
