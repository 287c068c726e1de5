// The LSTM on the CPU: a whole sequence in one call, forward and backward. The weight is packed
// once a call; each step is one recurrent product whose accumulators go straight into the gates.
#include "recurrent/recurrent.h"
#include "recurrent/recurrent_panel.h"
#include "recurrent/recurrent_team.h"

namespace lmengine::LMENGINE_ISA {
namespace {

int lanes(int64_t left) { return static_cast<int>(left < Vec::width ? left : Vec::width); }

template <class T>
Vec load(const T* from, int count) {
  return count == Vec::width ? Vec::load(from) : Vec::load(from, count);
}
template <class T>
void store(Vec value, T* to, int count) {
  count == Vec::width ? value.store(to) : value.store(to, count);
}

// The workspace, cut up: see lstm_workspace.
template <class T>
struct Workspace {
  using State = typename Operand<T>::type;
  State* weight;     // packed
  State* states[2];  // (batch, depth rounded up to 2): what the product multiplies, for two steps
  float* hidden;     // (batch, hidden)
  float* cell;       // (batch, hidden)
  Barrier* barriers;

  Workspace(const LstmSizes& sizes, void* workspace) {
    float* memory = static_cast<float*>(workspace);
    const int64_t padded = round_up(sizes.hidden, 64);
    const int64_t states_size = sizes.batch * 4 * padded;
    barriers = reinterpret_cast<Barrier*>(memory);
    memory += 16 * (sizes.threads + 1);
    weight = reinterpret_cast<State*>(memory);
    memory += 4 * padded * padded;
    states[0] = reinterpret_cast<State*>(memory);
    states[1] = reinterpret_cast<State*>(memory + states_size);
    hidden = memory + 2 * states_size;
    cell = hidden + sizes.batch * padded;
  }
};

template <class T>
void forward(const LstmForward& p) {
  using State = typename Operand<T>::type;
  const int64_t batch = p.sizes.batch, hidden = p.sizes.hidden;
  const int64_t depth = round_up(hidden, Operand<T>::depth);
  const int64_t panel_size = depth * panel_width;
  const int64_t panels = (hidden + Vec::width - 1) / Vec::width;
  const T* input_gates = static_cast<const T*>(p.input_gates);
  const T* weight_hh = static_cast<const T*>(p.weight_hh);
  T* outputs = static_cast<T*>(p.outputs);
  T* gates = static_cast<T*>(p.gates);
  const Workspace<T> work(p.sizes, p.workspace);
  Team team(p.sizes, panels, 4 * hidden * hidden * sizeof(State), work.barriers);

  const auto start = [&](const Member& member) {
    // a panel holds the 4 gates of Vec::width units: vector q of it is gate q
    for (int64_t panel = member.panel_begin; panel < member.panel_end; ++panel) {
      if (team.groups > 1 && panel % team.groups != member.barrier - team.barriers - 1) continue;
      const int64_t unit = panel * Vec::width;
      for (int q = 0; q < 4; ++q)
        pack_transposed<T>(work.weight + panel * panel_size + q * Vec::width * Operand<T>::depth,
                           weight_hh + (q * hidden + unit) * hidden, hidden, hidden,
                           lanes(hidden - unit));
    }
    const int64_t begin = member.panel_begin * Vec::width;
    const int64_t end = member.panel_end == panels ? hidden : member.panel_end * Vec::width;
    for (int64_t row = member.row_begin; row < member.row_end; ++row) {
      for (int64_t unit = begin; unit < end; ++unit) {
        work.states[0][row * depth + unit] =
            to_state<State>(static_cast<const T*>(p.hidden)[row * hidden + unit]);
        work.cell[row * hidden + unit] =
            to_float(static_cast<const T*>(p.cell)[row * hidden + unit]);
      }
      if (end == hidden && depth > hidden)
        work.states[0][row * depth + hidden] = work.states[1][row * depth + hidden] = State(0);
    }
  };

  const auto step = [&](const Member& member, int64_t t) {
    const State* states = work.states[t % 2];
    State* next_states = work.states[(t + 1) % 2];
    for (int64_t panel = member.panel_begin; panel < member.panel_end; ++panel) {
      const int64_t unit = panel * Vec::width;
      const int count = lanes(hidden - unit);
      for_row_blocks(member.row_begin, member.row_end, [&]<int rows>(int64_t first) {
        Vec acc[rows][4] = {};
        product_and<T, rows>(states + first * depth, depth, work.weight + panel * panel_size, depth,
                             acc, [&](int r) {
                               const int64_t row = t * batch + first + r;
                               for (int64_t at = row * 4 * hidden + unit;
                                    at < (row + 1) * 4 * hidden; at += hidden) {
                                 __builtin_prefetch(input_gates + at);
                                 if (p.cells) __builtin_prefetch(gates + at, 1);
                               }
                             });
        for (int r = 0; r < rows; ++r) {
          const int64_t row = first + r;
          const int64_t at = (t * batch + row) * hidden + unit;
          const int64_t gates_at = (t * batch + row) * 4 * hidden + unit;
          const T* from = input_gates + gates_at;
          const Vec i = sigmoid(acc[r][0] + load(from, count));
          const Vec f = sigmoid(acc[r][1] + load(from + hidden, count));
          const Vec g = tanh(acc[r][2] + load(from + 2 * hidden, count));
          const Vec o = sigmoid(acc[r][3] + load(from + 3 * hidden, count));
          float* cell = work.cell + row * hidden + unit;
          const Vec c = fma(f, load(cell, count), i * g);
          const Vec h = o * tanh(c);
          store(c, cell, count);
          store(h, next_states + row * depth + unit, count);
          store(h, outputs + at, count);
          if (p.cells) {
            store(c, p.cells + at, count);
            store(i, gates + gates_at, count);
            store(f, gates + gates_at + hidden, count);
            store(g, gates + gates_at + 2 * hidden, count);
            store(o, gates + gates_at + 3 * hidden, count);
          }
          if (t + 1 == p.sizes.length)
            store(c, static_cast<T*>(p.final_cell) + row * hidden + unit, count);
        }
      });
    }
  };
  team.run(p.sizes.length, start, step);
}

template <class T>
void backward(const LstmBackward& p) {
  using State = typename Operand<T>::type;
  const int64_t batch = p.sizes.batch, hidden = p.sizes.hidden, length = p.sizes.length;
  const int64_t depth = 4 * hidden;
  const int64_t panel_size = depth * panel_width;
  const int64_t panels = (hidden + panel_width - 1) / panel_width;
  const T* weight_hh = static_cast<const T*>(p.weight_hh);
  const T* grad_outputs = static_cast<const T*>(p.grad_outputs);
  const T* gates = static_cast<const T*>(p.gates);
  T* grad_input_gates = static_cast<T*>(p.grad_input_gates);
  const Workspace<T> work(p.sizes, p.workspace);  // its states are the gradients of the gates
  Team team(p.sizes, panels, 4 * hidden * hidden * sizeof(State), work.barriers);

  const auto load_grad = [&](const void* from, int64_t at) {
    return from ? to_float(static_cast<const T*>(from)[at]) : 0.0f;
  };

  // writes the gradients of the gates at time t for the units of a panel, and updates work.cell
  const auto gate_gradients = [&](int64_t t, int64_t row, int64_t panel) {
    const int64_t end = hidden < (panel + 1) * panel_width ? hidden : (panel + 1) * panel_width;
    for (int64_t unit = panel * panel_width; unit < end; unit += Vec::width) {
      const int count = lanes(end - unit);
      const int64_t at = (t * batch + row) * hidden + unit;
      const int64_t gates_at = (t * batch + row) * 4 * hidden + unit;
      const int64_t state_at = row * hidden + unit;
      const Vec i = load(gates + gates_at, count), f = load(gates + gates_at + hidden, count);
      const Vec g = load(gates + gates_at + 2 * hidden, count);
      const Vec o = load(gates + gates_at + 3 * hidden, count);
      const Vec tanh_c = tanh(load(p.cells + at, count));
      const Vec previous = t > 0 ? load(p.cells + at - batch * hidden, count)
                                 : load(static_cast<const T*>(p.cell) + state_at, count);
      Vec grad_h = load(work.hidden + state_at, count);
      if (grad_outputs) grad_h = grad_h + load(grad_outputs + at, count);
      const Vec grad_c =
          fma(grad_h * o, fnma(tanh_c, tanh_c, Vec::set(1.0f)), load(work.cell + state_at, count));
      store(grad_c * f, work.cell + state_at, count);
      const Vec grads[4] = {grad_c * g * fnma(i, i, i), grad_c * previous * fnma(f, f, f),
                            grad_c * i * fnma(g, g, Vec::set(1.0f)),
                            grad_h * tanh_c * fnma(o, o, o)};
      for (int q = 0; q < 4; ++q) {
        store(grads[q], grad_input_gates + gates_at + q * hidden, count);
        store(grads[q], work.states[t % 2] + row * depth + q * hidden + unit, count);
      }
    }
  };

  // for gate_gradients
  const auto prefetch_kept = [&](int64_t t, int64_t row, int64_t panel) {
    const int64_t end = hidden < (panel + 1) * panel_width ? hidden : (panel + 1) * panel_width;
    for (int64_t unit = panel * panel_width; unit < end; unit += Vec::width) {
      const int64_t at = (t * batch + row) * hidden + unit;
      for (int q = 0; q < 4; ++q) {
        const int64_t gates_at = (t * batch + row) * 4 * hidden + q * hidden + unit;
        __builtin_prefetch(gates + gates_at);
        __builtin_prefetch(grad_input_gates + gates_at, 1);
      }
      if (t > 0) __builtin_prefetch(p.cells + at - batch * hidden);
      if (grad_outputs) __builtin_prefetch(grad_outputs + at);
    }
  };

  const auto start = [&](const Member& member) {
    // a panel holds panel_width units; the product runs over all gates of all units
    for (int64_t panel = member.panel_begin; panel < member.panel_end; ++panel) {
      const int64_t first = panel * panel_width;
      if (team.groups == 1 || panel % team.groups == member.barrier - team.barriers - 1) {
        const int64_t columns = hidden - first < panel_width ? hidden - first : panel_width;
        pack_rows<T>(work.weight + panel * panel_size, weight_hh + first, hidden, depth,
                     static_cast<int>(columns));
      }
      const int64_t end = hidden < first + panel_width ? hidden : first + panel_width;
      for (int64_t row = member.row_begin; row < member.row_end; ++row) {
        for (int64_t at = row * hidden + first; at < row * hidden + end; ++at) {
          work.hidden[at] = load_grad(p.grad_final_hidden, at);
          work.cell[at] = load_grad(p.grad_final_cell, at);
        }
        if (length > 0) gate_gradients(length - 1, row, panel);
      }
    }
  };

  // the product at time t, then the gates' gradients at t - 1, which need only the member's own
  // units of it
  const auto step = [&](const Member& member, int64_t index) {
    const int64_t t = length - 1 - index;
    for (int64_t panel = member.panel_begin; panel < member.panel_end; ++panel) {
      for_row_blocks(member.row_begin, member.row_end, [&]<int rows>(int64_t first) {
        Vec acc[rows][4] = {};
        product_and<T, rows>(work.states[t % 2] + first * depth, depth,
                             work.weight + panel * panel_size, depth, acc, [&](int r) {
                               if (t > 0) prefetch_kept(t - 1, first + r, panel);
                             });
        for (int r = 0; r < rows; ++r) {
          const int64_t row = first + r;
          for (int q = 0; q < 4; ++q) {
            const int64_t unit = panel * panel_width + q * Vec::width;
            if (unit >= hidden) break;
            const int count = lanes(hidden - unit);
            store(acc[r][q], work.hidden + row * hidden + unit, count);
            if (t == 0) {
              const int64_t at = row * hidden + unit;
              store(acc[r][q], static_cast<T*>(p.grad_hidden) + at, count);
              store(load(work.cell + at, count), static_cast<T*>(p.grad_cell) + at, count);
            }
          }
          if (t > 0) gate_gradients(t - 1, row, panel);
        }
      });
    }
  };
  team.run(length, start, step);
}

}  // namespace

void lstm_forward(const LstmForward& parameters) {
  parameters.sizes.type == LstmType::bfloat16 ? forward<bf16>(parameters)
                                              : forward<float>(parameters);
}

void lstm_backward(const LstmBackward& parameters) {
  parameters.sizes.type == LstmType::bfloat16 ? backward<bf16>(parameters)
                                              : backward<float>(parameters);
}

}  // namespace lmengine::LMENGINE_ISA
