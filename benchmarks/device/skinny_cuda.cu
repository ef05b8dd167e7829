// A product of a few rows with its end fused, by hand: what a ring of bulk copies filled before the wait would give.
//
// One block a processor, so that the block of the next kernel fits beside it (at most 110 KB of shared memory each).
// Four producer warps copy rows of the weight, INNER numbers at a time, into a ring of STAGES. They fill it before
// griddepcontrol.wait, since weights depend on no kernel, and add the rows of x after it. The others multiply with
// mma.m16n8k16, weights as the left operand. Which k a thread holds does not matter while both operands agree, so a
// thread reads 16 adjacent bytes of each: no ldmatrix, no conflict (rows are 64 bytes more than a multiple of 128).
// A block walks over tiles of FEATURES without emptying its ring. Ends and buffers are those of skinny_kernels.py.

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <cstdint>

namespace {

constexpr int kProducers = 4;  // warps that copy: lanes of one issue their copies one by one
constexpr int kPlain = 0, kResidual = 1, kSwiglu = 2, kPlainFloat = 3;

struct Arguments {
    const __nv_bfloat16* x;       // [rows, in_features]
    const __nv_bfloat16* weight;  // [out_features, in_features]
    void* out;
    const float* sums;  // [rows, in_features / 32]
    __nv_bfloat16* residual;
    const __nv_bfloat16* gain;
    __nv_bfloat16* scaled;
    float* next_sums;  // [rows, out_features / 32]
    int rows, out_features, in_features, tiles, ahead;
    float eps;
};

__device__ uint32_t shared_address(const void* at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }

__device__ void barrier_init(uint64_t* barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

__device__ void expect(uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

__device__ void arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ void wait(uint64_t* barrier, uint32_t parity) {
    for (int tries = 0;; ++tries) {
        uint32_t done;
        asm volatile(
            "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
            : "=r"(done)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
        if (done) return;
        if (tries > 1 << 20) __trap();  // an error rather than a hang
    }
}

__device__ void copy(void* to, const void* from, int bytes, uint64_t* barrier, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
            shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
        : "memory");
}

__device__ void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <int FEATURES, int INNER, int STAGES, int ROWS>
struct Layout {
    static constexpr int stride = INNER * 2 + 64;                // bytes of a row in a stage
    static constexpr int stage = (FEATURES + ROWS) * stride;     // the weight's rows, then those of x
    static constexpr int total = STAGES * stage;                 // where the sums of a tile begin
};

template <int END, int FEATURES, int SPLIT_WARPS, int INNER, int STAGES, int ROWS>
struct Kernel {
    using L = Layout<FEATURES, INNER, STAGES, ROWS>;
    static constexpr int feature_warps = FEATURES / 16;
    static constexpr int warps = feature_warps * SPLIT_WARPS;  // those that multiply
    static constexpr int threads = 32 * (warps + kProducers);
    static constexpr int shared = L::total + SPLIT_WARPS * ROWS * FEATURES * 4 + ROWS * 4 + STAGES * 16 + 128;
};

template <int END>
__device__ int weight_row(int tile, int index, int features, int out_features) {
    if (END != kSwiglu) return tile * features + index;
    int half = features / 2;
    return tile * half + index % half + index / half * (out_features / 2);
}

template <int END, int FEATURES, int SPLIT_WARPS, int INNER, int STAGES, int ROWS>
__global__ void __launch_bounds__(Kernel<END, FEATURES, SPLIT_WARPS, INNER, STAGES, ROWS>::threads)
    product(const Arguments given) {
    using L = Layout<FEATURES, INNER, STAGES, ROWS>;
    using K = Kernel<END, FEATURES, SPLIT_WARPS, INNER, STAGES, ROWS>;
    constexpr bool norm = END != kResidual;
    extern __shared__ __align__(128) unsigned char memory[];
    float* total = reinterpret_cast<float*>(memory + L::total);  // [SPLIT_WARPS][ROWS][FEATURES]
    float* rstd = total + SPLIT_WARPS * ROWS * FEATURES;
    uint64_t* full = reinterpret_cast<uint64_t*>(rstd + ROWS);
    uint64_t* empty = full + STAGES;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int chunks = given.in_features / INNER;

    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(full + stage, kProducers);
            barrier_init(empty + stage, K::warps);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    // Rows of x that are not there count as zero: they are never copied.
    for (int at = threadIdx.x; at < STAGES * ROWS * (L::stride / 16); at += K::threads) {
        int stage = at / (ROWS * (L::stride / 16)), rest = at % (ROWS * (L::stride / 16));
        if (rest / (L::stride / 16) >= given.rows)
            *reinterpret_cast<uint4*>(memory + stage * L::stage + FEATURES * L::stride + rest * 16) =
                make_uint4(0, 0, 0, 0);
    }
    __syncthreads();

    if (warp < kProducers) {
        uint64_t once, kept;
        asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
        asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(kept));
        const int mine_of_x = (given.rows - warp + kProducers - 1) / kProducers;  // rows warp, warp + kProducers, ...
        const int bytes = (FEATURES / kProducers + mine_of_x) * INNER * 2;
        auto weights = [&](int tile, int chunk, int stage) {
            for (int index = lane * kProducers + warp; index < FEATURES; index += 32 * kProducers) {
                int64_t row = weight_row<END>(tile, index, FEATURES, given.out_features);
                if (row >= given.out_features) row = given.out_features - 1;
                copy(memory + stage * L::stage + index * L::stride, given.weight + row * given.in_features + chunk * INNER,
                     INNER * 2, full + stage, once);
            }
        };
        auto values = [&](int chunk, int stage) {
            int row = lane * kProducers + warp;
            if (row < given.rows)
                copy(memory + stage * L::stage + (FEATURES + row) * L::stride,
                     given.x + static_cast<int64_t>(row) * given.in_features + chunk * INNER, INNER * 2, full + stage,
                     kept);
        };
        auto open = [&](int stage) {
            if (lane == 0) expect(full + stage, bytes);
            __syncwarp();
        };
        const int mine = (given.tiles - static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) - 1) /
                         static_cast<int>(gridDim.x) * chunks;
        const int early = mine < STAGES ? mine : STAGES;
        for (int at = 0; at < early; ++at) {
            open(at);
            weights(blockIdx.x + at / chunks * gridDim.x, at % chunks, at);
        }
        const int left = given.in_features - STAGES * INNER;
        const int ahead = given.ahead < left ? given.ahead : left;
        if (ahead > 0)
            for (int index = lane * kProducers + warp; index < FEATURES; index += 32 * kProducers) {
                int64_t row = weight_row<END>(blockIdx.x, index, FEATURES, given.out_features);
                if (row < given.out_features)
                    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(
                                     given.weight + row * given.in_features + STAGES * INNER),
                                 "r"(ahead * 2)
                                 : "memory");
            }
        asm volatile("griddepcontrol.wait;" ::: "memory");
        asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
        for (int at = 0; at < early; ++at) values(at % chunks, at);
        for (int at = early; at < mine; ++at) {
            int stage = at % STAGES;
            wait(empty + stage, (at / STAGES - 1) & 1);
            open(stage);
            weights(blockIdx.x + at / chunks * gridDim.x, at % chunks, stage);
            values(at % chunks, stage);
        }
        return;
    }

    const int thread = threadIdx.x - 32 * kProducers, worker = warp - kProducers;
    const int group = lane / 4, quad = lane % 4;
    const int first_feature = worker % K::feature_warps * 16, split = worker / K::feature_warps;
    constexpr int part = INNER / SPLIT_WARPS;
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");

    constexpr int rows_a_warp = (ROWS + K::warps - 1) / K::warps;
    float squares[rows_a_warp] = {};
    if (norm)  // loaded here, needed at the end of the first tile
        for (int one = 0; one < rows_a_warp; ++one) {
            int row = worker + one * K::warps, blocks = given.in_features / 32;
            if (row < given.rows)
                for (int block = lane; block < blocks; block += 32) squares[one] += __ldcg(given.sums + row * blocks + block);
        }

    int at = 0;
    for (int tile = blockIdx.x; tile < given.tiles; tile += gridDim.x) {
        float sum[ROWS / 8][4] = {};
        for (int chunk = 0; chunk < chunks; ++chunk, ++at) {
            int stage = at % STAGES;
            wait(full + stage, (at / STAGES) & 1);
            const unsigned char* base = memory + stage * L::stage + (split * part + quad * 8) * 2;
            const unsigned char* left = base + (first_feature + group) * L::stride;
            const unsigned char* right = base + (FEATURES + group) * L::stride;
#pragma unroll
            for (int inner = 0; inner < part; inner += 32) {
                uint4 a = *reinterpret_cast<const uint4*>(left + inner * 2);
                uint4 b = *reinterpret_cast<const uint4*>(left + 8 * L::stride + inner * 2);
#pragma unroll
                for (int half = 0; half < ROWS / 8; ++half) {
                    uint4 v = *reinterpret_cast<const uint4*>(right + half * 8 * L::stride + inner * 2);
                    multiply(sum[half], a.x, b.x, a.y, b.y, v.x, v.y);
                    multiply(sum[half], a.z, b.z, a.w, b.w, v.z, v.w);
                }
            }
            __syncwarp();
            if (lane == 0) arrive(empty + stage);
        }
#pragma unroll
        for (int half = 0; half < ROWS / 8; ++half)
#pragma unroll
            for (int one = 0; one < 4; ++one)
                total[(split * ROWS + half * 8 + quad * 2 + one % 2) * FEATURES + first_feature + group + one / 2 * 8] =
                    sum[half][one];
        if (norm && tile == static_cast<int>(blockIdx.x))
            for (int one = 0; one < rows_a_warp; ++one) {
                float all = squares[one];
                for (int apart = 16; apart; apart /= 2) all += __shfl_xor_sync(~0u, all, apart);
                int row = worker + one * K::warps;
                if (lane == 0 && row < ROWS) rstd[row] = rsqrtf(all / given.in_features + given.eps);
            }
        asm volatile("bar.sync 1, %0;" ::"n"(32 * K::warps) : "memory");
        constexpr int width = END == kSwiglu ? FEATURES / 2 : FEATURES;
        for (int index = thread; index < ROWS * width; index += 32 * K::warps) {
            int row = index / width, feature = index % width;
            auto added = [&](int column) {
                float value = 0;
                for (int one = 0; one < SPLIT_WARPS; ++one) value += total[(one * ROWS + row) * FEATURES + column];
                return norm ? value * rstd[row] : value;
            };
            float value = added(feature);
            if (END == kSwiglu) {
                float up = added(feature + width);
                value = value / (1 + __expf(-value)) * up;
                if (row < given.rows)
                    static_cast<__nv_bfloat16*>(given.out)[static_cast<int64_t>(row) * (given.out_features / 2) +
                                                           tile * width + feature] = __float2bfloat16(value);
                continue;
            }
            int64_t where = static_cast<int64_t>(row) * given.out_features + tile * width + feature;
            bool wanted = row < given.rows && tile * width + feature < given.out_features;
            if (END == kPlain) {
                if (wanted) static_cast<__nv_bfloat16*>(given.out)[where] = __float2bfloat16(value);
            } else if (END == kPlainFloat) {
                if (wanted) static_cast<float*>(given.out)[where] = value;
            } else {  // warps hold 32 adjacent features of one row, all lanes or none
                float stream = 0;
                if (wanted) {
                    __nv_bfloat16 rounded = __float2bfloat16(__bfloat162float(given.residual[where]) + value);
                    given.residual[where] = rounded;
                    stream = __bfloat162float(rounded);
                    given.scaled[where] =
                        __float2bfloat16(stream * __bfloat162float(given.gain[tile * width + feature]));
                }
                float square = stream * stream;
                for (int apart = 16; apart; apart /= 2) square += __shfl_xor_sync(~0u, square, apart);
                if (wanted && lane == 0)
                    given.next_sums[row * (given.out_features / 32) + (tile * width + feature) / 32] = square;
            }
        }
        asm volatile("bar.sync 1, %0;" ::"n"(32 * K::warps) : "memory");
    }
}

template <int END, int FEATURES, int SPLIT_WARPS, int INNER, int STAGES, int ROWS>
int launch(Arguments given, int grid, int dependent, cudaStream_t stream) {
    using K = Kernel<END, FEATURES, SPLIT_WARPS, INNER, STAGES, ROWS>;
    auto kernel = product<END, FEATURES, SPLIT_WARPS, INNER, STAGES, ROWS>;
    static_assert(FEATURES % 16 == 0 && INNER % (32 * SPLIT_WARPS) == 0 && K::shared <= 113 * 1024, "does not fit");
    static_assert(END != kResidual || FEATURES % 32 == 0, "sums are of 32 features");
    if (given.in_features % INNER || given.rows > ROWS || (END == kSwiglu && given.out_features % FEATURES)) return -1;
    given.tiles = (given.out_features + FEATURES - 1) / FEATURES;
    static bool ready = false;
    if (!ready) {
        cudaError_t problem = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, K::shared);
        if (problem != cudaSuccess) return static_cast<int>(problem);
        ready = true;
    }
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(grid < given.tiles ? grid : given.tiles);
    config.blockDim = dim3(K::threads);
    config.dynamicSmemBytes = K::shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = dependent ? 1 : 0;
    return static_cast<int>(cudaLaunchKernelEx(&config, kernel, given));
}

}  // namespace

// skinny_cuda.py includes this with STARS_END, STARS_ROWS and STARS_CASES, a row of
// STARS_CASE(number, FEATURES, SPLIT_WARPS, INNER, STAGES), defined.
#define STARS_CASE(number, features, splits, inner, stages) \
    case number:                                            \
        return launch<STARS_END, features, splits, inner, stages, STARS_ROWS>(given, grid, dependent, stream);

extern "C" int stars_skinny(int which, const void* x, const void* weight, void* out, const float* sums, void* residual,
                            const void* gain, void* scaled, float* next_sums, int rows, int out_features, int in_features,
                            int ahead, float eps, int grid, int dependent, cudaStream_t stream) {
    Arguments given{static_cast<const __nv_bfloat16*>(x), static_cast<const __nv_bfloat16*>(weight), out, sums,
                    static_cast<__nv_bfloat16*>(residual), static_cast<const __nv_bfloat16*>(gain),
                    static_cast<__nv_bfloat16*>(scaled), next_sums, rows, out_features, in_features, 0, ahead, eps};
    switch (which) {
        STARS_CASES
    }
    return -2;
}
