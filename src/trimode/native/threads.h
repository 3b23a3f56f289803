// Threads that share one forward's work: they spin while a forward runs and sleep between forwards.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace trimode {

// The caller works too and can finish alone: a helper that gets no processor delays nothing that it has not begun.
class Threads {
 public:
  explicit Threads(int count) : count_(count < 1 ? 1 : count), shares_(new Share[count_]) {}
  ~Threads();
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

  int count() const { return count_; }

  // Helpers are awake while one of these lives; they are made anew in a forked child, where they do not exist.
  class Awake {
   public:
    explicit Awake(Threads& threads) : threads_(threads) { threads_.begin(); }
    ~Awake() { threads_.end(); }
    Awake(const Awake&) = delete;
    Awake& operator=(const Awake&) = delete;

   private:
    Threads& threads_;
  };

  // Of so many chunks, where those begin that fall to a thread first: the same ones each time, so that its cache knows them.
  int first_of(int num_chunks, int thread) const { return (int)((int64_t)num_chunks * thread / count_); }

  // work(chunk, thread) for each chunk in [0, num_chunks), on any threads, each one's own in order and first; returns when all are done.
  template <typename Work>
  void run(int num_chunks, Work&& work) {
    if (count_ == 1 || num_chunks <= 1) {
      for (int i = 0; i < num_chunks; ++i) work(i, 0);
      return;
    }
    run_shared([](void* context, int chunk, int thread) { (*static_cast<std::remove_reference_t<Work>*>(context))(chunk, thread); },
               const_cast<void*>(static_cast<const void*>(&work)), (int)sizeof(work), num_chunks);
  }

 private:
  struct Helpers {
    std::vector<std::thread> threads;
    std::mutex mutex;
    std::condition_variable wake;
    bool stopped = false;
    int process = 0;  // that made them
  };

  // A thread's chunks of the job at hand. In cache lines of its own: what two cores write to travels between them, which takes as long as
  // many a chunk.
  using Call = void (*)(void*, int, int);
  struct alignas(128) Share {
    std::atomic<uint64_t> next{0};  // job number << 32 | next chunk
    std::atomic<uint64_t> end{0};   // job number << 32 | behind the last chunk
    // read before a chunk is taken, and valid if taking it succeeds
    std::atomic<Call> call{nullptr};
    std::atomic<void*> context{nullptr};
    std::atomic<int> size{0};  // of what it points to
  };

  void begin();
  void end();
  void run_shared(Call call, void* context, int size, int num_chunks);
  void work(int thread);
  bool take_one(Share& share, int thread);
  void work_on(int thread, Helpers* helpers);

  const int count_;
  const std::unique_ptr<Share[]> shares_;
  Helpers* helpers_ = nullptr;
  uint64_t job_ = 0;
  alignas(128) std::atomic<int> num_left_{0};
  alignas(128) std::atomic<bool> active_{false};
};

}  // namespace trimode
