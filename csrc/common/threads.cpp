#include "common/threads.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>

#include "common/sanitizer.h"

namespace vdcore {
namespace {

struct Job {
  int64_t items;
  void (*body)(void*, int64_t);
  void* context;
  std::atomic<int64_t> next{0};

  void work() {
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) body(context, item);
  }
};

// Threads that sleep between jobs and never spin: the processors then belong to torch's own threads.
class Pool {
 public:
  // False when another caller has the pool: that caller's helpers are busy anyway.
  bool run(Job& job, int helpers) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (; threads_ < helpers; ++threads_) std::thread([this] { serve(); }).detach();
      job_ = &job;
      places_ = helpers;
    }
    wake_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    places_ = 0;  // a helper that has not woken by now need not come any more
    done_.wait(lock, [this] { return working_ == 0; });
    return true;
  }

 private:
  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return places_ > 0; });
      --places_;
      ++working_;
      lock.unlock();
      job_->work();
      lock.lock();
      if (--working_ == 0) done_.notify_one();
    }
  }

  std::mutex owner_, mutex_;
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  int threads_ = 0, places_ = 0, working_ = 0;
};

std::atomic<Pool*> pool{nullptr};

// The entry that compilers call for a parallel region; GNU's, LLVM's and Intel's runtimes have it.
using OpenMP = void (*)(void (*body)(void*), void* context, unsigned threads, unsigned flags);
std::atomic<OpenMP> openmp{nullptr};

// A child has none of the threads, and its copy of the locks may be held for ever.
void forget_after_fork() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] {
    pool.store(nullptr);
    openmp.store(nullptr);
  });
  (void)registered;
}

// Never destroyed: its threads outlive main().
Pool& get_pool() {
  forget_after_fork();
  Pool* current = pool.load();
  if (!current) {
    Pool* fresh = new Pool;
    if (pool.compare_exchange_strong(current, fresh))
      current = fresh;
    else
      delete fresh;
  }
  return *current;
}

struct Scratch {
  char* data = nullptr;
  size_t size = 0;
  ~Scratch() { std::free(data); }
};

}  // namespace

void parallel_for(int64_t items, int threads, void (*body)(void* context, int64_t item), void* context) {
  Job job{items, body, context};
  const int64_t helpers = (threads < items ? threads : items) - 1;
  if (helpers < 1) return job.work();
  if (const OpenMP run = openmp.load())
    return run([](void* shared) { static_cast<Job*>(shared)->work(); }, &job, static_cast<unsigned>(helpers + 1), 0);
  if (!get_pool().run(job, static_cast<int>(helpers))) job.work();
}

void wait_until(const int64_t* number, int64_t least) {
  constexpr int kPatience = 256;  // looks, before the processor goes to somebody else
  for (int looks = 0; __atomic_load_n(number, __ATOMIC_ACQUIRE) < least; ++looks)
    if (looks >= kPatience) sched_yield();
}

bool share_openmp(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
  if (!library) return false;
  // As the linker looks for it: what is preloaded comes first, then what the library is linked to.
  void* entry = dlsym(RTLD_DEFAULT, "GOMP_parallel");
  if (!entry) entry = dlsym(library, "GOMP_parallel");
  dlclose(library);
  if (!entry) return false;
  forget_after_fork();
  openmp.store(reinterpret_cast<OpenMP>(entry));
  return true;
}

char* scratch(size_t bytes) {
  thread_local Scratch mine;
  if (mine.size < bytes) {
    std::free(mine.data);
    mine.size = (bytes + 63) / 64 * 64;
    mine.data = static_cast<char*>(std::aligned_alloc(64, mine.size));
    if (!mine.data) {
      mine.size = 0;
      throw std::bad_alloc();
    }
  }
  VDCORE_UNPOISON(mine.data, mine.size);
  return mine.data;
}

}  // namespace vdcore
