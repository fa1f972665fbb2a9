// Q4_0: f16 scale; element i is the low nibble of byte i, from 16 on the high nibble of byte i - 16; minus 8.

const $BLOCK_ELEMENTS: u32 = 32u;
const $BLOCK_BYTES: u32 = 18u;

fn $weight4(block: u32, i: u32) -> vec4<f32> {
    let nibbles = (word_at(block + 2u + (i & 15u)) >> ((i >> 4u) * 4u)) & 0x0f0f0f0fu;
    return half_at(block) * (codes(nibbles) - 8.0);
}
