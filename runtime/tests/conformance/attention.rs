//! Attention: grouped heads, latents, windows, chunks, sinks, caps, both cache formats.

use super::*;
use tierwise_runtime::backend::op::{DeviceAttention, KvElement};

/// What varies.
#[derive(Debug, Clone, Copy)]
struct Shape {
    tokens: usize,
    past: usize,
    heads: usize,
    kv_heads: usize,
    key_dim: usize,
    value_dim: usize,
    /// Values are the keys' first elements.
    latent: bool,
    element: KvElement,
    window: Option<u32>,
    chunk: Option<u32>,
    sinks: bool,
    softcap: Option<f32>,
}

const PLAIN: Shape = Shape {
    tokens: 1,
    past: 0,
    heads: 4,
    kv_heads: 2,
    key_dim: 16,
    value_dim: 16,
    latent: false,
    element: KvElement::F32,
    window: None,
    chunk: None,
    sinks: false,
    softcap: None,
};

fn encode(values: &[f32], element: KvElement) -> Vec<u8> {
    match element {
        KvElement::F32 => bytes(values),
        KvElement::F16 => values.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect(),
    }
}

fn case(s: Shape) -> Case {
    let mut random = Random::new((s.past * 3 + s.tokens + s.heads) as u64);
    let positions = s.past + s.tokens;
    // Two positions more than are seen: they must not count.
    let keys = random.floats((positions + 2) * s.kv_heads * s.key_dim);
    let values = random.floats((positions + 2) * s.kv_heads * s.value_dim);
    let q: Vec<f32> = random.floats(s.tokens * s.heads * s.key_dim).iter().map(|x| 3.0 * x).collect();
    let sinks = random.floats(s.heads);
    let scale = 1.0 / (s.key_dim as f32).sqrt();

    // Scores: sums of `key_dim` products of magnitude below 3, so below `largest` in all; their errors and those of the exponentials
    // (3 + 2 |x| units for an argument x) move weights, twice because the sum moves too; values are below 1.
    let largest = f64::from(scale) * 3.0 * s.key_dim as f64;
    let score_error = (s.key_dim as f64 + 4.0) * largest * UNIT + f64::from(s.softcap.unwrap_or(0.0)) * 40.0 * UNIT;
    let exponential = (3.0 + 2.0 * (2.0 * largest + 1.0)) * UNIT;
    let bound = 2.0 * (score_error + exponential) + (positions as f64 + 16.0) * UNIT;

    let attention = move |v: &[View]| DeviceAttention {
        q: v[0],
        keys: v[1],
        values: if s.latent { v[1] } else { v[2] },
        value_stride: if s.latent { s.key_dim } else { s.value_dim } as u32,
        out: v[4],
        sinks: s.sinks.then_some(v[3]),
        element: s.element,
        tokens: s.tokens as u32,
        past: s.past as u32,
        heads: s.heads as u32,
        kv_heads: s.kv_heads as u32,
        key_dim: s.key_dim as u32,
        value_dim: s.value_dim as u32,
        scale,
        window: s.window,
        chunk: s.chunk,
        softcap: s.softcap,
    };
    let out = s.tokens * s.heads * s.value_dim;
    Case {
        name: format!("{s:?}"),
        blocks: vec![bytes(&q), encode(&keys, s.element), encode(&values, s.element), bytes(&sinks), zeros(out)],
        ops: Box::new(move |v| vec![DeviceOp::Attention(attention(v))]),
        outputs: vec![(4, Bound::Absolute(vec![(bound, 4.0 * UNIT_BF16 * (1.0 + largest)); out]))],
    }
}

pub fn attentions() -> Vec<Case> {
    let mut shapes = Vec::new();
    for element in [KvElement::F32, KvElement::F16] {
        let plain = Shape { element, ..PLAIN };
        shapes.extend([
            plain,
            Shape { past: 130, ..plain },
            Shape { tokens: 7, past: 60, heads: 6, kv_heads: 3, key_dim: 12, value_dim: 12, ..plain },
            Shape { tokens: 33, past: 3, heads: 8, kv_heads: 1, ..plain },
            Shape { tokens: 2, past: 200, window: Some(5), ..plain },
            Shape { tokens: 9, past: 70, window: Some(64), sinks: true, ..plain },
            Shape { tokens: 33, past: 10, chunk: Some(16), ..plain },
            Shape { tokens: 5, past: 95, sinks: true, softcap: Some(2.0), ..plain },
            Shape { tokens: 3, past: 20, key_dim: 128, value_dim: 64, heads: 2, ..plain },
            // Few rows that see much: cut into ranges, of which the last may be short or empty.
            Shape { past: 1023, ..plain },
            Shape { tokens: 2, past: 771, heads: 6, kv_heads: 3, sinks: true, ..plain },
            Shape { tokens: 3, past: 1500, window: Some(700), softcap: Some(2.0), ..plain },
            Shape { past: 1300, chunk: Some(1024), ..plain },
            // DeepSeek's widths.
            Shape { tokens: 2, past: 66, heads: 3, kv_heads: 1, key_dim: 576, value_dim: 512, latent: true, ..plain },
        ]);
    }
    shapes.into_iter().map(case).collect()
}
