// The twin of asyncload/quant/cuda/device.cu for a host compiler: one thread that does the work of all.

#include <cmath>
#include <cstdint>
#include <cstring>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE inline
#define CONSTANT static const
#define GLOBAL extern "C" void
#define __shared__ static

struct Index {
    u32 x;
};
static const Index threadIdx{0}, blockIdx{0}, blockDim{1}, gridDim{1};

DEVICE void __syncthreads() {}

// Where loads may read; those that read elsewhere are counted.
extern "C" {
u64 readable_begin, readable_end, read_elsewhere;
}

inline void check_load(const u8 *address, u32 nbytes)
{
    u64 begin = (u64)address;
    if (begin % nbytes)
        __builtin_trap();
    read_elsewhere += begin < readable_begin || begin + nbytes > readable_end;
}

DEVICE u32 load_byte(const u8 *address)
{
    check_load(address, 1);
    return *address;
}

DEVICE u32 load_aligned_pair(const u8 *address)
{
    check_load(address, 2);
    return address[0] | (u32)address[1] << 8;
}

template <int N> DEVICE void load_aligned_words(const u8 *address, u32 (&words)[N])
{
    check_load(address, 4 * N);
    std::memcpy(words, address, 4 * N);
}

DEVICE void store_aligned_words(u8 *target, u32 a, u32 b, u32 c, u32 d)
{
    u32 words[4] = {a, b, c, d};
    if ((u64)target % 16)
        __builtin_trap();
    std::memcpy(target, words, 16);
}

DEVICE float as_float(u32 bits)
{
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

DEVICE u32 as_bits(float value)
{
    u32 bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

DEVICE float fused(float a, float b, float c) { return std::fma(a, b, c); }

DEVICE u32 pick_bytes(u32 low, u32 high, u32 selector)
{
    u64 bytes = low | (u64)high << 32;
    u32 picked = 0;
    for (int i = 0; i < 4; i++)
        picked |= (u32)(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xFF) << (8 * i);
    return picked;
}

DEVICE u32 shift_right(u32 low, u32 high, u32 shift) { return (u32)((low | (u64)high << 32) >> (shift & 31)); }

DEVICE u32 parity(u32 bits) { return (u32)__builtin_parity(bits); }

DEVICE float half_to_float(u32 half)
{
    u32 exponent = half >> 10 & 31, mantissa = half & 0x3FF, sign = (half & 0x8000) << 16;
    if (exponent == 31)
        return as_float(sign | 0x7F800000 | mantissa << 13);
    float magnitude = std::ldexp((float)(exponent ? mantissa | 0x400 : mantissa), (exponent ? (int)exponent : 1) - 25);
    return as_float(sign | as_bits(magnitude));
}

DEVICE float double_to_float(u32 low, u32 high)
{
    u64 bits = low | (u64)high << 32;
    double value;
    std::memcpy(&value, &bits, 8);
    return (float)value;
}

// To the nearest, ties to even, by counting in units of the last place that float16 has there.
inline u32 float16_bits(float value)
{
    u32 sign = as_bits(value) >> 16 & 0x8000;
    float magnitude = std::fabs(value);
    if (std::isnan(value))
        return sign | 0x7E00;
    if (magnitude >= 65520.0f)
        return sign | 0x7C00;
    if (magnitude < 0x1p-14f)
        return sign | (u32)std::nearbyint(std::ldexp(magnitude, 24));
    int exponent = std::ilogb(magnitude);
    return sign | (((u32)(exponent + 14) << 10) + (u32)std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
}

inline u32 bfloat16_bits(float value)
{
    u32 bits = as_bits(value);
    return (std::isnan(value) ? bits | 0x400000 : bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

DEVICE u32 pack_float16(float low, float high) { return float16_bits(low) | float16_bits(high) << 16; }

DEVICE u32 pack_bfloat16(float low, float high) { return bfloat16_bits(low) | bfloat16_bits(high) << 16; }
