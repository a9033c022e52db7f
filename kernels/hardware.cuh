// The primitives of device.cuh as instructions of the GPU. Include device.cuh, not this.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace pyruntime {

using Float16 = __half;
using Bfloat16 = __nv_bfloat16;

__device__ inline int thread_idx() {
    return static_cast<int>(threadIdx.x);
}
__device__ inline int num_threads() {
    return static_cast<int>(blockDim.x);
}
__device__ inline int block_idx() {
    return static_cast<int>(blockIdx.x);
}
__device__ inline int block_idx_y() {
    return static_cast<int>(blockIdx.y);
}
__device__ inline int block_idx_z() {
    return static_cast<int>(blockIdx.z);
}
__device__ inline int num_blocks() {
    return static_cast<int>(gridDim.x);
}

// the block's dynamic shared memory, aligned to 16 bytes
__device__ inline unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char pyruntime_shared_memory[];
    return pyruntime_shared_memory;
}
__device__ inline void sync_threads() {
    __syncthreads();
}
__device__ inline void sync_warp() {
    __syncwarp();
}

__device__ inline float to_float(float value) {
    return value;
}
__device__ inline float to_float(Float16 value) {
    return __half2float(value);
}
__device__ inline float to_float(Bfloat16 value) {
    return __bfloat162float(value);
}
// to the nearest, ties to even
template <typename T>
__device__ inline T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
    return value;
}
template <>
__device__ inline Float16 from_float<Float16>(float value) {
    return __float2half_rn(value);
}
template <>
__device__ inline Bfloat16 from_float<Bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}
// the two elements of a word, the lower address first
template <typename T>
__device__ inline Pair unpack(std::uint32_t word);
template <>
__device__ inline Pair unpack<Float16>(std::uint32_t word) {
    const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&word));
    return {both.x, both.y};
}
template <>
__device__ inline Pair unpack<Bfloat16>(std::uint32_t word) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
template <typename T>
__device__ inline std::uint32_t pack(float low, float high);
template <>
__device__ inline std::uint32_t pack<Float16>(float low, float high) {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const std::uint32_t*>(&both);
}
template <>
__device__ inline std::uint32_t pack<Bfloat16>(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const std::uint32_t*>(&both);
}

template <typename T>
__device__ inline T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <typename T>
__device__ inline T shuffle_down(T value, int offset) {
    return __shfl_down_sync(0xffffffffu, value, offset);
}
// the value of lane `lane`
template <typename T>
__device__ inline T shuffle(T value, int lane) {
    return __shfl_sync(0xffffffffu, value, lane);
}

// what another kernel may have written. Never through the non-coherent path: its writer may still run when this starts.
template <typename T>
__device__ inline T load_input(const T* from) {
    return *from;
}
__device__ inline Words load_input_16(const void* from) {
    return *static_cast<const Words*>(from);
}
// past L1, for what other blocks of this launch wrote
__device__ inline float load_l2(const float* from) {
    return __ldcg(from);
}
__device__ inline Words load_l2_16(const void* from) {
    const uint4 words = __ldcg(static_cast<const uint4*>(from));
    return {{words.x, words.y, words.z, words.w}};
}
template <typename T>
__device__ inline void store(T* to, T value) {
    *to = value;
}
__device__ inline void store_16(void* to, Words value) {
    *static_cast<Words*>(to) = value;
}
// shared memory or registers; global memory only where nothing writes it while the kernel runs
__device__ inline Words load_16(const void* from) {
    return *static_cast<const Words*>(from);
}

// L2 may drop these lines first: weights are read once a step
__device__ inline std::uint64_t evict_first() {
    std::uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
// weights: constant while the kernel runs, read once
__device__ inline Words load_weights_16(const void* from) {
    Words out;
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(out.word[0]), "=r"(out.word[1]), "=r"(out.word[2]), "=r"(out.word[3])
                 : "l"(from), "l"(evict_first()));
    return out;
}
// a hint: brings 128 bytes of weights into L2
__device__ inline void prefetch_l2(const void* from) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

__device__ inline std::uint32_t shared_address(const void* shared) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
}
// 16 bytes to shared memory, zeros where not `valid` (then `from` is any address, and is not read). They are there for
// this thread after wait_copies, for others after a barrier behind that.
__device__ inline void copy_async_weights(void* shared, const void* from, bool valid = true) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared_address(shared)),
                 "l"(from), "r"(valid ? 16 : 0), "l"(evict_first())
                 : "memory");
}
__device__ inline void copy_async_input(void* shared, const void* from, bool valid = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
// ends a group of copies; empty groups count
__device__ inline void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// until at most `kPending` of this thread's newest groups are under way
template <int kPending>
__device__ inline void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// 8x8 matrices of 16-bit elements from shared memory. Lanes 8m..8m+7 give the addresses of the 8 rows of matrix m; lane
// l gets elements 2*(l%4) and the next of row l/4 of each; transposed: of column l/4.
__device__ inline void load_matrix_x4(std::uint32_t (&out)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ inline void load_matrix_x4_transposed(std::uint32_t (&out)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ inline void load_matrix_x2(std::uint32_t (&out)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ inline void load_matrix_x2_transposed(std::uint32_t (&out)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(shared_address(row))
                 : "memory");
}

// sums [16, 8] += a [16, 16] @ b [16, 8]. Lane l holds, with g = l/4 and t = 2*(l%4), pairs of neighbours:
// a: (g, t), (g+8, t), (g, t+8), (g+8, t+8); b: (t, g), (t+8, g), neighbours along k; sums: (g, t), (g, t+1), (g+8, t),
// (g+8, t+1).
template <typename T>
__device__ inline void matrix_multiply(float (&sums)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);
template <>
__device__ inline void matrix_multiply<Float16>(float (&sums)[4], const std::uint32_t (&a)[4],
                                                const std::uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ inline void matrix_multiply<Bfloat16>(float (&sums)[4], const std::uint32_t (&a)[4],
                                                 const std::uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// returns what was there before; releases and acquires among all threads of the GPU
__device__ inline std::uint32_t atomic_add_acq_rel(std::uint32_t* to, std::uint32_t value) {
    std::uint32_t before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(to), "r"(value) : "memory");
    return before;
}
__device__ inline std::uint32_t load_acquire(const std::uint32_t* from) {
    std::uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
    return value;
}

// Until the kernel in front has ended and its writes are visible. Every thread calls it, above its first load_input and
// its first store. Where the launch was not an early one it returns at once.
__device__ inline void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// the next kernel's blocks may start where there is room; they wait for this one to end before they read
__device__ inline void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// whether all blocks of a launch run at once, as they must where they wait for each other
template <typename Params>
int check_cooperative(void (*kernel)(Params), const LaunchShape& shape) {
    int device = 0, num_sms = 0, per_sm = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess) {
        status = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
    }
    if (status == cudaSuccess) {
        status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, static_cast<int>(shape.threads),
                                                               shape.shared_bytes);
    }
    if (status != cudaSuccess) {
        return status;
    }
    const bool fits = shape.blocks * shape.blocks_y * shape.blocks_z <= static_cast<unsigned>(num_sms * per_sm);
    return fits ? cudaSuccess : cudaErrorCooperativeLaunchTooLarge;
}

// returns a cudaError_t
template <typename Params>
int launch(const char*, void (*kernel)(Params), const LaunchShape& shape, const Params& params, void* stream) {
    constexpr std::size_t kWithoutAsking = 48 * 1024;
    if (shape.shared_bytes > kWithoutAsking) {
        cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                  static_cast<int>(shape.shared_bytes));
        if (status == cudaSuccess) {
            // all of them ask for the same division of L1: blocks of two kernels share a processor only where it is one
            status = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                          cudaSharedmemCarveoutMaxShared);
        }
        if (status != cudaSuccess) {
            return status;
        }
    }
    if (shape.cooperative) {
        const int status = check_cooperative(kernel, shape);
        if (status != cudaSuccess) {
            return status;
        }
    }
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeCooperative;
    attributes[1].val.cooperative = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(shape.blocks, shape.blocks_y, shape.blocks_z);
    config.blockDim = dim3(shape.threads);
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = shape.early ? attributes : attributes + 1;
    config.numAttrs = (shape.early ? 1u : 0u) + (shape.cooperative ? 1u : 0u);
    return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace pyruntime
