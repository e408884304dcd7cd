// Steps that process each row independently: embedding, element-wise ops, norms, conversions, copying and concatenating rows.
#include <cstring>

#include "ops.hpp"

namespace dso {
namespace {

// Writes a row of any kind from fp32: make(values) writes them in their final place or to scratch.
template <class Make>
void write_row(const Run& run, const SlotRef& to, int64_t row, int thread, const Make& make) {
  if (is_f32(to.kind)) return make(run.slots[to.index].f32(row));
  float* numbers = reinterpret_cast<float*>(run.thread_scratch(thread));
  make(numbers);
  write_columns(run, to, row, numbers, 0, to.width);
}
int64_t row_scratch(const SlotRef& to) { return is_f32(to.kind) ? 0 : 4 * to.width; }  // scratch bytes that it needs

class RowsOf : public RowOp {  // one row of work per row of `like`
 public:
  explicit RowsOf(const SlotRef& like) : like_(like) {}
  RowOp* by_rows() override { return this; }

 protected:
  int64_t rows(const Run& run) const override { return run.slots[like_.index].count; }
  int64_t row_work() const override { return like_.width; }
  static const float* at(const Run& run, const SlotRef& s, int64_t row) { return run.slots[s.index].f32(row); }
  static float* f32(const Run& run, const SlotRef& s, int64_t row) { return run.slots[s.index].f32(row); }
  static uint8_t* raw(const Run& run, const SlotRef& s, int64_t row) { return run.slots[s.index].row(row); }

  const SlotRef like_;
};

class Embedding final : public RowsOf {
 public:
  Embedding(const Matrix& table, const SlotRef& out, float scale, bool by_ids)
      : RowsOf(out), table_(table), scale_(scale), by_ids_(by_ids) {}

 private:
  void row(const Run& run, int64_t r, int) override {
    float* out = f32(run, like_, r);
    const float* given = by_ids_ ? nullptr : run.batch.source->inputs_embeds;
    if (given) {
      const int64_t n = like_.width;
      for (int64_t i = 0; i < n; ++i) out[i] = given[r * n + i];
    } else {
      run.kernels.embed_row(table_, run.batch.source->token_ids[r], scale_, out);
    }
  }
  const Matrix table_;
  const float scale_;
  const bool by_ids_;
};

// norm(x) to a row of any kind, via fp32. RMS norm, or, with a bias, layer norm.
class Norm {
 public:
  Norm(const float* weight, const float* bias, float eps, const SlotRef& out)
      : weight_(weight), bias_(bias), eps_(eps), out_(out) {}
  int64_t scratch_bytes() const { return row_scratch(out_); }
  void operator()(const Run& run, const float* x, int64_t r, int thread) const {
    write_row(run, out_, r, thread, [&](float* normed) {
      if (bias_)
        run.kernels.layer_norm(x, weight_, bias_, out_.width, eps_, normed);
      else
        run.kernels.rms_norm(x, weight_, out_.width, eps_, normed);
    });
  }

 private:
  const float *weight_, *bias_;
  const float eps_;
  const SlotRef out_;
};

class RowNorm final : public RowsOf {
 public:
  RowNorm(const SlotRef& in, const Norm& norm) : RowsOf(in), norm_(norm) {}
  int64_t scratch_bytes(const Run&) const override { return norm_.scratch_bytes(); }

 private:
  void row(const Run& run, int64_t r, int thread) override { norm_(run, at(run, like_, r), r, thread); }
  const Norm norm_;
};

class HeadNorm final : public RowsOf {
 public:
  HeadNorm(const SlotRef& in, const SlotRef& out, const float* weight, int64_t heads, int64_t head_dim, float eps)
      : RowsOf(in), out_(out), weight_(weight), heads_(heads), head_dim_(head_dim), eps_(eps) {}

 private:
  void row(const Run& run, int64_t r, int) override {
    for (int64_t h = 0; h < heads_; ++h)
      run.kernels.rms_norm(at(run, like_, r) + h * head_dim_, weight_, head_dim_, eps_, f32(run, out_, r) + h * head_dim_);
  }
  const SlotRef out_;
  const float* weight_;
  const int64_t heads_, head_dim_;
  const float eps_;
};

class Elementwise final : public RowsOf {  // b is a if the kernel has one input
 public:
  Elementwise(const ElementwiseOp& kernel, const SlotRef& a, const SlotRef& b, const SlotRef& out, float scale)
      : RowsOf(a), kernel_(kernel), b_(b), out_(out), scale_(scale) {}
  int64_t scratch_bytes(const Run&) const override { return row_scratch(out_); }

 private:
  void row(const Run& run, int64_t r, int thread) override {
    const float *a = at(run, like_, r), *b = kernel_.inputs > 1 ? at(run, b_, r) : nullptr;
    write_row(run, out_, r, thread, [&](float* y) { kernel_.row(a, b, like_.width, scale_, y); });
  }
  const ElementwiseOp& kernel_;
  const SlotRef b_, out_;
  const float scale_;
};

class AddRmsNorm final : public RowsOf {
 public:
  AddRmsNorm(const SlotRef& residual, const SlotRef& delta, const SlotRef& sum, const Norm& norm)
      : RowsOf(sum), residual_(residual), delta_(delta), norm_(norm) {}
  int64_t scratch_bytes(const Run&) const override { return norm_.scratch_bytes(); }

 private:
  void row(const Run& run, int64_t r, int thread) override {
    float* sum = f32(run, like_, r);
    run.kernels.add(at(run, residual_, r), at(run, delta_, r), like_.width, sum);
    norm_(run, sum, r, thread);
  }
  const SlotRef residual_, delta_;
  const Norm norm_;
};

class Convert final : public RowsOf {
 public:
  Convert(const SlotRef& in, const SlotRef& out) : RowsOf(in), out_(out) {}

 private:
  void row(const Run& run, int64_t r, int) override {
    run.kernels.convert(out_.kind, at(run, like_, r), 0, like_.width, like_.width, raw(run, out_, r));
  }
  const SlotRef out_;
};

class SelectRows final : public RowsOf {
 public:
  SelectRows(const SlotRef& in, const SlotRef& out) : RowsOf(out), in_(in) {}
  RowOp* by_rows() override { return nullptr; }

 private:
  void row(const Run& run, int64_t r, int) override {
    std::memcpy(f32(run, like_, r), at(run, in_, run.batch.source->logit_rows[r]), 4 * like_.width);
  }
  const SlotRef in_;
};

class HiddenOut final : public RowsOf {
 public:
  HiddenOut(const SlotRef& in, int64_t index, bool last) : RowsOf(in), index_(index), last_(last) {}

 private:
  int64_t rows(const Run& run) const override {
    const dso_batch& b = *run.batch.source;
    return b.hidden || (last_ && b.last_hidden) ? run.batch.T : 0;
  }
  void row(const Run& run, int64_t r, int) override {
    const dso_batch& b = *run.batch.source;
    const int64_t n = like_.width;
    if (b.hidden) std::memcpy(b.hidden + (index_ * run.batch.T + r) * n, at(run, like_, r), 4 * n);
    if (last_ && b.last_hidden) std::memcpy(b.last_hidden + r * n, at(run, like_, r), 4 * n);
  }
  const int64_t index_;
  const bool last_;
};

class StateIn final : public RowsOf {
 public:
  using RowsOf::RowsOf;

 private:
  void row(const Run& run, int64_t r, int) override {
    std::memcpy(f32(run, like_, r), run.batch.source->states + r * like_.width, 4 * like_.width);
  }
};

class AddFeatures final : public RowsOf {
 public:
  AddFeatures(const SlotRef& in, const SlotRef& out, int64_t index) : RowsOf(in), out_(out), index_(index) {}

 private:
  void row(const Run& run, int64_t r, int) override {
    const float* x = at(run, like_, r);
    float* out = f32(run, out_, r);
    const float* features = run.batch.source->features;
    if (!features) {
      if (out != x) std::memcpy(out, x, 4 * like_.width);
      return;
    }
    const float* added = features + (index_ * run.batch.T + r) * like_.width;
    for (int64_t i = 0; i < like_.width; ++i) out[i] = x[i] + added[i];
  }
  const SlotRef out_;
  const int64_t index_;
};

class SigmoidGate final : public RowsOf {
 public:
  SigmoidGate(const SlotRef& in, const SlotRef& gate, const SlotRef& out) : RowsOf(in), gate_(gate), out_(out) {}
  int64_t scratch_bytes(const Run&) const override { return row_scratch(out_); }

 private:
  void row(const Run& run, int64_t r, int thread) override {
    write_row(run, out_, r, thread, [&](float* out) {
      run.kernels.sigmoid_gate(at(run, like_, r), at(run, gate_, r), gate_.width == 1, like_.width, out);
    });
  }
  const SlotRef gate_, out_;
};

class Concat final : public RowsOf {
 public:
  Concat(const SlotRef& a, const SlotRef& b, const SlotRef& out) : RowsOf(out), a_(a), b_(b) {}
  int64_t scratch_bytes(const Run&) const override { return row_scratch(like_); }

 private:
  void row(const Run& run, int64_t r, int thread) override {
    write_row(run, like_, r, thread, [&](float* both) {
      std::memcpy(both, at(run, a_, r), 4 * a_.width);
      std::memcpy(both + a_.width, at(run, b_, r), 4 * b_.width);
    });
  }
  const SlotRef a_, b_;
};

class Columns final : public RowsOf {
 public:
  Columns(const SlotRef& in, const SlotRef& out, int64_t groups, int64_t begin)
      : RowsOf(out), in_(in), groups_(groups), begin_(begin) {}
  int64_t scratch_bytes(const Run&) const override { return row_scratch(like_); }

 private:
  void row(const Run& run, int64_t r, int thread) override {
    const int64_t part = in_.width / groups_, taken = like_.width / groups_;
    write_row(run, like_, r, thread, [&](float* out) {
      for (int64_t g = 0; g < groups_; ++g) std::memcpy(out + g * taken, at(run, in_, r) + g * part + begin_, 4 * taken);
    });
  }
  const SlotRef in_;
  const int64_t groups_, begin_;
};

class Clamp final : public RowsOf {
 public:
  Clamp(const SlotRef& in, const SlotRef& out, float low, float high) : RowsOf(out), in_(in), low_(low), high_(high) {}
  int64_t scratch_bytes(const Run&) const override { return row_scratch(like_); }

 private:
  void row(const Run& run, int64_t r, int thread) override {
    write_row(run, like_, r, thread, [&](float* out) { run.kernels.clamp(at(run, in_, r), low_, high_, like_.width, out); });
  }
  const SlotRef in_;
  const float low_, high_;
};

}  // namespace

std::unique_ptr<Op> make_embedding(StepReader& s) {
  s.takes(0, 1, 1, 0, DSO_FLAG_IDS);
  const Matrix table = s.matrix(0);
  const bool by_ids = s.step.flags & DSO_FLAG_IDS;
  const SlotRef out = s.out(0, kF32Only, table.cols, false);
  BatchNeeds& needs = s.plan().needs;
  needs.vocab = needs.token_ids ? std::min<int64_t>(needs.vocab, table.rows) : table.rows;
  needs.token_ids = true;
  needs.ids_always |= by_ids;
  return std::make_unique<Embedding>(table, out, s.step.scale, by_ids);
}

std::unique_ptr<Op> make_rms_norm(StepReader& s) {
  s.takes(1, 1, 1, 0, 0);
  if (s.step.heads > 0) {
    const int64_t head_dim = s.positive("head_dim", s.step.head_dim), heads = s.positive("heads", s.step.heads);
    const SlotRef in = s.in(0, kF32Only, heads * head_dim), out = s.out(0, kF32Only, in.width, in.selected);
    return std::make_unique<HeadNorm>(in, out, s.vector('w', 0, head_dim), heads, head_dim, s.eps());
  }
  const SlotRef in = s.in(0, kF32Only), out = s.out(0, kAnyKind, in.width, in.selected);
  return std::make_unique<RowNorm>(in, Norm(s.vector('w', 0, in.width), nullptr, s.eps(), out));
}

std::unique_ptr<Op> make_layer_norm(StepReader& s) {
  s.takes(1, 1, 1, 1, 0);
  const SlotRef in = s.in(0, kF32Only), out = s.out(0, kAnyKind, in.width, in.selected);
  return std::make_unique<RowNorm>(in, Norm(s.vector('w', 0, in.width), s.vector('b', 0, in.width), s.eps(), out));
}

std::unique_ptr<Op> make_elementwise(StepReader& s, const ElementwiseOp& kernel) {
  s.takes(kernel.inputs, 1, 0, 0, 0);
  const SlotRef a = s.in(0, kF32Only), b = kernel.inputs > 1 ? s.in(1, kF32Only, a.width) : a;
  if (a.selected != b.selected) s.refuse("in[0] and in[1] hold different rows");
  const SlotRef out = s.out(0, kAnyKind, a.width, a.selected);
  return std::make_unique<Elementwise>(kernel, a, b, out, s.step.scale);
}

std::unique_ptr<Op> make_add_rms_norm(StepReader& s) {
  s.takes(2, 2, 1, 0, 0);
  const SlotRef residual = s.in(0, kF32Only), delta = s.in(1, kF32Only, residual.width);
  const SlotRef sum = s.out(0, kF32Only, residual.width, residual.selected),
                out = s.out(1, kAnyKind, residual.width, residual.selected);
  if (residual.selected != delta.selected) s.refuse("in[0] and in[1] hold different rows");
  return std::make_unique<AddRmsNorm>(residual, delta, sum, Norm(s.vector('w', 0, residual.width), nullptr, s.eps(), out));
}

std::unique_ptr<Op> make_convert(StepReader& s) {
  s.takes(1, 1, 0, 0, 0);
  const SlotRef in = s.in(0, kF32Only), out = s.out(0, kConverted, in.width, in.selected);
  return std::make_unique<Convert>(in, out);
}

std::unique_ptr<Op> make_select_rows(StepReader& s) {
  s.takes(1, 1, 0, 0, 0);
  const SlotRef in = s.in(0, kF32Only), out = s.out(0, kF32Only, in.width, true);
  if (in.selected) s.refuse("in[0], slot %d, holds selected rows already", in.index);
  return std::make_unique<SelectRows>(in, out);
}

std::unique_ptr<Op> make_hidden_out(StepReader& s) {
  s.takes(1, 0, 0, 0, DSO_FLAG_LAST);
  const SlotRef in = s.in(0, kF32Only);
  if (in.selected) s.refuse("in[0], slot %d, holds selected rows", in.index);
  if (s.step.layer < 0) s.refuse("layer (the index) is %d, must not be negative", s.step.layer);
  if (s.step.flags & DSO_FLAG_LAST) s.plan().needs.hidden_width = in.width;
  return std::make_unique<HiddenOut>(in, s.step.layer, s.step.flags & DSO_FLAG_LAST);
}

std::unique_ptr<Op> make_state_in(StepReader& s) {
  s.takes(0, 1, 0, 0, 0);
  const SlotRef out = s.out(0, kF32Only, 0, false);
  s.plan().needs.states = true;
  return std::make_unique<StateIn>(out);
}

std::unique_ptr<Op> make_add_features(StepReader& s) {
  s.takes(1, 1, 0, 0, 0);
  const SlotRef in = s.token_rows(0), out = s.out(0, kF32Only, in.width, false);
  if (s.step.layer < 0) s.refuse("layer (the index) is %d, must not be negative", s.step.layer);
  s.alias_only(out, in);
  s.plan().needs.features = std::max<int64_t>(s.plan().needs.features, s.step.layer + 1);
  return std::make_unique<AddFeatures>(in, out, s.step.layer);
}

std::unique_ptr<Op> make_columns(StepReader& s) {
  s.takes(1, 1, 0, 0, 0);
  const int64_t groups = s.positive("groups", s.step.groups), begin = s.step.offset;
  const SlotRef in = s.in(0, kF32Only), out = s.out(0, kAnyKind, 0, in.selected);
  if (in.width % groups || out.width % groups || begin < 0 || begin + out.width / groups > in.width / groups)
    s.refuse("offset is %lld: %lld parts of widths %lld and %lld do not fit", (long long)begin, (long long)groups,
             (long long)in.width, (long long)out.width);
  s.alias_only(out, SlotRef{});
  return std::make_unique<Columns>(in, out, groups, begin);
}

std::unique_ptr<Op> make_clamp(StepReader& s) {
  s.takes(1, 1, 2, 0, 0);
  const SlotRef in = s.in(0, kF32Only), out = s.out(0, kAnyKind, in.width, in.selected);
  s.alias_only(out, in);
  return std::make_unique<Clamp>(in, out, *s.vector('w', 0, 1), *s.vector('w', 1, 1));
}

std::unique_ptr<Op> make_sigmoid_gate(StepReader& s) {
  s.takes(2, 1, 0, 0, 0);
  const SlotRef in = s.in(0, kF32Only), gate = s.in(1, kF32Only), out = s.out(0, kAnyKind, in.width, in.selected);
  if (gate.width != in.width && gate.width != 1)
    s.refuse("in[1] has width %lld, must be 1 or that of in[0], %lld", (long long)gate.width, (long long)in.width);
  if (in.selected != gate.selected) s.refuse("in[0] and in[1] hold different rows");
  s.alias_only(out, in);
  return std::make_unique<SigmoidGate>(in, gate, out);
}

std::unique_ptr<Op> make_concat(StepReader& s) {
  s.takes(2, 1, 0, 0, 0);
  const SlotRef a = s.in(0, kF32Only), b = s.in(1, kF32Only), out = s.out(0, kAnyKind, a.width + b.width, a.selected);
  if (a.selected != b.selected) s.refuse("in[0] and in[1] hold different rows");
  return std::make_unique<Concat>(a, b, out);
}

}  // namespace dso
