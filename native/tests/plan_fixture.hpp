// A small Llama-shaped model for tests of the interpreter: random weights, its plan with fused or plain steps, and a runner
// that feeds ragged batches and stores each sequence's cache and logits.
#pragma once
#include <map>

#include "cache.hpp"
#include "plan_parts.hpp"

struct Spec {
  int32_t hidden = 80, heads = 6, kv_heads = 2, head_dim = 16, inner = 104, vocab = 150, layers = 2, rot = 16;
  int32_t format = DSO_F32, activation = DSO_SLOT_F32, kv_type = DSO_KV_F32;
  int32_t window = 0, sinks = 0, flags = 0;  // flags: DSO_FLAG_EAGER, DSO_FLAG_INTERLEAVED, DSO_FLAG_CHUNKED
  float beta = 0;                            // of POSITION_SCALE, with a length of 7 and an offset of 1; 0: none
  bool first_full = false;                   // layer 0 has no window
  bool fused = true, qk_norm = false, biases = false, select_first = true;
  bool interleaved() const { return flags & DSO_FLAG_INTERLEAVED; }
};

class Model {
 public:
  template <class Threads>  // their number, or their places
  Model(const Spec& spec, const Kernels& kernels, Threads threads, uint64_t seed = 1)
      : spec(spec), kernels(kernels), context(kernels, std::move(threads)) {
    Random random(seed);
    build(random);
    const int32_t rc = dso_plan_create(context.c, steps.data(), (int32_t)steps.size(), slots.data(), (int32_t)slots.size(),
                                       weights.data(), (int32_t)weights.size(), spec.vocab, &plan);
    if (rc) {
      fprintf(stderr, "plan: %s\n", dso_last_error());
      abort();
    }
  }
  ~Model() { dso_plan_destroy(plan); }
  Model(const Model&) = delete;

  const Spec spec;
  const Kernels& kernels;
  OwnContext context;
  std::vector<dso_step> steps;
  std::vector<dso_slot> slots;
  std::vector<dso_weight> weights;
  std::map<std::string, std::vector<float>> raw;  // by name, [rows, cols]
  dso_plan* plan = nullptr;

 private:
  int32_t slot(int32_t kind, int32_t width, bool selected = false) {
    slots.push_back({kind, width, selected, 0});
    return (int32_t)slots.size() - 1;
  }
  int32_t matrix(const std::string& name, int32_t rows, int32_t cols, int32_t format, Random& random) {
    std::vector<float>& w = raw[name];
    w.resize((size_t)rows * cols);
    for (float& v : w) v = random.normal() / std::sqrt((float)cols);
    weights.push_back(packed_weight(context.c, format, w, 0, rows, cols, packed_));
    return (int32_t)weights.size() - 1;
  }
  int32_t vector(const std::string& name, int32_t n, float mean, float spread, Random& random) {
    std::vector<float>& w = raw[name];
    w.resize((size_t)n);
    for (float& v : w) v = mean + spread * random.normal();
    weights.push_back({DSO_VECTOR, 1, n, 0, w.data(), 4 * (int64_t)n});
    return (int32_t)weights.size() - 1;
  }
  struct Io {
    std::vector<int32_t> in, out, w, b;
  };
  dso_step& step(int32_t op, const Io& io) {
    steps.push_back(step_of(op, io.in, io.out, io.w, io.b));
    steps.back().eps = 1e-5f;
    return steps.back();
  }
  int32_t converted(int32_t x, int32_t width, bool selected = false) {  // the input kind of a product
    if (spec.activation == DSO_SLOT_F32) return x;
    const int32_t y = slot(spec.activation, width, selected);
    step(DSO_OP_CONVERT, {{x}, {y}, {}, {}});
    return y;
  }
  dso_step& heads(dso_step& s, int32_t layer) {
    s.layer = layer;
    s.heads = spec.heads;
    s.kv_heads = spec.kv_heads;
    s.head_dim = spec.head_dim;
    return s;
  }

  void build(Random& random) {
    const int32_t H = spec.hidden, Q = spec.heads * spec.head_dim, KV = spec.kv_heads * spec.head_dim, I = spec.inner;
    const int32_t act = spec.activation;
    int32_t x = slot(DSO_SLOT_F32, H), table = slot(DSO_SLOT_F32, spec.rot);
    step(DSO_OP_EMBEDDING, {{}, {x}, {matrix("embed", spec.vocab, H, spec.format, random)}, {}});
    std::vector<float>& frequencies = raw["frequencies"];
    for (int i = 0; i < spec.rot / 2; ++i) frequencies.push_back(std::pow(10000.0f, -2.0f * (float)i / (float)spec.rot));
    weights.push_back({DSO_VECTOR, 1, spec.rot / 2, 0, frequencies.data(), 2 * (int64_t)spec.rot});
    step(DSO_OP_ROPE_TABLE, {{}, {table}, {(int32_t)weights.size() - 1}, {}});
    step(DSO_OP_HIDDEN_OUT, {{x}, {}, {}, {}});
    int32_t delta = -1;
    for (int32_t l = 0; l < spec.layers; ++l) {
      const std::string p = std::to_string(l) + ".";
      // Norm, with the residual addition if fused.
      auto norm = [&](const std::string& name) {
        const int32_t w = vector(p + name, H, 1, 0.1f, random);
        if (spec.fused) {
          const int32_t y = slot(act, H);
          if (delta < 0)
            step(DSO_OP_RMS_NORM, {{x}, {y}, {w}, {}});
          else
            step(DSO_OP_ADD_RMS_NORM, {{x, delta}, {x, y}, {w}, {}});
          return y;
        }
        if (delta >= 0) step(DSO_OP_ADD, {{x, delta}, {x}, {}, {}});
        const int32_t y = slot(DSO_SLOT_F32, H);
        step(DSO_OP_RMS_NORM, {{x}, {y}, {w}, {}});
        return converted(y, H);
      };
      auto bias = [&](const std::string& name, int32_t n) { return spec.biases ? vector(p + name, n, 0, 0.3f, random) : -1; };
      const int32_t n1 = norm("norm1");
      if (spec.fused || l > 0) step(DSO_OP_HIDDEN_OUT, {{x}, {}, {}, {}}).layer = l;
      const int32_t q = slot(DSO_SLOT_F32, Q), k = slot(DSO_SLOT_F32, KV), v = slot(DSO_SLOT_F32, KV);
      const int32_t wq = matrix(p + "q", Q, H, spec.format, random), wk = matrix(p + "k", KV, H, spec.format, random),
                    wv = matrix(p + "v", KV, H, spec.format, random);
      const int32_t bq = bias("bq", Q), bk = bias("bk", KV), bv = bias("bv", KV);
      if (spec.fused)
        step(DSO_OP_LINEAR, {{n1}, {q, k, v}, {wq, wk, wv}, {bq, bk, bv}});
      else {
        step(DSO_OP_LINEAR, {{n1}, {q}, {wq}, {bq}});
        step(DSO_OP_LINEAR, {{n1}, {k}, {wk}, {bk}});
        step(DSO_OP_LINEAR, {{n1}, {v}, {wv}, {bv}});
      }
      if (spec.qk_norm) {
        heads(step(DSO_OP_RMS_NORM, {{q}, {q}, {vector(p + "qn", spec.head_dim, 1, 0.1f, random)}, {}}), 0);
        heads(step(DSO_OP_RMS_NORM, {{k}, {k}, {vector(p + "kn", spec.head_dim, 1, 0.1f, random)}, {}}), 0).heads =
            spec.kv_heads;
      }
      if (spec.fused) {
        heads(step(DSO_OP_ROPE_CACHE, {{q, k, v, table}, {q}, {}, {}}), l).flags = spec.flags & DSO_FLAG_INTERLEAVED;
      } else {
        heads(step(DSO_OP_ROPE, {{q, table}, {q}, {}, {}}), 0).flags = spec.flags & DSO_FLAG_INTERLEAVED;
        dso_step& s = heads(step(DSO_OP_ROPE, {{k, table}, {k}, {}, {}}), 0);
        s.flags = spec.flags & DSO_FLAG_INTERLEAVED;
        s.heads = spec.kv_heads;
        heads(step(DSO_OP_CACHE_WRITE, {{k, v}, {}, {}, {}}), l);
      }
      if (spec.beta != 0) {
        dso_step& s = step(DSO_OP_POSITION_SCALE, {{q}, {q}, {}, {}});
        s.scale = spec.beta;
        s.window = 7;
        s.offset = 1;
      }
      int32_t o = slot(spec.fused ? act : DSO_SLOT_F32, Q);
      dso_step& a = heads(step(DSO_OP_ATTENTION, {{q}, {o}, {}, {}}), l);
      a.window = spec.first_full && l == 0 ? 0 : spec.window;
      a.flags = spec.flags & (DSO_FLAG_EAGER | (a.window ? DSO_FLAG_CHUNKED : 0));
      a.sinks = a.window ? spec.sinks : 0;
      a.scale = 1 / std::sqrt((float)spec.head_dim);
      if (!spec.fused) o = converted(o, Q);
      delta = slot(DSO_SLOT_F32, H);
      step(DSO_OP_LINEAR, {{o}, {delta}, {matrix(p + "o", H, Q, spec.format, random)}, {}});
      const int32_t n2 = norm("norm2");
      const int32_t wg = matrix(p + "gate", I, H, spec.format, random), wu = matrix(p + "up", I, H, spec.format, random);
      const int32_t bg = bias("bg", I), bu = bias("bu", I);
      int32_t h;
      if (spec.fused) {
        h = slot(act, I);
        step(DSO_OP_GATE_UP, {{n2}, {h}, {wg, wu}, {bg, bu}});
      } else {
        const int32_t g = slot(DSO_SLOT_F32, I), u = slot(DSO_SLOT_F32, I);
        step(DSO_OP_LINEAR, {{n2}, {g, u}, {wg, wu}, {bg, bu}});
        h = slot(act, I);
        step(DSO_OP_SWIGLU, {{g, u}, {h}, {}, {}});
      }
      delta = slot(DSO_SLOT_F32, H);
      step(DSO_OP_LINEAR, {{h}, {delta}, {matrix(p + "down", H, I, spec.format, random)}, {}});
    }
    step(DSO_OP_ADD, {{x, delta}, {x}, {}, {}});
    const int32_t norm = vector("norm", H, 1, 0.1f, random), head = matrix("head", spec.vocab, H, spec.format, random);
    const int32_t logits = slot(DSO_SLOT_LOGITS, spec.vocab, true);
    if (spec.select_first) {
      const int32_t chosen = slot(DSO_SLOT_F32, H, true), y = slot(act, H, true);
      step(DSO_OP_SELECT_ROWS, {{x}, {chosen}, {}, {}});
      step(DSO_OP_RMS_NORM, {{chosen}, {y}, {norm}, {}});
      step(DSO_OP_LINEAR, {{y}, {logits}, {head}, {}});
    } else {
      const int32_t y = slot(act, H), all = slot(DSO_SLOT_F32, spec.vocab);
      step(DSO_OP_RMS_NORM, {{x}, {y}, {norm}, {}});
      step(DSO_OP_LINEAR, {{y}, {all}, {head}, {}});
      step(DSO_OP_SELECT_ROWS, {{all}, {logits}, {}, {}});
    }
  }

  std::vector<std::unique_ptr<Buffer>> packed_;
};

struct Sequence {
  std::vector<int32_t> tokens;
  int32_t done = 0;  // tokens in the cache
  std::vector<int32_t> blocks;
  std::vector<std::vector<float>> logits;  // of every token
};

// Feeds sequences to a model; blocks are taken from a shuffled pool, and returned to it once no later token can see them.
class Feeder {
 public:
  Feeder(Model& model, int64_t blocks, Random& random)
      : model_(model),
        cache_(model.kernels,
               {model.spec.kv_type, model.spec.layers, model.spec.kv_heads, model.spec.head_dim, 0, 0, 0, 0, nullptr}, blocks) {
    for (int32_t i = 0; i < blocks; ++i) free_.push_back(i);
    random.shuffle(free_);
  }
  struct Part {
    Sequence* sequence;
    int32_t rows;
    int32_t phase;
  };
  // One step; sequences in decode phase must come first. Returns dso_plan_run's code.
  int32_t feed(const std::vector<Part>& parts, std::vector<float>* hidden = nullptr) {
    const Spec& spec = model_.spec;
    std::vector<int32_t> ids, positions, query, context, phase, rows, table;
    int32_t max_blocks = 0;
    for (const Part& p : parts) {
      while ((int32_t)p.sequence->blocks.size() * 32 < p.sequence->done + p.rows) {
        p.sequence->blocks.push_back(free_.back());
        free_.pop_back();
      }
      forget(*p.sequence);
      max_blocks = std::max(max_blocks, (int32_t)p.sequence->blocks.size());
    }
    for (const Part& p : parts) {
      query.push_back(p.rows);
      context.push_back(p.sequence->done);
      phase.push_back(p.phase);
      for (int32_t i = 0; i < p.rows; ++i) {
        rows.push_back((int32_t)ids.size());
        ids.push_back(p.sequence->tokens[(size_t)(p.sequence->done + i)]);
        positions.push_back(p.sequence->done + i);
      }
      for (int32_t i = 0; i < max_blocks; ++i)
        table.push_back(i < (int32_t)p.sequence->blocks.size() ? p.sequence->blocks[(size_t)i] : -7);
    }
    std::vector<float> logits(ids.size() * (size_t)spec.vocab, NAN);
    if (hidden) hidden->assign(ids.size() * (size_t)(spec.hidden * spec.layers), NAN);
    dso_batch b{};
    b.T = b.R = (int32_t)ids.size();
    b.S = (int32_t)parts.size();
    b.max_blocks = max_blocks;
    b.token_ids = ids.data();
    b.positions = positions.data();
    b.query_len = query.data();
    b.context_len = context.data();
    b.phase = phase.data();
    b.block_table = table.data();
    b.logit_rows = rows.data();
    b.logits = logits.data();
    b.hidden = hidden ? hidden->data() : nullptr;
    b.cache = &cache_;
    const int32_t rc = dso_plan_run(model_.plan, &b);
    if (!check(rc == 0, "run: %s", dso_last_error())) return rc;
    size_t row = 0;
    for (const Part& p : parts) {
      for (int32_t i = 0; i < p.rows; ++i, ++row)
        p.sequence->logits.emplace_back(logits.begin() + (long)row * spec.vocab, logits.begin() + (long)(row + 1) * spec.vocab);
      p.sequence->done += p.rows;
    }
    return 0;
  }

 private:
  void forget(Sequence& s) {
    const Spec& spec = model_.spec;
    const int32_t begin = s.done + 1 - spec.window;
    if (spec.window == 0 || spec.first_full || begin <= spec.sinks) return;
    for (int32_t b = (spec.sinks + 31) / 32; (b + 1) * 32 <= begin; ++b) {
      if (s.blocks[(size_t)b] < 0) continue;
      free_.insert(free_.begin(), s.blocks[(size_t)b]);
      s.blocks[(size_t)b] = -1;
    }
  }
  Model& model_;
  dso_cache cache_;
  std::vector<int32_t> free_;
};
