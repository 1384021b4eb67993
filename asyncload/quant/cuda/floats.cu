// Plain floats: each weight by itself, so a piece of a tensor may start and end at any of them.

// A thread takes eight weights, of which the first one does without `before`, so that the stores are aligned to 16 bytes;
// the last may have fewer too.
template <class Type, class Number, bool ALIGNED>
DEVICE void convert_each(const u8 *source, u8 *target, u64 count, u64 before)
{
    u64 threads = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; 8 * i < count + before; i += threads) {
        u64 begin = 8 * i < before ? 0 : 8 * i - before, end = 8 * i + 8 - before;
        if (end - begin == 8 && end <= count) {
            Bytes<ALIGNED> bytes{source + begin * Type::NBYTES};
            Words<2 * Type::NBYTES> words = load_words<2 * Type::NBYTES, 16>(bytes);
            Target<Number>{target + begin * Number::SIZE}.store(0, [&](int k) { return Type::value(words.word, k); });
            continue;
        }
        for (u64 k = begin; k < end && k < count; k++) {
            u32 words[2] = {0, 0};
#pragma unroll
            for (u32 n = 0; n < Type::NBYTES; n++)
                words[n / 4] |= load_byte(source + k * Type::NBYTES + n) << (8 * (n % 4));
            Number::store_one(target + k * Number::SIZE, Type::value(words, 0));
        }
    }
}

template <class Type, class Number> DEVICE void convert(const u8 *source, u8 *target, u64 count)
{
    u64 before = ((u64)target & 15) / Number::SIZE;
    if (before == 0 && (u64)source % 16 == 0)
        convert_each<Type, Number, true>(source, target, count, 0);
    else
        convert_each<Type, Number, false>(source, target, count, before);
}

template <class Type, int nbytes> struct Plain {
    static const int NBYTES = nbytes;

    template <class Number> static DEVICE void run(const u8 *source, u8 *target, u64 count)
    {
        convert<Type, Number>(source, target, count);
    }
};

struct F64 : Plain<F64, 8> {
    static DEVICE float value(const u32 *words, int i) { return double_to_float(words[2 * i], words[2 * i + 1]); }
};

struct F32 : Plain<F32, 4> {
    static DEVICE float value(const u32 *words, int i) { return as_float(words[i]); }
};

struct F16 : Plain<F16, 2> {
    static DEVICE float value(const u32 *words, int i) { return half_to_float(words[i / 2] >> (16 * (i % 2))); }
};

// The upper half of a float32.
struct BF16 : Plain<BF16, 2> {
    static DEVICE float value(const u32 *words, int i)
    {
        return as_float(i % 2 ? words[i / 2] & 0xFFFF0000 : words[i / 2] << 16);
    }
};
