// One to two bits a weight without a grid: d * (q - 1), or d and -d.
// The blocks are those of ggml-common.h, the values those of dequantize_row_* in ggml-quants.c
// (https://github.com/ggml-org/ggml/tree/master/src).

// 48 bytes of five ternary digits each, 4 bytes of four, d. A byte is a fraction of 256 in base three: times 3^n it
// loses the n digits before, and times 3 once more the next one is what is carried out of it. Digit n of 32 bytes, or of
// the 16 after them, or of the last 4, is that of as many weights.
struct TQ1_0 : Block<TQ1_0, 256, 54, 16> {
    // The digits of bytes 0 and 2 of a word.
    static DEVICE u32 digits_of_two(u32 word, u32 power)
    {
        word = ((word & 0x00FF00FF) * power) & 0x00FF00FF;
        return ((word * 3) >> 8) & 0x00FF00FF;
    }

    static DEVICE u32 digits(u32 word, u32 power)
    {
        return digits_of_two(word, power) | digits_of_two(word >> 8, power) << 8;
    }

    // Ten threads take a digit of 16 of the first 32 bytes, five one of the 16 bytes; the last takes the last 4 bytes.
    template <class Bytes, class Target> static DEVICE void decode(Bytes block, u32 part, const u64 *, Target target)
    {
        bool last = part == 15;
        u32 row = part < 10 ? part / 2 : part - 10, column = part < 10 ? 8 * (part % 2) : 32;
        u32 step = part < 10 ? 16 : 8, position = part < 10 ? 32 * row + column : 160 + 16 * row;
        u32 power = (u32)(0x511B090301ull >> (8 * row)) & 0xFF;
        float d = load_half(block + 52);
        Codes first = load_codes(block + (last ? 46 : column)), second = load_codes(block + (last ? 46 : column + step));
        if (last)
            first.low = first.high = second.low = second.high = shift_right(first.low, first.high, 16);
        first = {digits(first.low, last ? 1 : power), digits(first.high, last ? 3 : power)};
        second = {digits(second.low, last ? 9 : power), digits(second.high, last ? 27 : power)};
        target.store(position, [&](int i) { return first.value(i, 1) * d; });
        target.store(position + step, [&](int i) { return second.value(i, 1) * d; });
    }
};

// 64 bytes of codes as in Q2_K, d.
struct TQ2_0 : Block<TQ2_0, 256, 66, 8> {
    template <class Bytes, class Target> static DEVICE void decode(Bytes block, u32 part, const u64 *, Target target)
    {
        u32 half = part / 4, column = part % 4;
        Codes codes = load_codes(block + 32 * half + 8 * column);
        float d = load_half(block + 64);
#pragma unroll
        for (int row = 0; row < 4; row++) {
            Codes q = (codes >> (2 * row)) & 3;
            target.store(128 * half + 32 * row + 8 * column, [&](int i) { return q.value(i, 1) * d; });
        }
    }
};

// d, 16 bytes of bits: d where set, else -d.
struct Q1_0 : Block<Q1_0, 128, 18, 16> {
    template <class Bytes, class Target> static DEVICE void decode(Bytes block, u32 part, const u64 *, Target target)
    {
        float d = load_half(block);
        u32 negative = ~load_byte(block + 2 + part);
        target.store(8 * part, [&](int i) { return negate_where(d, negative, i); });
    }
};

// d, 16 bytes of codes of two bits, in order.
struct Q2_0 : Block<Q2_0, 64, 18, 8> {
    template <class Bytes, class Target> static DEVICE void decode(Bytes block, u32 part, const u64 *, Target target)
    {
        float d = load_half(block);
        u32 codes = load_pair(block + 2 + 2 * part);
        // weights i and i + 4 have the same bits of their bytes
        Codes q = {(codes & 3) | (codes & 12) << 6 | (codes & 48) << 12 | (codes & 192) << 18, 0};
        codes >>= 8;
        q.high = (codes & 3) | (codes & 12) << 6 | (codes & 48) << 12 | (codes & 192) << 18;
        target.store(8 * part, [&](int i) { return q.value(i, 1) * d; });
    }
};
