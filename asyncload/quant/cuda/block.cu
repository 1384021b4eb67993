// The vocabulary in which a type reads like its definition, and the kernel around it.
//
// A type is a struct of
//   WEIGHTS, NBYTES     of a block;
//   PARTS               the threads that share one, a power of two;
//   GRID                the words of the table that its codes point into, which fill_grid writes, or 0;
//   decode(block, part, grid, target)
//                       which stores a part's weights in runs of eight.
// Blocks may lie at any address. Only the aligned words of four bytes that hold some of their bytes are read.

// Eight bytes, most often eight codes; operators act on each byte and must not carry into the next.
struct Codes {
    u32 low, high;

    DEVICE u32 word(int index) const { return index < 4 ? low : high; }

    DEVICE u32 byte(int index) const { return (word(index) >> (8 * (index & 3))) & 0xFF; }

    // A byte less `bias`, exactly: it becomes the last bits of a float of 2^23 and more.
    DEVICE float value(int index, int bias = 0) const
    {
        return as_float(pick_bytes(word(index), 0x4B000000, 0x7440 | (index & 3))) - (8388608.0f + (float)bias);
    }
};

DEVICE Codes operator&(Codes codes, u32 mask)
{
    mask *= 0x01010101;
    return {codes.low & mask, codes.high & mask};
}
DEVICE Codes operator^(Codes codes, u32 mask)
{
    mask *= 0x01010101;
    return {codes.low ^ mask, codes.high ^ mask};
}
DEVICE Codes operator|(Codes a, Codes b) { return {a.low | b.low, a.high | b.high}; }
// These shift bits from one byte into the next: mask them.
DEVICE Codes operator>>(Codes codes, u32 bits) { return {codes.low >> bits, codes.high >> bits}; }
DEVICE Codes operator<<(Codes codes, u32 bits) { return {codes.low << bits, codes.high << bits}; }

DEVICE Codes lower_nibbles(Codes codes) { return codes & 0x0F; }
DEVICE Codes upper_nibbles(Codes codes) { return (codes >> 4) & 0x0F; }

// Eight bits, one to a byte.
DEVICE u32 spread_four(u32 bits) { return ((bits & 15) * 0x00204081) & 0x01010101; }
DEVICE Codes spread(u32 bits) { return {spread_four(bits), spread_four(bits >> 4)}; }

// Signed bytes: their values are value(index, 128).
DEVICE Codes signed_codes(Codes codes) { return codes ^ 0x80; }

// Where bytes lie. Where ALIGNED, a block lies at a multiple of what divides its size (of 16 at most).
template <bool ALIGNED> struct Bytes {
    const u8 *address;

    DEVICE Bytes operator+(u32 offset) const { return {address + offset}; }
};

template <int N> struct Words {
    u32 word[N];
};

// 4 * N bytes. UNIT divides their address where blocks are ALIGNED: from 4 on it is the size of loads. Otherwise they
// are cut out of the words around them.
template <int N, int UNIT = 1, bool ALIGNED> DEVICE Words<N> load_words(Bytes<ALIGNED> bytes)
{
    Words<N> words;
    if constexpr (ALIGNED && UNIT >= 4) {
#pragma unroll
        for (int i = 0; i < N; i += UNIT / 4) {
            u32 loaded[UNIT / 4];
            load_aligned_words(bytes.address + 4 * i, loaded);
#pragma unroll
            for (int k = 0; k < UNIT / 4; k++)
                words.word[i + k] = loaded[k];
        }
    } else {
        u32 skew = (u32)(u64)bytes.address & 3, last = (4 * N - 1 + skew) & ~3u;
        u32 around[N + 1][1];
#pragma unroll
        for (int i = 0; i < N; i++)
            load_aligned_words(bytes.address - skew + 4 * i, around[i]);
        load_aligned_words(bytes.address - skew + last, around[N]);
#pragma unroll
        for (int i = 0; i < N; i++)
            words.word[i] = shift_right(around[i][0], around[i + 1][0], 8 * skew);
    }
    return words;
}

template <int UNIT = 1, bool ALIGNED> DEVICE u32 load_word(Bytes<ALIGNED> bytes)
{
    return load_words<1, UNIT>(bytes).word[0];
}

template <int UNIT = 1, bool ALIGNED> DEVICE Codes load_codes(Bytes<ALIGNED> bytes)
{
    Words<2> words = load_words<2, UNIT>(bytes);
    return {words.word[0], words.word[1]};
}

template <bool ALIGNED> DEVICE u32 load_byte(Bytes<ALIGNED> bytes) { return load_byte(bytes.address); }

// Two bytes, at an even address where blocks are ALIGNED.
template <bool ALIGNED> DEVICE u32 load_pair(Bytes<ALIGNED> bytes)
{
    if constexpr (ALIGNED)
        return load_aligned_pair(bytes.address);
    return load_byte(bytes) | load_byte(bytes + 1) << 8;
}

template <bool ALIGNED> DEVICE float load_half(Bytes<ALIGNED> bytes) { return half_to_float(load_pair(bytes)); }

// Sixteen values of 8 bits, and what codes of four bits make of them; kept with a bias of 128.
struct Values {
    u32 word[4];

    DEVICE u32 find_four(u32 nibbles) const
    {
        u32 first = pick_bytes(word[0], word[1], nibbles & 0x7777);
        u32 last = pick_bytes(word[2], word[3], nibbles & 0x7777);
        return pick_bytes(first, last, 0x3210 | ((nibbles & 0x8888) >> 1));
    }

    // Of the lower and of the upper nibbles of eight bytes.
    DEVICE void find(Codes codes, Codes &lower, Codes &upper) const
    {
        u32 a = find_four(codes.low), b = find_four(codes.low >> 16);
        u32 c = find_four(codes.high), d = find_four(codes.high >> 16);
        lower = {pick_bytes(a, b, 0x6420), pick_bytes(c, d, 0x6420)};
        upper = {pick_bytes(a, b, 0x7531), pick_bytes(c, d, 0x7531)};
    }
};

// The number, or its negative where the bit is set.
DEVICE float negate_where(float value, u32 bits, int index)
{
    return as_float(as_bits(value) ^ ((bits << (31 - index)) & 0x80000000));
}

// What weights become; each stores a run of eight.
struct float32 {
    static const int SIZE = 4;

    static DEVICE void store(u8 *target, const float (&v)[8])
    {
        store_aligned_words(target, as_bits(v[0]), as_bits(v[1]), as_bits(v[2]), as_bits(v[3]));
        store_aligned_words(target + 16, as_bits(v[4]), as_bits(v[5]), as_bits(v[6]), as_bits(v[7]));
    }

    static DEVICE void store_one(u8 *target, float value) { *(float *)target = value; }
};

struct float16 {
    static const int SIZE = 2;

    static DEVICE void store(u8 *target, const float (&v)[8])
    {
        store_aligned_words(target, pack_float16(v[0], v[1]), pack_float16(v[2], v[3]), pack_float16(v[4], v[5]),
                            pack_float16(v[6], v[7]));
    }

    static DEVICE void store_one(u8 *target, float value) { *(u16 *)target = (u16)pack_float16(value, value); }
};

struct bfloat16 {
    static const int SIZE = 2;

    static DEVICE void store(u8 *target, const float (&v)[8])
    {
        store_aligned_words(target, pack_bfloat16(v[0], v[1]), pack_bfloat16(v[2], v[3]), pack_bfloat16(v[4], v[5]),
                            pack_bfloat16(v[6], v[7]));
    }

    static DEVICE void store_one(u8 *target, float value) { *(u16 *)target = (u16)pack_bfloat16(value, value); }
};

// Where the weights of one block go.
template <class Number> struct Target {
    u8 *start;

    // Eight weights from `position` on: what `weight` says for 0 to 7.
    template <class Weight> DEVICE void store(u32 position, Weight weight) const
    {
        float values[8];
#pragma unroll
        for (int i = 0; i < 8; i++)
            values[i] = weight(i);
        Number::store(start + position * Number::SIZE, values);
    }
};

template <class Type, class Number, bool ALIGNED>
DEVICE void decode_each(const u8 *source, u8 *target, u64 count, const u64 *grid)
{
    u64 threads = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < count * Type::PARTS; i += threads) {
        u64 block = i / Type::PARTS;
        Bytes<ALIGNED> bytes{source + block * Type::NBYTES};
        Target<Number> weights{target + block * (Type::WEIGHTS * Number::SIZE)};
        Type::decode(bytes, (u32)i % Type::PARTS, grid, weights);
    }
}

// Any number of threads decodes any number of blocks; the target is aligned to 16 bytes.
template <class Type, class Number> DEVICE void decode_blocks(const u8 *source, u8 *target, u64 count)
{
    __shared__ u64 grid[Type::GRID / 2 + 1];
    if (Type::GRID > 0) {
        for (u32 i = threadIdx.x; i < Type::GRID; i += blockDim.x)
            ((u32 *)grid)[i] = Type::grid_word(i);
        __syncthreads();
    }
    const u32 divisor = Type::NBYTES & -Type::NBYTES, alignment = divisor < 16 ? divisor : 16;
    if (alignment > 1 && (u64)source % alignment == 0)
        decode_each<Type, Number, (alignment > 1)>(source, target, count, grid);
    else
        decode_each<Type, Number, false>(source, target, count, grid);
}

#define KERNEL(TYPE, NUMBER)                                                                                           \
    GLOBAL decode_##TYPE##_##NUMBER(const u8 *source, u8 *target, u64 count)                                           \
    {                                                                                                                  \
        TYPE::run<NUMBER>(source, target, count);                                                                      \
    }

// What the structs of blocks have in common.
template <class Type, int weights, int nbytes, int parts, int grid = 0> struct Block {
    static const int WEIGHTS = weights, NBYTES = nbytes, PARTS = parts, GRID = grid;

    static DEVICE u32 grid_word(u32) { return 0; }

    template <class Number> static DEVICE void run(const u8 *source, u8 *target, u64 count)
    {
        decode_blocks<Type, Number>(source, target, count);
    }
};
