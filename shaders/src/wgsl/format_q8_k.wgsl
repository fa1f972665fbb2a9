// Q8_K: f32 scale, 256 signed bytes, sums that are not read.

const $BLOCK_ELEMENTS: u32 = 256u;
const $BLOCK_BYTES: u32 = 292u;

fn $weight4(block: u32, i: u32) -> vec4<f32> {
    return bitcast<f32>(weight[block >> 2u]) * vec4<f32>(unpack4xI8(weight[(block + 4u + i) >> 2u]));
}
