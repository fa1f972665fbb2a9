//! The rows as CSV (RFC 4180): every input and every prediction, plain numbers in base units.

use tierwise_planner::capacity::Row;
use tierwise_planner::plan::Interval;

/// The whole table.
pub fn text(rows: &[Row]) -> String {
    let mut out = String::new();
    let header: Vec<&str> = columns(None).into_iter().map(|c| c.0).collect();
    line(&mut out, header.iter().map(ToString::to_string));
    for row in rows {
        line(&mut out, columns(Some(row)).into_iter().map(|c| c.1));
    }
    out
}

/// Names and values; empty values without a row or without a result.
fn columns(row: Option<&Row>) -> Vec<(&'static str, String)> {
    let p = row.map(|r| &r.inputs);
    let e = row.and_then(|r| r.expected.as_ref());
    let s = e.and_then(|e| e.serving.as_ref());
    let limit = s.and_then(|s| s.limit.as_ref());
    fn opt<T: ToString>(v: Option<T>) -> String {
        v.map_or_else(String::new, |v| v.to_string())
    }
    let mut c = vec![
        ("row", opt(row.map(|r| r.row))),
        ("model", opt(p.map(|p| &p.model))),
        ("format", opt(p.map(|p| &p.format))),
        ("machine", opt(p.and_then(|p| p.machine.as_ref()))),
        ("vram_bytes", opt(p.and_then(|p| p.vram).map(|b| b.0))),
        ("ram_bytes", opt(p.and_then(|p| p.ram).map(|b| b.0))),
        ("cxl_bytes", opt(p.and_then(|p| p.cxl).map(|b| b.0))),
        ("cxl_bandwidth_bytes_per_s", opt(p.and_then(|p| p.cxl_bandwidth).map(|b| b.0))),
        ("pcie_bandwidth_bytes_per_s", opt(p.and_then(|p| p.pcie_bandwidth).map(|b| b.0))),
        ("dram_bandwidth_bytes_per_s", opt(p.and_then(|p| p.dram_bandwidth).map(|b| b.0))),
        ("context", opt(p.map(|p| p.context))),
        ("batch", opt(p.map(|p| p.batch))),
        ("arrivals", opt(p.and_then(|p| p.arrivals.as_ref()))),
    ];
    let mut interval = |names: [&'static str; 3], i: Option<Interval>| {
        let [value, low, high] = names;
        c.push((value, opt(i.map(|i| i.value))));
        c.push((low, opt(i.map(|i| i.low))));
        c.push((high, opt(i.map(|i| i.high))));
    };
    interval(
        ["decode_tokens_per_s_per_user", "decode_tokens_per_s_per_user_low", "decode_tokens_per_s_per_user_high"],
        e.map(|e| e.decode_tokens_per_s_per_user),
    );
    interval(["decode_tokens_per_s", "decode_tokens_per_s_low", "decode_tokens_per_s_high"], e.map(|e| e.decode_tokens_per_s));
    interval(
        ["prefill_tokens_per_s", "prefill_tokens_per_s_low", "prefill_tokens_per_s_high"],
        e.map(|e| e.prefill_tokens_per_s),
    );
    interval(["ttft_s", "ttft_s_low", "ttft_s_high"], e.map(|e| e.ttft_s));
    interval(["tpot_s", "tpot_s_low", "tpot_s_high"], e.map(|e| e.tpot_s));
    let traffic = e.map(|e| e.bytes_per_token.iter().map(|b| format!("{} {}", b.on, b.bytes.0)).collect::<Vec<_>>().join("; "));
    c.extend([
        ("binding", opt(e.map(|e| &e.binding))),
        ("binding_share", opt(e.map(|e| e.binding_share))),
        ("bytes_per_token", opt(traffic)),
        ("gap", opt(e.map(|e| e.gap))),
        ("vram_used_bytes", opt(e.map(|e| e.vram_used.0))),
        ("ram_used_bytes", opt(e.map(|e| e.ram_used.0))),
        ("cxl_used_bytes", opt(e.map(|e| e.cxl_used.0))),
        ("kv_bytes", opt(e.map(|e| e.kv_bytes.0))),
        ("experts_in_vram", opt(e.map(|e| e.experts_in_vram))),
        ("served_requests_per_s", opt(limit.map(|l| l.rate_per_s))),
        ("served_load", opt(s.map(|_| limit.map_or(0.0, |l| l.load)))),
        ("served_users", opt(limit.map(|l| l.metrics.users))),
        ("served_attained", opt(limit.map(|l| l.metrics.attained))),
        ("served_ttft_p90_s", opt(limit.map(|l| l.metrics.ttft_s.p90))),
        ("served_tpot_p90_s", opt(limit.map(|l| l.metrics.tpot_s.p90))),
        ("served_itl_p99_s", opt(limit.map(|l| l.metrics.itl_s.p99))),
        ("alone_ttft_p90_s", opt(s.map(|s| s.alone.ttft_s.p90))),
        ("alone_tpot_p90_s", opt(s.map(|s| s.alone.tpot_s.p90))),
        ("error", opt(row.and_then(|r| r.error.as_ref()))),
    ]);
    c
}

fn line(out: &mut String, fields: impl Iterator<Item = String>) {
    for (i, field) in fields.enumerate() {
        if i > 0 {
            out.push(',');
        }
        if field.contains([',', '"', '\n', '\r']) {
            out.push('"');
            out.push_str(&field.replace('"', "\"\""));
            out.push('"');
        } else {
            out.push_str(&field);
        }
    }
    out.push_str("\r\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_quoted_where_they_must_be() {
        let mut out = String::new();
        line(&mut out, ["a", "b,c", "d\"e", "f\ng"].into_iter().map(String::from));
        assert_eq!(out, "a,\"b,c\",\"d\"\"e\",\"f\ng\"\r\n");
    }
}
