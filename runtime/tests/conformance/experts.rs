//! Experts: formats, absent ones, biases, tiles.

use super::*;
use tierwise_cost::model::Activation;
use tierwise_runtime::backend::check::group_rows;
use tierwise_runtime::backend::op::{ABSENT, DeviceExperts, RowGroups};

/// What varies.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub formats: [QuantFormat; 3],
    pub hidden: usize,
    pub inner: usize,
    pub num_experts: usize,
    pub tokens: usize,
    pub k: usize,
    pub clamped: bool,
    pub biased: bool,
    pub tiles: bool,
}

pub fn case(s: Shape) -> Case {
    let mut random = Random::new((s.hidden + 13 * s.inner + s.tokens) as u64);
    let rows = s.tokens * s.k;
    // Every third expert is elsewhere. The others lie in descending order, apart, their matrices at multiples of 16 bytes.
    let mut arena = vec![0; 48];
    let mut table = vec![ABSENT; 3 * s.num_experts];
    let mut decoded = vec![Vec::new(); 3 * s.num_experts];
    for expert in (0..s.num_experts).rev().filter(|e| e % 3 != 2) {
        let shapes = [(s.inner, s.hidden), (s.inner, s.hidden), (s.hidden, s.inner)];
        for (which, (format, (rows, cols))) in s.formats.into_iter().zip(shapes).enumerate() {
            let matrix = matrix(format, rows, cols, &mut random);
            table[3 * expert + which] = (arena.len() / 16) as u32;
            arena.extend(matrix.bytes);
            arena.resize(arena.len().next_multiple_of(16) + 16, 0);
            decoded[3 * expert + which] = matrix.decoded;
        }
    }
    let x = random.floats(s.tokens * s.hidden);
    let ids: Vec<u32> = (0..rows).map(|_| ((random.next() + 1.0) * 0.5 * s.num_experts as f32) as u32).collect();
    let biases =
        [random.floats(s.num_experts * s.inner), random.floats(s.num_experts * s.inner), random.floats(s.num_experts * s.hidden)];
    let before = random.floats(rows * s.hidden);
    let activation = if s.clamped { Activation::ClampedSwiglu { alpha: 1.702, limit: 1.5 } } else { Activation::Silu };

    let bounds = ids.iter().enumerate().flat_map(|(r, id)| {
        let x = &x[r / s.k * s.hidden..(r / s.k + 1) * s.hidden];
        row_bounds(&s, activation, [0, 1, 2].map(|m| &decoded[3 * *id as usize + m][..]), x, *id as usize, &biases)
    });
    let bounds: Vec<(f64, f64)> = bounds.collect();

    let here = |id: u32| id % 3 != 2;
    let (order, tiles) = group_rows(&ids, here);
    let num_tiles = tiles.len() as u32;
    let [gate_bias, up_bias, down_bias] = biases;
    let order = if order.is_empty() { vec![0] } else { order };
    let tiles: Vec<u32> = if tiles.is_empty() { vec![0; 3] } else { tiles.into_iter().flatten().collect() };
    Case {
        name: format!("{s:?}"),
        blocks: vec![
            arena,
            words(&table),
            bytes(&x),
            words(&ids),
            zeros(rows * s.inner),
            bytes(&before),
            bytes(&gate_bias),
            bytes(&up_bias),
            bytes(&down_bias),
            words(&order),
            words(&tiles),
        ],
        ops: Box::new(move |v| {
            let experts = DeviceExperts {
                buffer: v[0].buffer,
                table: v[1],
                num_experts: s.num_experts as u32,
                formats: s.formats,
                inner_size: s.inner as u32,
                hidden: s.hidden as u32,
                activation,
                biases: s.biased.then_some([v[6], v[7], v[8]]),
            };
            vec![DeviceOp::Experts {
                experts,
                x: v[2],
                ids: v[3],
                rows_per_input: s.k as u32,
                inner: v[4],
                out: v[5],
                rows: rows as u32,
                groups: s.tiles.then_some(RowGroups { order: v[9], tiles: v[10], num_tiles }),
            }]
        }),
        outputs: vec![(5, Bound::Absolute(bounds))],
    }
}

/// Bounds of one row: errors of gate and up go through the activation (at most 1.1 times as steep as its gate, times alpha where that
/// is steeper) and through the down projection, which adds its own. A row of an absent expert stays.
fn row_bounds(
    s: &Shape,
    activation: Activation,
    [gate, up, down]: [&[f32]; 3],
    x: &[f32],
    expert: usize,
    biases: &[Vec<f32>; 3],
) -> Vec<(f64, f64)> {
    if gate.is_empty() {
        return vec![(0.0, 0.0); s.hidden];
    }
    let many = s.tiles;
    let product = |w: &[f32], which: usize, width: usize| {
        let bounds = products::product_bounds(w, x, s.hidden, many);
        let values = w.chunks_exact(s.hidden).enumerate().map(|(r, w)| {
            let bias = if s.biased { f64::from(biases[which][expert * width + r]) } else { 0.0 };
            w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum::<f64>() + bias
        });
        values.zip(bounds).map(|(v, (a, b))| (v, a + UNIT * v.abs(), b)).collect::<Vec<_>>()
    };
    let (gates, ups) = (product(gate, 0, s.inner), product(up, 1, s.inner));
    // (magnitude, error, error in bf16) of each inner activation.
    let inner: Vec<(f64, f64, f64)> = gates
        .iter()
        .zip(&ups)
        .map(|((g, g32, g16), (u, u32, u16))| {
            let (steep, gated, u) = match activation {
                Activation::Silu => (1.1, g / (1.0 + (-g).exp()), u.abs()),
                Activation::ClampedSwiglu { alpha, limit } => {
                    let (alpha, limit) = (f64::from(alpha), f64::from(limit));
                    let g = g.min(limit);
                    (1.1, g / (1.0 + (-alpha * g).exp()), (u.clamp(-limit, limit) + 1.0).abs())
                }
            };
            let value = gated.abs() * u;
            // An exponential may be 3 + 2 |x| units off.
            let own = value * (16.0 + 4.0 * g.abs()) * UNIT;
            let error = |g_error: f64, u_error: f64| steep * g_error * (u + u_error) + gated.abs() * u_error;
            (value, error(*g32, *u32) + own, error(*g16, *u16))
        })
        .collect();
    let down_row = |w: &[f32]| {
        let sum =
            |f: &dyn Fn(&(f64, f64, f64)) -> f64| w.iter().zip(&inner).map(|(w, i)| f64::from(*w).abs() * f(i)).sum::<f64>();
        let magnitude = sum(&|i| i.0);
        let f32 = sum(&|i| i.1) + (s.inner + 8) as f64 * UNIT * magnitude + 2.0 * UNIT;
        (f32, if many { sum(&|i| i.2) + UNIT_BF16 * magnitude } else { 0.0 })
    };
    down.chunks_exact(s.inner).map(down_row).collect()
}

pub fn of_format(format: QuantFormat) -> Vec<Case> {
    let (one, two) = (cols_of(format, 1), cols_of(format, 2));
    let plain = Shape {
        formats: [format; 3],
        hidden: one,
        inner: one,
        num_experts: 5,
        tokens: 1,
        k: 4,
        clamped: false,
        biased: false,
        tiles: false,
    };
    vec![
        Shape { hidden: two, ..plain },
        Shape { inner: two, tokens: 7, k: 2, biased: true, clamped: true, ..plain },
        Shape { tokens: 40, k: 2, num_experts: 3, tiles: true, biased: true, ..plain },
    ]
    .into_iter()
    .map(case)
    .collect()
}

const MIXED: Shape = Shape {
    formats: [QuantFormat::Q4_K, QuantFormat::Q4_K, QuantFormat::Q6_K],
    hidden: 256,
    inner: 256,
    num_experts: 8,
    tokens: 2,
    k: 3,
    clamped: false,
    biased: false,
    tiles: false,
};

/// Another format for the down projection, as usual in GGUF files.
pub fn mixed() -> Vec<Case> {
    let formats = [QuantFormat::MXFP4; 3];
    let many =
        Shape { formats, hidden: 96, inner: 64, num_experts: 32, tokens: 33, k: 4, clamped: true, biased: true, tiles: true };
    vec![case(MIXED), case(Shape { tiles: true, tokens: 33, ..MIXED }), case(many)]
}

/// Gate and up in different formats, which a back-end may refuse.
pub fn gate_and_up_apart() -> Vec<Case> {
    let small = Shape { formats: [QuantFormat::Q8_0, QuantFormat::Q4_0, QuantFormat::F16], hidden: 96, inner: 34, ..MIXED };
    vec![case(small), case(Shape { tiles: true, tokens: 21, k: 1, clamped: true, ..small })]
}
