//! Placements over devices in the formats of SGLang, TensorRT-LLM and vLLM-Ascend, and back.
//!
//! All three want as many slots on every device and divide tokens equally among replicas; free slots are filled with the replica that
//! lowers the largest load most, and the balance that is left is compared with the plan's. Formats and checks:
//! SGLang `expert_location.py` @ 6270b01, TensorRT-LLM `llm_args.py` (`MoeLoadBalancerConfig`) and `moe_load_balancer.py` @ 5685103,
//! vLLM-Ascend `expert_load_balancer.py` @ 8df40d4.

use super::{Content, Exported, Loss, cannot};
use crate::balance::holders::LayerPlacement;
use crate::balance::metrics::Balance;
use crate::balance::result::{BALANCE_VERSION, BalanceFile, FileDevice, once};
use crate::balance::split::{Splitter, Unit};
use crate::error::PlanError;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// Slots by layer, side by side over devices, as many on each. `[moe layers][slots]`
type Rows = Vec<Vec<u16>>;

/// Parts of a layer's load when it is divided exactly.
const PARTS: f64 = 1e9;

/// Every slot filled, and what that changes.
fn filled(file: &BalanceFile, target: &'static str, may_repeat: bool) -> Result<(Rows, Loss), PlanError> {
    let per_device = file.devices.first().map_or(0, |d| d.slots);
    if file.num_outside() > 0 {
        let expected = format!("none: {target} has all experts on its devices; plan without --host-slots and --disk-slots");
        return cannot(target, "experts in host memory or on disk", &file.num_outside(), expected);
    }
    if let Some(g) = file.devices.iter().position(|d| d.slots != per_device) {
        let expected = format!(
            "{per_device}, as on device 0: {target} has as many on every device; plan with --replicas instead of --slots"
        );
        return cannot(target, format!("the number of slots of device {g}"), &file.devices[g].slots, expected);
    }
    let per_device = per_device as usize;
    let devices = file.devices.len();
    let speed: Vec<f64> = file.devices.iter().map(|d| d.speed).collect();
    let mut loss = Loss::default();
    let (mut planned, mut exported, mut splitter) = (Balance::default(), Balance::default(), Splitter::default());
    let (mut rows, mut added, mut repeated) = (Vec::new(), 0_u64, 0_u64);
    for (held, load) in file.slots.iter().zip(&file.load) {
        let mut held = held.clone();
        let exact = LayerPlacement { devices: held.iter().map(|d| once(d)).collect() };
        let tokens: Vec<u64> = load.iter().map(|w| (w * PARTS).round() as u64).collect();
        splitter.split(&exact.holders(load.len()), &tokens, &speed, Unit::Tokens);
        planned.add(&splitter.load.iter().zip(&speed).map(|(l, s)| *l as f64 / s).collect::<Vec<_>>());
        for g in 0..devices {
            while held[g].len() < per_device {
                let candidates = (0..load.len() as u16).filter(|e| !held[g].contains(e));
                let after = |e: u16| {
                    let mut with = held.clone();
                    with[g].push(e);
                    largest(&slot_loads(&with, load), &speed)
                };
                let best = candidates.map(|e| (after(e), e)).min_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, e)| e);
                if let Some(e) = best {
                    added += 1;
                    held[g].push(e);
                } else if may_repeat {
                    // More slots than experts: a second copy of the one whose division changes least.
                    let e = held[g].iter().copied().min_by(|a, b| load[usize::from(*a)].total_cmp(&load[usize::from(*b)]));
                    repeated += 1;
                    held[g].push(e.expect("a device with slots holds an expert"));
                } else {
                    let expected = format!("at most {}, the number of experts: no device may hold one twice", load.len());
                    return cannot(target, "slots of a device", &per_device, expected);
                }
            }
        }
        let loads = slot_loads(&held, load);
        exported.add(&loads.iter().zip(&speed).map(|(l, s)| l / s).collect::<Vec<_>>());
        rows.push(held.into_iter().flatten().collect());
    }
    loss.balancedness_planned = Some(planned.report().aggregate_balancedness);
    loss.balancedness_exported = Some(exported.report().aggregate_balancedness);
    loss.notes.push("tokens divide equally among the replicas of an expert: there are no weights for them, and no copies while serving (L2 and L3)".into());
    if added > 0 {
        loss.notes.push(format!("{added} free slots were filled with further replicas"));
    }
    if repeated > 0 {
        loss.notes
            .push(format!("{repeated} slots hold an expert that their device holds already: there are more slots than experts"));
    }
    if speed.iter().any(|s| *s != speed[0]) {
        loss.notes.push("the devices' different speeds are in the placement, not in the division of tokens".into());
    }
    Ok((rows, loss))
}

/// Load of each device when every slot has an equal part.
fn slot_loads(held: &[Vec<u16>], load: &[f64]) -> Vec<f64> {
    let mut count = vec![0.0; load.len()];
    held.iter().flatten().for_each(|e| count[usize::from(*e)] += 1.0);
    held.iter().map(|d| d.iter().map(|e| load[usize::from(*e)] / count[usize::from(*e)]).sum()).collect()
}

fn largest(loads: &[f64], speed: &[f64]) -> f64 {
    loads.iter().zip(speed).map(|(l, s)| l / s).fold(0.0, f64::max)
}

/// SGLang's `--init-expert-location`: rows for all layers, dense ones too.
///
/// # Errors
/// [`PlanError::CannotExport`].
pub fn sglang(file: &BalanceFile) -> Result<Exported, PlanError> {
    const TARGET: &str = "sglang";
    let (rows, mut loss) = filled(file, TARGET, true)?;
    let slots = rows.first().map_or(0, Vec::len);
    let trivial: Vec<u16> = (0..slots).map(|p| (p % file.num_experts as usize) as u16).collect();
    let mut all = vec![trivial; file.num_layers as usize];
    for (layer, row) in file.moe_layers.iter().zip(rows) {
        all[*layer as usize] = row;
    }
    let dense = file.num_layers as usize - file.moe_layers.len();
    if dense > 0 {
        loss.notes.push(format!("{dense} layers without experts have the row that SGLang expects for them"));
    }
    let text = json!({ "physical_to_logical_map": all }).to_string() + "\n";
    check_sglang(&text, file.num_layers as usize, file.num_experts as usize, file.devices.len(), slots)?;
    let nodes = file.devices.iter().map(|d| d.node + 1).max().unwrap_or(1);
    Ok(Exported {
        target: TARGET,
        written_for: "sgl-project/sglang expert_location.py @ 6270b01",
        content: Some(Content::Text(text)),
        command: format!(
            "python -m sglang.launch_server --model-path {{model}} --tp-size {n} --ep-size {n} --nnodes {nodes} --ep-num-redundant-experts {} \
             --init-expert-location {{file}} --ep-dispatch-algorithm static",
            slots - file.num_experts as usize,
            n = file.devices.len(),
        ),
        loss,
        on_gpu: Vec::new(),
    })
}

/// SGLang's own demands on the file. `slots`: `num_experts` and `--ep-num-redundant-experts` together.
///
/// # Errors
/// [`PlanError::CannotExport`] where SGLang would fail.
pub fn check_sglang(text: &str, num_layers: usize, num_experts: usize, ep_size: usize, slots: usize) -> Result<Rows, PlanError> {
    const TARGET: &str = "sglang";
    let map: Map<String, Value> = match serde_json::from_str(text) {
        Ok(map) => map,
        Err(e) => return cannot(TARGET, "the file", &e, "a JSON object"),
    };
    // init_by_mapping(**dict): any other key is an unexpected argument.
    if map.len() != 1 || !map.contains_key("physical_to_logical_map") {
        let keys: Vec<&str> = map.keys().map(String::as_str).collect();
        return cannot(TARGET, "the keys of the file", &keys.join(", "), "physical_to_logical_map and no other");
    }
    let rows: Rows = match serde_json::from_value(map["physical_to_logical_map"].clone()) {
        Ok(rows) => rows,
        Err(e) => return cannot(TARGET, "physical_to_logical_map", &e, "rows of expert ids"),
    };
    if rows.len() != num_layers {
        return cannot(TARGET, "the number of rows", &rows.len(), format!("{num_layers}, all hidden layers, dense ones too"));
    }
    if ep_size == 0 || !slots.is_multiple_of(ep_size) {
        return cannot(TARGET, "the number of slots", &slots, format!("a multiple of --ep-size, {ep_size}"));
    }
    check_rows(TARGET, rows.iter().enumerate().map(|(l, r)| (l as u32, r)), num_experts, slots)?;
    Ok(rows)
}

/// As many slots in each row, known experts, none without a slot.
fn check_rows<'a>(
    target: &'static str,
    rows: impl Iterator<Item = (u32, &'a Vec<u16>)>,
    num_experts: usize,
    slots: usize,
) -> Result<(), PlanError> {
    for (layer, row) in rows {
        if row.len() != slots {
            return cannot(target, format!("the number of slots of layer {layer}"), &row.len(), slots.to_string());
        }
        let mut seen = vec![false; num_experts];
        for e in row {
            match seen.get_mut(usize::from(*e)) {
                Some(seen) => *seen = true,
                None => return cannot(target, format!("an expert of layer {layer}"), e, format!("below {num_experts}")),
            }
        }
        if let Some(e) = seen.iter().position(|s| !s) {
            return cannot(target, format!("the slots of expert {e} in layer {layer}"), &0, "one or more");
        }
    }
    Ok(())
}

/// TensorRT-LLM's `moe_load_balancer` YAML.
///
/// # Errors
/// [`PlanError::CannotExport`].
pub fn tensorrt_llm(file: &BalanceFile) -> Result<Exported, PlanError> {
    const TARGET: &str = "tensorrt-llm";
    let (rows, loss) = filled(file, TARGET, true)?;
    let slots = rows.first().map_or(0, Vec::len);
    let mut text = format!("num_slots: {slots}\ninitial_global_assignments:\n");
    for (layer, row) in file.moe_layers.iter().zip(&rows) {
        let ids: Vec<String> = row.iter().map(ToString::to_string).collect();
        text += &format!("  {layer}: [{}]\n", ids.join(", "));
    }
    text += "layer_updates_per_iter: 0\n";
    check_tensorrt_llm(&text, file.num_experts as usize, file.devices.len())?;
    Ok(Exported {
        target: TARGET,
        written_for: "NVIDIA/TensorRT-LLM MoeLoadBalancerConfig @ 5685103",
        content: Some(Content::Text(text)),
        command: format!(
            "trtllm-serve {{model}} --tp_size {n} --ep_size {n} --extra_llm_api_options options.yaml  # options.yaml: enable_attention_dp: true, \
             moe_config: {{ load_balancer: {{file}} }}",
            n = file.devices.len()
        ),
        loss,
        on_gpu: Vec::new(),
    })
}

/// TensorRT-LLM's own demands: no unknown keys, slots divide among ranks and hold every expert, a row of slots per listed layer.
///
/// # Errors
/// [`PlanError::CannotExport`] where it would fail.
pub fn check_tensorrt_llm(text: &str, num_experts: usize, ep_size: usize) -> Result<BTreeMap<u32, Vec<u16>>, PlanError> {
    const TARGET: &str = "tensorrt-llm";
    let (mut slots, mut rows, mut inside) = (None, BTreeMap::new(), false);
    for line in text.lines().filter(|l| !l.trim().is_empty() && !l.trim_start().starts_with('#')) {
        let Some((key, value)) = line.split_once(':') else { return cannot(TARGET, "a line", &line, "KEY: VALUE") };
        let value = value.split('#').next().unwrap_or_default().trim();
        if line.starts_with(' ') && inside {
            let ids = value.strip_prefix('[').and_then(|v| v.strip_suffix(']'));
            let ids: Option<Vec<u16>> = ids.and_then(|v| v.split(',').map(|x| x.trim().parse().ok()).collect());
            match (key.trim().parse::<u32>(), ids) {
                (Ok(layer), Some(ids)) => drop(rows.insert(layer, ids)),
                _ => {
                    return cannot(
                        TARGET,
                        "an assignment",
                        &line.chars().take(60).collect::<String>(),
                        "LAYER: [expert, expert, ...]",
                    );
                }
            }
            continue;
        }
        inside = key == "initial_global_assignments";
        match key {
            "num_slots" => slots = value.parse::<usize>().ok(),
            "initial_global_assignments" if value.is_empty() => {}
            "layer_updates_per_iter" if value.parse::<u32>().is_ok() => {}
            // A strict pydantic model.
            _ => return cannot(TARGET, "a key", &line, "num_slots, initial_global_assignments or layer_updates_per_iter"),
        }
    }
    let Some(slots) = slots else { return cannot(TARGET, "num_slots", &"absent", "a number") };
    if slots < num_experts || ep_size == 0 || !slots.is_multiple_of(ep_size) {
        return cannot(TARGET, "num_slots", &slots, format!("{num_experts} or more, a multiple of {ep_size}, the ranks"));
    }
    check_rows(TARGET, rows.iter().map(|(l, r)| (*l, r)), num_experts, slots)?;
    Ok(rows)
}

/// vLLM-Ascend's expert map.
///
/// # Errors
/// [`PlanError::CannotExport`].
pub fn vllm_ascend(file: &BalanceFile) -> Result<Exported, PlanError> {
    const TARGET: &str = "vllm-ascend";
    let (rows, loss) = filled(file, TARGET, false)?;
    let devices = file.devices.len();
    let slots = rows.first().map_or(0, Vec::len);
    let layers: Vec<Value> = rows
        .iter()
        .enumerate()
        .map(|(i, row)| {
            let list: Vec<Value> = row
                .chunks(slots / devices)
                .enumerate()
                .map(|(g, held)| json!({ "device_id": g, "device_expert": held }))
                .collect();
            json!({ "layer_id": i, "device_count": devices, "device_list": list })
        })
        .collect();
    let text = json!({ "moe_layer_count": rows.len(), "layer_list": layers }).to_string() + "\n";
    check_vllm_ascend(&text, file.num_experts as usize, devices)?;
    let config = format!(
        r#"{{"eplb_config":{{"dynamic_eplb":false,"expert_map_path":"{{file}}","num_redundant_experts":{}}}}}"#,
        slots - file.num_experts as usize
    );
    Ok(Exported {
        target: TARGET,
        written_for: "vllm-project/vllm-ascend expert_load_balancer.py @ 8df40d4",
        content: Some(Content::Text(text)),
        command: format!(
            "vllm serve {{model}} --enable-expert-parallel --data-parallel-size {devices} --additional-config '{config}'"
        ),
        loss,
        on_gpu: Vec::new(),
    })
}

/// vLLM-Ascend's own demands: a tensor of layers, ranks and slots (so as many everywhere), and no expert twice on a rank, where the second would
/// take the first one's place in the map.
///
/// # Errors
/// [`PlanError::CannotExport`] where it would fail or err.
pub fn check_vllm_ascend(text: &str, num_experts: usize, ranks: usize) -> Result<Rows, PlanError> {
    const TARGET: &str = "vllm-ascend";
    let value: Value = match serde_json::from_str(text) {
        Ok(value) => value,
        Err(e) => return cannot(TARGET, "the file", &e, "JSON"),
    };
    let list = value["layer_list"].as_array().cloned().unwrap_or_default();
    if value["moe_layer_count"].as_u64() != Some(list.len() as u64) || list.is_empty() {
        return cannot(TARGET, "moe_layer_count", &value["moe_layer_count"], format!("{}, the layers of layer_list", list.len()));
    }
    let mut rows = Vec::new();
    let mut slots = None;
    for (i, layer) in list.iter().enumerate() {
        let devices = layer["device_list"].as_array().cloned().unwrap_or_default();
        if devices.len() != ranks || layer["device_count"].as_u64() != Some(ranks as u64) {
            return cannot(
                TARGET,
                format!("the devices of layer {i}"),
                &devices.len(),
                format!("{ranks}, the ranks, and device_count too"),
            );
        }
        let mut row = Vec::new();
        for (g, device) in devices.iter().enumerate() {
            let held: Vec<u16> = match serde_json::from_value(device["device_expert"].clone()) {
                Ok(held) => held,
                Err(e) => return cannot(TARGET, format!("device_expert of layer {i}, device {g}"), &e, "expert ids"),
            };
            if once(&held).len() != held.len() {
                return cannot(TARGET, format!("the experts of layer {i}, device {g}"), &"one twice", "each once");
            }
            if *slots.get_or_insert(held.len()) != held.len() {
                return cannot(TARGET, format!("the slots of layer {i}, device {g}"), &held.len(), "as many as everywhere");
            }
            row.extend(held);
        }
        rows.push(row);
    }
    let slots = slots.unwrap_or(0) * ranks;
    check_rows(TARGET, rows.iter().enumerate().map(|(l, r)| (l as u32, r)), num_experts, slots)?;
    Ok(rows)
}

/// Reads a placement that SGLang, TensorRT-LLM or vLLM-Ascend would take. `devices`: how many there are; vLLM-Ascend's file says. Loads are
/// unknown, and even.
///
/// # Errors
/// [`PlanError::BadBalance`] when it is none of them, [`PlanError::CannotExport`] where the engine would refuse it.
pub fn import(text: &str, devices: usize) -> Result<BalanceFile, PlanError> {
    let json: Option<Value> = serde_json::from_str(text).ok();
    let most = |rows: &[&Vec<u16>]| rows.iter().flat_map(|r| r.iter()).map(|e| usize::from(*e) + 1).max().unwrap_or(0);
    let (policy, rows): (&str, BTreeMap<u32, Vec<u16>>) = match &json {
        Some(v) if v.get("physical_to_logical_map").is_some() => {
            let rows: Rows = serde_json::from_value(v["physical_to_logical_map"].clone()).unwrap_or_default();
            let experts = most(&rows.iter().collect::<Vec<_>>());
            let slots = rows.first().map_or(0, Vec::len);
            let rows = check_sglang(text, rows.len(), experts, devices, slots)?;
            ("sglang", (0..).zip(rows).collect())
        }
        Some(v) if v.get("layer_list").is_some() => {
            let held =
                |v: &Value| v["device_expert"].as_array().into_iter().flatten().filter_map(Value::as_u64).collect::<Vec<_>>();
            let layers = v["layer_list"].as_array().into_iter().flatten();
            let ids = layers.flat_map(|l| l["device_list"].as_array().into_iter().flatten()).flat_map(held);
            let experts = ids.max().map_or(0, |e| e as usize + 1);
            ("vllm-ascend", (0..).zip(check_vllm_ascend(text, experts, devices)?).collect())
        }
        None if text.lines().any(|l| l.starts_with("num_slots:")) => {
            // First with as few experts as there can be, to find the largest id.
            let rows = check_tensorrt_llm_rows(text);
            let experts = most(&rows.values().collect::<Vec<_>>());
            ("tensorrt-llm", check_tensorrt_llm(text, experts, devices)?)
        }
        _ => {
            return Err(PlanError::BadBalance {
                field: "the placement".into(),
                found: text.chars().take(40).collect(),
                expected: "a file of `tierwise balance -o`, SGLang's physical_to_logical_map, vLLM-Ascend's layer_list or TensorRT-LLM's num_slots".into(),
            });
        }
    };
    let experts = most(&rows.values().collect::<Vec<_>>());
    let per_device = rows.values().next().map_or(0, Vec::len) / devices.max(1);
    let file = BalanceFile {
        tierwise_balance: BALANCE_VERSION,
        model: "not stated".into(),
        num_layers: rows.keys().last().map_or(0, |l| l + 1),
        moe_layers: rows.keys().copied().collect(),
        num_experts: experts as u32,
        num_groups: 1,
        policy: format!("imported from {policy}"),
        devices: vec![FileDevice { node: 0, speed: 1.0, slots: per_device as u32 }; devices],
        slots: rows.values().map(|r| r.chunks(per_device.max(1)).map(<[u16]>::to_vec).collect()).collect(),
        load: vec![vec![1.0 / experts.max(1) as f64; experts]; rows.len()],
        packs: Vec::new(),
        pack_of: Vec::new(),
    };
    file.check()?;
    Ok(file)
}

/// The rows of a file that may be wrong in other ways.
fn check_tensorrt_llm_rows(text: &str) -> BTreeMap<u32, Vec<u16>> {
    let row = |line: &str| {
        let (layer, ids) = line.trim().split_once(':')?;
        let ids = ids.trim().strip_prefix('[')?.strip_suffix(']')?;
        Some((layer.parse().ok()?, ids.split(',').map(|x| x.trim().parse().ok()).collect::<Option<_>>()?))
    };
    text.lines().filter_map(row).collect()
}
