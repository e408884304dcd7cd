// The cache in the C interface: every invalid call returns its code and a message that names the culprit; sizes, and a layout
// that is the same for every variant.
#include <cmath>

#include "cache.hpp"
#include "check.hpp"
#include "isa.hpp"

namespace {

int32_t create(dso_cache_shape shape, int64_t blocks, dso_cache** out) { return dso_cache_create(&shape, blocks, out); }
int64_t block_bytes(dso_cache_shape shape) { return dso_cache_block_bytes(&shape); }

void latent_caches() {
  dso_cache* k = nullptr;
  refuses(create({DSO_KV_BF16, 1, 1, 16, 32, 16, 0, 0, nullptr}, 4, &k), DSO_EINVAL, "with rank", "heads in a latent cache");
  refuses(create({DSO_KV_BF16, 1, 0, 0, 31, 16, 0, 0, nullptr}, 4, &k), DSO_EINVAL, "rank is 31", "odd rank");
  refuses(create({DSO_KV_BF16, 1, 0, 0, 0, 16, 0, 0, nullptr}, 4, &k), DSO_EINVAL, "rank is 0", "no rank");
  refuses(create({DSO_KV_BF16, 1, 0, 0, 32, 0, 0, 0, nullptr}, 4, &k), DSO_EINVAL, "rope is 0", "no rope");
  refuses(create({DSO_KV_BF16, 1, 0, 0, 32, 16, -2, 0, nullptr}, 4, &k), DSO_EINVAL, "index is -2", "negative index");
  check(block_bytes({DSO_KV_BF16, 27, 0, 0, 512, 64, 0, 0, nullptr}) == 32 * 31104, "V2-Lite's cache");
  check(block_bytes({DSO_KV_INT8, 1, 0, 0, 512, 64, 0, 0, nullptr}) == 32 * 656, "a latent in int8");
  check(block_bytes({DSO_KV_INT4, 1, 0, 0, 512, 64, 0, 0, nullptr}) == 32 * 340, "a latent in int4");
  check(block_bytes({DSO_KV_F32, 2, 0, 0, 512, 64, 128, 0, nullptr}) == 2 * 32 * 4 * (576 + 128), "index keys");
}

void caches() {
  dso_cache* k = nullptr;
  refuses(create({7, 1, 1, 16, 0, 0, 0, 0, nullptr}, 4, &k), DSO_EINVAL, "kv_type 7", "kv type");
  refuses(create({DSO_KV_F32, 0, 1, 16, 0, 0, 0, 0, nullptr}, 4, &k), DSO_EINVAL, "0 layers", "layers");
  refuses(create({DSO_KV_F32, 1, 1, 16, 0, 0, 0, 0, nullptr}, 0, &k), DSO_EINVAL, "0 blocks", "blocks");
  for (int d : {0, 1, 15, 511, 514, 640, 65536})
    refuses(create({DSO_KV_BF16, 1, 1, d, 0, 0, 0, 0, nullptr}, 4, &k), DSO_EINVAL, "must be even and at most 512", "head_dim");
  refuses(create({DSO_KV_F32, 60000, 60000, 256, 0, 0, 0, 0, nullptr}, INT32_MAX, &k), DSO_ENOMEM, "",
          "a cache larger than any address space");
  check(block_bytes({DSO_KV_BF16, 1, 1, -1, 0, 0, 0, 0, nullptr}) == -1, "invalid block");
  for (int type : {DSO_KV_F32, DSO_KV_BF16, DSO_KV_INT8, DSO_KV_INT4}) {
    for (const Variant& v : variants())
      check(v.kernels->kv_layer_bytes(type, 3, 64) == variants()[0].kernels->kv_layer_bytes(type, 3, 64),
            "%s: another cache layout", v.name.c_str());
    check(create({type, 2, 3, 64, 0, 0, 0, 0, nullptr}, 1000, &k) == 0, "cache: %s", dso_last_error());
    check(block_bytes({type, 2, 3, 64, 0, 0, 0, 0, nullptr}) == k->block_bytes(), "block bytes");
    // Written by one variant, read by another: the layout is the same.
    const std::vector<Variant> all = variants();
    Random random(type);
    const int tokens = 45, width = 3 * 64;
    std::vector<float> key((size_t)(tokens * width)), value(key.size()), read_k(key.size()), read_v(key.size()), first_k,
        first_v;
    for (float& f : key) f = random.normal();
    for (float& f : value) f = random.normal();
    const int32_t table[] = {7, 3}, moved[] = {7, 4};
    for (const Variant& v : all) {
      v.kernels->kv_write(k->layout(1), k->view(1, table), 0, tokens, key.data(), width * 4, value.data(), width * 4, 0, 3);
      check(dso_cache_read(k, 1, table, tokens, read_k.data(), read_v.data()) == 0, "read: %s", dso_last_error());
      if (first_k.empty()) first_k = read_k, first_v = read_v;
      check(read_k == first_k && read_v == first_v, "%s: writes another cache", v.name.c_str());
      for (int t = 0; t < tokens; ++t)
        for (int i = 0; i < width; ++i)
          check(std::fabs(read_k[(size_t)((i / 64 * tokens + t) * 64 + i % 64)] - key[(size_t)(t * width + i)]) <
                    (type == DSO_KV_INT4 ? 0.5 : 0.05),
                "%s: key[%d][%d]", v.name.c_str(), t, i);
    }
    check(dso_cache_copy_block(k, 3, 4) == 0 && dso_cache_read(k, 1, moved, tokens, read_k.data(), read_v.data()) == 0 &&
              read_k == first_k,
          "a copied block");
    check(dso_cache_release(k, 8) == 0 && dso_cache_read(k, 1, table, tokens, read_k.data(), read_v.data()) == 0 &&
              read_k == first_k,
          "release of later blocks");
    check(dso_cache_release(k, 0) == 0 && dso_cache_read(k, 1, table, tokens, read_k.data(), read_v.data()) == 0 &&
              read_k[0] == 0,
          "released memory reads as zero");
    refuses(dso_cache_copy_block(k, 3, 1000), DSO_EINVAL, "to 1000", "copy past the end");
    refuses(dso_cache_release(k, -1), DSO_EINVAL, "-1", "release");
    refuses(dso_cache_read(k, 2, table, 5, read_k.data(), read_v.data()), DSO_EINVAL, "layer 2 does not exist", "layer");
    const int32_t wrong[] = {1000};
    refuses(dso_cache_read(k, 0, wrong, 5, read_k.data(), read_v.data()), DSO_EINVAL, "block_table[0] is 1000", "block");
    dso_cache_destroy(k);
  }
}

// Layers of different sizes: each is read and copied at its place, and a block is their sum.
void layers_of_different_sizes() {
  const int32_t heads[] = {3, 20, 1, 44, 2, 20}, table[] = {2, 0};
  const int tokens = 40;
  dso_cache* k = nullptr;
  for (int type : {DSO_KV_F32, DSO_KV_BF16, DSO_KV_INT8, DSO_KV_INT4}) {
    const dso_cache_shape shape{type, 3, 0, 0, 0, 0, 0, 1, heads};
    check(create(shape, 4, &k) == 0, "cache: %s", dso_last_error());
    int64_t bytes = 0;
    std::vector<std::vector<float>> keys, values;
    Random random(type);
    for (int layer = 0; layer < 3; ++layer) {
      const int n = heads[2 * layer], d = heads[2 * layer + 1];
      bytes += block_bytes({type, 1, n, d, 0, 0, 0, 1, nullptr});
      std::vector<float> key((size_t)(tokens * n * d)), value(key.size()), read_k(key.size()), read_v(key.size());
      for (float& f : key) f = random.normal();
      for (float& f : value) f = random.normal();
      choose_kernels(nullptr).kv_write(k->layout(layer), k->view(layer, table), 0, tokens, key.data(), n * d * 4, value.data(),
                                       n * d * 4, 0, n);
      choose_kernels(nullptr).kv_summarize(k->layout(layer), k->view(layer, table), 0);
      keys.push_back(key), values.push_back(value);
    }
    check(block_bytes(shape) == bytes && k->saved_bytes() == bytes, "block bytes");
    std::vector<uint8_t> saved((size_t)k->saved_bytes());
    check(dso_cache_save_block(k, 2, saved.data()) == 0 && dso_cache_load_block(k, 3, saved.data()) == 0 &&
              dso_cache_copy_block(k, 0, 1) == 0,
          "%s", dso_last_error());
    const int32_t moved[] = {3, 1};
    const float tolerance = type == DSO_KV_INT4 ? 0.6f : 0.05f;
    for (int layer = 0; layer < 3; ++layer) {
      const int n = heads[2 * layer], d = heads[2 * layer + 1];
      std::vector<float> read_k(keys[layer].size()), read_v(read_k.size());
      check(dso_cache_read(k, layer, moved, tokens, read_k.data(), read_v.data()) == 0, "read: %s", dso_last_error());
      for (int h = 0; h < n; ++h)
        for (int t = 0; t < tokens; ++t)
          for (int i = 0; i < d; ++i) {
            const size_t at = (size_t)((h * tokens + t) * d + i), from = (size_t)((t * n + h) * d + i);
            check(std::fabs(read_k[at] - keys[layer][from]) < tolerance &&
                      std::fabs(read_v[at] - values[layer][from]) < tolerance,
                  "layer %d, head %d, token %d, element %d", layer, h, t, i);
          }
    }
    dso_cache_destroy(k);
  }
  const int32_t odd[] = {3, 20, 1, 45};
  refuses(create({DSO_KV_F32, 2, 0, 0, 0, 0, 0, 0, odd}, 4, &k), DSO_EINVAL, "head_dim is 45", "an odd size");
  refuses(create({DSO_KV_F32, 2, 3, 20, 0, 0, 0, 0, heads}, 4, &k), DSO_EINVAL, "must be 0 with heads", "two sizes");
  refuses(create({DSO_KV_F32, 2, 0, 0, 32, 16, 0, 0, heads}, 4, &k), DSO_EINVAL, "must be NULL with rank", "latents");
}

// Copies of the newest tokens are INT8 layers in groups of their own.
void copies() {
  const int32_t groups[] = {0, 0, 0, 0, 0}, two[] = {1, 1, 1, 2, 2}, mixed[] = {1, 1, 0, 2, 2}, gap[] = {1, 1, 1, 3, 3};
  auto shape = [&](int32_t newest, const int32_t* copies, int32_t summaries = 0) {
    return dso_cache_shape{DSO_KV_INT4, 5, 3, 64, 0, 0, 0, summaries, nullptr, groups, newest, copies};
  };
  dso_cache* k = nullptr;
  check(block_bytes(shape(64, two)) == 3 * block_bytes({DSO_KV_INT8, 1, 3, 64, 0, 0, 0, 0, nullptr}), "block bytes");
  check(create(shape(64, two), 4, &k) == 0, "copies: %s", dso_last_error());
  check(k->groups() == 3 && k->group(k->copy_of(2)) == 1 && k->group(k->copy_of(3)) == 2, "groups of copies");
  check(k->layout(k->copy_of(4)).type == DSO_KV_INT8 && k->layout(4).type == DSO_KV_INT4, "types of copies");
  dso_cache_destroy(k);
  refuses(create(shape(-1, nullptr), 4, &k), DSO_EINVAL, "newest is -1", "negative");
  refuses(create(shape(64, nullptr), 4, &k), DSO_EINVAL, "newest_groups is NULL", "no groups");
  refuses(create(shape(0, two), 4, &k), DSO_EINVAL, "newest is 0, and newest_groups is not NULL", "no tokens");
  refuses(create(shape(64, mixed), 4, &k), DSO_EINVAL, "the copy of layer 2 is in group 0, must be above 0", "a layer's group");
  refuses(create(shape(64, gap), 4, &k), DSO_EINVAL, "no layer is in group 2", "a group without layers");
  refuses(create(shape(64, two, 1), 4, &k), DSO_EINVAL, "with summaries", "summaries");
  refuses(create({DSO_KV_INT4, 5, 0, 0, 64, 16, 0, 0, nullptr, groups, 64, two}, 4, &k), DSO_EINVAL, "with latents", "latents");
}

// Layers of different groups share the bytes of a block; its size is that of the largest group.
void groups() {
  const int32_t own[] = {0, 1, 0, 1, 1}, none[] = {0, 2, 0, 2, 2}, negative[] = {0, -1, 0, 0, 0}, large[] = {0, 5, 0, 0, 0};
  auto shape = [](const int32_t* groups, int32_t summaries = 0) {
    return dso_cache_shape{DSO_KV_BF16, 5, 3, 64, 0, 0, 0, summaries, nullptr, groups};
  };
  dso_cache* k = nullptr;
  refuses(create(shape(none), 4, &k), DSO_EINVAL, "no layer is in group 1 of 3", "a group without layers");
  refuses(create(shape(negative), 4, &k), DSO_EINVAL, "layer 1 is in group -1", "a negative group");
  refuses(create(shape(large), 4, &k), DSO_EINVAL, "layer 1 is in group 5", "a group past the layers");
  refuses(create(shape(own, 1), 4, &k), DSO_EINVAL, "summaries need all layers in one group", "summaries");
  const int64_t layer = block_bytes(shape(nullptr)) / 5;
  check(block_bytes(shape(own)) == 3 * layer, "the largest group has three layers");
  check(create(shape(own), 4, &k) == 0, "cache: %s", dso_last_error());
  const int32_t table[] = {2};
  const int64_t places[] = {0, 0, 1, 1, 2};
  for (int64_t i = 0; i < 5; ++i) {
    const KvView view = k->view(i, table);
    check(view.base == k->arena.data() + places[i] * layer && view.block_stride == 3 * layer, "place of layer %d", int(i));
  }
  dso_cache_destroy(k);
}

}  // namespace

int main() {
  caches();
  layers_of_different_sizes();
  groups();
  copies();
  latent_caches();
  return report("test_cache_api");
}
