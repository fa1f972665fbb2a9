// Q4_K: f16 scale and minimum, 6-bit scales and minima for eight runs of 32, then nibbles: 64 elements to 32 bytes, the first half low.

const $BLOCK_ELEMENTS: u32 = 256u;
const $BLOCK_BYTES: u32 = 144u;

// Scale and minimum of a run, from 12 bytes at `at`: 6 bits of each of the first four, then nibbles whose upper bits are in the former.
fn $scale_and_min(at: u32, run: u32) -> vec2<f32> {
    if run < 4u {
        return vec2<f32>(f32(byte_at(at + run) & 63u), f32(byte_at(at + 4u + run) & 63u));
    }
    let low = byte_at(at + 4u + run);
    let scale = (low & 15u) | ((byte_at(at + run - 4u) >> 6u) << 4u);
    let minimum = (low >> 4u) | ((byte_at(at + run) >> 6u) << 4u);
    return vec2<f32>(f32(scale), f32(minimum));
}

fn $weight4(block: u32, i: u32) -> vec4<f32> {
    let run = i >> 5u;
    let s = unpack2x16float(weight[block >> 2u]) * $scale_and_min(block + 4u, run);
    let word = weight[(block + 16u + 32u * (run >> 1u) + (i & 31u)) >> 2u];
    return s.x * codes((word >> ((run & 1u) * 4u)) & 0x0f0f0f0fu) - s.y;
}
