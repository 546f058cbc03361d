// A team of threads: the OpenMP runtime that torch has already loaded, so that there is one pool of threads, with
// torch's thread count and binding, and no second pool spins on the same cores.
#pragma once

namespace neuqi {

// Whether an OpenMP runtime was found in the process.
bool team_is_shared();

// Run `work(data)` on up to `threads` threads at once, the caller among them. Fewer may run; the work must not rely
// on their number.
void team_run(void (*work)(void*), void* data, int threads);

}  // namespace neuqi
