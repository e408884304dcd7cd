// EXPERTS_GATE_UP and EXPERTS_DOWN: the products of a mixture of experts, by groups of rows that share an expert's matrices.
#include <cmath>
#include <cstring>

#include "expert_groups.hpp"
#include "ops.hpp"

namespace dso {
namespace {

constexpr int64_t kVectorRows = 4;  // up to this many rows, kernels read weights tile by tile

struct Experts {  // one of the two steps: its inputs and its stack of weights
  SlotRef in, routes;
  Stack stack;
  const float* bias;  // of the stack's matrices, [count * rows]; null: none
  std::shared_ptr<ExpertGroups> groups;

  int64_t rows(const Run& run) const { return run.slots[routes.index].count; }
  int64_t pairs(const Run& run) const { return rows(run) * groups->chosen.top_k; }
  bool one_family() const { return dso::one_family(stack.first, in.kind); }
  int64_t tiles() const { return tile_rows(stack.first); }
  // The bias of a matrix, from tile `tile` on.
  const float* bias_of(int64_t matrix, int64_t tile) const {
    return bias ? bias + matrix * stack.first.rows + tile * kTileRows : nullptr;
  }
  int64_t tile_bytes() const { return tile_row_bytes(stack.first); }
  // Bytes of weights per task for `products` matrices of this stack, of which a node has `tiles`, when limited by memory
  // bandwidth.
  int64_t stretch(int64_t threads, int64_t products, int64_t tiles) const {
    return std::clamp(products * tiles * tile_bytes() / (kTasksAThread * threads), kLeastBytes, kMostBytes);
  }
};

struct Activation {
  bool gelu;
  float alpha, limit;  // limit > 0: the clamped form
  float raise;         // added to up in that form

  void apply(const Kernels& kernels, float* gate, const float* up, int64_t columns) const {
    if (limit > 0)
      kernels.clamped_swiglu(gate, up, columns, alpha, limit, raise, gate);
    else
      (gelu ? kernels.geglu : kernels.swiglu)(gate, up, columns, gate);
  }
};

// The rows of the groups' experts, split into (expert, block of tiles, block of rows). As in GATE_UP, a task computes the same
// columns of gate and up in its own buffers and writes the activation of them as whole groups of 32 columns.
class ExpertsGateUp final : public Op {
 public:
  ExpertsGateUp(Experts experts, const SlotRef& out, const Activation& activation, bool weighs)
      : x_(std::move(experts)), out_(out), activation_(activation), weighs_(weighs) {}

  void shape(const Run& run) override {
    const int64_t pairs = x_.pairs(run);
    x_.groups->reserve(x_.rows(run));
    parts_.reserve(2 * run.places.nodes.size() * (x_.groups->grouped ? std::min(pairs, x_.groups->chosen.experts) : pairs));
    nodes_.clear();
    // The largest blocks that open() may create: few rows and a long run of tiles, or many rows and few tiles.
    const bool many = pairs >= kFewRows;
    max_rows_ = many ? std::max(kFewRows, round_up(max_rows(x_.in.kind, x_.stack.first.cols), 4)) : pairs;
    int64_t longest = 0;  // of the runs of tiles of each node, which are cut for themselves
    for (int k = 0; k < run.places.nodes_count(); ++k)
      if (const int64_t tiles = tiles_of_node(run.places, k, x_.stack.first).size(); tiles > 0)
        for (const int64_t rows : {kVectorRows, kFewRows})
          longest = std::max(longest, stretches(tiles, rows, kMostBytes).largest());
    const int64_t few = std::min(pairs, kFewRows) * longest;
    block_floats_ = kTileRows * std::max(few, many ? max_rows_ * kMostTiles : 0);
  }
  void open(const Run& run) override {
    ExpertGroups& groups = *x_.groups;
    groups.build(run.slots[x_.routes.index], decode_rows(run, x_.in));
    parts_.clear();
    nodes_.clear();
    bool many = false;
    int64_t tasks = 0;
    for (int k = 0; k < run.places.nodes_count(); ++k) {
      const Range tiles = tiles_of_node(run.places, k, x_.stack.first);
      const auto own = std::ptrdiff_t(parts_.size());
      for (const ExpertGroup& g : groups.groups())
        by_family(g, x_.one_family(), [&](int64_t begin, int64_t end, bool prefill) {
          if (tiles.size() > 0)
            parts_.push_back(cut_part(run.places.nodes[size_t(k)].threads, tiles, g.expert, begin, end, prefill));
          many |= end - begin >= kFewRows;
        });
      // If limited by arithmetic, the most expensive tasks go first, so that all threads finish together; if limited by memory,
      // tasks follow the order in memory.
      if (many)
        std::stable_sort(parts_.begin() + own, parts_.end(), [](const Part& a, const Part& b) { return a.cost() > b.cost(); });
      for (auto p = parts_.begin() + own; p != parts_.end(); ++p) {
        p->first_task = tasks;
        tasks += p->row_blocks * p->tiles.blocks;
      }
      nodes_.add(tasks);
    }
    stretches_ = !many;
  }
  bool idle(const Run& run) const override { return x_.rows(run) == 0; }
  int64_t work(const Run&) const override { return kSerialWork; }
  int64_t tasks(const Run&) const override { return nodes_.total(); }
  int64_t node_end(const Run&, int node) const override { return nodes_.end(node); }
  void weights_of_nodes(const ThreadPlaces& places, std::vector<NodeRange>& out) const override {
    add_weights(places, x_.stack, out);
  }
  int64_t scratch_bytes(const Run& run) const override { return buffers_at(run) + 2 * 4 * block_floats_; }

  void task(const Run& run, int64_t index, int thread) override {
    if (stretches_) index = nodes_.in_stretches(run.places, index);
    const Part& p = *(
        std::upper_bound(parts_.begin(), parts_.end(), index, [](int64_t i, const Part& part) { return i < part.first_task; }) -
        1);
    index -= p.first_task;
    const int64_t begin = p.begin + index % p.row_blocks * p.block_rows, n = std::min(p.block_rows, p.end - begin);
    const int64_t block = index / p.row_blocks, tile = p.tile + p.tiles.first(block),
                  tile_end = p.tile + p.tiles.first(block + 1);
    const int64_t column = tile * kTileRows, columns = std::min(tile_end * kTileRows, out_.width) - column;
    const int64_t stride = (tile_end - tile) * kTileRows;

    uint8_t* scratch = run.thread_scratch(thread);
    float* gate = reinterpret_cast<float*>(scratch + buffers_at(run));
    float* up = gate + block_floats_;
    const Rows x = rows_of(run, begin, n, scratch + gather_at(run));
    for (int64_t half = 0; half < 2; ++half)
      run.kernels.linear(tiles_of(x_.stack.at(2 * p.expert + half), tile, tile_end), x_.bias_of(2 * p.expert + half, tile),
                         x_.in.kind, x.data, x.stride, n, p.prefill, 0, tile_end - tile, half ? up : gate, 4 * stride, scratch);
    for (int64_t r = 0; r < n; ++r) {
      float *h = gate + r * stride, *u = up + r * stride;
      if (weighs_)  // the products with the weighted input
        for (float* product : {h, u}) run.kernels.scale(product, x_.groups->weight(begin + r), columns, product);
      activation_.apply(run.kernels, h, u, columns);
      write_columns(run, out_, begin + r, h, column, column + columns);
    }
  }

 private:
  // Smaller blocks of tiles than in LinearGrid: a task may have to gather its rows first.
  static constexpr int64_t kMostTiles = 24;
  static constexpr int64_t kBalancingRows = 8;  // rows that cost about as much time as fetching the weights

  struct Part {  // pairs [begin, end) of one expert and family
    int64_t expert, begin, end;
    bool prefill;
    int64_t block_rows, row_blocks;
    int64_t tile;  // the first of
    TileBlocks tiles;
    int64_t first_task = 0;
    int64_t cost() const { return std::max(block_rows, kBalancingRows) * tiles.largest(); }  // per task
  };

  // Blocks of tiles have even length, so that groups of 32 columns stay whole.
  TileBlocks stretches(int64_t tiles, int64_t rows, int64_t bytes) const {
    const int64_t step = rows <= kVectorRows ? 2 : kTileStep;
    return TileBlocks::of(tiles, step, ceil_div(tiles * x_.tile_bytes(), bytes));
  }
  Part cut_part(int64_t threads, const Range& own, int64_t expert, int64_t begin, int64_t end, bool prefill) const {
    const int64_t rows = end - begin, tiles = own.size();
    if (rows < kFewRows) {
      const int64_t bytes = x_.stretch(threads, int64_t(x_.groups->groups().size()), tiles);
      return {expert, begin, end, prefill, rows, 1, own.begin, stretches(tiles, rows, bytes)};
    }
    const int64_t wanted = ceil_div(rows, max_rows(x_.in.kind, x_.stack.first.cols)),
                  block_rows = round_up(ceil_div(rows, wanted), 4);
    const int64_t fair = x_.groups->pairs() * tiles / (kTasksAThread * threads) / block_rows;  // tiles per task
    const int64_t block = std::clamp(fair, kTileStep, kMostTiles);
    return {expert,     begin,
            end,        prefill,
            block_rows, ceil_div(rows, block_rows),
            own.begin,  TileBlocks::of(tiles, kTileStep, ceil_div(tiles, block))};
  }

  int64_t gather_at(const Run& run) const { return round_up(int64_t(run.kernels.linear_scratch), 64); }
  int64_t buffers_at(const Run& run) const { return gather_at(run) + max_rows_ * row_bytes(x_.in.kind, x_.in.width); }

  // The input rows of pairs [begin, begin + n), copied together unless they are contiguous.
  Rows rows_of(const Run& run, int64_t begin, int64_t n, uint8_t* gathered) const {
    const Rows& x = run.slots[x_.in.index];
    const int32_t* tokens = x_.groups->tokens(begin);
    if (tokens[n - 1] - tokens[0] == n - 1) return {x.row(tokens[0]), x.stride, n};
    for (int64_t i = 0; i < n; ++i) std::memcpy(gathered + i * x.stride, x.row(tokens[i]), x.stride);
    return {gathered, x.stride, n};
  }

  const Experts x_;
  const SlotRef out_;
  std::vector<Part> parts_;
  NodeTasks nodes_;
  int64_t max_rows_ = 0, block_floats_ = 0;
  bool stretches_ = false;
  const Activation activation_;
  const bool weighs_;
};

// A task owns a block of columns of a block of tokens and walks the groups in order, so that each result is one chain of
// multiply-adds over the token's experts, ascending. The split depends only on the shape: each token costs the same.
class ExpertsDown final : public Op {
 public:
  ExpertsDown(Experts experts, const SlotRef& out, bool weighs) : h_(std::move(experts)), out_(out), weighs_(weighs) {}

  void shape(const Run& run) override {
    const int64_t rows = h_.rows(run), pairs = h_.pairs(run), tiles = h_.tiles();
    const int64_t groups = h_.groups->grouped ? std::min(pairs, h_.groups->chosen.experts) : pairs;  // at most
    token_blocks_ = 1;
    block_rows_ = std::min(pairs, max_rows(h_.in.kind, h_.stack.first.cols));
    stretches_ = rows < kFewRows;
    TileBlocks all;  // of one node with all threads
    if (stretches_) {
      int64_t step = rows <= kVectorRows ? 1 : kTileStep;
      while (step > 1 && ceil_div(tiles, step) < kTasksAThread * run.threads) step = step > 3 ? 3 : 1;
      all = TileBlocks::of(tiles, step,
                           round_up(ceil_div(groups * h_.stack.bytes, h_.stretch(run.threads, groups, tiles)), run.threads));
    } else {
      int64_t wanted = 2 * kTasksAThread * run.threads;  // narrower blocks cost more, so fewer tasks are enough
      for (const int64_t block : {2 * kTileStep, kTileStep, kTileStep / 2, int64_t(1)}) {
        all = TileBlocks::of(tiles, std::min(block, kTileStep), ceil_div(tiles, block));
        while (all.blocks * token_blocks_ < wanted && pairs / groups / (2 * token_blocks_) >= kLeastRows) token_blocks_ *= 2;
        if (all.blocks * token_blocks_ >= wanted) break;
        wanted /= 2;
      }
    }
    block_tokens_ = ceil_div(rows, token_blocks_);
    token_blocks_ = block_tokens_ ? ceil_div(rows, block_tokens_) : 0;
    blocks_.clear();
    nodes_.clear();
    largest_ = 0;
    for (int k = 0; k < run.places.nodes_count(); ++k) {
      const Range own = tiles_of_node(run.places, k, h_.stack.first);
      if (own.size() > 0) {  // a small matrix may have fewer tiles than there are nodes
        const TileBlocks cut =
            own.size() == tiles ? all : TileBlocks::of(own.size(), all.step, ceil_div(all.blocks * own.size(), tiles));
        for (int64_t b = 0; b < cut.blocks; ++b) blocks_.push_back({own.begin + cut.first(b), own.begin + cut.first(b + 1)});
        largest_ = std::max(largest_, cut.largest());
      }
      nodes_.add(int64_t(blocks_.size()) * token_blocks_);
    }
  }
  bool idle(const Run& run) const override { return h_.rows(run) == 0; }
  int64_t work(const Run&) const override { return kSerialWork; }
  int64_t tasks(const Run&) const override { return nodes_.total(); }
  int64_t node_end(const Run&, int node) const override { return nodes_.end(node); }
  void weights_of_nodes(const ThreadPlaces& places, std::vector<NodeRange>& out) const override {
    add_weights(places, h_.stack, out);
  }
  int64_t scratch_bytes(const Run& run) const override { return buffer_at(run) + 4 * block_rows_ * largest_ * kTileRows; }

  void task(const Run& run, int64_t index, int thread) override {
    if (stretches_) index = nodes_.in_stretches(run.places, index);
    const auto [tile, tile_end] = blocks_[size_t(index / token_blocks_)];
    const int64_t first = index % token_blocks_ * block_tokens_, end = std::min(first + block_tokens_, h_.rows(run));
    const int64_t column = tile * kTileRows, columns = std::min(tile_end * kTileRows, out_.width) - column;
    const Rows& y = run.slots[out_.index];
    for (int64_t t = first; t < end; ++t) std::fill_n(y.f32(t) + column, columns, 0.0f);
    for (const ExpertGroup& g : h_.groups->groups()) {
      const Matrix w = tiles_of(h_.stack.at(g.expert), tile, tile_end);
      by_family(g, h_.one_family(), [&, tile = tile](int64_t begin, int64_t stop, bool prefill) {
        if (token_blocks_ > 1) {
          const int32_t *from = h_.groups->tokens(begin), *to = h_.groups->tokens(stop);
          stop = begin + (std::lower_bound(from, to, end) - from);
          begin += std::lower_bound(from, to, first) - from;
        }
        for (; begin < stop; begin += block_rows_)
          add_products(run, w, h_.bias_of(g.expert, tile), begin, std::min(block_rows_, stop - begin), prefill, column, columns,
                       thread);
      });
    }
  }

 private:
  int64_t buffer_at(const Run& run) const { return round_up(int64_t(run.kernels.linear_scratch), 64); }

  void add_products(const Run& run, const Matrix& w, const float* bias, int64_t begin, int64_t n, bool prefill, int64_t column,
                    int64_t columns, int thread) const {
    uint8_t* scratch = run.thread_scratch(thread);
    float* buffer = reinterpret_cast<float*>(scratch + buffer_at(run));
    const Rows &h = run.slots[h_.in.index], &y = run.slots[out_.index];
    const int64_t stride = round_up(columns, kTileRows);
    run.kernels.linear(w, bias, h_.in.kind, h.row(begin), h.stride, n, prefill, 0, tile_rows(w), buffer, 4 * stride, scratch);
    const int32_t* tokens = h_.groups->tokens(begin);
    for (int64_t i = 0; i < n; ++i)
      run.kernels.add_scaled(buffer + i * stride, weighs_ ? h_.groups->weight(begin + i) : 1.0f, columns,
                             y.f32(tokens[i]) + column);
  }

  const Experts h_;
  const SlotRef out_;
  std::vector<Range> blocks_;  // of tiles, in the order of the nodes
  NodeTasks nodes_;
  int64_t token_blocks_ = 1, block_tokens_ = 1, block_rows_ = 1;
  int64_t largest_ = 1;  // tiles of a block
  bool stretches_ = false;
  const bool weighs_;
};

OwnExperts own_experts(StepReader& s) {
  const int64_t all = s.step.groups ? s.step.groups : s.step.experts, first = s.step.offset;
  if (s.step.groups == 0) s.chosen();  // checks the fields
  if (s.step.groups && (s.step.experts < 1 || all > kMostExperts || first < 0 || first + s.step.experts > all))
    s.refuse("offset is %d and experts %d, must be a part of groups, %d, which is at most %d", s.step.offset, s.step.experts,
             s.step.groups, int(kMostExperts));
  if (s.step.groups && (s.step.top_k < 1 || s.step.top_k > all))
    s.refuse("top_k is %d, must be from 1 to groups, %lld", s.step.top_k, (long long)all);
  return {s.step.experts, s.step.top_k, s.step.groups ? first : 0, all};
}

Experts read_experts(StepReader& s, int64_t matrices, int64_t repeat) {
  const OwnExperts chosen = own_experts(s);
  const Stack stack = s.stack(0, matrices * chosen.experts);
  const float* bias = s.bias(0, stack.count * stack.first.rows);
  const SlotRef in = s.activations(stack.first, repeat), routes = s.in(1, kF32Only, 2 * chosen.top_k);
  if (in.selected != routes.selected) s.refuse("in[0] and in[1] hold different rows");
  return {in, routes, stack, bias, nullptr};
}

std::shared_ptr<ExpertGroups>* find_groups(StepReader& s, const Experts& x) {
  const OwnExperts chosen = own_experts(s);
  const bool grouped = s.step.flags & DSO_FLAG_GROUPED;
  for (auto& g : s.plan().groups)
    if (g->routes == x.routes.index && g->chosen == chosen && g->grouped == grouped) return &g;
  return nullptr;
}

}  // namespace

std::unique_ptr<Op> make_experts_gate_up(StepReader& s) {
  s.takes(2, 1, 1, 1, DSO_FLAG_GROUPED | DSO_FLAG_GELU | DSO_FLAG_WEIGH_INPUT | DSO_FLAG_PLAIN_UP);
  const Activation activation{(s.step.flags & DSO_FLAG_GELU) != 0, s.step.scale, s.step.softcap,
                              s.step.flags & DSO_FLAG_PLAIN_UP ? 0.0f : 1.0f};
  const bool weighs = s.step.flags & DSO_FLAG_WEIGH_INPUT;
  if (!(activation.limit >= 0 && std::isfinite(activation.limit)))
    s.refuse("softcap is %g, must be finite and not negative", double(activation.limit));
  if (activation.limit > 0 && activation.gelu) s.refuse("has a limit (softcap) and the GELU flag");
  if (weighs && s.step.b[0] != -1) s.refuse("has biases and the WEIGH_INPUT flag");
  Experts x = read_experts(s, 2, 1);
  const SlotRef out = s.out(0, kAnyKind, x.stack.first.rows, x.in.selected, own_experts(s).top_k);
  if (out.index == x.in.index || out.index == x.routes.index) s.refuse("out[0] is an input");
  if (const auto* known = find_groups(s, x))
    x.groups = *known;
  else
    x.groups = s.plan().groups.emplace_back(
        std::make_shared<ExpertGroups>(x.routes.index, own_experts(s), (s.step.flags & DSO_FLAG_GROUPED) != 0));
  return std::make_unique<ExpertsGateUp>(std::move(x), out, activation, weighs);
}

std::unique_ptr<Op> make_experts_down(StepReader& s) {
  s.takes(2, 1, 1, 1, DSO_FLAG_GROUPED | DSO_FLAG_WEIGH_INPUT);
  Experts x = read_experts(s, 1, own_experts(s).top_k);
  const SlotRef out = s.out(0, kF32Only, x.stack.first.rows, x.in.selected);
  if (out.index == x.in.index || out.index == x.routes.index) s.refuse("out[0] is an input");
  const auto* known = find_groups(s, x);
  if (!known) s.refuse("no earlier EXPERTS_GATE_UP has the same routes (slot %d), experts, top_k and flags", x.routes.index);
  x.groups = *known;
  return std::make_unique<ExpertsDown>(std::move(x), out, !(s.step.flags & DSO_FLAG_WEIGH_INPUT));
}

}  // namespace dso
