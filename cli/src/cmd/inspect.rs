//! `tierwise inspect`

use crate::args::InspectArgs;
use crate::model;
use crate::ui::{self, Ui, number};
use anyhow::Result;
use serde_json::json;
use tierwise_cost::model::{Attention, Ffn, LayerSpec, ModelSpec};
use tierwise_cost::quant::QuantFormat;
use tierwise_cost::units::Bytes;
use tierwise_runtime::import::ModelSource;

pub fn run(args: &InspectArgs, ui: &Ui) -> Result<()> {
    let source = model::open(&args.model.model)?;
    let spec = model::spec(&source, args.model.format.as_deref(), args.model.layers)?;
    let origin = match &source {
        ModelSource::Gguf { gguf, .. } => {
            format!("{} ({} in {} files)", gguf.path().display(), Bytes(gguf.total_bytes()), gguf.part_paths().len())
        }
        ModelSource::Folder(f) => f.weights().path().display().to_string(),
        ModelSource::Description { origin, .. } => format!("{origin}, no weights; sizes as {}", spec.format_name),
    };
    let file_bytes = match &source {
        ModelSource::Gguf { gguf, .. } => Some(gguf.total_bytes()),
        ModelSource::Folder(_) | ModelSource::Description { .. } => None,
    };
    ui.result(&to_json(&spec, &origin, file_bytes, args.tensors), || to_text(&spec, &origin, args.tensors))
}

/// Expert count and top-k: of the first MoE layer, as most models have one kind.
fn experts(spec: &ModelSpec) -> (u32, u32) {
    spec.moe_layers().next().map_or((0, 0), |(_, m)| (m.num_experts, m.experts_per_token))
}

fn to_json(spec: &ModelSpec, origin: &str, file_bytes: Option<u64>, tensors: bool) -> serde_json::Value {
    let (num_experts, experts_per_token) = experts(spec);
    let layers: Vec<_> = spec
        .layers
        .iter()
        .zip(spec.layer_bytes())
        .enumerate()
        .map(|(i, (layer, bytes))| {
            json!({
                "layer": i, "attention": layer.attention, "ffn": layer.ffn,
                "resident_bytes": bytes.resident.0, "routed_bytes": bytes.routed.0, "bytes_per_expert": bytes.per_expert.0,
                "kv_bytes_per_token": spec.kv_bytes_of_layer(i as u32, 1, QuantFormat::F16).0 - spec.kv_bytes_of_layer(i as u32, 0, QuantFormat::F16).0,
            })
        })
        .collect();
    let mut value = json!({
        "name": spec.name, "origin": origin, "architecture": spec.architecture, "fingerprint": spec.fingerprint(), "format": spec.format_name,
        "num_layers": spec.layers.len(), "num_moe_layers": spec.moe_layers().count(), "hidden_size": spec.hidden_size,
        "vocab_size": spec.vocab_size, "context_length": spec.context_length,
        "num_experts": num_experts, "experts_per_token": experts_per_token,
        "num_parameters": spec.total_elements(), "active_parameters_per_token": spec.active_elements_per_token(),
        "file_bytes": file_bytes, "total_bytes": spec.total_bytes().0, "expert_bytes": spec.expert_bytes().0,
        "active_bytes_per_token": spec.active_bytes_per_token().0, "kv_bytes_per_token": spec.kv_bytes_per_token(QuantFormat::F16).0,
        "bytes_by_role": spec.bytes_by_role().iter().map(|r| (r.group.name().to_string(), json!(r.bytes.0))).collect::<serde_json::Map<_, _>>(),
        "bytes_by_format": spec.bytes_by_format().iter().map(|(f, b)| (f.name().to_string(), json!(b.0))).collect::<serde_json::Map<_, _>>(),
        "runnable": spec.plan_only_reason().is_none(), "not_runnable_because": spec.plan_only_reason(),
        "layers": layers,
    });
    if tensors {
        value["tensors"] = spec
            .tensors
            .iter()
            .map(|t| json!({ "name": t.name, "shape": t.shape, "format": t.format.name(), "bytes": t.bytes.0 }))
            .collect();
    }
    value
}

fn to_text(spec: &ModelSpec, origin: &str, tensors: bool) -> String {
    let (num_experts, top_k) = experts(spec);
    let total = spec.total_bytes();
    let share = |b: Bytes| ui::percent(b.0 as f64 / total.0.max(1) as f64);
    let mut text = format!(
        "{}  ({})\n  from          {origin}\n  architecture  {}, {} layers, hidden size {}, vocabulary {}, context {}\n",
        spec.name,
        spec.format_name,
        spec.architecture,
        spec.layers.len(),
        spec.hidden_size,
        spec.vocab_size,
        spec.context_length
    );
    if num_experts > 0 {
        text += &format!("  experts       {num_experts} per layer, {top_k} per token, in {} layers\n", spec.moe_layers().count());
    }
    text += &format!(
        "  parameters    {}, {} used per token\n  bytes         {total}, {} read per token; cache {} per token of context (F16)\n",
        parameters(spec.total_elements()),
        parameters(spec.active_elements_per_token()),
        spec.active_bytes_per_token(),
        spec.kv_bytes_per_token(QuantFormat::F16),
    );
    if let Some(why) = spec.plan_only_reason() {
        text += &format!("  note          can be planned, not run: {why}\n");
    }
    let roles = spec.bytes_by_role().into_iter().map(|r| vec![r.group.name().to_string(), r.bytes.to_string(), share(r.bytes)]);
    text += &format!("\n{}\n", ui::table(&["role", "bytes", "share"], roles, true));
    let formats = spec.bytes_by_format().into_iter().map(|(f, b)| vec![f.name().to_string(), b.to_string(), share(b)]);
    text += &format!("\n{}\n", ui::table(&["format", "bytes", "share"], formats, true));
    text += &format!("\n{}", layer_table(spec));
    if tensors {
        let rows = spec
            .tensors
            .iter()
            .map(|t| vec![t.name.clone(), format!("{:?}", t.shape), t.format.to_string(), t.bytes.to_string()]);
        text += &format!("\n\n{}", ui::table(&["tensor", "shape", "format", "bytes"], rows, false));
    }
    text
}

/// A parameter count as people write it: `30.5 B`, `22.2 M`.
fn parameters(count: u64) -> String {
    let count = count as f64;
    if count >= 1e9 { format!("{} B", number(count / 1e9)) } else { format!("{} M", number(count / 1e6)) }
}

/// Runs of layers that look the same are one row.
fn layer_table(spec: &ModelSpec) -> String {
    let mut runs: Vec<(usize, usize, &LayerSpec, _)> = Vec::new();
    for (i, (layer, bytes)) in spec.layers.iter().zip(spec.layer_bytes()).enumerate() {
        match runs.last_mut() {
            Some((_, last, same, b)) if *same == layer && *b == bytes => *last = i,
            _ => runs.push((i, i, layer, bytes)),
        }
    }
    let rows = runs.into_iter().map(|(first, last, layer, bytes)| {
        vec![
            if first == last { first.to_string() } else { format!("{first}-{last}") },
            attention(&layer.attention),
            ffn(&layer.ffn),
            bytes.resident.to_string(),
            if bytes.routed.0 > 0 { bytes.routed.to_string() } else { "-".into() },
            if bytes.per_expert.0 > 0 { bytes.per_expert.to_string() } else { "-".into() },
        ]
    });
    ui::table(&["layers", "attention", "feed-forward", "always read", "experts", "one expert"], rows, false)
}

fn attention(a: &Attention) -> String {
    match a {
        Attention::Gqa(a) => {
            let window = a.sliding_window.map(|w| format!(", window {w}")).unwrap_or_default();
            format!("{} heads, {} KV, {} wide{window}", a.num_heads, a.num_kv_heads, a.head_dim)
        }
        Attention::Mla(a) => format!("MLA, {} heads, rank {}+{}", a.num_heads, a.kv_lora_rank, a.qk_rope_head_dim),
        Attention::DeltaNet(a) => {
            format!("gated delta rule, {} heads, states {} x {}", a.num_value_heads, a.key_head_dim, a.value_head_dim)
        }
        Attention::PlanOnly(m) => m.name.clone(),
    }
}

fn ffn(f: &Ffn) -> String {
    match f {
        Ffn::Dense(d) => format!("dense, {} wide", d.inner_size),
        Ffn::Moe(m) => {
            let shared = m.shared.as_ref().map(|s| format!(" + shared {}", s.inner_size)).unwrap_or_default();
            format!("{} of {} experts, {} wide{shared}", m.experts_per_token, m.num_experts, m.inner_size)
        }
        Ffn::None => "none".into(),
    }
}
