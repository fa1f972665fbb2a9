//! Sizes and tensor tables against published figures.

use super::*;
use crate::op::{Batch, OpKind, lower};

/// Qwen3-30B-A3B, from its published config.
pub(crate) fn qwen3_30b() -> Geometry {
    let layer = LayerSpec {
        attention: Attention::Gqa(Gqa {
            qk_norm: QkNorm::PerHead,
            ..Gqa::plain(32, 4, 128, Rope::plain(1e6, 128, RopePairing::Halves))
        }),
        ffn: Ffn::Moe(Moe::plain(128, 8, 768, Router::softmax(true))),
    };
    Geometry {
        name: "Qwen3-30B-A3B".into(),
        architecture: "qwen3moe".into(),
        hidden_size: 2048,
        vocab_size: 151_936,
        context_length: 40_960,
        norm_eps: 1e-6,
        norm: NormKind::Rms,
        tie_word_embeddings: false,
        output_bias: false,
        scales: Scales::default(),
        layers: vec![layer; 48],
    }
}

#[test]
fn parameter_counts_are_the_published_ones() {
    let spec = ModelSpec::with_recipe(qwen3_30b(), &Recipe::by_name("BF16").unwrap()).unwrap();
    // Published: 30.5 B total, 3.3 B active (embedding included in the latter).
    assert_eq!(spec.total_elements(), 30_532_122_624);
    let with_embedding = spec.active_elements_per_token() + 151_935 * 2048;
    assert!((3.25e9..3.40e9).contains(&(with_embedding as f64)), "{with_embedding}");
    // 4 KV heads x 128 x 2 x 48 layers x 2 bytes.
    assert_eq!(spec.kv_bytes_per_token(QuantFormat::F16), crate::units::Bytes(98_304));
}

#[test]
fn groups_and_layers_add_up_to_the_total() {
    let spec = ModelSpec::with_recipe(qwen3_30b(), &Recipe::by_name("Q4_K_M").unwrap()).unwrap();
    let by_role: u64 = spec.bytes_by_role().iter().map(|r| r.bytes.0).sum();
    let by_format: u64 = spec.bytes_by_format().iter().map(|(_, b)| b.0).sum();
    assert_eq!(by_role, spec.total_bytes().0);
    assert_eq!(by_format, spec.total_bytes().0);
    for (l, bytes) in spec.layer_bytes().iter().enumerate() {
        assert_eq!(bytes.per_expert.0 * 128, bytes.routed.0, "layer {l}");
    }
    // The published Q4_K_M file has 18.56 GB.
    assert!((18.4e9..18.7e9).contains(&(spec.total_bytes().0 as f64)), "{}", spec.total_bytes().0);
}

#[test]
fn toml_round_trips_and_is_short() {
    let g = qwen3_30b();
    let text = g.to_toml("its config.json", None).unwrap();
    assert_eq!(Geometry::from_toml(&text).unwrap(), g);
    assert!(text.lines().count() < 60, "{text}");
    assert!(Geometry::from_toml(&text.replace("hidden_size", "hiden_size")).is_err());
    let zero = Geometry::from_toml(&text.replace("num_experts = 128", "num_experts = 4")).unwrap_err().to_string();
    assert!(zero.contains("experts_per_token") && zero.contains("1 to 4"), "{zero}");
}

#[test]
fn a_pattern_of_layers_is_written_once() {
    let text =
        |block: &str| format!("name='x'\narchitecture='x'\nhidden_size=64\nvocab_size=10\ncontext_length=9\nsource='x'\n{block}");
    let mixer = |name: &str, weights: u64| {
        format!("{{kind='plan_only', name='{name}', weight_elements={weights}, kv_elements_per_token=2}}")
    };
    let layers = format!(
        "[[block]]\nrepeat=3\n[[block.layer]]\nrepeat=2\nattention={}\nffn={{kind='none'}}\n[[block.layer]]\nattention={}\nffn={{kind='dense', inner_size=8}}\n",
        mixer("a", 128),
        mixer("b", 0)
    );
    let g = Geometry::from_toml(&text(&layers)).unwrap();
    let names: String = g
        .layers
        .iter()
        .map(|l| if matches!(&l.attention, Attention::PlanOnly(m) if m.name == "a") { 'a' } else { 'b' })
        .collect();
    assert_eq!(names, "aabaabaab");
    assert_eq!(Geometry::from_toml(&g.to_toml("x", None).unwrap()).unwrap(), g);
    // A mixer without weights is no tensor, and neither is a missing feed-forward part.
    let of_layer = |l: u32| tensor_shapes(&g).iter().filter(|t| t.layer == Some(l)).map(|t| t.name.clone()).collect::<Vec<_>>();
    assert_eq!(of_layer(0), ["blk.0.attn_norm.weight", "blk.0.mixer.weight"]);
    assert_eq!(of_layer(2), ["blk.2.ffn_norm.weight", "blk.2.ffn_gate.weight", "blk.2.ffn_up.weight", "blk.2.ffn_down.weight"]);
    for (block, expected) in [
        ("[[block]]\nrepeat=1\n", "no attention"),
        (
            "[[block]]\nrepeat=1\nffn={kind='none'}\n[[block.layer]]\nattention={kind='plan_only', name='a', weight_elements=1, kv_elements_per_token=1}\nffn={kind='none'}\n",
            "both layers and",
        ),
        (
            "[[block]]\nrepeat=4294967295\n[[block.layer]]\nrepeat=4294967295\nattention={kind='plan_only', name='a', weight_elements=1, kv_elements_per_token=1}\nffn={kind='none'}\n",
            "1 to 4096",
        ),
    ] {
        let message = Geometry::from_toml(&text(block)).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn fingerprints_tell_formats_apart() {
    let of = |recipe| ModelSpec::with_recipe(qwen3_30b(), &Recipe::by_name(recipe).unwrap()).unwrap().fingerprint();
    assert_eq!(of("Q8_0"), of("Q8_0"));
    assert_ne!(of("Q8_0"), of("Q4_0"));
}

#[test]
fn every_weight_is_used_exactly_once_by_a_step() {
    let latent = include_str!("../../../configs/models/deepseek-v3.toml");
    for geometry in [qwen3_30b(), Geometry::from_toml(latent).unwrap()] {
        uses_every_weight_once(&ModelSpec::with_recipe(geometry, &Recipe::by_name("Q8_0").unwrap()).unwrap());
    }
}

fn uses_every_weight_once(spec: &ModelSpec) {
    let mut uses = vec![0; spec.tensors.len()];
    let ops = lower(spec, Batch::decode(0)).unwrap();
    for op in &ops {
        let ids = match &op.kind {
            OpKind::Embed { table } => vec![*table],
            OpKind::RmsNorm { weight, .. } => vec![*weight],
            OpKind::LayerNorm { weight, bias, .. } => vec![*weight, *bias],
            OpKind::QkNorm { weight, .. } => weight.iter().copied().collect(),
            OpKind::MatMul { weight, bias, .. } | OpKind::Logits { weight, bias, .. } => {
                std::iter::once(*weight).chain(*bias).collect()
            }
            OpKind::Route { weight, bias, selection_bias, .. } => {
                std::iter::once(*weight).chain(*bias).chain(*selection_bias).collect()
            }
            OpKind::LatentAttention { kv_norm, k_b, v_b, .. } => vec![*kv_norm, *k_b, *v_b],
            OpKind::RoutedExperts { gate, up, down, biases, .. } => {
                [*gate, *up, *down].into_iter().chain(biases.iter().flatten().copied()).collect()
            }
            OpKind::Ffn { gate, up, down, sigmoid_gate, .. } => [*gate, *up, *down].into_iter().chain(*sigmoid_gate).collect(),
            OpKind::Attention { sinks, .. } => sinks.iter().copied().collect(),
            OpKind::DeltaRule { conv, dt_bias, decay, norm, .. } => vec![*conv, *dt_bias, *decay, *norm],
            OpKind::Rope { .. }
            | OpKind::Scale { .. }
            | OpKind::Temper(_)
            | OpKind::SplitGate { .. }
            | OpKind::GateAttended
            | OpKind::AddDelta { .. }
            | OpKind::InnerResidual
            | OpKind::NextIteration
            | OpKind::SelectRows => vec![],
        };
        for id in ids {
            uses[id.0 as usize] += 1;
        }
    }
    assert!(uses.iter().all(|n| *n == 1), "{uses:?}");
    assert!(matches!(ops.last().unwrap().kind, OpKind::Logits { .. }));
}
