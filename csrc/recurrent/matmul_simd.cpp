// A float32 matrix product. PyTorch's own takes twice the time on processors for which MKL has no
// AVX-512 path; the micro-kernel is the one of the recurrence.
#include "recurrent/matmul.h"

#include "recurrent/recurrent_panel.h"
#include "support/parallel.h"

namespace lmengine::LMENGINE_ISA {
namespace {

// Rows that a thread takes at a time; a multiple of max_rows and of Vec::width.
constexpr int64_t block_rows = 96;

int lanes(int64_t left) {
  return static_cast<int>(left < 0 ? 0 : left < Vec::width ? left : Vec::width);
}

// panel[k][column] = right[begin + k][first + column], for k < depth
void pack_right(const Matmul& p, int64_t first, int64_t begin, int64_t depth, float* panel) {
  const float* from = p.right + begin * p.right_strides[0] + first * p.right_strides[1];
  const int64_t columns = p.columns - first < panel_width ? p.columns - first : panel_width;
  if (p.right_strides[1] == 1) {
    pack_rows<float>(panel, from, p.right_strides[0], depth, static_cast<int>(columns));
    return;
  }
  for (int q = 0; q < 4; ++q) {
    const int64_t column = q * Vec::width;
    const float* source = from + column * p.right_strides[1];
    if (p.right_strides[0] == 1) {
      pack_transposed<float>(panel + column, source, p.right_strides[1], depth,
                             lanes(columns - column));
    } else {
      for (int64_t k = 0; k < depth; ++k)
        for (int lane = 0; lane < Vec::width; ++lane)
          panel[k * panel_width + column + lane] =
              column + lane < columns ? source[k * p.right_strides[0] + lane * p.right_strides[1]]
                                      : 0.0f;
    }
  }
}

// packed[row][k] = left[first + row][begin + k]; the stride of a row is matmul_block_depth
void pack_left(const Matmul& p, int64_t first, int64_t rows, int64_t begin, int64_t depth,
               float* packed) {
  const float* from = p.left + first * p.left_strides[0] + begin * p.left_strides[1];
  int64_t row = 0;
  if (p.left_strides[0] == 1) {
    for (; row + Vec::width <= rows; row += Vec::width) {
      for (int64_t k = 0; k < depth; k += Vec::width) {
        Vec block[Vec::width];
        for (int i = 0; i < Vec::width; ++i)
          block[i] =
              k + i < depth ? Vec::load(from + (k + i) * p.left_strides[1] + row) : Vec::zero();
        transpose(block);
        for (int i = 0; i < Vec::width; ++i)
          block[i].store(packed + (row + i) * matmul_block_depth + k);
      }
    }
  }
  for (; row < rows; ++row)
    for (int64_t k = 0; k < depth; ++k)
      packed[row * matmul_block_depth + k] = from[row * p.left_strides[0] + k * p.left_strides[1]];
}

// output[first_row + r][...] (+)= left rows times one block of a panel
template <int rows>
void block_product(const Matmul& p, const float* left, int64_t left_stride, int64_t first_row,
                   const float* panel, int64_t first_column, int64_t depth, bool first_block) {
  Vec acc[rows][4] = {};
  product<float, rows>(left, left_stride, panel, depth, acc);
  for (int q = 0; q < 4; ++q) {
    const int64_t column = first_column + q * Vec::width;
    const int count = lanes(p.columns - column);
    if (count == 0) break;
    const Vec bias = p.bias ? Vec::load(p.bias + column, count) : Vec::zero();
    for (int r = 0; r < rows; ++r) {
      // blocks are summed one by one and then added up, which rounds less than one long sum
      float* output = p.output + (first_row + r) * p.columns + column;
      (acc[r][q] + (first_block ? bias : Vec::load(output, count))).store(output, count);
    }
  }
}

}  // namespace

void matmul(const Matmul& p) {
  const int64_t panels = (p.columns + panel_width - 1) / panel_width;
  const int64_t depth_blocks = (p.depth + matmul_block_depth - 1) / matmul_block_depth;
  const int64_t pieces = panels * depth_blocks;
  parallel_for(0, pieces, 1, [&](int64_t first, int64_t last) {
    for (int64_t piece = first; piece < last; ++piece) {
      const int64_t begin = piece % depth_blocks * matmul_block_depth;
      const int64_t depth =
          p.depth - begin < matmul_block_depth ? p.depth - begin : matmul_block_depth;
      const int64_t panel = piece / depth_blocks;
      pack_right(p, panel * panel_width, begin, depth,
                 p.workspace + (panel * p.depth + begin) * panel_width);
    }
  });

  const bool pack = p.left_strides[1] != 1;
  // every thread has the same number of rows, in whole vectors, in which they are transposed
  const int64_t share = round_up((p.rows + num_threads() - 1) / num_threads(), Vec::width);
  parallel_for(0, (p.rows + share - 1) / share, 1, [&](int64_t first, int64_t last) {
    alignas(64) float packed[block_rows * matmul_block_depth];
    const int64_t end = last * share < p.rows ? last * share : p.rows;
    for (int64_t row = first * share; row < end; row += block_rows) {
      const int64_t rows = end - row < block_rows ? end - row : block_rows;
      for (int64_t begin = 0; begin < p.depth; begin += matmul_block_depth) {
        const int64_t depth =
            p.depth - begin < matmul_block_depth ? p.depth - begin : matmul_block_depth;
        const float* left = p.left + row * p.left_strides[0] + begin;
        if (pack) {
          pack_left(p, row, rows, begin, depth, packed);
          left = packed;
        }
        const int64_t left_stride = pack ? matmul_block_depth : p.left_strides[0];
        for (int64_t panel = 0; panel < panels; ++panel) {
          for_row_blocks(0, rows, [&]<int count>(int64_t at) {
            block_product<count>(p, left + at * left_stride, left_stride, row + at,
                                 p.workspace + (panel * p.depth + begin) * panel_width,
                                 panel * panel_width, depth, begin == 0);
          });
        }
      }
    }
  });
}

}  // namespace lmengine::LMENGINE_ISA
