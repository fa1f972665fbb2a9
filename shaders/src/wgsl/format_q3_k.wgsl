// Q3_K: third bits (bit i / 32 of byte i % 32), 2-bit codes as in Q2_K, sixteen 6-bit scales (minus 32) in 12 bytes, f16 scale; minus 4.

const $BLOCK_ELEMENTS: u32 = 256u;
const $BLOCK_BYTES: u32 = 110u;

fn $weight4(block: u32, i: u32) -> vec4<f32> {
    let run = i >> 4u;
    let nibble = (byte_at(block + 96u + (run & 7u)) >> (4u * (run >> 3u))) & 15u;
    let upper = (byte_at(block + 104u + (run & 3u)) >> (2u * (run >> 2u))) & 3u;
    let scale = half_at(block + 108u) * f32(i32(nibble | (upper << 4u)) - 32);
    let low = (word_at(block + 32u + 32u * (i >> 7u) + (i & 31u)) >> (2u * ((i >> 5u) & 3u))) & 0x03030303u;
    let high = (word_at(block + (i & 31u)) >> (i >> 5u)) & 0x01010101u;
    return scale * (codes(low | (high << 2u)) - 4.0);
}
