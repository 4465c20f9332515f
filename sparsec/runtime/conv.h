// The op of convolutions: sparsec::conv2d, the product of a weight [N, kernel * C] with the patches of NHWC images.
//
// No matrix of all patches is made: a thread gathers those of a chunk of output pixels, few enough to stay in its
// second-level cache with what the kernel makes of them, and runs every tile of the weight over them. Where there are
// too few pixels for all threads, they gather them together and share the tiles, so that one small image keeps them
// busy too. Included by op.cpp, whose Route, Job and run it uses.

namespace {

// x [B, H, W, C] as rows of a product: row r is the patch of output pixel r, zeros where it hangs over the edge.
struct Patches {
  const Walk &walk;
  const char *x;
  int64_t images, high, wide, pixel, out_high, out_wide;  // pixel: bytes

  Patches(const Walk &w, const Tensor &image)
      : walk(w), x(static_cast<const char *>(image.const_data_ptr())), images(image.size(0)), high(image.size(2)),
        wide(image.size(3)), pixel(image.size(1) * image.element_size()),
        out_high(walked(high, w.above + w.below, w.kernel_high, w.stride_high, w.dilation_high)),
        out_wide(walked(wide, w.left + w.right, w.kernel_wide, w.stride_wide, w.dilation_wide)) {}

  static int64_t walked(int64_t size, int64_t padding, int64_t kernel, int64_t stride, int64_t dilation) {
    int64_t room = size + padding - dilation * (kernel - 1) - 1;
    TORCH_CHECK(room >= 0, "sparsec::conv2d: the kernel is larger than the padded image");
    return room / stride + 1;
  }
  int64_t rows() const { return images * out_high * out_wide; }

  void gather(int64_t begin, int64_t end, char *to) const {
    for (int64_t row = begin; row < end; ++row) {
      int64_t x0 = row % out_wide * walk.stride_wide - walk.left;
      int64_t y0 = row / out_wide % out_high * walk.stride_high - walk.above;
      const char *image = x + row / out_wide / out_high * high * wide * pixel;
      for (int64_t i = 0; i < walk.kernel_high; ++i, to += walk.kernel_wide * pixel) {
        int64_t y = y0 + i * walk.dilation_high;
        if (y < 0 || y >= high) std::memset(to, 0, walk.kernel_wide * pixel);
        else line(image + y * wide * pixel, x0, to);
      }
    }
  }

 private:
  // The taps of one line of a patch, which begins at column x0 of the image's line `from`.
  void line(const char *from, int64_t x0, char *to) const {
    if (walk.dilation_wide == 1) {
      int64_t begin = std::clamp<int64_t>(-x0, 0, walk.kernel_wide);
      int64_t end = std::clamp<int64_t>(wide - x0, begin, walk.kernel_wide);
      std::memset(to, 0, begin * pixel);
      if (begin < end) std::memcpy(to + begin * pixel, from + (x0 + begin) * pixel, (end - begin) * pixel);
      std::memset(to + end * pixel, 0, (walk.kernel_wide - end) * pixel);
      return;
    }
    for (int64_t j = 0; j < walk.kernel_wide; ++j, to += pixel) {
      int64_t column = x0 + j * walk.dilation_wide;
      if (column < 0 || column >= wide) std::memset(to, 0, pixel);
      else std::memcpy(to, from + column * pixel, pixel);
    }
  }
};

constexpr int64_t kChunkBytes = 768 << 10;  // of patches and of what a kernel makes of them
constexpr int64_t kBlockRows = 64;          // kernels work on up to so many rows at a time

int64_t chunk_rows(int64_t k, int64_t size) {
  int64_t fit = kChunkBytes / std::max<int64_t>(1, k * (size + static_cast<int64_t>(sizeof(float))));
  return std::clamp<int64_t>(fit / kBlockRows, 1, 8) * kBlockRows;
}

// Patches [begin, end), gathered by all threads.
Tensor gathered(const Patches &p, int64_t begin, int64_t end, int64_t k, const at::TensorOptions &options) {
  Tensor rows = at::empty({end - begin, k}, options);
  char *to = static_cast<char *>(rows.mutable_data_ptr());
  int64_t bytes = k * rows.element_size();
  at::parallel_for(0, end - begin, std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(bytes, 1)),
                   [&](int64_t b, int64_t e) { p.gather(begin + b, begin + e, to + b * bytes); });
  return rows;
}

// y [M, N] of every patch.
void run_patches(const Entry &e, const Route &route, const Patches &p, const std::optional<Tensor> &b, Tensor &y) {
  int64_t m = p.rows(), chunk = std::min(chunk_rows(e.k, y.element_size()), m);
  int64_t threads = thread_count(m * route.work[route.tiles]), shares = std::min(threads, m / kBlockRows);
  std::vector<Job> jobs;
  if (4 * shares < 3 * threads) {  // too few pixels for all threads: all gather, and then share the tiles
    Tensor rows = gathered(p, 0, m, e.k, y.options());
    jobs.push_back(make_job(route, e.act, rows, b, y));
    return run(jobs);
  }
  Tensor rows = at::empty({shares, chunk, e.k}, y.options()), out = y.narrow(0, 0, chunk);
  for (int64_t t = 0; t < shares; ++t) jobs.push_back(make_job(route, e.act, rows.select(0, t), b, out));
  auto first = [&](int64_t t) { return std::min(m, (m * t / shares + 15) / 16 * 16); };
  auto work = [&](int64_t t) {
    SparsecCall &call = jobs[t].call;
    for (int64_t row = first(t), end = first(t + 1); row < end; row += chunk) {
      call.m = std::min(chunk, end - row);
      call.y = static_cast<char *>(y.mutable_data_ptr()) + row * e.n * y.element_size();
      p.gather(row, row + call.m, static_cast<char *>(const_cast<void *>(call.x)));
      route.prepare(&call, 0, route.prepare_units(call.m, e.k));
      route.run(&call, 0, route.tiles);
    }
  };
  if (shares == 1) return work(0);
  at::parallel_for(0, shares, 1, [&](int64_t t0, int64_t t1) {
    for (; t0 < t1; ++t0) work(t0);
  });
}

Tensor dense_conv(const Tensor &x, const Tensor &w, const std::optional<Tensor> &b, const Walk &walk) {
  int64_t high = std::min(walk.above, walk.below), wide = std::min(walk.left, walk.right);
  Tensor image = x;
  if (walk.above != walk.below || walk.left != walk.right)  // "same" with an even kernel
    image = at::constant_pad_nd(x, {walk.left - wide, walk.right - wide, walk.above - high, walk.below - high});
  return at::conv2d(image, w, b, {walk.stride_high, walk.stride_wide}, {high, wide},
                    {walk.dilation_high, walk.dilation_wide});
}

// y [M, N] of channels_last images by a kernel.
Tensor sparse_conv(const Entry &e, const Route &route, const Tensor &image, const Patches &p, const Tensor &w,
                   const std::optional<Tensor> &b) {
  int64_t m = p.rows();
  if (e.walk.pointwise()) return rows_through(e, image.permute({0, 2, 3, 1}).reshape({m, e.k}), w, b, {});
  Tensor y = at::empty({m, e.n}, image.options());
  run_patches(e, route, p, b, y);
  if (e.verify) verify(e, gathered(p, 0, m, e.k, y.options()), w, b, y, e.input);
  return y;
}

// x [B, C, H, W], w [N, C, high, wide]. The memory format of the result is that of x.
Tensor conv2d(const Tensor &x, const Tensor &w, const std::optional<Tensor> &b, c10::string_view plan) {
  at::AutoDispatchBelowADInplaceOrView guard;  // inference only: no autograd bookkeeping for the calls inside
  auto entry = lookup(w, plan);
  const Entry &e = *entry;
  TORCH_CHECK(x.dim() == 4 && w.dim() == 4 && x.size(1) == w.size(1) && w.size(2) == e.walk.kernel_high &&
                  w.size(3) == e.walk.kernel_wide,
              "sparsec::conv2d: x is ", x.sizes(), ", the weight ", w.sizes());
  TORCH_CHECK(x.scalar_type() == w.scalar_type(), "sparsec::conv2d: x is ", x.scalar_type(), ", the weight ",
              w.scalar_type());
  bool last = !x.is_contiguous() && x.is_contiguous(at::MemoryFormat::ChannelsLast);
  auto format = last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const Route *route = x.numel() ? e.at(Patches(e.walk, x).rows()) : nullptr;
  if (!route) return activate(dense_conv(x, w, b, e.walk), e.act).contiguous(format);
  Tensor image = x.contiguous(at::MemoryFormat::ChannelsLast);
  Patches p(e.walk, image);
  Tensor y = sparse_conv(e, *route, image, p, w, b).view({p.images, p.out_high, p.out_wide, e.n});
  return y.permute({0, 3, 1, 2}).contiguous(format);
}

// One kernel on one packed convolution, without a table: for tuning and tests. `walk`: the numbers of a Walk.
Tensor direct_conv(const Tensor &x, const std::optional<Tensor> &b, at::TensorList tensors, at::IntArrayRef route,
                   int64_t n, int64_t act, at::IntArrayRef walk) {
  Entry e({}, "");
  e.walk = Walk::of(walk);
  e.n = n, e.k = e.walk.kernel_high * e.walk.kernel_wide * x.size(1), e.act = act, e.verify = false;
  auto routes = routes_from(tensors, route);
  Tensor image = x.contiguous(at::MemoryFormat::ChannelsLast);
  Patches p(e.walk, image);
  Tensor y = at::empty({p.rows(), n}, image.options());
  if (e.walk.pointwise()) {
    Tensor rows = image.permute({0, 2, 3, 1}).reshape({p.rows(), e.k});
    std::vector<Job> jobs;
    jobs.push_back(make_job(routes.at(0), act, rows, b, y));
    run(jobs);
  } else {
    run_patches(e, routes.at(0), p, b, y);
  }
  return y.view({p.images, p.out_high, p.out_wide, n}).permute({0, 3, 1, 2});
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sparsec, lib) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag, at::Tag::needs_exact_strides};
  lib.def("conv2d(Tensor x, Tensor weight, Tensor? bias, str plan) -> Tensor", tags);
  lib.def("direct_conv(Tensor x, Tensor? bias, Tensor[] tensors, int[] route, int n, int act, int[] walk) -> Tensor");
}

TORCH_LIBRARY_IMPL(sparsec, CPU, lib) {
  lib.impl("conv2d", conv2d);
  lib.impl("direct_conv", direct_conv);
}
