// The IQ types: codes that point into grids of eight or four magnitudes, or into 16 values.
// The blocks are those of ggml-common.h, the values those of dequantize_row_* in ggml-quants.c
// (https://github.com/ggml-org/ggml/tree/master/src). Grids and values are written before this file, from those of the
// gguf package; they lie in shared memory, as lanes look into them at random.
//
// A thread takes eight weights, the `line`-th of a group of 32.

// Eight magnitudes of the grid's entry `index`.
DEVICE Codes grid_line(const u64 *grid, u32 index) { return {(u32)grid[index], (u32)(grid[index] >> 32)}; }

// Seven signs and an eighth that makes the number of minus signs even.
DEVICE u32 even_signs(u32 seven) { return seven | parity(seven) << 7; }

// d * (scale + 1/2) / 4
DEVICE float quarter_scale(float d, u32 scale) { return d * (0.5f + (float)scale) * 0.25f; }

// d; for each group four indices of 8 bits, then four times seven signs and a scale of 4 bits.
struct IQ2_XXS : Block<IQ2_XXS, 256, 66, 32, 512> {
    static DEVICE u32 grid_word(u32 index) { return IQ2_XXS_GRID[index]; }

    template <class Bytes, class Target> static DEVICE void decode(Bytes block, u32 part, const u64 *grid, Target target)
    {
        u32 group = part / 4, line = part % 4;
        u32 packed = load_word(block + 2 + 8 * group + 4), signs = even_signs((packed >> (7 * line)) & 127);
        float d = quarter_scale(load_half(block), packed >> 28);
        Codes q = grid_line(grid, load_byte(block + 2 + 8 * group + line));
        target.store(8 * part, [&](int i) { return negate_where(d * q.value(i), signs, i); });
    }
};

// d; for each line 9 bits of index and seven signs; a scale of 4 bits for each two lines.
struct IQ2_XS : Block<IQ2_XS, 256, 74, 32, 1024> {
    static DEVICE u32 grid_word(u32 index) { return IQ2_XS_GRID[index]; }

    template <class Bytes, class Target> static DEVICE void decode(Bytes block, u32 part, const u64 *grid, Target target)
    {
        u32 group = part / 4, line = part % 4;
        u32 packed = load_pair(block + 2 + 2 * part), signs = even_signs(packed >> 9);
        float d = quarter_scale(load_half(block), (load_byte(block + 66 + group) >> (4 * (line / 2))) & 15);
        Codes q = grid_line(grid, packed & 511);
        target.store(8 * part, [&](int i) { return negate_where(d * q.value(i), signs, i); });
    }
};

// d; for each line the low 8 bits of its index; eight signs; the high two bits of a group's indices; scales as IQ2_XS.
struct IQ2_S : Block<IQ2_S, 256, 82, 32, 2048> {
    static DEVICE u32 grid_word(u32 index) { return IQ2_S_GRID[index]; }

    template <class Bytes, class Target> static DEVICE void decode(Bytes block, u32 part, const u64 *grid, Target target)
    {
        u32 group = part / 4, line = part % 4;
        u32 signs = load_byte(block + 34 + part), high = (load_byte(block + 66 + group) >> (2 * line)) & 3;
        float d = quarter_scale(load_half(block), (load_byte(block + 74 + group) >> (4 * (line / 2))) & 15);
        Codes q = grid_line(grid, load_byte(block + 2 + part) | high << 8);
        target.store(8 * part, [&](int i) { return negate_where(d * q.value(i), signs, i); });
    }
};

// d; two indices of 8 bits for each line, to four magnitudes each; for each group four times seven signs and a scale.
struct IQ3_XXS : Block<IQ3_XXS, 256, 98, 32, 256> {
    static DEVICE u32 grid_word(u32 index) { return IQ3_XXS_GRID[index]; }

    template <class Bytes, class Target> static DEVICE void decode(Bytes block, u32 part, const u64 *grid, Target target)
    {
        u32 group = part / 4, line = part % 4;
        u32 packed = load_word(block + 66 + 4 * group), signs = even_signs((packed >> (7 * line)) & 127);
        float d = load_half(block) * (0.5f + (float)(packed >> 28)) * 0.5f;
        u32 indices = load_pair(block + 2 + 2 * part);
        Codes q = {((const u32 *)grid)[indices & 0xFF], ((const u32 *)grid)[indices >> 8]};
        target.store(8 * part, [&](int i) { return negate_where(d * q.value(i), signs, i); });
    }
};

// d; two indices for each line, of which a byte of each group has the ninth bits; signs; a scale for each group.
struct IQ3_S : Block<IQ3_S, 256, 110, 32, 512> {
    static DEVICE u32 grid_word(u32 index) { return IQ3_S_GRID[index]; }

    template <class Bytes, class Target> static DEVICE void decode(Bytes block, u32 part, const u64 *grid, Target target)
    {
        u32 group = part / 4, line = part % 4;
        u32 indices = load_pair(block + 2 + 2 * part), ninth = load_byte(block + 66 + group) >> (2 * line);
        u32 signs = load_byte(block + 74 + part);
        u32 scale = (load_byte(block + 106 + group / 2) >> (4 * (group % 2))) & 15;
        float d = load_half(block) * (float)(1 + 2 * scale);
        Codes q = {((const u32 *)grid)[(indices & 0xFF) | (ninth & 1) << 8],
                   ((const u32 *)grid)[indices >> 8 | (ninth & 2) << 7]};
        target.store(8 * part, [&](int i) { return negate_where(d * q.value(i), signs, i); });
    }
};

// IQ1_S and IQ1_M: a grid's entry has eight nibbles (code 0, 1, 2 for -1, 0, 1), weights 0 to 3 in the lower ones of
// its bytes, 4 to 7 in the upper ones; a line's weights are all moved up or down by an eighth.
template <class Target> DEVICE void decode_ternary_line(u32 nibbles, float d, u32 down, u32 position, Target target)
{
    Codes q = {nibbles & 0x0F0F0F0F, (nibbles >> 4) & 0x0F0F0F0F};
    float delta = down ? -0.125f : 0.125f;
    target.store(position, [&](int i) { return d * (q.value(i, 1) + delta); });
}

// d; the low 8 bits of indices; for each group 16 bits: four times three high bits, a scale of 3 bits, the direction.
struct IQ1_S : Block<IQ1_S, 256, 50, 32, 2048> {
    static DEVICE u32 grid_word(u32 index) { return IQ1_S_GRID[index]; }

    template <class Bytes, class Target> static DEVICE void decode(Bytes block, u32 part, const u64 *grid, Target target)
    {
        u32 group = part / 4, line = part % 4;
        u32 packed = load_pair(block + 34 + 2 * group), high = (packed >> (3 * line)) & 7;
        float d = load_half(block) * (float)(2 * ((packed >> 12) & 7) + 1);
        u32 nibbles = ((const u32 *)grid)[load_byte(block + 2 + part) | high << 8];
        decode_ternary_line(nibbles, d, packed & 0x8000, 8 * part, target);
    }
};

// The low 8 bits of indices; for each line three high bits and the direction; four 16-bit words with four scales of
// 3 bits each, for two lines, and a nibble of d.
struct IQ1_M : Block<IQ1_M, 256, 56, 32, 2048> {
    static DEVICE u32 grid_word(u32 index) { return IQ1_S_GRID[index]; }

    template <class Bytes, class Target> static DEVICE void decode(Bytes block, u32 part, const u64 *grid, Target target)
    {
        Words<2> words = load_words<2, 8>(block + 48);
        u32 a = words.word[0], b = words.word[1];
        float d = half_to_float(((a >> 12) & 0xF) | ((a >> 24) & 0xF0) | ((b >> 4) & 0xF00) | ((b >> 16) & 0xF000));
        u32 pair = part / 2, scales = (pair < 8 ? a : b) >> (16 * (pair / 4 % 2)) >> (3 * (pair % 4));
        u32 high = load_byte(block + 32 + pair) >> (4 * (part % 2));
        u32 nibbles = ((const u32 *)grid)[load_byte(block + part) | (high & 7) << 8];
        decode_ternary_line(nibbles, d * (float)(2 * (scales & 7) + 1), high & 8, 8 * part, target);
    }
};

// d times one of 16 values: d, 16 bytes of codes, the lower nibbles first.
struct IQ4_NL : Block<IQ4_NL, 32, 18, 2> {
    template <class Bytes, class Target> static DEVICE void decode(Bytes block, u32 part, const u64 *, Target target)
    {
        float d = load_half(block);
        Codes lower, upper;
        Values{IQ4_NL_VALUES}.find(load_codes(block + 2 + 8 * part), lower, upper);
        target.store(8 * part, [&](int i) { return lower.value(i, 128) * d; });
        target.store(8 * part + 16, [&](int i) { return upper.value(i, 128) * d; });
    }
};

// As IQ4_NL in groups of 32: d, the high bit pairs of the groups' 6-bit scales, their low nibbles, 128 bytes of codes.
struct IQ4_XS : Block<IQ4_XS, 256, 136, 16> {
    template <class Bytes, class Target> static DEVICE void decode(Bytes block, u32 part, const u64 *, Target target)
    {
        u32 group = part / 2, column = part % 2;
        Words<2> head = load_words<2, 8>(block);
        Codes lower, upper;
        Values{IQ4_NL_VALUES}.find(load_codes<8>(block + 8 + 8 * part), lower, upper);
        u32 scale = ((head.word[1] >> (4 * group)) & 15) | ((head.word[0] >> (16 + 2 * group)) & 3) << 4;
        float d = half_to_float(head.word[0]) * (float)((int)scale - 32);
        target.store(32 * group + 8 * column, [&](int i) { return lower.value(i, 128) * d; });
        target.store(32 * group + 8 * column + 16, [&](int i) { return upper.value(i, 128) * d; });
    }
};
