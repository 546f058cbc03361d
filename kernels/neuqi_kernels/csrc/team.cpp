#include "team.h"

#include <dlfcn.h>
#include <pthread.h>

namespace neuqi {
namespace {

// Exported by GNU's, Intel's and LLVM's runtimes alike.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel find_runtime() { return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel")); }

GompParallel runtime() {
  static const GompParallel found = find_runtime();
  return found;
}

struct Start {
  void (*work)(void*);
  void* data;
};

void* run_one(void* start) {
  auto* s = static_cast<Start*>(start);
  s->work(s->data);
  return nullptr;
}

}  // namespace

bool team_is_shared() { return runtime() != nullptr; }

void team_run(void (*work)(void*), void* data, int threads) {
  if (threads <= 1) {
    work(data);
    return;
  }
  if (GompParallel parallel = runtime()) {
    parallel(work, data, unsigned(threads), 0);
    return;
  }
  constexpr int kMost = 256;
  pthread_t started[kMost];
  Start start{work, data};
  int count = 0;
  while (count < threads - 1 && count < kMost && pthread_create(&started[count], nullptr, run_one, &start) == 0) ++count;
  work(data);
  for (int i = 0; i < count; ++i) pthread_join(started[i], nullptr);
}

}  // namespace neuqi
