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
    for (int i = 0; i < count_; ++i) shares_[i].next.store(0), shares_[i].end.store(0);
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

void Threads::run_shared(Call call, void* context, int size, int num_chunks) {
  num_left_.store(num_chunks, std::memory_order_relaxed);
  ++job_;
  for (int i = 0; i < count_; ++i) {  // its own share first: who has no chunk of his own looks at those before his
    // nobody takes a chunk while this changes: of the old job none is left, and of the new one there is none until its end is told
    Share& share = shares_[i];
    share.call.store(call, std::memory_order_relaxed);
    share.context.store(context, std::memory_order_relaxed);
    share.size.store(size, std::memory_order_relaxed);
    share.next.store(job_ << 32 | (uint64_t)first_of(num_chunks, i), std::memory_order_release);
    share.end.store(job_ << 32 | (uint64_t)first_of(num_chunks, i + 1), std::memory_order_release);
  }
  work(0);
  for (int i = 0; num_left_.load(std::memory_order_acquire) != 0; ++i) {
    if (i < kSpins)
      pause();
    else
      std::this_thread::yield();
  }
}

// its own share, then what others have not begun
void Threads::work(int thread) {
  int num_done = 0;
  for (int i = 0; i < count_; ++i) {
    Share& share = shares_[(thread + i) % count_];
    while (take_one(share, thread)) ++num_done;
  }
  // the job lasts until this is told: all of them were of the same one
  if (num_done > 0) num_left_.fetch_sub(num_done, std::memory_order_acq_rel);
}

bool Threads::take_one(Share& share, int thread) {
  uint64_t seen = share.next.load(std::memory_order_acquire);
  for (;;) {
    const uint64_t end = share.end.load(std::memory_order_acquire);
    const Call call = share.call.load(std::memory_order_relaxed);
    void* const context = share.context.load(std::memory_order_relaxed);
    if (seen >> 32 != end >> 32 || seen >= end) return false;
    // succeeds only while the job is the one whose fields were read: its number is part of the value
    if (share.next.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
      call(context, (int)(uint32_t)seen, thread);
      return true;
    }
  }
}

void Threads::work_on(int thread, Helpers* helpers) {
  int idle = 0;
  uint64_t seen = 0;  // the job that was worked on last
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
    // only its own share is looked at while nothing is to be done
    const uint64_t job = shares_[thread].end.load(std::memory_order_acquire) >> 32;
    if (job != seen) {
      seen = job;
      // what another core wrote is sent for at once, not line by line as it is wanted; a job that is over by now loses nothing by it
      const char* const context = static_cast<const char*>(shares_[thread].context.load(std::memory_order_relaxed));
      const int size = shares_[thread].size.load(std::memory_order_relaxed);
      for (int at = 0; at < size; at += 64) __builtin_prefetch(context + at, 0, 3);
      work(thread);
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
