// Attention over committed pages and drafted slabs.
//
// A unit of work is one KV head and a block of rows (tokens x query heads of that KV head) of sequences that share
// their pages, so that a page is read once for all of them; then every sequence's slab. Keys are taken in splits of
// fixed length, each with a softmax of its own, merged in the order of the keys; where there are fewer units than
// threads, the splits of a unit run side by side and the last to finish merges them. So neither the other rows of a
// batch nor the threads change a bit of a row.
#include "attention_tile.h"
#include "ops.h"
#include "parallel.h"
#include "scratch.h"

namespace stars::STARS_ISA {
namespace {

constexpr float infinity = __builtin_inff();
constexpr int64_t max_rows = 64;                // of a unit, where a token has fewer query heads per KV head
constexpr int64_t serial_work = 12 * 1024;       // products below which waking other threads costs more than it saves

struct unit {
  int64_t first_sequence;
  int64_t first_token, last_token;
  int64_t kv_head;
  // Where the splits run side by side:
  int64_t first_split, splits;
  float* partial;  // [splits, state_floats]
  int32_t unfinished;
};

// A softmax's state: sums, largest scores, denominators.
struct state {
  float* sum;
  float* highest;
  float* denominator;
};

struct call {
  const stars_attention_params& p;
  int64_t repeat, width;

  STARS_INLINE int64_t room(int64_t rows) const { return (rows + vector_width - 1) / vector_width * vector_width; }
  STARS_INLINE int64_t state_floats(int64_t rows) const { return room(rows) * (width + 2); }
  STARS_INLINE state state_at(float* memory, int64_t rows) const {
    return {memory, memory + room(rows) * width, memory + room(rows) * (width + 1)};
  }
  // The sequence's keys that token i of it sees end here; the first `prefix_len` are in pages.
  STARS_INLINE int64_t seen_end(int64_t sequence, int64_t token) const {
    const stars_batch& b = p.batch;
    return b.prefix_len[sequence] + (b.into_slab ? b.slab_used[sequence] : 0) + token - b.row_start[sequence] + 1;
  }
  STARS_INLINE int64_t seen_begin(int64_t end) const { return p.window > 0 && end > p.window ? end - p.window : 0; }
};

STARS_INLINE void clear(const state& s, int64_t first, int64_t last, int64_t width) {
  for (int64_t i = first * width; i < last * width; i += vector_width) store(s.sum + i, floats{});
  for (int64_t row = first; row < last; ++row) {
    s.highest[row] = -infinity;
    s.denominator[row] = 0.0f;
  }
}

// Adds `more` to `total`; a row that saw nothing in `more` keeps its bits.
void merge(const state& total, const state& more, int64_t first, int64_t last, int64_t width) {
  for (int64_t row = first; row < last; ++row) {
    if (more.highest[row] == -infinity) continue;
    float* sum = total.sum + row * width;
    const float* other = more.sum + row * width;
    if (total.highest[row] == -infinity) {
      for (int64_t i = 0; i < width; i += vector_width) store(sum + i, load(other + i));
      total.highest[row] = more.highest[row];
      total.denominator[row] = more.denominator[row];
      continue;
    }
    const float highest = max_of(max(splat(total.highest[row]), splat(more.highest[row])));
    const floats a = exp(splat(total.highest[row] - highest)), b = exp(splat(more.highest[row] - highest));
    for (int64_t i = 0; i < width; i += vector_width) store(sum + i, fma(load(sum + i), a, load(other + i) * b));
    total.denominator[row] = fma(splat(total.denominator[row]), a, splat(more.denominator[row]) * b)[0];
    total.highest[row] = highest;
  }
}

// One thread's work on one unit.
class worker {
 public:
  worker(const call& c, const unit& u) : c(c), p(c.p), b(c.p.batch), u(u) {
    thread_local scratch memory;
    rows = (u.last_token - u.first_token) * c.repeat;
    // A slab's rows may start anywhere, so vectors reach past the last row.
    const int64_t room = c.room(rows) + vector_width;
    float* next = memory.take<float>(room * (3 * c.width + tile_keys + 8));
    const auto cut = [&](int64_t count) {
      float* own = next;
      next += count;
      return own;
    };
    q = cut(room * c.width);
    weights = cut(room * tile_keys);
    own = {cut(room * c.width), cut(room), cut(room)};
    total = {cut(room * c.width), cut(room), cut(room)};
    decay = cut(room);
    fresh = cut(room);
    low = reinterpret_cast<int32_t*>(cut(room));
    high = reinterpret_cast<int32_t*>(cut(room));
    read_queries();
  }

  // Pages, all splits in order, then slabs and output.
  void run_all() {
    clear(total, 0, rows, c.width);
    int64_t begin, end;
    page_ranges(begin, end);
    run_splits(pages(), 0, rows, begin, end);
    run_slabs();
    write();
  }

  void run_split(int64_t split, float* partial) {
    int64_t begin, end;
    page_ranges(begin, end);
    const state out = c.state_at(partial, rows);
    clear(own, 0, rows, c.width);
    const int64_t start = split * split_keys, stop = start + split_keys;
    add_keys(pages(), 0, rows, begin > start ? begin : start, end < stop ? end : stop);
    std::memcpy(out.sum, own.sum, sizeof(float) * rows * c.width);
    std::memcpy(out.highest, own.highest, sizeof(float) * rows);
    std::memcpy(out.denominator, own.denominator, sizeof(float) * rows);
  }

  void finish_splits() {
    clear(total, 0, rows, c.width);
    for (int64_t i = 0; i < u.splits; ++i)
      merge(total, c.state_at(u.partial + i * c.state_floats(rows), rows), 0, rows, c.width);
    run_slabs();
    write();
  }

 private:
  struct source {
    const float* k;
    const float* v;
    const int32_t* table;  // page ids, or NULL for rows that follow each other
  };

  source pages() const {
    const int64_t head = u.kv_head * p.kv.head_dim;
    return {p.kv.k_pages + head, p.kv.v_pages + head,
            b.block_tables + b.seq_group[u.first_sequence] * b.block_table_stride};
  }

  void read_queries() {
    const int64_t head_dim = p.kv.head_dim;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t token = u.first_token + row / c.repeat, head = u.kv_head * c.repeat + row % c.repeat;
      const float* from = p.q + (token * p.heads + head) * head_dim;
      float* to = q + row * c.width;
      int64_t d = 0;
      for (; d + vector_width <= head_dim; d += vector_width) store(to + d, load(from + d) * splat(p.scale));
      if (d < head_dim) store(to + d, load_first(from + d, head_dim - d) * splat(p.scale));
    }
  }

  // Calls visit(sequence, first token, last token) for the unit's part of each of its sequences.
  template <class F>
  STARS_INLINE void for_sequences(F&& visit) const {
    int64_t token = u.first_token;
    for (int64_t sequence = u.first_sequence; token < u.last_token; ++sequence) {
      const int64_t end = b.row_start[sequence + 1] < u.last_token ? b.row_start[sequence + 1] : u.last_token;
      if (token < end) visit(sequence, token, end);
      token = token > end ? token : end;
    }
  }

  STARS_INLINE void set_range(int64_t token, int64_t begin, int64_t end, int64_t& first, int64_t& last) {
    for (int64_t i = 0; i < c.repeat; ++i) {
      const int64_t row = (token - u.first_token) * c.repeat + i;
      low[row] = (int32_t)begin;
      high[row] = (int32_t)end;
    }
    if (begin >= end) return;
    first = begin < first ? begin : first;
    last = end > last ? end : last;
  }

  void page_ranges(int64_t& first, int64_t& last) {
    first = INT64_MAX, last = 0;
    for_sequences([&](int64_t sequence, int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        const int64_t seen = c.seen_end(sequence, token);
        set_range(token, c.seen_begin(seen), b.into_slab ? b.prefix_len[sequence] : seen, first, last);
      }
    });
    if (first > last) first = last;
  }

  void run_slabs() {
    if (!b.into_slab) return;
    for_sequences([&](int64_t sequence, int64_t begin, int64_t end) {
      int64_t first = INT64_MAX, last = 0;
      const int64_t prefix = b.prefix_len[sequence];
      for (int64_t token = begin; token < end; ++token) {
        const int64_t seen = c.seen_end(sequence, token), from = c.seen_begin(seen) - prefix;
        set_range(token, from > 0 ? from : 0, seen - prefix, first, last);
      }
      const int64_t start = b.slab_start[sequence] * p.kv.kv_heads * p.kv.head_dim + u.kv_head * p.kv.head_dim;
      run_splits({p.kv.k_slabs + start, p.kv.v_slabs + start, nullptr}, (begin - u.first_token) * c.repeat,
                 (end - u.first_token) * c.repeat, first, last);
    });
  }

  void run_splits(const source& from, int64_t first_row, int64_t last_row, int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t next = (begin / split_keys + 1) * split_keys, stop = next < end ? next : end;
      clear(own, first_row, last_row, c.width);
      add_keys(from, first_row, last_row, begin, stop);
      merge(total, own, first_row, last_row, c.width);
      begin = stop;
    }
  }

  // Adds keys begin .. end - 1 to the state of the rows.
  void add_keys(const source& from, int64_t first_row, int64_t last_row, int64_t begin, int64_t end) {
    const softmax_rows s = {q + first_row * c.width,
                            own.sum + first_row * c.width,
                            own.highest + first_row,
                            own.denominator + first_row,
                            weights + first_row * tile_keys,
                            decay + first_row,
                            fresh + first_row,
                            low + first_row,
                            high + first_row,
                            last_row - first_row,
                            c.width,
                            p.kv.head_dim};
    key_tile tile;
    tile.k = from.k;
    tile.v = from.v;
    while (begin < end) {
      tile.start = begin / tile_keys * tile_keys;
      tile.first = begin - tile.start;
      tile.last = end - tile.start < tile_keys ? end - tile.start : tile_keys;
      set_offsets(from, tile);
      add_tile(s, tile, p.softcap);
      begin = tile.start + tile.last;
    }
  }

  void set_offsets(const source& from, key_tile& tile) const {
    const int64_t stride = p.kv.kv_heads * p.kv.head_dim, page_size = p.kv.page_size;
    for (int64_t j = tile.first; j < tile.last;) {
      const int64_t key = tile.start + j;
      int64_t at = key, run = tile.last - j;
      if (from.table) {
        const int64_t page = key / page_size, within = key - page * page_size;
        at = from.table[page] * page_size + within;
        run = page_size - within < run ? page_size - within : run;
      }
      for (int64_t i = 0; i < run; ++i) tile.offset[j + i] = (at + i) * stride;
      j += run;
    }
  }

  void write() const {
    const int64_t head_dim = p.kv.head_dim;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t token = u.first_token + row / c.repeat, head = u.kv_head * c.repeat + row % c.repeat;
      float* to = p.out + (token * p.heads + head) * head_dim;
      const float* sum = total.sum + row * c.width;
      const floats denominator = splat(total.highest[row] == -infinity ? 1.0f : total.denominator[row]);
      int64_t d = 0;
      for (; d + vector_width <= head_dim; d += vector_width) store(to + d, load(sum + d) / denominator);
      if (d < head_dim) store_first(to + d, load(sum + d) / denominator, head_dim - d);
    }
  }

  const call& c;
  const stars_attention_params& p;
  const stars_batch& b;
  const unit& u;
  int64_t rows;
  float *q, *weights, *decay, *fresh;
  state own, total;
  int32_t *low, *high;
};

// Adds the units of the sequences first .. last - 1, which share their pages.
void add_units(const call& c, int64_t first, int64_t last, unit* units, int64_t& count) {
  const stars_batch& b = c.p.batch;
  const int64_t tokens_per_unit = c.repeat < max_rows ? max_rows / c.repeat : 1;
  // The last rows of a causal batch see the most: they come first, so that the threads end together.
  int64_t sequence = last - 1;
  for (int64_t end = b.row_start[last]; end > b.row_start[first];) {
    const int64_t begin = end - b.row_start[first] > tokens_per_unit ? end - tokens_per_unit : b.row_start[first];
    while (b.row_start[sequence] > begin) --sequence;
    for (int64_t head = 0; head < c.p.kv.kv_heads; ++head)
      units[count++] = {sequence, begin, end, head, 0, 1, nullptr, 0};
    end = begin;
  }
}

// Page keys first .. last - 1 are seen by some row of the unit.
void page_span(const call& c, const unit& u, int64_t& first, int64_t& last) {
  const stars_batch& b = c.p.batch;
  first = INT64_MAX, last = 0;
  for (int64_t sequence = u.first_sequence, token = u.first_token; token < u.last_token; ++token) {
    while (b.row_start[sequence + 1] <= token) ++sequence;
    const int64_t seen = c.seen_end(sequence, token), begin = c.seen_begin(seen);
    const int64_t end = b.into_slab ? b.prefix_len[sequence] : seen;
    if (begin >= end) continue;
    first = begin < first ? begin : first;
    last = end > last ? end : last;
  }
  if (first > last) first = last;
}

void run_side_by_side(const call& c, unit* units, int64_t count) {
  thread_local scratch memory, task_memory;
  int64_t tasks = 0, floats_needed = 0;
  for (int64_t i = 0; i < count; ++i) {
    unit& u = units[i];
    int64_t first, last;
    page_span(c, u, first, last);
    u.first_split = first / split_keys;
    u.splits = last > first ? (last - 1) / split_keys - u.first_split + 1 : 0;
    u.unfinished = (int32_t)u.splits;
    tasks += u.splits > 0 ? u.splits : 1;
    floats_needed += u.splits * c.state_floats((u.last_token - u.first_token) * c.repeat);
  }
  float* partial = memory.take<float>(floats_needed);
  int32_t* unit_of = task_memory.take<int32_t>(2 * tasks);
  int32_t* split_of = unit_of + tasks;
  int64_t task = 0;
  for (int64_t i = 0; i < count; ++i) {
    units[i].partial = partial;
    partial += units[i].splits * c.state_floats((units[i].last_token - units[i].first_token) * c.repeat);
    for (int64_t split = 0; split < (units[i].splits > 0 ? units[i].splits : 1); ++split, ++task) {
      unit_of[task] = (int32_t)i;
      split_of[task] = (int32_t)split;
    }
  }
  parallel(tasks, [&](int64_t own) {
    unit& u = units[unit_of[own]];
    worker w(c, u);
    if (u.splits > 0) {
      const int64_t rows = (u.last_token - u.first_token) * c.repeat;
      w.run_split(u.first_split + split_of[own], u.partial + split_of[own] * c.state_floats(rows));
      if (__atomic_sub_fetch(&u.unfinished, 1, __ATOMIC_ACQ_REL) > 0) return;
    }
    w.finish_splits();
  });
}

}  // namespace

void attention(const stars_attention_params& p) {
  const stars_batch& b = p.batch;
  if (b.rows == 0) return;
  const int64_t width = (p.kv.head_dim + vector_width - 1) / vector_width * vector_width;
  const call c = {p, p.heads / p.kv.kv_heads, width};
  thread_local scratch memory;
  unit* units = memory.take<unit>((b.rows + b.sequences) * p.kv.kv_heads);
  int64_t count = 0, longest = 0;
  double work = 0.0;  // products; int64 could overflow
  for (int64_t first = 0, last; first < b.sequences; first = last) {
    for (last = first + 1; last < b.sequences && b.seq_group[last] == b.seq_group[first];) ++last;
    add_units(c, first, last, units, count);
    for (int64_t sequence = first; sequence < last; ++sequence) {
      const int64_t tokens = b.row_start[sequence + 1] - b.row_start[sequence];
      const int64_t seen = c.seen_end(sequence, b.row_start[sequence + 1] - 1);
      longest = tokens > 0 && seen > longest ? seen : longest;
      work += static_cast<double>(tokens * (seen - c.seen_begin(seen))) * static_cast<double>(p.heads * width);
    }
  }
  const int threads = work < serial_work ? 1 : num_threads();
  if (threads == 1) {
    for (int64_t i = 0; i < count; ++i) worker(c, units[i]).run_all();
  } else if (count < threads && longest > split_keys) {
    run_side_by_side(c, units, count);
  } else {
    parallel(count, [c, units](int64_t i) { worker(c, units[i]).run_all(); });
  }
}

}  // namespace stars::STARS_ISA
