// A parallel loop over numbered tasks. Who runs which task is left to chance, so a task may depend on nothing
// but its number: that is what makes every result the same for any number of threads.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

struct Stopped {};  // thrown when the user asked to stop (Ctrl-C)

struct Workers {
  int threads = 1;
  std::function<bool()> stop_asked;  // called by the calling thread only, about ten times a second

  // task(number, worker) for every number below tasks; worker is below `threads`.
  void run(int64_t tasks, const std::function<void(int64_t, int)>& task) const {
    std::atomic<int64_t> next{0};
    std::atomic<bool> stop{false};
    std::exception_ptr failure;
    std::mutex lock;
    auto work = [&](int worker) {
      auto checked = std::chrono::steady_clock::now();
      try {
        for (int64_t i; !stop && (i = next++) < tasks;) {
          task(i, worker);
          auto now = std::chrono::steady_clock::now();
          if (worker == 0 && stop_asked && now - checked > std::chrono::milliseconds(100)) {
            checked = now;
            if (stop_asked()) throw Stopped{};
          }
        }
      } catch (...) {
        std::lock_guard<std::mutex> hold(lock);
        if (!failure) failure = std::current_exception();
        stop = true;
      }
    };
    std::vector<std::thread> others;
    try {
      for (int w = 1; w < threads && w < tasks; w++) others.emplace_back(work, w);
    } catch (const std::system_error&) {  // no more can be started: those that were do it all
    }
    work(0);
    for (auto& t : others) t.join();
    if (failure) std::rethrow_exception(failure);
  }
};
