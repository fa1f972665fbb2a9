//! llama.cpp and ik_llama.cpp: `-ot REGEX=BUFFER` and the whole command line.
//!
//! The experts of a layer are one tensor per matrix there, so a plan is projected: layers with the most experts on the GPU keep all
//! their matrices there while the planned bytes last, then single matrices of one more layer. Checks as in llama.cpp's
//! `common/arg.cpp`: an argument is split at commas, each part at its first `=`, so an expression may hold neither; the first that
//! `std::regex_search` finds in a tensor's name wins.

use super::pattern::Pattern;
use super::{Exported, TwoTiers, cannot};
use crate::error::PlanError;
use crate::plan::Plan;

/// The matrices of a layer's experts, in the order in which they are kept on the GPU.
const MATRICES: [&str; 3] = ["down", "up", "gate"];

/// One override: expression and buffer.
pub type Override = (String, String);

/// Reads the values of `-ot` arguments, in order.
///
/// # Errors
/// [`PlanError::CannotExport`] where llama.cpp would refuse.
pub fn parse_overrides<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Result<Vec<Override>, PlanError> {
    let mut out = Vec::new();
    for part in arguments.into_iter().flat_map(|a| a.split(',')) {
        let Some((pattern, buffer)) = part.split_once('=') else {
            return cannot(TARGET, "an override", &part, "REGEX=BUFFER, the expression without commas and equals signs");
        };
        let known = buffer == "CPU" || ["CUDA", "Vulkan", "ROCm", "Metal", "RPC[", "SYCL"].iter().any(|b| buffer.starts_with(b));
        if !known {
            return cannot(
                TARGET,
                format!("the buffer of {pattern}"),
                &buffer,
                "CPU, CUDA0 or another of `llama-server --list-devices`",
            );
        }
        if Pattern::new(pattern).is_none() {
            return cannot(TARGET, "an expression", &pattern, "one that std::regex takes");
        }
        out.push((pattern.to_string(), buffer.to_string()));
    }
    Ok(out)
}

/// The buffer that the first matching override gives to a tensor.
pub fn buffer_of<'a>(overrides: &'a [Override], tensor: &str) -> Option<&'a str> {
    overrides.iter().find(|(p, _)| Pattern::new(p).is_some_and(|p| p.is_match(tensor))).map(|(_, b)| b.as_str())
}

const TARGET: &str = "llama.cpp";

/// The matrices that stay on the GPU. `[moe layers][MATRICES]`
fn project(tiers: &TwoTiers) -> Vec<[bool; 3]> {
    let mut kept = vec![[false; 3]; tiers.layers.len()];
    let bytes = |i: usize| tiers.expert_bytes[i].0 * tiers.on_gpu[i].len() as u64;
    let mut budget: u64 = (0..tiers.layers.len()).map(|i| tiers.expert_bytes[i].0 * tiers.gpu_count(i) as u64).sum();
    let mut order: Vec<usize> = (0..tiers.layers.len()).collect();
    // Late layers first among equals: llama.cpp's own --n-cpu-moe leaves the first ones to the CPU.
    order.sort_by_key(|i| (std::cmp::Reverse(tiers.gpu_count(*i)), std::cmp::Reverse(*i)));
    for i in order {
        for matrix in &mut kept[i] {
            let size = bytes(i).div_ceil(3);
            if budget >= size {
                budget -= size;
                *matrix = true;
            }
        }
    }
    kept
}

/// Exports a plan. `ik` for ik_llama.cpp.
///
/// # Errors
/// [`PlanError::CannotExport`].
pub fn export(plan: &Plan, ik: bool) -> Result<Exported, PlanError> {
    let tiers = TwoTiers::new(plan, TARGET)?;
    let kept = project(&tiers);
    // Layers by the set of matrices that go to the host.
    let mut arguments: Vec<String> = Vec::new();
    for set in 1..8_u32 {
        let away = |k: &[bool; 3]| (0..3).filter(|m| !k[*m]).fold(0, |bits, m| bits | 1 << m) == set;
        let layers: Vec<String> = (0..kept.len()).filter(|i| away(&kept[*i])).map(|i| tiers.layers[i].to_string()).collect();
        if layers.is_empty() || !tiers.has_gpu {
            continue;
        }
        let all = set == 7;
        let matrices = if all {
            "up|down|gate|gate_up".to_string()
        } else {
            (0..3).filter(|m| set >> m & 1 == 1).map(|m| MATRICES[m]).collect::<Vec<_>>().join("|")
        };
        let every = layers.len() == tiers.layers.len();
        let blocks = if every { r"\.".to_string() } else { format!(r"blk\.({})\.", layers.join("|")) };
        arguments.push(format!("{blocks}ffn_({matrices})_(ch|)exps=CPU"));
    }
    let overrides = parse_overrides(arguments.iter().map(String::as_str))?;
    // What llama.cpp will do with these, tensor by tensor; an expert counts as on the GPU when all its matrices are.
    let mut exported = Vec::new();
    for (i, layer) in tiers.layers.iter().enumerate() {
        let mut on_gpu = tiers.has_gpu;
        for (m, matrix) in MATRICES.iter().enumerate() {
            let here = buffer_of(&overrides, &format!("blk.{layer}.ffn_{matrix}_exps.weight")).is_none();
            if tiers.has_gpu && here != kept[i][m] {
                return cannot(TARGET, format!("the place of layer {layer}'s {matrix} matrix"), &here, kept[i][m].to_string());
            }
            on_gpu &= here;
        }
        exported.push(vec![on_gpu; tiers.on_gpu[i].len()]);
    }
    let mut loss = tiers.loss(&exported);
    loss.notes
        .push("the experts of a layer are one tensor per matrix: whole matrices of whole layers are placed, not experts".into());
    let partial = kept.iter().filter(|k| k.iter().any(|m| *m) && !k.iter().all(|m| *m)).count();
    if partial > 0 {
        loss.notes.push(format!("{partial} layer has some of its matrices on the GPU; its experts count as not there"));
    }
    let r = &plan.request;
    let kv = match r.kv_format.name().to_ascii_lowercase().as_str() {
        "f16" => String::new(),
        other => format!(" -ctk {other} -ctv {other} -fa on"),
    };
    let ot: String = arguments.iter().map(|a| format!(" -ot \"{a}\"")).collect();
    let layers = if tiers.has_gpu { 99 } else { 0 };
    // -c is for all sequences together.
    let context = u64::from(r.context) * u64::from(r.batch);
    let command = format!(
        "llama-server -m {{model}} -ngl {layers}{ot} -c {context} -np {} -ub {} -b {}{kv}",
        r.batch,
        r.chunk_tokens,
        r.chunk_tokens.max(2048),
    );
    let (target, written_for) = if ik {
        ("ik_llama", "ik_llama.cpp of 2026-06: the parser of -ot is llama.cpp's")
    } else {
        ("llama.cpp", "llama.cpp common/arg.cpp @ de93b99")
    };
    Ok(Exported { target, written_for, content: None, command, loss, on_gpu: exported })
}
