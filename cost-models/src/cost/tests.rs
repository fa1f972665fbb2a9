//! Counts against sums written out by hand, and against each other.

use super::*;
use crate::machine::Machine;
use crate::model::{Geometry, ModelSpec};
use crate::op::{Batch, OpKind, lower};
use crate::quant::QuantFormat;
use crate::recipe::Recipe;
use crate::units::BytesPerS;

fn qwen(recipe: &str) -> ModelSpec {
    let layer = r#"
        name = "Qwen3-30B-A3B"
        architecture = "qwen3moe"
        hidden_size = 2048
        vocab_size = 151936
        context_length = 40960
        source = "its config.json"
        [[block]]
        repeat = 48
        [block.attention]
        kind = "gqa"
        num_heads = 32
        num_kv_heads = 4
        head_dim = 128
        qk_norm = "per_head"
        rope = { theta = 1e6, rotary_dim = 128 }
        [block.ffn]
        kind = "moe"
        num_experts = 128
        experts_per_token = 8
        inner_size = 768
        router = { score = "softmax", normalize_topk = true }
    "#;
    ModelSpec::with_recipe(Geometry::from_toml(layer).unwrap(), &Recipe::by_name(recipe).unwrap()).unwrap()
}

#[test]
fn distinct_experts_follow_the_published_table() {
    // data-statistics: uniform-independent column for gpt-oss-20b (4 of 32) and DeepSeek-V2-Lite (6 of 64).
    for (e, k, tokens, distinct) in
        [(32, 4, 2, 7.5), (32, 4, 8, 21.0), (32, 4, 128, 32.0), (64, 6, 4, 20.8), (64, 6, 16, 50.8), (64, 6, 1, 6.0)]
    {
        assert!((expected_distinct(e, k, tokens) - distinct).abs() < 0.05, "{e} {k} {tokens}");
    }
    assert_eq!(expected_distinct(8, 8, 1), 8.0);
}

#[test]
fn operations_add_up_to_the_step() {
    let spec = qwen("Q4_K_M");
    for batch in [
        Batch::decode(0),
        Batch::decode(4000),
        Batch::prefill(512, 0),
        Batch::prefill(64, 1000),
        Batch { tokens: 8, past: 100, sequences: 8, logits: 8 },
    ] {
        let by_op: Work = lower(&spec, batch).unwrap().iter().map(|op| op_work(&spec, op, batch, QuantFormat::F16)).sum();
        let step = step_work(&spec, batch, QuantFormat::F16).total();
        assert_eq!((by_op.weight_bytes, by_op.kv_bytes), (step.weight_bytes, step.kv_bytes), "{batch:?}");
        assert!((by_op.flops / step.flops - 1.0).abs() < 1e-9, "{batch:?}");
        assert!((by_op.attention_flops / step.attention_flops - 1.0).abs() < 1e-9, "{batch:?}");
        assert!((by_op.activations / step.activations - 1.0).abs() < 1e-9, "{batch:?}");
        for ((format, a), (_, b)) in by_op.matrices.iter().zip(step.matrices.iter()) {
            assert!((a.bytes / b.bytes - 1.0).abs() < 1e-6 && (a.flops / b.flops - 1.0).abs() < 1e-9, "{batch:?} {format}");
        }
    }
}

#[test]
fn decode_reads_the_active_bytes_and_the_cache() {
    let spec = qwen("Q4_K_M");
    let work = step_work(&spec, Batch::decode(999), QuantFormat::F16).total();
    assert_eq!(work.weight_bytes, spec.active_bytes_per_token());
    // 1000 positions x 48 layers x 2 x 4 heads x 128 x 2 bytes.
    assert_eq!(work.kv_bytes.0, 1000 * 98_304);
    // Two operations per active parameter, and 4 x heads x width x positions x layers for attention.
    let matrices = 2.0 * spec.active_elements_per_token() as f64;
    let attention = 4.0 * 32.0 * 128.0 * 1000.0 * 48.0;
    assert!((work.flops / (matrices + attention) - 1.0).abs() < 1e-3, "{} {matrices} {attention}", work.flops);
}

#[test]
fn one_expert_times_distinct_is_all_routed_work() {
    let spec = qwen("Q8_0");
    for batch in [Batch::decode(0), Batch::prefill(32, 0)] {
        for (l, layer) in step_work(&spec, batch, QuantFormat::F16).layers.iter().enumerate() {
            let bytes = layer.expert.weight_bytes.0 as f64 * layer.active_experts;
            assert!((bytes / layer.routed.weight_bytes.0 as f64 - 1.0).abs() < 1e-6, "layer {l}");
            assert!((layer.expert.flops * layer.active_experts / layer.routed.flops - 1.0).abs() < 1e-9, "layer {l}");
        }
    }
}

#[test]
fn prefill_spares_the_last_layer() {
    let spec = qwen("Q8_0");
    let batch = Batch::prefill(256, 0);
    let step = step_work(&spec, batch, QuantFormat::F16);
    assert_eq!(step.layers[47].active_experts, 8.0);
    assert!(step.layers[46].active_experts > 127.9);
    let ops = lower(&spec, batch).unwrap();
    let output = ops.iter().find(|o| matches!(o.kind, OpKind::MatMul { output: crate::op::Slot::Logits, .. })).unwrap();
    let work = op_work(&spec, output, batch, QuantFormat::F16);
    assert_eq!(work.flops, 2.0 * 151_936.0 * 2048.0);
}

#[test]
fn roofline_by_hand() {
    let machine = Machine::from_toml(crate::machine::tests::SMALL).unwrap();
    let (cpu, gpu) = (machine.processor("cpu0").unwrap(), machine.processor("gpu0").unwrap());
    let (dram, vram) = (machine.memory("dram0").unwrap(), machine.memory("vram0").unwrap());
    let model = Roofline::default();
    let work = Work { weight_bytes: Bytes(1_000_000_000), kv_bytes: Bytes(24_000_000), flops: 1e9, ..Work::default() };
    let e = model.compute(cpu, dram, work, 2);
    assert!((e.seconds - (1.024e9 / (0.68 * 51.2e9) + 10e-6)).abs() < 1e-12, "{e:?}");
    assert!(e.low < e.seconds && e.seconds < e.high && e.source == EstimateSource::Prior);
    // Bound by arithmetic: 1e13 operations at 0.45 x 15 TFLOP/s.
    let e = model.compute(gpu, vram, Work { flops: 1e13, ..work }, 0);
    assert!((e.seconds - 1e13 / (0.45 * 15e12)).abs() < 1e-9, "{e:?}");
    let e = model.transfer(machine.link("dram0", "vram0").unwrap(), Bytes(2_560_000));
    assert!((e.seconds - (10e-6 + 1e-4 / 0.9)).abs() < 1e-12, "{e:?}");
}

#[test]
fn limit_is_bytes_over_bandwidth() {
    let spec = qwen("Q4_K_M");
    let limit = step_limit_at(&spec, Batch::decode(0), QuantFormat::F16, BytesPerS(100e9)).0;
    let bytes = (spec.active_bytes_per_token().0 + 98_304) as f64;
    assert!((limit - bytes / 100e9).abs() < 1e-12);
    let machine = Machine::from_toml(crate::machine::tests::SMALL).unwrap();
    let on_gpu = step_limit(&spec, Batch::decode(0), QuantFormat::F16, &machine).0;
    assert!((on_gpu - bytes / 272e9).abs() < 1e-12);
}
