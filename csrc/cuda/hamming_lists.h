// The k smallest keys of those that go by, k up to kLargestK, in shared memory.
//
//     keys   | kept: k sorted | new, in any order ...      | free |
//                              `-- place from an atomic --'      capacity
//
// Threads put a key down if it is smaller than `worst`, the k-th smallest at the last cut. A cut sorts what is there and
// keeps k. Who finds no room keeps his key and tries again after the next cut. Nothing of use is ever lost, so neither
// the order in which threads come nor the moment of a cut changes the answer.
#pragma once

#include "device.h"

namespace ragsr {

// Sorts keys [size], size a power of two, by Batcher's bitonic network.
template <class Team, class Key>
__device__ void sort_keys(const Team& team, Key* keys, int size) {
  for (int length = 2; length <= size; length *= 2) {
    for (int half = length / 2; half > 0; half /= 2) {
      for (int i = team.rank; i < size / 2; i += team.size) {
        const int low = 2 * i - (i & (half - 1)), high = low + half;
        const Key a = keys[low], b = keys[high];
        const bool rising = (low & length) == 0;
        if ((a > b) == rising && a != b) {
          keys[low] = b;
          keys[high] = a;
        }
      }
      team.sync();
    }
  }
}

// From so many keys on a list of k is cut; a list has room for at least as many.
__host__ __device__ inline int enough_for(int64_t k) { return 2 * k > kWarp ? static_cast<int>(2 * k) : kWarp; }

template <class Key>
struct List {
  static constexpr Key kNone = static_cast<Key>(~Key{0});
  Key* keys;   // [capacity], a power of two, as it is sorted whole
  int* count;  // may go past the capacity: so many wanted a place
  Key* worst;  // of k kept keys; kNone while there are fewer
  int k, capacity;

  // Whether the key is done with: it has a place, or is of no use. `full` is set where a cut is due.
  __device__ bool put(Key key, bool& full) const {
    if (key >= *worst) return true;
    const int place = atomicAdd(count, 1);
    if (place + 1 >= enough_for(k)) full = true;
    if (place >= capacity) return false;
    keys[place] = key;
    return true;
  }

  // Sorts the keys, keeps k. Done by a team, when nobody puts.
  template <class Team>
  __device__ void cut(const Team& team) const {
    const int filled = *count < capacity ? *count : capacity;
    int size = 1;
    while (size < filled) size *= 2;
    for (int i = filled + team.rank; i < size; i += team.size) keys[i] = kNone;
    team.sync();
    sort_keys(team, keys, size);
    if (team.rank == 0) {
      *count = filled < k ? filled : k;
      if (filled >= k) *worst = keys[k - 1];
    }
    team.sync();
  }
};

}  // namespace ragsr
