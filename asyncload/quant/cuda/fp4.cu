// Codes of 4-bit floats (a sign, two bits of exponent, one of mantissa; the table holds them doubled) under a scale of
// 8 bits, which is halved instead.
// The blocks are those of ggml-common.h, the values those of dequantize_row_* in ggml-quants.c
// (https://github.com/ggml-org/ggml/tree/master/src).

// A scale that is a power of two, its exponent biased by 127; 16 bytes of codes, the lower nibbles first.
struct MXFP4 : Block<MXFP4, 32, 17, 2> {
    template <class Bytes, class Target> static DEVICE void decode(Bytes block, u32 part, const u64 *, Target target)
    {
        u32 exponent = load_byte(block);
        float d = as_float(exponent < 2 ? 0x00200000u << exponent : (exponent - 1) << 23);
        Codes lower, upper;
        Values{MXFP4_VALUES}.find(load_codes(block + 1 + 8 * part), lower, upper);
        target.store(8 * part, [&](int i) { return lower.value(i, 128) * d; });
        target.store(8 * part + 16, [&](int i) { return upper.value(i, 128) * d; });
    }
};

// Four groups of 16: their scales of four bits of exponent, biased by 7, and three of mantissa (0x7F counts as zero);
// 32 bytes of codes, a group's lower nibbles first.
struct NVFP4 : Block<NVFP4, 64, 36, 8> {
    static DEVICE float scale(u32 bits)
    {
        u32 exponent = (bits >> 3) & 15, mantissa = bits & 7;
        float subnormal = (float)mantissa * 0x1p-10f;
        float normal = as_float((exponent + 127 - 8) << 23 | mantissa << 20);
        return bits == 0x7F ? 0.0f : exponent == 0 ? subnormal : normal;
    }

    template <class Bytes, class Target> static DEVICE void decode(Bytes block, u32 part, const u64 *, Target target)
    {
        u32 group = part / 2;
        float d = scale(load_byte(block + group));
        Codes lower, upper;
        Values{NVFP4_VALUES}.find(load_codes<4>(block + 4 + 8 * group), lower, upper);
        Codes q = part % 2 ? upper : lower;
        target.store(8 * part, [&](int i) { return q.value(i, 128) * d; });
    }
};
