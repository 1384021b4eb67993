// What the processor does for the kernels; no header is needed. Everything else is plain C++, so that a twin of this
// file lets a host compiler build the same kernels.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__
#define CONSTANT __device__ const
#define GLOBAL extern "C" __global__ void __launch_bounds__(256)

// What no kernel writes may come from caches that do not see writes.
DEVICE u32 load_byte(const u8 *address) { return __ldg(address); }

DEVICE u32 load_aligned_pair(const u8 *address) { return __ldg((const u16 *)address); }

template <int N> DEVICE void load_aligned_words(const u8 *address, u32 (&words)[N])
{
    if constexpr (N == 4) {
        uint4 loaded = __ldg((const uint4 *)address);
        words[0] = loaded.x, words[1] = loaded.y, words[2] = loaded.z, words[3] = loaded.w;
    } else if constexpr (N == 2) {
        uint2 loaded = __ldg((const uint2 *)address);
        words[0] = loaded.x, words[1] = loaded.y;
    } else {
        words[0] = __ldg((const u32 *)address);
    }
}

DEVICE void store_aligned_words(u8 *target, u32 a, u32 b, u32 c, u32 d) { *(uint4 *)target = make_uint4(a, b, c, d); }

DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }

DEVICE u32 as_bits(float value) { return __float_as_uint(value); }

// a * b + c, rounded once.
DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// Four of the eight bytes of (low, high), by the low three bits of the selector's lowest four nibbles.
DEVICE u32 pick_bytes(u32 low, u32 high, u32 selector) { return __byte_perm(low, high, selector); }

// The word that starts `shift` < 32 bits into (low, high).
DEVICE u32 shift_right(u32 low, u32 high, u32 shift) { return __funnelshift_r(low, high, shift); }

DEVICE u32 parity(u32 bits) { return __popc(bits) & 1; }

// The lower 16 bits.
DEVICE float half_to_float(u32 half)
{
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((u16)half));
    return value;
}

DEVICE float double_to_float(u32 low, u32 high)
{
    return __double2float_rn(__hiloint2double((int)high, (int)low));
}

// Two numbers rounded to the nearest, ties to even; subnormals and infinities are kept, and NaN stays NaN.

DEVICE u32 pack_float16(float low, float high)
{
    u32 pair;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
    asm("{ .reg .b16 low, high; cvt.rn.f16.f32 low, %1; cvt.rn.f16.f32 high, %2; mov.b32 %0, {low, high}; }"
        : "=r"(pair)
        : "f"(low), "f"(high));
#endif
    return pair;
}

DEVICE u32 pack_bfloat16(float low, float high)
{
    u32 pair;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
    u32 bits[2] = {as_bits(low), as_bits(high)};
    for (u32 &number : bits)
        number = (number & 0x7FFFFFFF) > 0x7F800000 ? number | 0x400000 : number + ((number >> 16) & 1) + 0x7FFF;
    pair = pick_bytes(bits[0], bits[1], 0x7632);
#endif
    return pair;
}
