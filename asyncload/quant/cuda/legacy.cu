// The first quantized types: 32 weights a block, one scale d, and in some a minimum m, in float16.
// The blocks are those of ggml-common.h, the values those of dequantize_row_* in ggml-quants.c
// (https://github.com/ggml-org/ggml/tree/master/src).
//
// Of 16 bytes of codes, the lower nibbles are weights 0 to 15, the upper ones 16 to 31: a thread takes eight bytes.

// d * (q - 8): d, 16 bytes of codes.
struct Q4_0 : Block<Q4_0, 32, 18, 2> {
    template <class Bytes, class Target> static DEVICE void decode(Bytes block, u32 part, const u64 *, Target target)
    {
        float d = load_half(block);
        Codes codes = load_codes(block + 2 + 8 * part);
        Codes lower = lower_nibbles(codes), upper = upper_nibbles(codes);
        target.store(8 * part, [&](int i) { return lower.value(i, 8) * d; });
        target.store(8 * part + 16, [&](int i) { return upper.value(i, 8) * d; });
    }
};

// d * q + m: d, m, 16 bytes of codes.
struct Q4_1 : Block<Q4_1, 32, 20, 2> {
    template <class Bytes, class Target> static DEVICE void decode(Bytes block, u32 part, const u64 *, Target target)
    {
        u32 halves = load_word<4>(block);
        float d = half_to_float(halves), m = half_to_float(halves >> 16);
        Codes codes = load_codes<4>(block + 4 + 8 * part);
        Codes lower = lower_nibbles(codes), upper = upper_nibbles(codes);
        target.store(8 * part, [&](int i) { return fused(lower.value(i), d, m); });
        target.store(8 * part + 16, [&](int i) { return fused(upper.value(i), d, m); });
    }
};

// The eight codes of five bits that a part's lower and upper nibbles begin.
struct FiveBits {
    Codes lower, upper;

    DEVICE FiveBits(u32 fifth, Codes codes, u32 part)
    {
        fifth >>= 8 * part;
        lower = lower_nibbles(codes) | spread(fifth) << 4;
        upper = upper_nibbles(codes) | spread(fifth >> 16) << 4;
    }
};

// d * (q - 16): d, the fifth bits of all codes, 16 bytes of codes.
struct Q5_0 : Block<Q5_0, 32, 22, 2> {
    template <class Bytes, class Target> static DEVICE void decode(Bytes block, u32 part, const u64 *, Target target)
    {
        float d = load_half(block);
        FiveBits codes(load_word(block + 2), load_codes(block + 6 + 8 * part), part);
        target.store(8 * part, [&](int i) { return codes.lower.value(i, 16) * d; });
        target.store(8 * part + 16, [&](int i) { return codes.upper.value(i, 16) * d; });
    }
};

// d * q + m: d, m, the fifth bits of all codes, 16 bytes of codes.
struct Q5_1 : Block<Q5_1, 32, 24, 2> {
    template <class Bytes, class Target> static DEVICE void decode(Bytes block, u32 part, const u64 *, Target target)
    {
        Words<2> head = load_words<2, 8>(block);
        float d = half_to_float(head.word[0]), m = half_to_float(head.word[0] >> 16);
        FiveBits codes(head.word[1], load_codes<8>(block + 8 + 8 * part), part);
        target.store(8 * part, [&](int i) { return fused(codes.lower.value(i), d, m); });
        target.store(8 * part + 16, [&](int i) { return fused(codes.upper.value(i), d, m); });
    }
};

// d * q: d, 32 signed bytes.
struct Q8_0 : Block<Q8_0, 32, 34, 4> {
    template <class Bytes, class Target> static DEVICE void decode(Bytes block, u32 part, const u64 *, Target target)
    {
        float d = load_half(block);
        Codes codes = signed_codes(load_codes(block + 2 + 8 * part));
        target.store(8 * part, [&](int i) { return codes.value(i, 128) * d; });
    }
};
