// Runs a CUDA kernel on a CPU, block after block, a fiber for each thread, and finds its faults.
//
// Stands in for the device functions of input_gradient.cu and for the CUDA driver: a library built
// from this header, a kernel and EMULATED(kernel) exports what the launcher calls. Faults found:
// - a race in shared memory: touched by two warps between two barriers, and written by one;
// - a copy that is not awaited: copies happen as late as allowed, over NaN;
// - memory outside of what `emulation_allow` named, or not aligned to the access;
// - a barrier that not all threads reach.
// Counts bank conflicts. Warps run in a random order, each for a random while.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

using std::min;
typedef unsigned short u16;
typedef unsigned int u32;
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
static struct { unsigned x; } threadIdx, blockIdx, blockDim;
static unsigned char* shared_memory;
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace emulation {

struct Cell {  // 8 bytes of shared memory
    int writer = -1, reader = -1;            // warps
    long written = -1, read = -1;            // between which barriers
    bool many_readers = false, copying = false;
};

struct Copy { unsigned char* to; unsigned char bytes[16]; };

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[1 << 16]};
    bool finished;
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> closed;
    std::vector<std::pair<long, int>> accesses;  // of shared memory: byte and size
};

struct Warp {
    int arrived;
    long turn;
    const void* row[32];
    bool vote[32];
    u32 a[32][4], b[32][2];
};

static std::string fault;
static std::vector<std::pair<const unsigned char*, long>> allowed;
static std::mt19937 random_order;
static long conflicts, max_shared = 48 << 10, shared_bytes;
static std::vector<Thread> threads;
static std::vector<Warp> warps;
static std::vector<Cell> cells;
static ucontext_t scheduler;
static int current, at_barrier, contexts;
static long epoch, progress;
static void** arguments;

static void fail(const std::string& what) {
    if (fault.find(what) != std::string::npos) return;  // one of each kind is enough
    fault += what + ", block " + std::to_string(blockIdx.x) + ", thread " +
             std::to_string(current) + "; ";
}

static void yield() { swapcontext(&threads[current].context, &scheduler); }

static void warp_barrier() {
    Warp& warp = warps[current / 32];
    long turn = warp.turn;
    progress++;
    if (++warp.arrived == 32) {
        warp.arrived = 0;
        warp.turn++;
    }
    while (warp.turn == turn) yield();
}

// Whether `bytes` at `at` are shared memory; notes the access.
static bool touch(const void* at, int bytes, bool write) {
    long first = static_cast<const unsigned char*>(at) - shared_memory;
    if (first < 0 || first + bytes > shared_bytes || first % bytes) {
        fail("bad address in shared memory");
        return false;
    }
    int warp = current / 32;
    for (long i = first / 8; i < (first + bytes + 7) / 8; i++) {
        Cell& cell = cells[i];
        bool other_reads = cell.read == epoch && (cell.many_readers || cell.reader != warp);
        if (cell.written == epoch && cell.writer != warp) fail("race with a write");
        if (cell.copying) fail("a copy is not awaited");
        if (write && other_reads) fail("race with a read");
        if (write) {
            cell.writer = warp, cell.written = epoch;
        } else {
            cell.many_readers = other_reads;
            cell.reader = warp, cell.read = epoch;
        }
    }
    return true;
}

static bool is_allowed(const void* at, long bytes) {
    auto* first = static_cast<const unsigned char*>(at);
    for (auto& [start, size] : allowed)
        if (first >= start && first + bytes <= start + size)
            return reinterpret_cast<uintptr_t>(at) % bytes == 0;
    return false;
}

static float as_float(u32 pair, int which) {
    u16 bits = which ? pair >> 16 : pair & 0xffff;
#if BFLOAT16
    u32 wide = static_cast<u32>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
#else
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return value;
#endif
}

static u32 as_bits(float value) {
#if BFLOAT16
    u32 wide;
    std::memcpy(&wide, &value, 4);
    return value == value ? (wide + 0x7fff + (wide >> 16 & 1)) >> 16 : 0x7fff;
#else
    _Float16 narrow = static_cast<_Float16>(value);
    u16 bits;
    std::memcpy(&bits, &narrow, 2);
    return bits;
#endif
}

// Accesses beyond the first of each 128-byte wavefront, where a warp's lanes did alike.
static void count_conflicts(int warp) {
    Thread* lanes = &threads[warp * 32];
    for (int lane = 1; lane < 32; lane++)
        if (lanes[lane].accesses.size() != lanes[0].accesses.size()) return;
    for (size_t n = 0; n < lanes[0].accesses.size(); n++) {
        int size = lanes[0].accesses[n].second, at_once = 128 / size;
        for (int first = 0; first < 32; first += at_once) {
            std::vector<int> uses(128 / size);
            for (int lane = first; lane < first + at_once; lane++)
                conflicts += uses[lanes[lane].accesses[n].first / size % at_once]++ > 0;
        }
    }
}

template <typename... A, size_t... I>
static void call(void (*kernel)(A...), std::index_sequence<I...>) {
    kernel(*static_cast<A*>(arguments[I])...);
}

template <typename... A>
static void call(void (*kernel)(A...)) {
    call(kernel, std::index_sequence_for<A...>());
}

static void run_kernel();

static void run_thread() {
    run_kernel();
    threads[current].finished = true;
    progress++;
    swapcontext(&threads[current].context, &scheduler);
}

static void run_block(int num_threads) {
    std::vector<uint4> memory(shared_bytes / 16 + 1);
    shared_memory = reinterpret_cast<unsigned char*>(memory.data());
    std::memset(shared_memory, 0xff, shared_bytes);
    cells.assign(shared_bytes / 8 + 1, Cell());
    threads = std::vector<Thread>(num_threads);
    warps = std::vector<Warp>(num_threads / 32);
    at_barrier = 0, epoch = 0;
    for (Thread& thread : threads) {
        getcontext(&thread.context);
        thread.context.uc_stack = {thread.stack.get(), 0, 1 << 16};
        thread.finished = false;
        makecontext(&thread.context, run_thread, 0);
    }
    int num_warps = num_threads / 32, running = num_threads;
    for (long idle = 0; running; idle++) {
        long before = progress;
        int warp = random_order() % num_warps;
        for (int pass = random_order() % 32; pass >= 0; pass--) {
            for (int i = warp * 32; i < warp * 32 + 32; i++) {
                if (threads[i].finished) continue;
                current = i, threadIdx.x = i;
                swapcontext(&scheduler, &threads[i].context);
                running -= threads[i].finished;
            }
        }
        if (progress != before) idle = 0;
        if (idle > 100 * num_warps) {
            fail("threads wait for ever");
            return;
        }
    }
    for (int warp = 0; warp < num_warps; warp++) count_conflicts(warp);
}

}  // namespace emulation

static void block_barrier() {
    using namespace emulation;
    long before = epoch;
    progress++;
    if (++at_barrier == static_cast<int>(threads.size())) {
        at_barrier = 0;
        epoch++;
    }
    while (epoch == before) yield();
}

static void copy_async(void* to, const void* from, bool inside) {
    using namespace emulation;
    if (!touch(to, 16, true)) return;
    Copy copy{static_cast<unsigned char*>(to), {}};
    if (!is_allowed(from, inside ? 16 : 1)) return fail("a copy from outside");
    if (inside) std::memcpy(copy.bytes, from, 16);
    std::memset(to, 0xff, 16);
    for (int i = 0; i < 2; i++) cells[(copy.to - shared_memory) / 8 + i].copying = true;
    threads[current].open.push_back(copy);
}

static void close_copies() {
    auto& thread = emulation::threads[emulation::current];
    thread.closed.push_back(std::move(thread.open));
    thread.open.clear();
}

template <int N>
static void await_copies() {
    using namespace emulation;
    auto& closed = threads[current].closed;
    for (; closed.size() > N; closed.pop_front())
        for (Copy& copy : closed.front()) {
            for (int i = 0; i < 2; i++) cells[(copy.to - shared_memory) / 8 + i].copying = false;
            touch(copy.to, 16, true);
            std::memcpy(copy.to, copy.bytes, 16);
        }
}

static bool any_lane(bool value) {
    using namespace emulation;
    Warp& warp = warps[current / 32];
    warp.vote[current % 32] = value;
    warp_barrier();
    bool any = std::any_of(warp.vote, warp.vote + 32, [](bool vote) { return vote; });
    warp_barrier();
    return any;
}

static void load_matrices(u32 (&to)[4], const void* row) {
    using namespace emulation;
    Warp& warp = warps[current / 32];
    int lane = current % 32;
    warp.row[lane] = row;
    if (!touch(row, 16, false)) warp.row[lane] = shared_memory;
    threads[current].accesses.push_back(
        {static_cast<const unsigned char*>(row) - shared_memory, 16});
    warp_barrier();
    for (int j = 0; j < 4; j++) {
        auto at = [&](int i) {
            return static_cast<u32>(static_cast<const u16*>(warp.row[8 * j + i])[lane / 4]);
        };
        to[j] = at(2 * (lane % 4)) | at(2 * (lane % 4) + 1) << 16;
    }
    warp_barrier();
}

static void multiply(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    using namespace emulation;
    Warp& warp = warps[current / 32];
    int lane = current % 32;
    std::copy(a, a + 4, warp.a[lane]);
    warp.b[lane][0] = b0, warp.b[lane][1] = b1;
    warp_barrier();
    for (int i = 0; i < 4; i++) {
        int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        float product = 0.0f;
        for (int k = 0; k < 16; k++) {
            u32 left = warp.a[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)];
            u32 right = warp.b[column * 4 + k % 8 / 2][k / 8];
            product += as_float(left, k % 2) * as_float(right, k % 2);
        }
        sum[i] += product;
    }
    warp_barrier();
}

static u32 rounded(float low, float high) {
    return emulation::as_bits(low) | emulation::as_bits(high) << 16;
}

template <typename T>
static T load_global(const T* at) {
    if (emulation::is_allowed(at, sizeof(T))) return *at;
    emulation::fail("a load from outside");
    return T();
}

template <typename T>
static void store_global(T* at, T value) {
    if (!emulation::is_allowed(at, sizeof(T))) return emulation::fail("a store outside");
    *at = value;
}

template <typename T>
static T load_shared(const T* at) {
    using namespace emulation;
    if (!touch(at, sizeof(T), false)) return T();
    threads[current].accesses.push_back(
        {reinterpret_cast<const unsigned char*>(at) - shared_memory, sizeof(T)});
    return *at;
}

template <typename T>
static void store_shared(T* at, T value) {
    using namespace emulation;
    if (!touch(at, sizeof(T), true)) return;
    threads[current].accesses.push_back(
        {reinterpret_cast<unsigned char*>(at) - shared_memory, sizeof(T)});
    *at = value;
}

// The driver's functions that the launcher calls, and some to set and to read the emulation.
#define EMULATED(kernel) \
    static void emulation::run_kernel() { emulation::call(kernel); }

extern "C" {

void emulation_reset(int seed) {
    emulation::random_order.seed(seed);
    emulation::fault.clear();
    emulation::allowed.clear();
    emulation::conflicts = 0;
}

void emulation_allow(const void* start, long bytes) {
    emulation::allowed.push_back({static_cast<const unsigned char*>(start), bytes});
}

const char* emulation_fault() { return emulation::fault.c_str(); }

long emulation_conflicts() { return emulation::conflicts; }

int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }

int cuDevicePrimaryCtxRetain(void** context, int) { return *context = context, 0; }

int cuCtxPushCurrent_v2(void*) { return emulation::contexts++, 0; }

int cuCtxPopCurrent_v2(void**) { return emulation::contexts-- < 1; }

int cuModuleLoadData(void** module, const void*) {
    return *module = module, emulation::contexts != 1;
}

int cuModuleGetFunction(void** function, void*, const char*) { return *function = function, 0; }

int cuFuncSetAttribute(void*, int attribute, int value) {
    emulation::max_shared = value;
    return attribute != 8 || value > 227 << 10;
}

int cuLaunchKernel(void*, u32 grid, u32 grid_y, u32 grid_z, u32 block, u32 block_y, u32 block_z,
                   u32 shared, void*, void** arguments, void** extra) {
    if (grid_y * grid_z * block_y * block_z != 1 || block % 32 || block > 1024 || extra) return 1;
    if (!grid || shared > emulation::max_shared || emulation::contexts != 1) return 1;
    emulation::arguments = arguments, emulation::shared_bytes = shared, blockDim.x = block;
    for (blockIdx.x = 0; blockIdx.x < grid && emulation::fault.empty(); blockIdx.x++)
        emulation::run_block(block);
    return 0;
}

int cuGetErrorString(int, const char** text) { return *text = "refused by the emulation", 0; }
}
