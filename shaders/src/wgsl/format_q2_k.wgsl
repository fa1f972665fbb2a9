// Q2_K: scale and minimum nibbles for runs of 16, 2-bit codes (32 bytes to 128 elements), f16 scale and minimum.

const $BLOCK_ELEMENTS: u32 = 256u;
const $BLOCK_BYTES: u32 = 84u;

fn $weight4(block: u32, i: u32) -> vec4<f32> {
    let nibbles = byte_at(block + (i >> 4u));
    let s = unpack2x16float(weight[(block + 80u) >> 2u]) * vec2<f32>(f32(nibbles & 15u), f32(nibbles >> 4u));
    let word = weight[(block + 16u + 32u * (i >> 7u) + (i & 31u)) >> 2u] >> (2u * ((i >> 5u) & 3u));
    return s.x * codes(word & 0x03030303u) - s.y;
}
