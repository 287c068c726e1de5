// The tile sizes of attention's CUDA kernels for sm_80, by the type and the larger of head_dim and
// value_dim, and the choice between the two variants of each kernel:
//   plain    full or causal, packed sequences, key lengths, groups of heads
//   general  with all features, whose registers leave room for smaller tiles only
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "attention/attention_device.h"

namespace lmengine::attention {

// `ring`: how many tiles of keys and values there are.
template <class Engine_, int ring_>
struct ForwardTiles {
  using Engine = Engine_;
  static constexpr int kDim = Engine::kDim, kRing = ring_;
};

// `split`: a block has either grad_key or grad_value, as the registers do not hold both.
template <class Engine_, bool split_ = false>
struct BackwardTiles {
  using Engine = Engine_;
  static constexpr int kDim = Engine::kDim;
  static constexpr bool kSplit = split_;
};

template <class... Tiles>
struct Table {
  // Calls run(tiles) with the first that is wide enough.
  template <class Run>
  static void choose(const AttentionParameters& p, Run run) {
    const int dim = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
    bool done = false;
    ((!done && dim <= Tiles::kDim ? (done = true, run(Tiles{})) : void()), ...);
    if (!done)
      throw std::runtime_error("lmengine: query, value: expected a head_dim of at most 256, got " +
                               std::to_string(dim));
  }
};

// MatrixEngine: dim, 16 rows a warp (1) or 32 (2), columns, whether the rows stay in registers.
// 32 rows a warp read a tile from shared memory half as often. ScalarEngine: dim, columns, threads.
template <class T>
struct PlainTiles {
  using Forward = Table<ForwardTiles<MatrixEngine<T, 32, 2, 64, true>, 4>,
                        ForwardTiles<MatrixEngine<T, 64, 2, 64, true>, 4>,
                        ForwardTiles<MatrixEngine<T, 96, 2, 48, false>, 3>,
                        ForwardTiles<MatrixEngine<T, 128, 2, 32, false>, 4>,
                        ForwardTiles<MatrixEngine<T, 192, 1, 48, false>, 3>,
                        ForwardTiles<MatrixEngine<T, 256, 1, 32, false>, 3>>;
  using Keys = Table<BackwardTiles<MatrixEngine<T, 32, 2, 32, true>>,
                     BackwardTiles<MatrixEngine<T, 64, 1, 64, true>>,
                     BackwardTiles<MatrixEngine<T, 96, 1, 32, false>>,
                     BackwardTiles<MatrixEngine<T, 128, 1, 32, false>>,
                     BackwardTiles<MatrixEngine<T, 192, 1, 32, false>, true>,
                     BackwardTiles<MatrixEngine<T, 256, 1, 16, false>, true>>;
  using Queries = Table<BackwardTiles<MatrixEngine<T, 32, 2, 64, true>>,
                        BackwardTiles<MatrixEngine<T, 64, 2, 32, true>>,
                        BackwardTiles<MatrixEngine<T, 96, 1, 32, false>>,
                        BackwardTiles<MatrixEngine<T, 128, 1, 32, false>>,
                        BackwardTiles<MatrixEngine<T, 192, 1, 32, false>>,
                        BackwardTiles<MatrixEngine<T, 256, 1, 32, false>>>;
};

template <class T>
struct GeneralTiles {
  using Forward = Table<ForwardTiles<MatrixEngine<T, 64, 1, 64, true>, 3>,
                        ForwardTiles<MatrixEngine<T, 128, 1, 64, false>, 3>,
                        ForwardTiles<MatrixEngine<T, 256, 1, 32, false>, 3>>;
  using Keys = Table<BackwardTiles<MatrixEngine<T, 64, 1, 32, true>>,
                     BackwardTiles<MatrixEngine<T, 128, 1, 32, false>, true>,
                     BackwardTiles<MatrixEngine<T, 256, 1, 16, false>, true>>;
  using Queries = Table<BackwardTiles<MatrixEngine<T, 64, 1, 32, true>>,
                        BackwardTiles<MatrixEngine<T, 128, 1, 32, false>>,
                        BackwardTiles<MatrixEngine<T, 256, 1, 16, false>>>;
};

struct FloatTiles {
  using Forward =
      Table<ForwardTiles<ScalarEngine<64, 64>, 3>, ForwardTiles<ScalarEngine<128, 32>, 2>,
            ForwardTiles<ScalarEngine<256, 32>, 2>>;
  using Keys = Table<BackwardTiles<ScalarEngine<64, 32>>, BackwardTiles<ScalarEngine<128, 32>>,
                     BackwardTiles<ScalarEngine<256, 16, 128>, true>>;
  using Queries = Table<BackwardTiles<ScalarEngine<64, 32>>, BackwardTiles<ScalarEngine<128, 32>>,
                        BackwardTiles<ScalarEngine<256, 16, 128>>>;
};

template <class T, bool general>
using TilesOf = std::conditional_t<std::is_same_v<T, float>, FloatTiles,
                                   std::conditional_t<general, GeneralTiles<T>, PlainTiles<T>>>;

// Runs one of the variants: run(std::bool_constant<general>).
template <class Run>
void choose_variant(const AttentionParameters& p, Run run) {
  const bool general = p.mask.type != MaskType::none || p.alibi_slopes != nullptr ||
                       p.prefix_lengths != nullptr || p.seed != nullptr || p.window_left >= 0 ||
                       p.softcap != 0;
  if (general) return run(std::true_type{});
  run(std::false_type{});
}

}  // namespace lmengine::attention
