// dX of vector N:M with dX as a float32 tile in shared memory; README.md has the maths.
//
// A block owns TOKENS tokens of one slice of the inputs. For each group of HEIGHT rows it copies
// dY of these rows (STAGES - 1 groups ahead), multiplies by the weight on tensor cores and adds
// each product row to the tile row of its column. A warp has 16 slots and 32 tokens of a product.
//
// Compiled with HEIGHT (16, 32, 64, 128), STAGES and BFLOAT16 (0: float16) defined, for sm_80 on.
// What is not plain C++ stands behind the functions of this first part, which a test on a CPU
// replaces by its own. NVRTC needs no header for any of it.

#ifdef __CUDACC__

typedef unsigned short u16;
typedef unsigned int u32;

extern __shared__ __align__(128) unsigned char shared_memory[];

static __device__ __forceinline__ u32 shared_address(const void* at) {
    return static_cast<u32>(__cvta_generic_to_shared(at));
}

// 16 bytes from global to shared memory, asynchronously; zeros unless `inside`.
static __device__ __forceinline__ void copy_async(void* to, const void* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(inside ? 16 : 0)
                 : "memory");
}

static __device__ __forceinline__ void close_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until all but the latest N closed groups of this thread's copies have arrived.
template <int N>
static __device__ __forceinline__ void await_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

static __device__ __forceinline__ void block_barrier() { __syncthreads(); }

static __device__ __forceinline__ bool any_lane(bool value) {
    return __any_sync(0xffffffffu, value);
}

// Lane 8 * j + i names row i (16 bytes) of matrix j; lane l gets elements (2 * (l % 4), l / 4)
// and (2 * (l % 4) + 1, l / 4) of each matrix.
static __device__ __forceinline__ void load_matrices(u32 (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

#if BFLOAT16
#define ELEMENT "bf16"
#else
#define ELEMENT "f16"
#endif

// sum += a b, [16, 16] times [16, 8].
static __device__ __forceinline__ void multiply(float (&sum)[4], const u32 (&a)[4], u32 b0,
                                                u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." ELEMENT "." ELEMENT
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

static __device__ __forceinline__ u32 rounded(float low, float high) {
    u32 pair;
    asm("cvt.rn." ELEMENT "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

template <typename T>
static __device__ __forceinline__ T load_global(const T* at) {
    return __ldg(at);
}

template <typename T>
static __device__ __forceinline__ void store_global(T* at, T value) {
    *at = value;
}

template <typename T>
static __device__ __forceinline__ T load_shared(const T* at) {
    return *at;
}

template <typename T>
static __device__ __forceinline__ void store_shared(T* at, T value) {
    *at = value;
}

#endif

#define TOKENS 64
#define WARP_TOKENS 32
#define MIN_THREADS 128
#define MAX_THREADS (HEIGHT == 128 ? 384 : 512)  // by the registers they need

constexpr int CHUNKS = TOKENS / 8;  // of 16 bytes, in a row of dY
constexpr int STEPS = HEIGHT / 16;  // of a product along the rows of a group
// Neighbouring weights of one slot that a lane loads at a time.
constexpr int RUN = HEIGHT == 16 ? 4 : 8;

// The row of a group that stands at a place of its copy. A product's sum may take rows in any
// order, and in this one a lane's share of the weight is contiguous.
static __device__ __forceinline__ int row_at(int place) {
    int step = place >> 4, in_step = place & 15;
    int pair = (step & (RUN / 4 - 1)) * 2 + (in_step >> 3);
    return (step / (RUN / 4)) * (RUN * 4) + ((in_step & 7) >> 1) * RUN + pair * 2 + (in_step & 1);
}

struct Slots {
    int group, first;  // where this warp's 16 slots stand in the list of its slice and group
    int entry[2];      // of slots lane / 4 and lane / 4 + 8: tile row << 16 | k; negative: none
};

// dx[slice's inputs, tokens] = sum over groups of weight[group]^T dy[rows[group]].
//
// dy [out_features, dy_tokens], rows dy_stride apart; weight [num_groups, width, HEIGHT];
// rows [num_groups, HEIGHT]; entries [num_slices, num_groups, width], padding last;
// dx [in_features, dx_tokens], rows dx_stride apart. Token counts are multiples of 8.
extern "C" __global__ void __launch_bounds__(MAX_THREADS, 1) input_gradient_tile(
    const u16* __restrict__ dy, const u16* __restrict__ weight, const int* __restrict__ rows,
    const int* __restrict__ entries, u16* __restrict__ dx, int num_groups, int width,
    int out_features, int in_features, int slice_rows, int num_slices, int dy_tokens,
    int dx_tokens, long long dy_stride, long long dx_stride) {
    const int thread = threadIdx.x, num_threads = blockDim.x;
    const int lane = thread & 31, warp = thread >> 5;
    const int slice = blockIdx.x % num_slices;
    const int first_token = blockIdx.x / num_slices * TOKENS;
    float* tile = reinterpret_cast<float*>(shared_memory);
    u16* stages = reinterpret_cast<u16*>(shared_memory + slice_rows * (TOKENS * 4));
    entries += static_cast<long long>(slice) * num_groups * width;

    // Copies of dY. The features to copy next are read one group early.
    int next_row[HEIGHT * CHUNKS / MIN_THREADS];
    auto read_rows = [&](int group) {
#pragma unroll
        for (int n = 0; n < HEIGHT * CHUNKS / MIN_THREADS; n++) {
            int i = thread + n * num_threads;
            if (i < HEIGHT * CHUNKS && group < num_groups)
                next_row[n] = load_global(
                    rows + static_cast<long long>(group) * HEIGHT + row_at(i / CHUNKS));
        }
    };
    auto copy_rows = [&](int group, int stage) {
#pragma unroll
        for (int n = 0; n < HEIGHT * CHUNKS / MIN_THREADS; n++) {
            int i = thread + n * num_threads;
            if (i < HEIGHT * CHUNKS && group < num_groups) {
                int place = i / CHUNKS, chunk = i % CHUNKS, token = first_token + chunk * 8;
                bool inside = next_row[n] < out_features && token < dy_tokens;
                // Chunks change places so that eight rows of one chunk lie in different banks.
                u16* to = stages + (stage * HEIGHT + place) * TOKENS + (chunk ^ (place & 7)) * 8;
                copy_async(to, dy + (inside ? next_row[n] * dy_stride + token : 0), inside);
            }
        }
        close_copies();
    };

    // The 16 slots after `slots`: in the same group as long as it goes on, else in the next one.
    const int half = warp & 1;  // of the block's tokens
    const int slot = lane >> 2, quarter = lane & 3;
    const int first_slot = (warp >> 1) * 16, slots_apart = (num_threads >> 6) * 16;
    auto read_entries = [&](int group, int first) {
        Slots slots{group, first, {-1, -1}};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int at = first + slot + 8 * i;
            if (group < num_groups && at < width)
                slots.entry[i] =
                    load_global(entries + static_cast<long long>(group) * width + at);
        }
        return slots;
    };
    auto after = [&](const Slots& slots) {
        bool more = any_lane(slots.entry[0] >= 0) && slots.first + slots_apart < width;
        return more ? read_entries(slots.group, slots.first + slots_apart)
                    : read_entries(slots.group + 1, first_slot);
    };
    u32 a[STEPS][4] = {};  // the weight of the slots of this lane
    auto read_weight = [&](const Slots& slots) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (slots.entry[i] < 0) continue;
            long long at = static_cast<long long>(slots.group) * width + (slots.entry[i] & 0xffff);
            const u16* from = weight + at * HEIGHT + quarter * RUN;
            if constexpr (HEIGHT == 16) {
                uint2 run = load_global(reinterpret_cast<const uint2*>(from));
                a[0][i] = run.x, a[0][i + 2] = run.y;
            } else {
#pragma unroll
                for (int step = 0; step < STEPS; step += 2) {
                    uint4 run = load_global(reinterpret_cast<const uint4*>(from + step * 16));
                    a[step][i] = run.x, a[step][i + 2] = run.y;
                    a[step + 1][i] = run.z, a[step + 1][i + 2] = run.w;
                }
            }
        }
    };

    Slots slots = read_entries(0, first_slot);
    read_rows(0);
    for (int group = 0; group < STAGES - 1; group++) {
        copy_rows(group, group);
        read_rows(group + 1);
    }
    for (int i = thread; i < slice_rows * (TOKENS / 4); i += num_threads)
        store_shared(reinterpret_cast<float4*>(tile) + i, float4{0.0f, 0.0f, 0.0f, 0.0f});
    Slots next = after(slots);
    read_weight(slots);

    int stage = STAGES - 1, group = -1;
    while (slots.group < num_groups) {
        if (slots.group != group) {
            // All warps have added the group before, whose stage is free, and see this one's dY.
            await_copies<STAGES - 2>();
            block_barrier();
            group = slots.group;
            copy_rows(group + STAGES - 1, stage);
            read_rows(group + STAGES);
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
        float sum[4][4] = {};  // 8 tokens each
        const bool present = any_lane(slots.entry[0] >= 0);
        if (present) {
            const u16* copied = stages + stage * HEIGHT * TOKENS;
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
#pragma unroll
                for (int pair = 0; pair < 2; pair++) {
                    int place = step * 16 + (lane & 15), chunk = half * 4 + pair * 2 + (lane >> 4);
                    u32 b[4];
                    load_matrices(b, copied + place * TOKENS + (chunk ^ (place & 7)) * 8);
                    multiply(sum[2 * pair], a[step], b[0], b[1]);
                    multiply(sum[2 * pair + 1], a[step], b[2], b[3]);
                }
            }
        }
        // What the next turn needs is on its way while this one adds.
        read_weight(next);
        Slots second = after(next);
        if (present) {
            // Eight rows of the tile at once lie in the same banks unless each starts elsewhere:
            // lane's sum[n] becomes sum[n ^ turn].
            const int turn = slot & 3;
#pragma unroll
            for (int bit = 1; bit < 4; bit *= 2) {
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    if (n & bit) continue;
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        float low = sum[n][i], high = sum[n | bit][i];
                        sum[n][i] = turn & bit ? high : low;
                        sum[n | bit][i] = turn & bit ? low : high;
                    }
                }
            }
            // Columns of a group are distinct: no other lane has this row of the tile.
            float2* at[2][4];
            float2 value[2][4] = {};
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float* row = tile + (slots.entry[i] >> 16) * TOKENS + half * WARP_TOKENS;
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    at[i][n] = reinterpret_cast<float2*>(row + (n ^ turn) * 8 + quarter * 2);
                    if (slots.entry[i] >= 0) value[i][n] = load_shared(at[i][n]);
                }
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    value[i][n].x += sum[n][2 * i];
                    value[i][n].y += sum[n][2 * i + 1];
                    if (slots.entry[i] >= 0) store_shared(at[i][n], value[i][n]);
                }
            }
        }
        slots = next;
        next = second;
    }

    block_barrier();
    const int first_input = slice * slice_rows;
    const int num_rows = min(slice_rows, in_features - first_input);
    for (int i = thread; i < num_rows * CHUNKS; i += num_threads) {
        int row = i / CHUNKS, chunk = i % CHUNKS, token = first_token + chunk * 8;
        if (token >= dx_tokens) continue;
        auto* from = reinterpret_cast<const float4*>(tile + row * TOKENS + chunk * 8);
        const int swap = chunk >> 2;  // half of a row is all banks: the other half starts there
        float4 low = load_shared(from + swap), high = load_shared(from + (swap ^ 1));
        if (swap) {
            float4 kept = low;
            low = high, high = kept;
        }
        uint4 value{rounded(low.x, low.y), rounded(low.z, low.w), rounded(high.x, high.y),
                    rounded(high.z, high.w)};
        u16* to = dx + (first_input + row) * dx_stride + token;
        store_global(reinterpret_cast<uint4*>(to), value);
    }
}
