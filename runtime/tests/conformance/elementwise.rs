//! Norms, rotation, copies, sums, activations, routing, combination.

use super::*;
use tierwise_cost::model::{Activation, RopePairing};
use tierwise_runtime::backend::op::{DeviceRule, KvElement};

pub fn norms() -> Vec<Case> {
    let mut cases = Vec::new();
    for (rows, width, period, weighted, in_place) in [
        (1, 1, 1, true, false),
        (3, 63, 1, true, false),
        (6, 130, 3, true, true),
        (2, 2049, 1, false, false),
        (5, 64, 1, false, true),
    ] {
        let mut random = Random::new(width as u64);
        let (x, weight) = (random.floats(rows * width), random.floats(period * width));
        cases.push(Case {
            name: format!("rms_norm {rows} x {width}, period {period}, weighted {weighted}, in place {in_place}"),
            blocks: vec![bytes(&x), bytes(&weight), zeros(rows * width)],
            ops: Box::new(move |v| {
                vec![DeviceOp::RmsNorm {
                    x: v[0],
                    weight: weighted.then_some(v[1]),
                    period: period as u32,
                    out: if in_place { v[0] } else { v[2] },
                    rows: rows as u32,
                    width: width as u32,
                    eps: 1e-6,
                }]
            }),
            // The sum's additions, halved by the root; the root itself may be two units off.
            outputs: vec![(if in_place { 0 } else { 2 }, Bound::Relative(width as f64 / 2.0 + 16.0))],
        });
    }
    for (rows, width, in_place) in [(3, 65, false), (2, 200, true)] {
        let mut random = Random::new(rows as u64);
        let (x, weight, bias) = (random.floats(rows * width), random.floats(width), random.floats(width));
        // Normed values are below 4; mean and variance carry the errors of their sums.
        let bound = (2.0 * width as f64 + 32.0) * UNIT * 4.0;
        cases.push(Case {
            name: format!("layer_norm {rows} x {width}, in place {in_place}"),
            blocks: vec![bytes(&x), bytes(&weight), bytes(&bias), zeros(rows * width)],
            ops: Box::new(move |v| {
                let out = if in_place { v[0] } else { v[3] };
                vec![DeviceOp::LayerNorm {
                    x: v[0],
                    weight: v[1],
                    bias: v[2],
                    out,
                    rows: rows as u32,
                    width: width as u32,
                    eps: 1e-5,
                }]
            }),
            outputs: vec![(if in_place { 0 } else { 3 }, Bound::Absolute(vec![(bound, 0.0); rows * width]))],
        });
    }
    cases
}

pub fn movements() -> Vec<Case> {
    let mut cases = Vec::new();
    for (pairing, tokens, heads, stride, first, pairs) in [
        (RopePairing::Halves, 3, 5, 16, 0, 8),
        (RopePairing::Interleaved, 2, 3, 20, 6, 5),
        (RopePairing::Halves, 33, 2, 14, 2, 3),
    ] {
        let mut random = Random::new(tokens as u64);
        let x = random.floats(tokens * heads * stride);
        let table = random.floats(tokens * pairs * 2);
        cases.push(Case {
            name: format!("rope {pairing:?} {tokens} x {heads} x {stride}"),
            blocks: vec![bytes(&x), bytes(&table)],
            ops: Box::new(move |v| {
                vec![DeviceOp::Rope {
                    x: v[0],
                    cos_sin: v[1],
                    tokens: tokens as u32,
                    heads: heads as u32,
                    head_stride: stride as u32,
                    first: first as u32,
                    pairs: pairs as u32,
                    pairing,
                }]
            }),
            outputs: vec![(0, Bound::Absolute(vec![(4.0 * UNIT, 0.0); x.len()]))],
        });
    }
    let mut random = Random::new(9);
    let (x, out) = (random.floats(7 * 11), random.floats(7 * 13));
    cases.push(Case {
        name: "copy_columns".into(),
        blocks: vec![bytes(&x), bytes(&out)],
        ops: Box::new(|v| {
            let (x, out) = (v[0], v[1]);
            vec![DeviceOp::CopyColumns { x, x_stride: 11, x_start: 2, out, out_stride: 13, out_start: 5, rows: 7, width: 8 }]
        }),
        outputs: vec![(1, Bound::Same)],
    });
    for (element, bound) in [(KvElement::F32, Bound::Same), (KvElement::F16, Bound::Halves)] {
        let x = random.floats(5 * 6);
        cases.push(Case {
            name: format!("append_kv {element:?}"),
            blocks: vec![bytes(&x), vec![0; 16 * 6 * element.bytes() as usize]],
            ops: Box::new(move |v| vec![DeviceOp::AppendKv { x: v[0], cache: v[1], element, tokens: 5, width: 6, position: 9 }]),
            outputs: vec![(1, bound)],
        });
    }
    cases
}

pub fn sums() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut random = Random::new(21);
    for with_factors in [false, true] {
        let (x, factors) = (random.floats(5 * 67), random.floats(5));
        cases.push(Case {
            name: format!("scale, by row {with_factors}"),
            blocks: vec![bytes(&x), bytes(&factors)],
            ops: Box::new(move |v| {
                let factors = with_factors.then_some(v[1]);
                vec![DeviceOp::Scale { x: v[0], factor: 1.7, factors, rows: 5, width: 67 }]
            }),
            outputs: vec![(0, Bound::Relative(2.0))],
        });
    }
    let (x, y) = (random.floats(1000), random.floats(1000));
    let same = (x.clone(), y.clone());
    cases.push(Case {
        name: "axpy".into(),
        blocks: vec![bytes(&x), bytes(&y)],
        ops: Box::new(|v| vec![DeviceOp::Axpy { x: v[0], y: v[1], factor: 0.3, elements: 999 }]),
        outputs: vec![(1, Bound::Absolute(vec![(4.0 * UNIT, 0.0); 1000]))],
    });
    // More operations than one pass takes, each on the result of the one before.
    cases.push(Case {
        name: "2500 times axpy".into(),
        blocks: vec![bytes(&same.0[..64]), bytes(&same.1[..64])],
        ops: Box::new(|v| vec![DeviceOp::Axpy { x: v[0], y: v[1], factor: 0.001, elements: 64 }; 2500]),
        outputs: vec![(1, Bound::Absolute(vec![(2500.0 * 4.0 * 2.5 * UNIT, 0.0); 64]))],
    });
    for (rows, width, cols) in [(1, 70, 65), (7, 64, 200)] {
        let (x, input, gate, y) =
            (random.floats(rows * width), random.floats(rows * cols), random.floats(cols), random.floats(rows * width));
        // A sigmoid is at most a quarter as steep as its argument, whose error is that of a sum of `cols` products.
        let bound = (cols as f64 * cols as f64 / 4.0 + 32.0) * UNIT;
        cases.push(Case {
            name: format!("gated_axpy {rows} x {width}, {cols}"),
            blocks: vec![bytes(&x), bytes(&input), bytes(&gate), bytes(&y)],
            ops: Box::new(move |v| {
                vec![DeviceOp::GatedAxpy {
                    x: v[0],
                    input: v[1],
                    gate: v[2],
                    y: v[3],
                    rows: rows as u32,
                    width: width as u32,
                    cols: cols as u32,
                }]
            }),
            outputs: vec![(3, Bound::Absolute(vec![(bound, 0.0); rows * width]))],
        });
    }
    for activation in [Activation::Silu, Activation::ClampedSwiglu { alpha: 1.702, limit: 7.0 }] {
        let spread = |random: &mut Random, by: f32| random.floats(300).iter().map(|x| x * by).collect::<Vec<_>>();
        let (gate, up) = (spread(&mut random, 20.0), spread(&mut random, 9.0));
        cases.push(Case {
            name: format!("activate {activation:?}"),
            blocks: vec![bytes(&gate), bytes(&up), zeros(300)],
            ops: Box::new(move |v| vec![DeviceOp::Activate { gate: v[0], up: v[1], out: v[2], elements: 300, activation }]),
            // An exponential may be 3 + 2 |x| units off, |x| here below 35.
            outputs: vec![(2, Bound::Relative(90.0))],
        });
    }
    for softcap in [None, Some(3.0)] {
        let x: Vec<f32> = random.floats(130).iter().map(|x| x * 20.0).collect();
        let limit = if softcap.is_some() { 3.0 * 40.0 * UNIT } else { 20.0 * UNIT };
        cases.push(Case {
            name: format!("scale_cap {softcap:?}"),
            blocks: vec![bytes(&x)],
            ops: Box::new(move |v| vec![DeviceOp::ScaleCap { x: v[0], elements: 130, factor: 0.7, softcap }]),
            outputs: vec![(0, Bound::Absolute(vec![(limit, 0.0); 130]))],
        });
    }
    for (tokens, k, width, accumulate) in [(1, 1, 65, false), (3, 8, 70, true), (33, 2, 33, false)] {
        let (x, weights, y) = (random.floats(tokens * k * width), random.floats(tokens * k), random.floats(tokens * width));
        cases.push(Case {
            name: format!("combine {tokens} x {k} x {width}, accumulate {accumulate}"),
            blocks: vec![bytes(&x), bytes(&weights), bytes(&y)],
            ops: Box::new(move |v| {
                let (tokens, k, width) = (tokens as u32, k as u32, width as u32);
                vec![DeviceOp::Combine { x: v[0], weights: v[1], y: v[2], tokens, k, width, accumulate }]
            }),
            outputs: vec![(2, Bound::Absolute(vec![((k + 2) as f64 * (k + 1) as f64 * UNIT, 0.0); tokens * width]))],
        });
    }
    cases
}

pub fn routes() -> Vec<Case> {
    let rule = |sigmoid, normalize, softmax_after_topk| DeviceRule { sigmoid, normalize, softmax_after_topk, scale: 1.5 };
    let variants = [
        (rule(false, true, false), false, 1, 128, 8),
        (rule(false, false, false), false, 7, 60, 4),
        (rule(false, true, true), false, 2, 32, 4),
        (rule(true, true, false), true, 3, 300, 8),
        (rule(true, false, false), true, 33, 17, 6),
        (rule(true, true, false), false, 2, 5, 5),
    ];
    let mut cases = Vec::new();
    for (i, (rule, biased, tokens, num_experts, k)) in variants.into_iter().enumerate() {
        let mut random = Random::new(70 + i as u64);
        let mut logits: Vec<f32> = random.floats(tokens * num_experts).iter().map(|x| x * 5.0).collect();
        if !biased {
            // Equal logits: the lower index goes first.
            logits.iter_mut().step_by(3).for_each(|x| *x = (*x * 0.5).round());
        }
        let bias = random.floats(num_experts);
        let nothing = vec![7.5; tokens * k];
        cases.push(Case {
            name: format!("route {rule:?}, biased {biased}, {tokens} x {num_experts}, best {k}"),
            blocks: vec![bytes(&logits), bytes(&bias), bytes(&nothing), bytes(&nothing)],
            ops: Box::new(move |v| {
                vec![DeviceOp::Route {
                    logits: v[0],
                    selection_bias: biased.then_some(v[1]),
                    ids: v[2],
                    weights: v[3],
                    tokens: tokens as u32,
                    num_experts: num_experts as u32,
                    k: k as u32,
                    rule,
                }]
            }),
            // Exponentials of up to 10 below the best, sums of as many as there are experts.
            outputs: vec![(2, Bound::Same), (3, Bound::Relative(num_experts as f64 + 64.0))],
        });
    }
    cases
}
