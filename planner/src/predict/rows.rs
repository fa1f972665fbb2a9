//! A published run: what somebody says they measured, and with what.
//!
//! The format is that of a JSON list of objects, one per run. It is somebody else's: keys that are not known are passed over and
//! `null` or an absent key means "not stated". A value of the wrong type is refused with the row's id, because a misread figure would
//! silently become a wrong prediction. Fields are described in tools/predict/README.md.

use crate::error::PlanError;
use serde_json::{Map, Value};

/// What is stated about one run.
#[derive(Debug, Clone, PartialEq, Default)]
#[allow(missing_docs, reason = "fields are the keys of the file; units are in their names")]
pub struct Run {
    pub id: String,
    pub sweep_id: Option<String>,
    pub source: Option<String>,
    pub engine: Option<String>,
    pub bench: Option<String>,
    pub model: Option<String>,
    pub quant: Option<String>,
    pub file_gib: Option<f64>,
    pub gpu: Option<String>,
    pub gpu_count: u32,
    pub vram_gb: Option<f64>,
    pub cpu: Option<String>,
    pub cpu_sockets_used: Option<u32>,
    pub ram_type: Option<String>,
    pub ram_mts: Option<f64>,
    pub ram_channels: Option<u32>,
    pub ram_bw_peak_gbs: Option<f64>,
    pub ram_bw_measured_gbs: Option<f64>,
    pub ram_gb: Option<f64>,
    pub pcie_gen: Option<u32>,
    pub pcie_lanes: Option<u32>,
    pub os: Option<String>,
    pub placement_class: Option<String>,
    pub ngl: Option<u32>,
    pub n_cpu_moe: Option<u32>,
    pub moe_layers_on_cpu: Option<u32>,
    pub ot: Option<String>,
    pub flags: Option<String>,
    pub ctx_size: Option<u32>,
    pub ctx_depth: Option<u32>,
    pub prompt_len: Option<u32>,
    pub gen_len: Option<u32>,
    pub threads: Option<u32>,
    pub ubatch: Option<u32>,
    pub kv_type: Option<String>,
    pub decode_tps: Option<f64>,
    pub decode_sd: Option<f64>,
    pub prefill_tps: Option<f64>,
    pub vram_used_gib: Option<f64>,
    pub cpu_weight_mib: Option<f64>,
    pub speculative: bool,
    pub outcome: Option<String>,
    pub quality: Option<String>,
    pub notes: Option<String>,
}

/// Reads the text of a file of runs.
///
/// # Errors
/// [`PlanError::BadRuns`] with the row and the field.
pub fn parse(text: &str) -> Result<Vec<Run>, PlanError> {
    let value: Value = serde_json::from_str(text).map_err(|e| bad("the file", "text", e.to_string(), "a JSON list of runs"))?;
    let Value::Array(list) = value else {
        return Err(bad("the file", "top level", kind(&value).into(), "a JSON list of runs"));
    };
    let runs = list.iter().enumerate().map(|(i, v)| run(i, v)).collect::<Result<Vec<_>, _>>()?;
    let mut ids: Vec<&str> = runs.iter().map(|r| r.id.as_str()).collect();
    ids.sort_unstable();
    match ids.windows(2).find(|w| w[0] == w[1]) {
        Some(w) => Err(bad(w[0], "id", "used by two rows".into(), "ids that differ")),
        None => Ok(runs),
    }
}

fn run(index: usize, value: &Value) -> Result<Run, PlanError> {
    let nth = format!("row {}", index + 1);
    let Value::Object(object) = value else {
        return Err(bad(&nth, "row", kind(value).into(), "an object"));
    };
    let id = Row { id: &nth, object }
        .text("id")?
        .ok_or_else(|| bad(&nth, "id", "not stated".into(), "a name for the row, as every result is listed by it"))?;
    let row = Row { id: &id, object };
    Ok(Run {
        sweep_id: row.text("sweep_id")?,
        source: row.text("source")?,
        engine: row.text("engine")?,
        bench: row.text("bench")?,
        model: row.text("model")?,
        quant: row.text("quant")?,
        file_gib: row.number("file_gib")?,
        gpu: row.text("gpu")?,
        gpu_count: row.count("gpu_count")?.unwrap_or(u32::from(object.get("gpu").is_some_and(|g| !g.is_null()))),
        vram_gb: row.number("vram_gb")?,
        cpu: row.text("cpu")?,
        cpu_sockets_used: row.count("cpu_sockets_used")?,
        ram_type: row.text("ram_type")?,
        ram_mts: row.number("ram_mts")?,
        ram_channels: row.count("ram_channels")?,
        ram_bw_peak_gbs: row.number("ram_bw_peak_gbs")?,
        ram_bw_measured_gbs: row.number("ram_bw_measured_gbs")?,
        ram_gb: row.number("ram_gb")?,
        pcie_gen: row.count("pcie_gen")?,
        pcie_lanes: row.count("pcie_lanes")?,
        os: row.text("os")?,
        placement_class: row.text("placement_class")?,
        ngl: row.count("ngl")?,
        n_cpu_moe: row.count("n_cpu_moe")?,
        moe_layers_on_cpu: row.count("moe_layers_on_cpu")?,
        ot: row.text("ot")?,
        flags: row.text("flags")?,
        ctx_size: row.count("ctx_size")?,
        ctx_depth: row.count("ctx_depth")?,
        prompt_len: row.count("prompt_len")?,
        gen_len: row.count("gen_len")?,
        threads: row.count("threads")?,
        ubatch: row.count("ubatch")?,
        kv_type: row.text("kv_type")?,
        decode_tps: row.number("decode_tps")?,
        decode_sd: row.number("decode_sd")?,
        prefill_tps: row.number("prefill_tps")?,
        vram_used_gib: row.number("vram_used_gib")?,
        cpu_weight_mib: row.number("cpu_weight_mib")?,
        speculative: row.flag("speculative")?.unwrap_or(false),
        outcome: row.text("outcome")?,
        quality: row.text("quality")?,
        notes: row.text("notes")?,
        id,
    })
}

struct Row<'a> {
    id: &'a str,
    object: &'a Map<String, Value>,
}

impl Row<'_> {
    fn get<T>(&self, field: &str, expected: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>, PlanError> {
        match self.object.get(field) {
            None | Some(Value::Null) => Ok(None),
            Some(v) => read(v).map(Some).ok_or_else(|| bad(self.id, field, short(v), expected)),
        }
    }

    fn text(&self, field: &str) -> Result<Option<String>, PlanError> {
        self.get(field, "text or null", |v| v.as_str().map(str::to_string))
    }

    fn flag(&self, field: &str) -> Result<Option<bool>, PlanError> {
        self.get(field, "true, false or null", Value::as_bool)
    }

    /// A size, rate or speed; 0 means that there is none, as in files where nothing was measured.
    fn number(&self, field: &str) -> Result<Option<f64>, PlanError> {
        let read = |v: &Value| v.as_f64().filter(|x| x.is_finite() && (0.0..=1e9).contains(x));
        Ok(self.get(field, "a number from 0 to 1e9, or null", read)?.filter(|x| *x > 0.0))
    }

    fn count(&self, field: &str) -> Result<Option<u32>, PlanError> {
        let read = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok()).filter(|n| *n <= 1 << 30);
        self.get(field, "a whole number from 0 to 2^30, or null", read)
    }
}

fn bad(row: &str, field: &str, found: String, expected: &str) -> PlanError {
    PlanError::BadRuns { row: row.to_string(), field: field.to_string(), found, expected: expected.to_string() }
}

const fn kind(v: &Value) -> &'static str {
    match v {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A value for a message: not more than fits a line.
fn short(v: &Value) -> String {
    let text = v.to_string();
    if text.chars().count() <= 60 { text } else { format!("{}...", text.chars().take(60).collect::<String>()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_keys_pass_and_null_means_not_stated() {
        let runs = parse(r#"[{"id": "a", "colour": 7, "ngl": null, "decode_tps": 12, "gpu": "RTX 3090"}]"#).unwrap();
        assert_eq!((runs[0].ngl, runs[0].decode_tps, runs[0].gpu_count), (None, Some(12.0), 1));
        assert_eq!(parse("[]").unwrap(), []);
    }

    #[test]
    fn wrong_types_name_row_and_field() {
        for (text, words) in [
            ("{}", "an object"),
            ("[", "JSON list"),
            ("[3]", "row 1"),
            (r#"[{"model": "x"}]"#, "row 1: id is not stated"),
            (r#"[{"id": "a", "decode_tps": "fast"}]"#, r#"a: decode_tps is "fast""#),
            (r#"[{"id": "a", "ngl": -1}]"#, "a: ngl is -1"),
            (r#"[{"id": "a", "file_gib": 1e300}]"#, "a: file_gib"),
            (r#"[{"id": "a", "speculative": 0}]"#, "a: speculative"),
            (r#"[{"id": "a"}, {"id": "a"}]"#, "two rows"),
        ] {
            let message = parse(text).unwrap_err().to_string();
            assert!(message.contains(words), "{text}: {message}");
        }
    }
}
