#include "threads.h"

#include <unistd.h>

#include <system_error>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace trimode {
namespace {

constexpr int kSpins = 2000;  // some tens of microseconds; then the processor is offered to others at each turn
constexpr int kLinger = 5000;  // about a tenth of a millisecond after a forward

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

void Threads::begin() {
  if (count_ == 1) return;
  if (helpers_ == nullptr || helpers_->process != (int)getpid()) {
    // After a fork the parent's threads do not exist here, and what they held may be locked for ever: it is left behind.
    helpers_ = new Helpers;
    helpers_->process = (int)getpid();
    next_.store(0);
    num_chunks_.store(0);
    try {
      for (int i = 1; i < count_; ++i) helpers_->threads.emplace_back([this, i, own = helpers_] { work_on(i, own); });
    } catch (const std::system_error&) {  // the system grants no more: fewer do the same work
    }
  }
  {
    std::lock_guard<std::mutex> lock(helpers_->mutex);
    active_.store(true, std::memory_order_release);
  }
  helpers_->wake.notify_all();
}

void Threads::end() { active_.store(false, std::memory_order_release); }

void Threads::run_shared(Call call, void* context, int num_chunks) {
  num_left_.store(num_chunks, std::memory_order_relaxed);
  const uint64_t job = (next_.load(std::memory_order_relaxed) >> 32) + 1;
  // nobody takes a chunk while the fields change: the old job has none left
  num_chunks_.store(0, std::memory_order_relaxed);
  call_.store(call, std::memory_order_relaxed);
  context_.store(context, std::memory_order_relaxed);
  next_.store(job << 32, std::memory_order_release);
  num_chunks_.store(num_chunks, std::memory_order_release);
  while (take_one(0)) {
  }
  for (int i = 0; num_left_.load(std::memory_order_acquire) != 0; ++i) {
    if (i < kSpins)
      pause();
    else
      std::this_thread::yield();
  }
}

bool Threads::take_one(int thread) {
  uint64_t seen = next_.load(std::memory_order_acquire);
  for (;;) {
    const int total = num_chunks_.load(std::memory_order_acquire);
    const Call call = call_.load(std::memory_order_relaxed);
    void* const context = context_.load(std::memory_order_relaxed);
    const int chunk = (int)(uint32_t)seen;
    if (chunk >= total) return false;
    // succeeds only while the job is the one whose fields were read: its number is part of the value
    if (next_.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
      call(context, chunk, thread);
      num_left_.fetch_sub(1, std::memory_order_acq_rel);
      return true;
    }
  }
}

void Threads::work_on(int thread, Helpers* helpers) {
  int idle = 0;
  for (;;) {
    if (!active_.load(std::memory_order_acquire)) {
      // the next forward often follows at once, and waking costs tens of microseconds
      for (int i = 0; i < kLinger && !active_.load(std::memory_order_acquire); ++i) pause();
    }
    if (!active_.load(std::memory_order_acquire)) {
      std::unique_lock<std::mutex> lock(helpers->mutex);
      helpers->wake.wait(lock, [&] { return helpers->stopped || active_.load(std::memory_order_acquire); });
      if (helpers->stopped) return;
      idle = 0;
    }
    if (take_one(thread)) {
      idle = 0;
    } else if (++idle < kSpins) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
}

Threads::~Threads() {
  if (helpers_ == nullptr || helpers_->process != (int)getpid()) return;
  {
    std::lock_guard<std::mutex> lock(helpers_->mutex);
    helpers_->stopped = true;
    active_.store(false);
  }
  helpers_->wake.notify_all();
  for (auto& thread : helpers_->threads) thread.join();
  delete helpers_;
}

}  // namespace trimode
