// Q8_0: f16 scale, 32 signed bytes.

const $BLOCK_ELEMENTS: u32 = 32u;
const $BLOCK_BYTES: u32 = 34u;

fn $weight4(block: u32, i: u32) -> vec4<f32> {
    return half_at(block) * vec4<f32>(unpack4xI8(word_at(block + 2u + i)));
}
