// IQ4_NL: f16 scale, 32 codes into a table in the order of Q4_0's nibbles.

const $BLOCK_ELEMENTS: u32 = 32u;
const $BLOCK_BYTES: u32 = 18u;

// Values of the 16 codes, four signed bytes to a word.
fn $value(code: u32) -> f32 {
    var table = array<u32, 4>(0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u);
    return f32(bitcast<i32>((table[code >> 2u] >> ((code & 3u) * 8u)) << 24u) >> 24u);
}

fn $weight4(block: u32, i: u32) -> vec4<f32> {
    let c = unpack4xU8((word_at(block + 2u + (i & 15u)) >> ((i >> 4u) * 4u)) & 0x0f0f0f0fu);
    return half_at(block) * vec4<f32>($value(c.x), $value(c.y), $value(c.z), $value(c.w));
}
