// The K types: 256 weights a block, in groups of 16 or 32 with integer scales, under one float16 scale for all.
// The blocks are those of ggml-common.h, the values those of dequantize_row_* in ggml-quants.c
// (https://github.com/ggml-org/ggml/tree/master/src).
//
// A product of a float16 scale, a 6-bit scale and a code is exact in float32, so fused() rounds as often as ggml does.

// d * q - m in groups of 16: 16 bytes of scales (lower nibbles) and minima, 64 of codes, d, m.
// 32 bytes of codes are 128 weights, two bits of each to 32 of them.
struct Q2_K : Block<Q2_K, 256, 84, 8> {
    template <class Bytes, class Target> static DEVICE void decode(Bytes block, u32 part, const u64 *, Target target)
    {
        u32 half = part / 4, column = part % 4;
        Codes codes = load_codes<4>(block + 16 + 32 * half + 8 * column);
        Codes factors = load_codes<4>(block + 8 * half) >> (8 * (column / 2));
        Codes scales = lower_nibbles(factors), minima = upper_nibbles(factors);
        u32 halves = load_word<4>(block + 80);
        float d = half_to_float(halves), m = half_to_float(halves >> 16);
#pragma unroll
        for (int row = 0; row < 4; row++) {
            float scale = d * scales.value(2 * row), minimum = m * minima.value(2 * row);
            Codes q = (codes >> (2 * row)) & 3;
            target.store(128 * half + 32 * row + 8 * column, [&](int i) { return fused(q.value(i), scale, -minimum); });
        }
    }
};

// d * (q - 4) in groups of 16: 32 bytes of third bits, 64 of codes as in Q2_K, 12 of 6-bit scales, d.
// Of the scales' bytes the first eight have the low four bits, the last four the high two.
struct Q3_K : Block<Q3_K, 256, 110, 8> {
    template <class Bytes, class Target> static DEVICE void decode(Bytes block, u32 part, const u64 *, Target target)
    {
        u32 half = part / 4, column = part % 4;
        Codes third = load_codes(block + 8 * column) >> (4 * half);
        Codes codes = load_codes(block + 32 + 32 * half + 8 * column);
        Words<3> packed = load_words<3>(block + 96);
        Codes first = {packed.word[0], packed.word[1]}, last = {packed.word[2], packed.word[2] >> 2};
        Codes scales = lower_nibbles(first >> (4 * half)) | ((last >> (4 * half)) & 3) << 4;
        scales = scales >> (8 * (column / 2));
        float d = load_half(block + 108);
#pragma unroll
        for (int row = 0; row < 4; row++) {
            float scale = d * scales.value(2 * row, 32);
            Codes q = ((codes >> (2 * row)) & 3) | ((third >> row) & 1) << 2;
            target.store(128 * half + 32 * row + 8 * column, [&](int i) { return q.value(i, 4) * scale; });
        }
    }
};

// What Q4_K and Q5_K begin with: d, m, and 12 bytes with a 6-bit scale and a 6-bit minimum for each of eight groups.
// Of the scales the first four are the low bits of bytes 0 to 3; the last four have their low four bits in the low
// halves of bytes 8 to 11, and their high two above the first four's. Minima: the same in bytes 4 to 7, and the high
// halves.
struct Linear {
    float scale[2], minimum[2];  // of the groups 2 * pair and 2 * pair + 1

    template <class Bytes> DEVICE Linear(Bytes block, u32 pair)
    {
        Words<4> head = load_words<4, 16>(block);
        float d = half_to_float(head.word[0]), m = half_to_float(head.word[0] >> 16);
        Codes first = {head.word[1], head.word[2]}, last = {head.word[3], head.word[3] >> 4};
        Codes both = pair < 2 ? first & 0x3F : lower_nibbles(last) | ((first >> 2) & 0x30);
        both = both >> (16 * (pair % 2));
        scale[0] = d * both.value(0);
        scale[1] = d * both.value(1);
        minimum[0] = m * both.value(4);
        minimum[1] = m * both.value(5);
    }

    DEVICE float operator()(float code, int group) const { return fused(code, scale[group], -minimum[group]); }
};

// d * q - m in groups of 32: 16 bytes of scales, then 128 bytes of codes, two groups to 32 bytes.
struct Q4_K : Block<Q4_K, 256, 144, 16> {
    template <class Bytes, class Target> static DEVICE void decode(Bytes block, u32 part, const u64 *, Target target)
    {
        u32 pair = part / 4, column = part % 4;
        Codes codes = load_codes<8>(block + 16 + 8 * part);
        Linear linear(block, pair);
        Codes lower = lower_nibbles(codes), upper = upper_nibbles(codes);
        target.store(64 * pair + 8 * column, [&](int i) { return linear(lower.value(i), 0); });
        target.store(64 * pair + 8 * column + 32, [&](int i) { return linear(upper.value(i), 1); });
    }
};

// d * q - m in groups of 32: as Q4_K, with 32 bytes before the codes whose bit n is group n's fifth bit.
struct Q5_K : Block<Q5_K, 256, 176, 16> {
    template <class Bytes, class Target> static DEVICE void decode(Bytes block, u32 part, const u64 *, Target target)
    {
        u32 pair = part / 4, column = part % 4;
        Codes codes = load_codes<8>(block + 48 + 8 * part);
        Codes fifth = load_codes<8>(block + 16 + 8 * column) >> (2 * pair);
        Linear linear(block, pair);
        Codes lower = lower_nibbles(codes) | (fifth & 1) << 4;
        Codes upper = upper_nibbles(codes) | ((fifth >> 1) & 1) << 4;
        target.store(64 * pair + 8 * column, [&](int i) { return linear(lower.value(i), 0); });
        target.store(64 * pair + 8 * column + 32, [&](int i) { return linear(upper.value(i), 1); });
    }
};

// d * (q - 32) in groups of 16: 128 bytes of low halves, 64 of high bit pairs, 16 signed scales, d.
struct Q6_K : Block<Q6_K, 256, 210, 8> {
    template <class Bytes, class Target> static DEVICE void decode(Bytes block, u32 part, const u64 *, Target target)
    {
        u32 half = part / 4, column = part % 4;
        Codes low[2] = {load_codes(block + 64 * half + 8 * column), load_codes(block + 64 * half + 32 + 8 * column)};
        Codes high = load_codes(block + 128 + 32 * half + 8 * column);
        Codes scales = signed_codes(load_codes(block + 192 + 8 * half)) >> (8 * (column / 2));
        float d = load_half(block + 208);
#pragma unroll
        for (int row = 0; row < 4; row++) {
            float scale = d * scales.value(2 * row, 128);
            Codes q = lower_nibbles(low[row % 2] >> (4 * (row / 2))) | ((high >> (2 * row)) & 3) << 4;
            target.store(128 * half + 32 * row + 8 * column, [&](int i) { return q.value(i, 32) * scale; });
        }
    }
};
