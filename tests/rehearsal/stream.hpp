// The device's stream: operations that were launched and have not run. Nothing runs until the host waits for it, which
// is as late as a real GPU may be. So a test finds code that reads a result too early, or overwrites memory that a copy
// has yet to read.
#pragma once

#include <atomic>
#include <cstddef>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace stream {

// One operation; they run in the order of launches. Returns an error message, or null.
using Step = std::function<const char *()>;

// A captured graph: operations and kernels with the tensors, numbers and addresses at the time of capture. Memory that
// was allocated during the capture stays allocated until the graph is dropped.
struct Graph {
    std::vector<Step> steps;
    std::vector<void *> memory;
};

inline Graph *graph = nullptr;  // the graph that is being captured, or null
inline std::recursive_mutex guard;
inline std::deque<Step> pending;
inline size_t launched_steps = 0, waits = 0;
inline std::string failure, reported;
// More than 0 while this thread runs a step of the device. The step's own allocations and copies are done at once.
inline thread_local int within_step = 0;

struct Within {
    Within() { within_step++; }
    ~Within() { within_step--; }
};

// Launch a step. During a capture it becomes part of the graph and does not run.
inline void launch(Step step) {
    const std::lock_guard held(guard);
    if (graph) return graph->steps.push_back(std::move(step));
    pending.push_back(std::move(step)), launched_steps++;
}

// Run `step`, which frees memory, after everything launched so far, because that may still use the memory.
inline void when_done(Step step) {
    const std::lock_guard held(guard);
    if (pending.empty()) step();
    else pending.push_back(std::move(step)), launched_steps++;
}

// Run steps until `until` of all that were ever launched are done. Returns the first error since the last call, or null.
inline const char *wait(size_t until) {
    const std::lock_guard held(guard);
    const Within step;
    if (launched_steps - pending.size() < until) waits++;
    while (launched_steps - pending.size() < until) {
        Step next = std::move(pending.front());
        pending.pop_front();
        if (const char *wrong = next(); wrong && failure.empty()) failure = wrong;
    }
    reported = std::exchange(failure, "");
    return reported.empty() ? nullptr : reported.c_str();
}

inline const char *wait_for_all() { return wait(launched_steps); }

inline void replay(const Graph *captured) {
    launch([captured]() -> const char * {
        for (const Step &step : captured->steps)
            if (const char *wrong = step()) return wrong;
        return nullptr;
    });
}

}  // namespace stream
