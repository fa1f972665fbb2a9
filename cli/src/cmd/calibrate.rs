//! `tierwise calibrate`: measures this machine thoroughly, so that plans for it are predictions and not guesses.

use crate::args::DeviceArg;
use crate::model;
use crate::ui::{self, Ui, number};
use anyhow::{Context, Result, bail};
use clap::Args;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};
use tierwise_cost::machine::{Calibration, CopySample, Machine, NodeSample, Spread};
use tierwise_cost::quant::QuantFormat;
use tierwise_cost::units::Bytes;
use tierwise_runtime::atomic_file::write_atomic;
use tierwise_runtime::backend::open;
use tierwise_runtime::memory;
use tierwise_runtime::probe::{CalibrateOptions, Effort, add_device, calibrate};

/// `calibrate`
#[derive(Debug, Args)]
pub struct CalibrateArgs {
    /// File to write. [default: machine.toml in ~/.cache/tierwise, which plan, run and bench read]
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Only the most common weight formats: less than 20 seconds instead of about three minutes.
    #[arg(long)]
    pub quick: bool,
    /// Threads to compute with. [default: all]
    #[arg(long, short, value_name = "N")]
    pub threads: Option<usize>,
    /// Folder on the disk to measure: where models lie. Up to 512 MiB are written there and deleted.
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub folder: PathBuf,
    /// GPU to measure beside the CPU: copies to it, products on it, its launches. auto takes the best there is, if there is one.
    #[arg(long, value_enum, default_value_t = DeviceArg::Auto)]
    pub device: DeviceArg,
    /// GPU memory that there is, where its driver does not say (WGSL).
    #[arg(long, value_name = "SIZE")]
    pub vram: Option<Bytes>,
    /// Measure next to nothing, for tests of this program.
    #[arg(long, hide = true, conflicts_with = "quick")]
    pub tiny: bool,
}

/// Above this the machine was doing something else.
const NOISY: f64 = 0.15;

pub fn run(args: &CalibrateArgs, ui: &Ui) -> Result<()> {
    if !args.folder.is_dir() {
        bail!("--folder {}: not a folder; give the one where models lie", args.folder.display());
    }
    // Before minutes are spent.
    let device = match open(args.device.choice(), &model::device_options()) {
        Ok(opened) => opened.backend,
        Err(e) => bail!("{e}; to calibrate without it: --device cpu"),
    };
    let output = match &args.output {
        Some(path) => path.clone(),
        None => {
            let folder = model::cache_dir().context("no home folder is known: say where to write with -o FILE")?;
            std::fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
            folder.join("machine.toml")
        }
    };
    let effort = match (args.tiny, args.quick) {
        (true, _) => Effort::tiny(),
        (_, true) => Effort::quick(),
        _ => Effort::full(),
    };
    let options = CalibrateOptions {
        threads: args.threads,
        folder: args.folder.clone(),
        effort,
        date: today(),
        program: concat!("tierwise ", env!("CARGO_PKG_VERSION")).to_string(),
    };
    let bar = ui.progress("calibrating", 1000, false);
    let machine = calibrate(&options, &mut |what, share| {
        bar.set_message(what.to_string());
        bar.set_position((share * 1000.0) as u64);
    });
    bar.finish_and_clear();
    let mut machine = machine?;
    if let Some(backend) = device {
        let what = format!("GPU {} measured through {}", backend.info().name, backend.info().backend);
        add_device(&mut machine, backend, args.vram)?;
        if let Some(c) = &mut machine.calibration {
            c.notes.retain(|n| !n.contains("GPU"));
            c.notes.push(what);
        }
    }
    write_atomic(&output, machine.to_toml()?.as_bytes())?;
    let calibration = machine.calibration.as_ref().context("the calibration has samples")?;
    let noise = calibration.noise();
    if noise > NOISY {
        ui.note(format!(
            "this machine was busy: runs of the same work differ by {} (median); the intervals are as wide. \
             For better numbers stop other programs and run it again",
            ui::percent(noise)
        ));
    }
    ui.result(&serde_json::to_value(&machine).context("machine to JSON")?, || {
        format!(
            "{}\nwritten to {}\nrepeat: run it again; repeated runs agree within their own intervals\n",
            describe(&machine, calibration),
            output.display()
        )
    })
}

/// What was found, for people.
fn describe(machine: &Machine, c: &Calibration) -> String {
    let cpu = &machine.processors[0];
    let mut text = format!(
        "{}, {} threads, {} kernels; measured in {} s; runs differ by {} (median)\n\n",
        cpu.name,
        c.threads,
        c.kernels,
        number(c.seconds),
        ui::percent(c.noise())
    );
    let spread = |s: &Spread| format!("{} ({} to {})", number(s.median), number(s.min), number(s.max));
    text += &ui::table(
        &["reading memory", "GB/s"],
        c.read.iter().map(|s| {
            let node = s.node.map_or("all nodes".to_string(), |n| format!("node {n}"));
            vec![format!("{node}, {} threads", s.threads), spread(&s.gb_per_s)]
        }),
        true,
    );
    text += "\n\n";
    text += &weights_table(c);
    text += "\n\n";
    text += &ui::table(
        &["attention", "us", "GFLOP/s"],
        c.attention.iter().map(|s| {
            let what = format!("{} tokens after {}, {} heads over {}", s.tokens, s.past, s.heads, s.kv_heads);
            vec![what, spread(&s.us), number(s.flops_per_byte * s.kv_bytes / s.us.median / 1e3)]
        }),
        true,
    );
    text += &format!("\n\nwaking all threads and waiting for them: {} us\n", spread(&c.launch_us));
    if !c.disk.is_empty() {
        text += "\n";
        text += &ui::table(
            &["direct reads from the disk", "GB/s"],
            c.disk.iter().map(|s| vec![format!("{} blocks, {} at a time", Bytes(s.block), s.depth), spread(&s.gb_per_s)]),
            true,
        );
        text += "\n";
    }
    if !c.nodes.is_empty() {
        let row = |s: &NodeSample| {
            let nodes = machine.memory(&s.memory).map_or_else(String::new, |m| memory::words(&m.numa_nodes));
            let both = s
                .contended_gb_per_s
                .as_ref()
                .map_or("-".into(), |[own, home]| format!("{} beside {}", spread(own), spread(home)));
            vec![format!("{} ({nodes})", s.memory), spread(&s.gb_per_s), spread(&s.latency_ns), spread(&s.expert_gb_per_s), both]
        };
        let headers = ["memory on nodes", "GB/s", "latency ns", "experts GB/s", "GB/s while home memory is read"];
        text += &format!("\n{}\n", ui::table(&headers, c.nodes.iter().map(row), true));
    }
    if !c.copies.is_empty() {
        let row = |s: &CopySample| {
            let near = match s.near {
                Some(true) => "yes",
                Some(false) => "no",
                None => "unknown",
            };
            vec![format!("node {} ({})", s.node, s.memory), near.into(), spread(&s.gb_per_s)]
        };
        text += &format!("\n{}\n", ui::table(&["copies to the GPU from", "GPU's node", "GB/s"], c.copies.iter().map(row), true));
    }
    for note in &c.notes {
        text += &format!("\nnote: {note}");
    }
    text
}

/// Rates of products with weights: bytes per second at one token, operations per second at many.
fn weights_table(c: &Calibration) -> String {
    let formats: Vec<QuantFormat> =
        QuantFormat::ALL.iter().copied().filter(|f| c.matmuls.iter().any(|s| s.format == *f)).collect();
    // (elements, tokens, microseconds) of the samples with the fewest and the most tokens.
    let row = |name: String, format: QuantFormat, samples: Vec<(f64, f64, f64)>| {
        let (first, last) = (samples.first()?, samples.last()?);
        Some(vec![
            name,
            number(first.0 * format.bits_per_element() / 8.0 / first.2 / 1e3),
            number(2.0 * first.0 * first.1 / first.2 / 1e3),
            last.1.to_string(),
            number(2.0 * last.0 * last.1 / last.2 / 1e3),
        ])
    };
    let mut rows = Vec::new();
    for format in formats {
        let of_format = c.experts.iter().filter(|s| s.format == format);
        // Eight experts: what most models compute per token.
        let experts = of_format
            .filter(|s| s.distinct == 8.0)
            .map(|s| (3.0 * f64::from(s.hidden) * f64::from(s.inner) * s.distinct, s.tokens, s.us.median))
            .collect();
        rows.extend(row(format!("{format} experts"), format, experts));
        let matmuls = c.matmuls.iter().filter(|s| s.format == format);
        let matmuls = matmuls.map(|s| (f64::from(s.rows) * f64::from(s.cols), s.tokens, s.us.median)).collect();
        rows.extend(row(format!("{format} matrix"), format, matmuls));
    }
    ui::table(&["products with weights", "GB/s at 1 token", "GFLOP/s at 1", "tokens", "GFLOP/s at these"], rows, true)
}

/// Today's day in UTC as `2026-11-21` (days to civil date: H. Hinnant, "chrono-compatible low-level date algorithms").
fn today() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    civil((seconds / 86_400) as i64)
}

/// The day that is `days` after 1970-01-01.
fn civil(days: i64) -> String {
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let day_of_era = z.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::civil;

    #[test]
    fn days_are_those_of_the_calendar() {
        for (days, text) in [(0, "1970-01-01"), (11_016, "2000-02-29"), (20_778, "2026-11-21"), (20_818, "2026-12-31")] {
            assert_eq!(civil(days), text);
        }
    }
}
