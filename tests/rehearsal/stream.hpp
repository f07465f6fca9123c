// What was launched on the device and has not run. Nothing runs before somebody waits for it: that is as late as a GPU may be, so that
// whoever reads too early, or writes too early what a copy has yet to read, is found out.
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

// Done in the order of launches; what it returns is why it failed, or null.
using Step = std::function<const char *()>;

// A captured step, as a graph holds it: operations and kernels with the tensors, numbers and addresses of then. What was allocated while it
// was captured stays where it is until the graph is dropped.
struct Graph {
    std::vector<Step> steps;
    std::vector<void *> memory;
};

inline Graph *graph = nullptr;  // the one that is captured
inline std::recursive_mutex guard;
inline std::deque<Step> pending;
inline size_t launched_steps = 0, waits = 0;
inline std::string failure, told;
// Within a step of the device, whose own allocations and copies are done at once.
inline thread_local int within_step = 0;

struct Within {
    Within() { within_step++; }
    ~Within() { within_step--; }
};

// While a step is captured it is part of the graph, and does not run.
inline void launch(Step step) {
    const std::lock_guard held(guard);
    if (graph) return graph->steps.push_back(std::move(step));
    pending.push_back(std::move(step)), launched_steps++;
}

// What gives memory back, once nothing that was launched can need it any more.
inline void when_done(Step step) {
    const std::lock_guard held(guard);
    if (pending.empty()) step();
    else pending.push_back(std::move(step)), launched_steps++;
}

// Run until so many steps, of all that were ever launched, are done. Returns how the first one failed that nobody was told of, or null.
inline const char *wait(size_t until) {
    const std::lock_guard held(guard);
    const Within step;
    if (launched_steps - pending.size() < until) waits++;
    while (launched_steps - pending.size() < until) {
        Step next = std::move(pending.front());
        pending.pop_front();
        if (const char *wrong = next(); wrong && failure.empty()) failure = wrong;
    }
    told = std::exchange(failure, "");
    return told.empty() ? nullptr : told.c_str();
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
