// IQ4_XS: f16 scale, upper bits and nibbles of eight 6-bit scales (minus 32) for runs of 32, codes into the table of IQ4_NL.

const $BLOCK_ELEMENTS: u32 = 256u;
const $BLOCK_BYTES: u32 = 136u;

// Values of the 16 codes, four signed bytes to a word.
fn $value(code: u32) -> f32 {
    var table = array<u32, 4>(0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u);
    return f32(bitcast<i32>((table[code >> 2u] >> ((code & 3u) * 8u)) << 24u) >> 24u);
}

fn $weight4(block: u32, i: u32) -> vec4<f32> {
    let run = i >> 5u;
    let low = (byte_at(block + 4u + (run >> 1u)) >> ((run & 1u) * 4u)) & 15u;
    let high = (word_at(block + 2u) >> (2u * run)) & 3u;
    let scale = half_at(block) * f32(i32(low | (high << 4u)) - 32);
    let at = block + 8u + 16u * run + (i & 15u);
    let c = unpack4xU8((word_at(at) >> (((i >> 4u) & 1u) * 4u)) & 0x0f0f0f0fu);
    return scale * vec4<f32>($value(c.x), $value(c.y), $value(c.z), $value(c.w));
}
