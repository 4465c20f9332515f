// The ops of weights that have no dense twin any more (sparsec.pack_): sparsec::linear_packed, ::embedding_packed,
// ::unpack_packed.
//
// `pack` is {meta, tensors of the pack ..., work}. The tensors are the data itself, so nothing is looked up by identity:
// `meta` (uint8, a JSON text) says what they are, and equal texts share one PackedEntry, which Python makes at the first
// call (sparsec::resolve_packed). Included by op.cpp, whose Route, Job and run it uses.

namespace {

// What a meta text means in this process. No route: no kernel could be made here, and Python computes the product.
struct PackedEntry {
  int64_t n, k, tensors;
  at::ScalarType dtype;
  bool verify;
  InputRule input;  // how the layer rounds x
  std::vector<std::vector<int64_t>> routes;  // as routes_from reads them; the last one unpacks and serves no M
  std::vector<char> dense;                   // per route: unpack blocks of W and multiply densely
};

std::shared_mutex packed_mutex;
std::unordered_map<std::string, std::shared_ptr<const PackedEntry>> packed_table;

std::string meta_text(at::TensorList pack) {
  TORCH_CHECK(pack.size() >= 3 && pack[0].scalar_type() == at::kByte && pack[0].is_contiguous(),
              "sparsec::linear_packed: the pack must be {meta, tensors ..., work}");
  return {reinterpret_cast<const char *>(pack[0].const_data_ptr()), static_cast<size_t>(pack[0].numel())};
}

std::shared_ptr<const PackedEntry> find_packed(const std::string &meta) {
  std::shared_lock lock(packed_mutex);
  auto it = packed_table.find(meta);
  return it == packed_table.end() ? nullptr : it->second;
}

std::shared_ptr<const PackedEntry> lookup_packed(at::TensorList pack) {
  std::string meta = meta_text(pack);
  auto entry = find_packed(meta);
  if (C10_UNLIKELY(!entry)) {
    static auto resolve = c10::Dispatcher::singleton()
                              .findSchemaOrThrow("sparsec::resolve_packed", "")
                              .typed<void(const Tensor &)>();
    resolve.call(pack[0]);
    entry = find_packed(meta);
    TORCH_CHECK(entry, "sparsec: the resolver installed nothing for this pack; please report this");
  }
  TORCH_CHECK(static_cast<int64_t>(pack.size()) == entry->tensors + 2, "sparsec::linear_packed: the pack has ",
              pack.size(), " tensors, its format ", entry->tensors + 2);
  return entry;
}

Route packed_route(const PackedEntry &e, size_t i, at::TensorList pack) {
  Route route = std::move(routes_from(pack.slice(1), e.routes[i])[0]);
  TORCH_CHECK(pack.back().numel() == route.tiles + 1, "sparsec::linear_packed: the pack is not what its meta says");
  return route;
}

// Rows [begin * 16, ...) of W for tiles [begin, end) to `out`, whose first row is that of tile `begin`.
void unpack_tiles(const PackedEntry &e, const Route &route, int64_t begin, int64_t end, Tensor &out) {
  SparsecCall call{};
  call.m = begin * 16, call.n = e.n, call.k = e.k;
  call.y = out.mutable_data_ptr(), call.y_stride = out.stride(0);
  call.pack = route.pack.data();
  at::parallel_for(begin, end, 4, [&](int64_t t0, int64_t t1) { route.run(&call, t0, t1); });
}

constexpr int64_t kBlockBytes = 8 << 20;  // of decoded weight that exist at a time

// x W^T + b with W decoded block by block; the memory of one block is all that it takes.
void multiply_blocks(const PackedEntry &e, const Route &route, const Tensor &rows, const std::optional<Tensor> &b,
                     Tensor &y) {
  int64_t tiles = std::max<int64_t>(1, kBlockBytes / std::max<int64_t>(1, 16 * e.k * rows.element_size()));
  Tensor block = at::empty({std::min(tiles * 16, e.n), e.k}, rows.options());
  for (int64_t t = 0; t < route.tiles; t += tiles) {
    int64_t end = std::min(t + tiles, route.tiles), first = t * 16, count = std::min(end * 16, e.n) - first;
    unpack_tiles(e, route, t, end, block);
    Tensor out = y.narrow(1, first, count), wt = block.narrow(0, 0, count).t();
    if (b && b->defined()) at::cpu::addmm_out(out, b->narrow(0, first, count), rows, wt);
    else at::cpu::mm_out(out, rows, wt);
  }
}

// The product by Python; without x, the weight.
Tensor packed_reference(const std::optional<Tensor> &x, const std::optional<Tensor> &b, at::TensorList pack) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("sparsec::reference_packed", "")
                       .typed<Tensor(const std::optional<Tensor> &, const std::optional<Tensor> &, at::TensorList)>();
  return op.call(x, b, pack);
}

void verify_packed(const Tensor &x, const std::optional<Tensor> &b, at::TensorList pack, const Tensor &y) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("sparsec::verify_packed", "")
                       .typed<void(const Tensor &, const std::optional<Tensor> &, at::TensorList, const Tensor &)>();
  op.call(x, b, pack, y);
}

Tensor rows_packed(const PackedEntry &e, const Tensor &rows, const std::optional<Tensor> &b, at::TensorList pack) {
  int64_t m = rows.size(0);
  size_t i = 0;
  while (i < e.routes.size() && (m < e.routes[i][0] || e.routes[i][1] < m)) ++i;
  if (i == e.routes.size() && m) return packed_reference(rows, b, pack);
  Tensor y = at::empty({m, e.n}, rows.options());
  if (!m) return y;
  Route route = packed_route(e, i, pack);
  bool rounds_here = !e.input.raw() && (e.dense[i] || !route.rounds_x);
  Tensor read = rounds_here ? quantised_rows(rows, e.input) : rows;
  if (e.dense[i]) {
    multiply_blocks(e, route, read, b, y);
  } else {
    std::vector<Job> jobs;
    jobs.push_back(make_job(route, kNone, read, b, y, e.input.code()));
    run(jobs);
  }
  if (e.verify) verify_packed(rows, b, pack, y);
  return y;
}

Tensor linear_packed(const Tensor &x, const std::optional<Tensor> &b, at::TensorList pack, int64_t n) {
  at::AutoDispatchBelowADInplaceOrView guard;  // inference only: the module refuses gradients
  auto entry = lookup_packed(pack);
  const PackedEntry &e = *entry;
  TORCH_CHECK(n == e.n, "sparsec::linear_packed: n is ", n, ", the packed weight has ", e.n, " rows");
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == e.k, "sparsec::linear_packed: x has ", x.dim() ? x.size(-1) : 0,
              " columns, the weight ", e.k);
  TORCH_CHECK(x.scalar_type() == e.dtype, "sparsec::linear_packed: x is ", x.scalar_type(), ", the packed weight ",
              e.dtype);
  if (x.dim() == 1) return rows_packed(e, x.unsqueeze(0).contiguous(), b, pack).squeeze(0);
  return shaped(rows_packed(e, as_rows(x), b, pack), x);
}

// The dense weight [n, k].
Tensor unpack_packed(at::TensorList pack, int64_t n, int64_t k, at::ScalarType dtype) {
  auto entry = lookup_packed(pack);
  const PackedEntry &e = *entry;
  TORCH_CHECK(n == e.n && k == e.k && dtype == e.dtype, "sparsec::unpack_packed: the packed weight is [", e.n, ", ",
              e.k, "] ", e.dtype);
  if (e.routes.empty()) return packed_reference(std::nullopt, std::nullopt, pack);
  Tensor out = at::empty({n, k}, at::TensorOptions().dtype(e.dtype));
  Route route = packed_route(e, e.routes.size() - 1, pack);
  unpack_tiles(e, route, 0, route.tiles, out);
  return out;
}

// Rows of the packed weight [n, k] by their numbers: ids of any shape -> [..., k]. A tile of 16 rows is decoded once,
// whichever of its rows are asked for.
Tensor embedding_packed(const Tensor &ids, at::TensorList pack, int64_t k, at::ScalarType dtype) {
  at::AutoDispatchBelowADInplaceOrView guard;
  auto entry = lookup_packed(pack);
  const PackedEntry &e = *entry;
  TORCH_CHECK(k == e.k && dtype == e.dtype, "sparsec::embedding_packed: the packed rows are ", e.k, " of ", e.dtype);
  Tensor flat = ids.to(at::kLong).contiguous().view(-1);
  const int64_t *id = flat.const_data_ptr<int64_t>(), count = flat.numel();
  for (int64_t i = 0; i < count; ++i)
    TORCH_CHECK_INDEX(0 <= id[i] && id[i] < e.n, "index out of range: ", id[i], " in an embedding of ", e.n, " rows");
  std::vector<int64_t> sizes(ids.sizes().begin(), ids.sizes().end());
  sizes.push_back(k);
  if (e.routes.empty()) return unpack_packed(pack, e.n, k, dtype).index_select(0, flat).view(sizes);
  Tensor out = at::empty({count, k}, at::TensorOptions().dtype(dtype));
  Route route = packed_route(e, e.routes.size() - 1, pack);
  std::vector<int64_t> order(count), first;  // ids by tile, and where each tile begins
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return id[a] / 16 < id[b] / 16; });
  for (int64_t i = 0; i < count; ++i)
    if (!i || id[order[i]] / 16 != id[order[i - 1]] / 16) first.push_back(i);
  first.push_back(count);
  char *to = static_cast<char *>(out.mutable_data_ptr());
  int64_t bytes = k * out.element_size(), tiles = first.size() - 1;
  at::parallel_for(0, tiles, std::max<int64_t>(1, kSerial / std::max<int64_t>(1, 16 * k)), [&](int64_t t0, int64_t t1) {
    std::vector<char> block(16 * bytes);
    for (int64_t t = t0; t < t1; ++t) {
      int64_t tile = id[order[first[t]]] / 16;
      SparsecCall call{};
      call.m = tile * 16, call.n = e.n, call.k = k;
      call.y = block.data(), call.y_stride = k, call.pack = route.pack.data();
      route.run(&call, tile, tile + 1);
      for (int64_t i = first[t]; i < first[t + 1]; ++i)
        std::memcpy(to + order[i] * bytes, block.data() + id[order[i]] % 16 * bytes, bytes);
    }
  });
  return out.view(sizes);
}

// A packed weight beside the dense one that it should hold: decoded a block at a time, into one block.
struct Proof {
  std::shared_ptr<const PackedEntry> entry;
  Route route;
  Tensor w, block;

  Proof(at::TensorList pack, const Tensor &weight) : entry(lookup_packed(pack)), w(weight) {
    const PackedEntry &e = *entry;
    if (w.dim() != 2 || w.size(0) != e.n || w.size(1) != e.k || w.scalar_type() != e.dtype || e.routes.empty()) return;
    route = packed_route(e, e.routes.size() - 1, pack);
    int64_t rows = 16 * std::max<int64_t>(1, (kBlockBytes / 4) / std::max<int64_t>(1, 16 * e.k * w.element_size()));
    block = at::empty({std::min(rows, e.n), e.k}, w.options().memory_format(at::MemoryFormat::Contiguous));
  }

  // -0.0 counts as 0.0, which no pack stores.
  bool holds() {
    if (!block.defined()) return false;
    int64_t tiles = std::max<int64_t>(1, block.size(0) / 16);
    for (int64_t t = 0; t < route.tiles; t += tiles) {
      int64_t end = std::min(t + tiles, route.tiles), first = t * 16, count = std::min(end * 16, entry->n) - first;
      unpack_tiles(*entry, route, t, end, block);
      if (!at::equal(block.narrow(0, 0, count), w.narrow(0, first, count))) return false;
    }
    return true;
  }
};

bool holds_packed(at::TensorList pack, const Tensor &w) { return Proof(pack, w).holds(); }

// The least seconds of at most ten decodes of a pack that holds `w`, begun within `budget` seconds. Each is compared
// with `w`, and so a little slower than a bare one.
double seconds_of_decoding(at::TensorList pack, const Tensor &w, double budget) {
  Proof proof(pack, w);
  auto now = [] { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); };
  double best = std::numeric_limits<double>::infinity(), begun = now();
  double last = begun;
  for (int i = 0; i < 10 && last <= begun + budget; ++i) {
    TORCH_CHECK(proof.holds(), "sparsec: the pack does not hold the weight");
    double ended = now();
    best = std::min(best, ended - last), last = ended;
  }
  return best;
}

// `facts`: n, k, tensors of the pack, dtype, verify, kind of the input rule, whose number is `x_scale`. `table`: routes;
// the last one unpacks. `dense`: one flag a route.
void install_packed(const Tensor &meta, at::IntArrayRef facts, double x_scale, at::IntArrayRef table,
                    at::IntArrayRef dense) {
  auto entry = std::make_shared<PackedEntry>();
  entry->n = facts[0], entry->k = facts[1], entry->tensors = facts[2];
  entry->dtype = static_cast<at::ScalarType>(facts[3]), entry->verify = facts[4];
  entry->input = InputRule{static_cast<InputRule::Kind>(facts[5]), static_cast<float>(x_scale)};
  TORCH_CHECK(table.size() == dense.size() * kRouteInts, "sparsec: a route has ", kRouteInts, " integers");
  for (size_t i = 0; i < dense.size(); ++i) {
    entry->routes.push_back(table.slice(i * kRouteInts, kRouteInts).vec());
    entry->dense.push_back(static_cast<char>(dense[i]));
  }
  std::string text(reinterpret_cast<const char *>(meta.const_data_ptr()), static_cast<size_t>(meta.numel()));
  std::unique_lock lock(packed_mutex);
  packed_table[text] = std::move(entry);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sparsec, lib) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag, at::Tag::needs_exact_strides};
  lib.def("linear_packed(Tensor x, Tensor? bias, Tensor[] pack, int n) -> Tensor", tags);
  lib.def("embedding_packed(Tensor ids, Tensor[] pack, int k, ScalarType dtype) -> Tensor", tags);
  lib.def("unpack_packed(Tensor[] pack, int n, int k, ScalarType dtype) -> Tensor", tags);
  lib.def("holds_packed(Tensor[] pack, Tensor weight) -> bool");
  lib.def("seconds_of_decoding(Tensor[] pack, Tensor weight, float budget) -> float");
  lib.def("resolve_packed(Tensor meta) -> ()");
  lib.def("reference_packed(Tensor? x, Tensor? bias, Tensor[] pack) -> Tensor");
  lib.def("verify_packed(Tensor x, Tensor? bias, Tensor[] pack, Tensor y) -> ()");
  lib.def("install_packed(Tensor meta, int[] facts, float x_scale, int[] table, int[] dense) -> ()");
}

TORCH_LIBRARY_IMPL(sparsec, CPU, lib) {
  lib.impl("linear_packed", linear_packed);
  lib.impl("embedding_packed", embedding_packed);
  lib.impl("unpack_packed", unpack_packed);
  lib.impl("holds_packed", holds_packed);
  lib.impl("seconds_of_decoding", seconds_of_decoding);
  lib.impl("install_packed", install_packed);
}
