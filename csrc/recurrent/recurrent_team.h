// How threads share a sequence: every member of a team owns a slice of the hidden units for a slice
// of the batch rows, and after each step waits for the members that own the same rows.
#pragma once

#include <immintrin.h>
#include <sched.h>

#include "recurrent/recurrent.h"
#include "support/parallel.h"

namespace lmengine::LMENGINE_ISA {
namespace {

// A counter that members raise as they arrive; it never goes down, so it needs no reset.
struct alignas(64) Barrier {
  int64_t arrived;

  void arrive() { __atomic_fetch_add(&arrived, 1, __ATOMIC_ACQ_REL); }
  void wait_for(int64_t arrivals) const {
    // a step takes microseconds, so spin; but let others run if a member has lost its processor
    for (int spins = 0; __atomic_load_n(&arrived, __ATOMIC_ACQUIRE) < arrivals; ++spins) {
      if (spins < 4096) {
        _mm_pause();
      } else {
        sched_yield();
      }
    }
  }
};

struct Member {
  int64_t panel_begin, panel_end;
  int64_t row_begin, row_end;
  Barrier* barrier;
};

struct Team {
  int64_t groups;   // of batch rows
  int64_t members;  // in each group
  int64_t panels, rows;
  Barrier* barriers;  // one for everybody, then one for each group

  Team(const LstmSizes& sizes, int64_t panels, int64_t weight_bytes, Barrier* barriers)
      : panels(panels), rows(sizes.batch), barriers(barriers) {
    // A weight that fits in a core's own cache is read by all, and then no step waits for another
    // thread. A larger one is divided.
    const bool divide_rows = weight_bytes <= (384 << 10) && sizes.batch >= 4 * sizes.threads;
    groups = divide_rows ? sizes.threads : 1;
    members = sizes.threads / groups < panels ? sizes.threads / groups : panels;
    for (int64_t i = 0; i <= groups; ++i) barriers[i].arrived = 0;
  }

  int64_t size() const { return groups * members; }

  Member member(int64_t index) const {
    const int64_t group = index / members, slice = index % members;
    return {panels * slice / members, panels * (slice + 1) / members, rows * group / groups,
            rows * (group + 1) / groups, barriers + 1 + group};
  }

  // Calls start(member) once, then step(member, t) for t = 0 .. steps - 1, each after all members
  // of the group have done the step before. A thread may get several members, if there are fewer
  // threads than were asked for.
  template <class Start, class Step>
  void run(int64_t steps, Start&& start, Step&& step) {
    parallel_for(0, size(), 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) start(member(i));
      for (int64_t i = first; i < last; ++i) barriers[0].arrive();
      barriers[0].wait_for(size());
      for (int64_t t = 0; t < steps; ++t) {
        for (int64_t i = first; i < last; ++i) {
          step(member(i), t);
          if (members > 1) member(i).barrier->arrive();
        }
        if (members == 1) continue;
        for (int64_t i = first; i < last; ++i) member(i).barrier->wait_for((t + 1) * members);
      }
    });
  }
};

}  // namespace
}  // namespace lmengine::LMENGINE_ISA
