//! Python's ways of writing values down, on which chat templates rely: `str`, `repr`, `json.dumps`, `strftime`.
//!
//! Sources: the Python library reference on `repr`, `json` and `time.strftime`; dates by the days-from-civil method
//! (Hinnant, "chrono-compatible low-level date algorithms").

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind};
use std::fmt::Write;

/// `str(value)`; what `{{ value }}` prints.
pub(super) fn text(value: &Value) -> String {
    match value.as_str() {
        Some(text) => text.to_owned(),
        None => repr(value),
    }
}

fn repr(value: &Value) -> String {
    let list = |open: &str, items: Vec<String>, close: &str| format!("{open}{}{close}", items.join(", "));
    match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::None => "None".to_owned(),
        ValueKind::Bool => if value.is_true() { "True" } else { "False" }.to_owned(),
        ValueKind::String => quoted(value.as_str().unwrap_or_default()),
        ValueKind::Seq => list("[", value.try_iter().into_iter().flatten().map(|v| repr(&v)).collect(), "]"),
        ValueKind::Map => {
            let item = |key: Value| {
                let inner = value.get_item(&key).unwrap_or_default();
                format!("{}: {}", repr(&key), repr(&inner))
            };
            list("{", value.try_iter().into_iter().flatten().map(item).collect(), "}")
        }
        ValueKind::Number if !value.is_integer() => f64::try_from(value.clone()).map_or_else(|_| value.to_string(), float),
        _ => value.to_string(),
    }
}

/// `repr` of a float: the shortest digits that read back the same, with an exponent below 1e-4 and from 1e16.
fn float(value: f64) -> String {
    let magnitude = value.abs();
    if !value.is_finite() || magnitude == 0.0 || (1e-4..1e16).contains(&magnitude) {
        return format!("{value:?}").replace("NaN", "nan");
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let (sign, exponent) = exponent.strip_prefix('-').map_or(("+", exponent), |e| ("-", e));
    format!("{digits}e{sign}{exponent:0>2}")
}

/// Single quotes unless only double quotes save an escape.
fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if c < ' ' || c == '\x7F' => _ = write!(out, "\\x{:02x}", c as u32),
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

/// Options of `json.dumps`.
pub(super) struct JsonStyle<'a> {
    pub indent: Option<usize>,
    pub item: &'a str,
    pub key: &'a str,
    pub ensure_ascii: bool,
    pub sort_keys: bool,
}

/// `json.dumps(value, ...)`.
pub(super) fn json(value: &serde_json::Value, style: &JsonStyle) -> String {
    let mut out = String::new();
    write_json(value, style, 0, &mut out);
    out
}

fn write_json(value: &serde_json::Value, style: &JsonStyle, depth: usize, out: &mut String) {
    use serde_json::Value as Json;
    let new_line = |out: &mut String, depth: usize| {
        if let Some(width) = style.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', width * depth));
        }
    };
    match value {
        Json::Array(items) if items.is_empty() => out.push_str("[]"),
        Json::Object(items) if items.is_empty() => out.push_str("{}"),
        Json::Array(items) => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    out.push_str(style.item);
                }
                new_line(out, depth + 1);
                write_json(item, style, depth + 1, out);
            }
            new_line(out, depth);
            out.push(']');
        }
        Json::Object(items) => {
            let mut items: Vec<_> = items.iter().collect();
            if style.sort_keys {
                items.sort_by_key(|(key, _)| key.as_str());
            }
            out.push('{');
            for (i, (key, item)) in items.into_iter().enumerate() {
                if i > 0 {
                    out.push_str(style.item);
                }
                new_line(out, depth + 1);
                write_json_string(key, style, out);
                out.push_str(style.key);
                write_json(item, style, depth + 1, out);
            }
            new_line(out, depth);
            out.push('}');
        }
        Json::String(text) => write_json_string(text, style, out),
        Json::Number(number) => match number.as_f64().filter(|_| number.is_f64()) {
            Some(value) => out.push_str(&float(value)),
            None => _ = write!(out, "{number}"),
        },
        Json::Null | Json::Bool(_) => _ = write!(out, "{value}"),
    }
}

fn write_json_string(text: &str, style: &JsonStyle, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\x08' => out.push_str("\\b"),
            '\x0C' => out.push_str("\\f"),
            c if c < ' ' || (style.ensure_ascii && c >= '\x7F' && c != '\x7F') => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    _ = write!(out, "\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

const MONTHS: [&str; 12] =
    ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"];
/// From the weekday of 1970-01-01.
const WEEKDAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// `strftime` of a time in seconds since 1970, in UTC.
pub(super) fn strftime(format: &str, unix_seconds: u64) -> Result<String, Error> {
    let days = unix_seconds / 86_400;
    let (hour, minute, second) = (unix_seconds / 3600 % 24, unix_seconds / 60 % 60, unix_seconds % 60);
    // Years begin in March here, so that the leap day is the last one.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let month_name = MONTHS[month as usize - 1];
    let weekday = WEEKDAYS[(days % 7) as usize];
    let hour_of_twelve = (hour + 11) % 12 + 1;

    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let written = match chars.next() {
            Some('Y') => write!(out, "{year}"),
            Some('y') => write!(out, "{:02}", year % 100),
            Some('m') => write!(out, "{month:02}"),
            Some('d') => write!(out, "{day:02}"),
            Some('e') => write!(out, "{day:2}"),
            Some('B') => write!(out, "{month_name}"),
            Some('b' | 'h') => write!(out, "{}", &month_name[..3]),
            Some('A') => write!(out, "{weekday}"),
            Some('a') => write!(out, "{}", &weekday[..3]),
            Some('H') => write!(out, "{hour:02}"),
            Some('I') => write!(out, "{hour_of_twelve:02}"),
            Some('p') => write!(out, "{}", if hour < 12 { "AM" } else { "PM" }),
            Some('M') => write!(out, "{minute:02}"),
            Some('S') => write!(out, "{second:02}"),
            Some('F') => write!(out, "{year}-{month:02}-{day:02}"),
            Some('T') => write!(out, "{hour:02}:{minute:02}:{second:02}"),
            Some('Z') => write!(out, "UTC"),
            Some('z') => write!(out, "+0000"),
            // glibc: no padding.
            Some('-') => match chars.next() {
                Some('d') => write!(out, "{day}"),
                Some('m') => write!(out, "{month}"),
                Some('H') => write!(out, "{hour}"),
                Some('I') => write!(out, "{hour_of_twelve}"),
                other => return Err(unknown_field(format, other)),
            },
            Some('%') => write!(out, "%"),
            other => return Err(unknown_field(format, other)),
        };
        written.expect("writing to a string");
    }
    Ok(out)
}

fn unknown_field(format: &str, field: Option<char>) -> Error {
    let field = field.map_or_else(|| "nothing".to_owned(), |c| format!("{c:?}"));
    Error::new(ErrorKind::InvalidOperation, format!("strftime_now({format:?}): {field} after % is not supported"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        for (seconds, expected) in [
            (0, "Thu 01 Jan 1970 00:00:00 AM 12"),
            (951_782_399, "Mon 28 Feb 2000 23:59:59 PM 11"),
            (951_782_400, "Tue 29 Feb 2000 00:00:00 AM 12"),
            (951_868_800, "Wed 01 Mar 2000 00:00:00 AM 12"),
            (1_732_190_400, "Thu 21 Nov 2024 12:00:00 PM 12"),
            (4_107_542_400, "Mon 01 Mar 2100 00:00:00 AM 12"),
        ] {
            assert_eq!(strftime("%a %d %b %Y %T %p %I", seconds).expect("known fields"), expected);
        }
        assert_eq!(
            strftime("%F|%-d.%-m.%y %A, %B %e 100%%", 1_735_689_600).expect("known fields"),
            "2025-01-01|1.1.25 Wednesday, January  1 100%"
        );
        assert!(strftime("%Q", 0).is_err() && strftime("100%", 0).is_err());
    }

    #[test]
    fn floats() {
        for (value, expected) in [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e-4, "0.0001"),
            (0.00005, "5e-05"),
            (1.5e-7, "1.5e-07"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (-1.25e20, "-1.25e+20"),
            (1e100, "1e+100"),
            (f64::INFINITY, "inf"),
        ] {
            assert_eq!(float(value), expected);
        }
    }

    #[test]
    fn values_as_python_prints_them() {
        let value = Value::from(minijinja::value::Serde(&serde_json::json!({
            "a": [1, 2.5, true, null], "b": "it's", "c": "say \"it's\"\n", "d": {}, "e": []
        })));
        assert_eq!(text(&value), r#"{'a': [1, 2.5, True, None], 'b': "it's", 'c': 'say "it\'s"\n', 'd': {}, 'e': []}"#);
        assert_eq!(text(&Value::from("plain")), "plain");
        assert_eq!(text(&Value::UNDEFINED), "");
    }
}
