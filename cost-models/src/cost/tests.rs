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
    let output = ops.iter().find(|o| matches!(o.kind, OpKind::Logits { .. })).unwrap();
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
fn quantised_matrices_meet_the_measured_8_bit_rate_with_enough_tokens() {
    let mut machine = Machine::from_toml(crate::machine::tests::SMALL).unwrap();
    let model = Roofline::default();
    let seconds = |machine: &Machine, format: QuantFormat, tokens: f64| {
        let (elements, layout) = (1e6, format.layout());
        let (bytes, flops) = (elements * layout.bytes as f64 / layout.elems as f64, 2.0 * elements * tokens);
        let work = Work { flops, matrices: ByFormat::one(format, bytes, flops), ..Work::default() };
        model.compute(machine.processor("cpu0").unwrap(), machine.memory("dram0").unwrap(), work, 0).seconds
    };
    let before = [1.0, 100.0].map(|tokens| seconds(&machine, QuantFormat::Q4_K, tokens));
    let cpu = machine.processors.iter_mut().find(|p| p.id == "cpu0").unwrap();
    let f32_rate = cpu.f32_flops.value.0;
    let int8 = crate::units::FlopsPerS(10.0 * f32_rate);
    cpu.int8_ops = Some(crate::machine::Sourced::prior(int8));
    assert_eq!(before[1], seconds(&machine, QuantFormat::Q4_K, 100.0), "what nobody measured changes nothing");
    let cpu = machine.processors.iter_mut().find(|p| p.id == "cpu0").unwrap();
    cpu.int8_ops = Some(crate::machine::Sourced::measured(int8));
    // 100 tokens at 0.85 of ten times the rate; few as before, and BF16 too.
    let many = seconds(&machine, QuantFormat::Q4_K, 100.0);
    assert!((many - 2e8 / (8.5 * f32_rate)).abs() < 1e-12, "{many}");
    assert!((seconds(&machine, QuantFormat::Q4_K, 0.5) - before[0] / 2.0).abs() < 1e-15);
    assert!((seconds(&machine, QuantFormat::BF16, 100.0) - before[1]).abs() < 1e-12);
    let times: Vec<f64> = (1..200).map(|t| seconds(&machine, QuantFormat::Q4_K, f64::from(t))).collect();
    assert!(times.is_sorted(), "more tokens take no less time");
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

mod calibrated {
    use super::*;
    use crate::machine::tests::{CALIBRATION, SMALL};

    fn machine() -> Machine {
        Machine::from_toml(&format!("{SMALL}{CALIBRATION}")).unwrap()
    }

    /// `elements` of Q8_0 experts at `tokens` each, of which `distinct` are computed together.
    fn experts(elements: f64, tokens: f64, distinct: f64) -> Work {
        let (bytes, flops) = (elements * 34.0 / 32.0, 2.0 * elements * tokens);
        let matrices = ByFormat::one(QuantFormat::Q8_0, bytes, flops);
        Work { weight_bytes: Bytes(bytes as u64), flops, matrices, distinct, ..Work::default() }
    }

    fn price(work: Work) -> Estimate {
        let m = machine();
        cost_model(&m).compute(m.processor("cpu0").unwrap(), m.memory("dram0").unwrap(), work, 16)
    }

    #[test]
    fn experts_by_hand() {
        // One expert of 3 x 1000 x 1000 elements alone: the sample itself, with its own interval.
        let e = price(experts(3e6, 1.0, 1.0));
        assert_eq!(e.source, EstimateSource::Measured);
        assert!((e.seconds - 300e-6).abs() < 1e-9 && (e.low - 270e-6).abs() < 1e-9 && (e.high - 360e-6).abs() < 1e-9, "{e:?}");
        // One of four computed together: a quarter of 600 us.
        assert!((price(experts(3e6, 1.0, 4.0)).seconds - 150e-6).abs() < 1e-9);
        // One of two: between 300 and 150 us per expert, halfway in logarithms.
        let e = price(experts(3e6, 1.0, 2.0));
        assert!((e.seconds - (300e-6f64 * 150e-6).sqrt()).abs() < 1e-9, "{e:?}");
        assert_eq!(e.source, EstimateSource::Interpolated);
        assert!(e.low < 270e-6 / 2f64.sqrt() + 1e-9 && e.high > 360e-6 / 2f64.sqrt() - 1e-9, "{e:?}");
        // Eight tokens: halfway between 4 (300 us) and 16 (1200 us).
        assert!((price(experts(3e6, 8.0, 4.0)).seconds - 600e-6).abs() < 1e-9);
        // Beyond the last: as many times longer.
        let e = price(experts(3e6, 32.0, 4.0));
        assert!((e.seconds - 2400e-6).abs() < 1e-9 && e.source == EstimateSource::Analytic, "{e:?}");
        // Twice the elements take twice as long.
        assert!((price(experts(6e6, 4.0, 4.0)).seconds - 600e-6).abs() < 1e-9);
    }

    #[test]
    fn parts_of_a_layer_add_up() {
        let matrix = Work { distinct: 0.0, ..experts(1e6, 1.0, 0.0) };
        assert!((price(matrix).seconds - 50e-6).abs() < 1e-9);
        let kv = Work { kv_bytes: Bytes(1_000_000), flops: 4e6, attention_flops: 4e6, ..Work::default() };
        // 4 operations per byte: halfway between 100 us and 400 us.
        assert!((price(kv).seconds - 200e-6).abs() < 1e-9, "{:?}", price(kv));
        let small = Work { activations: 1000.0, ..Work::default() };
        assert!((price(small).seconds - 1e-6).abs() < 1e-12);
        let all = price(matrix + kv + small);
        assert!((all.seconds - 251e-6).abs() < 1e-9, "{all:?}");
        assert_eq!(all.source, EstimateSource::Interpolated);
    }

    #[test]
    fn what_was_not_measured_is_labelled() {
        let m = machine();
        let model = cost_model(&m);
        assert!(model.describe().contains("gpu0 (roofline)"), "{}", model.describe());
        let (gpu, vram) = (m.processor("gpu0").unwrap(), m.memory("vram0").unwrap());
        let work = experts(3e6, 1.0, 8.0);
        assert_eq!(model.compute(gpu, vram, work, 3), Roofline::default().compute(gpu, vram, work, 3));
        let link = m.link("dram0", "vram0").unwrap();
        assert_eq!(model.transfer(link, Bytes::mib(1)), Roofline::default().transfer(link, Bytes::mib(1)));
        // Q4_0 was not measured: between Q8_0's time and Q8_0's time per byte.
        let q4 = ByFormat::one(QuantFormat::Q4_0, 3e6 * 18.0 / 32.0, 6e6);
        let e = price(Work { matrices: q4, weight_bytes: Bytes(1_687_500), flops: 6e6, distinct: 1.0, ..Work::default() });
        assert_eq!(e.source, EstimateSource::Analytic);
        assert!((e.seconds - 300e-6 * (18.0f64 / 34.0).sqrt()).abs() < 1e-9, "{e:?}");
        assert!(e.low < 270e-6 * 18.0 / 34.0 && e.high > 359e-6, "{e:?}");
        // Bytes that nobody gave a format are a prior's.
        let e = price(Work { weight_bytes: Bytes(1 << 20), flops: 1e6, ..Work::default() });
        assert_eq!(e.source, EstimateSource::Prior);
        assert!(cost_model(&Machine::from_toml(SMALL).unwrap()).describe().starts_with("roofline"));
    }

    #[test]
    fn memories_on_nodes_cost_what_was_measured_there() {
        use crate::machine::tests::{NODES, with_cxl};
        let m = Machine::from_toml(&format!("{}{CALIBRATION}{NODES}", with_cxl())).unwrap();
        let model = cost_model(&m);
        assert!(!model.describe().contains("cxl0"), "{}", model.describe());
        let (cpu, cxl) = (m.processor("cpu0").unwrap(), m.memory("cxl0").unwrap());
        // 3.1875 MB at 10 (8 to 12.5) GB/s is slower than the 300 (270 to 360) us that they take from the home memory.
        let e = model.compute(cpu, cxl, experts(3e6, 1.0, 1.0), 16);
        let seconds = |gb_per_s: f64| 3.1875e6 / gb_per_s / 1e9;
        assert!((e.seconds - seconds(10.0)).abs() < 1e-9 && (e.high - seconds(8.0)).abs() < 1e-9, "{e:?}");
        assert!((e.low - 270e-6).abs() < 1e-9 && e.source == EstimateSource::Measured, "the fastest run is bound at home: {e:?}");
        // With many tokens arithmetic decides, as at home.
        let work = experts(3e6, 16.0, 4.0);
        assert_eq!(model.compute(cpu, cxl, work, 16).seconds, model.compute(cpu, m.memory("dram0").unwrap(), work, 16).seconds);
    }

    #[test]
    fn a_whole_model_has_a_price_between_its_ends() {
        let spec = qwen("Q4_K_M");
        for batch in [Batch::decode(500), Batch::prefill(300, 0)] {
            let step = step_work(&spec, batch, QuantFormat::F16);
            for layer in &step.layers {
                for work in [layer.resident, layer.expert, layer.routed] {
                    let e = price(work);
                    assert!(e.low > 0.0 && e.low <= e.seconds && e.seconds <= e.high && e.high.is_finite(), "{batch:?} {e:?}");
                }
                // One expert's share times their number is all of them.
                let (one, all) = (price(layer.expert).seconds * layer.active_experts, price(layer.routed).seconds);
                assert!((one / all - 1.0).abs() < 1e-6, "{one} {all}");
            }
        }
    }

    #[test]
    fn disks_cost_what_their_reads_did() {
        let disk = r#"
[[memory]]
id = "disk0"
kind = "disk"
capacity = { value = "1 TB", source = "datasheet" }
read_bandwidth = { value = "3 GB/s", source = "prior" }
latency = { value = "80 us", source = "prior" }

[[link]]
from = "disk0"
to = "dram0"
bandwidth = { value = "3 GB/s", source = "prior" }
latency = { value = "80 us", source = "prior" }
"#;
        let samples = r#"disk = [
  { depth = 1, block = 1000000, gb_per_s = { median = 0.5, min = 0.4, max = 0.6, runs = 5 } },
  { depth = 4, block = 1000000, gb_per_s = { median = 1.0, min = 0.8, max = 1.25, runs = 5 } },
  { depth = 4, block = 4000000, gb_per_s = { median = 2.0, min = 1.6, max = 2.5, runs = 5 } },
]
disk_memory = "disk0""#;
        let text = format!("{SMALL}{disk}{}", CALIBRATION.replace("disk = []", samples));
        let m = Machine::from_toml(&text).unwrap();
        let model = cost_model(&m);
        let at = |bytes: u64| model.transfer(m.link("disk0", "dram0").unwrap(), Bytes(bytes));
        let e = at(1_000_000);
        assert!((e.seconds - 1e-3).abs() < 1e-9 && (e.low - 0.8e-3).abs() < 1e-9 && (e.high - 1.25e-3).abs() < 1e-9, "{e:?}");
        assert_eq!(e.source, EstimateSource::Measured);
        assert!((at(8_000_000).seconds - 4e-3).abs() < 1e-9, "twice the largest read");
    }
}
